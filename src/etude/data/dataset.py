"""Rows to examples: reading, splits, encoding, length."""

import contextlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from etude.config.schema import Dataset
from etude.conversation.renderer import Example, Message, Renderer, RenderError
from etude.data import formats, readers
from etude.data.formats import FORMATS, Row, filled
from etude.data.report import (
    LINES_SHOWN,
    Report,
    contradicting,
    dropped_rows,
    lines_of,
    listed,
    repeats,
)
from etude.errors import UserError

# Where raw text is about such tokens, few rows hold them; in a formatted file all or most do.
FREQUENT = 0.1


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
        return dropped_rows(
            split, self.dropped, len(self.rows) + sum(map(len, self.dropped.values()))
        )


@dataclass(frozen=True)
class Split:
    """One split as it is trained or measured on: its rows, their examples, and every row's fate."""

    table: Table
    examples: list[Example]
    report: Report


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
        raw = [(line, formats.without(values, settings.ignore)) for line, values in raw]
    found = formats.assign(source, raw, settings)
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
    while raw:  # each is freed when it was converted
        line, values = raw.pop()
        try:
            row, keep = _row(line, values, found, settings)
        except ValueError as error:
            faults.append((line, str(error)))
            continue
        if row.label is not None and row.label != str(values[found.own["label"]]):
            spelled[str(values[found.own["label"]]), row.label].append(line)
        if not keep or (row.messages and row.answer < 0):
            dropped["weight 0 or train false: no answer to train on"].append(line)
            continue
        rows.append(row)
        unused.update(name for name in found.unused if filled(values.get(name)))
        if form in formats.TURN_KEYS:
            unused.update(
                formats.unused_keys(values[found.own[FORMATS[form][0]]], *formats.TURN_KEYS[form])
            )
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


def _row(
    line: int, values: dict[str, Any], found: formats.Columns, settings: Dataset
) -> tuple[Row, bool]:
    """One row in the common form, and whether it is trained on; ValueError says what is wrong with it."""
    for column, why in found.refused.items():
        if filled(values.get(column)):
            raise ValueError(formats.refusal(column, why))
    fields = {name: values.get(column) for name, column in found.own.items()}
    missing = [
        settings.columns.get(name, name)
        for name in FORMATS[found.format]
        if fields[name] is None or fields[name] != fields[name]
    ]
    if missing:
        raise ValueError(
            f"no {' and no '.join(map(repr, missing))}; it has: "
            f"{', '.join(map(str, values)) or 'nothing'}"
        )
    flags = {name: values.get(column) for column, name in found.flags.items()}
    keep = not flags or formats.trained(flags, formats.ROW_FLAGS)
    row = formats.CONVERT[found.format](line, fields)
    if row.label is not None:
        _check_label(row.label, settings.labels)
    return row, keep


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
) -> Split:
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
    _check_examples(examples, report, table, renderer, settings, window)
    return Split(table, examples, report)


def _check_examples(
    examples: Sequence[Example],
    report: Report,
    table: Table,
    renderer: Renderer,
    settings: Dataset,
    window: int | None,
) -> None:
    """Raise UserError where no row is left, or where rows are longer than the model's window."""
    labels = table.labels or []
    if not examples:
        raise UserError(
            f"{table.source}: none of {report.rows} rows is left for {report.split}:\n  "
            + "\n  ".join(report.notices())
            + room_of_labels(renderer, labels, settings, settings.max_length)
        )
    beyond = {one.origin: len(one) for one in examples if window and len(one) > window}
    if beyond and window:
        advice = (
            f"Set dataset.max_length: {window} (dataset.overlength says what happens to longer rows), "
            "or take a model with a longer window."
        )
        advice += room_of_labels(renderer, labels, settings, window)
        raise beyond_window(list(beyond.items()), window, advice)


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
            f"control tokens of the tokenizer ({listed(report.spelled)}): "
            f"{lines_of(report.spelling)}. If the file is formatted with them, set "
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


def encode_splits(
    tables: Mapping[str, Table], renderer: Renderer, settings: Dataset, window: int | None = None
) -> dict[str, Split]:
    """Every table as `encode` makes it a split, by its name."""
    return {name: encode(table, renderer, settings, name, window) for name, table in tables.items()}


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
            f"{lines_of(lines)}",
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


def _refuse_columns(
    source: str, found: formats.Columns, raw: list[readers.RawRow], all_rows: bool
) -> None:
    """Raise UserError for the columns that are refused; with `all_rows`, those that all rows have."""
    refused = []
    for column, why in found.refused.items():
        lines = [line for line, values in raw if filled(values.get(column))]
        if len(lines) == len(raw) or not all_rows:
            refused.append(
                f"{source}:{lines[0]}: the column {formats.refusal(column, why)} ({len(lines):,} "
                f"of {len(raw):,} rows: {lines_of(lines)})"
            )
    if refused:
        raise UserError("\n".join(refused))


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
