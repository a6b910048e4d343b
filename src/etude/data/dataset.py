"""Files in, examples out, and a report in which every row's fate is told by line number."""

import contextlib
import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from etude.config.schema import Dataset, normal_label
from etude.conversation.renderer import Example, Message, Renderer, RenderError
from etude.data import columns, readers
from etude.data.columns import FORMATS, filled
from etude.errors import UserError

TURN_KEYS = {"messages": ("role", "content"), "sharegpt": ("from", "value")}
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}
TOOL_ROLES = ("tool", "function", "ipython", "observation", "function_call", "function_response")
# Where raw text is about such tokens, few rows hold them; in a formatted file all or most do.
FREQUENT = 0.1
LINES_SHOWN = 10
TEXT_LIMIT = (
    10**6
)  # characters of one text, many times any window; a tokenizer takes seconds for it


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set in the common form.

    Attributes:
        line: its line in the file (its number, from 1, in formats without lines).
        messages: the conversation; empty for raw text.
        text: raw text, or the text to classify.
        label: the class, in classification sets.
        quality: a given judgement of the completion (good, fair, poor), where the data carries one.
        untrained: the answers, by their index in `messages`, that are not trained on (weight 0).
    """

    line: int
    messages: list[Message]
    text: str = ""
    label: str | None = None
    quality: str | None = None
    untrained: frozenset[int] = frozenset()

    @property
    def key(self) -> str:
        """What makes two rows the same row."""
        parts = [self.text, *(m[part] for m in self.messages for part in ("role", "content"))]
        # Contents hold no NUL. A digest: the texts themselves would be held a second time.
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()

    @property
    def answer(self) -> int:
        """The index of the last answer that is trained on; -1 in raw text."""
        turns = range(len(self.messages) - 1, -1, -1)
        answers = (at for at in turns if self.messages[at]["role"] == "assistant")
        return next((at for at in answers if at not in self.untrained), -1)


@dataclass(frozen=True)
class Table:
    """The rows of one source, in order, with what was found out on the way.

    Attributes:
        fingerprint: SHA-256 of the file.
        unused: columns without a use, and in how many rows (or turns) they are filled.
        dropped: rows that are in the source and not in `rows`: the lines by the reason.
        notices: sentences about what was read in another spelling.
        drawn: "50 of 10,000 rows", where `rows` come from a sample.
    """

    source: str
    format: str
    rows: list[Row]
    fingerprint: str
    labels: list[str] | None = None
    unused: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    drawn: str = ""

    def drops(self, split: str) -> list[str]:
        """Sentences about the rows that were dropped in reading."""
        return _fates(split, self.dropped, len(self.rows) + sum(map(len, self.dropped.values())))


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
        found = _fates(self.split, self.dropped, self.rows) + [
            f"{self.split}: {len(lines)} of {self.rows} rows {what}: {_lines(lines)}"
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
                f"control tokens ({_names(self.spelled)}), encoded as plain text: "
                f"{_lines(self.spelling)}"
            )
        if self.spelled_ends:
            found.append(
                f"{self.split}: {len(self.spelled_ends)} of {self.rows} rows have an answer that "
                "ends with a typed end token: the model would learn to write it as text, and show "
                f"it. Remove it from {_lines(self.spelled_ends)}"
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


def _fates(split: str, dropped: Mapping[str, Sequence[int]], rows: int) -> list[str]:
    """Sentences about dropped rows, at most a screen of them."""
    found = [
        f"{split}: {len(lines)} of {rows} rows dropped ({reason}): {_lines(lines)}"
        for reason, lines in dropped.items()
    ]
    more = sum(map(len, list(dropped.values())[LINES_SHOWN:]))
    rest = [f"{split}: ... and {more} more of {rows} rows dropped for other reasons"] * bool(more)
    return found[:LINES_SHOWN] + rest


def read_splits(settings: Dataset, seed: int) -> tuple[dict[str, Table], list[str]]:
    """The training and, if any, validation rows, and notices about what was found in reading them.

    The test set is read only for rows that it shares with the training.

    Raises:
        UserError: data that cannot be used.
    """
    notices: list[str] = []
    # Drawn before the validation is cut off, so that both shrink alike.
    table = sample(read(settings.train, settings), settings.max_rows, seed)
    labelled = settings.model_copy(update={"labels": table.labels})
    others = {
        name: read(source, labelled)
        for name, source in (("validation", settings.validation), ("test", settings.test))
        if source
    }
    for name, other in others.items():
        if other.format != table.format:
            raise UserError(
                f"dataset.{name}: {other.source} has format {other.format}, and {table.source} "
                f"{table.format}; all splits must have one"
            )
        if shared := overlap(table, other, name):
            notices.append(shared)
    validation = others.get("validation")
    if validation:
        tables = {"train": table, "validation": validation}
    else:
        train_part, cut = split_rows(table, settings.validation_split, seed)
        tables = {"train": train_part} | ({"validation": cut} if cut else {})
    if settings.validation_split and "validation" not in tables:
        notices.append("no validation: there are too few different rows to cut one from train")
    for name, each in (("train", table), *others.items()):
        # The dropped rows of the other splits are in their reports.
        drops = each.drops(name) if name == "test" else []
        notices += [
            f"{name}: {notice.removeprefix(f'{name}: ')}" for notice in each.notices + drops
        ]
    # As read: what is cut from train has the columns of all its rows.
    for name, used in (("train", table), ("validation", validation)):
        if used and used.unused:
            unused = ", ".join(
                f"{column or '(no name)'} ({n:,})" for column, n in used.unused.items()
            )
            notices.append(f"{name}: unused columns: {unused}")
    return tables, notices


def read(source: str, settings: Dataset) -> Table:
    """Read a file or a Hub data set and bring every row into the common form.

    Raises:
        UserError: no such source, columns of no known format, or rows that cannot be used (all of
            them, by line), unless `dataset.on_bad_row` is skip and others are left.
    """
    raw, fingerprint = readers.read(source)
    if settings.ignore:
        raw = [(line, columns.without(values, settings.ignore)) for line, values in raw]
    found = columns.assign(source, raw, settings)
    form = found.format
    if settings.overlength == "split" and form != "text":
        raise UserError(
            f"{source}: dataset.overlength: split is for raw text, and the format is {form}; set "
            "truncate or drop"
        )
    _refuse_columns(source, found, raw, all_rows=settings.on_bad_row == "skip")
    rows: list[Row] = []
    faults: list[tuple[int, str]] = []
    dropped: defaultdict[str, list[int]] = defaultdict(list)
    unused: Counter[str] = Counter()
    spelled: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    raw.reverse()
    while raw:  # each is let go of when it was converted
        line, values = raw.pop()
        try:
            for column, why in found.refused.items():
                if filled(values.get(column)):
                    raise ValueError(columns.refusal(column, why))
            fields = {name: values.get(column) for name, column in found.own.items()}
            missing = [
                settings.columns.get(name, name)
                for name in FORMATS[form]
                if fields[name] is None or fields[name] != fields[name]
            ]
            if missing:
                raise ValueError(
                    f"no {' and no '.join(map(repr, missing))}; it has: "
                    f"{', '.join(map(str, values)) or 'nothing'}"
                )
            flags = {name: values.get(column) for column, name in found.flags.items()}
            keep = not flags or columns.trained(flags, columns.ROW_FLAGS)
            row = _CONVERT[form](line, fields)
            if row.label is not None:
                _check_label(row.label, settings.labels)
                if row.label != str(fields["label"]):
                    spelled[str(fields["label"]), row.label].append(line)
        except ValueError as error:
            faults.append((line, str(error)))
            continue
        if not keep or (row.messages and row.answer < 0):
            dropped["weight 0 or train false: no answer to train on"].append(line)
            continue
        rows.append(row)
        unused.update(name for name in found.unused if filled(values.get(name)))
        if form in TURN_KEYS:
            unused.update(_unused_keys(values[found.own[FORMATS[form][0]]], *TURN_KEYS[form]))
    if settings.on_bad_row == "stop" or not rows:
        readers.raise_faults(
            [f"{source}:{line}: {fault}" for line, fault in faults],
            f"the format is {form}; see dataset.format and dataset.columns"
            + ("; dataset.on_bad_row: skip goes on without them" if rows else ""),
        )
    for line, fault in faults:
        dropped[f"skipped: {fault}"].append(line)
    if not rows:
        raise UserError(
            f"{source}: every row says that it is not to be trained on (weight 0 or train false); "
            "give rows to learn from"
        )
    labels: list[str] | None = None
    notices: list[str] = []
    if form == "classification":
        labels, notices = _labels(source, rows, spelled, settings)
    return Table(source, form, rows, fingerprint, labels, dict(unused), dict(dropped), notices)


def instruct(text: str, labels: Sequence[str], settings: Dataset) -> list[Message]:
    """The prompt of a classification: dataset.instruction with labels and text filled in."""
    parts = {"{labels}": ", ".join(labels), "{text}": text}
    # One pass, so that braces in the text stay what they are.
    content = re.sub(r"\{labels\}|\{text\}", lambda match: parts[match[0]], settings.instruction)
    return [{"role": "user", "content": content}]


def check_labels(renderer: Renderer, labels: Sequence[str]) -> None:
    """Raise UserError where the template or the tokenizer makes two labels one."""
    seen: dict[str | tuple[int, ...], str] = {}
    for label in labels:
        messages: list[Message] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": label},
        ]
        forms: list[str | tuple[int, ...]] = []
        # Encoding a row says why the template refuses it.
        with contextlib.suppress(RenderError):
            forms.append(renderer.written(messages))
            forms.append(tuple(renderer.render(messages).ids))
        for form in forms:
            if form in seen:
                raise UserError(
                    f"the labels {seen[form]!r} and {label!r} are one to the model, whose template "
                    "or tokenizer writes them alike, so the first would always win. Rename one in "
                    "the rows, or give another template: model.chat_template: FILE.jinja"
                )
        seen.update(dict.fromkeys(forms, label))


def conversation(row: Row, labels: Sequence[str] | None, settings: Dataset) -> list[Message]:
    """The row as messages with the answer last; for classification the label is the answer."""
    if row.label is None or labels is None:
        return row.messages
    return [*instruct(row.text, labels, settings), {"role": "assistant", "content": row.label}]


def beyond_window(rows: Sequence[tuple[str, int]], window: int, advice: str) -> UserError:
    """What to say of `rows`, by ``file:line`` and tokens, that are too long for a model's window."""
    named = [f"{origin}: {tokens:,} tokens" for origin, tokens in rows[:LINES_SHOWN]]
    more = len(rows) - LINES_SHOWN
    return UserError(
        f"{len(rows):,} row{'s' * (len(rows) > 1)} too long for the model's window of {window:,} "
        "tokens, beyond which it fails or writes noise:\n  "
        + "\n  ".join(named + [f"... and {more:,} more"] * (more > 0))
        + f"\n{advice}"
    )


