"""Rows out of files and Hub data sets, unchanged, each with its line."""

import csv
import hashlib
import io
import itertools
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from etude.errors import UserError, first_line, nearest, shortage
from etude.files import expanded, read_bytes

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".tsv")
# What to do with kinds of files that are not read.
ADVICE = {
    "unpack it first": (".gz", ".bz2", ".xz", ".zst", ".zip"),
    "save the sheet as CSV UTF-8": (".xlsx", ".xls", ".ods"),
    "rename it to .jsonl": (".ndjson", ".jsonlines"),
    'write each text as a line {"text": "..."} of a .jsonl file': (".txt", ".md"),
}
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
LIMIT = 2**31  # bytes of a file: Python needs several times that

# A row of the source: its line (or number, where there are no lines) and its fields; in place of
# them, why it cannot be read.
RawRow = tuple[int, dict[str, Any]]
Fault = tuple[int, str]
Found = tuple[int, dict[str, Any] | str]


def read(source: str) -> tuple[list[RawRow], list[Fault], str]:
    """The rows of a file or a Hub data set, those that cannot be read, and a fingerprint.

    The fingerprint is the SHA-256 of a file's bytes.

    Raises:
        UserError: no such source, no rows in it, or a file that cannot be read.
    """
    path = expanded(source)
    rows: list[RawRow] = []
    faults: list[Fault] = []
    if path.suffix.lower() in SUFFIXES or path.exists():
        found, fingerprint = _read_file(path, source)
    else:
        found, fingerprint = _read_hub(source)
    for line, values in found:
        if isinstance(values, str):
            faults.append((line, values))
        else:
            rows.append((line, values))
    if not rows and not faults:
        raise UserError(f"{source}: no rows in it; a data set needs at least one row for training")
    return rows, faults, fingerprint


