"""The programs as a person runs them: files in, files out, exit codes, and what a mistake gets."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from typer.testing import CliRunner

from etude.cli import MODELINE, app
from etude.config.loading import load_config, to_yaml
from etude.config.schema import Config
from etude.data import dataset
from etude.errors import UserError
from etude.models import device, loading
from etude.runs import opening
from etude.runs.folder import CHECKPOINTS
from etude.training import checkpoints, resuming, trainer

ROOT = Path(__file__).parent.parent


def etude(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train_arguments(tiny_model, files, run, *more):
    return (
        "train", "--preset", "cpu", f"model.name={tiny_model}", f"dataset.train={files}/pairs.jsonl",
        "dataset.validation=null", "dataset.test=null", "training.num_epochs=1",
        "training.eval_steps=2", f"output.dir={run}", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_model, files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    result = etude(*train_arguments(tiny_model, files, folder))
    assert result.exit_code == 0, result.output
    return folder, result.output


def leave_out_proof(monkeypatch):
    """Train without the proof in a new process, which has its own tests and takes seconds."""
    monkeypatch.setattr("etude.runs.proof.in_a_new_process", lambda folder: "left out")


def test_a_run_says_what_it_did(run):
    _, output = run
    # Llama with 2 layers, hidden 32: q 32x32, v 32x16; r=64 gives 2 * 64 * (64 + 48).
    for words in (
        "format prompt_completion",
        "14,336 of",
        "training  5 steps of 8 examples",
        "⟦Answer",
        "etude chat",
    ):
        assert words in output


def test_a_run_folder_holds_all_and_plain_peft_loads_it(run, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, _ = run
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "config.yml", "loss.png",
        "manifest.json", "metrics.jsonl", "checkpoints",
    }  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = base(ids).logits
        plain = PeftModel.from_pretrained(base, folder)(ids).logits
        ours = opening.open_target(str(folder), []).tuned()(ids).logits
    torch.testing.assert_close(plain, ours, rtol=1e-4, atol=1e-4)
    assert not torch.equal(before, plain)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["chat_format"]["stop_tokens"] == ["<|im_end|>"]
    assert manifest["data"]["train"]["kept"] == 36
    assert manifest["data"]["validation"]["kept"] == 4
    assert manifest["base"]["identity"].startswith("sha256:")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 5]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_saved_configuration_trains_the_same_adapter_again(run, tmp_path, monkeypatch):
    leave_out_proof(monkeypatch)
    folder, _ = run
    again = tmp_path / "again"
    result = etude("train", folder / "config.yml", f"output.dir={again}")
    assert result.exit_code == 0, result.output
    first = load_file(folder / "adapter_model.safetensors")
    second = load_file(again / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    # The control: another seed gives another adapter.
    other = tmp_path / "other"
    etude("train", folder / "config.yml", f"output.dir={other}", "training.seed=1")
    third = load_file(other / "adapter_model.safetensors")
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_a_finished_run_is_never_overwritten(run, tiny_model, files):
    folder, _ = run
    before = {path: path.read_bytes() for path in folder.glob("*") if path.is_file()}
    for more in ((), ("--resume",)):
        result = etude(*train_arguments(tiny_model, files, folder, *more))
        assert result.exit_code == 2
        assert "never overwritten" in result.output
        assert f"{folder.name}-2" in result.output
    assert {path: path.read_bytes() for path in folder.glob("*") if path.is_file()} == before
    foreign = folder.parent / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    result = etude(*train_arguments(tiny_model, files, foreign))
    assert result.exit_code == 2
    assert "is not a run: it holds thesis.txt" in result.output
    assert "remove" not in result.output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_the_command_that_goes_on(
    tiny_model, files, tmp_path, monkeypatch, number, code
):
    folder = tmp_path / "run"
    original = trainer.Recorder.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(trainer.Recorder, "on_step_end", interrupt)
    result = etude(*train_arguments(tiny_model, files, folder))
    assert result.exit_code == code
    assert "once more to stop immediately" in result.output
    assert "stopped at step 3 of 5" in result.output
    assert "--resume" in result.output
    monkeypatch.undo()
    leave_out_proof(monkeypatch)

    refused = etude(*train_arguments(tiny_model, files, folder, "--no-resume"))
    assert refused.exit_code == 2
    assert "did not end" in refused.output
    refused = etude("evaluate", folder)
    assert "has no adapter yet" in refused.output
    other = etude(*train_arguments(tiny_model, files, folder, "--resume", "lora.r=8"))
    assert other.exit_code == 2
    assert "lora.r 64 (now 8)" in other.output

    # Half a checkpoint, as a kill leaves it, and half a line in the log are skipped.
    (folder / "checkpoints" / "checkpoint-4").mkdir()
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3, "lo')
    kept = (files / "pairs.jsonl").read_text()
    (files / "pairs.jsonl").write_text(kept.replace("Answer 7.", "Another."))
    changed = etude("train", folder / "config.yml", "--resume")
    (files / "pairs.jsonl").write_text(kept)
    assert changed.exit_code == 2
    assert "these changed: train data, validation data" in changed.output

    result = etude("train", folder / "config.yml")
    assert result.exit_code == 0, result.output
    assert "checkpoint-4: skipped: corrupt, sha256.json cannot be read" in result.output
    assert "checkpoint-3" in result.output
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert json.loads((folder / "manifest.json").read_text())["results"]["steps"] == 5


def test_a_second_signal_stops_immediately_and_force_goes_on(
    tiny_model, files, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    original = trainer.StepTrainer.training_step

    def twice(self, *args, **kwargs):
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer.StepTrainer, "training_step", twice)
    result = etude(*train_arguments(tiny_model, files, folder, "training.save_steps=1"))
    assert result.exit_code == 130
    assert "stopped immediately; go on with" in result.output
    last, corrupt = checkpoints.newest(folder / CHECKPOINTS)
    assert (checkpoints.step_of(last), corrupt) == (3, [])
    monkeypatch.undo()
    leave_out_proof(monkeypatch)

    changed = ("training.save_steps=1", "training.learning_rate=0.001")
    result = etude(*train_arguments(tiny_model, files, folder, *changed))
    assert result.exit_code == 2
    assert "training.learning_rate" in result.output and "--force" in result.output
    result = etude(*train_arguments(tiny_model, files, folder, *changed, "--force"))
    assert result.exit_code == 0, result.output
    assert "--force: " in result.output
    assert load_config(folder / "config.yml").training.learning_rate == 0.001
    # Its handlers are gone with the training.
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_without_a_whole_checkpoint_is_refused(tiny_model, files, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr("etude.models.lora.save", lambda *_: 1 / 0)  # no checkpoint can be written
    assert etude(*train_arguments(tiny_model, files, folder)).exit_code == 1
    monkeypatch.undo()
    result = etude(*train_arguments(tiny_model, files, folder, "--resume"))
    assert result.exit_code == 2
    assert "no checkpoint to go on from" in result.output
    (folder / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    result = etude(*train_arguments(tiny_model, files, folder))
    assert result.exit_code == 2
    assert "holds no checkpoint that is whole" in result.output


def test_what_was_found_is_written_into_the_runs_configuration():
    settings = Config()
    table = dataset.Table("file", "classification", [], "0", labels=["no", "yes"])
    place = device.choose("float32", True)
    hub = loading.Base(None, None, "some/model", "commit:abc", place)
    found = resuming.with_found(settings, table, hub)
    assert (found.dataset.labels, found.model.revision) == (["no", "yes"], "abc")
    local = loading.Base(None, None, "folder", "sha256:abc", place)
    assert resuming.with_found(settings, table, local).model.revision is None


def test_an_adapter_meets_only_its_own_base_and_format(run, tiny_model, tmp_path):
    folder, _ = run
    manifest = json.loads((folder / "manifest.json").read_text())
    for change, words in (
        ({"base": {**manifest["base"], "identity": "sha256:0"}}, "trained on another base"),
        ({"chat_format": {**manifest["chat_format"], "template": "x"}}, "chat format differs"),
        ({"chat_format": {**manifest["chat_format"], "system_prompt": "x"}}, "chat format differs"),
    ):
        (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(UserError, match=words):
            opening.open_target(str(folder), [])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert opening.open_target(str(folder), []).adapter == folder


def test_an_adapter_made_elsewhere_is_opened_by_its_own_config(run, tiny_model, tmp_path):
    import shutil

    folder, _ = run
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / name, tmp_path / name)
    target = opening.open_target(str(tmp_path), ["training.use_cpu=true"])
    assert target.base.name == str(tiny_model)
    assert target.adapter == tmp_path


def test_init_writes_the_schema_and_nothing_over_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert etude("init").exit_code == 0
    assert (tmp_path / "config.yml").read_text() == MODELINE + to_yaml(Config())
    (tmp_path / "config.yml").write_text("mine")
    result = etude("init")
    assert result.exit_code == 2
    assert "not overwritten" in result.output
    assert (tmp_path / "config.yml").read_text() == "mine"
    assert etude("init", "no/such/folder/x.yml").exit_code == 2


def test_the_repositorys_config_is_what_init_writes():
    assert (ROOT / "config.yml").read_text() == MODELINE + to_yaml(Config())


def test_validate_reads_the_data_before_it_asks_for_the_model(monkeypatch):
    monkeypatch.chdir(ROOT)
    result = etude("validate", "config.yml")  # the default model is on the Hub, out of reach here
    assert result.exit_code == 2, result.output
    assert "the Hub cannot be reached" in result.output
    assert "2,880 rows, format classification, labels negative, neutral, positive" in result.output
    # The validation is cut from train: its columns are those of train, reported once, with its rows.
    assert "train: unused columns: rating (3,200)" in result.output
    assert result.output.count("unused columns") == 1
    result = etude("validate", "config.yml", "dataset.columns={text: rating}", "lora.rr=4")
    assert result.exit_code == 2
    assert "lora.r" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nothing.yml"], "no such file"),
        (["train", "a.yml", "b.yml"], "one name is expected"),
        (["train", "--preset", "quikstart"], "there are: cpu"),
        (["train", "--preset", "cpu", "lora.r"], "no such file"),
        (["train", "--preset", "cpu", "model.name=./nothing"], "not a model folder"),
        (["train", "--preset", "cpu", "dataset.train=nothing.jsonl"], "no such file"),
        (["train", "--preset", "cpu", "training.fp16=true"], "fp16"),
    ],
)
def test_mistakes_end_with_a_sentence_and_exit_code_2(arguments, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = etude(*arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output


def test_a_folder_that_cannot_be_written_is_an_error(tiny_model, files, tmp_path):
    (tmp_path / "file").write_text("")
    for arguments in (
        train_arguments(tiny_model, files, tmp_path / "file" / "run"),
        ("evaluate", tiny_model, "--data", files / "pairs.jsonl", "--out", tmp_path / "file" / "x"),
    ):
        result = etude(*arguments)
        assert result.exit_code == 2
        assert "file" in result.output and "directory" in result.output.lower()
        assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), "disk is full"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "full"),
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory on the GPU"),
        (OSError(28, "No space left on device", "runs/x"), "runs/x: the disk is full, or"),
        (OSError(122, "Disk quota exceeded"), "the disk is full, or its quota used up; free some"),
    ],
)
def test_a_full_machine_ends_with_a_sentence_without_a_traceback(error, words, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("etude.train_with_config.config_from", fail)
    result = etude("train")
    assert result.exit_code == 2
    assert words in result.output
    # The control: any other error is a bug, and keeps its traceback.
    monkeypatch.setattr("etude.train_with_config.config_from", lambda *_: 1 / 0)
    assert isinstance(etude("train").exception, ZeroDivisionError)


@pytest.mark.parametrize("module", ["train_with_config", "evaluation", "chat"])
def test_every_program_runs_as_a_module(module):
    command = [sys.executable, "-m", f"etude.{module}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "KEY=VALUE" in done.stdout
