"""A file imports only from lower layers, and heavy libraries only where they are used."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "etude"

LAYERS = [
    ["__init__", "errors", "bounded"],
    ["files", "foreign", "ranks"],
    ["strict_yaml", "sources"],
    ["config"],
    ["device", "conversation", "columns"],
    ["models", "lora", "data", "cross_entropy"],
    ["batching", "generation", "quality", "metrics"],
    ["runs", "dialogue", "report", "checkpoints", "terminal", "int8", "compiled", "counting"],
    ["trainer", "proof", "plan", "rehearsal"],
    ["main", "train_with_config", "evaluation", "chat"],
    ["cli"],
    ["__main__"],
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "datasets",
    "sklearn",
    "scipy",
    "numpy",
    "matplotlib",
    "prompt_toolkit",
}
FILES = sorted(SOURCE.rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything that the code under `tree` imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not in use here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(tree: ast.AST) -> set[str]:
    """Names of the etude modules that the code imports."""
    parts = [name.split(".") for name in imported(tree)]
    return {name[1] if len(name) > 1 else "__init__" for name in parts if name[0] == "etude"}


def heavy_at_the_top(tree: ast.Module) -> set[str]:
    """Heavy libraries that importing the module would load."""
    found = set()
    for node in tree.body:
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not guarded and not isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        ):
            found |= {name.split(".")[0] for name in imported(node)} & HEAVY
        if isinstance(node, ast.ClassDef):  # a class's body runs too, its methods do not
            found |= heavy_at_the_top(ast.Module(node.body, []))
    return found


def test_files_are_found():
    assert len(FILES) > 10
    assert {"errors.py", "config.py", "cli.py", "main.py"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_come_from_lower_layers(path):
    name = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert name in LAYER, (
        f"{path.name} has no layer; give it one here, in DESIGN and in CONTRIBUTING"
    )
    above = {
        other
        for other in own(ast.parse(path.read_text())) - {"__version__"}
        if LAYER[other] >= LAYER[name]
    }
    assert not above, f"{name} (layer {LAYER[name]}) imports {above}"


def test_the_simple_script_imports_nothing_of_ours():
    assert own(ast.parse((SOURCE / "main.py").read_text())) == set()


# main.py is a script for reading; the others' classes have their bases in torch or transformers, so
# they are themselves imported only where they are used.
AT_THE_TOP = {"main", "trainer", "cross_entropy", "int8", "compiled"}
LIGHT = [path for path in FILES if path.stem not in AT_THE_TOP]


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: path.stem)
def test_heavy_libraries_are_imported_where_they_are_used(path):
    tree = ast.parse(path.read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert heavy_at_the_top(tree) == set()
    assert not own(ast.Module(top, [])) & AT_THE_TOP


def test_the_command_line_starts_without_heavy_libraries():
    code = f"import sys, etude.cli; print({HEAVY!r} & set(sys.modules), 'typer' in sys.modules)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "set() True\n"


def test_the_checks_see_what_they_look_for():
    # The negative control of all above.
    assert own(ast.parse("from etude import chat\nimport etude.cli\ndef f():\n  from etude.runs import x")) == {
        "chat", "cli", "runs"
    }  # fmt: skip
    code = "import torch.nn\nif X:\n  from peft import Y\nclass C:\n  import scipy\n  def f(self): import sklearn"
    assert heavy_at_the_top(ast.parse(code)) == {"torch", "peft", "scipy"}
    hidden = "if TYPE_CHECKING:\n  import torch\ndef f():\n  import peft"
    assert heavy_at_the_top(ast.parse(hidden)) == set()
    assert heavy_at_the_top(ast.parse((SOURCE / "main.py").read_text())) >= {
        "torch",
        "transformers",
    }
