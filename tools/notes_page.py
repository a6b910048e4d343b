"""Reading a page of COMMENTED_CODE/: its code, cut into statements, and their notes (see notes.py)."""

import bisect
import hashlib
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

FOLDER = "COMMENTED_CODE"
CODE_SECTION = "Line-by-Line Commented Code"
LANGUAGE = {".py": "python", ".yml": "yaml"}

NOTE = re.compile(r"[ \t]*# (WHAT|WHY|HOW|BENEFIT|TRADE-OFF):(.*)")
FENCE = re.compile(r" *(`{3,})([^`]*)$")
HEADING = re.compile(r" {0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$")
YAML_KEY = re.compile(r"( *)(?:- )?([\w.\"'-]+):(?:\s|$)")


class Fault(Exception):
    """What is wrong at a line (counted from 0) of a page or another text, and what to do."""

    def __init__(self, place: str, at: int, text: str) -> None:
        super().__init__(f"{place}:{at + 1}: {text}")
        self.at = at


# --- code -----------------------------------------------------------------------------------------


class Statement(NamedTuple):
    """A logical line. `first` and `last` are its lines in the code, counted from 0."""

    first: int
    last: int
    indent: str
    text: str  # without its indent
    scope: str  # dotted names of the functions and classes around it; of a header, its own too
    is_docstring: bool = False
    file: str = ""

    @property
    def identity(self) -> tuple[str, str, str]:
        """What stays the same where the statement only moves within its function."""
        return self.file, self.scope, self.text


def split(text: str) -> list[str]:
    """Lines with their ends. Only a newline ends one, not a form feed as in str.splitlines()."""
    return list(io.StringIO(text))


def statement(lines: list[str], first: int, last: int, scope: str) -> Statement:
    """The statement on these lines."""
    indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
    text = "".join(line.removeprefix(indent) for line in lines[first : last + 1]).rstrip()
    return Statement(first, last, indent, text, scope)


def statements(file: str, code: str) -> list[Statement]:
    """The statements of a file without notes, in order."""
    found = of_yaml(code) if file.endswith(".yml") else of_python(code)
    return [item._replace(file=file) for item in found]


def of_python(code: str) -> list[Statement]:
    """Logical lines of Python, by its own tokenizer."""
    lines = split(code)
    found: list[Statement] = []
    scopes = [""]  # one per indent
    inner = ""  # of the body that the last statement may open
    words: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.INDENT:
            scopes.append(inner)
        elif token.type == tokenize.DEDENT:
            scopes.pop()
        elif token.type == tokenize.NEWLINE and words:
            head = [word.string for word in words[:3] if word.string != "async"]
            inner = scopes[-1]
            if head[0] in ("def", "class"):
                inner = f"{inner}.{head[1]}".removeprefix(".")
                for at in reversed(range(len(found))):  # decorators belong to what they decorate
                    if not found[at].text.startswith("@"):
                        break
                    found[at] = found[at]._replace(scope=inner)
            item = statement(lines, words[0].start[0] - 1, token.start[0] - 1, inner)
            is_docstring = all(word.type == tokenize.STRING for word in words)
            found.append(item._replace(is_docstring=is_docstring))
            words = []
        elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            words.append(token)
    return found


def of_yaml(code: str) -> list[Statement]:
    """Keys with their values; a key's scope is its path."""
    lines = split(code)
    found: list[Statement] = []
    path: list[tuple[int, str]] = []
    for at, line in enumerate(lines):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if key := YAML_KEY.match(line):
            path = [part for part in path if part[0] < len(key[1])] + [(len(key[1]), key[2])]
        first = at if key or not found else found.pop().first  # without a key, a value goes on
        found.append(statement(lines, first, at, ".".join(name for _, name in path)))
    return found


# --- pages ----------------------------------------------------------------------------------------


def name_of(file: str) -> str:
    """A code file's name in titles: its path from src/etude."""
    return file.removeprefix("src/etude/")


