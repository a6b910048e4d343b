import json
import math

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import binom
from sklearn import metrics as sk

from etude.measure.intervals import confidence_intervals, mcnemar
from etude.measure.metrics import classification, perplexity, text_metrics

LABELS = ["negative", "neutral", "positive"]
label = st.sampled_from(LABELS)
answer = st.sampled_from([*LABELS, None])


def flat(scores):
    return [scores["precision"], scores["recall"], scores["f1"]]


@settings(deadline=None)
@given(st.lists(st.tuples(label, answer), min_size=1, max_size=60))
def test_classification_equals_scikit_learn(rows):
    truth = [t for t, _ in rows]
    predicted = [p for _, p in rows]
    # For scikit-learn, None is one more class that `labels` does not name.
    as_strings = [p or "zzz" for p in predicted]

    result = classification(truth, predicted, LABELS)

    assert result["accuracy"] == sk.accuracy_score(truth, as_strings)
    for average in ("macro", "weighted"):
        expected = sk.precision_recall_fscore_support(
            truth, as_strings, labels=LABELS, average=average, zero_division=0
        )
        assert flat(result[average]) == pytest.approx(expected[:3])
        assert result[average]["support"] == len(rows)
    per_class = sk.precision_recall_fscore_support(
        truth, as_strings, labels=LABELS, zero_division=0
    )
    for index, name in enumerate(LABELS):
        scores = result["per_class"][name]
        assert [*flat(scores), scores["support"]] == pytest.approx([c[index] for c in per_class])
    width = 4 if None in predicted else 3
    matrix = sk.confusion_matrix(truth, as_strings, labels=[*LABELS, "zzz"])[:3, :width]
    assert result["confusion"] == matrix.tolist()
    assert result["columns"] == [*LABELS, "unparseable"][:width]
    assert json.loads(json.dumps(result)) == result


