"""What the four programs share at the terminal: consoles, arguments, and how a mistake ends."""

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
from typing import IO, Any, NoReturn, ParamSpec, cast

import typer
from rich.console import Console
from rich.text import Text

from etude import distributed, files
from etude.config.loading import key_paths
from etude.config.schema import Config
from etude.distributed import FIRST, first_to_say
from etude.errors import Stopped, UserError, causes, shortage
from etude.files import expanded

P = ParamSpec("P")

USER_ERROR = 2
INTERRUPTED = 130

# C0 without tab and line feed, DEL, C1: what could move the cursor, rename the window or worse;
# and the marks that reorder what is shown (arXiv:2111.00169).
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

# What is printed holds the user's texts, in which a bracket is a bracket, and :smile: five letters.
PLAIN: dict[str, Any] = {"highlight": False, "soft_wrap": True, "markup": False, "emoji": False}


class _Log:
    """What a training reports, as lines with their time: in memory until its run has a folder."""

    def __init__(self) -> None:
        self.file: Path | None = None
        self.kept: list[str] | None = None  # None: no training is running
        self._begun = ""  # of a line that is not ended yet

    def add(self, objects: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Add what is printed, without colours and control characters."""
        if self.kept is None or not FIRST:
            return
        stream = io.StringIO()
        plain = Console(file=stream, width=100, **PLAIN, color_system=None)
        plain.print(*objects, **options)
        *whole, self._begun = (self._begun + stream.getvalue()).split("\n")
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self.kept += [f"{now} {printable(line).rstrip()}\n" for line in whole if line.strip()]
        if self.file:
            self.write()

    def write(self) -> None:
        """Append what was kept to the file in one piece, which a signal or a kill does not part."""
        if self.file is None or not self.kept:
            return
        text, self.kept = "".join(self.kept), []
        # A full disk ends the training where it saves something, with words of its own.
        with contextlib.suppress(OSError):
            files.append(self.file, text)


_log = _Log()


def start_log() -> None:
    """Begin to keep what is printed: a training begins, and its run has no folder yet."""
    if _log.file or _log.kept is None:
        _log.file, _log.kept = None, []


def log_to(file: Path) -> None:
    """Append to `file` what was printed since `start_log`, and all that follows until the program ends."""
    _log.file = file
    if _log.kept and file.is_file() and file.stat().st_size:
        _log.kept.insert(0, "\n")  # a kill may have left half a line
    _log.write()


class _Stream(io.TextIOBase):
    """The stdout or stderr of the moment; what nobody reads any more (`| head`, a closed terminal) is lost.

    So that a training goes on to its end, whoever was listening.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def _now(self) -> Any:
        stream = getattr(sys, self._name)
        return getattr(stream, "rich_proxied_file", stream)  # under a live progress bar

    def _try(self, action: Callable[[Any], object]) -> None:
        stream = self._now()
        if stream is None:  # closed when the program began
            return
        try:
            action(stream)
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    def write(self, text: str) -> int:
        """Write `text`, or lose it."""
        self._try(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, or lose what is left."""
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        stream = self._now()
        return stream is not None and bool(stream.isatty())

    def fileno(self) -> int:
        """Its descriptor."""
        return int(self._now().fileno())


class _Console(Console):
    """A console that keeps what is printed for the log of a training."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as Console does."""
        _log.add(objects, options)
        super().print(*objects, **options)


# Results go to stdout, all else to stderr, so that output can be piped.
# Of several processes (torchrun) the first one speaks; a mistake is told by the first that meets it.
out = _Console(file=cast(IO[str], _Stream("stdout")), **PLAIN, quiet=not FIRST)
err = _Console(file=cast(IO[str], _Stream("stderr")), **PLAIN)


def say(label: str, text: str = "", style: str = "bold") -> None:
    """Print one line of a program's report: a label in its column, then the text."""
    out.print(Text(f"{label:<9} ", style=style), printable(text), sep="")


def notice(text: str) -> None:
    """Print something that the user should know but need not act on."""
    say("notice", text, "yellow")


def aside(text: str) -> None:
    """Print a notice on stderr: stdout holds the tables, which may be piped."""
    err.print(f"notice    {printable(text)}")


def printable(text: str) -> str:
    """Text without the control characters by which it could drive the terminal."""
    return CONTROL.sub("", text)


def tell(*parts: str | Text) -> None:
    """Print `parts` as one line on stderr, unless another process has said the same."""
    line = Text.assemble(*parts)
    if first_to_say(line.plain):
        err.print(line)
    else:
        _log.add((line,), {})


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Make `function` a program: quiet libraries, a clear sentence for a mistake, an exit code.

    Exit codes: 0 done; 2 a mistake, or a machine that is full, reported on stderr without a
    traceback; 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        _quiet()
        _log.file = _log.kept = None
        with distributed.on_signals(_end, "SIGTERM", "SIGHUP"):
            try:
                distributed.check(function.__name__)
                function(*args, **kwargs)
            except typer.Exit:
                raise
            except (Exception, KeyboardInterrupt) as error:
                _report(error)

    return wrapper


def _report(error: BaseException) -> NoReturn:
    """Print what ended a program in one line, and end it with the exit code that belongs to it."""
    # A library may wrap the interrupt that it met, in the middle of an import say.
    for cause in causes(error):
        if isinstance(cause, KeyboardInterrupt):
            tell("\n", str(cause) or "stopped")
            raise typer.Exit(cause.code if isinstance(cause, Stopped) else INTERRUPTED) from None
    problem = str(error) if isinstance(error, UserError) else shortage(error)
    if not problem and isinstance(error, OSError):  # no such folder, a name too long
        problem = f"{error.filename or 'the system'}: {error.strerror or error}"
    if not problem:
        _log.add((traceback.format_exc(),), {})
        raise error
    tell(Text("error: ", style="bold red"), printable(problem))
    raise typer.Exit(USER_ERROR) from None


def _end(number: int, frame: object) -> None:
    """On SIGTERM and SIGHUP leave in order: what is half done is cleaned up, a child process ended."""
    if distributed.one_is_gone:
        return  # the launcher ends all others: this one does so by itself, once it has said why
    signal.signal(number, signal.SIG_DFL)  # the next one ends it at once
    raise SystemExit(128 + number)


def run(function: Callable[..., None]) -> None:
    """Run one program as `python -m etude.<program>`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    app()


def split_arguments(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Part positional arguments into at most one name and ``section.key=value`` overrides.

    Raises:
        UserError: more than one name, or what is neither name nor setting.
    """
    settings = [argument for argument in arguments if _is_setting(argument)]
    names = [argument for argument in arguments if argument not in settings]
    if len(names) > 1:
        raise UserError(
            f"command line: one name is expected, not {len(names)} ({', '.join(names)}); "
            "settings have the form section.key=value"
        )
    return (names[0] if names else None), settings


def _is_setting(argument: str) -> bool:
    """Whether an argument is a setting; else it is a name, such as runs/lr=1e-3.

    Raises:
        UserError: it looks like a setting, but has no section, and is no file or folder.
    """
    key, equals, _ = argument.partition("=")
    section, dot, _ = key.strip().partition(".")
    if not equals or "/" in key or os.sep in key:
        return False
    if dot and section in Config.model_fields:
        return True
    if os.path.exists(expanded(argument)):
        return False
    if not dot:
        meant = [known for known in key_paths() if known.partition(".")[2] == section]
        there = [run for run in [os.path.join("runs", argument)] if os.path.exists(run)]
        guess = " or ".join(meant + there)
        raise UserError(
            f"command line: {argument!r:.200} is neither a file or folder here nor a setting, which has "
            "the form section.key=value, for example lora.r=16"
            + (f"; did you mean {guess}?" if guess else "")
        )
    return True


class _Notices(logging.Handler):
    """Log records as plain lines on whatever stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(printable(self.format(record)))


def _quiet() -> None:
    """Our own notices to stderr; the libraries' progress bars and advice to themselves."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except (
            OSError
        ):  # closed (`>&-`): else a file would get its number, and what libraries print
            os.open(os.devnull, os.O_RDWR)
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
        if step % self._every == 0 or step in (1, steps):
            line = f"step {step}/{steps}  {facts}"
            if err.is_terminal:
                _log.add((line,), {})
            else:
                err.print(line)