def page_of(file: str) -> str:
    """The file name of a code file's page: chat.py.md, engine-packing.py.md."""
    return name_of(file).replace("/", "-") + ".md"


def ticks(*texts: str) -> str:
    """A fence for some texts: longer than every run of backticks in them."""
    return "`" * max([3, *(len(run) + 1 for run in re.findall("`+", "\n".join(texts)))])


class Heading(NamedTuple):
    """A heading outside of fences; `line` counts from 0."""

    line: int
    level: int
    text: str


class Fence(NamedTuple):
    """A fenced block, by its first and last line (the backticks), counted from 0."""

    first: int
    last: int
    language: str


class Page(NamedTuple):
    """A page taken apart, and what its code is without the notes."""

    file: str  # the code file
    lines: list[str]
    headings: list[Heading]
    fences: list[Fence]
    held: Fence  # that of the code
    code: list[str]  # the lines of code, notes left out
    where: list[int]  # the page's line of each
    statements: list[Statement]
    noted: dict[int, list[int]]  # statement to the page's lines of its notes
    misplaced: list[int]  # the page's lines of notes that are under no statement

    def notes(self, number: int) -> list[str]:
        """The notes of a statement, without their indent."""
        return [self.lines[at].lstrip() for at in self.noted.get(number, [])]

    def fault(self, at: int, text: str) -> Fault:
        """A fault at a line of this page, counted from 0."""
        return Fault(f"{FOLDER}/{page_of(self.file)}", at, text)


def read_markdown(place: str, text: str) -> tuple[list[str], list[Heading], list[Fence]]:
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
            fences.append(Fence(opened[0], at, opened[2]))
            opened = None
    if opened:
        raise Fault(place, opened[0], "this fence is never closed; close it with as many backticks")
    return lines, headings, fences


def read_page(file: str, text: str) -> Page:
    """Take the page of a code file apart; raises Fault where it has no code, or no Python."""
    language = LANGUAGE[Path(file).suffix]
    place = f"{FOLDER}/{page_of(file)}"
    lines, headings, fences = read_markdown(place, text)
    tops = [heading for heading in headings if heading.level <= 2]
    start = next((heading.line for heading in tops if heading.text == CODE_SECTION), len(lines))
    end = next((heading.line for heading in tops if heading.line > start), len(lines))
    blocks = [f for f in fences if start < f.first < end and f.language == language]
    if len(blocks) != 1:
        wrong = f'"## {CODE_SECTION}" must have one ```{language} block, of all the code'
        raise Fault(place, start if start < len(lines) else 0, wrong)
    body = range(blocks[0].first + 1, blocks[0].last)
    where = [at for at in body if not NOTE.match(lines[at])]
    code = [lines[at] for at in where]
    try:
        found = statements(file, "".join(code))
    except (tokenize.TokenError, SyntaxError) as error:
        wrong = f"the code is not Python: {error}; compare with {file}"
        raise Fault(place, blocks[0].first, wrong) from error
    ends = {item.last: number for number, item in enumerate(found)}
    noted: dict[int, list[int]] = {}
    misplaced = []
    for at in [at for at in body if NOTE.match(lines[at])]:
        above = bisect.bisect(where, at) - 1
        if above in ends:
            noted.setdefault(ends[above], []).append(at)
        else:
            misplaced.append(at)
    return Page(file, lines, headings, fences, blocks[0], code, where, found, noted, misplaced)


def keys(found: list[Statement], numbers: Iterable[int]) -> dict[int, str]:
    """The lock's line of some statements: scope, ordinal among equals, hash of the text."""
    count: Counter[tuple[str, str]] = Counter()
    lines = {}
    for number in sorted(numbers):
        item = found[number]
        digest = hashlib.sha256(item.text.encode()).hexdigest()[:16]
        count[item.scope, digest] += 1
        lines[number] = f"{item.scope or '.'} {count[item.scope, digest]} {digest}"
    return lines