def test_classification_by_hand_with_an_unparseable_answer():
    result = classification(["a", "a", "b", "b"], ["a", None, "b", "a"], ["a", "b"])
    assert result["accuracy"] == 0.5
    assert result["unparseable"] == 1
    assert result["confusion"] == [[1, 0, 1], [1, 1, 0]]
    assert result["columns"] == ["a", "b", "unparseable"]
    assert result["per_class"]["a"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert flat(result["per_class"]["b"]) == pytest.approx([1, 0.5, 2 / 3])
    assert result["macro"]["f1"] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_a_label_named_unparseable_is_not_mistaken_for_one():
    result = classification(["unparseable", "b"], ["unparseable", None], ["unparseable", "b"])
    assert result["confusion"] == [[1, 0, 0], [0, 0, 1]]
    assert result["accuracy"] == 0.5


def test_all_unparseable_scores_zero():
    result = classification(["a", "b"], [None, None], ["a", "b"])
    assert (result["accuracy"], result["macro"]["f1"]) == (0, 0)
    assert result["confusion"] == [[0, 0, 1], [0, 0, 1]]


def row_bootstrap(confusion, samples, seed):
    """The literal definition: draw rows with replacement, let scikit-learn score each draw."""
    matrix = np.array(confusion)
    rows = np.repeat(np.argwhere(matrix >= 0), matrix.ravel(), axis=0)
    rng = np.random.default_rng(seed)
    scores = []
    for _ in range(samples):
        true, guessed = rows[rng.integers(len(rows), size=len(rows))].T
        f1 = sk.f1_score(
            true, guessed, labels=range(len(confusion)), average="macro", zero_division=0
        )
        scores.append((np.mean(true == guessed), f1))
    return np.array(scores)


@pytest.mark.parametrize(
    "confusion",
    [
        [[30, 5, 2], [6, 20, 8], [1, 4, 44]],
        # Unparseable answers, and a class so rare that whole resamples miss it (F1 = 0 there).
        [[30, 5, 0, 3], [6, 20, 0, 2], [0, 1, 1, 0]],
        # Precision far from recall: a macro recall could not pass for a macro-F1.
        [[20, 0, 1], [30, 5, 0], [25, 0, 4]],
    ],
)
def test_bootstrap_has_the_distribution_of_row_resampling(confusion):
    reference = row_bootstrap(confusion, samples=1500, seed=1)
    for level in (0.5, 0.95):
        ours = confidence_intervals(confusion, samples=20_000, level=level, seed=2)
        tails = [(1 - level) / 2, (1 + level) / 2]
        for column, name in enumerate(("accuracy", "macro_f1")):
            expected = np.quantile(reference[:, column], tails)
            # The 2.5 % quantile of 1500 draws is known to 0.07 standard deviations; and the
            # metrics move in steps, of 1 / rows for accuracy.
            tolerance = reference[:, column].std() / 3
            assert [ours[name]["low"], ours[name]["high"]] == pytest.approx(expected, abs=tolerance)


def test_bootstrap_of_accuracy_has_binomial_quantiles():
    ours = confidence_intervals([[40, 10], [20, 30]], samples=50_000, level=0.9, seed=0)
    expected = binom.ppf([0.05, 0.95], 100, 0.7) / 100
    assert [ours["accuracy"]["low"], ours["accuracy"]["high"]] == pytest.approx(
        expected, abs=0.0101
    )


def test_bootstrap_edges():
    perfect = confidence_intervals([[5, 0], [0, 5]], samples=200, level=0.95, seed=0)
    assert perfect["accuracy"] == {"low": 1, "high": 1}
    assert perfect["macro_f1"]["high"] == 1
    one_class = confidence_intervals([[5, 0], [0, 0]], samples=200, level=0.95, seed=0)
    assert one_class["macro_f1"] == {"low": 0.5, "high": 0.5}
    noisy = [[7, 3], [4, 6]]
    first = confidence_intervals(noisy, samples=200, level=0.95, seed=0)
    assert first == confidence_intervals(noisy, samples=200, level=0.95, seed=0)
    assert json.loads(json.dumps(first)) == first


def test_mcnemar_by_hand():
    # Only the first right: 1 row; only the second right: 5 rows; both right 1, both wrong 1.
    truth = ["a"] * 8
    first = ["a", "b", "b", "b", "b", None, "a", "b"]
    second = ["b", "a", "a", "a", "a", "a", "a", None]
    result = mcnemar(truth, first, second)
    assert (result["only_first_right"], result["only_second_right"]) == (1, 5)
    # Two-sided: 2 * P(X <= 1), X ~ Binomial(6, 1/2) = 2 * (1 + 6) / 64.
    assert result["p_value"] == pytest.approx(14 / 64)
    swapped = mcnemar(truth, second, first)
    assert (swapped["only_first_right"], swapped["p_value"]) == (5, result["p_value"])


def test_mcnemar_without_discordant_rows():
    assert mcnemar(["a", "b"], ["a", None], ["a", "a"]) == {
        "only_first_right": 0,
        "only_second_right": 0,
        "p_value": 1.0,
    }
    with pytest.raises(ValueError, match="longer"):
        mcnemar(["a"], ["a"], ["a", "b"])


def test_perplexity():
    assert perplexity(6.0, 3) == pytest.approx(math.e**2)
    assert perplexity(0.0, 5) == 1
    assert perplexity(1e6, 1) is None  # beyond all numbers


def test_rouge_l_by_hand():
    # Longest common subsequence "the cat on mat": 4 of 6 reference words, 4 of 5 response words.
    result = text_metrics(["the cat sat on the mat"], ["the cat lay on mat"])
    precision, recall = 4 / 5, 4 / 6
    assert result["rouge_l"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_text_metrics_equal_the_libraries():
    references = ["The cats were sitting on the mat.", "Paris", "a b c"]
    responses = ["A cat sat on the mat.", " Paris\n", ""]
    result = text_metrics(references, responses)
    scorer = RougeScorer(["rougeL"])
    rouge = [
        scorer.score(a, b)["rougeL"].fmeasure for a, b in zip(references, responses, strict=True)
    ]
    assert result["rows"] == 3
    assert result["exact_match"] == pytest.approx(1 / 3)
    assert result["rouge_l"] == pytest.approx(np.mean(rouge))
    assert result["chrf"] == pytest.approx(sacrebleu.corpus_chrf(responses, [references]).score)
    assert json.loads(json.dumps(result)) == result


def test_text_metrics_ends_of_the_scale():
    same = text_metrics(["some words here"], ["some words here"])
    assert (same["exact_match"], same["rouge_l"]) == (1, 1)
    assert same["chrf"] == pytest.approx(100)
    other = text_metrics(["some words here"], ["zzz"])
    assert (other["exact_match"], other["rouge_l"], other["chrf"]) == (0, 0, 0)
    with pytest.raises(ValueError, match="shorter"):
        text_metrics(["a"], [])
