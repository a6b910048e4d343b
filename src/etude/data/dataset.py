"""Rows to examples: reading, splits, encoding, length."""

import contextlib
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from etude.config.schema import Dataset
from etude.conversation.encoding import Example, RenderError
from etude.conversation.messages import Message, separate_reasoning, strings
from etude.conversation.renderer import Renderer
from etude.data import formats, readers, report
from etude.data.formats import FORMATS, Row, filled
from etude.data.report import Report, lines_of, listed
from etude.errors import UserError

# Where raw text is about such tokens, few rows hold them; in a formatted file all or most do.
FREQUENT = 0.1
MANY = 50  # labels, each about four tokens of every prompt
UNTRAINED = "weight 0 or train false: no answer to train on"


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

    @property
    def rows_read(self) -> int:
        """How many rows the source has, the dropped ones too."""
        return len(self.rows) + sum(map(len, self.dropped.values()))

    def drops(self, split: str) -> list[str]:
        """Sentences about the rows that were dropped in reading."""
        return report.drops(split, self.dropped, self.rows_read)


@dataclass(frozen=True)
class Split:
    """One split as it is trained or measured on: its rows, their examples, and every row's fate."""

    table: Table
    examples: list[Example]
    report: Report


# --- rows ----------------------------------------------------------------------------------------


def read(source: str, settings: Dataset) -> Table:
    """Read a file or a Hub data set and bring every row into the common form.

    Raises:
        UserError: no such source, columns of no known format, or rows that cannot be used (all of
            them, by line), unless `dataset.on_bad_row` is skip and others are left.
    """
    raw, unreadable, fingerprint = readers.read(source)
    faults: defaultdict[str, list[int]] = defaultdict(list)
    for line, fault in unreadable:
        faults[fault].append(line)
    stop = settings.on_bad_row == "stop"
    skip = "dataset.on_bad_row: skip goes on without them"
    if faults and (stop or not raw):
        raise report.unusable(source, faults, skip if raw else "no other row is left")
    columns = formats.assign(source, raw, settings)
    form = columns.format
    if settings.overlength == "split" and form != "text":
        raise UserError(
            f"{source}: dataset.overlength: split is for raw text, and the format is {form}; set "
            "truncate or drop"
        )
    rows: list[Row] = []
    untrained: list[int] = []
    unused: Counter[str] = Counter()
    joined: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    raw.reverse()
    while raw:  # each is freed when it was converted
        line, values = raw.pop()
        without_use = [name for name in columns.unused if filled(values.get(name))]
        try:
            row = _row(line, values, columns, settings, without_use)
        except ValueError as error:
            faults[str(error)].append(line)
            continue
        if row is None:
            untrained.append(line)
            continue
        rows.append(row)
        unused.update(without_use)
        if row.label is not None:
            given = str(values[columns.fields["label"]])
            if given != row.label:
                joined[given, row.label].append(line)
    if faults and (stop or not rows):
        advice = f"the format is {form}; see dataset.format and dataset.columns"
        raise report.unusable(source, faults, advice + f"; {skip}" * bool(rows))
    dropped = {UNTRAINED: untrained} if untrained else {}
    dropped |= {f"skipped: {fault}": lines for fault, lines in faults.items()}
    if not rows:
        raise UserError(
            f"{source}: every row says that it is not to be trained on (weight 0 or train false); "
            "give rows to learn from"
        )
    labels, notices = None, list[str]()
    if form == "classification":
        labels, notices = _labels(source, rows, joined, settings)
    return Table(source, form, rows, fingerprint, labels, dict(unused), dropped, notices)


def _row(
    line: int,
    values: dict[str, Any],
    columns: formats.Columns,
    settings: Dataset,
    unused: list[str],
) -> Row | None:
    """The row in the common form; None for one that says that it is not trained on.

    Raises:
        ValueError: what is wrong with it.
    """
    refused = [
        formats.refusal(name, why)
        for name, why in columns.refused.items()
        if filled(values.get(name))
    ]
    if refused:
        raise ValueError("; ".join(refused))
    fields = {name: values.get(column) for name, column in columns.fields.items()}
    missing = [
        settings.columns.get(name, name)
        for name in FORMATS[columns.format]
        if fields[name] is None or fields[name] != fields[name]
    ]
    if missing:
        raise ValueError(
            f"no {' and no '.join(map(repr, missing))}; it has: "
            f"{', '.join(map(str, values)) or 'nothing'}"
        )
    trained = formats.trained({name: fields.get(name) for name in formats.ROW_FLAGS})
    row = formats.row_of(columns.format, line, fields, columns.ignored, unused)
    if row.label is not None and settings.labels and row.label not in settings.labels:
        near = [known for known in settings.labels if known.casefold() == row.label.casefold()]
        raise ValueError(
            f"label {row.label!r} is not one of {', '.join(settings.labels)}"
            + (f"; {near[0]!r} differs in case only" if near else "")
            + "; fix the row or dataset.labels"
        )
    return row if trained and (row.answer >= 0 or not row.messages) else None


