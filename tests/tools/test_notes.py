"""tools/notes.py: pages equal their code, every drift is seen, and sync loses no note."""

import random
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))  # as for python tools/notes.py

import notes  # noqa: E402
import notes_page  # noqa: E402
import notes_sync  # noqa: E402

FILES = sorted(notes.code_files(ROOT).values())
SOURCES = {file: notes.read(ROOT / file) for file in FILES}
PYTHON = [
    file
    for file in FILES
    if file.endswith(".py") and notes_page.statements(SOURCES[file], "python")
]


def language(file):
    return notes_page.LANGUAGE[Path(file).suffix]


def page(file, source, wanted=lambda number: True, cuts=()):
    """A finished page: WHAT and WHY, each with a text of its own, under every wanted statement."""
    under = {}
    for number, item in enumerate(notes_page.statements(source, language(file))):
        if wanted(number) and not item.is_docstring:
            kinds = [
                f"{item.indent}# {kind}: {kind.lower()} of {number}.\n" for kind in ("WHAT", "WHY")
            ]
            under[item.last] = kinds
    text = notes.skeleton(file, source).replace("\nTODO: write this section.\n", "\nSome prose.\n")
    head, _, rest = text.partition(f"{language(file)}\n")
    tail = rest[len(source) :]
    ticks = tail.partition("\n")[0]
    cut = f"{ticks}\n\nMore prose.\n\n{ticks}{language(file)}\n"
    lines = [
        part
        for at, line in enumerate(notes_page.split(source))
        for part in ((cut if at in cuts else "") + line, *under.get(at, []))
    ]
    return f"{head}{language(file)}\n{''.join(lines)}{tail}"


def lock(file, text):
    return notes_page.written(notes_page.fresh(notes_page.read_page(file, text)).values())


def faults(file, text, source):
    return notes.check_page(file, text, source, lock(file, text))


def texts(text):
    """Every note of a page, wherever it stands, marks left out."""
    lines = (line.strip() for line in text.splitlines())
    return Counter(
        line for line in lines if notes_page.NOTE.match(line) and line != notes_page.STALE
    )


# --- pages and code ------------------------------------------------------------------------------


def test_files_are_found_and_no_two_share_a_page():
    assert {"src/etude/chat.py", "config.yml"} <= set(FILES)
    assert not any(file.startswith(("tests/", "tools/", "benchmarks/")) for file in FILES)
    assert (
        len(notes.code_files(ROOT))
        == len({notes_page.page_of(file) for file in FILES})
        == len(FILES)
    )
    assert notes_page.page_of("src/etude/chat.py") == "chat.py.md"
    assert notes_page.page_of("src/etude/engine/packing.py") == "engine-packing.py.md"


@pytest.mark.parametrize("file", FILES)
def test_a_skeleton_holds_the_code_and_only_writing_is_missing(file):
    text = notes.skeleton(file, SOURCES[file])
    assert "".join(notes_page.read_page(file, text).code) == SOURCES[file]
    found = notes.check_page(file, text, SOURCES[file], None)
    assert sum("TODO" in fault.text for fault in found) == len(notes.SECTIONS)
    assert all(fault.text.startswith(("still to", "no lock", "no WHAT")) for fault in found)


@pytest.mark.parametrize("file", FILES)
def test_a_finished_page_has_no_fault(file):
    text = page(file, SOURCES[file])
    assert texts(text).total() > SOURCES[file].count("\n") / 20
    assert faults(file, text, SOURCES[file]) == []
    read = notes_page.read_page(file, text)
    assert "".join(read.code) == SOURCES[file]
    assert len(read.noted) == sum(not s.is_docstring for s in read.statements)
    cut = page(file, SOURCES[file], cuts=[s.first for s in read.statements[3::40]])
    assert faults(file, cut, SOURCES[file]) == []


# --- traps of the tokenizer ----------------------------------------------------------------------

TRAPS = '''"""Module.

# WHAT: this is a string
"""

import os as \\
    system


@decorate(
    1,  # one
)
@other
async def f(a, *, b="# WHY: no"):
    """Docstring."""
    text = """
# WHAT: a string
    ``` and ````
# WHY: string""" + 'x'  # end
    if a: return text
    def inner():
\t    return {
            "key": 1,
        }
    else_ = 1; other = 2
    try:
        pass
    except* ValueError:
        pass
    else:
        async with x as y, \\
                z:
            pass
    return "ünï\u2028code\x0b" + \\
        "end"
\x0c
class C(
    Base,
):

    x: int = 1
    # a comment

    def m(self): return 1
'''


