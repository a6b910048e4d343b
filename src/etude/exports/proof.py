"""The proof that an export is the model that was trained, or at which stage it is another one."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etude import files
from etude.conversation.encoding import common
from etude.errors import UserError
from etude.exports import merged, opened
from etude.exports.questions import ANSWERS, NEW_TOKENS, Questions, as_json
from etude.measure import intervals, likelihood
from etude.runs.opening import Target
from etude.runs.proof import in_process

# How far the mean loss may be from the trained model's, relative and in nats: float32 sums in another
# order; bfloat16 keeps 8 bits of each weight, which moved the sample's loss by 0.3 %; float16 keeps 11, and
# moved it by 0.4 %, for what is computed is rounded too.
TOLERANCE = {"f32": (1e-4, 1e-5), "f16": (0.01, 0.005), "bf16": (0.02, 0.01)}
# Rounding may move the losses of the rows by this share of what the adapter moved them by.
SHARE = 0.25
NOISE = 1e-4  # nats per token that it may move them by in any case
LEVEL = 0.95


@dataclass(frozen=True)
class Trained:
    """What the trained model says to the questions.

    Attributes:
        losses: summed loss of each answer.
        base: the same, of the base without the adapter.
        answers: ids of its greedy answers.
        stops: the ids at which it stops, with their tokens.
        seed: the run's, for the draws of the interval.
    """

    losses: list[float]
    base: list[float]
    answers: list[list[int]]
    stops: dict[int, str]
    seed: int


def measure(target: Target, tuned: Any, questions: Questions, bar: likelihood.Bar) -> Trained:
    """Put the questions to the trained model, `tuned`, with its adapter beside the base.

    Raises:
        UserError: a loss is not a finite number.
    """
    examples, settings, renderer = questions.answers, target.config, target.renderer
    losses = likelihood.sequence_losses(tuned, examples, settings, bar)
    with tuned.disable_adapter():
        base = likelihood.sequence_losses(tuned, examples, settings, bar)
    model = tuned.get_base_model()
    plain, model.generation_config = model.generation_config, merged.generation_config(target)
    answers = opened.answers(model, questions.ids[:ANSWERS], NEW_TOKENS)
    model.generation_config = plain
    tokens = renderer.tokenizer.convert_ids_to_tokens(renderer.stop_ids)
    stops = dict(zip(renderer.stop_ids, tokens, strict=True))
    return Trained(losses, base, answers, stops, settings.training.seed)


def prove(place: Path, kind: str, questions: Questions, trained: Trained) -> dict[str, Any]:
    """Open the export in `place` in a new process and compare; returns the figures.

    Raises:
        UserError: it is another model than was trained, with the stage, or cannot be opened.
    """
    with files.scratch(place.parent) as work:
        asked = work / "questions.json"
        asked.write_text(json.dumps(as_json(questions)), encoding="utf-8")
        found = in_process(opened.__name__, work / "found.json", place, asked)
    if "problem" in found:
        raise UserError(f"The export cannot be opened by transformers: {found['problem']:.2000}")
    figures, faults = compare(questions, trained, found, kind)
    if faults:
        raise UserError(
            "The export is not the model that was trained, so it is not kept:\n  "
            + "\n  ".join(faults)
        )
    return figures


def compare(
    questions: Questions, trained: Trained, found: dict[str, Any], kind: str
) -> tuple[dict[str, Any], list[str]]:
    """The figures of an export beside the trained model's, and a sentence for each stage that differs."""
    faults = []
    same = list(map(list.__eq__, questions.ids, found["prompts"]))
    if not all(same):
        ours, theirs = questions.ids[same.index(False)], found["prompts"][same.index(False)]
        begun = common(ours, theirs)
        faults.append(
            f"template: {same.count(False)} of {len(same)} prompts get other token ids from the "
            f"export's template and tokenizer than in training; the first differs from token {begun + 1}: "
            f"{theirs[begun : begun + 5]}, in training {ours[begun : begun + 5]}"
        )
    stops = set(found["stop_ids"])
    if stops != trained.stops.keys():
        missing = [token for at, token in trained.stops.items() if at not in stops]
        faults.append(
            f"stop tokens: missing {', '.join(missing) or 'none'}, added "
            f"{sorted(stops - trained.stops.keys()) or 'none'}"
        )
    loss = _losses(questions, trained, found["losses"])
    relative, absolute = TOLERANCE[kind]
    close = math.isclose(loss["export"], loss["trained"], rel_tol=relative, abs_tol=absolute)
    if not (close and loss["moved"] <= max(NOISE, SHARE * loss["effect"])):
        faults.append(
            f"weights: the mean loss is {loss['export']:.6f}, the trained model's "
            f"{loss['trained']:.6f} and the base's {loss['base']:.6f}; rows differ by "
            f"{loss['moved']:.2g} nats a token on average, where the adapter moved them by "
            f"{loss['effect']:.2g}. "
            f"Rounding to {kind} explains a mean within {relative:.2%}, and {SHARE:.0%} of what the "
            "adapter is worth" + ("; --type f32 rounds nothing" * (kind != "f32"))
        )
    answers = list(map(list.__eq__, trained.answers, found["answers"]))
    figures = {
        "rows": len(questions.groups),
        "source": questions.source,
        "template": {"same": same.count(True), "of": len(same), "spelled": questions.spelled},
        "stop_tokens": list(trained.stops.values()),
        "loss": loss,
        "labels": _labels(questions, trained.losses, found["losses"]) if questions.labels else None,
        "answers": {"same": answers.count(True), "of": len(answers)},
    }
    return figures, faults


def _losses(questions: Questions, trained: Trained, losses: Sequence[float]) -> dict[str, float]:
    """Mean losses over the tokens of the right answers, and how far rows are apart: nats per token."""
    right = questions.right
    sizes = [questions.answers[at].targets for at in right]
    tokens = sum(sizes)
    ours, base, theirs = (
        [values[at] for at in right] for values in (trained.losses, trained.base, losses)
    )
    if not all(map(math.isfinite, theirs)):
        theirs = [math.inf] * len(theirs)  # which differs from everything, as NaN does not

    def apart(others: Sequence[float]) -> float:
        rows = zip(ours, others, sizes, strict=True)
        return sum(abs(a - b) / size for a, b, size in rows) / len(sizes)

    paired = {}
    if math.isfinite(sum(theirs)):
        paired = intervals.mean_difference(ours, theirs, sizes, level=LEVEL, seed=trained.seed)
    return {
        "trained": sum(ours) / tokens,
        "export": sum(theirs) / tokens,
        "base": sum(base) / tokens,
        **paired,
        "moved": apart(theirs),
        "effect": apart(base),
    }


def _labels(questions: Questions, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Accuracy of both, and how many predictions changed."""
    size = len(questions.labels)

    def predicted(losses: Sequence[float]) -> list[int]:
        rows = [losses[at : at + size] for at in range(0, len(losses), size)]
        return [min(range(size), key=row.__getitem__) for row in rows]

    first, second = predicted(ours), predicted(theirs)
    return {
        "trained": sum(map(int.__eq__, first, questions.truth)) / len(first),
        "export": sum(map(int.__eq__, second, questions.truth)) / len(first),
        "changed": sum(map(int.__ne__, first, second)),
    }
