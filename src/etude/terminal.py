"""What the four programs share at the terminal: consoles, arguments, and how a mistake ends."""

import contextlib
import functools
import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import ParamSpec

import typer
from rich.console import Console
from rich.text import Text

from etude.errors import UserError
from etude.ranks import FIRST, first_to_say

P = ParamSpec("P")

USER_ERROR = 2
INTERRUPTED = 130

# C0 without tab and line feed, DEL, C1: what could move the cursor, rename the window or worse;
# and the marks that reorder what is shown (arXiv:2111.00169).
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

# Results go to stdout, all else to stderr, so that output can be piped.
# Of several processes (torchrun) the first one speaks; a mistake is told by the first that meets it.
# No markup: what is printed holds the user's texts, in which a bracket is a bracket.
out = Console(highlight=False, soft_wrap=True, markup=False, quiet=not FIRST)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def say(label: str, text: str = "", style: str = "bold") -> None:
    """Print one line of a program's report: a label in its column, then the text."""
    out.print(Text(f"{label:<9} ", style=style), printable(text), sep="")


def notice(text: str) -> None:
    """Print something that the user should know but need not act on."""
    say("notice", text, "yellow")


def printable(text: str) -> str:
    """Text without the control characters by which it could drive the terminal."""
    return CONTROL.sub("", text)


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Make `function` a program: quiet libraries, a clear sentence for a mistake, an exit code.

    Exit codes: 0 done; 2 a mistake, or a machine that is full, told on stderr without a traceback;
    130 Ctrl-C, 143 SIGTERM.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        _quiet()
        try:
            function(*args, **kwargs)
        except UserError as error:
            problem = str(error)
        except KeyboardInterrupt as interrupt:
            text = str(interrupt.args[0]) if interrupt.args else "stopped"
            if first_to_say(text):
                err.print(f"\n{text}")
            raise typer.Exit(interrupt.args[1] if interrupt.args[1:] else INTERRUPTED) from None
        except BrokenPipeError:  # the reader of a pipe left, e.g. `| head`
            sys.stdout = None
            raise typer.Exit(0) from None
        except OSError as error:  # no permission, a full disk, a name too long
            told = _machine_is_full(error) or error.strerror or error
            problem = f"{error.filename or 'the system'}: {told}"
        except Exception as error:
            problem = _machine_is_full(error)
            if not problem:
                raise
        else:
            return
        if first_to_say(problem):
            err.print(Text("error: ", style="bold red"), printable(problem), sep="")
        raise typer.Exit(USER_ERROR)

    return wrapper


def _machine_is_full(error: Exception) -> str:
    """What to say of an error by which a library tells that memory or disk is full; else empty."""
    # By name and text: importing the libraries for their classes would slow every start.
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "out of memory on the GPU; lower training.batch_size, dataset.max_length or "
            "evaluation.batch_size, or set training.gradient_checkpointing: true"
        )
    full = ("No space left on device", "Disk quota exceeded", "file write failed")
    if any(words in str(error) for words in full):
        return "the disk is full; free some space, then go on: a training with --resume"
    return ""


def run(function: Callable[..., None]) -> None:
    """Run one program as `python -m etude.<program>`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    app()


def split_arguments(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Part positional arguments into at most one name and ``section.key=value`` overrides.

    Raises:
        UserError: more than one name.
    """
    names = [argument for argument in arguments if "=" not in argument]
    if len(names) > 1:
        raise UserError(
            f"command line: one name is expected, not {len(names)} ({', '.join(names)}); "
            "settings have the form section.key=value"
        )
    return (names[0] if names else None), [argument for argument in arguments if "=" in argument]


class _Notices(logging.Handler):
    """Log records as plain lines on whatever stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        text = printable(self.format(record))
        if first_to_say(text):
            err.print(text)


def _quiet() -> None:
    """Our own notices to stderr; the libraries' progress bars and advice to themselves."""
    logger = logging.getLogger("etude")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(_Notices())
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a "?", not a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def quiet_transformers() -> None:
    """Silence transformers' bars and warnings; separate, for it imports transformers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


@contextlib.contextmanager
def bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, shown on a terminal only; yields the function that advances it."""
    from rich import progress

    with progress.Progress(
        console=err, disable=not (FIRST and err.is_terminal), transient=True
    ) as shown:
        task = shown.add_task(label, total=total)
        yield lambda steps: shown.advance(task, steps)


class Progress:
    """The progress of a training: a live line on a terminal, plain lines now and then elsewhere."""

    def __init__(self, every: int) -> None:
        """Print a plain line each `every` steps where there is no terminal."""
        from rich import progress

        self._every = every
        self._bar = progress.Progress(
            progress.TextColumn("step {task.completed}/{task.total}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[facts]}"),
            console=err,
        )
        self._task = self._bar.add_task("", total=None, facts="")

    def __enter__(self) -> "Progress":
        if FIRST and err.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if FIRST and err.is_terminal:
            self._bar.stop()

    def update(self, step: int, steps: int, loss: float, speed: float, left: float) -> None:
        """Show a finished step."""
        if not FIRST:
            return
        facts = f"loss {loss:.4f}  {speed:,.0f} tokens/s  {left:.0f} s left"
        self._bar.update(self._task, completed=step, total=steps, facts=facts)
        if not err.is_terminal and (step % self._every == 0 or step in (1, steps)):
            err.print(f"step {step}/{steps}  {facts}")