def room_of_labels(renderer: Renderer, labels: Sequence[str], settings: Dataset, most: int) -> str:
    """A sentence about labels that fill a good part of `most` tokens in every prompt; else empty."""
    if not labels:
        return ""
    with contextlib.suppress(RenderError):
        with_all, with_one = (
            len(renderer.prompt(instruct("?", some, settings))) for some in (labels, labels[:1])
        )
        if with_all - with_one > most / 4:
            return (
                f" The {len(labels):,} labels take {with_all - with_one:,} tokens of every prompt: "
                "name fewer or shorter ones."
            )
    return ""


def encode(
    table: Table, renderer: Renderer, settings: Dataset, split: str, window: int | None = None
) -> tuple[list[Example], Report]:
    """Render every row and bring it under `max_length`.

    Over-length rows are cut inside the last answer that fits, whose end token is kept, or dropped,
    or, as raw text, split into several examples (`dataset.overlength`). Rows that would train
    nothing are dropped and counted.

    Raises:
        UserError: no row is left, rows beyond the model's `window`, or two labels that the model would
            see as one.
    """
    dropped = {reason: list(lines) for reason, lines in table.dropped.items()}
    rows = len(table.rows) + sum(map(len, dropped.values()))
    report = Report(split, table.source, table.format, rows, drawn=table.drawn, dropped=dropped)
    if table.labels:
        check_labels(renderer, table.labels)
    parse = settings.special_tokens == "parse"
    if parse and table.format != "text":
        raise UserError(
            f"dataset.special_tokens: parse is for raw text, and {table.source} has format "
            f"{table.format}, whose control tokens the chat template writes. Set it to text"
        )
    if not parse:
        find_spelled(table, renderer, settings, report)
    report.duplicates, report.contradictions = repeats(table.rows)
    examples: list[Example] = []
    different: set[tuple[str, str]] = set()
    for row in table.rows:
        messages = conversation(row, table.labels, settings)
        try:
            example = (
                renderer.render(messages, row.untrained)
                if messages
                else renderer.text(row.text, parse)
            )
        except RenderError as error:
            report.drop(str(error), row.line)
            continue
        parts = _fitted(example, row.line, settings, renderer.tokenizer.bos_token_id, report)
        if not parts:
            continue
        for number, part in enumerate(parts):
            part.origin, part.part = f"{table.source}:{row.line}", number
            examples.append(part)
            report.tokens += len(part)
            report.supervised += part.targets
            report.longest = max(report.longest, len(part))
        report.kept += 1
        report.examples += len(parts)
        if row.label is not None:
            report.labels[row.label] = report.labels.get(row.label, 0) + 1
            different.add((row.key, row.label))
    numbers = Counter(label for _, label in different)
    report.few = {label: numbers[label] for label in table.labels or [] if numbers[label] < 2}
    if not examples:
        raise UserError(
            f"{table.source}: none of {report.rows} rows is left for {split}:\n  "
            + "\n  ".join(report.notices())
            + room_of_labels(renderer, table.labels or [], settings, settings.max_length)
        )
    beyond = {one.origin: len(one) for one in examples if window and len(one) > window}
    if beyond and window:
        advice = (
            f"Set dataset.max_length: {window} (dataset.overlength says what happens to longer rows), "
            "or take a model with a longer window."
        )
        advice += room_of_labels(renderer, table.labels or [], settings, window)
        raise beyond_window(list(beyond.items()), window, advice)
    return examples, report


