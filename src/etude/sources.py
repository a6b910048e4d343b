"""Rows out of files and Hub data sets, as they stand there, each with its line."""

import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from etude.errors import UserError, first_line, nearest
from etude.foreign import expanded, read_bytes

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
FAULTS_SHOWN = 10
LIMIT = 2**31  # bytes of a file, and of what a packed one grows to: Python needs several times that
GROWTH = 100  # how many times larger than its file a table may be, once it is larger than FREE
FREE = 2**27

# A row as it stands in the source: its line (or number, where there are no lines) and its fields.
RawRow = tuple[int, dict[str, Any]]


def read(source: str) -> tuple[list[RawRow], str]:
    """The rows of a file or a Hub data set, and a fingerprint: the SHA-256 of a file's bytes.

    Raises:
        UserError: no such source, no rows in it, or rows that cannot be read (all, by line).
    """
    path = expanded(source)
    if path.suffix in SUFFIXES or path.exists():
        rows, fingerprint = _read_file(path, source)
    else:
        rows, fingerprint = _read_hub(source)
    if not rows:
        raise UserError(f"{source}: no rows in it; a data set needs at least one row for training")
    return rows, fingerprint


def _read_file(path: Path, source: str) -> tuple[list[RawRow], str]:
    if not os.path.lexists(path):
        near = (
            nearest(path.name, [p.name for p in path.parent.glob("*")])
            if path.parent.is_dir()
            else None
        )
        raise UserError(
            f"{source}: no such file (looked in {path.parent.absolute()})"
            + (
                f"; did you mean {path.parent / near}?"
                if near
                else "; paths are relative to where you run etude"
            )
        )
    if path.suffix not in SUFFIXES:
        raise UserError(f"{source}: unknown kind of file; known: {', '.join(SUFFIXES)}")
    try:
        data = read_bytes(path, LIMIT)
    except OSError as error:
        raise UserError(
            f"{source}: cannot be read: {error.strerror}; a file of rows is expected"
        ) from None
    if path.suffix == ".parquet":
        rows = _parquet(data, source)
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise UserError(
                f"{source}:{line}: not UTF-8 text (byte {data[error.start]:#04x}); save the file "
                "as UTF-8"
            ) from None
        rows = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}[path.suffix](text, source)
    return rows, hashlib.sha256(data).hexdigest()


def _jsonl(text: str, source: str) -> list[RawRow]:
    rows, faults = [], []
    # Not splitlines(): U+2028 and the like may stand inside a JSON string.
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                rows.append((line, _object(json.loads(content, object_pairs_hook=_once))))
            except (ValueError, RecursionError) as error:
                faults.append(f"{source}:{line}: {_json_fault(error)}")
    raise_faults(faults, "each line is one JSON object, {...}")
    return rows


def _json(text: str, source: str) -> list[RawRow]:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise UserError(
            f"{source}:{line}: {_json_fault(error)}; a .json file is one list of objects"
        ) from None
    if not isinstance(items, list):
        raise UserError(
            f"{source}:1: a .json file is one list of objects, [{{...}}, ...]; one object a line "
            "is .jsonl"
        )
    # json tells no positions, so the objects are walked once more for their lines.
    decoder, between = json.JSONDecoder(object_pairs_hook=_once), re.compile(r"[\s,]*")
    position, counted, line, lines = text.index("[") + 1, 0, 1, []
    for _ in items:
        position = between.match(text, position).end()  # type: ignore[union-attr]
        line += text.count("\n", counted, position)
        lines.append(line)
        counted = position
        try:
            _, position = decoder.raw_decode(text, position)
        except ValueError as error:  # a key twice
            raise UserError(f"{source}:{line}: {error}") from None
    rows, faults = [], []
    for line, item in zip(lines, items, strict=True):
        try:
            rows.append((line, _object(item)))
        except ValueError as error:
            faults.append(f"{source}:{line}: {error}")
    raise_faults(faults, "every item of the list is an object, {...}")
    return rows


def _csv(text: str, source: str) -> list[RawRow]:
    # Lines end at \n, \r\n or \r; splitlines() would cut fields at U+2028 and form feeds too.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, faults = [], []
    names: list[str] = []
    line = 1
    try:
        for values in reader:
            if not names:
                names = values
                doubled = [name for name, times in Counter(names).items() if times > 1]
                if doubled:
                    raise UserError(
                        f"{source}:{line}: the column {doubled[0]!r} stands twice in the header; "
                        "rename one"
                    )
            elif values and len(values) != len(names):
                faults.append(
                    f"{source}:{line}: not as many fields as the header has ({', '.join(names)})"
                )
            elif values:
                rows.append((line, dict(zip(names, values, strict=True))))
            line = reader.line_num + 1
    except csv.Error as error:
        faults.append(f"{source}:{line}: not valid CSV: {error}")
    raise_faults(faults, "quote fields that hold commas or line breaks")
    return rows


def _parquet(data: bytes, source: str) -> list[RawRow]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    rows: list[dict[str, Any]] = []
    size, most = 0, min(LIMIT, max(FREE, GROWTH * len(data)))
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        names = _class_names(file.schema_arrow.metadata)
        # In pieces: a small file can hold a value once and say that it stands a billion times.
        for batch in file.iter_batches(1024):
            # A row costs about so much in Python, whatever stands in it.
            size += 100 * len(batch) + sum(
                (column.dictionary_decode() if hasattr(column, "dictionary") else column).nbytes
                for column in batch.columns
            )
            if size > most:
                raise ValueError(f"its {len(data):,} bytes grow to more than {most:,}")
            rows += batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise UserError(f"{source}: not a readable parquet file: {first_line(error)}") from None
    _name_classes(rows, names)
    return list(enumerate(rows, 1))


def _class_names(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    """The names of the classes by column, as `datasets` writes them into a parquet file."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: list(map(str, feature["names"]))
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}  # not written by `datasets`


def _name_classes(rows: list[dict[str, Any]], names: dict[str, list[str]]) -> None:
    """Put the names of classes in place of their numbers; -1 stands for no class."""
    for column, known in names.items():
        for row in rows:
            value = row.get(column)
            if isinstance(value, int):
                row[column] = known[value] if 0 <= value < len(known) else None


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
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{source}: this Hub data set cannot be loaded: {text}. "
            "Offline, give a file instead; else check the name, and the split after a colon"
        ) from None
    rows = [dict(row) for row in table]
    features = table.features.items()
    _name_classes(rows, {k: f.names for k, f in features if isinstance(f, datasets.ClassLabel)})
    return list(enumerate(rows, 1)), str(table._fingerprint)


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object {{...}} is expected, not {type(value).__name__}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys stand once: of two json would keep the last and say nothing."""
    made = dict(pairs)
    if len(made) < len(pairs):
        name, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {name!r:.40} stands twice in one object; keep one")
    return made


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def raise_faults(faults: list[str], advice: str) -> None:
    """Raise the faults, if any, as one UserError: the first ten by line, then their number."""
    if faults:
        shown = faults[:FAULTS_SHOWN]
        more = [f"... and {len(faults) - len(shown)} more"] if len(faults) > len(shown) else []
        rows = "1 row" if len(faults) == 1 else f"{len(faults)} rows"
        raise UserError(f"{rows} cannot be used ({advice}):\n  " + "\n  ".join(shown + more))
