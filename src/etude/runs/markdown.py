"""Tables in Markdown, which hold a user's words."""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]], rule: str = "---:") -> str:
    """A table whose columns after the first are aligned by `rule`."""
    lines = [head, ["---", *[rule] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell(text) for text in row) + " |" for row in lines)


def cell(text: str) -> str:
    """Text as a cell of a table: on one line, a bar escaped."""
    return " ".join(text.splitlines()).replace("|", "\\|")
