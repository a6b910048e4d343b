"""What became of every row of a split, with line numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from etude.data.formats import Row

LINES_SHOWN = 10


@dataclass
class Report:
    """What became of every row of one split; lists hold line numbers.

    Attributes:
        contradictions: (line, earlier line) of rows with one text and two labels.
        labels: rows kept of each class.
        spelling: rows whose text spells control tokens, which stay text.
        spelled: which tokens.
        spelled_ends: rows with an answer that ends with a typed end token.
        few: classes with one row kept, or none: how many.
        examples: rows kept, and more where long ones were split.
        lost: tokens of rows that were truncated, or dropped for their length.
    """

    split: str
    source: str
    format: str
    rows: int
    drawn: str = ""
    kept: int = 0
    examples: int = 0
    tokens: int = 0
    lost: int = 0
    supervised: int = 0
    longest: int = 0
    truncated: list[int] = field(default_factory=list)
    divided: list[int] = field(default_factory=list)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    duplicates: list[int] = field(default_factory=list)
    contradictions: list[tuple[int, int]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    few: dict[str, int] = field(default_factory=dict)

    spelling: list[int] = field(default_factory=list)
    spelled: list[str] = field(default_factory=list)
    spelled_ends: list[int] = field(default_factory=list)

    def drop(self, reason: str, line: int) -> None:
        """Count a row that is not used."""
        self.dropped.setdefault(reason, []).append(line)

    def notices(self) -> list[str]:
        """Sentences about rows changed, dropped, repeated or contradicted; empty when all is well."""
        found = dropped_rows(self.split, self.dropped, self.rows) + [
            f"{self.split}: {len(lines)} of {self.rows} rows {what}: {lines_of(lines)}"
            for what, lines in (
                ("truncated, end token kept", self.truncated),
                (f"split, which makes {self.examples:,} examples of all rows", self.divided),
                ("the same as an earlier row", self.duplicates),
            )
            if lines
        ]
        if self.spelling:
            found.append(
                f"{self.split}: {len(self.spelling)} of {self.rows} rows hold text that spells "
                f"control tokens ({listed(self.spelled)}), encoded as plain text: "
                f"{lines_of(self.spelling)}"
            )
        if self.spelled_ends:
            found.append(
                f"{self.split}: {len(self.spelled_ends)} of {self.rows} rows have an answer that "
                "ends with a typed end token: the model would learn to write it as text, and show "
                f"it. Remove it from {lines_of(self.spelled_ends)}"
            )
        if self.lost:
            share = self.lost / (self.lost + self.tokens)
            found.append(f"{self.split}: {self.lost:,} tokens lost beyond max_length ({share:.1%})")
        found += contradicting(self.split, self.rows, self.contradictions)
        for count, what in enumerate(("no row", "a single row")):
            names = [repr(label) for label, number in self.few.items() if number == count]
            if names and self.split == "train":
                found.append(
                    f"train: {what} to learn the label{'s' * (len(names) > 1)} "
                    f"{', '.join(names[:LINES_SHOWN])}{', ...' * (len(names) > LINES_SHOWN)} from"
                )
        return found


def contradicting(
    name: str, rows: int, pairs: Sequence[tuple[int, int]], where: str = ""
) -> list[str]:
    """A sentence about rows of `name` with the text of another row and another label, if any.

    `pairs` are their lines and those of the other rows, which are in `where`.
    """
    if not pairs:
        return []
    shown = ", ".join(
        f"line {line} contradicts{where} line {at}" for line, at in pairs[:LINES_SHOWN]
    )
    return [
        f"{name}: {len(pairs)} of {rows} rows have the text of another row and another label: "
        f"{shown}{', ...' * (len(pairs) > LINES_SHOWN)}; one of each pair is wrong"
    ]


def repeats(rows: Sequence[Row]) -> tuple[list[int], list[tuple[int, int]]]:
    """The lines of rows that repeat an earlier row, and (line, earlier line) of those that contradict one.

    The same text with another label is a contradiction. The same question with another answer is
    none: a conversation can go on in many ways.
    """
    seen: dict[str, dict[str | None, int]] = {}
    duplicates: list[int] = []
    contradictions: list[tuple[int, int]] = []
    for row in rows:
        labels = seen.setdefault(row.key, {})
        if row.label in labels:
            duplicates.append(row.line)
        elif labels:
            contradictions.append((row.line, next(iter(labels.values()))))
        labels.setdefault(row.label, row.line)
    return duplicates, contradictions


def dropped_rows(split: str, dropped: Mapping[str, Sequence[int]], rows: int) -> list[str]:
    """Sentences about dropped rows, at most a screen of them."""
    found = [
        f"{split}: {len(lines)} of {rows} rows dropped ({reason}): {lines_of(lines)}"
        for reason, lines in dropped.items()
    ]
    more = sum(map(len, list(dropped.values())[LINES_SHOWN:]))
    rest = [f"{split}: ... and {more} more of {rows} rows dropped for other reasons"] * bool(more)
    return found[:LINES_SHOWN] + rest


def listed(names: Sequence[str]) -> str:
    """The first names, and whether there are more."""
    return ", ".join(names[:LINES_SHOWN]) + ", ..." * (len(names) > LINES_SHOWN)


def lines_of(lines: Sequence[int]) -> str:
    """The first line numbers, and whether there are more."""
    shown = ", ".join(map(str, lines[:LINES_SHOWN]))
    return f"line{'s' if len(lines) > 1 else ''} {shown}" + (
        ", ..." if len(lines) > LINES_SHOWN else ""
    )