def _fitted(
    example: Example, line: int, settings: Dataset, bos: int | None, report: Report
) -> list[Example]:
    """A row's example within `max_length`, or its pieces; none if it is dropped. `report` notes which."""
    most, length, parts = settings.max_length, len(example), [example]
    overlength = settings.overlength or ("split" if report.format == "text" else "truncate")
    if length > most:
        if overlength == "drop":
            report.drop(f"longer than max_length {most}", line)
            report.lost += length
            return []
        if overlength == "split":
            parts = pieces(example, most, bos)
            report.divided.append(line)
        else:
            parts = [truncate(example, most)]
            report.lost += length - len(parts[0]) * bool(parts[0].targets)
            if parts[0].targets:
                report.truncated.append(line)
    if not any(part.targets for part in parts):
        report.drop(f"no supervised token within max_length {most}", line)
        return []
    return parts


def find_spelled(table: Table, renderer: Renderer, settings: Dataset, report: Report) -> None:
    """Note the rows whose text spells control tokens, and answers that end with an end token.

    Raises:
        UserError: many rows of raw text do, and `dataset.special_tokens` is not set.
    """
    names: set[str] = set()
    ends = tuple(renderer.tokenizer.convert_ids_to_tokens(renderer.stop_ids))
    for row in table.rows:
        texts = [row.text, *(message["content"] for message in row.messages)]
        found = set().union(*map(renderer.spelled, texts))
        if not found:
            continue
        names |= found
        report.spelling.append(row.line)
        if any(
            message["role"] == "assistant" and message["content"].rstrip().endswith(ends)
            for message in row.messages
        ):
            report.spelled_ends.append(row.line)
    report.spelled = sorted(names)
    # A small validation cut may hold many of them by chance.
    many = report.split != "validation" and len(report.spelling) >= FREQUENT * len(table.rows)
    if report.spelling and many and table.format == "text" and settings.special_tokens is None:
        raise UserError(
            f"{table.source}: {len(report.spelling)} of {len(table.rows)} rows hold text that spells "
            f"control tokens of the tokenizer ({_names(report.spelled)}): "
            f"{_lines(report.spelling)}. If the file is formatted with them, set "
            "dataset.special_tokens=parse, and they become the tokens; if it is text about them, "
            "dataset.special_tokens=text"
        )


