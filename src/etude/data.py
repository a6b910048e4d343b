"""Files in, examples out, and a report in which every row's fate is told by line number."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from etude import sources
from etude.config import Dataset
from etude.conversation import Example, Message, Renderer, RenderError
from etude.errors import UserError, nearest

# What each format is recognised by, the most telling first: the columns that a row must have.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "text": ("text",),
}
OPTIONAL = {
    "sharegpt": ("system",),
    "alpaca": ("input", "system"),
    "prompt_completion": ("quality",),
}
TURN_KEYS = {"messages": {"role", "content"}, "sharegpt": {"from", "value"}}
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}
LINES_SHOWN = 10
TEXT_LIMIT = (
    10**6
)  # characters of one text, many times any window; a tokenizer takes seconds for it


@dataclass(frozen=True)
class Row:
    """One row of a data set in the common form.

    Attributes:
        line: its line in the file (its number, from 1, in formats without lines).
        messages: the conversation; empty for raw text.
        text: raw text, or the text to classify.
        label: the class, in classification sets.
        quality: a given judgement of the completion (good, fair, poor), where the data carries one.
    """

    line: int
    messages: list[Message]
    text: str = ""
    label: str | None = None
    quality: str | None = None

    @property
    def key(self) -> str:
        """What makes two rows the same row."""
        return json.dumps([self.messages, self.text])


@dataclass(frozen=True)
class Table:
    """The rows of one source, in order, with what was found out on the way.

    Attributes:
        fingerprint: SHA-256 of the file.
        unused: columns that nothing reads, and in how many rows (or turns) they stand.
    """

    source: str
    format: str
    rows: list[Row]
    fingerprint: str
    labels: list[str] | None = None
    unused: dict[str, int] = field(default_factory=dict)


@dataclass
class Report:
    """What became of every row of one split; lists hold line numbers."""

    split: str
    source: str
    format: str
    rows: int
    kept: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    truncated: list[int] = field(default_factory=list)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    duplicates: list[int] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, line: int) -> None:
        """Count a row that is not used."""
        self.dropped.setdefault(reason, []).append(line)

    def notices(self) -> list[str]:
        """Sentences about rows changed, dropped or standing twice; empty when all is well."""
        found = [(f"dropped ({reason})", lines) for reason, lines in self.dropped.items()]
        found += [
            ("truncated, end token kept", self.truncated),
            ("the same as an earlier row", self.duplicates),
        ]
        return [
            f"{self.split}: {len(lines)} of {self.rows} rows {what}: {_lines(lines)}"
            for what, lines in found
            if lines
        ]


def read(source: str, settings: Dataset) -> Table:
    """Read a file or a Hub data set and bring every row into the common form.

    Raises:
        UserError: no such source, rows that cannot be read or lack fields (all of them, by line).
    """
    raw, fingerprint = sources.read(source)
    columns = settings.columns
    present = {name for _, values in raw for name in values}
    first = present | {field for field, own in columns.items() if own in present}
    form = _detect(first, settings, source, raw[0])
    needed = FORMATS[form]
    known = needed + OPTIONAL.get(form, ())
    stray = [name for name in columns if name not in known]
    if stray:
        guess = nearest(stray[0], [name for names in FORMATS.values() for name in names])
        raise UserError(
            f"dataset.columns: {', '.join(stray)}: no field of format {form}, which has "
            f"{', '.join(known)}" + (f"; did you mean {guess}?" if guess else "")
        )
    absent = [name for name in needed if columns.get(name, name) not in present]
    if absent:
        names = ", ".join(f"{columns.get(name, name)} (for {name})" for name in absent)
        raise UserError(
            f"{source}: no row has a column {names}; its columns are {', '.join(map(str, raw[0][1]))}. "
            f"The format is {form}: see dataset.format, and map your names with dataset.columns"
        )
    rows: list[Row] = []
    faults: list[str] = []
    for line, values in raw:
        fields = {name: values.get(columns.get(name, name)) for name in known}
        missing = [columns.get(name, name) for name in needed if fields[name] is None]
        try:
            if missing:
                raise ValueError(
                    f"no {' and no '.join(map(repr, missing))}; it has: "
                    f"{', '.join(map(str, values)) or 'nothing'}"
                )
            rows.append(_CONVERT[form](line, fields))
        except ValueError as error:
            faults.append(f"{source}:{line}: {error}")
    sources.raise_faults(faults, f"the format is {form}; see dataset.format and dataset.columns")
    labels = None
    if form == "classification":
        labels = settings.labels or sorted({row.label for row in rows if row.label})
        strange = [row for row in rows if row.label not in labels]
        sources.raise_faults(
            [
                f"{source}:{row.line}: label {row.label!r} is not one of {', '.join(labels)}"
                for row in strange
            ],
            "mend the rows or dataset.labels",
        )
        if len(labels) < 2:
            raise UserError(
                f"{source}: only one label ({labels[0]}); a classification needs at least two"
            )
    used = {columns.get(name, name) for name in known}
    unused = Counter(name for _, values in raw for name in values if name not in used)
    if form in TURN_KEYS:
        turns = (turn for _, values in raw for turn in values[columns.get(needed[0], needed[0])])
        unused.update(
            f"{name} of a turn" for turn in turns for name in turn.keys() - TURN_KEYS[form]
        )
    return Table(source, form, rows, fingerprint, labels, dict(unused))


def instruct(text: str, labels: Sequence[str], settings: Dataset) -> list[Message]:
    """The prompt of a classification: dataset.instruction with labels and text filled in."""
    parts = {"{labels}": ", ".join(labels), "{text}": text}
    # One pass, so that braces in the text stay what they are.
    content = re.sub(r"\{labels\}|\{text\}", lambda match: parts[match[0]], settings.instruction)
    return [{"role": "user", "content": content}]


def conversation(row: Row, labels: Sequence[str] | None, settings: Dataset) -> list[Message]:
    """The row as messages with the answer last; for classification the label is the answer."""
    if row.label is None or labels is None:
        return row.messages
    return [*instruct(row.text, labels, settings), {"role": "assistant", "content": row.label}]


def encode(
    table: Table, renderer: Renderer, settings: Dataset, split: str
) -> tuple[list[Example], Report]:
    """Render every row and bring it under `max_length`.

    Over-length rows are cut inside the last answer that fits, whose end token is kept, or dropped
    (`dataset.overlength`). Rows that would train nothing are dropped and counted.

    Raises:
        UserError: no row is left.
    """
    report = Report(split, table.source, table.format, len(table.rows))
    examples: list[Example] = []
    seen: set[str] = set()
    for row in table.rows:
        if row.key in seen:
            report.duplicates.append(row.line)
        seen.add(row.key)
        messages = conversation(row, table.labels, settings)
        try:
            example = renderer.render(messages) if messages else renderer.text(row.text)
        except RenderError as error:
            report.drop(str(error), row.line)
            continue
        if len(example) > settings.max_length:
            if settings.overlength == "drop":
                report.drop(f"longer than max_length {settings.max_length}", row.line)
                continue
            example = truncate(example, settings.max_length)
            if any(example.supervised):
                report.truncated.append(row.line)
        if not any(example.supervised):
            report.drop(f"no supervised token within max_length {settings.max_length}", row.line)
            continue
        examples.append(replace(example, origin=f"{table.source}:{row.line}"))
        report.kept += 1
        report.tokens += len(example)
        report.supervised += sum(example.supervised)
        report.longest = max(report.longest, len(example))
        if row.label is not None:
            report.labels[row.label] = report.labels.get(row.label, 0) + 1
    if not examples:
        raise UserError(
            f"{table.source}: none of {len(table.rows)} rows is left for {split}:\n  "
            + "\n  ".join(report.notices())
        )
    return examples, report


def truncate(example: Example, max_length: int) -> Example:
    """The first `max_length` tokens, ending with an end token.

    Cut inside an answer, the answer's own end token takes the last place. Cut elsewhere, or where
    nothing of the answer but its end token would fit, all after the last whole answer goes.
    """
    ids, supervised = list(example.ids), list(example.supervised)
    if supervised[max_length - 1] and supervised[max_length - 2]:
        end = max_length - 1
        while end + 1 < len(ids) and supervised[end + 1]:
            end += 1
        return Example([*ids[: max_length - 1], ids[end]], supervised[:max_length])
    last = max((at for at in range(max_length - 1) if supervised[at]), default=-1)
    return Example(ids[: last + 1], supervised[: last + 1])


def split_rows(table: Table, share: float, seed: int) -> tuple[Table, Table | None]:
    """Cut a share of the rows off for validation, drawn by `seed`; the same rows stay together."""
    groups: dict[str, list[Row]] = {}
    for row in table.rows:
        groups.setdefault(row.key, []).append(row)
    keys = list(groups)
    # Few rows still get a validation of one, as long as one is left to train on.
    count = min(max(1, round(len(keys) * share)), len(keys) - 1) if share else 0
    if not count:
        return table, None
    held = set(random.Random(seed).sample(keys, count))

    def part(chosen: bool) -> Table:
        return replace(table, rows=[row for row in table.rows if (row.key in held) == chosen])

    return part(False), part(True)


def sample(table: Table, max_rows: int | None, seed: int) -> Table:
    """At most `max_rows` rows, drawn by `seed`, in their order."""
    if max_rows is None or max_rows >= len(table.rows):
        return table
    kept = sorted(random.Random(seed).sample(range(len(table.rows)), max_rows))
    return replace(table, rows=[table.rows[at] for at in kept])


def overlap(train: Table, other: Table, name: str) -> str | None:
    """A sentence about rows of `other` that also stand in `train`, or None."""
    known = {row.key for row in train.rows}
    lines = [row.line for row in other.rows if row.key in known]
    if not lines:
        return None
    return (
        f"{name}: {len(lines)} of {len(other.rows)} rows stand in train too, so its figures "
        f"flatter: {_lines(lines)}"
    )


def spans(example: Example, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """The example's text in stretches, each with whether it is supervised: to show to a person."""
    start = 0
    for at in range(1, len(example) + 1):
        if at == len(example) or example.supervised[at] != example.supervised[start]:
            yield tokenizer.decode(example.ids[start:at]), example.supervised[start]
            start = at


