"""Metrics against a reference: classes, confidence intervals, paired tests, perplexity, text.

Every result is a plain dictionary of JSON values. scikit-learn, SciPy, sacreBLEU and rouge-score
do the arithmetic; what is ours is the unparseable answer and the vectorised bootstrap.
"""

import math
from collections.abc import Sequence
from typing import Any, TypedDict

UNPARSEABLE = "unparseable"


class Scores(TypedDict):
    """Precision, recall and F1, each 0 to 1, and the rows they rest on."""

    precision: float
    recall: float
    f1: float
    support: int


class Classification(TypedDict):
    """`confusion[i][j]` counts the rows of true class `labels[i]` predicted as `columns[j]`."""

    rows: int
    unparseable: int
    accuracy: float
    macro: Scores
    weighted: Scores
    per_class: dict[str, Scores]
    labels: list[str]
    columns: list[str]
    confusion: list[list[int]]


class Interval(TypedDict):
    """The two ends of a confidence interval."""

    low: float
    high: float


class ConfidenceIntervals(TypedDict):
    """Percentile bootstrap intervals, and how they were drawn."""

    accuracy: Interval
    macro_f1: Interval
    level: float
    samples: int


class PairedTest(TypedDict):
    """Rows that only one of two classifiers got right, and the p-value of that imbalance."""

    only_first_right: int
    only_second_right: int
    p_value: float


class PairedLosses(TypedDict):
    """How many rows each of two models finds likelier, and the p-value of the difference."""

    first_likelier: int
    second_likelier: int
    p_value: float


class TextMetrics(TypedDict):
    """`exact_match` and `rouge_l` are 0 to 1, `chrf` is 0 to 100."""

    rows: int
    exact_match: float
    rouge_l: float
    chrf: float


def classification(
    truth: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]
) -> Classification:
    """Accuracy, precision, recall, F1 and the confusion matrix, all by scikit-learn.

    A `None` in `predicted` is an answer that names no label: it counts as wrong, lowers the
    recall of its true class and the precision of none, and gets a last column "unparseable" in
    the confusion matrix when there is any. Macro averages run over all of `labels`; a ratio of
    0/0 is 0 (`zero_division=0`).

    Raises:
        ValueError: no rows, unequal lengths, repeated labels, or a value that is not in `labels`.
    """
    import numpy as np
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

    _check_rows(truth, predicted)
    # Integer codes: no string that a user picks as a label can collide with "unparseable".
    codes: dict[str | None, int] = {label: code for code, label in enumerate(labels)}
    if len(codes) != len(labels):
        raise ValueError(f"labels are repeated: {list(labels)}")
    unknown = ({*truth, *predicted} - codes.keys() - {None}) | ({None} & set(truth))
    if unknown:
        raise ValueError(f"not among the labels {list(labels)}: {sorted(map(repr, unknown))}")
    codes[None] = len(labels)
    true_codes = [codes[label] for label in truth]
    predicted_codes = [codes[label] for label in predicted]

    known = list(range(len(labels)))
    unparseable = predicted_codes.count(len(labels))
    width = len(labels) + bool(unparseable)
    confusion = confusion_matrix(true_codes, predicted_codes, labels=list(range(width)))

    def scores(average: str | None) -> list[Scores]:
        precision, recall, f1, _ = precision_recall_fscore_support(
            true_codes, predicted_codes, labels=known, average=average, zero_division=0
        )
        support = [len(truth)] if average else confusion.sum(axis=1)[known]
        return [
            Scores(precision=float(p), recall=float(r), f1=float(f), support=int(s))
            for p, r, f, s in zip(*np.atleast_1d(precision, recall, f1), support, strict=True)
        ]

    return Classification(
        rows=len(truth),
        unparseable=unparseable,
        accuracy=float(accuracy_score(true_codes, predicted_codes)),
        macro=scores("macro")[0],
        weighted=scores("weighted")[0],
        per_class=dict(zip(labels, scores(None), strict=True)),
        labels=list(labels),
        columns=[*labels, UNPARSEABLE][:width],
        confusion=confusion[: len(labels)].tolist(),
    )