def pieces(example: Example, max_length: int, bos: int | None) -> list[Example]:
    """The whole example in windows of at most `max_length` tokens; each token counts once.

    Each after the first begins, unsupervised, with the token before it, from which its first token
    is predicted; and with the tokenizer's own beginning, where the text has one.
    """
    ids, supervised = example.ids, example.supervised
    head = ids[: ids[0] == bos]
    parts = [Example(ids[:max_length], supervised[:max_length])]
    step = max_length - len(head) - 1
    for start in range(max_length, len(ids), step):
        mask = [False] * (len(head) + 1) + supervised[start : start + step]
        if any(mask):
            parts.append(Example([*head, *ids[start - 1 : start + step]], mask))
    return parts


def truncate(example: Example, max_length: int) -> Example:
    """The first `max_length` tokens, ending with an end token.

    Cut inside an answer, the answer's own end token takes the last place. Cut elsewhere, or where
    nothing of the answer but its end token would fit, all after the last whole answer goes.
    """
    ids, supervised = example.ids, example.supervised
    if supervised[max_length - 1] and supervised[max_length - 2]:
        end = max_length - 1
        while end + 1 < len(ids) and supervised[end + 1]:
            end += 1
        return Example([*ids[: max_length - 1], ids[end]], supervised[:max_length])
    last = max((at for at in range(max_length - 1) if supervised[at]), default=-1)
    return Example(ids[: last + 1], supervised[: last + 1])


