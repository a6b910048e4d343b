"""Notes carried to code that has changed, and marked there until they were read (see notes.py)."""

import difflib
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from notes_page import (
    LANGUAGE,
    ORPHANS,
    STALE,
    Broken,
    Page,
    Statement,
    fresh,
    is_stale,
    keys,
    kind,
    longest_run,
    note_lines,
    read_page,
    split,
    statements,
    written,
)

ALMOST = re.compile(r"\s*#+\s*(what|why|how|benefits?|trade-?offs?)\s*:", re.IGNORECASE)


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
    for same_scope, least in ((True, 0.5), (False, 0.75)):
        scores = []
        for i in (number for number in wanted if number not in pairs):
            alike = difflib.SequenceMatcher(None, "", old[i].text, autojunk=False)
            for j in (j for j in free if same_scope == (old[i].scope == new[j].scope)):
                score = 0.0
                if same_scope:
                    score += 0.5 * (ends.get(i - 1) == j - 1 and ends.get(i + 1) == j + 1)
                    score += 0.5 * (subject(old[i]) == subject(new[j]) != "")
                alike.set_seq1(new[j].text)
                # The first two are upper bounds of the third, and soon computed.
                ratios = (alike.real_quick_ratio, alike.quick_ratio, alike.ratio)
                if all(score + ratio() >= least for ratio in ratios):
                    scores.append((-score - alike.ratio(), abs(i - j), i, j))
        for _, _, i, j in sorted(scores):
            if i not in pairs and j in free:
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
    for at, line in zip(page.where, page.code, strict=True):
        if ALMOST.match(line) and line not in split(source):
            raise Broken(
                at + 1, "this looks like a note and is none; write `# WHAT: text` or delete it"
            )
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
            group = [note for note in group if kind(note) != "STALE"]
            ticks = "`" * max(3, longest_run([was.text, *group]) + 1)
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
                drop |= {at for at in rows if kind(page.lines[at]) == "STALE"}
                break
        else:
            raise Broken(line, "no statement with notes is here; give a line of it or of a note")
    held = [number for number, key in fresh(page).items() if key in had]
    numbers = sorted({*held, *chosen})
    text = "".join(line for at, line in enumerate(page.lines) if at not in drop)
    return text, written(keys(page.statements[number] for number in numbers))
