"""Classification: the label that a model gives to each row, compared with the truth."""

import logging
import re
from collections.abc import Sequence
from typing import Any, cast

from etude.config.schema import Config, normal_label
from etude.conversation.renderer import Renderer
from etude.data import dataset, report
from etude.measure import intervals, metrics, quality
from etude.measure.likelihood import Bar, label_log_likelihoods, no_bar, softmax
from etude.measure.responses import check_window, respond

log = logging.getLogger(__name__)

# A word that turns what follows into its opposite, and up to three words between, quotes and stars
# included, but no end of a clause.
NEGATED = re.compile(
    r"(?:\b(?:not|never|nor|neither|cannot|non|nicht|kein\w*|pas)|n['\u2019]t)(?:[^\w.,;!?]+\w+){0,3}[^\w.,;!?]+$"
    r"|\bno(?:[^\w.,;!?]+\w+)?[^\w.,;!?]+$",
    re.I,
)


def measure_labels(
    model: Any, renderer: Renderer, table: dataset.Table, settings: Config, bar: Bar = no_bar
) -> dict[str, Any]:
    """Predict the label of every row and compare with the truth."""
    labels = cast(list[str], table.labels)
    for notice in report.contradicting("test", len(table.rows), report.repeats(table.rows)[1]):
        log.info(notice)
    room = dataset.check_labels(renderer, labels)
    prompts, cut = [], []
    for row in table.rows:
        prompt, shorter = dataset.question(renderer, row.text, labels, settings.dataset, room)
        prompts.append(prompt)
        cut += [row.line] * shorter
    if cut:
        log.info(
            "test: %d of %d rows %s: %s", len(cut), len(prompts), report.CUT, report.lines_of(cut)
        )
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
    """The label that a response means: the only one in it, as a whole word in any case; None if unclear.

    Of labels that contain each other the longest counts ("not hate" is not "hate"); of labels that
    differ in case only, the one that is spelled so. A negated label ("not positive") is none.
    """
    text = normal_label(response)
    if text in labels:
        return text
    names = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    # Not in a longer word, number or name with a sign (c++, -1, A-).
    whole = rf"(?<![\w+#-])(?<!\d[.,])(?:{names})(?![\w+#-]|[.,]\d)"
    found = list(re.finditer(whole, text, re.I))
    if any(NEGATED.search(text[: match.start()]) for match in found):
        return None
    spellings = {match[0] for match in found}
    alike = {spelling.casefold() for spelling in spellings}
    meant = [label for label in labels if label in spellings]
    meant = meant or [label for label in labels if label.casefold() in alike]
    return meant[0] if len(meant) == len(alike) == 1 else None
