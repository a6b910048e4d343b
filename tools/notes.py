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
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from urllib.parse import unquote

from notes_page import (
    CODE_SECTION,
    LANGUAGE,
    NOTE,
    ORPHANS,
    Broken,
    Fault,
    Page,
    fresh,
    is_stale,
    kind,
    kinds,
    longest_run,
    name_of,
    page_of,
    read_markdown,
    read_page,
    section,
    split,
    statements,
    written,
)
from notes_sync import accepted, synced

FOLDER = "COMMENTED_CODE"
SECTIONS = ["Overview", "Benefits", "Trade-offs", "Requirements", CODE_SECTION,
            "Usage Examples", "Common Issues & Solutions", "Related Files"]  # fmt: skip
LINKING = ["README.md", "PROJECT_FLOW.md", "CONTRIBUTING.md"]  # checked for links beside the pages
CODE_FILE = re.compile(r"src/etude/.+\.py|config\.yml")
# Here every statement has a WHAT and a WHY. Elsewhere every function, class and run of top-level
# statements has at least one WHAT.
STRICT = {"main.py", "train_with_config.py", "evaluation.py", "chat.py", "config.yml"}


# --- check ----------------------------------------------------------------------------------------


def check_page(file: str, text: str, source: str, lock: str | None) -> list[Fault]:
    """Every fault of one page, in the order of its lines."""
    try:
        page = read_page(file, text)
        faults = code_faults(file, page, source)
        if not faults:  # else what stands under its statements is beside the point
            faults = note_faults(file, page) + lock_faults(file, page, lock)
        return sorted(outline_faults(file, page) + faults)
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
        else:
            within = section(page.headings, name, len(page.lines))
            if not any(page.lines[at].strip() for at in within[1:]):
                faults.append(
                    Fault(within.start + 1, f'the section "## {name}" is empty; write it')
                )
    wrong = [
        pair
        for pair in zip(found, sorted(names, key=SECTIONS.index), strict=True)
        if pair[0].text != pair[1]
    ]
    for heading, name in wrong[:1]:
        faults.append(Fault(heading.line + 1, f'"## {name}" should stand here; the order is '
                            + ", ".join(SECTIONS)))  # fmt: skip
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
        if fence.ticks <= longest_run(page.lines[fence.first + 1 : fence.last]):
            return [Fault(fence.first + 1, "the fence is no longer than a run of backticks in the "
                          "code; lengthen both its ends")]  # fmt: skip
    return []


def shown(line: str) -> str:
    """A line of code as a message shows it."""
    return repr(line.rstrip("\n") if len(line) < 70 else line[:66] + " ...")


def note_faults(file: str, page: Page) -> list[Fault]:
    """Notes in the wrong place or form, marks of changes, and statements without notes."""
    faults = list(page.misplaced)
    for number, lines in page.noted.items():
        indent = page.statements[number].indent
        for at in lines:
            line = page.lines[at]
            if not re.search(r"# [A-Z-]+: \S", line):
                faults.append(Fault(at + 1, "the note has no text; write `# WHAT: text`"))
            if line[: line.index("#")] != indent:
                faults.append(Fault(at + 1, "the note is not indented like its statement; begin it "
                                    f"with {len(indent)} blanks"))  # fmt: skip
            if kind(line) == "STALE":
                faults.append(Fault(at + 1, "the statement above changed; read its notes, then run: "
                                    f"python tools/notes.py accept {page_of(file)}:{at + 1}"))  # fmt: skip
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
                faults.append(Fault(at + 1, f"there is no {file}; link to a file that is there"))
            elif not anchor or target.suffix != ".md":
                continue
            elif anchor not in (known := anchors(text if target == path else read(target))):
                near = difflib.get_close_matches(anchor, known, 1, 0) or ["nothing"]
                wrong = f"there is no #{anchor} in {target.name}; nearest is #{near[0]}"
                faults.append(Fault(at + 1, wrong))
    return faults


# --- files ----------------------------------------------------------------------------------------


