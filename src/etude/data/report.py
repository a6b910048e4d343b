"""What became of every row of a split, with line numbers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from etude.data.formats import Row
from etude.errors import UserError

SHOWN = 10  # of lines, names or reasons; then their number
TRUNCATED = "truncated, end token kept"
PARTLY = "lose answers longer than max_length"
DIVIDED = "split into several examples"
CUT = "truncated inside the text, so that question and label stay"
UNANSWERED = "end with messages after the last answer, which are left out"
REWRITTEN = (
    "make an example for each answer: what came before it is written otherwise than it was learnt"
)
JOINED = {
    "system": "have a system prompt, written before the first question: the template has no system "
    "role",
    "reasoning": "have reasoning, written into the answer as <think>...</think>: the template has "
    "no place for it",
    "tools": "have tools, written into the text as Qwen2.5 does: the template does not know them",
}
EMPTY_THOUGHTS = (
    "have answers without reasoning, before which the template writes empty thoughts, so the model "
    "learns not to think; generation.thinking: false moves them into the prompt, where the template "
    "has that switch"
)
THOUGHTLESS = "have reasoning, left out because generation.thinking is false"
DUPLICATE = "duplicates of an earlier row"
TYPED_END = (
    "with an answer that ends with a typed end token, which the model would learn to write as text; "
    "remove it"
)


@dataclass
class Report:
    """What became of every row of one split; lists hold line numbers.

    Attributes:
        drawn: "50 of 10,000 rows", where the rows are a sample.
        examples: rows kept, and more where long ones were split.
        lost: tokens of rows that were truncated, or dropped for their length.
        dropped: rows that are not used, by the reason.
        noted: rows that are used, by what there is to say of them.
        contradictions: (line, earlier line) of rows with one text and two labels.
        labels: rows kept of each class.
        few: classes with one row kept, or none: how many.
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
    dropped: dict[str, list[int]] = field(default_factory=dict)
    noted: dict[str, list[int]] = field(default_factory=dict)
    contradictions: list[tuple[int, int]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    few: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, line: int) -> None:
        """Count a row that is not used."""
        self.dropped.setdefault(reason, []).append(line)

    def note(self, what: str, lines: Sequence[int]) -> None:
        """Count rows of which there is something to say."""
        if lines:
            self.noted.setdefault(what, []).extend(lines)

    def notices(self) -> list[str]:
        """Sentences about rows changed, dropped, repeated or contradicted; empty when all is well."""
        found = drops(self.split, self.dropped, self.rows) + [
            f"{self.split}: {len(lines)} of {self.rows} rows {what}: {lines_of(lines)}"
            for what, lines in self.noted.items()
        ]
        if self.lost:
            share = self.lost / (self.lost + self.tokens)
            found.append(f"{self.split}: {self.lost:,} tokens lost beyond max_length ({share:.1%})")
        found += contradicting(self.split, self.rows, self.contradictions)
        for count, what in enumerate(("no row", "a single row")):
            names = [repr(label) for label, number in self.few.items() if number == count]
            if names and self.split == "train":
                plural = "s" * (len(names) > 1)
                found.append(f"train: {what} to learn the label{plural} {listed(names)} from")
        return found


def repeats(
    rows: Iterable[Row], others: Iterable[Row] | None = None
) -> tuple[list[int], list[tuple[int, int]]]:
    """The lines of rows that are also in `others`, and (line, other line) of those that contradict one.

    Without `others`, earlier rows are meant. The same text with another label is a contradiction.
    The same question with another answer is none: a conversation can go on in many ways.
    """
    seen: dict[str, dict[str | None, int]] = {}
    for row in others or ():
        seen.setdefault(row.key, {}).setdefault(row.label, row.line)
    duplicates: list[int] = []
    contradictions: list[tuple[int, int]] = []
    for row in rows:
        key = row.key
        labels = seen.get(key, {})
        if row.label in labels:
            duplicates.append(row.line)
        elif labels:
            contradictions.append((row.line, next(iter(labels.values()))))
        if others is None:
            seen.setdefault(key, {}).setdefault(row.label, row.line)
    return duplicates, contradictions


def contradicting(
    split: str, rows: int, pairs: Sequence[tuple[int, int]], where: str = ""
) -> list[str]:
    """A sentence about rows of `split` with the text of another row and another label, if any.

    `pairs` are their lines and those of the other rows, which are in `where`.
    """
    if not pairs:
        return []
    shown = listed([f"line {line} contradicts{where} line {other}" for line, other in pairs])
    return [
        f"{split}: {len(pairs)} of {rows} rows have the text of another row and another label: "
        f"{shown}; one of each pair is wrong"
    ]


def drops(split: str, dropped: Mapping[str, Sequence[int]], rows: int) -> list[str]:
    """Sentences about dropped rows, at most a screen of them."""
    found = [
        f"{split}: {len(lines)} of {rows} rows dropped ({reason}): {lines_of(lines)}"
        for reason, lines in dropped.items()
    ]
    more = sum(map(len, list(dropped.values())[SHOWN:]))
    rest = [f"{split}: ... and {more} more of {rows} rows dropped for other reasons"]
    return found[:SHOWN] + rest * bool(more)


def unusable(source: str, faults: Mapping[str, Sequence[int]], advice: str) -> UserError:
    """What to say of rows that cannot be used: the reasons, each with its lines."""
    count = sum(map(len, faults.values()))
    shown = [
        f"{source}:{lines[0]}: {reason}"
        + f" ({len(lines)} rows: {lines_of(lines)})" * (len(lines) > 1)
        for reason, lines in list(faults.items())[:SHOWN]
    ]
    more = sum(map(len, list(faults.values())[SHOWN:]))
    return UserError(
        f"{count} row{'s' * (count > 1)} cannot be used ({advice}):\n  "
        + "\n  ".join(shown + [f"... and {more} more"] * bool(more))
    )


def listed(names: Sequence[str]) -> str:
    """The first names, and whether there are more."""
    return ", ".join(names[:SHOWN]) + ", ..." * (len(names) > SHOWN)


def lines_of(lines: Sequence[int]) -> str:
    """The first line numbers, and whether there are more."""
    return f"line{'s' * (len(lines) > 1)} {listed(list(map(str, lines)))}"
