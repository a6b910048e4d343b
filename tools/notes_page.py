"""Reading a page of COMMENTED_CODE/: its code, cut into statements, and their notes (see notes.py)."""

import bisect
import functools
import hashlib
import io
import re
import shlex
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

CODE_SECTION = "Line-by-Line Commented Code"
ORPHANS = "Orphaned notes"
LANGUAGE = {".py": "python", ".sh": "bash", ".yml": "yaml"}

NOTE = re.compile(r"[ \t]*# (WHAT|WHY|HOW|BENEFIT|TRADE-OFF|STALE):(.*)")
STALE = "# STALE: the code changed; read its notes, then: python tools/notes.py accept PAGE:LINE"
FENCE = re.compile(r" *(`{3,})([^`]*)$")
HEADING = re.compile(r" {0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$")
YAML_KEY = re.compile(r"( *)(?:- )?([\w.\"'-]+):(?:\s|$)")


class Fault(NamedTuple):
    """What is wrong at a line (counted from 1) of a page, and what to do."""

    line: int
    text: str


class Broken(Exception):
    """A page or code file that cannot be read as one."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.fault = Fault(line, text)


# --- code -----------------------------------------------------------------------------------------


class Statement(NamedTuple):
    """A logical line. `first` and `last` are its lines in the code, counted from 0."""

    first: int
    last: int
    indent: str
    text: str  # without its indent
    scope: str  # dotted names of the functions and classes around it; of a header, its own too
    block: int  # the same number for the statements of one function, class or top-level run
    is_docstring: bool = False


def split(text: str) -> list[str]:
    """Lines with their ends. Only a newline ends one, not a form feed as in str.splitlines()."""
    return list(io.StringIO(text))


def tokens(code: str) -> Iterator[tokenize.TokenInfo]:
    """Python's tokens; Broken where there are none."""
    try:
        yield from tokenize.generate_tokens(io.StringIO(code).readline)
    except tokenize.TokenError as error:
        raise Broken(error.args[1][0], f"not Python: {error.args[0]}") from error
    except SyntaxError as error:
        raise Broken(error.lineno or 1, f"not Python: {error.msg}") from error


@functools.cache
def note_lines(code: str, language: str) -> frozenset[int]:
    """The lines that are notes. What looks like a note within a Python string is none."""
    lines = split(code)
    rows: Iterable[int] = range(len(lines))
    if language == "python":
        comments = [t.start for t in tokens(code) if t.type == tokenize.COMMENT]
        rows = [row - 1 for row, column in comments if not lines[row - 1][:column].strip()]
    return frozenset(row for row in rows if NOTE.match(lines[row]))


def statement(lines: list[str], first: int, last: int, scope: str, block: int,
              is_docstring: bool = False) -> Statement:  # fmt: skip
    """The statement on these lines."""
    indent = lines[first][: len(lines[first]) - len(lines[first].lstrip(" \t\f"))]
    text = "".join(line.removeprefix(indent) for line in lines[first : last + 1]).rstrip()
    return Statement(first, last, indent.rpartition("\f")[2], text, scope, block, is_docstring)


@functools.cache
def statements(code: str, language: str) -> list[Statement]:
    """The statements of a file without notes, in order."""
    return {"python": of_python, "yaml": of_yaml, "bash": of_shell}[language](code)


