"""Keep the line-by-line pages in COMMENTED_CODE/ true to the code that they explain.

    python tools/notes.py check [PAGE...]          report what is wrong on some pages, or on all
    python tools/notes.py sync [PAGE...]           put the code as it is now into the pages
    python tools/notes.py accept PAGE[:LINE]...    take the notes of a statement, or of a page, as read

A page holds one file of src/etude (or config.yml) in full, in one fenced block, with notes between
its lines:

    total = sum(losses)
    # WHAT: adds the losses of all passes.
    # WHY: a step's loss is one number, however many passes it took.

A note is one physical line, `# KIND: text`, with a KIND of WHAT, WHY, HOW, BENEFIT or TRADE-OFF. It
stands directly under the last line of its statement, indented like the statement's first line. The
statement of a compound (def, class, if, else, ...) is its header: the notes stand between header and
body, at the header's indent. A docstring needs no note. In YAML a statement is a key and its value.

Without its notes, a page's code equals the file byte for byte. `sync` carries each note to what its
statement has become; pages that are named together exchange the notes of code that moved between
their files, and a page that is missing is begun. A lock (COMMENTED_CODE/.lock/) remembers which
statement each note was accepted for, so that changed code never keeps old notes unread.
"""

import argparse
import difflib
import re
import sys
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from urllib.parse import unquote

from notes_page import (
    CODE_SECTION,
    FOLDER,
    LANGUAGE,
    NOTE,
    Fault,
    Page,
    Statement,
    keys,
    name_of,
    page_of,
    read_markdown,
    read_page,
    split,
    statements,
    ticks,
)

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ["Overview", "Benefits", "Trade-offs", "Requirements", CODE_SECTION,
            "Usage Examples", "Common Issues & Solutions", "Related Files"]  # fmt: skip
ORPHANS = "Orphaned notes"
# Here every statement has a WHAT and a WHY. Elsewhere every function and class has at least one
# WHAT, and so have the statements of the top level together.
STRICT = ["main.py", "train_with_config.py", "evaluation.py", "chat.py", "config.yml"]
ALMOST = re.compile(r"\s*#+\s*(what|why|how|benefits?|trade-?offs?)\s*:", re.IGNORECASE)
MISPLACED = "the note does not stand directly under a whole statement; move it there"
SYNC = "run: python tools/notes.py sync"
ACCEPT = "python tools/notes.py accept"


# --- files ----------------------------------------------------------------------------------------


def read(path: Path) -> str:
    """A file's text, its line ends as they are."""
    return path.read_bytes().decode()


def write(path: Path, text: str) -> None:
    """Write a file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def code_files(root: Path) -> dict[str, str]:
    """The name of every page that must be, and its code file. A package's docstring needs none."""
    found = {}
    for path in [*sorted(root.glob("src/etude/**/*.py")), root / "config.yml"]:
        file = path.relative_to(root).as_posix()
        package = path.name == "__init__.py"
        if not package or any(not item.is_docstring for item in statements(file, read(path))):
            found[page_of(file)] = file
    return found


def lock_path(root: Path, name: str) -> Path:
    """A page's lock: one file each, so that writers of different pages never meet."""
    return root / FOLDER / ".lock" / f"{name.removesuffix('.md')}.lock"


def load(root: Path, name: str, file: str) -> tuple[Page, set[str], str]:
    """A page, its lock and its code; raises Fault where there is no page, or can be none."""
    path, lock, source = root / FOLDER / name, lock_path(root, name), read(root / file)
    for at, line in enumerate(split(source)):
        if NOTE.match(line) or not line.endswith("\n"):
            wrong = "looks like a note; word it otherwise" if NOTE.match(line) else "has no newline"
            raise Fault(file, at, f"this line {wrong}")
    if not path.exists():
        raise Fault(f"{FOLDER}/{name}", 0, f"the page is missing; {SYNC} {name}")
    page = read_page(file, read(path))
    return page, set(read(lock).splitlines()) if lock.exists() else set(), source


