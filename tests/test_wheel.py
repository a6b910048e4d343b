"""The wheel: installed by itself, in another folder than the clone, it trains, evaluates and chats."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the installed wheel, and nothing else of the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True)
    return wheel, site


def test_the_wheel_holds_all_code_and_no_more(installed):
    inside = set(zipfile.ZipFile(installed[0]).namelist())
    source = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "etude").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {"etude/cli.py", "etude/config/presets/quickstart.yml"} < source
    assert {name for name in inside if ".dist-info/" not in name} == source


def test_from_another_folder_it_trains_evaluates_and_chats(installed, tiny_model, tmp_path):
    rows = [{"text": f"{word} {n}", "label": word} for n in range(8) for word in ("good", "bad")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yml").write_text(
        f"model: {{name: {tiny_model}, dtype: float32}}\n"
        "dataset: {train: rows.jsonl, test: rows.jsonl, validation_split: 0.25}\n"
        "training: {num_epochs: 1, use_cpu: true}\noutput: {dir: run}\n"
    )

    def etude(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "etude", *arguments], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(installed[1])},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import etude; print(etude.__file__)"
    done = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(installed[1])})  # fmt: skip
    assert Path(done.stdout.strip()).is_relative_to(installed[1])
    assert "saved in run" in etude("train", "mine.yml")
    assert "accuracy" in etude("evaluate", "run")
    assert etude("chat", "run", "--prompt", "Hello", "generation.max_new_tokens=4").strip()
