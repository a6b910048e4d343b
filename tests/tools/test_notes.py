"""tools/notes.py: pages equal their code, every drift is seen, and sync loses no note."""

import random
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))  # as for python tools/notes.py

import notes  # noqa: E402
from notes_page import NOTE, Fault, page_of, read_page, split, statements  # noqa: E402

FILES = sorted(notes.code_files(ROOT).values())
PYTHON = [file for file in FILES if file.endswith(".py")]
SOURCES = {file: notes.read(ROOT / file) for file in FILES}
FILE = "src/etude/x.py"
SMALL = "def f(x):\n    y = x + 1\n    return y\n\n\ndef g(x):\n    return x\n"


def page(file, source, wanted=lambda number: True):
    """A finished page: WHAT and WHY, each with a text of its own, under every wanted statement."""
    lines = split(source)
    for number, item in reversed(list(enumerate(statements(file, source)))):
        if wanted(number) and not item.is_docstring:
            lines[item.last + 1 : item.last + 1] = [
                f"{item.indent}# {kind}: {kind.lower()} of {number}.\n" for kind in ("WHAT", "WHY")
            ]
    text = notes.skeleton(file).replace("\nTODO: write this section.\n", "\nSome prose.\n")
    return notes.rewritten(read_page(file, text), lines, [])


def lock(file, text):
    found = read_page(file, text)
    return set(notes.keys(found.statements, found.noted).values())


def faults(file, text, source, accepted=None):
    found = lock(file, text) if accepted is None else accepted
    return [str(f) for f in notes.check_page(read_page(file, text), found, source)]


def texts(text):
    """Every note of a page, wherever it stands."""
    return Counter(line.strip() for line in text.splitlines() if NOTE.match(line))


class Project:
    """A small project of code files and their pages."""

    def __init__(self, root):
        self.root = root
        (root / "config.yml").write_text("a:\n  b: 1  # one\n")
        self.add("config.yml", "a:\n  b: 1  # one\n")
        for name in ("README.md", "COMMENTED_CODE/README.md"):
            notes.write(root / name, "# A `b_c` [d](README.md): e!\n")

    def add(self, file, source, text=None):
        """A code file with its page, all notes accepted."""
        notes.write(self.root / file, source)
        notes.write(self.page(file), text or page(file, source))
        assert self.run("accept", page_of(file)) == 0

    def page(self, file=FILE):
        return self.root / "COMMENTED_CODE" / page_of(file)

    def change(self, source, file=FILE):
        notes.write(self.root / file, source)

    def run(self, *words):
        return notes.main(words, self.root)


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture
def small(project):
    project.add(FILE, SMALL)
    return project


# --- pages and code ------------------------------------------------------------------------------


def test_files_are_found_and_no_two_share_a_page(tmp_path):
    assert {"src/etude/chat.py", "config.yml"} <= set(FILES)
    assert not any(file.startswith(("tests/", "tools/", "benchmarks/")) for file in FILES)
    assert len(FILES) == len({page_of(file) for file in FILES}) > 30
    sources = {
        "config.yml": "a: 1\n", "src/etude/a/__init__.py": '"""A package."""\n', "tools/x.py": "x = 1\n",
        "src/etude/a/__main__.py": "", "src/etude/a/b.py": "x = 1\n", "src/etude/b.py": "x = 1\n",
        "src/etude/__init__.py": "x = 1\n",
    }  # fmt: skip
    for file, source in sources.items():
        notes.write(tmp_path / file, source)
    assert sorted(notes.code_files(tmp_path)) == [
        "__init__.py.md", "a-__main__.py.md", "a-b.py.md", "b.py.md", "config.yml.md",
    ]  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_a_finished_page_of_each_file_has_no_fault(file):
    text = page(file, SOURCES[file])
    assert texts(text).total() > SOURCES[file].count("\n") / 20
    assert faults(file, text, SOURCES[file]) == []
    read = read_page(file, text)
    assert "".join(read.code) == SOURCES[file]
    assert len(read.noted) == sum(not item.is_docstring for item in read.statements)