def test_traps():
    found = notes_page.statements(TRAPS, "python")
    heads = [(s.text.split("\n")[0], s.scope) for s in found]
    assert heads[:6] == [
        ('"""Module.', ""), ("import os as \\", ""), ("@decorate(", "f"), ("@other", "f"),
        ('async def f(a, *, b="# WHY: no"):', "f"), ('"""Docstring."""', "f"),
    ]  # fmt: skip
    assert heads[6:10] == [
        ('text = """', "f"), ("if a: return text", "f"), ("def inner():", "f.inner"),
        ("return {", "f.inner"),
    ]  # fmt: skip
    assert heads[-4:-1] == [
        ('return "ünï\u2028code\x0b" + \\', "f"),
        ("class C(", "C"),
        ("x: int = 1", "C"),
    ]
    assert heads[-1] == ("def m(self): return 1", "C.m")
    assert [s.is_docstring for s in found].count(True) == 2
    assert len({s.block for s in found}) == 5
    text = page("src/etude/x.py", TRAPS)
    assert "`````python" in text
    assert faults("src/etude/x.py", text, TRAPS) == []
    assert len(texts(text)) == 2 * (len(found) - 2) + 3


@pytest.mark.parametrize(
    "source", ["", "# only a comment\n", "x = 1\r\nif x:\r\n    y = '''\r\n'''\r\n", "\tx\n"[1:]]
)
def test_odd_files(source):
    text = page("src/etude/x.py", source)
    assert faults("src/etude/x.py", text, source) == []


@pytest.mark.parametrize(
    ("code", "line", "wrong"),
    [
        (
            "f(\n    # WHAT: no\n    1)\n",
            2,
            "the note stands inside a statement; move it under line",
        ),
        ("x = 1\n\n# WHAT: no\n", 3, "the note does not stand directly under a statement"),
        ("# WHAT: no\nx = 1\n", 1, "the note does not stand directly under a statement"),
        ("x = 1 + \\\n# WHAT: no\n  2\n", 2, "the note stands inside a statement"),
        (
            "if x:\n    y\n# WHAT: no\n",
            3,
            "the note is not indented like its statement; begin it with 4",
        ),
        ("x = 1\n# WHAT:\n", 2, "the note has no text"),
        ("x = 1\n# WHY: because\n", 1, "no WHAT in the block that begins here: 'x = 1'"),
        ("x = 1\n# Why: because\n", 2, "the code goes on after the end"),
        (
            'x = """\n# WHY: because\n"""\n',
            2,
            "the code is not that of src/etude/x.py, whose line 2 is",
        ),
        (
            "x = (\n# WHAT: no\n",
            3,
            "not Python: EOF in multi-line statement; compare with src/etude/x.py",
        ),
    ],
)
def test_notes_in_the_wrong_place_are_refused(code, line, wrong):
    source = "".join(
        line for line in notes_page.split(code) if "# WH" not in line and "# Why" not in line
    )
    text = page("src/etude/x.py", "pass\n", lambda _: False).replace("\npass\n", f"\n{code}")
    found = notes.check_page("src/etude/x.py", text, source, "")
    start = text.split("\n").index("```python") + 1
    assert any(f.line - start == line and f.text.startswith(wrong) for f in found), (start, found)


def test_code_that_looks_like_a_note_is_refused():
    source = "x = 1\n# WHAT: a comment of the code's own\n"
    text = notes.skeleton("src/etude/x.py", source).replace("TODO: ", "")
    with pytest.raises(notes_page.Broken, match=r"line 2 of src/etude/x\.py looks like a note"):
        notes_sync.synced("src/etude/x.py", page("src/etude/x.py", "y = 1\n"), source, None)
    (fault,) = notes.check_page("src/etude/x.py", text, source, None)
    assert "line 2 of src/etude/x.py looks like a note" in fault.text
    (fault,) = notes.check_page("src/etude/x.py", page("src/etude/x.py", "x = 1\n"), "x = 1", None)
    assert "no newline at its end" in fault.text


