"""Keep the line-by-line pages in COMMENTED_CODE/ true against the code they explain.

A page holds one code file in full, in fenced blocks, with notes between its lines:

    total = sum(losses)
    # WHAT: adds the losses of all passes.
    # WHY: a step's loss is one number, however many passes it took.

A note is one physical line, `# KIND: text`, with a KIND of WHAT, WHY, HOW, BENEFIT or TRADE-OFF. It
stands directly under the last line of its statement, indented like the statement's first line. The
statement of a compound (def, class, if, else, ...) is its header: the notes stand between header and
body, at the header's indent. A docstring needs no note. In YAML a statement is a key and its value,
in a shell script a command.

Without its notes, a page's code equals the file byte for byte: `check` sees to that, and `sync`
carries the notes over when the code has changed. A lock (COMMENTED_CODE/.lock/) remembers which
statement each note was written for, so that changed code never keeps old notes unread.
"""

import argparse
import difflib
import functools
import hashlib
import io
import re
import shlex
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

FOLDER = "COMMENTED_CODE"
CODE_SECTION = "Line-by-Line Commented Code"
SECTIONS = ["Overview", "Benefits", "Trade-offs", "Requirements", CODE_SECTION,
            "Usage Examples", "Common Issues & Solutions", "Related Files"]  # fmt: skip
ORPHANS = "Orphaned notes"
LINKING = ["README.md", "PROJECT_FLOW.md", "CONTRIBUTING.md"]  # checked for links beside the pages
CODE_FILE = re.compile(r"src/etude/.+\.py|tools/[^/]+\.(py|sh)|benchmarks/[^/]+\.py|config\.yml")
LANGUAGE = {".py": "python", ".sh": "bash", ".yml": "yaml"}
# Here every statement has a WHAT and a WHY. Elsewhere every function, class and run of top-level
# statements has at least one WHAT.
STRICT = {"main.py", "train_with_config.py", "evaluation.py", "chat.py", "config.yml"}

NOTE = re.compile(r"[ \t]*# (WHAT|WHY|HOW|BENEFIT|TRADE-OFF|STALE):(.*)")
STALE = (
    "# STALE: the statement changed; read its notes, then: python tools/notes.py accept PAGE:LINE"
)
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


# --- code: statements and notes ----------------------------------------------------------------


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


def note_lines(code: str, language: str) -> set[int]:
    """The lines that are notes. What looks like a note within a Python string is none."""
    lines = split(code)
    rows: Iterable[int] = range(len(lines))
    if language == "python":
        comments = [t.start for t in tokens(code) if t.type == tokenize.COMMENT]
        rows = [row - 1 for row, column in comments if not lines[row - 1][:column].strip()]
    return {row for row in rows if NOTE.match(lines[row])}


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


# --- pages ---------------------------------------------------------------------------------------


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
    written_code = "".join(lines[at] for at in rows)
    rows.append(held[-1].last)  # where the end of the code is told of
    try:
        notes = note_lines(written_code, language)
        where = [at for number, at in enumerate(rows[:-1]) if number not in notes]
        numbers = [*where, held[-1].last]
        code = [lines[at] for at in where]
        all_statements = statements("".join(code), language)
    except Broken as error:
        at = min(error.fault.line, len(rows)) - 1
        raise Broken(rows[at] + 1, f"{error.fault.text}; compare with {file}") from error
    groups: dict[int, list[int]] = {}  # lines of code above to lines of notes
    above = 0
    for number, at in enumerate(rows[:-1]):
        if number in notes:
            groups.setdefault(above, []).append(at)
        else:
            above += 1
    ends = {item.last + 1: number for number, item in enumerate(all_statements)}
    noted, misplaced = {}, []
    for above, at_lines in groups.items():
        if above in ends:
            noted[ends[above]] = at_lines
            continue
        inside = [s for s in all_statements if s.first < above <= s.last]
        wrong = (
            f"the note stands inside a statement; move it under line {numbers[inside[0].last] + 1}"
            if inside
            else "the note does not stand directly under a statement; move it there"
        )
        misplaced.append(Fault(at_lines[0] + 1, wrong))
    return Page(lines, headings, fences, held, code, where, all_statements, noted, misplaced)


# --- the lock ------------------------------------------------------------------------------------


