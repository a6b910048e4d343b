"""Pieces of Markdown that hold a user's words: a table, a cell, a line, code."""

import re
from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], rule: str = "---:") -> str:
    """A table whose columns after the first are aligned by `rule`."""
    lines = [head, ["---", *[rule] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell(text) for text in row) + " |" for row in lines)


def cell(text: str) -> str:
    """Text as a cell of a table."""
    return line(text).replace("|", "\\|")


def line(text: str) -> str:
    """Text on one line."""
    return " ".join(text.splitlines())


def code(text: str) -> str:
    """Text as code within a line, fenced by more backticks than it holds in a row."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{line(text)}{pad}{fence}"
