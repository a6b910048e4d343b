"""Several real processes: they train what one trains, and a mistake or a loss is told once."""

import json
import os
import subprocess
import sys

import pytest
from test_trainer import settings_for

from etude import distributed, train_with_config
from etude.config.loading import load_config, to_yaml
from etude.errors import UserError
from etude.models import lora
from etude.runs import proof
from etude.runs.folder import METRICS
from etude.runs.manifest import read_metrics
from etude.training import resuming, trainer
from etude.training.reporter import Reporter

# Trains as `etude train` does, and notes the rows of every step. "apart" leaves out the sum of the
# gradients; "killed" ends process 1 as kill -9 does, and the launcher ends process 0 while it reports that.
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from etude import console, distributed, screen, train_with_config
from etude.config.loading import load_config
from etude.runs import proof
from etude.training import trainer

proof.in_a_new_process = lambda folder: "left out"  # it has its own tests, and takes seconds
step, passes = trainer.StepTrainer.training_step, trainer.StepTrainer._passes
rows, modes = [], sys.argv[2:]

def noted(self, model, inputs, *more):
    rows.append([example.origin for example in inputs["examples"]])
    once = Path("killed_at")
    if mode == "killed" and distributed.RANK == 1 and self.state.global_step == 13 and not once.exists():
        once.write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, model, inputs, *more)

def apart(self, *arguments):
    world, distributed.WORLD = distributed.WORLD, 1
    try:
        return passes(self, *arguments)
    finally:
        distributed.WORLD = world

trainer.StepTrainer.training_step = noted
tell = console._warn

def interrupted(*parts):
    if mode == "killed" and "error" in str(parts[0]):
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher's, which may come at any moment
    tell(*parts)

console._warn = interrupted

@console.command
def main():
    global mode
    for mode in modes:
        rows.clear()
        trainer.StepTrainer._passes = apart if mode == "apart" else passes
        settings = load_config(Path(sys.argv[1]), overrides=[f"output.dir={mode}"])
        train_with_config.run_training(settings, screen.Screen())
        Path(f"{mode}-{distributed.RANK}.json").write_text(json.dumps(rows))

main()
"""


def launch(folder, *arguments):
    """Two processes of `arguments` by torchrun, in `folder`."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def launched(tiny_model, tmp_path_factory):
    """A configuration of 22 steps, and its runs: by one process, two, two that do not add, two of which one dies."""
    folder = tmp_path_factory.mktemp("ranks")
    rows = [
        {"prompt": f"Question {n}: " + "why " * (n % 5), "completion": "Because " * (1 + n % 4) + "so."}
        for n in range(81)  # the last of 11 steps has one row, so that one of two processes has none
    ]  # fmt: skip
    for name, part in (("train", rows), ("val", rows[:5])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    settings = settings_for(
        tiny_model, folder, "training.num_epochs=2", "training.eval_steps=6", "training.batch_size=4",
        "training.gradient_accumulation_steps=2", "lora.r=8", "lora.alpha=16",
    )  # fmt: skip
    (folder / "c.yml").write_text(to_yaml(settings))
    (folder / "worker.py").write_text(WORKER)
    done = launch(folder, "worker.py", "c.yml", "two", "apart", "killed")
    (folder / "ended_at").touch()
    assert (folder / "killed_at").exists(), done.stderr
    step, steps = trainer.StepTrainer.training_step, []

    def noted(self, model, inputs, *more):
        steps.append([example.origin for example in inputs["examples"]])
        return step(self, model, inputs, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.StepTrainer, "training_step", noted)
        patch.setattr(proof, "in_a_new_process", lambda folder: "left out")
        output = settings.output.model_copy(update={"dir": str(folder / "one")})
        train_with_config.run_training(settings.model_copy(update={"output": output}), Reporter())
    (folder / "one-0.json").write_text(json.dumps(steps))
    return folder, done


def logged_losses(run):
    """The losses in metrics.jsonl by step and kind."""
    return {
        (line["step"], kind): line[kind]
        for line in read_metrics(run / METRICS)
        for kind in ("loss", "eval_loss")
        if kind in line
    }


def test_two_processes_learn_what_one_learns(launched):
    folder, done = launched
    assert done.stdout.count("\nmodel ") == 3  # once for each training, not for each process
    one, two, apart = (logged_losses(folder / name) for name in ("one", "two", "apart"))
    assert len([kind for _, kind in one if kind == "loss"]) == 22
    assert len([kind for _, kind in one if kind == "eval_loss"]) == 4
    assert two == pytest.approx(one, rel=1e-5)
    assert apart != pytest.approx(one, rel=1e-5)  # the control
    first, second = (lora.read_weights(folder / name) for name in ("one", "two"))
    assert max(float((first[key] - second[key]).abs().max()) for key in first) < 1e-4
    # Each step's rows are shared out: none twice, none left out.
    steps, *shares = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("one-0", "two-0", "two-1")
    )
    assert len(steps) == 22
    for whole, mine, others in zip(steps, *shares, strict=True):
        assert sorted(mine + others) == sorted(whole)
        assert not set(mine) & set(others)
    assert shares[1][10] == []