def confidence_intervals(
    confusion: Sequence[Sequence[int]], *, samples: int, level: float, seed: int
) -> ConfidenceIntervals:
    """Percentile bootstrap intervals of accuracy and macro-F1, by resampling rows.

    A metric of a resample depends only on how many rows fall in each (truth, predicted) cell,
    and n rows drawn with replacement fall in the cells as one multinomial draw: so each resample
    is `multinomial(n, confusion / n)`, exactly, without touching rows. Macro-F1 averages
    2 TP / (support + predicted) over all labels, 0 where that is 0/0, as scikit-learn does.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    Args:
        confusion: `Classification["confusion"]`, [labels, labels] or [labels, labels + 1].
        samples: number of resamples.
        level: coverage, strictly between 0 and 1, such as 0.95.
        seed: of the draws.

    Raises:
        ValueError: the matrix holds no rows, `samples` < 1, or `level` not strictly in (0, 1).
    """
    import numpy as np

    matrix = np.asarray(confusion, dtype=np.int64)
    rows = int(matrix.sum())
    if rows == 0:
        raise ValueError("no rows: the confusion matrix is empty")
    if samples < 1 or not 0 < level < 1:
        raise ValueError(f"need samples >= 1 and 0 < level < 1, got {samples} and {level}")
    # Only cells that hold rows can be drawn: at most `rows` of them, however many labels.
    true, guessed = np.nonzero(matrix)
    draws = np.random.default_rng(seed).multinomial(rows, matrix[true, guessed] / rows, samples)
    identity = np.eye(matrix.shape[1])[:, : matrix.shape[0]]
    hits = draws @ (identity[true] * (true == guessed)[:, None])  # [samples, labels]
    total = draws @ identity[true] + draws @ identity[guessed]  # support + predicted
    f1 = np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0)

    def interval(values: Any) -> Interval:
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return Interval(low=float(low), high=float(high))

    return ConfidenceIntervals(
        accuracy=interval(hits.sum(axis=1) / rows),
        macro_f1=interval(f1.mean(axis=1)),
        level=level,
        samples=samples,
    )


def mcnemar(
    truth: Sequence[str], first: Sequence[str | None], second: Sequence[str | None]
) -> PairedTest:
    """Exact two-sided McNemar test: do two classifiers differ on the same rows?

    Under "no difference", each row that exactly one of them got right is a fair coin toss:
    p = binomtest(only_first_right, discordant rows, 0.5), and 1 when no row is discordant.
    Source: McNemar, Psychometrika 12 (1947).

    Raises:
        ValueError: no rows, or unequal lengths.
    """
    from scipy.stats import binomtest

    _check_rows(truth, first, second)
    triples = list(zip(truth, first, second, strict=True))
    only_first = sum(a == t != b for t, a, b in triples)
    only_second = sum(b == t != a for t, a, b in triples)
    discordant = only_first + only_second
    return PairedTest(
        only_first_right=only_first,
        only_second_right=only_second,
        p_value=float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0,
    )


def paired_losses(first: Sequence[float], second: Sequence[float]) -> PairedLosses:
    """Two-sided Wilcoxon signed-rank test: do two models differ in loss on the same rows?

    Takes the mean loss of each row under either model; ranks the differences by size, so a few
    rows with huge losses cannot carry the result. Source: Wilcoxon, Biometrics Bulletin 1 (1945).

    Raises:
        ValueError: no rows, or unequal lengths.
    """
    from scipy.stats import wilcoxon

    if not first or len(first) != len(second):
        raise ValueError(
            f"as many losses of one model as of the other: {len(first)}, {len(second)}"
        )
    differences = [a - b for a, b in zip(first, second, strict=True)]
    return PairedLosses(
        first_likelier=sum(difference < 0 for difference in differences),
        second_likelier=sum(difference > 0 for difference in differences),
        p_value=float(wilcoxon(differences).pvalue) if any(differences) else 1.0,
    )


def perplexity(total_nll: float, tokens: int) -> float | None:
    """exp(total_nll / tokens): `total_nll` in nats, summed over supervised tokens.

    None where that is beyond all floating-point numbers (a loss over 709 nats a token).

    Raises:
        ValueError: `tokens` is not positive, or `total_nll` not finite.
    """
    if tokens <= 0:
        raise ValueError(f"no tokens: perplexity needs at least one supervised token, got {tokens}")
    if not math.isfinite(total_nll):
        raise ValueError(f"a loss of {total_nll} nats gives no perplexity")
    try:
        return math.exp(total_nll / tokens)
    except OverflowError:
        return None


def text_metrics(references: Sequence[str], responses: Sequence[str]) -> TextMetrics:
    """Compare each response with its one reference.

    - `exact_match`: share of rows equal after stripping outer whitespace.
    - `rouge_l`: mean F-measure of the longest common subsequence of words, no stemmer, by
      rouge-score (Lin, ROUGE, 2004). Its tokenizer keeps only a-z and 0-9, so text in another
      script scores 0: read `chrf` there.
    - `chrf`: corpus chrF2 (character 1- to 6-grams, beta 2) by sacreBLEU (Popović, WMT 2015).

    Raises:
        ValueError: no rows, or unequal lengths.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import CHRF

    _check_rows(references, responses)
    pairs = list(zip(references, responses, strict=True))
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rouge = [scorer.score(reference, response)["rougeL"].fmeasure for reference, response in pairs]
    return TextMetrics(
        rows=len(pairs),
        exact_match=sum(a.strip() == b.strip() for a, b in pairs) / len(pairs),
        rouge_l=float(sum(rouge) / len(pairs)),
        chrf=float(CHRF().corpus_score(list(responses), [list(references)]).score),
    )


def _check_rows(*columns: Sequence[str | None]) -> None:
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise ValueError(f"unequal numbers of rows: {lengths}")
    if lengths[0] == 0:
        raise ValueError("no rows: a metric needs at least one")
