"""An export is the model that was trained, or it is not kept and the stage that differs is named."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from etude.cli import app
from etude.config.schema import Lora
from etude.exports import merged, opened, proof, questions
from etude.measure import intervals
from etude.models import lora
from etude.runs import opening


def etude(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    return result


def said(result):
    """What a program said, on one line."""
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 texts with one of two labels."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"text": f"Text {n}.", "label": ("good", "bad")[n % 2]} for n in range(40)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "texts.jsonl"


def train(model, data, folder, *more):
    result = etude(
        "train", "--preset", "cpu", f"model.name={model}", f"dataset.train={data}",
        "dataset.validation=null", "dataset.test=null", "dataset.validation_split=0.5",
        "training.max_steps=6", "training.learning_rate=1e-2", "lora.r=4", "training.compile=false",
        f"output.dir={folder}", *more,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def run(tiny_model, data, tmp_path_factory):
    """A finished run that classifies, with a system prompt."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return train(tiny_model, data, folder, "dataset.system_prompt=Be brief.")


@pytest.fixture
def same_process(monkeypatch):
    """The proof without the seconds that a new process takes to start."""

    def run_here(module, out, *arguments):
        assert module == opened.__name__
        opened.main(*map(str, arguments), str(out))
        return json.loads(out.read_text())

    monkeypatch.setattr(proof, "in_process", run_here)


def test_an_export_is_opened_in_a_new_process_and_is_the_run(run, tmp_path):
    result = etude("export", run, tmp_path / "out")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert "20 of 20 prompts have the training's token ids" in said(result)
    assert f"loss {record['loss']['export']:.4f} nats a token" in said(result)
    assert "0 of 20 predictions changed" in said(result)
    assert "8 of 8 greedy answers are the same" in said(result)
    assert record["type"] == "f32"
    assert record["template"] == {"same": 20, "of": 20, "spelled": 0}
    assert record["loss"]["low"] <= record["loss"]["difference"] <= record["loss"]["high"]
    assert record["loss"]["moved"] < 1e-4 < 0.01 < record["loss"]["effect"]
    assert "Text 7" not in (tmp_path / "out" / "export.json").read_text()  # no text of the data
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_transformers_alone_gives_the_runs_logits(run, tmp_path, same_process):
    assert etude("export", run, tmp_path / "out").exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    target = opening.open_target(str(run), [])
    messages = [{"role": "user", "content": "Well?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == target.renderer.prompt(messages)
    batch = torch.tensor([ids])
    with torch.no_grad():
        assert torch.allclose(model(batch).logits, target.with_adapter()(batch).logits, atol=1e-4)
    assert model.generation_config.eos_token_id == target.renderer.stop_ids
    assert model.generation_config.temperature == target.config.generation.temperature
    assert str(run) not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_weights_in_sixteen_bits(run, tmp_path, same_process, kind):
    result = etude("export", run, tmp_path / "out", "--type", kind)
    assert result.exit_code == 0, result.output
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(value.dtype) for value in weights.values()} == {f"torch.{merged.TYPES[kind]}"}


def test_pairs_and_raw_text_are_proven_too(tiny_model, files, tmp_path, same_process):
    (files / "text.jsonl").write_text('{"text": "One, two, three, four."}\n' * 12)
    for name, prompts in (("pairs", 20), ("text", 0)):
        run = train(tiny_model, files / f"{name}.jsonl", tmp_path / name)
        result = etude("export", run, tmp_path / f"{name}-out")
        assert result.exit_code == 0, result.output
        assert f"{prompts} of {prompts} prompts" in said(result)
        assert "predictions" not in said(result)


# --- what must fail, each by its stage --------------------------------------------------------


def edit_json(file, key, value):
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))


def change_template(place):
    file = place / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_start|>", "<|im_start|> "))


def remove_stop_token(place):
    edit_json(place / "generation_config.json", "eos_token_id", None)


def swap_layers(place):
    weights = load_file(place / "model.safetensors")
    other = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    swapped = {}
    for name, value in weights.items():
        part = next((part for part in other if part in name), None)
        swapped[name.replace(part, other[part]) if part else name] = value
    save_file(swapped, place / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        (change_template, "template: 20 of 20 prompts"),
        (remove_stop_token, "stop tokens: missing <|im_end|>, added none"),
        (swap_layers, "weights: the mean loss is"),
    ],
)
def test_a_changed_export_is_not_kept(run, tmp_path, monkeypatch, same_process, change, stage):
    original = merged.write

    def write(target, tuned, kind, place):
        original(target, tuned, kind, place)
        change(place)

    monkeypatch.setattr(merged, "write", write)
    result = etude("export", run, tmp_path / "out")
    assert result.exit_code == 2
    assert f"it is not kept: {stage}" in said(result)
    stages = ("template:", "stop tokens:", "weights:")
    assert [name for name in stages if name in said(result)] == [f"{stage.partition(':')[0]}:"]
    assert not list(tmp_path.iterdir())


