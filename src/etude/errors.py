"""The one exception that a user is meant to read."""

import difflib
from collections.abc import Iterable


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