def keys(noted: Iterable[Statement]) -> list[str]:
    """The lock's line for each noted statement: scope, ordinal among equals, hash of its text."""
    count: Counter[tuple[str, str]] = Counter()
    found = []
    for item in noted:
        digest = hashlib.sha256(item.text.encode()).hexdigest()[:16]
        count[item.scope, digest] += 1
        found.append(f"{item.scope or '.'} {count[item.scope, digest]} {digest}")
    return found


def is_stale(page: Page, number: int) -> bool:
    """Whether a noted statement bears the mark of a change."""
    return any(page.lines[at].strip() == STALE for at in page.noted.get(number, []))


def fresh(page: Page) -> dict[int, str]:
    """The lock's line for each statement that has notes and no mark of a change."""
    numbers = [number for number in sorted(page.noted) if not is_stale(page, number)]
    return dict(zip(numbers, keys(page.statements[n] for n in numbers), strict=True))


# --- check ---------------------------------------------------------------------------------------


def name_of(file: str) -> str:
    """A code file's name in titles: its path, from src/etude for the library's own."""
    return file.removeprefix("src/etude/")


def page_of(file: str) -> str:
    """The file name of a code file's page: chat.py.md, tools-notes.py.md."""
    return name_of(file).replace("/", "-") + ".md"


def check_page(file: str, text: str, source: str, lock: str | None) -> list[Fault]:
    """Every fault of one page, in the order of its lines."""
    try:
        page = read_page(file, text)
        faults = sorted(outline_faults(file, page) + code_faults(file, page, source))
        # Once the code is not the file's, what its notes and its lock say is beside the point.
        return faults or sorted(note_faults(file, page) + lock_faults(file, page, lock))
    except Broken as error:
        return [error.fault]


def outline_faults(file: str, page: Page) -> list[Fault]:
    """Title, sections and what a skeleton leaves to be written."""
    faults = []
    title = f"# {name_of(file)} - Comprehensive Documentation"
    if not page.lines or page.lines[0].rstrip() != title:
        faults.append(Fault(1, f'the title is not "{title}"; write that'))
    found = [h for h in page.headings if h.level == 2 and h.text in SECTIONS]
    names = [heading.text for heading in found]
    for name in SECTIONS:
        if name not in names:
            faults.append(Fault(1, f'the section "## {name}" is missing; add it'))
        elif names.count(name) > 1:
            line = found[len(names) - 1 - names[::-1].index(name)].line + 1
            faults.append(Fault(line, f'a second section "## {name}"; join the two'))
        elif not any(
            page.lines[at].strip() for at in section(page.headings, name, len(page.lines))[1:]
        ):
            line = found[names.index(name)].line + 1
            faults.append(Fault(line, f'the section "## {name}" is empty; write it'))
    order = sorted(names, key=SECTIONS.index)
    for heading, name in zip(found, order, strict=True):
        if heading.text != name:
            faults.append(Fault(heading.line + 1, f'"## {name}" should stand here; the order is '
                                + ", ".join(SECTIONS)))  # fmt: skip
            break
    for heading in page.headings:
        if heading.text == ORPHANS:
            faults.append(Fault(heading.line + 1, "notes whose code is gone; move what still holds "
                                "under its statement, then delete this section"))  # fmt: skip
    fenced = {at for fence in page.held for at in range(fence.first, fence.last + 1)}
    for at, text in enumerate(page.lines):
        if at not in fenced and text.lstrip().startswith("TODO"):
            faults.append(Fault(at + 1, "still to be written; write it and delete the TODO"))
    return faults


def code_faults(file: str, page: Page, source: str) -> list[Fault]:
    """The first difference between the page's code and the file; or what the file itself may not."""
    if source and not source.endswith("\n"):
        return [Fault(1, f"{file} has no newline at its end; add one")]
    for at, (mine, true) in enumerate(zip_longest(page.code, split(source))):
        if mine == true:
            continue
        line = page.where[at] if at < len(page.where) else page.held[-1].last
        if true is None:
            wrong = f"the code goes on after the end of {file}"
        elif NOTE.match(true):
            wrong = f"line {at + 1} of {file} looks like a note; word that comment otherwise or"
        else:
            wrong = f"the code is not that of {file}, whose line {at + 1} is {shown(true)}"
            if mine is not None and mine.lstrip().startswith("#"):
                wrong += " (a note is one line, `# WHAT: text`, outside of strings)"
        return [Fault(line + 1, f"{wrong}; run: python tools/notes.py sync {page_of(file)}")]
    for fence in page.held:
        runs = re.findall("`+", "".join(page.lines[fence.first + 1 : fence.last]))
        if fence.ticks <= max(map(len, runs), default=0):
            return [Fault(fence.first + 1, "the fence is no longer than a run of backticks in the "
                          "code; lengthen both its ends")]  # fmt: skip
    return []