def test_the_four_programs_and_config_yml_need_what_and_why_everywhere():
    for file in ("src/etude/main.py", "config.yml"):
        text = page(file, SOURCES[file])
        lines = text.split("\n")
        for at in [at for at, line in enumerate(lines) if notes_page.NOTE.match(line)][::7]:
            less = "\n".join(lines[:at] + lines[at + 1 :])
            (fault,) = notes.check_page(file, less, SOURCES[file], lock(file, less))
            assert "for this statement" in fault.text and fault.line <= at + 1
    # Elsewhere one WHAT will do, in each function, class and run of top-level statements.
    file = "src/etude/lora.py"
    found = notes_page.statements(SOURCES[file], "python")
    first = {}
    for number, item in enumerate(found):
        if not item.is_docstring:
            first.setdefault(item.block, number)
    text = page(file, SOURCES[file], lambda number: number in first.values())
    assert 2 * len(first) == texts(text).total() > 6
    assert faults(file, text, SOURCES[file]) == []
    for left_out in first.values():
        text = page(file, SOURCES[file], lambda n, out=left_out: n in first.values() and n != out)
        (fault,) = faults(file, text, SOURCES[file])
        assert "no WHAT in the block" in fault.text
        assert text.split("\n")[fault.line - 1].strip() == found[left_out].text.split("\n")[0]


def test_title_sections_and_fences():
    file, source = "tools/x.py", 'x = "```"\n'
    text = page(file, source)
    assert faults(file, text, source) == []
    for change, said in [
        (("# tools/x.py -", "# x.py -"), "the title is not"),
        (("## Benefits", "## Benefit"), 'the section "## Benefits" is missing'),
        (("## Trade-offs", "## Benefits"), 'a second section "## Benefits"'),
        (("## Benefits\n\nSome prose.", "## Benefits"), "is empty"),
        (("Some prose.", "TODO: later"), "still to be written"),
        (("## Related Files", "## Orphaned notes\n\nx\n\n## Related Files"), "code is gone"),
        (("## Requirements", "`````python\nopen"), "never closed"),
        (("````python", "````text"), "has no ```python block"),
        (("````", "```"), "no longer than a run of backticks"),
    ]:
        assert text.count(change[0])
        found = notes.check_page(file, text.replace(*change), source, "")
        assert any(said in fault.text for fault in found), (said, found)
    swapped = text.replace("## Overview", "## X").replace("## Benefits", "## Overview")
    (fault,) = faults(file, swapped.replace("## X", "## Benefits"), source)
    assert fault.line == 3 and '"## Overview" should stand here' in fault.text


# --- drift: mutations, sync, accept --------------------------------------------------------------


def mutated(source, item, chance):
    """The source with one line of a statement changed, by one of several means; and that line."""
    lines = notes_page.split(source)
    at = chance.randrange(item.first, item.last + 1)
    way = chance.choice(["word", "drop", "twice", "blank", "comment", "letter"])
    if way == "drop":
        del lines[at]
    elif way == "twice":
        lines.insert(at, lines[at])
    elif way == "blank":
        lines.insert(at, "\n")
    elif way == "comment":
        lines[at] = lines[at][:-1] + "  # changed\n"
    elif way == "word":
        lines[at] = lines[at][:-1] + " and other\n"
    else:
        column = chance.randrange(len(lines[at]))
        lines[at] = lines[at][:column] + "z" + lines[at][column:]
    return "".join(lines), at


def test_every_change_of_code_is_caught_with_its_line():
    chance = random.Random(0)
    pages = {file: page(file, source) for file, source in SOURCES.items()}
    locks = {file: lock(file, text) for file, text in pages.items()}
    exact = 0
    for _ in range(200):
        file = chance.choice([file for file in FILES if file != "src/etude/__init__.py"])
        item = chance.choice(notes_page.statements(SOURCES[file], language(file)))
        source, at = mutated(SOURCES[file], item, chance)
        (fault,) = notes.check_page(file, pages[file], source, locks[file])
        assert f"sync {notes_page.page_of(file)}" in fault.text
        # Where equal lines stand together, the first difference lies below the line changed.
        read, line = notes_page.read_page(file, pages[file]), SOURCES[file].split("\n")[at]
        between = [*read.where, read.held[-1].last].index(fault.line - 1) - at
        assert all(other == line for other in SOURCES[file].split("\n")[at : at + between])
        exact += between == 0
    assert exact > 150


