"""The order of a training: how many steps it has, and which rows each of them learns from."""

import math
from collections.abc import Callable, Iterator, Sequence

from etude import distributed
from etude.config.schema import Config
from etude.engine import packing
from etude.errors import UserError


def step_count(settings: Config, rows: int) -> int:
    """How many optimizer steps the training has: ceil(rows / rows a step) an epoch, or max_steps.

    Raises:
        UserError: a warm-up that is not shorter, or steps that the processes cannot share.
    """
    training, processes = settings.training, distributed.WORLD
    size = training.rows_per_step
    if size % processes:
        raise UserError(
            f"training: a step has {size} rows (batch_size x gradient_accumulation_steps), which "
            f"{processes} processes cannot share evenly; make it a multiple of {processes}"
        )
    steps = training.max_steps or math.ceil(math.ceil(rows / size) * training.num_epochs)
    share = training.warmup_steps
    warmup = math.ceil(share * steps) if share < 1 else share
    if warmup >= steps:  # the first step's learning rate is zero
        raise UserError(
            f"training.warmup_steps: {share:g} is not shorter than the training, which has {steps} "
            "steps, so the learning rate would never rise; lower it, set 0, or train longer"
        )
    return steps


class StepSampler:
    """Which examples each step of an epoch learns from: a pure function of (seed, epoch, step).

    With several processes each takes every world-th row of the step, so that the steps are the
    same ones however many processes share them.
    """

    def __init__(
        self, rows: Sequence[list[int]], size: int, seed: int, steps_done: Callable[[], int]
    ) -> None:
        """Cut `rows`, each of which is the indices of its examples, into steps of `size`.

        `steps_done` is asked when an epoch begins, or, on resume, in the middle of one.
        """
        self._rows, self._size, self._seed = rows, size, seed
        self._steps_done = steps_done

    def __len__(self) -> int:
        return math.ceil(len(self._rows) / self._size)

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self._steps_done() // len(self)
        for step in packing.steps(self._seed, epoch, len(self._rows), self._size):
            own = step[distributed.RANK :: distributed.WORLD]
            yield [example for row in own for example in self._rows[row]]
