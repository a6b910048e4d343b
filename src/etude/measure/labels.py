"""Classification: the label that a model gives to each row, compared with the truth."""

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

from etude.config.schema import Config, normal_label
from etude.conversation.renderer import Renderer
from etude.data import dataset, report
from etude.measure import intervals, metrics, quality
from etude.measure.likelihood import Bar, label_log_likelihoods, no_bar, softmax
from etude.measure.responses import check_window, respond

log = logging.getLogger(__name__)

# What may stand around a label that is all of a response; signs are not among them.
WRAPPING = " \t.,:;!?\"'*`_()[]{}\u2018\u2019\u201c\u201d\u00ab\u00bb\u2026\u3002"
# A word that turns what follows into its opposite, and up to three words between; quotes, stars and the
# like may stand there too, but no end of a clause.
NEGATED = re.compile(
    r"(?:\b(?:not|never|nor|neither|cannot|non|nicht|kein\w*|pas)|n['\u2019]t)(?:[^\w.,;!?]+\w+){0,3}[^\w.,;!?]+$"
    r"|\bno(?:[^\w.,;!?]+\w+)?[^\w.,;!?]+$"
)


def measure_labels(
    model: Any, renderer: Renderer, table: dataset.Table, settings: Config, bar: Bar = no_bar
) -> dict[str, Any]:
    """Predict the label of every row and compare with the truth."""
    labels = cast(list[str], table.labels)
    for notice in report.contradicting("test", len(table.rows), report.repeats(table.rows)[1]):
        log.info(notice)
    prompts = [dataset.instruct(row.text, labels, settings.dataset) for row in table.rows]
    check_window(model, renderer, prompts, table, settings)
    origins = [f"{table.source}:{row.line}" for row in table.rows]
    if settings.evaluation.method == "likelihood":
        scores = label_log_likelihoods(model, renderer, prompts, labels, settings, origins, bar)
        predicted: list[str | None] = [labels[row.index(max(row))] for row in scores]
        said: list[Any] = [dict(zip(labels, softmax(row), strict=True)) for row in scores]
    else:
        responses = respond(model, renderer, prompts, settings, origins, bar)
        predicted = [parse_label(response.text, labels) for response in responses]
        said = [response.text for response in responses]
    truth = [cast(str, row.label) for row in table.rows]
    return {**classify(truth, predicted, labels, settings), "said": said}


def classify(
    truth: Sequence[str],
    predicted: Sequence[str | None],
    labels: Sequence[str],
    settings: Config,
) -> dict[str, Any]:
    """The classification metrics with their confidence intervals."""
    result = metrics.classification(truth, predicted, labels)
    ends = intervals.confidence_intervals(
        result["confusion"],
        samples=settings.evaluation.bootstrap_samples,
        level=settings.evaluation.confidence,
        seed=settings.training.seed,
    )
    return {
        "kind": "classification",
        **result,
        "intervals": ends,
        "truth": truth,
        "predicted": predicted,
    }


def judge_completions(table: dataset.Table, settings: Config) -> dict[str, Any]:
    """Judge the given completions by the heuristics and compare with the given quality labels."""
    limits = settings.evaluation
    judgements = [
        quality.judge(
            row.messages[-2]["content"],
            row.messages[-1]["content"],
            good_threshold=limits.good_threshold,
            fair_threshold=limits.fair_threshold,
        )
        for row in table.rows
    ]
    given = [cast(str, row.quality) for row in table.rows]
    predicted = [judgement["label"] for judgement in judgements]
    said = [judgement["shares"] for judgement in judgements]
    return {**classify(given, predicted, quality.LABELS, settings), "said": said}


def parse_label(response: str, labels: Sequence[str]) -> str | None:
    """The label that a response means: all of it, or the only one in it as a whole word; None if unclear.

    Of labels that hold one another the longest counts ("not hate" is not "hate"); of labels that
    differ in case only, the one that is spelled so. A label that is denied ("not positive") is none.
    """
    text = normal_label(response)
    if text in labels:
        return text
    folded = text.casefold()
    spellings: dict[str, list[str]] = {}
    for label in labels:
        if label.casefold() in folded:
            spellings.setdefault(label.casefold(), []).append(label)
    whole = [form for form in spellings if not _around(folded, form).strip(WRAPPING)]
    longest = max(map(len, whole), default=0)
    found = {form for form in whole if len(form) == longest}
    if not found:
        spans = {
            (match.start(), match.end()): form
            for form in spellings
            for match in _whole_word(form).finditer(folded)
        }
        outer = [
            (start, end)
            for start, end in spans
            if not any(a <= start and end <= b and (a, b) != (start, end) for a, b in spans)
        ]
        if any(NEGATED.search(folded[max(0, start - 80) : start]) for start, _ in outer):
            return None
        found = {spans[span] for span in outer}
    if len(found) != 1:
        return None
    alike = spellings[found.pop()]
    exact = [label for label in alike if _whole_word(label).search(text)]
    return alike[0] if len(alike) == 1 else exact[0] if len(exact) == 1 else None


def _around(text: str, part: str) -> str:
    """What is left of `text` without its wrapping and `part`."""
    before, _, after = text.partition(part)
    return before + after


@lru_cache(maxsize=4096)
def _whole_word(form: str) -> re.Pattern[str]:
    """Finds a label in a text, and not in a longer word, number or name with a sign (c++, -1, A-)."""
    first, last = form[0], form[-1]
    before, after = r"(?<![\w+#])(?<!\w-)", r"(?![\w+#]|-(?![\w-]))"
    if not first.isalpha():
        before += r"(?<![-\u2212])(?<!\d[.,])"
    if last.isdigit():
        after += r"(?![-.,]\d)"
    return re.compile(before + re.escape(form) + after)