def _labels(
    source: str,
    rows: Sequence[Row],
    joined: Mapping[tuple[str, str], Sequence[int]],
    settings: Dataset,
) -> tuple[list[str], list[str]]:
    """The labels, and sentences about those that were joined or differ in case only."""
    counts = Counter(str(row.label) for row in rows)
    labels = settings.labels or sorted(counts)
    if len(labels) < 2:
        raise UserError(
            f"{source}: only one label ({labels[0]}); a classification needs at least two"
        )
    notices = [
        # Accents that are composed otherwise look the same.
        f"labels: {given!a} read as {label!r}: {lines_of(lines)}"
        for (given, label), lines in joined.items()
    ]
    alike = defaultdict(list)
    for label in labels:
        alike[label.casefold()].append(f"{label!r} ({counts[label]:,})")
    notices += [
        f"labels: {' and '.join(same)} differ in case only, and are kept apart"
        for same in alike.values()
        if len(same) > 1
    ]
    more = len(notices) - report.SHOWN
    rest = [f"labels: ... and {more} more such notices"]
    return labels, notices[: report.SHOWN] + rest * (more > 0)


# --- examples ------------------------------------------------------------------------------------


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


def check_labels(renderer: Renderer, labels: Sequence[str]) -> int:
    """How many tokens the longest label takes with its end; UserError where two become one."""
    seen: dict[tuple[int, ...], str] = {}
    for label in labels:
        with contextlib.suppress(RenderError):  # encoding a row says why the template refuses it
            pair: list[Message] = [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": label},
            ]
            answer = renderer.answer(pair)
            other = seen.setdefault(tuple(answer.ids[-answer.targets :]), label)
            if other != label:
                raise UserError(
                    f"the labels {other!r} and {label!r} are one to the model, whose template or "
                    "tokenizer writes them alike, so the first would always win. Rename one in the "
                    "rows, or give another template: model.chat_template: FILE.jinja"
                )
    return max(map(len, seen), default=0)


def question(
    renderer: Renderer, text: str, labels: Sequence[str], settings: Dataset, room: int
) -> tuple[list[Message], bool]:
    """The prompt of a classification, and whether its text was cut to leave `room` in max_length.

    The end of the text goes, so that the instruction and the labels stay. In training, evaluation
    and a single text the same.
    """
    whole = instruct(text, labels, settings)
    limit = settings.max_length - room

    def too_long(kept: int) -> bool:
        return len(renderer.prompt(instruct(text[:kept], labels, settings))) > limit

    if settings.overlength not in (None, "truncate") or not too_long(len(text)):
        return whole, False
    kept = bisect_left(range(len(text)), True, key=too_long) - 1
    while kept > 0 and too_long(kept):  # a character more can be a token less
        kept -= 1
    # Not even one character fits: the row is too long as it is.
    return (instruct(text[:kept], labels, settings), True) if kept > 0 else (whole, False)


def beyond_window(rows: Sequence[tuple[str, int]], window: int, advice: str) -> UserError:
    """What to say of `rows`, by ``file:line`` and tokens, that are too long for a model's window."""
    named = [f"{origin}: {tokens:,} tokens" for origin, tokens in rows[: report.SHOWN]]
    more = len(rows) - report.SHOWN
    return UserError(
        f"{len(rows):,} row{'s' * (len(rows) > 1)} too long for the model's window of {window:,} "
        "tokens, beyond which it fails or writes noise:\n  "
        + "\n  ".join(named + [f"... and {more:,} more"] * (more > 0))
        + f"\n{advice}"
    )


def many_labels(labels: Sequence[str] | None) -> str:
    """A sentence about labels that take much room in every prompt; else empty."""
    if not labels or len(labels) <= MANY:
        return ""
    return f" Every prompt names all {len(labels):,} labels: name fewer or shorter ones."