def of_python(code: str) -> list[Statement]:
    """Logical lines of Python, by its own tokenizer."""
    lines = split(code)
    found: list[Statement] = []
    runs = -1  # blocks of top-level statements are numbered downwards from here
    around: list[tuple[str, int | None]] = [("", None)]  # scope and block, one per indent
    inner = around[0]  # of the body that the last statement may open
    words: list[tokenize.TokenInfo] = []
    for token in tokens(code):
        if token.type == tokenize.INDENT:
            around.append(inner)
        elif token.type == tokenize.DEDENT:
            around.pop()
        elif token.type == tokenize.NEWLINE and words:
            head = [word.string for word in words[:3] if word.string != "async"]
            scope, block = inner = around[-1]
            if head[0] in ("def", "class"):
                scope, block = inner = f"{scope}.{head[1]}".removeprefix("."), len(found)
                runs -= around[-1][1] is None
                for at in reversed(range(len(found))):  # decorators belong to what they decorate
                    if not found[at].text.startswith("@"):
                        break
                    found[at] = found[at]._replace(scope=scope, block=block)
            is_docstring = all(word.type == tokenize.STRING for word in words)
            span = words[0].start[0] - 1, token.start[0] - 1
            number = runs if block is None else block
            found.append(statement(lines, *span, scope, number, is_docstring))
            words = []
        elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            words.append(token)
    return found


def of_yaml(code: str) -> list[Statement]:
    """Keys with their values; a key's scope is its path."""
    lines = split(code)
    spans: list[tuple[int, int, str]] = []
    path: list[tuple[int, str]] = []
    for at, line in enumerate(lines):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if key := YAML_KEY.match(line):
            path = [part for part in path if part[0] < len(key[1])] + [(len(key[1]), key[2])]
        if key or not spans:
            spans.append((at, at, ".".join(name for _, name in path)))
        else:  # a value goes on
            spans[-1] = (spans[-1][0], at, spans[-1][2])
    return [statement(lines, first, last, scope, -1) for first, last, scope in spans]


def of_shell(code: str) -> list[Statement]:
    """Commands; a line goes on after a backslash and within quotes (here-documents: not known)."""
    lines = split(code)
    found: list[Statement] = []
    first = None
    for at, line in enumerate(lines):
        if first is None and (not line.strip() or line.lstrip().startswith("#")):
            continue
        first = at if first is None else first
        try:
            shlex.split("".join(lines[first : at + 1]), comments=True)
        except ValueError:  # a quote is open
            continue
        if not line.rstrip("\r\n").endswith("\\"):
            found.append(statement(lines, first, at, "", -1))
            first = None
    if first is not None:
        raise Broken(first + 1, "a quote or a backslash leads over the end of the script")
    return found


# --- pages ----------------------------------------------------------------------------------------


def name_of(file: str) -> str:
    """A code file's name in titles: its path, from src/etude for the library's own."""
    return file.removeprefix("src/etude/")


def page_of(file: str) -> str:
    """The file name of a code file's page: chat.py.md, tools-notes.py.md."""
    return name_of(file).replace("/", "-") + ".md"


def longest_run(lines: Iterable[str]) -> int:
    """How many backticks stand in a row in some lines, at most. A fence has more, and 3 at least."""
    return max(map(len, re.findall("`+", "\n".join(lines))), default=0)


class Heading(NamedTuple):
    """A heading outside of fences; `line` counts from 0."""

    line: int
    level: int
    text: str


class Fence(NamedTuple):
    """A fenced block, by its first and last line (the backticks), counted from 0."""

    first: int
    last: int
    ticks: int
    language: str


class Page(NamedTuple):
    """A page taken apart, and what its code is without the notes."""

    lines: list[str]
    headings: list[Heading]
    fences: list[Fence]  # all
    held: list[Fence]  # those of the code
    code: list[str]  # the lines of code, notes left out
    where: list[int]  # the page's line of each
    statements: list[Statement]
    noted: dict[int, list[int]]  # statement to the page's lines of its notes
    misplaced: list[Fault]


def read_markdown(text: str) -> tuple[list[str], list[Heading], list[Fence]]:
    """Lines, headings and fenced blocks of a markdown text."""
    lines = split(text)
    headings, fences = [], []
    opened: tuple[int, int, str] | None = None
    for at, line in enumerate(lines):
        fence = FENCE.match(line.rstrip())
        if opened is None:
            if fence:
                opened = at, len(fence[1]), fence[2].strip()
            elif heading := HEADING.match(line):
                headings.append(Heading(at, len(heading[1]), heading[2]))
        elif fence and len(fence[1]) >= opened[1] and not fence[2]:
            fences.append(Fence(opened[0], at, *opened[1:]))
            opened = None
    if opened:
        raise Broken(opened[0] + 1, "this fence is never closed; close it with as many backticks")
    return lines, headings, fences