TRAPS = '''"""Module.

# a string
"""

import os as \\
    system


@decorate(
    1,  # one
)
@other
async def f(a, *, b="# no"):
    """Docstring."""
    text = """
# a string
    ``` and ````
""" + 'x'  # end
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


def test_traps_of_the_tokenizer():
    found = statements(FILE, TRAPS)
    heads = [(item.text.split("\n")[0], item.scope) for item in found]
    assert heads[:10] == [
        ('"""Module.', ""), ("import os as \\", ""), ("@decorate(", "f"), ("@other", "f"),
        ('async def f(a, *, b="# no"):', "f"), ('"""Docstring."""', "f"), ('text = """', "f"),
        ("if a: return text", "f"), ("def inner():", "f.inner"), ("return {", "f.inner"),
    ]  # fmt: skip
    assert heads[-4:] == [
        ('return "ünï\u2028code\x0b" + \\', "f"), ("class C(", "C"), ("x: int = 1", "C"),
        ("def m(self): return 1", "C.m"),
    ]  # fmt: skip
    assert [item.is_docstring for item in found].count(True) == 2
    text = page(FILE, TRAPS)
    assert "`````python" in text
    assert faults(FILE, text, TRAPS) == []
    assert len(texts(text)) == 2 * (len(found) - 2)


@pytest.mark.parametrize(
    "source", ["", "# only a comment\n", "x = 1\r\nif x:\r\n    y = '''\r\n'''\r\n"]
)
def test_odd_files(source):
    assert faults(FILE, page(FILE, source), source) == []


@pytest.mark.parametrize(
    ("code", "line", "wrong"),
    [
        ("f(\n    # WHAT: no\n    1)\n", 2, "the note does not stand directly under a whole"),
        ("x = 1\n\n# WHAT: no\n", 3, "the note does not stand directly under a whole"),
        ("# WHAT: no\nx = 1\n", 1, "the note does not stand directly under a whole"),
        ("x = 1 + \\\n# WHAT: no\n  2\n", 2, "the note does not stand directly under a whole"),
        ("x = '''\n# WHAT: no\n'''\n", 2, "the note does not stand directly under a whole"),
        ("if x:\n    y\n# WHAT: no\n", 3, "behind as many blanks as its statement, 4"),
        ("x = 1\n# WHAT:\n", 2, "write the note as `# WHAT: text`"),
        ("x = 1\n# WHY: because\n", 1, "no WHAT for 'x = 1'"),
        ("x = 1\n# Why: because\n", 2, "whose line 2 is behind its end"),
    ],
)
def test_notes_in_the_wrong_place_or_form_are_faults(code, line, wrong):
    source = "".join(line for line in split(code) if "# WH" not in line and "# Why" not in line)
    text = page(FILE, "pass\n", lambda number: False).replace("\npass\n", f"\n{code}")
    start = text.split("\n").index("```python") + 1
    found = faults(FILE, text, source)
    assert any(f"x.py.md:{start + line}: " in fault and wrong in fault for fault in found), found


def test_the_four_programs_and_config_yml_need_what_and_why_everywhere():
    for file in ("src/etude/main.py", "config.yml"):
        text = page(file, SOURCES[file])
        lines = text.split("\n")
        for at in [at for at, line in enumerate(lines) if NOTE.match(line)][::7]:
            kind = lines[at].split()[1].strip(":")
            (fault,) = faults(file, "\n".join(lines[:at] + lines[at + 1 :]), SOURCES[file])
            assert f"no {kind} for" in fault and int(fault.split(":")[1]) <= at + 1
    # Elsewhere one WHAT will do, in each function and class, and one at the top level.
    file = "src/etude/errors.py"
    first = {}
    for number, item in enumerate(statements(file, SOURCES[file])):
        if not item.is_docstring:
            first.setdefault(item.scope, number)
    text = page(file, SOURCES[file], lambda number: number in first.values())
    assert 2 * len(first) == texts(text).total() > 6
    assert faults(file, text, SOURCES[file]) == []
    for out in first.values():
        text = page(file, SOURCES[file], lambda n, out=out: n in first.values() and n != out)
        (fault,) = faults(file, text, SOURCES[file])
        assert "no WHAT for" in fault