def shown(line: str) -> str:
    """A line of code as a message shows it."""
    return repr(line.rstrip("\n") if len(line) < 70 else line[:66] + " ...")


def kinds(page: Page, number: int) -> set[str]:
    """The kinds of notes that a statement has."""
    found = [NOTE.match(page.lines[at]) for at in page.noted.get(number, [])]
    return {note[1] for note in found if note} - {"STALE"}


def note_faults(file: str, page: Page) -> list[Fault]:
    """Notes in the wrong place or form, marks of changes, and statements without notes."""
    faults = list(page.misplaced)
    for number, lines in page.noted.items():
        indent = page.statements[number].indent
        for at in lines:
            line = page.lines[at]
            note = NOTE.match(line)
            if not note or not re.match(r" \S", note[2]):
                faults.append(Fault(at + 1, "the note has no text; write `# WHAT: text`"))
            if line[: line.index("#")] != indent:
                faults.append(Fault(at + 1, "the note is not indented like its statement; begin it "
                                    f"with {len(indent)} blanks"))  # fmt: skip
            if note and note[1] == "STALE":
                todo = f"run: python tools/notes.py accept {page_of(file)}:{at + 1}"
                faults.append(
                    Fault(at + 1, f"the statement above changed; read its notes, then {todo}")
                )
    for number, missing in uncovered(file, page):
        item = page.statements[number]
        faults.append(Fault(page.where[item.first] + 1, f"{missing}: {shown(item.text.split(chr(10))[0])}; "
                            f"write it under line {page.where[item.last] + 1}"))  # fmt: skip
    return faults


def uncovered(file: str, page: Page) -> Iterator[tuple[int, str]]:
    """Statements that lack notes they must have, and what is missing."""
    blocks: dict[int, list[int]] = {}
    for number, item in enumerate(page.statements):
        if not item.is_docstring:
            blocks.setdefault(item.block, []).append(number)
            missing = [kind for kind in ("WHAT", "WHY") if kind not in kinds(page, number)]
            if name_of(file) in STRICT and missing:
                yield number, f"no {' and no '.join(missing)} for this statement"
    if name_of(file) not in STRICT:
        for numbers in blocks.values():
            if not any("WHAT" in kinds(page, number) for number in numbers):
                yield numbers[0], "no WHAT in the block that begins here"


def lock_faults(file: str, page: Page, lock: str | None) -> list[Fault]:
    """Notes that were written for another statement than the one they now stand under."""
    name = page_of(file)
    if lock is None:
        return [Fault(1, f"no lock yet; run: python tools/notes.py lock {name}")]
    locked, faults = set(lock.splitlines()), []
    for number, key in fresh(page).items():
        if key not in locked:
            line = page.where[page.statements[number].first] + 1
            faults.append(Fault(line, "the statement is new or changed since its notes were locked; "
                                f"read them, then run: python tools/notes.py accept {name}:{line}"))  # fmt: skip
    gone = len(locked - set(fresh(page).values()))
    if gone and not faults:
        faults.append(Fault(1, f"{gone} line(s) of {name}'s lock have no statement with notes any more; "
                            f"run: python tools/notes.py sync {name}"))  # fmt: skip
    return faults


def anchors(text: str) -> set[str]:
    """The anchors of a text, by GitHub's rule for headings, and those it sets itself."""
    count: Counter[str] = Counter()
    found = set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    for heading in read_markdown(text)[1]:
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.text)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(f"{slug}-{count[slug]}" if count[slug] else slug)
        count[slug] += 1
    return found


