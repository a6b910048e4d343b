"""What a training prints at the terminal: the fate of its rows, two examples, its plan, its progress."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.text import Text

from etude import console
from etude.conversation.encoding import Example
from etude.data import dataset
from etude.distributed import FIRST
from etude.runs import report
from etude.training.reporter import OnStep, Reporter, Step


class Screen(Reporter):
    """Prints what a training reports, and keeps it for the run's train.log."""

    def __init__(self) -> None:
        """Begin the log of a training."""
        super().__init__()
        console.log.start()

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
        console.log.file = file
        console.log.write()

    @contextlib.contextmanager
    def progress(self, every: int) -> Iterator[OnStep | None]:
        """A live line on a terminal, else a line each `every` steps."""
        from rich.progress import BarColumn, Progress

        err, live = console.err, FIRST and console.err.is_terminal
        with Progress(BarColumn(), "{task.description}", console=err, disable=not live) as display:
            task = display.add_task("", total=None)

            def show(step: Step) -> None:
                line = (
                    f"step {step.number}/{step.steps}  loss {step.loss:.4f}  "
                    f"{step.tokens_per_second:,.0f} tokens/s  {step.seconds_left:.0f} s left"
                )
                display.update(task, completed=step.number, total=step.steps, description=line)
                if FIRST and (step.number % every == 0 or step.number in (1, step.steps)):
                    (console.log.add if live else err.print)(line)

            yield show


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
