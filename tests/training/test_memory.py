"""The plan: it comes near what real tensors hold, what does not fit is refused, no trace is left."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_trainer import ROWS
from typer.testing import CliRunner

from etude.cli import app
from etude.config.loading import load_config
from etude.data import dataset, splits
from etude.engine import int8, packing
from etude.errors import UserError
from etude.models import device, gguf, loading, lora
from etude.runs import opening
from etude.training import memory as plan

CPU = device.Device("cpu", "float32", "")


def etude(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:5]))
    return folder


def overrides_for(model, files, *more):
    return [
        f"model.name={model}", "model.dtype=float32", "training.use_cpu=true",
        f"dataset.train={files}/train.jsonl", f"dataset.validation={files}/val.jsonl",
        "dataset.test=null", "dataset.max_length=128", "training.num_epochs=1", *more,
    ]  # fmt: skip


@pytest.fixture
def prepared(tiny_model, files):
    """Settings, outline and examples of a training of the tiny model."""

    def prepare(*more):
        settings = load_config(None, overrides=overrides_for(tiny_model, files, *more))
        outline = loading.outline(settings.model.name)
        renderer = opening.renderer_for(outline, settings)
        tables = splits.read_splits(settings.dataset, settings.training.seed)[0]
        encoded = dataset.encode_splits(tables, renderer, settings.dataset)
        return settings, outline, {name: split.examples for name, split in encoded.items()}

    return prepare


def planned(prepared, *more):
    settings, outline, examples = prepared(*more)
    return plan.estimate(settings, outline, CPU, examples, 3)


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# --- the outline -----------------------------------------------------------------------------


def shapes(model):
    return {name: (value.shape, value.dtype) for name, value in model.named_parameters()}


def test_an_outline_has_the_shapes_of_the_loaded_model_and_no_numbers(tiny_model):
    outline = loading.outline(str(tiny_model))
    empty = outline.model(torch.float32)
    loaded = loading.load_base(str(tiny_model), CPU, known=outline)
    assert shapes(empty) == shapes(loaded.model)
    assert all(value.is_meta for value in empty.parameters())
    assert not any(value.requires_grad for value in empty.parameters())
    assert loaded.tokenizer is outline.tokenizer
    assert outline.stored == torch.float32
    assert shapes(outline.model(torch.bfloat16)) != shapes(loaded.model)


def test_a_hub_model_out_of_reach_is_reported(monkeypatch):
    monkeypatch.setattr(loading, "hub_reachable", lambda: False)
    with pytest.raises(UserError, match="the Hub cannot be reached"):
        loading.outline("nobody/nothing")
    with pytest.raises(UserError, match=r"model\.revision"):
        loading.outline(gguf.SAMPLE, "main")


# --- the parts -------------------------------------------------------------------------------


def test_base_adapter_and_optimizer_are_what_the_real_ones_hold(prepared, tiny_model):
    settings, _, examples = prepared()
    found = planned(prepared)
    model = lora.attach(loading.load_base(str(tiny_model), CPU).model, settings.lora, "tiny")
    frozen = [value for value in model.parameters() if not value.requires_grad]
    trained = [value for value in model.parameters() if value.requires_grad]
    assert found.base == size(frozen)
    assert found.adapter == size(trained)
    for value in trained:
        value.grad = torch.zeros_like(value)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    moments = [m for state in optimizer.state.values() for m in state.values() if m.dim()]
    assert found.optimizer == size(moments)

    cutter = packing.Cutter.of(model, 1, 128, examples["train"])
    int8.quantize(model, cutter(examples["train"]), torch.float32)
    small = planned(prepared, "model.quantization=int8")
    buffers = [b for m in model.modules() if isinstance(m, int8.Int8Linear) for b in m.buffers()]
    rest = [value for value in model.parameters() if not value.requires_grad]
    assert small.base == size([*rest, *buffers]) < found.base
    assert small.loading > found.loading


def real_pass(model, batch):
    """Bytes that the saved tensors of a real forward hold beside the model, by their storages."""
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    held = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = packing.token_losses(model, batch)
    del losses
    return sum(held.values())


@pytest.mark.real
@pytest.mark.parametrize("layers", ["[q_proj, v_proj]", "[all-linear]"])
def test_the_plan_comes_near_what_a_real_pass_holds(prepared, layers):
    settings, _, examples = prepared(f"lora.target_modules={layers}")
    model = lora.attach(loading.load_base(gguf.SAMPLE, CPU).model, settings.lora, "sample")
    model.train()
    (batch,) = packing.pack(examples["train"][:8], 512)
    held, most = real_pass(model, batch), plan.pass_memory(model, batch, settings, gradients=True)
    # The logits' gradient comes with backward.
    logits = 4 * len(batch.keep) * model.get_input_embeddings().weight.shape[0]
    assert most - (plan.LOGITS[4] - 1) * logits == pytest.approx(held, rel=0.05)
    assert plan.pass_memory(model, batch, settings, gradients=False) < most


def test_what_saves_memory_saves_it_in_the_plan(prepared):
    plain = planned(prepared, "training.batch_size=4")
    assert planned(prepared, "training.batch_size=1").training < plain.training
    checkpointed = planned(
        prepared, "training.batch_size=4", "training.gradient_checkpointing=true"
    )
    assert checkpointed.training < plain.training
    assert planned(prepared, "training.batch_size=4", "lora.r=8").adapter < plain.adapter
    wide = planned(prepared, "training.batch_size=4", "lora.target_modules=[all-linear]")
    assert wide.training > plain.training
    assert plain.peak >= plain.libraries + plain.base + plain.training
    assert plain.seconds > 0


def test_nf4_and_bf16_are_counted(prepared, tiny_model):
    plain, small = planned(prepared), planned(prepared, "model.quantization=nf4")
    linears = int8.frozen_linears(loading.outline(str(tiny_model)).model(torch.float32))
    weights = sum(linear.weight.numel() for linear in linears.values())
    assert plain.base - small.base == pytest.approx(weights * (4 - plan.NF4), abs=2)
    settings, outline, examples = prepared()
    half = plan.estimate(settings, outline, replace(CPU, dtype="bfloat16"), examples, 3)
    assert half.base * 2 == plain.base
    assert half.adapter == plain.adapter  # float32 all the same
    assert half.loading == plain.base  # the file's pages, until they are converted
    # The proof opens what was trained on: the 4-bit base, read from the same file.
    # Beside the libraries, which are as large as this process happens to be.
    proofs = [found.proof - found.libraries for found in (plain, small)]
    assert proofs[0] > plain.base + plain.adapter
    assert proofs[1] == small.base + max(small.loading, proofs[0] - plain.base)
    assert small.loading == plain.base and plain.loading == 0
    on_int8 = planned(prepared, "model.quantization=int8")
    assert on_int8.proof >= on_int8.libraries + plain.base  # used on the float base


@pytest.mark.parametrize(
    ("change", "more", "place", "measured"),
    [
        ({}, (), CPU, True),
        ({}, ("model.quantization=int8",), CPU, True),
        ({"parameters": plan.LARGEST}, (), CPU, True),
        ({"parameters": plan.LARGEST + 1}, (), CPU, False),
        ({}, ("model.quantization=nf4",), CPU, False),
        ({}, (), device.Device("cuda", "float32", ""), False),
        ({}, (), device.Device("mps", "float32", ""), False),
    ],
)
def test_where_it_was_not_measured_the_plan_warns(
    prepared, monkeypatch, caplog, change, more, place, measured
):
    monkeypatch.setattr(logging.getLogger("etude"), "propagate", True)
    monkeypatch.setattr(device, "used_memory", lambda *_, **__: 0)
    monkeypatch.setattr(device, "available", lambda _: 1)
    monkeypatch.setattr(plan, "_alternatives", lambda _: [])
    settings, outline, examples = prepared(*more)
    found = replace(plan.estimate(settings, outline, CPU, examples, 3), **change)
    arguments = (found, settings, place, None)
    if not measured:
        assert plan.check(*arguments) is False
        assert "only a warning, for with such a training the plan was never" in caplog.text
    else:
        with pytest.raises(UserError, match="all the same: --force"):
            plan.check(*arguments)
        assert not caplog.text
    caplog.clear()
    assert plan.check(*arguments, force=True) is False
    assert "--force: This training does not fit in memory" in caplog.text
    monkeypatch.setattr(device, "available", lambda _: 10**12)
    assert plan.check(*arguments) is True


def test_wrong_target_modules_are_reported_before_the_weights(prepared):
    with pytest.raises(UserError, match="no linear layer of that name"):
        planned(prepared, "lora.target_modules=[q_prj]")


# --- does it fit -----------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_keys_and_savings(prepared, monkeypatch):
    settings, outline, examples = prepared("training.batch_size=4")
    # The libraries aside, of which a tiny model is a tiny part.
    monkeypatch.setattr(device, "used_memory", lambda *_, **__: -int(plan.LATER))

    def again(changed):
        return plan.estimate(changed, outline, CPU, examples, 3)

    found = again(settings)
    monkeypatch.setattr(device, "available", lambda _: found.needed + int(plan.LATER))
    plan.check(found, settings, CPU, again)  # the control: exactly enough
    monkeypatch.setattr(device, "available", lambda _: found.needed + int(plan.LATER) - 1)
    with pytest.raises(UserError, match="does not fit in memory") as refused:
        plan.check(found, settings, CPU, again)
    lines = str(refused.value).splitlines()[1:]
    saved = [float(line.split("saves ")[1].split(" ")[0]) for line in lines if "saves" in line]
    assert saved == sorted(saved, reverse=True)
    text = "\n".join(lines)
    for key in ("training.gradient_checkpointing=true", "training.batch_size=1 ", "model.name"):
        assert key in text
    assert "and it fits" in text


def test_a_training_that_does_not_fit_ends_before_the_weights(tiny_model, files, monkeypatch):
    def load(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(loading, "load_base", load)
    run = files / "never"
    arguments = [*overrides_for(tiny_model, files), f"output.dir={run}"]
    monkeypatch.setattr(device, "available", lambda _: 0)
    monkeypatch.setattr(device, "used_memory", lambda *_, **__: 10**6)
    for program in ("train", "validate"):
        result = etude(program, "--preset", "cpu", *arguments)
        assert result.exit_code == 2, result.output
        assert "does not fit in memory" in result.output
        assert "model.quantization" not in result.output or "saves" in result.output
    # --force goes on to the weights; off its ground so does the plan alone, and validate says so.
    result = etude("train", "--preset", "cpu", *arguments, "--force")
    assert result.exception.args == ("loaded",)
    assert "--force: This training does not fit in memory" in result.output
    monkeypatch.setattr(plan, "LARGEST", 1)
    assert etude("train", "--preset", "cpu", *arguments).exception.args == ("loaded",)
    result = etude("validate", "--preset", "cpu", *arguments)
    assert result.exit_code == 0
    assert "valid, but by the plan the training does not fit in memory" in result.output


def test_the_limit_of_a_container_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "CONTAINER", tmp_path)
    free = device.available("cpu")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 500\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert device.available("cpu") == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert device.available("cpu") > free / 2


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="no /proc here")
def test_a_process_reads_its_own_memory():
    before = device.used_memory("cpu")
    block = torch.ones(50_000_000)
    assert device.used_memory("cpu") - before > 0.9 * block.nbytes
    assert device.used_memory("cpu", peak=True) >= device.used_memory("cpu")
    assert device.available("cpu") > 0


# --- the rehearsal ---------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("training.gradient_checkpointing=true",)])
def test_a_rehearsal_leaves_no_trace(prepared, tiny_model, monkeypatch, more):
    settings, _, examples = prepared("lora.dropout=0.5", *more)
    model = lora.attach(loading.load_base(str(tiny_model), CPU).model, settings.lora, "tiny")
    cutter = packing.Cutter.of(model, 1, 128, examples["train"])
    original, seen = packing.token_losses, []

    def watched(model, batch):
        seen.append((torch.is_grad_enabled(), model.training, batch.input_ids.numel()))
        return original(model, batch)

    monkeypatch.setattr(packing, "token_losses", watched)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random, mode = torch.get_rng_state(), model.training
    assert plan.rehearse(model, cutter, examples["train"], settings) is cutter
    largest, share = plan.largest_pass(settings, cutter, examples["train"])
    assert seen == [(True, True, largest.input_ids.numel())]
    assert share < 1  # beginnings are shared
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training == mode
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())
    # The control: dropout did draw random numbers, so there was a trace to leave.
    model.train()
    original(model, next(cutter(examples["train"])))
    assert not torch.equal(torch.get_rng_state(), random)


def test_where_memory_runs_out_the_rehearsal_halves_the_passes(prepared, tiny_model, monkeypatch):
    settings, _, examples = prepared("training.batch_size=4")
    model = lora.attach(loading.load_base(str(tiny_model), CPU).model, settings.lora, "tiny")
    cutter = packing.Cutter.of(model, 4, 128, examples["train"])
    original, limit = packing.token_losses, 150

    def small(model, batch):
        if batch.input_ids.numel() > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return original(model, batch)

    monkeypatch.setattr(packing, "token_losses", small)
    assert plan.rehearse(model, cutter, examples["train"], settings).budget == 128
    limit = 2
    with pytest.raises(UserError, match="not even one example fits in memory"):
        plan.rehearse(model, cutter, examples["train"], settings)

    def broken(model, batch):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(packing, "token_losses", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        plan.rehearse(model, cutter, examples["train"], settings)


def test_the_step_of_the_longest_row_is_always_looked_at(prepared, monkeypatch):
    settings, _, examples = prepared("training.gradient_accumulation_steps=1")
    rows = examples["train"]
    monkeypatch.setattr(plan, "LOOKED_AT", 1)
    cut = []

    def cutter(step):
        cut.extend(step)
        return packing.pack(step, 512)

    plan.largest_pass(settings, cutter, rows)
    assert [len(example) for example in cut] == [max(map(len, rows))]
    first = packing.steps(settings.training.seed, 0, len(rows), 1)[0]
    few = settings.training.model_copy(update={"max_steps": 1})
    cut.clear()
    plan.largest_pass(settings.model_copy(update={"training": few}), cutter, rows)
    assert cut == [rows[index] for index in first]


# --- the program -----------------------------------------------------------------------------


def test_validate_shows_configuration_data_and_plan(tiny_model, files):
    arguments = overrides_for(tiny_model, files)
    result = etude("validate", *arguments, "--preset", "cpu")
    assert result.exit_code == 0, result.output
    for words in (
        "config    valid", "24 rows, format prompt_completion", "supervised", "⟦Because",
        "optimizer", "proof", "GB at most, about", "3 steps", "the training fits in memory",
    ):  # fmt: skip
        assert words in result.output
    assert re.search(r"truncated +\d", result.output)  # whole, at 80 columns
    wrong = etude("validate", *arguments, "--preset", "cpu", "lora.rr=4")
    assert wrong.exit_code == 2
    assert "lora.r" in wrong.output and "plan" not in wrong.output


def test_a_run_notes_planned_and_measured_memory(tiny_model, files, tmp_path):
    run = tmp_path / "run"
    arguments = overrides_for(tiny_model, files, "training.max_steps=2", f"output.dir={run}")
    result = etude("train", *arguments, "--preset", "cpu")
    assert result.exit_code == 0, result.output
    memory = json.loads((run / "manifest.json").read_text())["results"]["memory"]
    assert memory["planned"] > memory["plan"]["base"]
    assert memory["peak"] > 0