# --- reading ---------------------------------------------------------------------------------


def _detect(
    columns: set[str], settings: Dataset, source: str, first: tuple[int, dict[str, Any]]
) -> str:
    if settings.format != "auto":
        return settings.format
    for name, needed in FORMATS.items():
        if set(needed) <= columns:
            return name
    shapes = "; ".join(f"{name} ({', '.join(needed)})" for name, needed in FORMATS.items())
    raise UserError(
        f"{source}:{first[0]}: no known format has the columns "
        f"{', '.join(sorted(map(str, first[1]))) or '(none)'}. "
        f"Known: {shapes}. Map your names with dataset.columns, e.g. "
        f"{{prompt: question, completion: answer}}"
    )


def _lines(lines: Sequence[int]) -> str:
    shown = ", ".join(map(str, lines[:LINES_SHOWN]))
    return f"line{'s' if len(lines) > 1 else ''} {shown}" + (
        ", ..." if len(lines) > LINES_SHOWN else ""
    )


# --- formats: the fields of one row, in the common form; ValueError says what is wrong -----------


def _string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {type(value).__name__} ({value!r:.40})")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    if "\0" in value:
        raise ValueError(f"{name} holds a NUL character (at {value.index(chr(0)) + 1}); remove it")
    if len(value) > TEXT_LIMIT:
        raise ValueError(
            f"{name} has {len(value):,} characters, and at most {TEXT_LIMIT:,} are taken; split it"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, and no tokenizer takes it.
        raise ValueError(
            f"{name} holds half a character ({value[error.start]!r}); write the whole one"
        ) from None
    return value


def _turns(
    value: object, name: str, role_key: str, content_key: str, roles: dict[str, str]
) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a list of turns with {role_key!r} and {content_key!r}")
    messages: list[Message] = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise ValueError(
                f"{name}, turn {number}: must be an object with {role_key!r} and {content_key!r}"
            )
        role = turn.get(role_key)
        if not isinstance(role, str) or role not in roles:
            raise ValueError(
                f"{name}, turn {number}: {role_key} {role!r:.40} is not one of {', '.join(roles)}"
            )
        messages.append(
            {
                "role": roles[role],
                "content": _string(turn.get(content_key), f"turn {number}, {content_key}"),
            }
        )
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{name}: the last turn must be the assistant's, for that is what is learnt"
        )
    return messages


