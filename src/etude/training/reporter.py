"""What a training reports as it goes on: to nobody, to a function of the caller's, or to a terminal."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from etude.data.dataset import Split


class Step(NamedTuple):
    """What there is to say of a training when one of its steps has ended; the loss is in nats a token."""

    number: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float


OnStep = Callable[[Step], object]


class Reporter:
    """Prints nothing, and calls `on_step`, if it is given, after each step."""

    def __init__(self, on_step: OnStep | None = None) -> None:
        """Report steps to `on_step`."""
        self._on_step = on_step

    def say(self, label: str, text: str) -> None:
        """Something that was done or decided."""

    def notice(self, text: str) -> None:
        """Something that the user should know but need not act on."""

    def show_data(self, splits: dict[str, Split], tokenizer: Any) -> None:
        """The fate of all rows, and examples as the model sees them."""

    def show_plan(self, parts: list[tuple[str, int, str]]) -> None:
        """What the training will take in memory: parts, their bytes, remarks."""

    def log_to(self, file: Path) -> None:
        """The run has a folder: what is reported goes to `file` too."""

    @contextlib.contextmanager
    def progress(self, every: int) -> Iterator[OnStep | None]:
        """What to call after each step; `every` steps a line is due."""
        yield self._on_step
