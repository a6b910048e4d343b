"""Rows out of files and Hub data sets, unchanged, each with its line."""

import codecs
import csv
import hashlib
import io
import itertools
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from etude.errors import UserError, first_line, nearest, shortage
from etude.files import expanded, open_bytes, read_bytes

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".tsv")
# What to do with kinds of files that are not read.
ADVICE = {
    "unpack it first": (".gz", ".bz2", ".xz", ".zst", ".zip"),
    "save the sheet as CSV UTF-8": (".xlsx", ".xls", ".ods"),
    "rename it to .jsonl": (".ndjson", ".jsonlines"),
    'write each text as a line {"text": "..."} of a .jsonl file': (".txt", ".md"),
}
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
FAULTS_SHOWN = 10
LIMIT = 2**31  # bytes of a file, and of what a packed one grows to: Python needs several times that
GROWTH = 100  # how many times larger than its file a table may be, once it is larger than FREE
FREE = 2**27

# A row of the source: its line (or number, where there are no lines) and its fields.
RawRow = tuple[int, dict[str, Any]]


def read(source: str) -> tuple[list[RawRow], str]:
    """The rows of a file or a Hub data set, and a fingerprint: the SHA-256 of a file's bytes.

    Raises:
        UserError: no such source, no rows in it, or rows that cannot be read (all, by line).
    """
    path = expanded(source)
    if path.suffix.lower() in SUFFIXES or path.exists():
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
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        advice = [what for what, kinds in ADVICE.items() if kind in kinds]
        raise UserError(
            f"{source}: unknown kind of file; known: {', '.join(SUFFIXES)}"
            + "".join(f"; {what}" for what in advice)
        )
    digest = hashlib.sha256()
    try:
        if kind == ".parquet":
            data = read_bytes(path, LIMIT)
            digest.update(data)
            return _parquet(data, source), digest.hexdigest()
        with open_bytes(path, LIMIT) as stream:
            # Line by line, so that no more than the rows is ever held.
            lines = _lines(stream, source, digest)
            if kind == ".jsonl":
                rows = _jsonl(lines, source)
            elif kind == ".json":
                rows = _json("".join(lines), source)
            else:
                rows = _csv(lines, source, kind)
    except OSError as error:
        raise UserError(
            f"{source}: cannot be read: {error.strerror}; a file of rows is expected"
        ) from None
    return rows, digest.hexdigest()


def _lines(stream: Iterable[bytes], source: str, digest: Any) -> Iterator[str]:
    """The lines of a UTF-8 file, of which `digest` sees the bytes."""
    for number, line in enumerate(stream, 1):
        digest.update(line)
        if number == 1:
            wide = line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            if wide or line[:2].count(0) == 1:  # without a mark, by its first letter
                raise UserError(
                    f"{source}:1: not UTF-8 text but UTF-16; save the file as UTF-8: "
                    + _command("UTF-16" if wide else f"UTF-16{'LBEE'[line[0] == 0 :: 2]}", source)
                )
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{source}:{number}: not UTF-8 text (byte {line[error.start]:#04x}); save the "
                "file as UTF-8; from Windows-1252 (Latin-1): " + _command("WINDOWS-1252", source)
            ) from None


def _command(encoding: str, source: str) -> str:
    return f"iconv -f {encoding} -t UTF-8 {shlex.quote(source)} > NEW{Path(source).suffix}"


def _jsonl(lines: Iterator[str], source: str) -> list[RawRow]:
    # Lines end at \n alone: U+2028 and the like may stand inside a JSON string.
    rows: list[RawRow] = []
    faults, blank = [], 0
    for line, content in enumerate(lines, 1):
        if not content.strip():
            blank += not rows
        elif line == blank + 1 and _is_list(content):
            return _json("\n" * blank + content + "".join(lines), source)
        else:
            try:
                written = content.rstrip()  # the parser counts a line end as the next line
                rows.append((line, _object(json.loads(written, object_pairs_hook=_once))))
            except (ValueError, RecursionError) as error:
                faults.append(f"{source}:{line}: {_json_fault(error)}")
    raise_faults(faults, "each line is one JSON object, {...}")
    return rows


def _is_list(first: str) -> bool:
    """Whether a file's first line begins a list of objects, in place of one object a line."""
    return re.match(r"\s*\[\s*($|\{)", first) is not None


def _json(text: str, source: str) -> list[RawRow]:
    """One list of objects, or objects one after another, as in .jsonl."""
    decoder, space = json.JSONDecoder(object_pairs_hook=_once), re.compile(r"[ \t\n\r]*")
    rows: list[RawRow] = []
    faults = []
    position, counted, line = 0, 0, 1

    def skip() -> str:
        """Go on to what comes next, and give its character."""
        nonlocal position, counted, line
        position = space.match(text, position).end()  # type: ignore[union-attr]
        line += text.count("\n", counted, position)
        counted = position
        return text[position : position + 1]

    def wrong(what: str) -> UserError:
        return UserError(f"{source}:{line}: {what}")

    opening = skip()
    if not opening:
        return rows
    if opening not in "[{":
        raise wrong("a .json file is one list of objects, [{...}, ...]")
    listed = opening == "["
    position += listed
    while (following := skip()) not in ("]" if listed else ""):
        try:
            item, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{source}:{error.lineno}: {_json_fault(error)}; a .json file is one list of objects"
            ) from None
        except (ValueError, RecursionError) as error:
            raise wrong(f"{_json_fault(error)}; a .json file is one list of objects") from None
        try:
            rows.append((line, _object(item)))
        except ValueError as error:
            faults.append(f"{source}:{line}: {error}")
        if listed and skip() == ",":
            position += 1
            if skip() == "]":
                raise wrong("not valid JSON: a comma before the closing ]; remove it")
        elif listed and skip() != "]":
            raise wrong("not valid JSON: a comma or the closing ] is expected after an object")
    if listed and following != "]":
        raise wrong("not valid JSON: the list does not end; the closing ] is missing")
    if listed:
        position += 1
        if skip():
            raise wrong("text after the list; a file is one list of objects, or one object a line")
    elif len(rows) == 1:
        raise UserError(f"{source}:{rows[0][0]}: {_single(rows[0][1])}")
    raise_faults(faults, "every item of the list is an object, {...}")
    return rows