def write_lock(root: Path, name: str, lines: Iterable[str]) -> None:
    """Write a page's lock."""
    write(lock_path(root, name), "".join(f"{line}\n" for line in sorted(lines)))


# --- check ----------------------------------------------------------------------------------------


def check_page(page: Page, lock: set[str], source: str) -> list[Fault]:
    """Every fault of one page but its links', in the order of its lines."""
    faults = list(code_faults(page, source))
    if not faults:  # else what stands under its statements is beside the point
        faults = [*note_faults(page), *lock_faults(page, lock)]
    return sorted([*outline_faults(page), *faults], key=lambda fault: fault.at)


def title(file: str) -> str:
    """The first line of a code file's page."""
    return f"# {name_of(file)} - Comprehensive Documentation\n"


def outline_faults(page: Page) -> Iterator[Fault]:
    """Title, sections and what is still to be written or moved."""
    if page.lines[0] != title(page.file):
        yield page.fault(0, f'the title is not "{title(page.file).rstrip()}"; write that')
    found = [h.text for h in page.headings if h.level == 2 and h.text in SECTIONS]
    if found != SECTIONS:
        names = ", ".join(SECTIONS)
        yield page.fault(0, f"the sections are {', '.join(found)}; they must be {names}")
    for heading in page.headings:
        if heading.text == ORPHANS:
            yield page.fault(heading.line, "notes whose code is gone; move what still holds "
                             "under its statement, then delete this section")  # fmt: skip
    for at, line in enumerate(page.lines):
        if line.startswith("TODO") and not any(f.first < at < f.last for f in page.fences):
            yield page.fault(at, "still to be written; write it and delete the TODO")


def code_faults(page: Page, source: str) -> Iterator[Fault]:
    """The first difference between the page's code and the file."""
    true = split(source)
    for number, (mine, other) in enumerate(zip_longest(page.code, true)):
        if mine != other:
            at = page.where[number] if number < len(page.where) else page.held.last
            wrong = f"is {other.rstrip()!r:.70}" if number < len(true) else "is behind its end"
            yield page.fault(at, f"the code is not that of {page.file}, whose line {number + 1} "
                             f"{wrong}; {SYNC} {page_of(page.file)}")  # fmt: skip
            break


def note_faults(page: Page) -> Iterator[Fault]:
    """Notes in the wrong place or form, and statements without the notes they must have."""
    yield from (page.fault(at, MISPLACED) for at in page.misplaced)
    for number, lines in page.noted.items():
        indent = page.statements[number].indent
        for at in lines:
            if not re.match(rf"{indent}# [A-Z-]+: \S", page.lines[at]):
                yield page.fault(at, "write the note as `# WHAT: text`, behind as many blanks as "
                                 f"its statement, {len(indent)}")  # fmt: skip
    for number, kinds in lacking(page).items():
        item = page.statements[number]
        yield page.fault(page.where[item.first], f"no {kinds} for {item.text!r:.70}; "
                         f"write it under line {page.where[item.last] + 1}")  # fmt: skip


def lacking(page: Page) -> dict[int, str]:
    """Statements that lack notes which they must have, and the kinds that are missing."""
    strict = name_of(page.file) in STRICT
    groups: dict[int | str, list[int]] = {}  # statements, by what must have notes
    for number, item in enumerate(page.statements):
        if not item.is_docstring:
            groups.setdefault(number if strict else item.scope, []).append(number)
    lacks = {}
    for numbers in groups.values():
        has = {note.partition(":")[0] for number in numbers for note in page.notes(number)}
        missing = [kind for kind in ("WHAT", "WHY")[: 1 + strict] if f"# {kind}" not in has]
        if missing:
            lacks[numbers[0]] = " and no ".join(missing)
    return lacks


def lock_faults(page: Page, lock: set[str]) -> Iterator[Fault]:
    """Statements whose notes were accepted for another statement, or not yet."""
    for number, key in keys(page.statements, page.noted).items():
        if key not in lock:
            at = page.where[page.statements[number].first]
            yield page.fault(at, "the statement is new or changed since its notes were accepted; read "
                             f"them, then run: {ACCEPT} {page_of(page.file)}:{at + 1}")  # fmt: skip


