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
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


LOWER = "lower training.batch_size, dataset.max_length or evaluation.batch_size"
REFUSED = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    **{
        number: f"{os.strerror(number)}; check who may read and write there"
        for number in (errno.EROFS, errno.EACCES, errno.EPERM)
    },
}
# Libraries write the system's number, or words of their own, in place of an OSError.
NUMBER = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)")
MEMORY_WORDS = re.compile("(can't|cannot|unable to) allocate|out of memory|failed to map", re.I)
DISK_WORDS = re.compile("no space left|file write failed", re.I)
# The folders that libraries fill, by the variable that moves them.
CACHES = {"ETUDE_CACHE": "~/.cache/etude", "HF_HOME": "~/.cache/huggingface"}


def shortage(error: BaseException, place: str | Path | None = None) -> str:
    """What the machine lacks or forbids, and what to do, if that caused `error`; else empty.

    `place` is where it was writing, for errors that do not say.
    """
    for cause in causes(error):
        number = _system_error(cause)
        if number == errno.ENOMEM:
            if type(cause).__name__ == "OutOfMemoryError" or "CUDA" in str(cause):
                return f"out of memory on the GPU; {LOWER}, or set training.gradient_checkpointing: true"
            return (
                f"not enough memory; end other programs, {LOWER}, set model.quantization: int8, "
                "or take a smaller model.name"
            )
        if number in REFUSED:
            where = str(getattr(cause, "filename", None) or place or "")
            problem = f"{where}: {REFUSED[number]}" if where else REFUSED[number]
            for variable, usual in CACHES.items():
                cache = os.path.expanduser(os.environ.get(variable) or usual)
                if where and Path(os.path.abspath(where)).is_relative_to(cache):
                    problem += f", or set {variable} to another folder"
            return problem
    return ""


def _system_error(error: BaseException) -> int:
    """The system's number for what it refused (errno), by number or words; 0 for all else."""
    text = str(error)
    if isinstance(error, UserError):  # has its own message
        return 0
    # By name: importing torch for its class would slow every start.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if found := NUMBER.search(text):
        return int(found[1] or found[2])
    if MEMORY_WORDS.search(text):
        return errno.ENOMEM
    return errno.ENOSPC if DISK_WORDS.search(text) else 0


def command(*words: object) -> str:
    """A command as a shell takes it: quoted where needed, no Path read as an option or setting."""
    return shlex.join(_word(word) for word in words)


def _word(word: object) -> str:
    text = str(word)
    # A name that begins like an option, or like a setting (key=value), is given with its folder.
    if isinstance(word, Path) and (text.startswith("-") or "=" in "".join(word.parts[:1])):
        return os.path.join(os.curdir, text)
    return text