def split_rows(table: Table, share: float, seed: int) -> tuple[Table, Table | None]:
    """Cut a share of the rows off for validation, drawn by `seed`; the same rows stay together.

    Every class of a classification gives its share, and keeps a row to train on.
    """
    groups: dict[str, list[Row]] = {}
    for row in table.rows:
        groups.setdefault(row.key, []).append(row)
    keys = list(groups)
    # Few rows still get a validation of one, as long as one is left to train on.
    count = min(max(1, round(len(keys) * share)), len(keys) - 1) if share else 0
    if not count:
        return table, None
    draw = random.Random(seed)
    if table.labels:
        classes = {key: {str(row.label) for row in rows} for key, rows in groups.items()}
        held = _stratified(classes, count, draw)
        if not held:
            return table, None
    else:
        held = set(draw.sample(keys, count))

    def part(chosen: bool) -> Table:
        rows = [row for row in table.rows if (row.key in held) == chosen]
        # What was dropped in reading counts once: with the rows to train on.
        return replace(table, rows=rows, dropped={} if chosen else table.dropped)

    return part(False), part(True)


def _stratified(classes: Mapping[str, set[str]], count: int, draw: random.Random) -> set[str]:
    """At most `count` keys of `classes`, each class's share of them, and never the last of a class."""
    left = Counter(label for labels in classes.values() for label in labels)
    order = draw.sample(list(classes), len(classes))
    # One text can have several labels (a contradiction): it counts in the rarest class.
    home = {key: min(classes[key], key=lambda label: (left[label], label)) for key in order}
    exact = {label: n * count / len(order) for label, n in Counter(home.values()).items()}
    quota = {label: int(n) for label, n in exact.items()}
    by_remainder = sorted(exact, key=lambda label: (quota[label] - exact[label], label))
    for label in by_remainder[: count - sum(quota.values())]:
        quota[label] += 1
    held: set[str] = set()
    # Where a class cannot give its share, any other fills up in the second round.
    for by_quota in (True, False):
        for key in order:
            if key in held or len(held) == count or (by_quota and quota[home[key]] < 1):
                continue
            if all(left[label] > 1 for label in classes[key]):
                held.add(key)
                quota[home[key]] -= 1
                left.subtract(classes[key])
    return held