def anchors(place: str, text: str) -> set[str]:
    """The anchors of a text's headings, by GitHub's rule."""
    headings = [heading.text for heading in read_markdown(place, text)[1]]
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def link_faults(root: Path, path: Path) -> Iterator[Fault]:
    """Relative links of a Markdown file that lead nowhere."""
    place = str(path.relative_to(root))
    lines, _, fences = read_markdown(place, read(path))
    for at, line in enumerate(lines):
        links = re.findall(r"\]\(<?([^)\s>]+)", re.sub(r"(`+).+?\1", "", line))
        for link in links if not any(f.first < at < f.last for f in fences) else []:
            file, _, anchor = unquote(link).partition("#")
            target = path.parent / file if file else path
            if re.match(r"[a-z]+:", file):
                continue
            if not target.exists():
                yield Fault(place, at, f"there is no {file}; link to a file that is there")
            elif anchor and target.suffix == ".md":
                known = anchors(file, read(target))
                if anchor not in known:
                    near = nearest(anchor, known)
                    yield Fault(place, at, f"no #{anchor} in {target.name}; nearest is #{near}")


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is most like another."""
    return next(iter(difflib.get_close_matches(word, list(known), 1, 0)), "nothing")


def check(root: Path, files: dict[str, str], names: Iterable[str]) -> list[Fault]:
    """Every fault of the pages named, or of all pages and of the links in the project's texts."""
    folder, faults = root / FOLDER, []
    pages = {folder / name for name in names or files}
    texts = [folder / "README.md", *root.glob("*.md"), *root.glob("docs/*.md")]
    for path in sorted(pages if names else pages.union(texts)):
        try:
            if path in pages:
                faults += check_page(*load(root, path.name, files[path.name]))
            faults += link_faults(root, path)
        except Fault as fault:
            faults.append(fault)
    known = pages | {folder / "README.md"} | {lock_path(root, name) for name in files}
    strays = {*folder.glob("*.md"), *folder.glob(".lock/*")} - known if not names else set()
    wrong = "belongs to no code file; rename or delete it"
    return faults + [Fault(str(path.relative_to(root)), 0, wrong) for path in sorted(strays)]


# --- sync and accept ------------------------------------------------------------------------------


def likeness(one: str, other: str) -> float:
    """How much of two statements' words and signs is the same, from 0 to 1."""
    a, b = (Counter(re.findall(r"\w+|[^\w\s]", text)) for text in (one, other))
    return 2 * (a & b).total() / (a + b).total()


def subject(text: str) -> str | None:
    """What a statement defines, assigns, calls or, in YAML, sets."""
    found = re.match(r"(?:def |class )?[\w.]+(?=\s*[:=(])", text)
    return found[0] if found else None


def aligned(old: Sequence[Hashable], new: Sequence[Hashable]) -> dict[int, int]:
    """The places of what is the same in two sequences, in the same order."""
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
    return {i + k: j + k for i, j, size in blocks for k in range(size)}


def renamed(old: Sequence[Statement], new: Sequence[Statement]) -> list[Statement]:
    """The old statements under the new names of their functions and classes."""
    same = aligned([item.text for item in old], [item.text for item in new])
    before, after = {item.scope for item in old}, {item.scope for item in new}
    both = Counter((old[i].scope, new[j].scope) for i, j in same.items())
    names = {}
    for (gone, come), _ in reversed(both.most_common()):
        if gone not in after and come not in before:
            names[gone] = come
    return [item._replace(scope=names.get(item.scope, item.scope)) for item in old]


