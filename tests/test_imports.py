"""Heavy libraries are imported only where they are used. The order of the packages is import-linter's."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "etude"
HEAVY = {
    "torch", "transformers", "peft", "datasets", "sklearn", "scipy", "numpy", "matplotlib", "prompt_toolkit"
}  # fmt: skip
# main.py is a script for reading; the others' classes have their bases in torch or transformers, so
# they are themselves imported only where they are used.
AT_THE_TOP = {
    "etude.main", "etude.training.trainer", "etude.training.guards", "etude.engine.loss", "etude.engine.int8",
    "etude.engine.compiling",
}  # fmt: skip
FILES = {
    ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path
    for path in sorted(SOURCE.rglob("*.py"))
}


def imported(node: ast.AST) -> Iterator[str]:
    """Dotted names of everything that the code under `node` imports."""
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            yield from (alias.name for alias in part.names)
        elif isinstance(part, ast.ImportFrom):
            yield from (f"{part.module}.{alias.name}" for alias in part.names)


def heavy_at_the_top(tree: ast.Module) -> set[str]:
    """What importing the module would load of the heavy libraries, and of our modules that load them."""
    found: set[str] = set()
    for node in tree.body:
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if isinstance(node, ast.ClassDef):  # a class's body runs too, its methods do not
            found |= heavy_at_the_top(ast.Module(node.body, []))
        elif not guarded and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = list(imported(node))
            found |= {name.split(".")[0] for name in names} & HEAVY
            found |= {
                ours for ours in AT_THE_TOP for name in names if f"{name}.".startswith(f"{ours}.")
            }
    return found


@pytest.mark.parametrize("name", sorted(FILES.keys() - AT_THE_TOP))
def test_heavy_libraries_are_imported_where_they_are_used(name):
    assert heavy_at_the_top(ast.parse(FILES[name].read_text())) == set()


def test_the_command_line_starts_without_heavy_libraries():
    code = f"import sys, etude.cli; print({HEAVY!r} & set(sys.modules), 'typer' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set() True\n"


def test_the_check_sees_what_it_looks_for():
    # The negative control of the above.
    assert FILES.keys() > AT_THE_TOP
    code = "import torch.nn\nif X:\n  from peft import Y\nclass C:\n  import scipy\n  def f(self): import sklearn"
    assert heavy_at_the_top(ast.parse(code)) == {"torch", "peft", "scipy"}
    assert heavy_at_the_top(ast.parse("from etude.engine import int8")) == {"etude.engine.int8"}
    hidden = "if TYPE_CHECKING:\n  import torch\ndef f():\n  import peft"
    assert heavy_at_the_top(ast.parse(hidden)) == set()
    assert heavy_at_the_top(ast.parse((SOURCE / "main.py").read_text())) >= {
        "torch",
        "transformers",
    }