def section(headings: list[Heading], title: str, end: int) -> range:
    """The lines of a section, its heading's first; none where there is no such section."""
    tops = [heading for heading in headings if heading.level <= 2]
    for heading, after in zip_longest(tops, tops[1:]):
        if heading.level == 2 and heading.text == title:
            return range(heading.line, after.line if after else end)
    return range(0)


def read_page(file: str, text: str) -> Page:
    """Take the page of a code file apart."""
    language = LANGUAGE[Path(file).suffix]
    lines, headings, fences = read_markdown(text)
    within = section(headings, CODE_SECTION, len(lines))
    held = [f for f in fences if f.first in within and f.language == language]
    if not held:
        line = within.start + 1 if within else 1
        raise Broken(line, f'"## {CODE_SECTION}" has no ```{language} block; put the code there')
    rows = [at for fence in held for at in range(fence.first + 1, fence.last)]
    try:
        notes = note_lines("".join(lines[at] for at in rows), language)
        where = [at for number, at in enumerate(rows) if number not in notes]
        code = [lines[at] for at in where]
        found = statements("".join(code), language)
    except Broken as error:
        at = [*rows, held[-1].last][min(error.fault.line - 1, len(rows))]
        raise Broken(at + 1, f"{error.fault.text}; compare with {file}") from error
    groups: dict[int, list[int]] = {}  # lines of code above to lines of notes
    for number in sorted(notes):
        above = bisect.bisect(where, rows[number])
        groups.setdefault(above, []).append(rows[number])
    ends = {item.last + 1: number for number, item in enumerate(found)}
    misplaced = []
    for above, (first, *_) in groups.items():
        if inside := [s for s in found if s.first < above <= s.last]:
            end = where[inside[0].last] + 1
            misplaced.append(
                Fault(first + 1, f"the note stands inside a statement; move it under line {end}")
            )
        elif above not in ends:
            misplaced.append(
                Fault(
                    first + 1, "the note does not stand directly under a statement; move it there"
                )
            )
    noted = {ends[above]: at for above, at in groups.items() if above in ends}
    return Page(lines, headings, fences, held, code, where, found, noted, misplaced)


# --- notes and their lock -------------------------------------------------------------------------


def keys(noted: Iterable[Statement]) -> list[str]:
    """The lock's line for each noted statement: scope, ordinal among equals, hash of its text."""
    count: Counter[tuple[str, str]] = Counter()
    found = []
    for item in noted:
        digest = hashlib.sha256(item.text.encode()).hexdigest()[:16]
        count[item.scope, digest] += 1
        found.append(f"{item.scope or '.'} {count[item.scope, digest]} {digest}")
    return found


def kind(line: str) -> str:
    """The kind of a note; "" of another line."""
    note = NOTE.match(line)
    return note[1] if note else ""


def kinds(page: Page, number: int) -> set[str]:
    """The kinds of notes that a statement has."""
    return {kind(page.lines[at]) for at in page.noted.get(number, [])}


def is_stale(page: Page, number: int) -> bool:
    """Whether a noted statement bears the mark of a change."""
    return "STALE" in kinds(page, number)


def fresh(page: Page) -> dict[int, str]:
    """The lock's line for each statement that has notes and no mark of a change."""
    numbers = [number for number in sorted(page.noted) if not is_stale(page, number)]
    return dict(zip(numbers, keys(page.statements[n] for n in numbers), strict=True))


def written(lines: Iterable[str]) -> str:
    """A lock's text."""
    return "".join(f"{line}\n" for line in sorted(lines))
