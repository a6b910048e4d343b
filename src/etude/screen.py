"""What a training prints at the terminal: the fate of its rows, two examples, its plan, its progress."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.text import Text

from etude import console
from etude.conversation.renderer import Example
from etude.data import dataset
from etude.runs import report
from etude.training.reporter import OnStep, Reporter


class Screen(Reporter):
    """Prints what a training reports, and keeps it for the run's train.log."""

    def __init__(self) -> None:
        """Begin the log of a training."""
        super().__init__()
        console.start_log()

    def say(self, label: str, text: str) -> None:
        """Print a line."""
        console.say(label, text)

    def notice(self, text: str) -> None:
        """Print a notice."""
        console.notice(text)

    def show_data(self, splits: dict[str, dataset.Split], tokenizer: Any) -> None:
        """Print the fate of all rows, and two examples as the model sees them."""
        reports = [split.report for split in splits.values()]
        for item in reports:
            drawn = f", drawn: {item.drawn}" * bool(item.drawn)
            console.say("data", f"{item.split}: {item.source} (format {item.format}{drawn})")
        console.out.print(report.data_table(reports))
        for item in reports:
            if item.labels:
                counts = ", ".join(f"{k} {v:,}" for k, v in sorted(item.labels.items()))
                console.say("labels", f"{item.split}: {counts}")
            for notice in item.notices():
                console.notice(notice)
        for number, example in enumerate(splits["train"].examples[:2], 1):
            show_example(number, example, tokenizer)

    def show_plan(self, parts: list[tuple[str, int, str]]) -> None:
        """Print the table."""
        console.out.print(report.plan_table(parts))

    def log_to(self, file: Path) -> None:
        """Keep all that is printed there."""
        console.log_to(file)

    @contextlib.contextmanager
    def progress(self, every: int) -> Iterator[OnStep | None]:
        """A live line on a terminal, else a line each `every` steps."""
        with console.training_progress(every) as show:
            yield lambda step: show(*step)


def show_example(number: int, example: Example, tokenizer: Any) -> None:
    """Print an example, its supervised part in green or, where there is no colour, in ⟦ ⟧."""
    console.say("example", f"{number}, the supervised part marked:")
    coloured = console.out.is_terminal and console.out.color_system is not None
    line, inside = Text(), False
    for text, supervised, control in [*dataset.spans(example, tokenizer), ("", False, False)]:
        if supervised != inside and not coloured:
            text = ("⟦" if supervised else "⟧") + text
        inside = supervised
        style = "green underline" if supervised else "dim"
        line.append(console.printable(text), style="bold " + style if control else style)
    console.out.print(line)