def test_title_sections_and_fences():
    source = 'x = "```"\n'
    text = page(FILE, source)
    assert faults(FILE, text, source) == []
    for old, new, wrong in [
        ("# x.py -", "# y.py -", "the title is not"),
        ("## Benefits", "## Benefit", "the sections are Overview, Trade-offs,"),
        ("## Trade-offs", "## Benefits", "the sections are Overview, Benefits, Benefits,"),
        ("Some prose.", "TODO: later", "still to be written"),
        ("## Related Files", "## Orphaned notes\n\nx\n\n## Related Files", "code is gone"),
        ("## Requirements", "`````python\nopen", "never closed"),
        ("````python", "````text", "must have one ```python block"),
        ("x = ", "x = (", "the code is not Python"),
    ]:
        assert old in text
        try:
            found = faults(FILE, text.replace(old, new), source, set())
        except Fault as fault:
            found = [str(fault)]
        assert any(wrong in fault for fault in found), (wrong, found)
    swapped = text.replace("## Overview", "## X").replace("## Benefits", "## Overview")
    (fault,) = faults(FILE, swapped.replace("## X", "## Benefits"), source)
    assert "the sections are Benefits, Overview, Trade-offs" in fault
    fenced = text.replace("Some prose.", "```text\nTODO: x\n## Orphaned notes\n```")
    assert faults(FILE, fenced, source) == []


# --- drift: changed code, sync, accept -----------------------------------------------------------


def mutated(source, item, chance):
    """The source with one line of a statement changed, by one of several means; and that line."""
    lines = split(source)
    at = chance.randrange(item.first, item.last + 1)
    way = chance.choice(["word", "drop", "twice", "blank", "letter"])
    if way == "drop":
        del lines[at]
    elif way == "twice":
        lines.insert(at, lines[at])
    elif way == "blank":
        lines.insert(at, "\n")
    elif way == "word":
        lines[at] = lines[at][:-1] + " and other\n"
    else:
        column = chance.randrange(len(lines[at]))
        lines[at] = lines[at][:column] + "z" + lines[at][column:]
    return "".join(lines), at


def test_every_change_of_code_is_caught_with_its_line():
    chance = random.Random(0)
    exact = 0
    for _ in range(100):
        file = chance.choice([file for file in FILES if file != "src/etude/__init__.py"])
        source, at = mutated(SOURCES[file], chance.choice(statements(file, SOURCES[file])), chance)
        text = page(file, SOURCES[file])
        (fault,) = faults(file, text, source)
        assert f"sync {page_of(file)}" in fault
        # Where equal lines stand together, the first difference lies below the line changed.
        read, lines = read_page(file, text), SOURCES[file].split("\n")
        between = [*read.where, read.held.last].index(int(fault.split(":")[1]) - 1) - at
        assert all(other == lines[at] for other in lines[at : at + between])
        exact += between == 0
    assert exact > 75


