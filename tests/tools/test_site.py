"""The site's copy of a page: all its code, its notes beside their statements, links that lead on."""

import html
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import docs  # noqa: E402
import notes  # noqa: E402
import notes_page  # noqa: E402

SOURCE = '''"""A page."""

import os

TEXT = """
```
"""


def twice(x: int) -> int:
    if x < 0 and os.sep:
        return 0
    return 2 * x  # <b>
'''


def page(*noted):
    """A page of SOURCE with notes under the lines (counted from 1) that are given."""
    code = SOURCE
    for line, note in noted:
        code = code.replace(line, f"{line}\n{note}", 1)
    empty = notes_page.read_page("src/etude/x.py", notes.skeleton("src/etude/x.py"))
    return notes.rewritten(empty, notes_page.split(code), [])


PAGE = page(
    ("import os", "# WHAT: the `os` module <of Python>"),
    ("    return 2 * x  # <b>", "    # WHAT: doubles\n    # WHY: it is asked for"),
)


def plain(markup):
    return html.unescape(re.sub(r"<[^>]+>", "", markup))


def test_rows_hold_all_of_the_code_and_each_note_beside_its_statement():
    text = docs.side_by_side("src/etude/x.py", PAGE)
    code = re.findall(r'<span class="line" id="L(\d+)"><a href="#L\d+">\d+</a>(.*)\n</span>', text)
    assert [int(number) for number, _ in code] == list(range(1, len(SOURCE.splitlines()) + 1))
    assert "".join(plain(line) + "\n" for _, line in code) == SOURCE
    rows = re.findall(r'<div class="row[^>]*>.*?</div></div>', text, re.S)
    assert len(rows) == 2
    assert 'id="L3"' in rows[0] and 'id="L4"' not in rows[0] and "doubles" in rows[1]
    assert "the <code>os</code> module &lt;of Python&gt;" in rows[0]
    assert "`" not in "".join(rows)  # else Markdown would open a fence


def test_links_lead_to_the_pages_of_code_and_to_copies_of_other_files(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "SOURCE", tmp_path)
    files = {"chat.py.md": "src/etude/chat.py"}
    text = "[a](../src/etude/chat.py) [b](../LICENSE#x) [c](main.py.md#why) [d](https://a.b/c) [e](../data)"
    assert docs.linked(Path("COMMENTED_CODE/index.md"), text, files) == (
        "[a](chat.py.md) [b](../LICENSE#x) [c](main.py.md#why) [d](https://a.b/c) [e](../data/README.md)"
    )
    assert (tmp_path / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_every_page_has_one_place_in_the_navigation():
    files = notes.code_files(ROOT)
    assert len(files) > 30
    there = docs.inline(docs.navigation(files))
    found = re.findall(r'"COMMENTED_CODE/([^"]+\.md)"', there)
    assert sorted(found) == sorted([*files, "README.md"])
    guide = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
    assert sorted(re.findall(r'"(docs/[^"]+\.md)"', there)) == guide
    assert all(f'"{name}"' in there for name in docs.TEXTS)
    linked = re.findall(r"\]\(([\w/.-]+\.md)", (ROOT / "README.md").read_text())
    assert set(linked) <= set(docs.TEXTS)