def link_faults(path: Path, text: str) -> list[Fault]:
    """Relative links of a text at `path` that lead nowhere."""
    try:
        lines, _, fences = read_markdown(text)
    except Broken as error:
        return [error.fault]
    fenced = {at for fence in fences for at in range(fence.first, fence.last + 1)}
    faults = []
    for at, line in enumerate(lines):
        plain = "" if at in fenced else re.sub(r"(`+).+?\1", "", line)
        for link in re.findall(r"\]\(<?([^)\s>]+)|^ {0,3}\[[^\]]+\]:\s*<?([^\s>]+)", plain):
            file, _, anchor = unquote(link[0] or link[1]).partition("#")
            if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", file):
                continue
            target = path.parent / file if file else path
            if not target.exists():
                faults.append(
                    Fault(at + 1, f"the link to {file} leads nowhere; name a file that is there")
                )
            elif anchor and target.suffix == ".md":
                known = anchors(text if target == path else read(target))
                if anchor not in known:
                    near = difflib.get_close_matches(anchor, known, 1)
                    hint = f"nearest is #{near[0]}" if near else "it has no such heading"
                    faults.append(
                        Fault(
                            at + 1, f"the link to #{anchor} in {target.name} leads nowhere; {hint}"
                        )
                    )
    return faults


# --- sync: notes carried to changed code ---------------------------------------------------------


def likeness(one: str, other: str) -> float:
    """How alike two statements are, from 0 to 1."""
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    return matcher.ratio() if matcher.real_quick_ratio() > 0.5 else 0.0


def subject(item: Statement) -> str:
    """What a statement defines, assigns, calls or, in YAML, sets."""
    found = re.match(r"(?:def |class )?[\w.]+(?=\s*[:=(])", item.text)
    return found[0] if found else ""


def renamed(old: Sequence[Statement], new: Sequence[Statement]) -> dict[str, str]:
    """Functions and classes whose name is gone, to the new name under which most of them stands."""
    gone = dict.fromkeys(s.scope for s in old if s.scope not in {s.scope for s in new})
    come = dict.fromkeys(s.scope for s in new if s.scope not in {s.scope for s in old})
    names: dict[str, str] = {}
    for scope in gone:
        mine = [s.text for s in old if s.scope == scope]
        ratios = {
            name: difflib.SequenceMatcher(
                None, mine, [s.text for s in new if s.scope == name]
            ).ratio()
            for name in come
            if name not in names.values()
        }
        best = max(ratios, key=ratios.__getitem__, default="")
        if best and ratios[best] >= 0.5:
            names[scope] = best
    return names


def carry(
    old: Sequence[Statement], new: Sequence[Statement], noted: Iterable[int]
) -> dict[int, int]:
    """Each old statement with notes, and where it has one the new statement that it became.

    Equal text in the same scope comes first: in order, then moved. The rest goes to the likest
    statement of its scope (one between the same neighbours, or with the same subject, counts as
    likelier), then of the file.
    """
    mine, theirs = [(s.scope, s.text) for s in old], [(s.scope, s.text) for s in new]
    matcher = difflib.SequenceMatcher(None, mine, theirs, autojunk=False)
    pairs = {i + k: j + k for i, j, size in matcher.get_matching_blocks() for k in range(size)}
    free = [j for j in range(len(new)) if j not in pairs.values()]
    wanted = [number for number in noted if number not in pairs]
    for i in [*wanted, *(i for i in range(len(old)) if i not in pairs and i not in wanted)]:
        moved = next((j for j in free if theirs[j] == mine[i]), None)
        if moved is not None:
            pairs[i] = moved
            free.remove(moved)
    ends = pairs | {-1: -1, len(old): len(new)}
    for same_scope in (True, False):
        scores = []
        for i in (number for number in wanted if number not in pairs):
            for j in free:
                if same_scope == (old[i].scope == new[j].scope):
                    between = ends.get(i - 1) == j - 1 and ends.get(i + 1) == j + 1
                    score = likeness(old[i].text, new[j].text)
                    if same_scope:
                        score += 0.5 * between + 0.5 * (subject(old[i]) == subject(new[j]) != "")
                    scores.append((-score, abs(i - j), i, j))
        for score, _, i, j in sorted(scores):
            if -score >= (0.5 if same_scope else 0.75) and i not in pairs and j in free:
                pairs[i] = j
                free.remove(j)
    return pairs


