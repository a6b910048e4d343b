"""Etude from Python: the same figures and answers as the programs give, and nothing printed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import etude
from etude.cli import app
from etude.config.schema import Lora
from etude.models import lora
from etude.runs import opening

ON_CPU = {"model": {"dtype": "float32"}, "training": {"use_cpu": True}}
GREEDY = {"generation": {"temperature": 0, "max_new_tokens": 6}}
LABELS = ["good", "bad"]
SETTINGS = ["model.dtype=float32", "training.use_cpu=true", "dataset.labels=[good, bad]"]


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """An adapter on the tiny model that changes its answers."""
    import torch

    folder = tmp_path_factory.mktemp("api") / "adapter"
    base = opening.open_target(str(tiny_model), SETTINGS[:2]).base.model
    tuned = lora.attach(base, Lora(r=4, alpha=64, target_modules=["all-linear"]), str(tiny_model))
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    lora.save(tuned, folder)
    return folder


@pytest.fixture(scope="module")
def model(adapter):
    return etude.load(str(adapter), **ON_CPU, **GREEDY, dataset={"labels": LABELS})


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"text": f"{label} thing {n}", "label": label} for n in range(4) for label in LABELS]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def etude_program(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def test_generate_says_what_chat_says_and_prints_nothing(model, adapter, capfd):
    said = model.generate("Hello")
    assert model.generate([{"role": "user", "content": "Hello"}]) == said
    assert capfd.readouterr().out == ""
    program = etude_program("chat", adapter, "--prompt", "Hello", *SETTINGS, "generation.temperature=0",
                            "generation.max_new_tokens=6")  # fmt: skip
    assert program.stdout.strip() == said
    assert model.generate("Hello", max_new_tokens=1) != said  # the control


def test_a_chat_remembers(model):
    talk = model.chat(system="Be brief.")
    first = talk.ask("Hello")
    second = talk.ask("Why?")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Why?"},
    ]
    assert second == model.generate(messages)
    assert second != model.generate("Why?")  # the control


def test_scores_and_figures_are_those_of_the_program(model, adapter, rows, tmp_path):
    shares = model.score("good thing")
    assert list(shares) == LABELS and sum(shares.values()) == pytest.approx(1)
    printed = etude_program("evaluate", adapter, "--text", "good thing", *SETTINGS).stdout
    assert all(f"{share:.1%}" in printed for share in shares.values())
    found = model.evaluate(str(rows))
    assert not list(adapter.glob("evaluation*"))
    etude_program("evaluate", adapter, "--data", rows, "--out", tmp_path / "out", *SETTINGS)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["models"] == report["models"] and found["data"] == report["data"]


def small(tiny_model, rows, folder):
    """Settings of a training of two steps."""
    return {
        **ON_CPU,
        "model": {"name": str(tiny_model), "dtype": "float32"},
        "dataset": {"train": str(rows), "validation_split": 0, "test": None, "max_length": 64},
        "training": {"use_cpu": True, "max_steps": 2, "warmup_steps": 0},
        "output": {"dir": str(folder)},
    }


def test_the_example_of_the_readme_runs(model, rows, tiny_model, tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S)
    train, settings = etude.train, small(tiny_model, rows, tmp_path / "run")
    monkeypatch.setattr(etude, "load", lambda run: model)
    monkeypatch.setattr(etude, "train", lambda preset, **more: train(**settings, **more))
    exec(code.replace("data/tweets_sentiment.validation.jsonl", str(rows)), {})
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:2]] == ["1", "2"]  # the steps
    assert "'good': 0." in printed[2] and 0 <= float(printed[-1]) <= 1


def test_mistakes_are_user_errors(model, tiny_model):
    with pytest.raises(etude.UserError, match="did you mean temperature"):
        model.generate("Hello", temprature=0)
    with pytest.raises(etude.UserError, match="lora: 8 should be a valid dictionary"):
        etude.load(str(tiny_model), lora=8)
    with pytest.raises(etude.UserError, match=r"lora\.rank"):
        etude.load(str(tiny_model), lora={"rank": 8})
    with pytest.raises(etude.UserError, match="no labels to score"):
        etude.load(str(tiny_model), **ON_CPU).score("x")


def test_importing_etude_imports_little():
    code = "import sys, etude; print({'pydantic', 'torch', 'typer', 'etude.model'} & set(sys.modules)); etude.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n" and "no attribute 'nothing'" in done.stderr
    assert all(getattr(etude, name) for name in etude.__all__)


# --- training ----------------------------------------------------------------------------------


def test_train_trains_as_the_program_does_and_prints_nothing(tiny_model, rows, tmp_path, capfd):
    settings = small(tiny_model, rows, tmp_path / "run")
    steps = []
    run = etude.train(**settings, lora={"r": 4}, on_step=steps.append)
    assert capfd.readouterr() == ("", "")
    assert [(step.number, step.steps) for step in steps] == [(1, 2), (2, 2)]
    assert run.results["train_loss"] == steps[-1].loss
    written = json.loads((run.folder / "manifest.json").read_text())
    assert written["config"]["lora"]["r"] == 4 and written["results"] == run.results
    program = tmp_path / "program"
    etude_program("train", run.folder / "config.yml", f"output.dir={program}")
    assert lora.digest(lora.read_weights(program)) == lora.digest(lora.read_weights(run.folder))
    assert etude.load(str(run.folder), **ON_CPU).score("good thing").keys() == set(LABELS)
    with pytest.raises(etude.UserError, match="holds a finished run, which is never overwritten"):
        etude.train(**settings)
    with pytest.raises(etude.UserError, match=r"lora\.rank"):
        etude.train(preset="quickstart", lora={"rank": 8})