def _read_file(path: Path, source: str) -> tuple[Iterable[Found], str]:
    if not os.path.lexists(path):
        there = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        near = nearest(path.name, there)
        raise UserError(
            f"{source}: no such file (looked in {path.parent.absolute()}); "
            + (
                f"did you mean {path.parent / near}?"
                if near
                else "paths are relative to where you run etude"
            )
        )
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        advice = [what for what, kinds in ADVICE.items() if kind in kinds]
        raise UserError(
            f"{source}: unknown kind of file; known: {', '.join(SUFFIXES)}"
            + "".join(f"; {what}" for what in advice)
        )
    try:
        data = read_bytes(path, LIMIT)
    except OSError as error:
        raise UserError(
            f"{source}: cannot be read: {error.strerror}; a file of rows is expected"
        ) from None
    fingerprint = hashlib.sha256(data).hexdigest()
    if kind == ".parquet":
        return _parquet(data, source), fingerprint
    lines = _decoded(data, source)
    if kind in (".csv", ".tsv"):
        return _csv(lines, source, kind), fingerprint
    # A list in a .jsonl file is read too, and objects one after another in a .json file.
    if kind == ".json" or re.match(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{", data):
        return _json("".join(lines), source), fingerprint
    return _jsonl(lines), fingerprint


def _decoded(data: bytes, source: str) -> Iterator[str]:
    """The lines of a UTF-8 file, one after another: no more than the rows is held as text."""
    likely = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}.get(data[:2])
    if data[:2].count(0) == 1:  # without a mark, by its first letter
        likely = "UTF-16BE" if data[0] == 0 else "UTF-16LE"
    for number, line in enumerate(io.BytesIO(data), 1):
        start = 0
        try:
            if likely is None:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                continue
        except UnicodeDecodeError as error:
            start = error.start
        encoding = likely or "WINDOWS-1252"
        raise UserError(
            f"{source}:{number}: not UTF-8 text (byte {line[start]:#04x}); save the file as UTF-8, "
            f"e.g. from {encoding}: iconv -f {encoding} -t UTF-8 {shlex.quote(source)} > "
            f"NEW{Path(source).suffix}"
        )


def _jsonl(lines: Iterable[str]) -> Iterator[Found]:
    """One JSON object a line."""
    # They end at \n alone: U+2028 and the like may be inside a JSON string.
    for line, content in enumerate(lines, 1):
        if content.strip():
            try:
                # The parser counts a line end as the next line.
                value = json.loads(content.rstrip(), object_pairs_hook=_once)
            except (ValueError, RecursionError) as error:
                yield line, f"{_json_fault(error)}; a line is one JSON object, {{...}}"
            else:
                yield line, _object(value)


def _json(text: str, source: str) -> list[Found]:
    """One list of objects, or objects one after another."""
    listed = text.lstrip().startswith("[")
    decoder = json.JSONDecoder(object_pairs_hook=_once)
    gap = re.compile(r"[ \t\n\r,]*" if listed else r"[ \t\n\r]*")
    found: list[Found] = []
    position, counted, line = text.find("[") + 1 if listed else 0, 0, 1
    try:
        if listed:
            json.loads(text)  # so that between its objects are commas and white space alone
        while True:
            position = gap.match(text, position).end()  # type: ignore[union-attr]
            if text[position : position + 1] in ("", "]"):
                break
            line += text.count("\n", counted, position)
            counted = position
            value, position = decoder.raw_decode(text, position)
            found.append((line, _object(value)))
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else line
        raise UserError(
            f"{source}:{line}: {_json_fault(error)}; a .json file is one list of objects"
        ) from None
    if len(found) == 1 and not listed and isinstance(found[0][1], dict):
        lists = [name for name, held in found[0][1].items() if _is_table(name, held)]
        raise UserError(
            f"{source}:{line}: a .json file is one list of objects, [{{...}}, ...], and this is one "
            "object; "
            + (
                f"save its list {lists[0]!r} alone"
                if lists
                else "write [ and ] around it, or, one object a line, name the file .jsonl"
            )
        )
    return found


def _is_table(name: str, value: object) -> bool:
    """Whether a field holds rows, not turns."""
    turns = name in ("messages", "conversations")
    return not turns and isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _csv(content: Iterable[str], source: str, kind: str) -> Iterator[Found]:
    # Lines end at \n, \r\n or \r; splitlines() would cut fields at U+2028 and form feeds too.
    lines = (
        piece
        for line in content
        for piece in (io.StringIO(line, newline="") if "\r" in line else (line,))
    )
    line, first = next(((n, text) for n, text in enumerate(lines, 1) if text.strip()), (1, ""))
    named = re.fullmatch(r'"?sep=([^\w\s"]|\t)"?\s*', first)  # Excel's first line
    if named:
        first, line = next(lines, ""), line + 1
    comma = named[1] if named else _separator(first, kind)
    advice = (
        f"fields are separated by {SEPARATORS.get(comma, repr(comma))}; quote fields that hold them "
        "or line breaks, or name another separator in a first line, e.g. sep=;"
    )
    names: list[str] = []
    before = line - 1
    csv.field_size_limit(LIMIT)
    reader = csv.reader(itertools.chain([first], lines), strict=True, delimiter=comma)
    try:
        for values in reader:
            if not names:
                names = values
                if doubled := [name for name, times in Counter(names).items() if times > 1]:
                    raise UserError(
                        f"{source}:{line}: the header has a duplicate column {doubled[0]!r}; "
                        "rename one"
                    )
            elif values and len(values) != len(names):
                fields = ", ".join(names)
                yield line, f"not as many fields as the header has ({fields}); {advice}"
            elif values:
                yield line, dict(zip(names, values, strict=True))
            line = before + reader.line_num + 1
    except csv.Error as error:
        yield line, f"not valid CSV: {error}; {advice}"


def _separator(header: str, kind: str) -> str:
    """What separates the fields: a tab in .tsv; elsewhere a comma, unless the header has none.

    Only the header decides, and only outside its quotes: fields of text may hold any of them.
    """
    if kind == ".tsv":
        return "\t"
    outside = re.sub(r'"[^"]*"', "", header)
    found = [mark for mark in SEPARATORS if mark in outside]
    return found[0] if len(found) == 1 else ","


def _parquet(data: bytes, source: str) -> list[RawRow]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
        rows = table.to_pylist()
        if b"huggingface" in (table.schema.metadata or {}):
            import datasets

            _name_classes(rows, datasets.Features.from_arrow_schema(table.schema))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = shortage(error) or f"not a readable parquet file: {first_line(error)}"
        raise UserError(f"{source}: {reason}") from None
    return list(enumerate(rows, 1))


def _read_hub(source: str) -> tuple[list[RawRow], str]:
    name, _, split = source.partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(
            f"{source}: neither a file ({', '.join(SUFFIXES)}) nor a Hub data set (owner/name or "
            "owner/name:split)"
        )
    import datasets

    try:
        table = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # datasets raises what its many readers raise
        if lack := shortage(error, datasets.config.HF_DATASETS_CACHE):
            raise UserError(f"{source}: {lack}") from None
        raise UserError(
            f"{source}: this Hub data set cannot be loaded: {first_line(error)}. "
            "Offline, give a file instead; else check the name, and the split after a colon"
        ) from None
    rows = [dict(row) for row in table]
    _name_classes(rows, table.features)
    return list(enumerate(rows, 1)), str(table._fingerprint)


def _name_classes(rows: list[dict[str, Any]], features: Mapping[str, Any]) -> None:
    """Put the names of classes in place of their numbers; -1 means no class."""
    for column, feature in features.items():
        names = getattr(feature, "names", None)  # of a ClassLabel
        for row in rows if names else ():
            value = row.get(column)
            if names and isinstance(value, int):
                row[column] = names[value] if 0 <= value < len(names) else None


def _object(value: object) -> dict[str, Any] | str:
    """A row, or why it is none."""
    if isinstance(value, dict):
        return value
    return f"a JSON object {{...}} is expected, not {type(value).__name__}"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without duplicate keys: of two json would keep the last and say nothing."""
    made = dict(pairs)
    if len(made) < len(pairs):
        name, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"duplicate key {name!r:.40} in one object; keep one")
    return made


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