def synced(file: str, text: str, source: str, lock: str | None) -> tuple[str, str | None]:
    """A page and its lock after the code became `source`: no note is lost, changes are marked."""
    page = read_page(file, text)
    if page.misplaced:
        raise Broken(page.misplaced[0].line, f"{page.misplaced[0].text}, then sync again")
    locked = set((lock or "").splitlines())
    still = fresh(page)
    if "".join(page.code) == source:
        return text, lock if lock is None else written(locked & set(still.values()))
    language = LANGUAGE[Path(file).suffix]
    if source and not source.endswith("\n"):
        raise Broken(1, f"{file} has no newline at its end; add one")
    for row in sorted(note_lines(source, language)):
        raise Broken(1, f"line {row + 1} of {file} looks like a note; word that comment otherwise")
    new = statements(source, language)
    names = renamed(page.statements, new)
    old = [s._replace(scope=names.get(s.scope, s.scope)) for s in page.statements]
    pairs = carry(old, new, page.noted)

    notes: dict[int, list[str]] = {}
    orphans: list[str] = []
    kept: list[int] = []
    for number, rows in page.noted.items():
        was = old[number]
        group = [page.lines[at].lstrip(" \t") for at in rows]
        if number not in pairs:
            group = [note for note in group if note.strip() != STALE]
            ticks = "`" * (longest_run([was.text, *group]) + 1)
            scope = f"`{was.scope}`" if was.scope else "the top level"
            orphans += [f"\nFrom {scope}:\n\n", f"{ticks}{language}\n", f"{was.text}\n", *group]
            orphans += [f"{ticks}\n"]
            continue
        became = new[pairs[number]]
        changed = (was.scope, was.text) != (became.scope, became.text)
        if changed and not is_stale(page, number):
            group.append(f"{STALE}\n")
        elif still.get(number) in locked:
            kept.append(pairs[number])
        notes[became.last] = [became.indent + note for note in group]

    lines = list(page.lines)
    code = split(source)
    cuts = [0, *cut_points(page, code, new), len(code)]
    for fence, (first, last) in reversed(list(zip(page.held, pairwise(cuts), strict=True))):
        body = [part for at in range(first, last) for part in (code[at], *notes.get(at, []))]
        lines[fence.first + 1 : fence.last] = body
        if (longer := longest_run(body) + 1) > fence.ticks:
            for at in (fence.first, fence.first + 1 + len(body)):
                lines[at] = lines[at].replace("`" * fence.ticks, "`" * longer, 1)
    if orphans and ORPHANS not in [heading.text for heading in page.headings]:
        orphans = [f"\n## {ORPHANS}\n\nTheir code is gone. Move what still holds under its statement, "
                   "then delete this section.\n", *orphans]  # fmt: skip
    if orphans and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    lock = lock if lock is None else written(keys(new[number] for number in sorted(kept)))
    return "".join(lines + orphans), lock


def longest_run(lines: Iterable[str]) -> int:
    """The longest run of backticks in some lines, 2 at least (a fence has one more)."""
    return max(2, *map(len, re.findall("`+", "\n".join(lines))), 0)


def cut_points(page: Page, code: list[str], new: list[Statement]) -> list[int]:
    """Where the new code is cut, between statements, so that each fence keeps its part."""
    matcher = difflib.SequenceMatcher(None, page.code, code, autojunk=False)
    opcodes = matcher.get_opcodes()
    points = [0]
    for fence in page.held[:-1]:
        cut = sum(at < fence.last for at in page.where)
        point = next(
            (min(j1 + cut - i1, j2) for _, i1, i2, j1, j2 in opcodes if i1 <= cut < i2), len(code)
        )
        inside = [s.last + 1 for s in new if s.first < point <= s.last]
        points.append(max(points[-1], inside[0] if inside else point))
    return points[1:]


def written(lines: Iterable[str]) -> str:
    """A lock's text."""
    return "".join(f"{line}\n" for line in sorted(lines))


def accepted(file: str, text: str, lock: str | None, lines: Iterable[int]) -> tuple[str, str]:
    """A page and its lock once the notes at some lines (counted from 1) were read."""
    page = read_page(file, text)
    locked = set((lock or "").splitlines())
    had, drop = locked & set(fresh(page).values()), set()
    chosen = []
    for line in lines:
        for number, rows in page.noted.items():
            item = page.statements[number]
            if page.where[item.first] < line <= max(rows) + 1:
                chosen.append(number)
                drop |= {at for at in rows if page.lines[at].strip() == STALE}
                break
        else:
            raise Broken(
                line, "no statement with notes is here; give a line of the statement or a note"
            )
    held = [number for number, key in fresh(page).items() if key in had]
    numbers = sorted({*held, *chosen})
    text = "".join(line for at, line in enumerate(page.lines) if at not in drop)
    return text, written(keys(page.statements[number] for number in numbers))


