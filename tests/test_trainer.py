"""Training on whole steps: how a step is cut does not change what is learnt."""

import json
import math

import pytest
import torch

from etude import config as configuration
from etude import data, device, lora, models, runs, train_with_config, trainer
from etude.errors import UserError

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
    return configuration.load(
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


def fitted(settings, folder, checkpoint=None, prepare=None):
    """Train as the program does, without its terminal; returns the model, results and log lines."""
    folder.mkdir(exist_ok=True)
    place = device.choose("float32", True)
    base = models.load(settings.model.name, place)
    renderer = runs.renderer_for(base, settings)
    examples = {}
    for split, table in train_with_config.read_tables(settings).items():
        examples[split], _ = data.encode(table, renderer, settings.dataset, split)
    torch.manual_seed(settings.training.seed)
    model = lora.attach(base.model, settings.lora, base.name)
    if prepare:
        prepare(model)
    results = train_with_config.fit(model, settings, place, examples, folder, checkpoint)
    lines = [json.loads(line) for line in (folder / runs.METRICS).read_text().splitlines()]
    return model, results, lines


def adapter(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_8x1_4x2_1x8_packed_and_padded_learn_the_same(tiny_model, files, monkeypatch):
    outcomes = {}
    for packed in (True, False):
        if not packed:
            monkeypatch.setattr("etude.batching.why_not_packed", lambda *_: "test")
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
    settings = settings_for(tiny_model, files, "training.gradient_accumulation_steps=24")
    _, _, lines = fitted(settings, files / "run")
    base = models.load(str(tiny_model), device.choose("float32", True))
    renderer = runs.renderer_for(base, settings)
    total = tokens = 0
    for row in ROWS:
        example = renderer.render(
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
        "training.num_epochs=4",
        "training.eval_steps=2",
    )
    model, results, lines = fitted(settings, files / "run")
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(losses) == 6
    assert results["eval_loss"] == min(losses) < losses[-1]
    renderer = runs.renderer_for(
        models.load(str(tiny_model), device.choose("float32", True)), settings
    )
    table = data.read(settings.dataset.validation, settings.dataset)
    examples, _ = data.encode(table, renderer, settings.dataset, "validation")
    from etude import batching

    model.eval()
    with torch.no_grad():
        sums = batching.sum_by_example(model, batching.pad(examples, 2), len(examples))
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
    with pytest.raises(UserError, match=r"step 1: the loss is nan.*learning_rate"):
        fitted(settings, files / "run", prepare=poison)
    for name, value in adapter(kept["model"]).items():
        assert torch.equal(value, kept["weights"][name])


def test_warm_up_longer_than_the_training_is_an_error(tiny_model, files):
    settings = settings_for(tiny_model, files, "training.warmup_steps=3")
    with pytest.raises(UserError, match=r"warmup_steps: 3 is not shorter.* 3 steps"):
        fitted(settings, files / "run")


def test_steps():
    settings = configuration.Config()  # 1 x 8 rows a step, 3 epochs
    assert trainer.steps(settings, 16) == 6
    assert trainer.steps(settings, 17) == 9
    assert trainer.steps(configuration.load(None, overrides=["training.max_steps=5"]), 17) == 5


def test_reporting_to_tensorboard_writes_its_file(tiny_model, files):
    settings = settings_for(tiny_model, files, "output.report_to=[tensorboard]")
    fitted(settings, files / "run")
    assert list((files / "run").rglob("events.out.tfevents.*"))


def test_a_missing_reporter_is_named(tiny_model, files):
    settings = settings_for(tiny_model, files, "output.report_to=[wandb]")
    with pytest.raises(UserError, match=r"output.report_to.*pip install wandb"):
        fitted(settings, files / "run")