def sample(table: Table, max_rows: int | None, seed: int) -> Table:
    """At most `max_rows` rows, drawn by `seed`, in their order."""
    if max_rows is None or max_rows >= len(table.rows):
        return table
    kept = sorted(random.Random(seed).sample(range(len(table.rows)), max_rows))
    drawn = f"{max_rows:,} of {len(table.rows):,} rows"
    return replace(table, rows=[table.rows[at] for at in kept], drawn=drawn)


def overlap(train: Table, other: Table, name: str) -> str | None:
    """A sentence about rows of `other` that are in `train` too, or contradict it, or None."""
    known: dict[str, dict[str | None, int]] = {}
    for row in train.rows:
        known.setdefault(row.key, {}).setdefault(row.label, row.line)
    shared = [row for row in other.rows if row.key in known]
    lines = [row.line for row in shared if row.label in known[row.key]]
    contradictions = [
        (row.line, next(iter(known[row.key].values())))
        for row in shared
        if row.label not in known[row.key]
    ]
    rows = len(other.rows)
    found = contradicting(name, rows, contradictions, " train's")
    if lines:
        found.insert(
            0,
            f"{name}: {len(lines)} of {rows} rows are in train too, so its figures flatter: "
            f"{_lines(lines)}",
        )
    return "; ".join(found) or None


def spans(example: Example, tokenizer: Any) -> Iterator[tuple[str, bool, bool]]:
    """The example's text in stretches, each with whether it is supervised, and a control token."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = example.ids
    kinds = [
        (bool(counts), index in special)
        for index, counts in zip(ids, example.supervised, strict=True)
    ]
    start, before = 0, ""
    for at in range(1, len(ids) + 1):
        if at == len(ids) or kinds[at] != kinds[start] or kinds[at][1]:
            # As a continuation: by itself, a stretch of SentencePiece loses the space before it.
            whole = tokenizer.decode(ids[:at], clean_up_tokenization_spaces=False)
            joined = whole.startswith(before)
            yield whole[len(before) :] if joined else tokenizer.decode(ids[start:at]), *kinds[start]
            start, before = at, whole


# --- reading ---------------------------------------------------------------------------------


def _refuse_columns(
    source: str, found: columns.Columns, raw: list[readers.RawRow], all_rows: bool
) -> None:
    """Raise UserError for the columns that are refused; with `all_rows`, those that all rows have."""
    refused = []
    for column, why in found.refused.items():
        lines = [line for line, values in raw if filled(values.get(column))]
        if len(lines) == len(raw) or not all_rows:
            refused.append(
                f"{source}:{lines[0]}: the column {columns.refusal(column, why)} ({len(lines):,} "
                f"of {len(raw):,} rows: {_lines(lines)})"
            )
    if refused:
        raise UserError("\n".join(refused))


def _unused_keys(turns: list[dict[str, Any]], role: str, content: str) -> Iterator[str]:
    """Keys of turns without a use; a weight counts only in the assistant's."""
    for turn in turns:
        if len(turn) > 2:
            answer = turn.get(role) in ("assistant", "gpt")
            used = (role, content, *(columns.TURN_FLAGS if answer else ()))
            for name, value in turn.items():
                if columns.plain(name) not in used and filled(value):
                    said = columns.plain(name) in columns.TURN_FLAGS
                    # To leave out of training what never is trained on, needs no word.
                    if not said or columns.trained({"": value}, [""]):
                        yield f"{name} of a turn" + " that is no answer" * said


