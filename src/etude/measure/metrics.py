"""Metrics against a reference: classes, perplexity, text. scikit-learn, sacreBLEU and rouge-score compute them.

Every result is a plain dictionary of JSON values; what is ours is the unparseable answer.
"""

import math
from collections.abc import Sequence
from typing import Any

UNPARSEABLE = "unparseable"


def classification(
    truth: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]
) -> dict[str, Any]:
    """Accuracy, precision, recall, F1 and the confusion matrix, by scikit-learn.

    A `None` in `predicted` is an answer that names no label: it counts as wrong, lowers the
    recall of its true class and the precision of none, and gets a last column "unparseable" in
    the confusion matrix when there is any. Macro averages run over all of `labels`; a ratio of
    0/0 is 0 (`zero_division=0`).

    Returns:
        rows, unparseable, accuracy; macro, weighted and per_class[label] with precision, recall, f1
        (0 to 1) and support (rows); labels, columns, and confusion, where `confusion[i][j]` counts the
        rows of true class `labels[i]` predicted as `columns[j]`.
    """
    from sklearn.metrics import accuracy_score, classification_report, confusion_matrix

    # Integer codes: no label that a user picks can collide with "unparseable" or "macro avg".
    codes: dict[str | None, int] = {label: code for code, label in enumerate([*labels, None])}
    true_codes = [codes[label] for label in truth]
    predicted_codes = [codes[label] for label in predicted]
    report = classification_report(
        true_codes,
        predicted_codes,
        labels=list(range(len(labels))),
        output_dict=True,
        zero_division=0,
    )
    unparseable = predicted_codes.count(codes[None])
    columns = [*labels, UNPARSEABLE] if unparseable else list(labels)
    confusion = confusion_matrix(true_codes, predicted_codes, labels=list(range(len(columns))))

    def scores(name: object) -> dict[str, Any]:
        of = report[str(name)]
        figures = {key: float(of[key]) for key in ("precision", "recall")}
        return {**figures, "f1": float(of["f1-score"]), "support": int(of["support"])}

    return {
        "rows": len(truth),
        "unparseable": unparseable,
        "accuracy": float(accuracy_score(true_codes, predicted_codes)),
        "macro": scores("macro avg"),
        "weighted": scores("weighted avg"),
        "per_class": {label: scores(code) for code, label in enumerate(labels)},
        "labels": list(labels),
        "columns": columns,
        "confusion": confusion[: len(labels)].tolist(),
    }


def perplexity(total_nll: float, tokens: int) -> float | None:
    """exp(total_nll / tokens): `total_nll` in nats, summed over supervised tokens.

    None where that is beyond all floating-point numbers (a loss over 709 nats a token).
    """
    try:
        return math.exp(total_nll / tokens)
    except OverflowError:
        return None


def text_metrics(references: Sequence[str], responses: Sequence[str]) -> dict[str, Any]:
    """Compare each response with its one reference.

    - `rows`: how many.
    - `exact_match`: share of rows equal after stripping outer whitespace.
    - `rouge_l`: mean F-measure of the longest common subsequence of words, no stemmer, by
      rouge-score (Lin, ROUGE, 2004). Its tokenizer keeps only a-z and 0-9, so text in another
      script scores 0: read `chrf` there.
    - `chrf`: corpus chrF2 (character 1- to 6-grams, beta 2) by sacreBLEU (Popović, WMT 2015).
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import CHRF

    pairs = list(zip(references, responses, strict=True))
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rouge = [scorer.score(reference, response)["rougeL"].fmeasure for reference, response in pairs]
    return {
        "rows": len(pairs),
        "exact_match": sum(a.strip() == b.strip() for a, b in pairs) / len(pairs),
        "rouge_l": float(sum(rouge) / len(pairs)),
        "chrf": float(CHRF().corpus_score(list(responses), [list(references)]).score),
    }