def encode_splits(
    tables: Mapping[str, Table], renderer: Renderer, settings: Dataset, window: int | None = None
) -> dict[str, Split]:
    """Every table as `encode` makes it a split, by its name."""
    return {name: encode(table, renderer, settings, name, window) for name, table in tables.items()}


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
    fates = Report(split, table.source, table.format, table.rows_read, table.drawn)
    fates.dropped = {reason: list(lines) for reason, lines in table.dropped.items()}
    room = check_labels(renderer, table.labels) if table.labels else 0
    parse = settings.special_tokens == "parse"
    if parse and table.format != "text":
        raise UserError(
            f"dataset.special_tokens: parse is for raw text, and {table.source} has format "
            f"{table.format}, whose control tokens the chat template writes. Set it to text"
        )
    if not parse:
        _note_spelled(table, renderer, settings, fates)
    duplicates, fates.contradictions = report.repeats(table.rows)
    fates.note(report.DUPLICATE, duplicates)
    examples: list[Example] = []
    different: set[tuple[str, str]] = set()
    for row in table.rows:
        try:
            if table.labels:
                whole = [_classified(row, table.labels, renderer, settings, room, fates)]
            elif row.messages:
                whole = renderer.render(row.messages, _untrained(row, settings))
            else:
                whole = [renderer.encoder.raw(row.text, parse)]
        except RenderError as error:
            fates.drop(str(error), row.line)
            continue
        parts = _fitted(whole, row.line, settings, renderer.tokenizer.bos_token_id, fates)
        for number, part in enumerate(parts):
            part.origin, part.part = f"{table.source}:{row.line}", number
            part.joined = number > 0 and bool(row.messages)
            fates.tokens += len(part)
            fates.supervised += part.targets
            fates.longest = max(fates.longest, len(part))
        examples += parts
        fates.kept += bool(parts)
        fates.note(report.REWRITTEN, [row.line] * (bool(row.messages) and len(parts) > 1))
        if row.label is not None and parts:
            fates.labels[row.label] = fates.labels.get(row.label, 0) + 1
            different.add((row.key, row.label))
    fates.examples = len(examples)
    numbers = Counter(label for _, label in different)
    fates.few = {label: numbers[label] for label in table.labels or [] if numbers[label] < 2}
    _note_conversations(table, renderer, fates)
    _check_examples(examples, fates, table, window)
    return Split(table, examples, fates)


def _untrained(row: Row, settings: Dataset) -> Collection[int]:
    """The answers of a row that are not trained on, by their index."""
    if settings.train_on == "all":
        return row.untrained
    return {at for at in range(len(row.messages)) if at != row.answer}


def _classified(
    row: Row,
    labels: Sequence[str],
    renderer: Renderer,
    settings: Dataset,
    room: int,
    fates: Report,
) -> Example:
    """A row of a classification as an example, its text cut where it is too long."""
    whole = renderer.answer(conversation(row, labels, settings))
    if len(whole) - whole.targets <= settings.max_length - room:
        return whole
    prompt, cut = question(renderer, row.text, labels, settings, room)
    if not cut:
        return whole
    shorter = renderer.answer([*prompt, {"role": "assistant", "content": str(row.label)}])
    fates.lost += len(whole) - len(shorter)
    fates.note(report.CUT, [row.line])
    return shorter


def _note_conversations(table: Table, renderer: Renderer, fates: Report) -> None:
    """Note what the template made of the conversations."""
    rows = table.rows
    fates.note(report.UNANSWERED, [row.line for row in rows if row.unanswered])
    for part, about in report.JOINED.items():
        if part in renderer.lacks:
            lines = [row.line for row in rows if any(_has(one, part) for one in row.messages)]
            fates.note(about, lines)
    bare = [
        row.line
        for row in rows
        if row.label
        or any(m["role"] == "assistant" and not _has(m, "reasoning") for m in row.messages)
    ]
    if renderer.writes_empty_thoughts:
        fates.note(report.EMPTY_THOUGHTS, bare)
    if renderer.thinking is False:
        fates.note(
            report.THOUGHTLESS,
            [row.line for row in rows if any(_has(m, "reasoning") for m in row.messages)],
        )


def _has(message: Message, part: str) -> bool:
    """Whether a message has a part that a template may lack."""
    if part == "system":
        return message["role"] == "system"
    if part == "tools":
        return "tool_calls" in message or "tools" in message
    return "reasoning_content" in separate_reasoning(message)


