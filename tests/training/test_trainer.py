"""Training on whole steps: how a step is cut does not change what is learnt."""

import inspect
import itertools
import json
import logging
import math
import re
import shutil
import types

import pytest
import torch
import transformers

from etude import distributed
from etude.config.loading import load_config
from etude.config.schema import Config
from etude.data import dataset, splits
from etude.engine import packing
from etude.engine.setup import configure_engine
from etude.errors import UserError
from etude.files import sha256
from etude.models import device, loading, lora
from etude.runs import opening, proof
from etude.runs.folder import CHECKPOINTS, METRICS
from etude.runs.manifest import read_metrics
from etude.training import checkpoints, memory, order, trainer

ROWS = [
    {"prompt": f"Question {n}: " + "why " * (n % 5), "completion": "Because " * (1 + n % 4) + "so."}
    for n in range(24)
]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:5]))
    return tmp_path


def settings_for(tiny_model, folder, *overrides):
    return load_config(
        None,
        overrides=[
            f"model.name={tiny_model}",
            "model.dtype=float32",
            "training.use_cpu=true",
            f"dataset.train={folder}/train.jsonl",
            f"dataset.validation={folder}/val.jsonl",
            "dataset.test=null",
            "dataset.max_length=128",
            "training.learning_rate=0.01",
            "training.num_epochs=1",
            "training.logging_steps=1",
            f"output.dir={folder}/run",
            *overrides,
        ],
    )


def fit(model, settings, place, examples, folder, checkpoint=None):
    """Train `model` as the program does, up to its results."""
    steps = order.step_count(settings, len(packing.by_row(examples["train"])))
    engine = configure_engine(model, settings, place, examples["train"], steps)
    cutter = memory.rehearse(model, engine.cutter, examples["train"], settings)
    results = trainer.fit(model, settings, place, examples, folder, cutter, checkpoint)
    return {**results, "engine": str(engine)}


def fitted(settings, folder, checkpoint=None, prepare=None):
    """Train as the program does, without its terminal; returns the model, results and log lines."""
    folder.mkdir(exist_ok=True)
    place = device.choose("float32", True)
    base = loading.load_base(settings.model.name, place)
    renderer = opening.renderer_for(base, settings)
    examples = {}
    for split, table in splits.read_splits(settings.dataset, settings.training.seed)[0].items():
        examples[split] = dataset.encode(table, renderer, settings.dataset, split).examples
    torch.manual_seed(settings.training.seed)
    model = lora.attach(base.model, settings.lora, base.name)
    if prepare:
        prepare(model)
    results = fit(model, settings, place, examples, folder, checkpoint)
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return model, results, lines