def skeleton(file: str, source: str) -> str:
    """A page with all sections still to be written, and the code without notes."""
    ticks = "`" * (longest_run([source]) + 1)
    parts = [f"# {name_of(file)} - Comprehensive Documentation\n"]
    for name in SECTIONS:
        parts.append(f"\n## {name}\n\nTODO: write this section.\n")
        if name == CODE_SECTION:
            parts.append(f"\n{ticks}{LANGUAGE[Path(file).suffix]}\n{source}{ticks}\n")
    return "".join(parts)


# --- files and commands --------------------------------------------------------------------------


class Refused(Exception):
    """A command that cannot do what it was asked; says why and what to do."""


def read(path: Path) -> str:
    """A file's text, its line ends as they are."""
    return path.read_bytes().decode("utf-8")


def write(path: Path, text: str) -> None:
    """Write a file where its text is another than before."""
    if not path.exists() or read(path) != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8"))


def code_files(root: Path) -> dict[str, str]:
    """The name of every page that must be, and its code file."""
    command = ["git", "-C", str(root), "ls-files", "-z"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise Refused(f"{root} is no git checkout: {result.stderr.strip()}; name one with --root")
    files = [file for file in result.stdout.split("\0") if CODE_FILE.fullmatch(file)]
    return {page_of(file): file for file in files if (root / file).exists()}


def lock_path(root: Path, page: str) -> Path:
    """A page's lock: one file each, so that writers of different pages never meet."""
    return root / FOLDER / ".lock" / f"{page.removesuffix('.md')}.lock"


def load(root: Path, page: str, file: str) -> tuple[str, str, str | None]:
    """The texts of a page, its code file and its lock."""
    path, lock = root / FOLDER / page, lock_path(root, page)
    if not path.exists():
        raise Broken(1, f"the page is missing; run: python tools/notes.py new {file}")
    return read(path), read(root / file), read(lock) if lock.exists() else None


def chosen(files: dict[str, str], names: list[str]) -> list[str]:
    """The pages that are meant by names of pages or code files; all without a name."""
    pages = []
    for name in names:
        page = page_of(name) if name in files.values() else Path(name).name
        if page not in files:
            near = difflib.get_close_matches(page, files, 1, 0.3)
            raise Refused(
                f"no code file in git has the page {page}; nearest is {near[0] if near else '-'}"
            )
        pages.append(page)
    return pages or sorted(files)


def check(root: Path, files: dict[str, str], names: list[str]) -> list[str]:
    """Every fault of the pages named, or of all pages and of the links in the project's texts."""
    pages = chosen(files, names)
    faults = []
    for page in pages:
        try:
            found = check_page(files[page], *load(root, page, files[page]))
            found += link_faults(root / FOLDER / page, read(root / FOLDER / page))
        except Broken as error:
            found = [error.fault]
        faults += [f"{FOLDER}/{page}:{line}: {text}" for line, text in found]
    if names:
        return faults
    if not pages:
        faults.append(
            f"{FOLDER}/:1: there are no code files in git; name their checkout with --root"
        )
    known = {*(root / FOLDER / page for page in pages), root / FOLDER / "README.md"}
    for path in sorted({*(root / FOLDER).glob("*.md")} - known):
        faults.append(
            f"{FOLDER}/{path.name}:1: no code file in git has this page; delete or rename it"
        )
    locks = {lock_path(root, page) for page in pages}
    for path in sorted({*(root / FOLDER / ".lock").glob("*")} - locks):
        faults.append(f"{FOLDER}/.lock/{path.name}:1: no code file in git has this lock; delete it")
    for path in (root / name for name in [f"{FOLDER}/README.md", *LINKING]):
        found = (
            link_faults(path, read(path)) if path.exists() else [Fault(1, "is missing; write it")]
        )
        faults += [f"{path.relative_to(root)}:{line}: {text}" for line, text in found]
    return faults


def coverage(
    root: Path, files: dict[str, str], pages: list[str]
) -> list[tuple[str, int, int, int]]:
    """Of each page: its code file, statements to be noted, those with notes, all notes."""
    rows = []
    for page in pages:
        try:
            read_in = read_page(files[page], load(root, page, files[page])[0])
        except Broken:  # check tells; here it has no notes
            here = statements(read(root / files[page]), LANGUAGE[Path(files[page]).suffix])
            rows.append((files[page], sum(not s.is_docstring for s in here), 0, 0))
            continue
        noted = [number for number in read_in.noted if not read_in.statements[number].is_docstring]
        count = sum(not s.is_docstring for s in read_in.statements)
        rows.append((files[page], count, len(noted), sum(map(len, read_in.noted.values()))))
    return rows


def total(rows: list[tuple[str, int, int, int]]) -> str:
    """One line on how much has notes."""
    count, noted, notes = (sum(int(row[at]) for row in rows) for at in (1, 2, 3))
    return (f"{len(rows)} pages, {count:,} statements, {noted:,} with notes "
            f"({noted / max(count, 1):.0%}), {notes:,} notes")  # fmt: skip


def run(root: Path, command: str, names: list[str]) -> int:
    """Do one command; 0 if all is well, else 1."""
    files = code_files(root)
    if command == "check":
        faults = check(root, files, names)
        print("\n".join(faults) or total(coverage(root, files, chosen(files, names))))
        if faults:
            print(f"{len(faults)} faults", file=sys.stderr)
        return bool(faults)
    if command == "coverage":
        rows = coverage(root, files, chosen(files, names))
        width = max(len(row[0]) for row in rows)
        for file, count, noted, _ in rows:
            print(f"{file:{width}}  {count:5}  {noted:5}  {noted / max(count, 1):4.0%}")
        print(total(rows))
        return 0
    if command == "accept":
        return accept(root, files, names)
    failed = 0
    for page in chosen(files, names):
        file, path = files[page], root / FOLDER / page
        if command == "new":
            if path.exists():
                raise Refused(f"{FOLDER}/{page} is there already; delete it to begin anew")
            write(path, skeleton(file, read(root / file)))
            print(f"{FOLDER}/{page}")
            continue
        if not names and not path.exists():
            continue  # not written yet
        try:
            text, source, lock = load(root, page, file)
            if command == "lock":
                lock = written(fresh(read_page(file, text)).values())
            else:
                text, lock = synced(file, text, source, lock)
                write(path, text)
                marks, lost = text.count(STALE), text.count("\nFrom ") * (ORPHANS in text)
                if marks or lost:
                    print(f"{FOLDER}/{page}: {marks} statements with notes to read, {lost} gone")
            if lock is not None:
                write(lock_path(root, page), lock)
        except Broken as error:
            print(f"{FOLDER}/{page}:{error.fault.line}: {error.fault.text}", file=sys.stderr)
            failed = 1
    return failed


def accept(root: Path, files: dict[str, str], names: list[str]) -> int:
    """Take the notes at PAGE:LINE as read."""
    asked: dict[str, list[int]] = {}
    for name in names:
        page, _, line = name.rpartition(":")
        if not line.isdecimal():
            raise Refused(f"{name} has no line; write PAGE:LINE, as check does")
        asked.setdefault(chosen(files, [page])[0], []).append(int(line))
    for page, lines in asked.items():
        try:
            text, source, lock = load(root, page, files[page])
            if "".join(read_page(files[page], text).code) != source:
                raise Refused(
                    f"{page} is behind its code; run first: python tools/notes.py sync {page}"
                )
            text, lock = accepted(files[page], text, lock, lines)
        except Broken as error:
            raise Refused(f"{FOLDER}/{page}:{error.fault.line}: {error.fault.text}") from error
        write(root / FOLDER / page, text)
        write(lock_path(root, page), lock)
    return 0


COMMANDS = {
    "check": "tell every fault of the pages (of all, and of the links, without PAGE)",
    "coverage": "print how many statements have notes",
    "new": "write a page's skeleton (for a code FILE)",
    "sync": "carry the notes to code that has changed",
    "accept": "take the notes at PAGE:LINE as read",
    "lock": "lock all notes of a page that was just written",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent,
                             help="the checkout (default: the one this file is in)")  # fmt: skip
        kind = {"new": "FILE", "accept": "PAGE:LINE"}.get(name, "PAGE")
        command.add_argument("names", nargs="+" if name in ("new", "accept") else "*", metavar=kind)
    chosen_ones = parser.parse_args(arguments)
    try:
        return run(chosen_ones.root, chosen_ones.command, chosen_ones.names)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