def edited(source, chance):
    """The source after one to three edits that leave it Python: change, insert, move, delete."""
    for _ in range(chance.randint(1, 3)):
        lines = split(source)
        simple = [
            item
            for item in statements(FILE, source)
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


def test_sync_loses_no_note_and_accepts_none_of_changed_code(project, capsys):
    chance = random.Random(1)
    changed = orphaned = unchanged = 0
    for _ in range(30):
        file = chance.choice([f for f in FILES if f.endswith(".py") and len(SOURCES[f]) > 2000])
        old = statements(file, SOURCES[file])
        project.add(file, SOURCES[file])
        text = project.page(file).read_text()
        source = edited(SOURCES[file], chance)
        project.change(source, file)
        assert project.run("sync", page_of(file)) == 0
        after = project.page(file).read_text()
        assert texts(after) == texts(text)
        read, accepted, _ = notes.load(project.root, page_of(file), file)
        assert "".join(read.code) == source
        # Notes are accepted under the very statement that they were written for.
        for number, key in notes.keys(read.statements, read.noted).items():
            written_for = old[int(read.notes(number)[0].rpartition(" ")[2].rstrip(".\n"))]
            now = read.statements[number]
            assert (key in accepted) == (written_for.identity == now.identity)
            unchanged += key in accepted
            changed += key not in accepted
        orphaned += "\n## Orphaned notes\n" in after
        # What is outside of the code is as it was.
        before = read_page(file, text)
        assert read.lines[: read.held.first] == before.lines[: before.held.first]
        below = before.lines[before.held.last + 1 :]
        assert read.lines[read.held.last + 1 :][: len(below)] == below
        # check reports what changed, the orphans and what is new without notes; nothing else.
        known = ("new or changed", "notes whose code is gone", "no WHAT", "no WHY")
        assert all(any(k in f for k in known) for f in faults(file, after, source, accepted))
        assert project.run("sync", page_of(file)) == 0
        assert project.page(file).read_text() == after
        assert notes.load(project.root, page_of(file), file)[1] == accepted
    assert changed > 15 and orphaned > 5 and unchanged > 1000


def synced(project, source, capsys):
    """The page after its code became `source`, and what check reports."""
    project.change(source)
    assert project.run("sync", "x.py.md") == 0
    capsys.readouterr()
    project.run("check", "x.py.md")
    return project.page().read_text(), capsys.readouterr().out.splitlines()


def test_sync_follows_moves(small, capsys):
    above, _, below = SMALL.partition("\n\n\n")
    moved = f"{below}\n\n{above}\n"
    _, found = synced(small, moved, capsys)
    assert found == ["1 pages without a fault"]


def test_sync_follows_renames(small, capsys):
    text, (fault,) = synced(small, SMALL.replace("def f(", "def first("), capsys)
    assert "new or changed" in fault  # the header only
    assert text.split("\n")[int(fault.split(":")[1]) - 1] == "def first(x):"


def test_sync_follows_indentation(small, capsys):
    indented = "".join(f"    {line}" if line.strip() else line for line in split(SMALL))
    text, (fault,) = synced(small, f"if True:\n{indented}", capsys)
    assert "no WHAT for 'if True:'" in fault and "        # WHAT: what of 1.\n" in text


def test_sync_keeps_the_notes_of_code_that_is_gone(small, capsys):
    before = small.page().read_text()
    text, found = synced(small, "def g(x):\n    return x + 1\n", capsys)
    assert ["code is gone" in f or "new or changed" in f for f in found] == [True, True]
    block = "```python\ny = x + 1\n# WHAT: what of 1.\n# WHY: why of 1.\n```\n"
    assert f"\nFrom `f`:\n\n{block}" in text[text.index("\n## Orphaned notes\n") :]
    text, _ = synced(small, "z = 1\n", capsys)
    assert text.count("\n## Orphaned notes\n") == 1 and texts(text) == texts(before)


def test_pages_synced_together_exchange_the_notes_of_code_that_moved(small, capsys):
    small.add("src/etude/y.py", "z = 1\n")
    above, _, below = SMALL.partition("\n\n\n")
    small.change(f"{above}\n")
    small.change(f"z = 1\n\n\n{below}", "src/etude/y.py")
    small.change(f"{below}", "src/etude/new/z.py")
    assert small.run("sync", "x.py.md", "y.py.md", "src/etude/new/z.py") == 0
    assert "WHAT: what of 4.\n" in small.page("src/etude/y.py").read_text()
    assert "# new/z.py - " in small.page("src/etude/new/z.py").read_text()
    capsys.readouterr()
    assert small.run("check", "x.py.md", "y.py.md") == 1
    found = capsys.readouterr().out.splitlines()  # notes in another file are to be read
    assert ["y.py.md" in fault and "new or changed" in fault for fault in found] == [True, True]


def test_sync_finds_a_place_for_notes_whose_code_went_to_another_file_before(small, capsys):
    above, _, below = SMALL.partition("\n\n\n")
    synced(small, f"{above}\n", capsys)
    small.add("src/etude/y.py", "z = 1\n")
    small.change(f"z = 1\n\n\n{below}", "src/etude/y.py")
    assert small.run("sync", "y.py.md") == 0  # the code is there now, without notes
    assert small.run("sync", "x.py.md", "y.py.md") == 0
    assert small.page().read_text() == page(FILE, f"{above}\n")
    assert "    return x\n    # WHAT: what of 4.\n" in small.page("src/etude/y.py").read_text()


def test_sync_refuses_what_it_would_lose(small, capsys):
    text = small.page().read_text()
    for old, new, wrong in [
        ("# WHY: why of 1.", "# Why: of 1.", "looks like a note and is none"),
        ("    return y\n", "\n# WHAT: lost\n    return y\n", "move it there, then sync again"),
    ]:
        small.page().write_text(text.replace(old, new))
        assert small.run("sync") == 1
        assert wrong in capsys.readouterr().err
        assert small.page().read_text() == text.replace(old, new)


def test_code_that_can_have_no_page_is_refused(small, capsys):
    for source, wrong in [("x = 1\n# WHAT: x\n", "like a note"), ("x = 1", "has no newline")]:
        small.change(source)
        for command in ("sync", "check"):
            assert small.run(command) == 1
            said = capsys.readouterr()
            assert f"src/etude/x.py:{source.count(chr(10)) or 1}: this line " in said.out + said.err
            assert wrong in said.out + said.err


def test_sync_lengthens_a_fence_that_the_code_would_close(small, capsys):
    text, (fault,) = synced(small, SMALL + '\n\nTICKS = """\n````\n"""\n', capsys)
    assert "\n`````python\n" in text and "\n`````\n" in text and "no WHAT for 'TICKS" in fault


def test_sync_follows_a_key_of_yaml_whatever_its_value_becomes(project, capsys):
    project.change("a:\n  z: 0\n  b: [many, others]\n", "config.yml")
    assert project.run("sync") == 0
    text = project.page("config.yml").read_text()
    assert "  b: [many, others]\n  # WHAT: what of 1.\n  # WHY: why of 1.\n" in text
    assert "1 statements whose notes are to be read, 0 that are gone" in capsys.readouterr().out


def test_accepted_is_a_statement_not_a_text(small, capsys):
    source = SMALL.replace("x + 1", "x + 2")
    small.change(source)
    assert small.run("accept", "x.py.md:20") == 1
    assert "the page is behind its code; run: python tools/notes.py sync" in capsys.readouterr().err
    # Changed by hand in the page too, it is caught all the same.
    small.page().write_text(small.page().read_text().replace("x + 1", "x + 2"))
    assert small.run("check") == 1
    fault = capsys.readouterr().out
    assert fault.count("\n") == 1 and "new or changed since its notes were accepted" in fault
    assert small.run("accept", "x.py.md:1") == 1
    assert "here is no statement with notes" in capsys.readouterr().err
    assert small.run("accept", fault.rpartition(" ")[2].strip()) == 0
    # The words of notes may change; the code as it was before is new again.
    small.page().write_text(small.page().read_text().replace("why of", "because"))
    assert small.run("check") == 0
    _, (fault,) = synced(small, SMALL, capsys)
    assert "new or changed" in fault


# --- the command line ----------------------------------------------------------------------------


def test_a_page_from_its_beginning(project, capsys):
    project.change(SMALL)
    assert project.run("check") == 1
    said = capsys.readouterr().out
    assert "x.py.md:1: the page is missing; run: python tools/notes.py sync x.py.md" in said
    assert project.run("sync") == 0 and project.run("check") == 1
    found = capsys.readouterr().out.splitlines()
    assert sum("still to be written" in fault for fault in found) == len(notes.SECTIONS)
    assert sum("no WHAT" in fault for fault in found) == 2 and len(found) == len(notes.SECTIONS) + 2
    project.page().write_text(page(FILE, SMALL))
    assert project.run("accept", FILE) == project.run("check") == 0
    assert capsys.readouterr().out == "2 pages without a fault\n"
    for words in (["accept"], ["check", "xx.py.md"]):
        with pytest.raises(SystemExit):
            project.run(*words)
    assert "nearest is x.py.md" in capsys.readouterr().err


def test_the_set_of_pages_is_the_set_of_code_files(small, capsys):
    small.page("src/etude/y.py").write_text("# y\n")
    notes.write(small.root / "COMMENTED_CODE/.lock/z.py.lock", "")
    small.page("config.yml").unlink()
    assert small.run("check") == 1
    out = capsys.readouterr().out
    assert "y.py.md:1: belongs to no code file" in out
    assert "z.py.lock:1: belongs to no code file" in out
    assert "config.yml.md:1: the page is missing" in out


def test_links_are_followed(small, capsys):
    good = "[a](x.py.md) [b](../src/etude/x.py) [c](#a-b_c-d-e) ![d](https://x.y) `[e](no)`\n"
    path = small.root / "COMMENTED_CODE/README.md"
    path.write_text(f"# A `b_c` [d](README.md): e!\n\n{good}\n```\n[g](no)\n```\n")
    assert small.run("check") == 0, capsys.readouterr().out
    capsys.readouterr()
    path.write_text("[a](no.md)\n[b](#no)\n[c](x.py.md#tradeoffs)\n")
    assert small.run("check") == 1
    out = capsys.readouterr().out
    assert [line.split(":")[1] for line in out.splitlines()] == ["1", "2", "3"]
    assert "no #tradeoffs in x.py.md; nearest is #trade-offs" in out
