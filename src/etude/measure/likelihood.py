"""How likely a model finds given tokens: of texts, and of the labels of a classification."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from etude.config.schema import Config
from etude.conversation.encoding import Example, RenderError
from etude.conversation.messages import Message
from etude.conversation.renderer import Renderer
from etude.data import dataset
from etude.engine import packing
from etude.errors import UserError
from etude.models import loading

# Opens a progress bar of (label, total) and yields the function that advances it by some rows.
Bar = Callable[[str, int], contextlib.AbstractContextManager[Callable[[int], object]]]


@contextlib.contextmanager
def no_bar(label: str, total: int) -> Iterator[Callable[[int], object]]:
    """The Bar that shows nothing."""
    yield lambda rows: None


def sequence_losses(
    model: Any, examples: Sequence[Example], settings: Config, bar: Bar = no_bar
) -> list[float]:
    """Summed negative log-likelihood in nats of each example's supervised tokens.

    Raises:
        UserError: an example beyond the model's window, or a sum that is not finite; with their rows.
    """
    import torch

    window = loading.window(model.config)
    beyond = [
        (one.origin or "the text", len(one)) for one in examples if window and len(one) > window
    ]
    if beyond and window:
        raise dataset.beyond_window(list(dict(beyond).items()), window, "Shorten them.")
    longest = max(map(len, examples))
    cutter = packing.Cutter.of(model, settings.evaluation.batch_size, longest, examples)

    def counted(advance: Callable[[int], object]) -> Iterator[packing.Pass]:
        for batch in cutter(examples):
            yield batch
            advance(len(batch.owner.unique()))

    model.eval()
    with torch.inference_mode(), bar("likelihoods", len(examples)) as advance:
        sums = packing.sum_by_example(model, counted(advance), len(examples))
        wrong = [examples[at] for at in (~sums.isfinite()).nonzero()[:, 0].tolist()]
        if wrong:
            # A pass shares its numbers; of many such rows the first will do.
            rows = packing.culprits(model, cutter, wrong[:64]) or [one.origin for one in wrong]
            raise loading.not_finite(model, "The loss", [row or "the text" for row in rows])
    return cast(list[float], sums.tolist())


def label_log_likelihoods(
    model: Any,
    renderer: Renderer,
    prompts: Sequence[list[Message]],
    labels: Sequence[str],
    settings: Config,
    origins: Sequence[str] = (),
    bar: Bar = no_bar,
) -> list[list[float]]:
    """Exact log P(label, end of turn | prompt) in nats for every prompt and label: [prompts][labels].

    The sum runs over all tokens of a label and its end token, so that "positive" and "positively"
    are distinguished. Prompts and labels are packed: what they share is computed once.

    Raises:
        UserError: two labels that the model would see as one, or a template that refuses a prompt.
    """
    dataset.check_labels(renderer, labels)
    size = len(labels)
    try:
        answers = [
            renderer.answer([*prompt, {"role": "assistant", "content": label}])
            for prompt in prompts
            for label in labels
        ]
    except RenderError as error:
        raise UserError(f"The chat template refuses a classification: {error}") from None
    if origins:
        answers = [
            dataclasses.replace(one, origin=origins[at // size]) for at, one in enumerate(answers)
        ]
    losses = sequence_losses(model, answers, settings, bar)
    return [[-loss for loss in losses[at : at + size]] for at in range(0, len(losses), size)]


def softmax(scores: Sequence[float]) -> list[float]:
    """Shares exp(s) / sum(exp(s)), computed from the largest so that nothing overflows."""
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]