def _single(item: dict[str, Any]) -> str:
    """What is wrong with a .json file that is one object, and what to do."""
    inside = [
        name
        for name, held in item.items()
        if name not in ("messages", "conversations")
        and isinstance(held, list)
        and held
        and isinstance(held[0], dict)
    ]
    return "a .json file is one list of objects, [{...}, ...], and this is one object; " + (
        f"save its list {inside[0]!r} alone"
        if inside
        else "write [ and ] around it, or, one object a line, name the file .jsonl"
    )


def _csv(lines: Iterator[str], source: str, kind: str) -> list[RawRow]:
    # Lines end at \n, \r\n or \r; splitlines() would cut fields at U+2028 and form feeds too.
    lines = (
        piece
        for content in lines
        for piece in (io.StringIO(content, newline="") if "\r" in content else (content,))
    )
    first, start = "", 1
    for content in lines:
        if content.strip():
            first = content
            break
        start += 1
    named = re.fullmatch(r'"?sep=([^\w\s"]|\t)"?\s*', first)  # Excel's first line
    if named:
        first, start = next(lines, ""), start + 1
    comma = named[1] if named else _separator(first, kind)
    rows, faults = [], []
    names: list[str] = []
    line = start
    limit = csv.field_size_limit(LIMIT)
    try:
        reader = csv.reader(itertools.chain([first], lines), strict=True, delimiter=comma)
        for values in reader:
            if not names:
                names = values
                doubled = [name for name, times in Counter(names).items() if times > 1]
                if doubled:
                    raise UserError(
                        f"{source}:{line}: the header has a duplicate column {doubled[0]!r}; "
                        "rename one"
                    )
            elif values and len(values) != len(names):
                faults.append(
                    f"{source}:{line}: not as many fields as the header has ({', '.join(names)})"
                )
            elif values:
                rows.append((line, dict(zip(names, values, strict=True))))
            line = start + reader.line_num
    except csv.Error as error:
        faults.append(f"{source}:{line}: not valid CSV: {error}")
    finally:
        csv.field_size_limit(limit)
    raise_faults(
        faults,
        f"fields are separated by {SEPARATORS.get(comma, repr(comma))}; quote fields that hold them "
        "or line breaks, or name another separator in a first line, e.g. sep=;",
    )
    return rows


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

    rows: list[dict[str, Any]] = []
    size, most = 0, min(LIMIT, max(FREE, GROWTH * len(data)))
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        names = _class_names(file.schema_arrow.metadata)
        # In pieces: a small file can hold a value once and say that it stands a billion times.
        for batch in file.iter_batches(1024):
            # A row costs about so much in Python, whatever is in it.
            size += 100 * len(batch) + sum(
                (column.dictionary_decode() if hasattr(column, "dictionary") else column).nbytes
                for column in batch.columns
            )
            if size > most:
                raise ValueError(f"its {len(data):,} bytes grow to more than {most:,}")
            rows += batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = shortage(error) or f"not a readable parquet file: {first_line(error)}"
        raise UserError(f"{source}: {reason}") from None
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
        if lack := shortage(error, datasets.config.HF_DATASETS_CACHE):
            raise UserError(f"{source}: {lack}") from None
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
        raise ValueError(f"duplicate key {name!r:.40} in one object; keep one")
    return made


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        if error.msg == "Extra data" and error.doc[error.pos :].strip() == ",":
            return f"not valid JSON: a comma after the object at column {error.colno}; remove it"
        if error.doc[: error.pos].rstrip().endswith(",") and error.doc[error.pos :].startswith(
            ("}", "]")
        ):
            return f"not valid JSON: a comma before the closing mark at column {error.colno}; remove it"
        return f"not valid JSON: {error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def raise_faults(faults: list[str], advice: str) -> None:
    """Raise the faults, if any, as one UserError: the first ten by line, then their number."""
    if faults:
        shown = faults[:FAULTS_SHOWN]
        more = [f"... and {len(faults) - len(shown)} more"] if len(faults) > len(shown) else []
        rows = "1 row" if len(faults) == 1 else f"{len(faults)} rows"
        raise UserError(f"{rows} cannot be used ({advice}):\n  " + "\n  ".join(shown + more))
