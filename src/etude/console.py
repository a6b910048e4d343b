"""What the programs share at the terminal: consoles, arguments, and how an error ends them."""

import contextlib
import datetime
import functools
import io
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, ParamSpec

import typer
from rich.console import Console
from rich.text import Text

from etude import distributed, files
from etude.config.schema import SECTIONS
from etude.distributed import FIRST, first_to_say
from etude.errors import Stopped, UserError, causes, shortage

P = ParamSpec("P")

USER_ERROR = 2
INTERRUPTED = 130  # by Ctrl-C

# C0 without tab and line feed, DEL, C1: what could move the cursor, rename the window or worse;
# and the marks that reorder what is shown (arXiv:2111.00169).
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

# What is printed holds the user's texts, in which a bracket is a bracket, and :smile: five letters.
PLAIN: dict[str, Any] = {"highlight": False, "soft_wrap": True, "markup": False, "emoji": False}


class Log:
    """What a training prints, as lines with their time: in memory until its run has a folder."""

    def __init__(self) -> None:
        """Keep nothing: no training is running."""
        self.file: Path | None = None
        self.lines: list[str] | None = None

    def start(self) -> None:
        """Begin to keep what is printed: a training begins, and its run has no folder yet."""
        self.file, self.lines = None, []

    def add(self, *objects: Any, **options: Any) -> None:
        """Add what is printed, without colours and control characters."""
        if self.lines is None or not FIRST:
            return
        stream = io.StringIO()
        Console(file=stream, width=100, **PLAIN, color_system=None).print(*objects, **options)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        lines = [line.rstrip() for line in printable(stream.getvalue()).split("\n")]
        self.lines += [f"{now} {line}\n" for line in lines if line]
        self.write()

    def write(self) -> None:
        """Append the lines to the file in one piece, which a signal or a kill does not part."""
        if self.file and self.lines:
            text, self.lines = "".join(self.lines), []
            # A full disk ends the training where it saves something, with an error of its own.
            with contextlib.suppress(OSError):
                files.append(self.file, text)


log = Log()


class _Console(Console):
    """A console that keeps what is printed for the log of a training, and that may lose its reader."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as Console does."""
        log.add(*objects, **options)
        try:
            super().print(*objects, **options)
        except OSError:
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Discard the rest where nobody reads any more (`| head`, a closed terminal).

        So that a training goes on to its end, whoever was listening.
        """
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


# Results go to stdout, all else to stderr, so that output can be piped.
# Of several processes (torchrun) the first one prints; an error is printed by the first that meets it.
out = _Console(**PLAIN, quiet=not FIRST)
err = _Console(stderr=True, **PLAIN)


def say(label: str, text: str = "", style: str = "bold") -> None:
    """Print one line of a program's report: a label in its column, then the text."""
    out.print(Text(f"{label:<9} ", style=style), printable(text), sep="")


def notice(text: str) -> None:
    """Print something that the user should know but need not act on; on stderr, for it is no result."""
    if FIRST:
        err.print(Text("notice    ", style="yellow"), printable(text), sep="")


def printable(text: str) -> str:
    """Text without the control characters by which it could drive the terminal."""
    return CONTROL.sub("", text)


def _warn(line: Text | str) -> None:
    """Print a line on stderr, unless another process has printed the same."""
    if first_to_say(str(line)):
        err.print(line)
    else:
        log.add(line)


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Make `function` a program: quiet libraries, a clear sentence for a mistake, an exit code.

    Exit codes: 0 done; 2 a mistake, or a machine that is full, reported on stderr without a
    traceback; 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        _quiet()
        with distributed.on_signals(_end, "SIGTERM", "SIGHUP"):
            try:
                distributed.check(function.__name__)
                function(*args, **kwargs)
            except typer.Exit:
                raise
            except (Exception, KeyboardInterrupt) as error:
                _report(error)
            finally:
                log.file = log.lines = None

    return wrapper


def _report(error: BaseException) -> NoReturn:
    """Print what ended a program in one line, and end it with the exit code that belongs to it."""
    # A library may wrap the interrupt that it met, in the middle of an import say.
    for cause in causes(error):
        if isinstance(cause, KeyboardInterrupt):
            _warn(f"\n{cause}" if str(cause) else "\nstopped")
            raise typer.Exit(cause.code if isinstance(cause, Stopped) else INTERRUPTED) from None
    problem = str(error) if isinstance(error, UserError) else shortage(error)
    if not problem and isinstance(error, OSError):  # no such folder, a name too long
        problem = f"{error.filename or 'the system'}: {error.strerror or error}"
    if not problem:
        log.add(traceback.format_exc())
        raise error
    _warn(Text.assemble(("error: ", "bold red"), printable(problem)))
    raise typer.Exit(USER_ERROR) from None


def _end(number: int, frame: object) -> None:
    """On SIGTERM and SIGHUP leave in order: what is half done is cleaned up, a child process ended."""
    if distributed.one_is_gone:
        return  # the launcher ends all others: this one ends by itself, once it has printed why
    signal.signal(number, signal.SIG_DFL)  # the next one ends it immediately
    raise SystemExit(128 + number)


def split_arguments(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Split positional arguments into at most one name and ``section.key=value`` settings.

    Raises:
        UserError: more than one name.
    """
    settings = [argument for argument in arguments if _is_setting(argument)]
    names = [os.path.expanduser(argument) for argument in arguments if argument not in settings]
    if len(names) > 1:
        raise UserError(
            f"command line: one name is expected, not {len(names)} ({', '.join(names)}); "
            "settings have the form section.key=value"
        )
    return (names[0] if names else None), settings


def _is_setting(argument: str) -> bool:
    """Whether an argument is a setting; else it is a name, such as runs/lr=1e-3."""
    key, equals, _ = argument.partition("=")
    if not equals or "/" in key or os.sep in key:
        return False
    return key.strip().partition(".")[0] in SECTIONS or not os.path.exists(argument)


class _Notices(logging.Handler):
    """Log records as plain lines on whatever stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        _warn(printable(self.format(record)))


def _quiet() -> None:
    """Print our own notices on stderr, and none of the libraries' progress bars and warnings."""
    logger = logging.getLogger("etude")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not any(isinstance(handler, _Notices) for handler in logger.handlers):
        logger.addHandler(_Notices())
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


@contextlib.contextmanager
def bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where that is a terminal; yields the function that advances it."""
    from rich.progress import Progress

    with Progress(console=err, disable=not (FIRST and err.is_terminal), transient=True) as display:
        task = display.add_task(label, total=total)
        yield lambda steps: display.advance(task, steps)