def carry(
    old: Sequence[Statement], new: Sequence[Statement], noted: Collection[int]
) -> dict[int, int]:
    """Each old statement with notes, and where it has one the new statement that it became.

    Equal text in the same scope comes first: in order, then moved. The rest goes to the likest
    statement of its scope (one between the same neighbours, or with the same subject, counts as
    likelier), then of all.
    """
    mine, theirs = [(s.scope, s.text) for s in old], [(s.scope, s.text) for s in new]
    pairs = aligned(mine, theirs)
    taken = {pairs[i] for i in noted if i in pairs}
    for i in [i for i in noted if i not in pairs]:
        moved = next((j for j in range(len(new)) if theirs[j] == mine[i] and j not in taken), None)
        if moved is not None:
            pairs[i] = moved
            taken.add(moved)
    free = [j for j in range(len(new)) if j not in set(pairs.values())]
    for i in [i for i in range(len(old)) if i not in noted and i not in pairs]:
        free = [j for j in free if theirs[j] != mine[i]]  # code without notes that moved
    ends = pairs | {-1: -1, len(old): len(new)}
    for same_scope, least in ((True, 0.5), (False, 0.75)):
        scores = []
        for i in (i for i in noted if i not in pairs):
            for j in (j for j in free if same_scope == (old[i].scope == new[j].scope)):
                score = likeness(old[i].text, new[j].text)
                if same_scope:
                    score += 0.5 * (ends.get(i - 1) == j - 1 and ends.get(i + 1) == j + 1)
                    score += 0.5 * (subject(old[i].text) == subject(new[j].text) is not None)
                if score >= least:
                    scores.append((-score, abs(i - j), i, j))
        for _, _, i, j in sorted(scores):
            if i not in pairs and j in free:
                pairs[i] = j
                free.remove(j)
    return pairs


def sync(root: Path, files: dict[str, str], names: Iterable[str]) -> None:
    """Put the code as it is now into some pages. No note is lost; accepted are those as before."""
    loaded = []
    old: list[Statement] = []  # of all pages, as new
    noted: dict[int, list[str]] = {}
    accepted: set[int] = set()
    for name in names:
        if not (root / FOLDER / name).exists():
            write(root / FOLDER / name, skeleton(files[name]))
        page, lock, source = load(root, name, files[name])
        refuse_losses(page, source)
        loaded.append((page, source))
        found = keys(page.statements, page.noted)
        accepted |= {len(old) + number for number, key in found.items() if key in lock}
        noted |= {len(old) + number: page.notes(number) for number in page.noted}
        old += page.statements
        for item, notes in orphans(page):
            noted[len(old)] = notes
            old.append(item)
    new = [item for page, source in loaded for item in statements(page.file, source)]
    old = renamed(old, new)
    pairs = carry(old, new, noted)
    came = {j: i for i, j in pairs.items() if i in noted}
    same = {j for j, i in came.items() if i in accepted and old[i].identity == new[j].identity}
    for page, source in loaded:
        mine = [j for j, item in enumerate(new) if item.file == page.file]
        body = split(source)
        for j in reversed([j for j in mine if j in came]):
            at = new[j].last + 1
            body[at:at] = [new[j].indent + note for note in noted[came[j]]]
        gone = [(old[i], noted[i]) for i in noted if i not in pairs and old[i].file == page.file]
        name = page_of(page.file)
        write(root / FOLDER / name, rewritten(page, body, gone))
        found = keys([new[j] for j in mine], [k for k, j in enumerate(mine) if j in came])
        kept = [key for k, key in found.items() if mine[k] in same]
        write_lock(root, name, kept)
        if gone or len(kept) < len(found):
            print(f"{FOLDER}/{name}: {len(found) - len(kept)} statements whose notes are to be read, "
                  f"{len(gone)} that are gone; run: python tools/notes.py check {name}")  # fmt: skip


def orphaned(page: Page) -> int:
    """The line where a page's section for notes without code begins, with the blank line above."""
    starts = [heading.line - 1 for heading in page.headings if heading.text == ORPHANS]
    return min(starts, default=len(page.lines))


