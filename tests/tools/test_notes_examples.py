"""The usage examples of the pages in COMMENTED_CODE/ are run, each page's in a copy of the project.

In the section "Usage Examples" of a page: a ```python block is run in a namespace of its own (one with
`>>>` as a doctest); of a ```bash block, the lines are run that call etude or a module of it. A ```text
block that follows is what is printed, `...` standing for anything.
<!-- not run: reason --> above a block says why it only has to be a command that exists.
"""

import contextlib
import doctest
import importlib
import io
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from test_docs import check_command

import etude
from etude.models import device

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "COMMENTED_CODE").glob("*.md") if path.name != "README.md")
BLOCK = re.compile(
    r"(?:^<!-- not run:(?P<reason>.*)-->\n\n?)?"
    r"^(?P<ticks>```+)(?P<language>python|bash)\n(?P<code>.*?)^(?P=ticks)$\n?"
    r"(?:\n?^```text\n(?P<output>.*?)^```$)?",
    re.M | re.S,
)
RUN = re.compile(r"(etude|python -m etude)")
LOOSE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Example(NamedTuple):
    line: int  # of the fence, counted from 0
    language: str
    code: str
    output: str | None
    reason: str | None


def examples(text):
    """The examples of a page, in order."""
    start = text.index("\n## Usage Examples\n") + 1
    part = text[start:].partition("\n## Common Issues")[0]
    return [
        Example(text.count("\n", 0, start + m.start("ticks")), m["language"], m["code"], m["output"], m["reason"])
        for m in BLOCK.finditer(part)
    ]  # fmt: skip


def command_lines(code):
    """The lines of a shell block that are run, joined over backslashes."""
    return [line for line in code.replace("\\\n", " ").splitlines() if RUN.match(line)]


def run_python(code, name):
    """Run a python example in this process; what it printed."""
    if code.lstrip().startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(code, {"__name__": "example"}, name, name, 0)
        said = io.StringIO()
        result = doctest.DocTestRunner(optionflags=LOOSE).run(test, out=said.write)
        assert result.attempted and not result.failed, said.getvalue()
        return ""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, name, "exec"), {"__name__": "example"})
    return printed.getvalue()


@contextlib.contextmanager
def unchanged():
    """What an example sets in our modules (device.CONTAINER, say) is put back: other tests run in this process."""
    names = [found.name for found in pkgutil.walk_packages(etude.__path__, "etude.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    before = [dict(vars(module)) for module in modules]
    try:
        yield
    finally:
        for module, kept in zip(modules, before, strict=True):
            vars(module).update(kept)


def run_bash(code, folder):
    """Run the commands of a shell example; what they printed."""
    lines = command_lines(code)
    assert lines, (
        "no line of this block is run; show it as ```text, or begin one with etude or python"
    )
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "PYTHONPATH": str(folder / "src"), "COLUMNS": "100"}
    script = "\n".join(["set -euo pipefail", *lines])
    result = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=env, timeout=120, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    return result.stdout


def run(example, name, folder):
    """Run an example, or hold one that is not run to what can be held."""
    if example.reason is not None:
        assert example.reason.strip(), f"{name}: say why it is not run"
        if example.language == "python":
            compile(example.code, name, "exec")
        for line in command_lines(example.code) if example.language == "bash" else []:
            check_command(shlex.split(line.partition(" | ")[0], comments=True))
        return
    if example.language == "python":
        with unchanged():
            printed = run_python(example.code, name)
    else:
        printed = run_bash(example.code, folder)
    if example.output is not None:
        same = doctest.OutputChecker().check_output(example.output, printed, LOOSE)
        assert same, f"{name} printed:\n{printed}"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project to run in, so that nothing is written in the true one."""
    files = subprocess.check_output(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, text=True
    ).split("\0")
    folder = tmp_path / "etude"
    for name in filter(None, files):
        if (ROOT / name).exists() and (name.startswith(("src/", "data/")) or "/" not in name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    monkeypatch.chdir(folder)
    return folder


def test_pages_are_there_and_have_examples():
    assert len(PAGES) > 30
    found = [example for path in PAGES for example in examples(path.read_text(encoding="utf-8"))]
    run_here = [example for example in found if example.reason is None]
    assert {example.language for example in run_here} == {"python", "bash"}
    assert len(run_here) > len(found) / 2, "most examples should run"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_examples_of_a_page_run(path, project):
    found = examples(path.read_text(encoding="utf-8"))
    assert found, f"{path.name} has no example"
    for example in found:
        run(example, f"{path.name}:{example.line + 1}", project)


# --- the harness itself ----------------------------------------------------------------------


def test_an_example_leaves_our_modules_as_they_were():
    before = device.CONTAINER
    code = "from etude.models import device\ndevice.CONTAINER = 'x'\nprint(device.CONTAINER)"
    with unchanged():
        assert run_python(code, "example") == "x\n"
    assert before == device.CONTAINER


GOOD = """# x.py

```python
raise SystemExit("not an example")
```

## Usage Examples

```python
from pathlib import Path
print(Path("config.yml").exists(), 1 / 3)
Path("written").touch()
```

```text
True 0.333...
```

```python
>>> 1 + 1
2
>>> list(range(100))
[0, 1, ..., 99]
```

```bash
# a comment
etude --version
python -m etude \\
    --version
make nothing
```

<!-- not run: trains for minutes -->
```bash
etude train config.yml --preset quickstart lora.r=16
```

## Common Issues & Solutions

```bash
etude no-such-command
```
"""


def test_good_examples_pass(project):
    found = examples(GOOD)
    assert [(e.language, e.reason) for e in found] == [
        ("python", None), ("python", None), ("bash", None), ("bash", " trains for minutes "),
    ]  # fmt: skip
    assert found[0].output and not found[1].output
    assert GOOD.splitlines()[found[3].line] == "```bash"
    for example in found:
        run(example, "x.py.md", project)
    assert (project / "written").exists() and not (ROOT / "written").exists()


@pytest.mark.parametrize(
    "text",
    [
        "```python\n1 / 0\n```",
        "```python\nprint(1)\n```\n\n```text\n2\n```",
        "```python\n>>> 1 + 1\n3\n```",
        "```bash\nls\n```",
        "```bash\netude tune\n```",
        "<!-- not run: -->\n```bash\netude --version\n```",
        "<!-- not run: slow -->\n```bash\netude train --fast\n```",
        "<!-- not run: slow -->\n```python\nx =\n```",
    ],
)
def test_bad_examples_fail(text, project):
    (example,) = examples(f"\n## Usage Examples\n\n{text}\n")
    with pytest.raises((AssertionError, ZeroDivisionError, SyntaxError)):
        run(example, "x.py.md", project)