def adapter(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_8x1_4x2_1x8_packed_and_padded_learn_the_same(tiny_model, files, monkeypatch):
    outcomes = {}
    for packed in (True, False):
        if not packed:
            monkeypatch.setattr("etude.engine.packing.why_not_packed", lambda *_: "test")
        for rows, accumulation in ((8, 1), (4, 2), (1, 8)):
            settings = settings_for(
                tiny_model,
                files,
                f"training.batch_size={rows}",
                f"training.gradient_accumulation_steps={accumulation}",
            )
            name = f"{packed}-{rows}"
            model, results, lines = fitted(settings, files / name)
            assert results["steps"] == 3
            tokens = min(rows * 128, 512)
            engine = f"packed passes of {tokens} tokens" if packed else "padded passes"
            assert results["engine"] == engine
            losses = [line["loss"] for line in lines if "loss" in line]
            outcomes[name] = (losses, adapter(model))
    first_losses, first_weights = outcomes.pop("True-8")
    assert len(first_losses) == 3
    assert len(outcomes) == 5
    for losses, weights in outcomes.values():
        assert losses == pytest.approx(first_losses, rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(value, first_weights[name], rtol=1e-3, atol=1e-5)
    # Another number of rows a step is another training: the comparison can fail.
    settings = settings_for(tiny_model, files, "training.gradient_accumulation_steps=4")
    _, _, lines = fitted(settings, files / "other")
    assert [line["loss"] for line in lines if "loss" in line][:3] != pytest.approx(first_losses)


def test_step_loss_is_transformers_own_over_the_supervised_tokens(tiny_model, files):
    settings = settings_for(
        tiny_model, files, "training.gradient_accumulation_steps=24", "training.warmup_steps=0"
    )
    _, _, lines = fitted(settings, files / "run")
    base = loading.load_base(str(tiny_model), device.choose("float32", True))
    renderer = opening.renderer_for(base, settings)
    total = tokens = 0
    for row in ROWS:
        (example,) = renderer.render(
            [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        )
        labels = [i if s else -100 for i, s in zip(example.ids, example.supervised, strict=True)]
        with torch.no_grad():
            loss = base.model(
                input_ids=torch.tensor([example.ids]), labels=torch.tensor([labels])
            ).loss
        count = sum(example.supervised)
        total, tokens = total + float(loss) * count, tokens + count
    # The first step starts from the base's own function, because B is zero.
    assert lines[0]["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_the_best_adapter_is_kept_not_the_last(tiny_model, files):
    # Validated on other answers than it learns: their loss falls for a while, then rises again.
    other = [{**row, "completion": "Never, whatever they say."} for row in ROWS[:5]]
    (files / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    settings = settings_for(
        tiny_model,
        files,
        "training.lr_scheduler=constant",
        "training.num_epochs=5",
        "training.eval_steps=2",
    )
    model, results, lines = fitted(settings, files / "run")
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(losses) == 8  # at steps 2, 4, ... and at the last, 15
    assert results["eval_loss"] == min(losses) < losses[-1]
    renderer = opening.renderer_for(
        loading.load_base(str(tiny_model), device.choose("float32", True)), settings
    )
    table = dataset.read(settings.dataset.validation, settings.dataset)
    examples = dataset.encode(table, renderer, settings.dataset, "validation").examples
    model.eval()
    with torch.no_grad():
        sums = packing.sum_by_example(model, packing.pad(examples, 2), len(examples))
    tokens = sum(sum(example.supervised) for example in examples)
    assert float(sums.sum()) / tokens == pytest.approx(min(losses), rel=1e-5)


def test_early_stopping_stops(tiny_model, files):
    overrides = ("training.learning_rate=3.0", "training.num_epochs=30", "training.eval_steps=1")
    settings = settings_for(tiny_model, files, *overrides, "training.early_stopping_patience=2")
    _, results, _ = fitted(settings, files / "run")
    assert results["steps"] < 90


def test_a_loss_that_is_not_finite_stops_before_the_weights(tiny_model, files):
    kept = {}

    def poison(model):
        kept["model"], kept["weights"] = model, adapter(model)
        with torch.no_grad():
            model.get_input_embeddings().weight[:] = math.nan

    settings = settings_for(tiny_model, files)
    with pytest.raises(UserError, match=r"step 1: the loss is not a finite number") as raised:
        fitted(settings, files / "run", prepare=poison)
    assert "The weights of the model are not all finite numbers: " in str(raised.value)
    assert "Copy the model again" in str(raised.value)
    for name, value in adapter(kept["model"]).items():
        assert torch.equal(value, kept["weights"][name])


def poison_row(monkeypatch, what):
    """Make the row "Question 7" alone give a loss or a gradient that is not a number."""
    original = packing.token_losses

    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, losses):
            return losses.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.nan

    def poisoned(model, batch):
        losses = original(model, batch)
        text = " ".join(map(str, batch.input_ids.flatten().tolist()))
        if poisoned.ids in text:
            losses = losses * math.nan if what == "loss" else Poisoned.apply(losses)
        return losses

    monkeypatch.setattr("etude.engine.packing.token_losses", poisoned)
    return poisoned


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_names_its_rows_and_leaves_the_weights(
    tiny_model, files, monkeypatch, what
):
    settings = settings_for(
        tiny_model, files, "training.save_steps=1", "dataset.validation=null",
        "dataset.validation_split=0", "training.batch_size=1",
    )  # fmt: skip
    kept = {}
    monkeypatch.setattr(
        "etude.engine.packing.why_not_packed", lambda *_: "so that ids stand together"
    )
    poisoned = poison_row(monkeypatch, what)
    renderer = opening.renderer_for(
        loading.load_base(str(tiny_model), device.choose("float32", True)), settings
    )
    row = dataset.read(settings.dataset.train, settings.dataset).rows[7]
    poisoned.ids = " ".join(map(str, renderer.render(row.messages)[0].ids))
    with pytest.raises(UserError) as raised:
        fitted(settings, files / "run", prepare=lambda model: kept.update(model=model))
    step = int(re.search(r"step (\d+): the " + what, str(raised.value))[1])
    assert f"the weights are those of step {step - 1}" in str(raised.value)
    assert f"{files}/train.jsonl:8" in str(raised.value)
    if what == "loss":
        assert f"{files}/train.jsonl:9" not in str(raised.value)
    if step > 1:
        last, _ = checkpoints.newest(files / "run" / CHECKPOINTS)
        assert checkpoints.step_of(last) == step - 1
        weights = lora.read_weights(last)
        assert lora.digest(weights) == lora.digest(lora.state(kept["model"]))


@pytest.mark.parametrize("where", ["validation", "proof"])
def test_a_validation_or_proof_that_is_not_finite_names_its_rows(
    tiny_model, files, monkeypatch, where
):
    settings = settings_for(tiny_model, files, "training.max_steps=1", "training.warmup_steps=0")
    base = loading.load_base(str(tiny_model), device.choose("float32", True))
    renderer = opening.renderer_for(base, settings)
    table = dataset.read(settings.dataset.validation, settings.dataset)
    examples = dataset.encode(table, renderer, settings.dataset, "validation").examples
    original = packing.token_losses

    def poisoned(model, batch):
        losses = original(model, batch)
        guilty = " ".join(map(str, examples[2].ids)) in " ".join(
            map(str, batch.input_ids.flatten().tolist())
        )
        return losses * math.nan if guilty and not torch.is_grad_enabled() else losses

    monkeypatch.setattr(
        "etude.engine.packing.why_not_packed", lambda *_: "so that ids stand together"
    )
    assert math.isfinite(proof.mean_loss(base.model, settings, examples))
    monkeypatch.setattr("etude.engine.packing.token_losses", poisoned)
    with pytest.raises(UserError) as raised:
        if where == "proof":
            proof.mean_loss(base.model, settings, examples)
        else:
            fitted(settings, files / "run")
    assert f"{files}/val.jsonl:3" in str(raised.value)
    assert f"{files}/val.jsonl:2" not in str(raised.value)


def test_what_is_not_finite_is_null_in_the_metrics(tmp_path):
    recorder = trainer.Recorder(tmp_path, trainer.Tally())
    state = types.SimpleNamespace(is_world_process_zero=True, global_step=3)
    for norm in (0.5, math.inf, math.nan):
        recorder.on_log(None, state, None, {"loss": 1.0, "grad_norm": norm})
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line)["grad_norm"] for line in lines] == [0.5, None, None]


def test_zero_gradients_and_a_jump_of_the_loss_are_reported(tiny_model, files, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("etude"), "propagate", True)
    monkeypatch.setattr(memory, "rehearse", lambda model, cutter, *_: cutter)  # counts no calls
    settings = settings_for(tiny_model, files, "training.num_epochs=12")
    original = packing.token_losses
    calls = []

    def strange(model, batch):
        losses = original(model, batch)
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) <= 2:
                return losses * 0.0
            if len(calls) == 70:
                return losses + 50
        return losses

    monkeypatch.setattr("etude.engine.packing.token_losses", strange)
    fitted(settings, files / "run")
    told = [record.getMessage() for record in caplog.records]
    assert [text for text in told if "all gradients are zero" in text] != []
    # A set: where programs ran before, their handler reports each record once more.
    (jump,) = {text for text in told if re.search(r"the loss jumped to [2-9]\d\.", text)}
    assert "train.jsonl:" in jump


@pytest.mark.parametrize("learning", [True, False], ids=["step", "validation"])
def test_out_of_memory_cuts_smaller_passes_and_learns_the_same(
    tiny_model, files, monkeypatch, caplog, learning
):
    monkeypatch.setattr(logging.getLogger("etude"), "propagate", True)
    # The rehearsal would have found it out; here it happens in a step.
    monkeypatch.setattr(memory, "rehearse", lambda model, cutter, *_: cutter)
    settings = settings_for(tiny_model, files, "training.batch_size=8",
                            "training.gradient_accumulation_steps=1")  # fmt: skip
    whole, _, lines = fitted(settings, files / "whole")
    original = packing.token_losses
    limit = 100

    def small(model, batch):
        if torch.is_grad_enabled() == learning and batch.input_ids.numel() > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return original(model, batch)

    monkeypatch.setattr("etude.engine.packing.token_losses", small)
    cut, _, again = fitted(settings, files / "cut")
    assert "out of memory; the passes are halved to 256 tokens" in caplog.text
    for key in ("loss", "eval_loss"):
        losses, cut_losses = ([x[key] for x in those if key in x] for those in (lines, again))
        assert losses and cut_losses == pytest.approx(losses, rel=1e-5)
    for name, value in adapter(cut).items():
        torch.testing.assert_close(value, adapter(whole)[name], rtol=1e-3, atol=1e-5)
    limit = 10
    with pytest.raises(UserError, match="not even one example fits in memory"):
        fitted(settings, files / "none")


# --- going on exactly where a training stood ---------------------------------------------------


def losses_of(lines):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


class Killed(BaseException):
    """A kill, as far as a test can have one without losing its own process."""


def optimizer_of(folder):
    checkpoint, passed_over = checkpoints.newest(folder / CHECKPOINTS)
    assert passed_over == []
    progress, tensors = checkpoints.load_state(checkpoint)
    return progress, tensors


@pytest.mark.parametrize("overrides", [
    (), ("lora.dropout=0.1",), ("model.quantization=int8",), ("padded",),
    ("training.eval_steps=2", "training.early_stopping_patience=30"),
    ("dataset.validation=null", "dataset.validation_split=0", "training.num_epochs=2.5"),
], ids=["packed", "dropout", "int8", "padded", "eval", "no-validation"])  # fmt: skip
def test_killed_and_resumed_is_the_same_bit_for_bit(tiny_model, files, monkeypatch, overrides):
    padded = "padded" in overrides
    if padded:
        monkeypatch.setattr("etude.engine.packing.why_not_packed", lambda *_: "test")
        overrides = ()
    common = ("training.num_epochs=3", "training.save_steps=1", "training.logging_steps=2")
    settings = settings_for(tiny_model, files, *common, *overrides)
    whole, results, lines = fitted(settings, files / "whole")
    state = optimizer_of(files / "whole")

    original = trainer.StepTrainer.training_step

    def interrupted(at):
        def step(self, *args, **kwargs):
            if self.state.global_step == at:
                raise Killed
            return original(self, *args, **kwargs)

        return step

    folder = files / "killed"
    # In the middle of an epoch, and at the end of one; for one kind twice at one step, and in each epoch.
    for at in (2, 3) if overrides or padded else (1, 3, 4, 4, 6):
        monkeypatch.setattr(trainer.StepTrainer, "training_step", interrupted(at))
        with pytest.raises(Killed):
            fitted(settings, folder, resumed(folder))
    monkeypatch.setattr(trainer.StepTrainer, "training_step", original)
    model, again, other_lines = fitted(settings, folder, resumed(folder))
    assert lora.digest(lora.state(model)) == lora.digest(lora.state(whole))
    assert losses_of(other_lines) == losses_of(lines)
    progress, tensors = optimizer_of(folder)
    # Of all sessions: later lines have more of it.
    assert 0 < -progress["tally"].pop("began") <= again["seconds"] + 0.1
    state[0]["tally"].pop("began")
    times = [line["seconds"] for line in other_lines]
    assert times == sorted(times)
    assert progress == state[0]
    assert tensors.keys() == state[1].keys()
    assert all(torch.equal(value, state[1][name]) for name, value in tensors.items())
    for key in ("steps", "train_loss", "eval_loss"):
        assert again[key] == results[key]
    # Once more, from its end: nothing is left to do but to tidy up, and it is the same still.
    leftover = folder / CHECKPOINTS / ".unfinished-0123456789abcdef"
    leftover.mkdir()
    model, again, _ = fitted(settings, folder, resumed(folder))
    assert not leftover.exists()
    assert lora.digest(lora.state(model)) == lora.digest(lora.state(whole))
    assert again["eval_loss"] == results["eval_loss"]


def resumed(folder):
    """The checkpoint to go on from, and the log cut back to it, as the program does."""
    checkpoint, _ = checkpoints.newest(folder / CHECKPOINTS)
    if checkpoint:
        step = checkpoints.step_of(checkpoint)
        kept = [x for x in read_metrics(folder / METRICS) if x["step"] <= step]
        (folder / METRICS).write_text("".join(json.dumps(x) + "\n" for x in kept))
    return checkpoint


def test_a_checkpoint_of_another_shape_or_version(tiny_model, files, monkeypatch):
    settings = settings_for(tiny_model, files, "training.save_steps=1")
    fitted(settings, files / "run")
    home = files / "run" / CHECKPOINTS
    checkpoints.remove(home / "checkpoint-3")  # as if killed after the second of three steps

    def resume(name, *path, value=None):
        """Resume a copy with the value at `path` of a file replaced, its sum made right."""
        folder = shutil.copytree(files / "run", files / f"copy{len(list(files.iterdir()))}")
        file = folder / CHECKPOINTS / "checkpoint-2" / name
        whole = inner = json.loads(file.read_text())
        for key in path[:-1]:
            inner = inner[key]
        inner.pop(path[-1])
        if value is not None:
            inner[path[-1]] = value
        file.write_text(json.dumps(whole))
        sums = json.loads((file.parent / checkpoints.SUMS).read_text())
        sums[name] = sha256(file)
        (file.parent / checkpoints.SUMS).write_text(json.dumps(sums))
        return fitted(settings, folder, resumed(folder))[1]

    for name, path, value in (
        ("progress.json", ("groups",), []),
        ("progress.json", ("tally",), None),
        ("progress.json", ("step",), 3),
    ):
        with pytest.raises(UserError, match="checkpoint-2: not what this version of Etude writes"):
            resume(name, *path, value=value)
    # The control: the seconds of all sessions count.
    rows = settings.training.batch_size * settings.training.gradient_accumulation_steps
    ticks = itertools.count(1.0)
    monkeypatch.setattr(trainer, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    whole = resume("progress.json", "tally", "began", value=-1000.0)
    assert whole["steps"] == 3 and 1000 < whole["seconds"] < 1100
    assert whole["examples_per_second"] == round(3 * rows / whole["seconds"], 2)


def test_what_a_checkpoint_holds_is_needed(tiny_model, files, monkeypatch):
    # The negative control: without its moments, its place in the data or its random numbers, a
    # resumed training ends elsewhere.
    common = ("training.num_epochs=3", "training.save_steps=1", "lora.dropout=0.2")
    settings = settings_for(tiny_model, files, *common)
    whole, _, _ = fitted(settings, files / "whole")
    middle = files / "middle"
    original = trainer.StepTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise Killed
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.StepTrainer, "training_step", killed)
        with pytest.raises(Killed):
            fitted(settings, middle)
    losses = {
        "nothing": (),
        "optimizer": (checkpoints, "join_optimizer", lambda groups, _: {"state": {}, "param_groups": groups}),
        "random": (checkpoints, "set_random_state", lambda *_: None),
        "step": (order.StepSampler, "__iter__", lambda self: iter([[0, 1]] * len(self))),
    }  # fmt: skip
    for name, lost in losses.items():
        folder = shutil.copytree(middle, files / name)
        with monkeypatch.context() as patch:
            if lost:
                patch.setattr(*lost)
            model, _, _ = fitted(settings, folder, resumed(folder))
        same = lora.digest(lora.state(model)) == lora.digest(lora.state(whole))
        assert same == (name == "nothing"), name


def test_the_order_is_a_function_of_seed_and_epoch(monkeypatch):
    def at(step, rank=0, world=1):
        monkeypatch.setattr(distributed, "RANK", rank)
        monkeypatch.setattr(distributed, "WORLD", world)
        return list(order.StepSampler([[row] for row in range(10)], 4, 3, lambda: step))

    first = at(0)
    assert sorted(at for step in first for at in step) == list(range(10))
    assert [len(step) for step in first] == [4, 4, 2]
    assert at(2) == first  # still the first epoch
    assert at(3) != first
    # Two processes share each step: no example twice, none left out.
    shares = [at(0, rank, 2) for rank in range(2)]
    for whole, one, other in zip(first, *shares, strict=True):
        assert sorted(one + other) == sorted(whole)
        assert not set(one) & set(other)


def test_a_step_learns_from_whole_rows_however_many_examples_they_make(
    tiny_model, files, monkeypatch
):
    # A template that drops earlier answers: two examples for a row of two answers.
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content if m.role == 'user' or "
        "loop.last else '') + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    (files / "rewrites.jinja").write_text(template)
    turns = [{"role": role, "content": f"{role} speaks"} for role in ("user", "assistant") * 2]
    rows = [{"messages": turns[: 2 + 2 * (n % 2)]} for n in range(8)]
    (files / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = settings_for(
        tiny_model, files, f"model.chat_template={files}/rewrites.jinja", "training.batch_size=4",
        f"dataset.train={files}/talks.jsonl", "dataset.validation=null", "dataset.validation_split=0",
        "training.gradient_accumulation_steps=1", "training.warmup_steps=0",
    )  # fmt: skip
    seen = []
    original = trainer.StepTrainer.training_step

    def step(self, model, inputs, *rest):
        seen.append([(one.origin.rpartition(":")[2], one.part) for one in inputs["examples"]])
        return original(self, model, inputs, *rest)

    monkeypatch.setattr(trainer.StepTrainer, "training_step", step)
    _, results, _ = fitted(settings, files / "run")
    assert results["steps"] == len(seen) == 2
    assert [len({line for line, _ in step}) for step in seen] == [4, 4]
    assert sorted(itertools.chain.from_iterable(seen)) == sorted(
        (str(line), part) for line in range(1, 9) for part in range(2 - line % 2)
    )
    assert any(len(step) > 4 for step in seen)


def test_warm_up_longer_than_the_training_is_an_error(tiny_model, files):
    settings = settings_for(tiny_model, files, "training.warmup_steps=3")
    with pytest.raises(UserError, match=r"warmup_steps: 3 is not shorter.* 3 steps"):
        fitted(settings, files / "run")


def test_steps():
    settings = Config()  # 1 x 8 rows a step, 3 epochs
    assert order.step_count(settings, 16) == 6
    assert order.step_count(settings, 17) == 9
    assert order.step_count(load_config(None, overrides=["training.max_steps=5"]), 17) == 5


def test_reporting_to_tensorboard_writes_its_file(tiny_model, files):
    settings = settings_for(tiny_model, files, "output.report_to=[tensorboard]")
    fitted(settings, files / "run")
    assert list((files / "run").rglob("events.out.tfevents.*"))


def test_a_missing_reporter_is_named(tiny_model, files):
    settings = settings_for(tiny_model, files, "output.report_to=[wandb]")
    with pytest.raises(UserError, match=r"output.report_to.*pip install wandb"):
        fitted(settings, files / "run")


@pytest.mark.parametrize("member", trainer.PRIVATE)
def test_what_is_used_of_transformers_private_members_is_where_it_was(member):
    owner, _, name = member.partition(".")
    source = inspect.getsource(inspect.getmodule(getattr(transformers, owner)))
    where = f"{member}, which etude/training/trainer.py uses ({trainer.PRIVATE[member]})"
    # Its definition, and a call or a look by the library itself.
    assert source.count(f"self.{name}") + source.count(f"def {name}(") >= 2, (
        f"transformers {transformers.__version__} has moved {where}"
    )


def test_no_other_private_member_of_the_trainer_is_replaced():
    replaced = {
        f"Trainer.{name}"
        for name in vars(trainer.StepTrainer)
        if re.match("_[a-z]", name) and hasattr(transformers.Trainer, name)
    }
    assert replaced == {member for member in trainer.PRIVATE if member.startswith("Trainer.")}