def orphans(page: Page) -> list[tuple[Statement, list[str]]]:
    """The statements and notes of that section, as rewritten() writes them."""
    found = []
    for fence in [fence for fence in page.fences if fence.first > orphaned(page)]:
        block = page.lines[fence.first + 1 : fence.last]
        text = "".join(line for line in block if not NOTE.match(line)).rstrip()
        scope = page.lines[fence.first - 2].partition("`")[2].partition("`")[0]
        item = Statement(0, 0, "", text, "" if scope == page.file else scope, file=page.file)
        found.append((item, [line for line in block if NOTE.match(line)]))
    return found


def skeleton(file: str) -> str:
    """A page with all sections still to be written, and no code."""
    parts = [title(file)]
    for name in SECTIONS:
        parts.append(f"\n## {name}\n\nTODO: write this section.\n")
        if name == CODE_SECTION:
            parts.append(f"\n```{LANGUAGE[Path(file).suffix]}\n```\n")
    return "".join(parts)


def refuse_losses(page: Page, source: str) -> None:
    """Raise Fault for what is a note by intention only, and would be lost with the old code."""
    for at in page.misplaced:
        raise page.fault(at, f"{MISPLACED}, then sync again")
    true = set(split(source))
    for at, line in zip(page.where, page.code, strict=True):
        if ALMOST.match(line) and line not in true:
            raise page.fault(at, "this looks like a note and is none; write `# WHAT: text`")


def rewritten(page: Page, body: list[str], gone: list[tuple[Statement, list[str]]]) -> str:
    """A page with other code and notes in its block, and the notes of code that is gone at its end."""
    language, fence = page.held.language, ticks(*body)
    parts = [title(page.file), *page.lines[1 : page.held.first], f"{fence}{language}\n", *body]
    parts += [f"{fence}\n", *page.lines[page.held.last + 1 : orphaned(page)]]
    if gone:
        parts.append(f"\n## {ORPHANS}\n\nTheir code is gone. Move what still holds under its "
                     "statement, then delete this section.\n")  # fmt: skip
    for item, notes in gone:
        block = "".join([f"{item.text}\n", *notes])
        parts.append(f"\nFrom `{item.scope or page.file}`:\n\n")
        parts.append(f"{ticks(block)}{language}\n{block}{ticks(block)}\n")
    return "".join(parts)


def accept(root: Path, name: str, file: str, line: int | None) -> None:
    """Take the notes of the statement at a line of a page as read; without a line, all."""
    page, lock, source = load(root, name, file)
    if page.code != split(source):
        raise page.fault(0, f"the page is behind its code; {SYNC} {name}")
    found = keys(page.statements, page.noted)
    if line:
        starts = {number: page.where[page.statements[number].first] + 1 for number in found}
        found = {n: key for n, key in found.items() if starts[n] <= line <= page.noted[n][-1] + 1}
        if not found:
            raise page.fault(line - 1, "here is no statement with notes")
    lock |= set(found.values())
    write_lock(root, name, lock.intersection(keys(page.statements, page.noted).values()))


# --- the command line -----------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", choices=["check", "sync", "accept"], help=f"see {__file__}")
    parser.add_argument("names", nargs="*", metavar="PAGE", help="accept has PAGE:LINE, too")
    options = parser.parse_args(arguments)
    files = code_files(root)
    asked: list[tuple[str, int | None]] = []
    for word in options.names:
        name, _, line = word.partition(":")
        name = page_of(name) if name in files.values() else Path(name).name
        if name not in files:
            parser.error(f"no code file has the page {name}; nearest is {nearest(name, files)}")
        asked.append((name, int(line) if line else None))
    if options.command == "accept" and not asked:
        parser.error("accept needs PAGE:LINE, or PAGE for all of its notes")
    names = list(dict.fromkeys(name for name, _ in asked))
    try:
        if options.command == "check":
            faults = check(root, files, names)
            print("\n".join(map(str, faults)) or f"{len(names or files)} pages without a fault")
            return bool(faults)
        if options.command == "sync":
            sync(root, files, names or files)
        else:
            for name, line in asked:
                accept(root, name, files[name], line)
    except Fault as fault:
        print(fault, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