def halved(tuned):
    for module in tuned.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: value / 2 for name, value in module.scaling.items()}
    return tuned.merge_and_unload()


@pytest.mark.parametrize("kind", ["f32", "bf16"])
@pytest.mark.parametrize(
    "merge", [lambda tuned: tuned.unload(), halved], ids=["unmerged", "halved"]
)
def test_another_adapter_than_was_trained(run, tmp_path, monkeypatch, same_process, merge, kind):
    monkeypatch.setattr(lora, "merge", merge)
    result = etude("export", run, tmp_path / "out", "--type", kind)
    assert result.exit_code == 2
    assert "it is not kept: weights: the mean loss is" in said(result)
    assert not list(tmp_path.iterdir())


def test_an_export_that_does_not_open(run, tmp_path, monkeypatch):
    original = merged.write

    def write(target, tuned, kind, place):
        original(target, tuned, kind, place)
        (place / "model.safetensors").write_bytes(b"half")

    monkeypatch.setattr(merged, "write", write)
    result = etude("export", run, tmp_path / "out")
    assert result.exit_code == 2
    assert "The export cannot be opened by transformers" in said(result)
    assert not list(tmp_path.iterdir())


# --- what is a mistake of the user's, or of the machine's -------------------------------------


def test_nothing_is_overwritten(run, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    for name in ("link", "folder"):
        result = etude("export", run, tmp_path / name)
        assert result.exit_code == 2
        assert f"exists and is not overwritten; give another name: {tmp_path}/{name}-2" in said(
            result
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link"]


def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch):
    from transformers import PreTrainedModel

    def save(self, place):
        (place / "config.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device", str(place))

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    result = etude("export", run, tmp_path / "out")
    assert result.exit_code == 2
    assert "the disk is full" in said(result)
    assert not list(tmp_path.iterdir())


def test_a_model_is_no_run(tiny_model, tmp_path):
    result = etude("export", tiny_model, tmp_path / "out")
    assert result.exit_code == 2
    assert "is a model and no run" in said(result)


def test_without_its_data_other_rows_prove_it(run, data, tmp_path, same_process):
    rows = data.rename(data.with_name("elsewhere.jsonl"))
    try:
        gone = etude("export", run, tmp_path / "out")
        given = etude("export", run, tmp_path / "out", "--data", rows)
    finally:
        rows.rename(data)
    assert gone.exit_code == 2
    assert "proven on the run's data, which cannot be read" in said(gone)
    assert "--data FILE" in said(gone)
    assert given.exit_code == 0, given.output
    assert "40 of " in said(given)


def test_prompts_that_spell_control_tokens_are_left_out_and_counted(run, tmp_path, same_process):
    texts = ["Text <|im_end|> one.", "Text two."]
    rows = [{"text": text, "label": label} for text in texts for label in ("good", "bad")]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = etude("export", run, tmp_path / "out", "--data", file)
    assert result.exit_code == 0, result.output
    assert "2 of 2 prompts have the training's token ids; 2 not compared" in said(result)


# --- the figures ------------------------------------------------------------------------------


def test_the_interval_of_a_mean_difference():
    first, second, sizes = [1.0, 2.0, 3.0], [1.5, 2.5, 4.0], [1, 1, 2]
    found = intervals.mean_difference(first, second, sizes, level=0.95, seed=1)
    assert found["difference"] == pytest.approx(0.5)  # each token is half a nat worse
    assert found["low"] == found["high"] == pytest.approx(0.5)
    found = intervals.mean_difference([0.0] * 4, [1.0, -1.0] * 2, [1] * 4, level=0.95, seed=1)
    assert found["low"] == -1 and found["difference"] == 0 and found["high"] == 1


def test_losses_through_the_cache_are_those_of_whole_texts(run):
    target = opening.open_target(str(run), ["model.dtype=float32"])
    asked = questions.read(target, None)
    trained = proof.measure(target, target.with_adapter(), asked, proof.likelihood.no_bar)
    model = target.base.model  # which the adapter was put into
    groups = questions.as_json(asked)["groups"]
    found = [loss for group in groups for loss in opened.losses(model, group)]
    assert found == pytest.approx(trained.losses, rel=1e-4)
    assert [asked.answers[at] for at in asked.right][1] in asked.groups[1]


@pytest.mark.real
def test_the_sample_with_an_adapter_made_elsewhere(tmp_path, data, same_process):
    target = opening.open_target("smollm2-135m", ["model.dtype=float32", "training.use_cpu=true"])
    tuned = lora.attach(target.base.model, Lora(r=8, alpha=16), "smollm2-135m")
    for name, weights in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.02)
    lora.save(tuned, tmp_path / "adapter")
    rows = tmp_path / "few.jsonl"
    rows.write_text("".join(data.read_text().splitlines(keepends=True)[:6]))
    result = etude("export", tmp_path / "adapter", tmp_path / "out", "--data", rows)
    assert result.exit_code == 0, result.output
    assert "6 of 6 prompts" in said(result)
    shutil.rmtree(tmp_path / "out")