def _check_label(label: str, labels: Sequence[str] | None) -> None:
    if labels and label not in labels:
        near = [known for known in labels if known.casefold() == label.casefold()]
        raise ValueError(
            f"label {label!r} is not one of {', '.join(labels)}"
            + (f"; {near[0]!r} differs in case only" if near else "")
            + "; fix the row or dataset.labels"
        )


def _labels(
    source: str,
    rows: Sequence[Row],
    spelled: Mapping[tuple[str, str], Sequence[int]],
    settings: Dataset,
) -> tuple[list[str], list[str]]:
    """The labels, and sentences about those that were joined or differ in case only."""
    counts = Counter(row.label for row in rows if row.label is not None)
    labels = settings.labels or sorted(counts)
    if len(labels) < 2:
        raise UserError(
            f"{source}: only one label ({labels[0]}); a classification needs at least two"
        )
    notices = []
    for (raw, label), lines in spelled.items():
        # Accents that are composed otherwise look the same.
        shown = repr(raw) if raw.split() == label.split() else ascii(raw)
        rows_of_it = f"{len(lines):,} row{'s' * (len(lines) > 1)}, first line {lines[0]}"
        notices.append(f"labels: {shown} read as {label!r} in {rows_of_it}")
    alike = defaultdict(list)
    for label in labels:
        alike[label.casefold()].append(f"{label!r} ({counts[label]:,})")
    notices += [
        f"labels: {' and '.join(same)} differ in case only, and are kept apart"
        for same in alike.values()
        if len(same) > 1
    ]
    more = len(notices) - LINES_SHOWN
    return labels, notices[:LINES_SHOWN] + [f"labels: ... and {more} more such notices"] * (
        more > 0
    )


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:LINES_SHOWN]) + ", ..." * (len(names) > LINES_SHOWN)


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


def _content(value: object, name: str) -> str:
    """The text of a turn; OpenAI writes it as a list of parts too, of which one of text is read."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        if len(value) == 1 and value[0].get("type") == "text":
            return _string(value[0].get("text"), name)
        kinds = ", ".join(str(part.get("type")) for part in value)
        raise ValueError(
            f"{name} has {len(value)} parts ({kinds:.80}), and only text is trained on; write it "
            "as one text"
        )
    return _string(value, name)


def _turns(
    value: object,
    name: str,
    role_key: str,
    content_key: str,
    roles: dict[str, str],
    system: object = None,
) -> tuple[list[Message], frozenset[int]]:
    """The messages, after the system prompt of the row's own column, and those not trained on."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a list of turns with {role_key!r} and {content_key!r}")
    messages = _system(system)
    untrained = set()
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise ValueError(
                f"{name}, turn {number}: must be an object with {role_key!r} and {content_key!r}"
            )
        role = turn.get(role_key)
        other = "conversations" if "from" in turn else "messages"
        if role_key not in turn and ("from" in turn or "role" in turn):
            raise ValueError(
                f"{name}, turn {number}: no {role_key!r}, it has {', '.join(turn)}; such turns are "
                f"read with dataset.columns: {{{other}: {name}}}"
            )
        if not isinstance(role, str) or role not in roles:
            raise ValueError(
                f"{name}, turn {number}: {role_key} {role!r:.40} is not one of {', '.join(roles)}"
                + "; calls of tools are not trained on yet" * (role in TOOL_ROLES)
            )
        # Keys beside the two come first: an answer of tool calls alone has no content.
        counts = len(turn) == 2 or _trained_turn(turn, f"{name}, turn {number}: ")
        content = turn.get(content_key)
        if roles[role] == "system" and not filled(content):
            continue  # as good as none
        if roles[role] == "assistant" and not counts:
            untrained.add(len(messages))
        if roles[role] == "system" and messages and messages[0]["role"] == "system":
            raise ValueError(
                f"{name}, turn {number}: a second system prompt, beside "
                f"{'the column system' if filled(system) else 'an earlier turn'}; keep one"
            )
        messages.append(
            {"role": roles[role], "content": _content(content, f"turn {number}, {content_key}")}
        )
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{name}: the last turn must be the assistant's, for that is what is learnt"
        )
    return messages, frozenset(untrained)


