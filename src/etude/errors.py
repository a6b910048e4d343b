"""The exceptions that a user is meant to read, and what a full machine raises in one sentence."""

import difflib
import errno
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can fix; the programs print it without a traceback and exit with 2.

    The message has four parts: what is wrong, where (``file:line`` or key), what is allowed or
    nearest, and what to do next.
    """


class Stopped(KeyboardInterrupt):
    """A signal ended a program in order; the message says how to go on.

    A KeyboardInterrupt, so that no `except Exception` of a library takes it for an error.

    Attributes:
        code: the program's exit code, 128 + the signal's number.
    """

    def __init__(self, message: str, code: int) -> None:
        """Say `message` and end the program with `code`."""
        super().__init__(message)
        self.code = code


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word` by difflib's ratio, or None when nothing is near (< 0.6)."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return found[0] if found else None


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type where the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, what it was raised from, what that was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# Libraries write the system's number, or words of their own, in place of an OSError.
NUMBER = re.compile(r"(?:\[Errno |\(os error )(\d+)")
NO_MEMORY = re.compile("(can't|cannot|unable to) allocate|out of memory|failed to map", re.I)
NO_SPACE = re.compile("no space left|file write failed", re.I)


def shortage(error: BaseException, place: str | Path | None = None) -> str:
    """What the machine lacks or forbids, and what to do, if that caused `error`; else empty.

    `place` is where it was writing, for errors that do not say.
    """
    for cause in causes(error):
        if isinstance(cause, UserError):  # has its own message
            continue
        text, number = str(cause), getattr(cause, "errno", None)
        if number is None and (found := NUMBER.search(text)):
            number = int(found[1])
        # By name: importing torch for its class would slow every start.
        on_gpu = type(cause).__name__ == "OutOfMemoryError" or "CUDA out of memory" in text
        no_memory = isinstance(cause, MemoryError) or number == errno.ENOMEM
        if on_gpu or no_memory or NO_MEMORY.search(text):
            return (
                f"not enough memory{' on the GPU' * on_gpu}; end other programs, lower "
                "training.batch_size, dataset.max_length or evaluation.batch_size, set "
                "training.gradient_checkpointing: true or model.quantization: int8, or take a "
                "smaller model.name"
            )
        file = getattr(cause, "filename", None) or place
        where = f"{file}: " if file else ""
        if number in (errno.ENOSPC, errno.EDQUOT) or NO_SPACE.search(text):
            return (
                f"{where}the disk is full, or its quota used up; free some space (HF_HOME and "
                "ETUDE_CACHE move the libraries' caches elsewhere)"
            )
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            return f"{where}{os.strerror(number)}; check who may read and write there"
    return ""


def command(*words: object) -> str:
    """A command as a shell takes it: quoted where needed."""
    return shlex.join(map(str, words))
