"""What watches a training: numbers that are not finite, jumps of the loss, signals, processes that are gone."""

import contextlib
import logging
import re
import signal
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from heapq import nlargest
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from etude import distributed
from etude.conversation.encoding import Example
from etude.engine import packing
from etude.errors import Stopped, UserError
from etude.models import loading
from etude.runs.folder import how_to_continue

log = logging.getLogger(__name__)

RECENT = 50  # steps whose losses a new one is compared with; half as many must be there
SPIKE = 8.0  # robust deviations above their median: warn


# --- numbers -----------------------------------------------------------------------------------


def not_finite(
    what: str, steps_done: int, model: Any, cutter: packing.Cutter, examples: Sequence[Example]
) -> UserError:
    """The error where `what` ("step 3: the loss") is not a finite number, with the rows it came from.

    All processes have it, whoever has the rows, so all of them must ask.
    """
    own, every = (
        [origin for share in distributed.gather(part) for origin in share]
        for part in (
            packing.culprits(model, cutter, examples),
            [example.origin for example in examples],
        )
    )
    return UserError(
        f"{loading.not_finite(model, what, own or every)}. The training was stopped, and the weights "
        f"are those of step {steps_done}; a lower training.learning_rate may help"
    )


class StepWatch:
    """Warns of a step from which nothing is learnt, and of a loss far above those before it."""

    def __init__(self) -> None:
        """Begin with no losses to compare with, in a resumed training too."""
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._zero_reported = False

    def gradients(self, step: int, norm: float) -> None:
        """Warn, once, of gradients that are all zero."""
        if norm == 0 and not self._zero_reported:
            self._zero_reported = True
            log.warning("step %d: all gradients are zero, so nothing is learnt from it", step)

    def loss(self, step: int, loss: float, sums: torch.Tensor, examples: Sequence[Example]) -> None:
        """Warn of a jump: z = (loss - median) / (1.4826 MAD) over SPIKE; `sums` are the examples' nll."""
        if len(self._recent) >= RECENT // 2:
            median = statistics.median(self._recent)
            spread = 1.4826 * statistics.median(abs(before - median) for before in self._recent)
            if loss - median > SPIKE * max(spread, 0.01 * abs(median)):
                means = [
                    (float(total) / example.targets, example.origin)
                    for total, example in zip(sums, examples, strict=True)
                ]
                means = [mean for share in distributed.gather(means) for mean in share]
                worst = ", ".join(f"{origin} ({mean:.2f})" for mean, origin in nlargest(3, means))
                log.warning(
                    "step %d: the loss jumped to %.4f, from about %.4f; highest in: %s",
                    step, loss, median, worst,
                )  # fmt: skip
        self._recent.append(loss)


# --- an end before its time --------------------------------------------------------------------


class SavePoints(TrainerCallback):
    """Makes checkpoints beside those of save_steps: at each validation, and where a signal stops the training.

    The best adapter must be among the checkpoints. A signal to one process stops all.
    """

    def __init__(self, folder: Path) -> None:
        """Watch the training in `folder`."""
        self._folder = folder
        self.signal: int | None = None
        self._stopping = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint."""
        self._stopping = bool(distributed.total(int(self.signal is not None), args.device))
        control.should_save |= control.should_evaluate or self._stopping

    on_epoch_end = on_step_end  # a signal that came during the last step's validation

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop, the checkpoint written.

        Raises:
            Stopped: a signal came during the step.
        """
        if self._stopping:
            # None leaves before the first one has written: torchrun ends all when one has ended.
            distributed.total(0, args.device)
            raise Stopped(
                f"stopped at step {state.global_step} of {state.max_steps}; {how_to_continue(self._folder)}",
                128 + (self.signal or signal.SIGINT),
            )

    def handle(self, number: int, frame: object) -> None:
        """On Ctrl-C, SIGTERM and SIGHUP end the training after its step; on the second one, immediately.

        Of several processes each gets the signal twice, for the launcher passes it on: there the
        second one counts for nothing, and the launcher itself ends what does not end in time.

        Raises:
            Stopped: with how to go on.
        """
        several = distributed.WORLD > 1
        if self.signal is None:
            self.signal = number
            if distributed.FIRST:
                more = "" if several else "; once more to stop immediately"
                log.warning("stopping after this step, with a checkpoint%s", more)
        elif not several:
            raise Stopped(f"stopped immediately; {how_to_continue(self._folder)}", 128 + number)


@contextlib.contextmanager
def naming_lost_process(folder: Path, steps_done: Callable[[], int]) -> Iterator[None]:
    """Say in one sentence that another process of the same training is gone, where that ends the block.

    Raises:
        UserError: it is.
    """
    try:
        yield
    except RuntimeError as error:
        if distributed.WORLD == 1 or not re.search("gloo|nccl|connection", str(error), re.I):
            raise
        # Before the handler is restored: the launcher's SIGTERM is on its way.
        distributed.one_is_gone = True
        # In the same words by all that are left, so that it is reported once.
        raise UserError(
            f"step {steps_done() + 1}: another process of this training is gone, or cannot be reached. What "
            f"it said, if it could, is above, on its machine; {how_to_continue(folder)}"
        ) from error