def edited(source, chance):
    """The source after one to three edits that leave it Python: change, insert, move, delete."""
    for _ in range(chance.randint(1, 3)):
        lines = notes_page.split(source)
        simple = [
            item
            for item in notes_page.statements(source, "python")
            if not item.is_docstring and not item.text.startswith("@") and ends_itself(item)
        ]
        item = chance.choice(simple)
        block = lines[item.first : item.last + 1]
        way = chance.choice(["change", "insert", "move", "delete"])
        if way == "change":
            lines[item.last] = lines[item.last].rstrip("\n") + f"  # {chance.random()}\n"
        elif way == "insert":
            lines.insert(item.first, f"{item.indent}new_{chance.randrange(99)} = [1]\n")
        else:
            del lines[item.first : item.last + 1]
            if not is_python("".join(lines)):
                lines.insert(item.first, f"{item.indent}pass\n")
            if way == "move":
                to = chance.choice([other for other in simple if other.first <= item.first])
                block = [to.indent + line.removeprefix(item.indent) for line in block]
                lines[to.first : to.first] = block
        source = "".join(lines)
    return source


def is_python(source):
    try:
        return bool(compile(source, "edited", "exec"))
    except SyntaxError:
        return False


def ends_itself(item):
    """Whether a statement has no body (a comment may stand behind a header's colon)."""
    return not item.text.rpartition("  #")[0].endswith(":") and not item.text.endswith(":")


