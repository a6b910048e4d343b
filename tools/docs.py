"""Build the site: README, docs/, PROJECT_FLOW and COMMENTED_CODE/, notes beside their code.

    python tools/docs.py
    python -m http.server --directory build/site  # to look at it, search included

The pages stay as they are: a copy under build/docs/ gets the code of "Line-by-Line Commented Code"
as rows of code and notes, and links to files that are no pages lead to copies of them. Zensical
(zensical.org) makes the site of that copy and refuses links that lead nowhere.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from notes import STRICT, code_files, read, write
from notes_page import FOLDER, NOTE, Page, name_of, page_of, read_page
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "build" / "docs"
# The pages of docs/, in the order of the navigation.
GUIDE = ["installation", "keys", "data", "conversations", "evaluation", "chat", "export", "run-folder", "interruption",
         "processes", "troubleshooting", "faq", "learning-path"]  # fmt: skip
TEXTS = ["README.md", *(f"docs/{name}.md" for name in GUIDE), "PROJECT_FLOW.md", "CONTRIBUTING.md",
         "AGENTS.md", "CHANGELOG.md", "benchmarks/README.md", "data/README.md", f"{FOLDER}/README.md"]  # fmt: skip
LINK = re.compile(r"(\]\(<?)([^)\s>#:]+)((?:#[^)\s>]*)?>?\))")
# Diagrams are drawn by Mermaid in the browser; with our copy, the site needs no other server.
MERMAID = "https://registry.npmjs.org/mermaid/-/mermaid-12.3.0.tgz"
MERMAID_SHA512 = "4113TdXeLAsMruJ79OpFL5O8+LTFXhQqZ260rF3tgUmiNAtRm4Uume04I+65PRN6yZ69J4f8rVYWW8zRk65UYw=="  # fmt: skip


def rows(page: Page) -> Iterator[tuple[int, list[str], list[str]]]:
    """Code and notes side by side: the first line's number, lines of code as HTML, notes as HTML."""
    formatter = HtmlFormatter(nowrap=True)
    lexer = get_lexer_by_name(page.held.language, stripnl=False)
    text = highlight("".join(page.code), lexer, formatter)
    lines = text.removesuffix("\n").split("\n")
    start = 0
    for number in sorted(page.noted):
        end = page.statements[number].last + 1
        yield start + 1, lines[start:end], [note(line) for line in page.notes(number)]
        start = end
    if start < len(lines):
        yield start + 1, lines[start:], []


def note(line: str) -> str:
    """One note as HTML."""
    found = NOTE.match(line)
    assert found, line
    text = re.sub(r"(`+)(.+?)\1", r"<code>\2</code>", html.escape(found[2].strip(), quote=False))
    return f'<p><b class="{found[1].lower()}">{found[1]}</b> {text}</p>'


def side_by_side(file: str, text: str) -> str:
    """A page with its code and notes in two columns."""
    page = read_page(file, text)
    parts = ['<div class="tour">\n']
    for number, code, notes in rows(page):
        kind = "row" if notes else "row bare"
        parts.append(f'<div class="{kind}"><pre class="highlight"><code>')
        parts += [
            f'<span class="line" id="L{number + at}"><a href="#L{number + at}">{number + at}</a>'
            # A backtick at a line's start would open a fence.
            + line.replace("`", "&#96;") + "\n</span>" for at, line in enumerate(code)
        ]  # fmt: skip
        parts.append(f'</code></pre><div class="notes">{"".join(notes)}</div></div>\n')
    parts.append("</div>\n")
    before, after = page.lines[: page.held.first], page.lines[page.held.last + 1 :]
    return "".join([*before, "\n", *parts, "\n", *after])


def linked(path: Path, text: str, files: dict[str, str]) -> str:
    """Links to code files lead to their pages, those to other files to copies of these."""
    pages = {file: f"{FOLDER}/{page}" for page, file in files.items()}

    def target(found: re.Match[str]) -> str:
        to = (ROOT / path.parent / found[2]).resolve()
        if not to.is_relative_to(ROOT):
            return found[0]
        name = pages.get(str(to.relative_to(ROOT)), str(to.relative_to(ROOT)))
        if (ROOT / name).is_dir():
            name += "/README.md"
        copy = SOURCE / name
        if not name.endswith(".md") and not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy)
        return f"{found[1]}{os.path.relpath(name, path.parent)}{found[3]}"

    return LINK.sub(target, text)


def navigation(files: dict[str, str]) -> list[object]:
    """The site's pages in the order of its navigation."""
    parts: list[object] = [
        {"Etude": "README.md"},
        {"Guide": [f"docs/{name}.md" for name in GUIDE]},
        {"How data flows": "PROJECT_FLOW.md"},
        {"Benchmarks": "benchmarks/README.md"},
    ]
    names = [name_of(file) for file in files.values()]
    code: list[object] = [
        {"Start here": f"{FOLDER}/README.md"},
        {"The programs": [{n: f"{FOLDER}/{page_of(n)}"} for n in STRICT if n in names]},
        {"The library": [{n: f"{FOLDER}/{page_of(n)}"} for n in names if n not in STRICT]},
    ]
    return [
        *parts,
        {"Commented code": code},
        {"Data": "data/README.md"},
        {"Contributing": ["CONTRIBUTING.md", "AGENTS.md"]},
        {"Changes": "CHANGELOG.md"},
    ]


def inline(value: object) -> str:
    """Nested lists and tables of strings as TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {inline(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    return json.dumps(value)


def fetch_mermaid() -> str:
    """Mermaid's script: from build/, or fetched and checked against its hash."""
    kept = ROOT / "build" / Path(MERMAID).with_suffix(".js").name
    if not kept.exists():
        try:
            with urllib.request.urlopen(MERMAID, timeout=60) as answer:
                data = answer.read()
        except OSError as error:
            sys.exit(f"error: {MERMAID} cannot be fetched ({error}); it is needed once")
        if base64.b64encode(hashlib.sha512(data).digest()).decode() != MERMAID_SHA512:
            sys.exit(f"error: {MERMAID} is not what it was; nothing of it is used")
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            script = archive.extractfile("package/dist/mermaid.min.js")
            assert script
            write(kept, script.read().decode())
    return read(kept)


def prepare() -> None:
    """Write the copy that Zensical reads, and its configuration."""
    files = code_files(ROOT)
    shutil.rmtree(SOURCE, ignore_errors=True)
    for name in [*TEXTS, *(f"{FOLDER}/{page}" for page in files)]:
        text = read(ROOT / name)
        file = files.get(Path(name).name) if name.startswith(FOLDER) else None
        write(SOURCE / name, linked(Path(name), side_by_side(file, text) if file else text, files))
    write(SOURCE / "tour.css", read(ROOT / "tools" / "docs.css"))
    write(SOURCE / "mermaid.min.js", fetch_mermaid())
    settings = read(ROOT / "tools" / "docs.toml")
    write(ROOT / "build" / "zensical.toml",
          settings.replace("nav = []", f"nav = {inline(navigation(files))}"))  # fmt: skip


def main() -> None:
    """Build the site in build/site/."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    prepare()
    zensical = Path(sys.executable).parent / "zensical"
    config = ROOT / "build" / "zensical.toml"
    done = subprocess.run([zensical, "build", "--clean", "--strict", "-f", config], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)
    print("build/site/index.html")


if __name__ == "__main__":
    main()