def _from_messages(line: int, fields: dict[str, Any]) -> Row:
    roles = {"system": "system", "user": "user", "assistant": "assistant"}
    return Row(line, _turns(fields["messages"], "messages", "role", "content", roles))


def _from_sharegpt(line: int, fields: dict[str, Any]) -> Row:
    turns = _turns(fields["conversations"], "conversations", "from", "value", SHAREGPT_ROLES)
    return Row(line, [*_system(fields), *turns])


def _system(fields: dict[str, Any]) -> list[Message]:
    """The system prompt that a row carries in a column of its own, if any."""
    if not fields["system"]:
        return []
    return [{"role": "system", "content": _string(fields["system"], "system")}]


def _pair(line: int, prompt: str, answer: str, quality: str | None = None) -> Row:
    messages: list[Message] = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer},
    ]
    return Row(line, messages, quality=quality)


def _from_alpaca(line: int, fields: dict[str, Any]) -> Row:
    parts = [
        _string(fields["instruction"], "instruction"),
        *([fields["input"]] if fields["input"] else []),
    ]
    prompt = "\n\n".join(_string(part, "input") for part in parts)
    row = _pair(line, prompt, _string(fields["output"], "output"))
    return replace(row, messages=[*_system(fields), *row.messages])


def _from_prompt_completion(line: int, fields: dict[str, Any]) -> Row:
    quality = fields["quality"]
    if quality is not None and quality not in ("good", "fair", "poor"):
        raise ValueError(f"quality {quality!r} is not one of good, fair, poor")
    return _pair(
        line,
        _string(fields["prompt"], "prompt"),
        _string(fields["completion"], "completion"),
        quality,
    )


def _from_classification(line: int, fields: dict[str, Any]) -> Row:
    label = fields["label"]
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise ValueError(
            f"label must be text or a whole number, not {type(label).__name__} ({label!r:.40})"
        )
    if not str(label).isprintable():
        raise ValueError(f"label {label!r:.40} holds control characters")
    return Row(line, [], _string(fields["text"], "text"), _string(str(label), "label"))


def _from_text(line: int, fields: dict[str, Any]) -> Row:
    return Row(line, [], _string(fields["text"], "text"))


_CONVERT: dict[str, Callable[[int, dict[str, Any]], Row]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "classification": _from_classification,
    "text": _from_text,
}
