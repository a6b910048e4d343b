"""The one exception that a user is meant to read."""

import difflib
import errno
import os
import re
import shlex
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can mend; the programs print it without a traceback and exit with 2.

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
    """The first line of what an exception says, or its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, what it was raised from, what that was raised from, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


# What libraries say in place of a number of the system, or beside one: "[Errno 28]", "(os error 28)".
SPELT = {
    errno.ENOMEM: "can't allocate|cannot allocate|unable to allocate|not enough memory|out of memory"
    "|bad_alloc|malloc of size|failed to map segment|can't start new thread",
    errno.ENOSPC: "no space left on device|file write failed",
    errno.EDQUOT: "quota exceeded",
}
NUMBER = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)")
# The folders that libraries fill, by the variable that sets another one.
CACHES = {
    "ETUDE_CACHE": "~/.cache/etude",
    "HF_HUB_CACHE": "~/.cache/huggingface/hub",
    "HF_DATASETS_CACHE": "~/.cache/huggingface/datasets",
    "HF_HOME": "~/.cache/huggingface",
    "XDG_CACHE_HOME": "~/.cache",
}


def shortage(error: BaseException, place: str | Path | None = None) -> str:
    """What the machine lacks or forbids, and what to do, if `error` arose from that; else empty.

    Its causes are looked through too, by the system's number and by what libraries say in its place.
    `place` is where it was writing, for errors that do not say.
    """
    for cause in causes(error):
        number, file = _of_the_system(cause)
        where = str(file or place or "")
        on_gpu = type(cause).__name__ == "OutOfMemoryError" or "CUDA" in str(cause)
        if number == errno.ENOMEM and on_gpu:
            return (
                "out of memory on the GPU; lower training.batch_size, dataset.max_length or "
                "evaluation.batch_size, or set training.gradient_checkpointing: true"
            )
        if number == errno.ENOMEM:
            return (
                "not enough memory; end other programs, lower training.batch_size, dataset.max_length or "
                "evaluation.batch_size, set model.quantization: int8, or take a smaller model.name"
            )
        variable = _variable(where)
        if number in (errno.ENOSPC, errno.EDQUOT):
            problem = "the disk is full; free some space"
            problem += " (the quota is used up)" if number == errno.EDQUOT else ""
            problem += f", or set {variable} to a folder with room" if variable else ""
        elif number in (errno.EROFS, errno.EACCES, errno.EPERM):
            problem = (
                os.strerror(number)
                + "; "
                + (
                    f"set {variable} to a folder that can be written"
                    if variable
                    else "check who may read and write there, or give another place"
                )
            )
        elif number in (errno.EMFILE, errno.ENFILE):
            return "too many open files; raise the limit: ulimit -n 4096"
        else:
            continue
        return f"{where}: {problem}" if where else problem
    return ""


def _of_the_system(error: BaseException) -> tuple[int | None, str | None]:
    """The number by which the system refused, and the file."""
    if isinstance(error, UserError):  # says already what it has to
        return None, None
    # By name: importing torch for its class would slow every start.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return errno.ENOMEM, None
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, error.filename if isinstance(error.filename, str) else None
    text = str(error)
    if number := NUMBER.search(text):
        return int(number[1] or number[2]), None
    return next((n for n, words in SPELT.items() if re.search(words, text, re.I)), None), None


def _variable(where: str) -> str:
    """The environment variable that moves the cache which the path `where` is in; empty if it is in none."""
    path = Path(os.path.abspath(os.path.expanduser(where)))
    for variable, usual in CACHES.items():
        folder = Path(os.environ.get(variable) or usual).expanduser()
        if where and path.is_relative_to(folder):
            return variable
    temporary = Path(tempfile.gettempdir())
    own = where and path.is_relative_to(temporary) and path.relative_to(temporary).parts[:1]
    return "TMPDIR" if own and own[0].startswith(("tmp", "torchinductor")) else ""


def command(*words: object) -> str:
    """A command as a shell takes it: quoted where need be, and no Path in it taken for anything else."""
    return shlex.join(_word(word) for word in words)


def _word(word: object) -> str:
    text = str(word)
    # A name that begins like an option, or like a setting (key=value), is given with its folder.
    if isinstance(word, Path) and (text.startswith("-") or "=" in "".join(word.parts[:1])):
        return os.path.join(os.curdir, text)
    return text