def test_a_killed_process_ends_the_other_and_as_many_go_on_bit_for_bit(launched, monkeypatch):
    folder, done = launched
    assert (folder / "ended_at").stat().st_mtime - float((folder / "killed_at").read_text()) < 30
    assert done.returncode != 0
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert told.startswith("error: step 14: another process of this training is gone")
    assert told.endswith("give the same command again")
    assert (folder / "killed/checkpoints/checkpoint-12").is_dir()
    assert "stoppable" not in done.stderr  # no traceback of ours
    monkeypatch.chdir(folder)
    settings = load_config(folder / "c.yml", overrides=["output.dir=killed"])
    with pytest.raises(UserError, match=r"other settings: processes 2 \(now 1\)\. .*torchrun"):
        resuming.open_folder(settings, None)
    again = launch(folder, "worker.py", "c.yml", "killed")
    assert again.returncode == 0, again.stderr
    assert lora.digest(lora.read_weights(folder / "killed")) == lora.digest(
        lora.read_weights(folder / "two")
    )
    assert logged_losses(folder / "killed") == logged_losses(folder / "two")


def test_a_mistake_is_reported_once(launched):
    folder, _ = launched
    done = launch(folder, "-m", "etude.train_with_config", "c.yml", "training.learning_rat=1")
    assert done.returncode != 0
    assert done.stderr.count("did you mean training.learning_rate?") == 1
    assert "src/etude" not in done.stderr


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP=true in.*Etude gives each process the whole base"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED=true"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, r"number format \(no\)"),
    ],
)
def test_a_launcher_that_asks_for_something_else_is_refused(monkeypatch, environment, words):
    distributed.check_launcher("no")
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=words):
        distributed.check_launcher("no")


def test_processes_that_differ_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "WORLD", 2)
    monkeypatch.setattr(distributed, "gather", lambda facts: [facts, facts])
    distributed.agree({"the examples": "a"})
    monkeypatch.setattr(distributed, "gather", lambda facts: [facts, {"the examples": "b"}])
    with pytest.raises(UserError, match="the examples: b in process 1, a in process 0"):
        distributed.agree({"the examples": "a"})


WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "1"}, "RANK='1' in the environment: of N processes.*unset RANK\\."),
        ({"RANK": "0"}, "unset RANK"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE='2' in.*unset WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK='0' in.*unset LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT.*unset RANK WORLD_SIZE"),
        ({**WHOLE, "MASTER_ADDR": ""}, "RANK='1', WORLD_SIZE='2'"),
        ({**WHOLE, "RANK": "one"}, "RANK='one', WORLD_SIZE='2'"),
        ({**WHOLE, "RANK": ""}, "RANK=''"),
        ({**WHOLE, "WORLD_SIZE": "-2"}, "WORLD_SIZE='-2'"),
        ({**WHOLE, "MASTER_PORT": "http"}, "MASTER_ADDR and MASTER_PORT"),
        ({**WHOLE, "RANK": "2"}, "RANK='2', WORLD_SIZE='2'"),
        ({**WHOLE, "LOCAL_RANK": "5"}, "LOCAL_RANK='5'"),
        ({**WHOLE, "WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        # What must stay right.
        ({}, None),
        (WHOLE, None),
        ({**WHOLE, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "SLURM_PROCID": "3"}, None),
    ],
)  # fmt: skip
def test_variables_that_a_launcher_left_are_named(environment, words, monkeypatch):
    for key in (*WHOLE, "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    if words is None:
        distributed.check("chat")
        return
    with pytest.raises(UserError, match=words):
        distributed.check("train")
    assert "torchrun --nproc_per_node" in str(distributed.why_not_launched(environment))


def test_a_program_that_is_one_process_is_not_run_by_several(monkeypatch):
    monkeypatch.setattr(distributed, "WORLD", 2)
    distributed.check("train")
    for program in ("evaluate", "chat", "reproduce"):
        with pytest.raises(UserError, match=f"{program}: it is one process.*process 0 of 2"):
            distributed.check(program)