def test_sync_loses_no_note_marks_what_changed_and_leaves_the_rest():
    chance = random.Random(1)
    marked = orphaned = unmarked = 0
    for _ in range(50):
        file = chance.choice([file for file in PYTHON if len(SOURCES[file]) > 2000])
        old = notes_page.statements(SOURCES[file], "python")
        text = page(file, SOURCES[file], cuts=[old[len(old) // 2].first] * chance.randrange(2))
        source = edited(SOURCES[file], chance)
        after, after_lock = notes_sync.synced(file, text, source, lock(file, text))
        read = notes_page.read_page(file, after)
        assert "".join(read.code) == source
        assert texts(after) == texts(text)
        assert notes_sync.synced(file, after, source, after_lock) == (after, after_lock)
        # A note without a mark stands under the very statement it was written for.
        lines = after.split("\n")
        for number, rows in read.noted.items():
            written_for = old[int(lines[rows[0]].rpartition(" ")[2].rstrip("."))]
            now = read.statements[number]
            if notes_page.is_stale(read, number):
                marked += 1
                assert (written_for.scope, written_for.text) != (now.scope, now.text)
            else:
                unmarked += 1
                assert (written_for.scope, written_for.text) == (now.scope, now.text)
        orphaned += "\n## Orphaned notes\n" in after
        # What stands outside of the code is as it was.
        before, held = notes_page.split(text), notes_page.read_page(file, text).held
        outside = ["".join(before[: held[0].first + 1]), "".join(before[held[-1].last :])]
        outside += [f"\n{''.join(before[a.last : b.first + 1])}" for a, b in pairwise(held)]
        assert after.startswith(outside[0])
        assert all(after.count(part) == text.count(part) for part in outside)
        # check tells of the marks, the orphans and what is new without notes; of nothing else.
        told = notes.check_page(file, after, source, after_lock)
        known = ("the statement above changed", "notes whose code is gone", "no WHAT")
        assert all(fault.text.startswith(known) for fault in told)
    assert marked > 20 and orphaned > 10 and unmarked > 1000


SMALL = "def f(x):\n    y = x + 1\n    return y\n\n\ndef g(x):\n    return x\n"
FILE = "src/etude/x.py"


def sync(source, text=None, held=None):
    text = text or page(FILE, SMALL)
    return notes_sync.synced(FILE, text, source, held or lock(FILE, text))


def test_sync_follows_moves_and_renames():
    above, _, below = SMALL.partition("\n\n\n")
    moved = f"{below}\n\n{above}\n"
    text, held = sync(moved)
    assert notes_page.STALE not in text and notes.check_page(FILE, text, moved, held) == []
    renamed = SMALL.replace("def f(", "def first(")
    text, held = sync(renamed)
    (fault,) = notes.check_page(FILE, text, renamed, held)  # only the header changed
    assert "the statement above changed" in fault.text
    assert text.split("\n")[fault.line - 4] == "def first(x):"
    indented = "if True:\n" + "".join(
        f"    {line}" if line.strip() else line for line in notes_page.split(SMALL)
    )
    text, _ = sync(indented)
    assert notes_page.STALE not in text and "        # WHAT: what of 1.\n" in text


def test_sync_keeps_the_notes_of_code_that_is_gone():
    rest = "def g(x):\n    return x\n"
    text, held = sync(rest)
    assert texts(text) == texts(page(FILE, SMALL))
    tail = text[text.index("\n## Orphaned notes\n") :]
    block = "```python\ny = x + 1\n# WHAT: what of 1.\n# WHY: why of 1.\n```\n"
    assert f"\nFrom `f`:\n\n{block}" in tail
    (fault,) = notes.check_page(FILE, text, rest, held)
    assert "notes whose code is gone" in fault.text
    both = "def g(x):\n    return x + 1\n"
    text, held = sync(both)
    told = notes.check_page(FILE, text, both, held)  # the one does not hide the other
    assert ["code is gone" in f.text or "above changed" in f.text for f in told] == [True, True]
    again, _ = sync("z = 1\n", text, held)
    assert again.count("\n## Orphaned notes\n") == 1 and texts(again) == texts(text)


def test_sync_does_not_delete_what_only_looks_like_a_note():
    text = page("src/etude/x.py", "x = 1\ny = 2\n").replace("# WHY: why of 1.", "# Why: of 1.")
    with pytest.raises(notes_page.Broken, match="looks like a note and is none"):
        notes_sync.synced("src/etude/x.py", text, "x = 1\ny = 3\n", None)


def test_sync_lengthens_a_fence_that_the_code_would_close():
    text, _ = sync(SMALL + '\n\nTICKS = """\n````\n"""\n')
    assert "\n`````python\n" in text and "\n`````\n" in text
    assert texts(text) == texts(page(FILE, SMALL))


def test_sync_refuses_a_page_whose_notes_are_misplaced():
    text = page(FILE, SMALL).replace("    return y\n", "\n# WHAT: lost\n    return y\n")
    with pytest.raises(
        notes_page.Broken, match="directly under a statement; move it there, then sync"
    ):
        sync(SMALL + "x = 1\n", text)


def test_sync_follows_a_key_of_yaml_whatever_its_value_becomes():
    old, new = "a:\n  b: 1  # one\n  c: 2\n", "a:\n  z: 0\n  b: [many, others]\n  c: 2\n"
    text, _ = notes_sync.synced("config.yml", page("config.yml", old), new, None)
    assert (
        f"  b: [many, others]\n  # WHAT: what of 1.\n  # WHY: why of 1.\n  {notes_page.STALE}\n"
        in text
    )
    assert text.count(notes_page.STALE) == 1


def test_accept_clears_a_mark_and_locks_the_statement():
    source = SMALL.replace("x + 1", "x + 2")
    text, held = sync(source)
    (fault,) = notes.check_page(FILE, text, source, held)
    assert f"accept x.py.md:{fault.line}" in fault.text
    after, after_lock = notes_sync.accepted(FILE, text, held, [fault.line])
    assert after == text.replace(f"    {notes_page.STALE}\n", "")
    assert notes.check_page(FILE, after, source, after_lock) == []
    assert after_lock == lock(FILE, after)
    with pytest.raises(notes_page.Broken, match="no statement with notes is here"):
        notes_sync.accepted(FILE, text, held, [1])


def test_code_and_page_changed_together_are_caught_by_the_lock():
    source = SMALL.replace("x + 1", "x + 2")
    before = page(FILE, SMALL)
    text = before.replace("x + 1", "x + 2")
    (fault,) = notes.check_page(FILE, text, source, lock(FILE, before))
    assert "since its notes were locked" in fault.text
    assert text.split("\n")[fault.line - 1] == "    y = x + 2"
    after, held = notes_sync.accepted(FILE, text, lock(FILE, before), [fault.line])
    assert after == text and notes.check_page(FILE, text, source, held) == []
    # The notes' own words may change; a lock that is missing or holds too much is told of.
    assert notes.check_page(FILE, text.replace("why of", "because"), source, held) == []
    assert "no lock yet" in notes.check_page(FILE, text, source, None)[0].text
    assert "1 line" in notes.check_page(FILE, text, source, held + "g 9 00\n")[0].text


# --- the command line ----------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small project of two code files, with its pages."""
    files = {FILE: SMALL, "config.yml": "a:\n  b: 1  # one\n"}
    for file, source in files.items():
        notes.write(tmp_path / file, source)
        notes.write(tmp_path / "COMMENTED_CODE" / notes_page.page_of(file), page(file, source))
    for name in [*notes.LINKING, "COMMENTED_CODE/README.md"]:
        notes.write(tmp_path / name, "# A `b_c` [d](README.md): e!\n")
    monkeypatch.setattr(notes, "code_files", lambda root: {notes_page.page_of(f): f for f in files})
    return tmp_path


def command(checkout, *words):
    return notes.main([words[0], "--root", str(checkout), *words[1:]])


def test_a_page_from_new_to_accept(checkout, capsys):
    path = checkout / "COMMENTED_CODE" / "x.py.md"
    path.unlink()
    assert command(checkout, "check", "x.py.md") == 1
    said = capsys.readouterr().out
    assert "x.py.md:1: the page is missing; run: python tools/notes.py new" in said
    assert command(checkout, "new", FILE) == 0
    assert command(checkout, "new", FILE) == 2
    assert "is there already" in capsys.readouterr().err
    path.write_text(page(FILE, SMALL))
    assert command(checkout, "lock", "x.py.md", "config.yml") == 0
    assert command(checkout, "check") == 0
    assert "2 pages, 7 statements, 7 with notes (100%), 14 notes" in capsys.readouterr().out
    assert command(checkout, "coverage") == 0
    assert "src/etude/x.py      5      5  100%\n" in capsys.readouterr().out
    (checkout / FILE).write_text(SMALL.replace("+ 1", "+ 2"))
    assert command(checkout, "accept", "x.py.md:20") == 2
    assert "run first: python tools/notes.py sync" in capsys.readouterr().err
    assert command(checkout, "sync") == 0
    assert (
        "x.py.md: 1 changed statements whose notes are to be read, 0 that are gone"
        in capsys.readouterr().out
    )
    assert command(checkout, "check") == 1
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("COMMENTED_CODE/x.py.md:")
    assert command(checkout, "accept", said.rpartition(" ")[2].strip()) == 0
    assert command(checkout, "check") == 0


def test_the_set_of_pages_is_the_set_of_code_files(checkout, capsys):
    assert command(checkout, "lock") == command(checkout, "check") == 0
    notes.write(checkout / "COMMENTED_CODE/y.py.md", "# y\n")
    notes.write(checkout / "COMMENTED_CODE/.lock/z.py.lock", "")
    (checkout / "COMMENTED_CODE/config.yml.md").unlink()
    (checkout / "README.md").unlink()
    assert command(checkout, "check") == 1
    out = capsys.readouterr().out
    assert "y.py.md:1: belongs to no code file in git" in out
    assert "z.py.lock:1: belongs to no code file in git" in out
    assert "config.yml.md:1: the page is missing" in out
    assert "README.md:1: the file is missing" in out
    assert command(checkout, "check", "xx.py.md") == 2
    assert "nearest is x.py.md" in capsys.readouterr().err


def test_links_are_followed(checkout, capsys):
    assert command(checkout, "lock") == 0
    good = "[a](x.py.md) [b](../src/etude/x.py) [c](#a-b_c-d-e) ![d](https://x.y) `[e](no)`\n"
    path = checkout / "COMMENTED_CODE" / "README.md"
    head = "# A `b_c` [d](README.md): e!\n"
    path.write_text(f"{head}\n{good}\n```\n[g](no)\n```\n[h]: x.py.md#trade-offs\n")
    assert command(checkout, "check") == 0, capsys.readouterr().out
    capsys.readouterr()
    path.write_text("[a](no.md)\n[b](#no)\n[c](x.py.md#tradeoffs)\n[d]: gone\n")
    assert command(checkout, "check") == 1
    out = capsys.readouterr().out
    assert [line.split(":")[1] for line in out.splitlines()] == ["1", "2", "3", "4"]
    assert "no #tradeoffs in x.py.md; nearest is #trade-offs" in out


def test_outside_of_git_it_says_so(tmp_path, capsys):
    assert command(tmp_path, "check") == 2
    assert "is no git checkout" in capsys.readouterr().err