class Refused(Exception):
    """A command that cannot do what it was asked; says why and what to do."""


def read(path: Path) -> str:
    """A file's text, its line ends as they are."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is not UTF-8 ({error.reason}); save it as that") from error


def write(path: Path, text: str) -> None:
    """Write a file where its text is another than before."""
    if not path.exists() or read(path) != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8"))


def code_files(root: Path) -> dict[str, str]:
    """The name of every page that must be, and its code file. A package's docstring needs none."""
    command = ["git", "-C", str(root), "ls-files", "-z"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise Refused(f"{root} is no git checkout: {result.stderr.strip()}; name one with --root")
    files = [file for file in result.stdout.split("\0") if CODE_FILE.fullmatch(file)]
    return {
        page_of(file): file
        for file in files
        if (root / file).exists()
        and not (file.endswith("__init__.py") and is_docstring(read(root / file)))
    }


def is_docstring(source: str) -> bool:
    """Whether Python code is a docstring at most."""
    return all(item.is_docstring for item in statements(source, "python"))


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
            near = difflib.get_close_matches(page, files, 1, 0) or ["nothing"]
            raise Refused(f"no code file in git has the page {page}; nearest is {near[0]}")
        pages.append(page)
    return pages or sorted(files)


# --- commands -------------------------------------------------------------------------------------


def skeleton(file: str, source: str) -> str:
    """A page with all sections still to be written, and the code without notes."""
    ticks = "`" * max(3, longest_run([source]) + 1)
    parts = [f"# {name_of(file)} - Comprehensive Documentation\n"]
    for name in SECTIONS:
        parts.append(f"\n## {name}\n\nTODO: write this section.\n")
        if name == CODE_SECTION:
            parts.append(f"\n{ticks}{LANGUAGE[Path(file).suffix]}\n{source}{ticks}\n")
    return "".join(parts)


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
        faults.append(f"{FOLDER}/:1: git has no code files here; name their checkout with --root")
    folder = root / FOLDER
    known = {
        *(folder / page for page in pages),
        folder / "README.md",
        *(lock_path(root, p) for p in pages),
    }
    for path in sorted({*folder.glob("*.md"), *folder.glob(".lock/*")} - known):
        faults.append(
            f"{path.relative_to(root)}:1: belongs to no code file in git; delete or rename it"
        )
    for name in [f"{FOLDER}/README.md", *LINKING]:
        missing = [Fault(1, "the file is missing; write it")]
        found = link_faults(root / name, read(root / name)) if (root / name).exists() else missing
        faults += [f"{name}:{line}: {text}" for line, text in found]
    return faults


def coverage(
    root: Path, files: dict[str, str], pages: list[str]
) -> list[tuple[str, int, int, int]]:
    """Of each page: its code file, statements to be noted, those with notes, all notes."""
    rows = []
    for file in (files[page] for page in pages):
        try:
            page = read_page(file, load(root, page_of(file), file)[0])
        except Broken:  # missing, for one; check tells
            page = read_page(file, skeleton(file, read(root / file)))
        to_note = [number for number, s in enumerate(page.statements) if not s.is_docstring]
        noted = [number for number in to_note if number in page.noted]
        rows.append((file, len(to_note), len(noted), sum(map(len, page.noted.values()))))
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
            print(f"{len(faults)} fault{'s' * (len(faults) > 1)}", file=sys.stderr)
        return bool(faults)
    if command == "coverage":
        rows = coverage(root, files, chosen(files, names))
        width = max((len(row[0]) for row in rows), default=0)
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
                after = read_page(file, text)
                marks = sum(is_stale(after, number) for number in after.noted)
                gone = text.partition(f"\n## {ORPHANS}\n")[2].count("\nFrom ")
                if marks or gone:
                    print(f"{FOLDER}/{page}: {marks} changed statements whose notes are to be read, {gone} "
                          f"that are gone; run: python tools/notes.py check {page}")  # fmt: skip
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