def _trained_turn(turn: dict[str, Any], where: str) -> bool:
    """Whether a turn with more than its two keys is trained on."""
    for key, value in turn.items():
        why = columns.why_refused(key)
        if why and filled(value):
            raise ValueError(f"{where}{columns.refusal(key, why)}")
    flags = {columns.plain(key): value for key, value in turn.items()}
    return columns.trained(flags, columns.TURN_FLAGS, where)


def _from_messages(line: int, fields: dict[str, Any]) -> Row:
    roles = {"system": "system", "user": "user", "assistant": "assistant"}
    messages, untrained = _turns(
        fields["messages"], "messages", "role", "content", roles, fields.get("system")
    )
    return Row(line, messages, untrained=untrained)


def _from_sharegpt(line: int, fields: dict[str, Any]) -> Row:
    messages, untrained = _turns(
        fields["conversations"],
        "conversations",
        "from",
        "value",
        SHAREGPT_ROLES,
        fields.get("system"),
    )
    return Row(line, messages, untrained=untrained)


def _system(value: object) -> list[Message]:
    """The system prompt that a row carries in a column of its own, if any."""
    return [{"role": "system", "content": _string(value, "system")}] if filled(value) else []


def _pair(line: int, prompt: str, answer: str, quality: str | None = None) -> Row:
    messages: list[Message] = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer},
    ]
    return Row(line, messages, quality=quality)


def _from_alpaca(line: int, fields: dict[str, Any]) -> Row:
    prompt = _string(fields["instruction"], "instruction")
    if filled(fields.get("input")):
        prompt += "\n\n" + _string(fields["input"], "input")
    row = _pair(line, prompt, _string(fields["output"], "output"))
    return replace(row, messages=[*_system(fields.get("system")), *row.messages])


def _from_prompt_completion(line: int, fields: dict[str, Any]) -> Row:
    quality = fields.get("quality") if filled(fields.get("quality")) else None
    if quality is not None and quality not in ("good", "fair", "poor"):
        raise ValueError(f"quality {quality!r} is not one of good, fair, poor")
    row = _pair(
        line,
        _string(fields["prompt"], "prompt"),
        _string(fields["completion"], "completion"),
        quality,
    )
    return replace(row, messages=[*_system(fields.get("system")), *row.messages])


def _from_classification(line: int, fields: dict[str, Any]) -> Row:
    label = fields["label"]
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # pandas writes whole numbers so, where one of them is missing
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise ValueError(
            f"label must be text or a whole number, not {type(label).__name__} ({label!r:.40})"
        )
    label = normal_label(str(label))
    if not label.isprintable():
        raise ValueError(f"label {label!r:.40} holds control characters")
    return Row(line, [], _string(fields["text"], "text"), _string(label, "label"))


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