def _check_examples(
    examples: Sequence[Example], fates: Report, table: Table, window: int | None
) -> None:
    """Raise UserError where no row is left, or where rows are longer than the model's window."""
    if not examples:
        raise UserError(
            f"{table.source}: none of {fates.rows} rows is left for {fates.split}:\n  "
            + "\n  ".join(fates.notices())
            + many_labels(table.labels)
        )
    beyond = {one.origin: len(one) for one in examples if window and len(one) > window}
    if beyond and window:
        raise beyond_window(
            list(beyond.items()),
            window,
            f"Set dataset.max_length: {window} (dataset.overlength says what happens to longer "
            "rows), or take a model with a longer window." + many_labels(table.labels),
        )


def _note_spelled(table: Table, renderer: Renderer, settings: Dataset, fates: Report) -> None:
    """Note the rows whose text spells control tokens, and answers that end with an end token.

    Raises:
        UserError: many rows of raw text do, and `dataset.special_tokens` is not set.
    """
    spelled: dict[int, set[str]] = {}
    typed_ends = []
    ends = tuple(renderer.tokenizer.convert_ids_to_tokens(renderer.stop_ids))
    for at, row in enumerate(table.rows):
        texts = [row.text, *strings(row.messages)]
        found = set().union(*map(renderer.encoder.spelled, texts))
        if found:
            spelled[at] = found
            answers = [m["content"] for m in row.messages if m["role"] == "assistant"]
            if any(answer.rstrip().endswith(ends) for answer in answers):
                typed_ends.append(row.line)
    names = listed(sorted(set().union(*spelled.values())))
    lines = [table.rows[at].line for at in spelled]
    # A small validation cut may hold many of them by chance.
    many = fates.split != "validation" and len(lines) >= FREQUENT * len(table.rows)
    if lines and many and table.format == "text" and settings.special_tokens is None:
        raise UserError(
            f"{table.source}: {len(lines)} of {len(table.rows)} rows hold text that spells control "
            f"tokens of the tokenizer ({names}): {lines_of(lines)}. If the file is formatted with "
            "them, set dataset.special_tokens=parse, and they become the tokens; if it is text "
            "about them, dataset.special_tokens=text"
        )
    fates.note(f"with text that spells control tokens ({names}), encoded as plain text", lines)
    fates.note(report.TYPED_END, typed_ends)


def _fitted(
    wholes: Sequence[Example], line: int, settings: Dataset, bos: int | None, fates: Report
) -> list[Example]:
    """A row's examples within `max_length`, or their pieces; `fates` notes what became of the row."""
    most = settings.max_length
    overlength = settings.overlength or ("split" if fates.format == "text" else "truncate")
    parts: list[Example] = []
    for whole in wholes:
        if len(whole) <= most:
            own = [whole]
        elif overlength == "split":
            own = pieces(whole, most, bos)
        else:
            own = [truncate(whole, most)] if overlength == "truncate" else []
            fates.lost += len(whole) - sum(len(part) for part in own if part.targets)
        parts += [part for part in own if part.targets]
    long = any(len(whole) > most for whole in wholes)
    if not parts:
        reason = "longer than" if long and overlength == "drop" else "no supervised token within"
        fates.drop(f"{reason} max_length {most}", line)
    elif long:
        what = {"split": report.DIVIDED, "truncate": report.TRUNCATED, "drop": report.PARTLY}
        fates.note(what[overlength], [line])
    return parts


def pieces(whole: Example, max_length: int, bos: int | None) -> list[Example]:
    """The whole example in windows of at most `max_length` tokens; each token counts once.

    Each after the first begins, unsupervised, with the token before it, from which its first token
    is predicted; and with the tokenizer's own beginning, where the text has one.
    """
    ids, supervised = whole.ids, whole.supervised
    head = ids[: ids[0] == bos]
    parts = [Example(ids[:max_length], supervised[:max_length])]
    step = max_length - len(head) - 1
    for start in range(max_length, len(ids), step):
        mask = [False] * (len(head) + 1) + supervised[start : start + step]
        if any(mask):
            parts.append(Example([*head, *ids[start - 1 : start + step]], mask))
    return parts


def truncate(whole: Example, max_length: int) -> Example:
    """The first `max_length` tokens, ending with an end token.

    Cut inside an answer, the answer's own end token takes the last place. Cut elsewhere, or where
    nothing of the answer but its end token would fit, all after the last whole answer goes.
    """
    ids, supervised = whole.ids, whole.supervised
    if supervised[max_length - 1] and supervised[max_length - 2]:
        end = max_length - 1
        while end + 1 < len(ids) and supervised[end + 1]:
            end += 1
        return Example([*ids[: max_length - 1], ids[end]], supervised[:max_length])
    last = max((at for at in range(max_length - 1) if supervised[at]), default=-1)
    return Example(ids[: last + 1], supervised[: last + 1])


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
