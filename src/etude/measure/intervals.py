"""How sure a figure is: bootstrap and Wilson intervals, and paired tests of two models on the same rows."""

from collections.abc import Sequence
from typing import Any


def confidence_intervals(
    confusion: Sequence[Sequence[int]], *, samples: int, level: float, seed: int
) -> dict[str, Any]:
    """Percentile bootstrap intervals of accuracy and macro-F1, by resampling rows.

    A metric of a resample depends only on how many rows fall in each (truth, predicted) cell,
    and n rows drawn with replacement fall in the cells as one multinomial draw: so each resample
    is `multinomial(n, confusion / n)`, exactly, without touching rows. Macro-F1 averages
    2 TP / (support + predicted) over all labels, 0 where that is 0/0, as scikit-learn does.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    Args:
        confusion: `metrics.classification(...)["confusion"]`, [labels, labels] or [labels, labels + 1].
        samples: number of resamples.
        level: coverage, strictly between 0 and 1, such as 0.95.
        seed: of the draws.

    Returns:
        accuracy and macro_f1, each with low and high; level and samples.
    """
    import numpy as np

    matrix = np.asarray(confusion, dtype=np.int64)
    rows = int(matrix.sum())
    # Only cells that hold rows can be drawn: at most `rows` of them, however many labels.
    true, guessed = np.nonzero(matrix)
    draws = np.random.default_rng(seed).multinomial(rows, matrix[true, guessed] / rows, samples)
    identity = np.eye(matrix.shape[1])[:, : matrix.shape[0]]
    hits = draws @ (identity[true] * (true == guessed)[:, None])  # [samples, labels]
    total = draws @ identity[true] + draws @ identity[guessed]  # support + predicted
    f1 = np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0)

    def interval(values: Any) -> dict[str, float]:
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return {"low": float(low), "high": float(high)}

    return {
        "accuracy": interval(hits.sum(axis=1) / rows),
        "macro_f1": interval(f1.mean(axis=1)),
        "level": level,
        "samples": samples,
    }


def proportion(count: int, of: int, *, level: float) -> dict[str, float]:
    """A share of rows with its Wilson interval, which holds for few rows and for shares of 0 and 1.

    Source: Wilson, Journal of the American Statistical Association 22 (1927).

    Returns:
        share, low and high (0 to 1), count and of (rows), level.
    """
    from scipy.stats import binomtest

    ends = binomtest(count, of).proportion_ci(level, method="wilson")
    return {
        "share": count / of,
        "low": float(ends.low),
        "high": float(ends.high),
        "count": count,
        "of": of,
        "level": level,
    }


def mcnemar(
    truth: Sequence[str], first: Sequence[str | None], second: Sequence[str | None]
) -> dict[str, Any]:
    """Exact two-sided McNemar test: do two classifiers differ on the same rows?

    Under "no difference", each row that exactly one of them got right is a fair coin toss:
    p = binomtest(only_first_right, discordant rows, 0.5), and 1 when no row is discordant.
    Source: McNemar, Psychometrika 12 (1947).
    """
    from scipy.stats import binomtest

    triples = list(zip(truth, first, second, strict=True))
    only_first = sum(a == t != b for t, a, b in triples)
    only_second = sum(b == t != a for t, a, b in triples)
    discordant = only_first + only_second
    return {
        "only_first_right": only_first,
        "only_second_right": only_second,
        "p_value": float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0,
    }


def paired_losses(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Two-sided Wilcoxon signed-rank test: do two models differ in loss on the same rows?

    Takes the mean loss of each row under either model; ranks the differences by size, so a few
    rows with huge losses cannot carry the result. Source: Wilcoxon, Biometrics Bulletin 1 (1945).
    """
    from scipy.stats import wilcoxon

    differences = [a - b for a, b in zip(first, second, strict=True)]
    return {
        "first_likelier": sum(difference < 0 for difference in differences),
        "second_likelier": sum(difference > 0 for difference in differences),
        "p_value": float(wilcoxon(differences).pvalue) if any(differences) else 1.0,
    }


def mean_difference(
    first: Sequence[float],
    second: Sequence[float],
    sizes: Sequence[int],
    *,
    level: float,
    seed: int,
) -> dict[str, float]:
    """Second minus first in the mean over all tokens, with its percentile bootstrap interval over rows.

    Args:
        first: sums of a model, one for each row.
        second: sums of another model on the same rows.
        sizes: tokens of each row.
        level: coverage, strictly between 0 and 1.
        seed: of the 2,000 draws.

    Returns:
        difference, low and high (per token), level.
    """
    import numpy as np

    differences, tokens = np.subtract(second, first), np.asarray(sizes)
    rows = len(tokens)
    draws = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), 2000)
    low, high = np.quantile(
        (draws @ differences) / (draws @ tokens), [(1 - level) / 2, (1 + level) / 2]
    )
    return {
        "difference": float(differences.sum() / tokens.sum()),
        "low": float(low),
        "high": float(high),
        "level": level,
    }
