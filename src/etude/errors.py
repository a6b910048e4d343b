"""The one exception that a user is meant to read."""

import difflib
import os
import shlex
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can mend; the programs print it without a traceback and exit with 2.

    The message has four parts: what is wrong, where (``file:line`` or key), what is allowed or
    nearest, and what to do next.
    """


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word` by difflib's ratio, or None when nothing is near (< 0.6)."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return found[0] if found else None


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def command(*words: object) -> str:
    """A command as a shell takes it: quoted where need be, and no Path in it taken for anything else."""
    return shlex.join(_word(word) for word in words)


def _word(word: object) -> str:
    text = str(word)
    # A name that begins like an option, or like a setting (key=value), is given with its folder.
    if isinstance(word, Path) and (text.startswith("-") or "=" in word.parts[0]):
        return os.path.join(os.curdir, text)
    return text
