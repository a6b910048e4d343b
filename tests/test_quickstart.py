"""The main job on real input: the real sample model, real tweets, from configuration to chat."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from etude.cli import app
from etude.config.schema import Dataset, Lora
from etude.data import dataset, splits
from etude.engine import packing
from etude.models import lora
from etude.runs import opening

pytestmark = pytest.mark.real
ROOT = Path(__file__).parent.parent


def etude(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The quickstart preset on 96 rows; validated every 6 of its 12 steps."""
    folder = tmp_path_factory.mktemp("runs") / "quick"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        etude(
            "train", "config.yml", "--preset", "quickstart", f"output.dir={folder}",
            "dataset.max_rows=96", "training.eval_steps=6",
        )  # fmt: skip
        yield folder


def test_validation_loss_falls(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(losses) == 2
    assert losses[1] < losses[0] < 1.0
    first = next(line["loss"] for line in lines if line["step"] == 1)
    assert losses[1] < first / 3


def test_the_adapter_beats_its_base_on_tweets_it_never_saw(run):
    output = etude("evaluate", run, "--base", "evaluation.max_rows=60").output
    report = json.loads((run / "evaluation" / "report.json").read_text())
    base, tuned = report["models"]["base"], report["models"]["tuned"]
    assert tuned["accuracy"] > base["accuracy"]
    assert base["rows"] == tuned["rows"] == 60
    assert "McNemar" in output


def test_one_tweet_and_one_prompt_are_answered(run):
    output = etude("evaluate", run, "--text", "I love this, what a wonderful day!").output
    assert output.index("positive") < output.index("negative")
    answer = etude(
        "chat", run, "--prompt", "What is the capital of France?", "generation.temperature=0"
    )
    assert "Paris" in answer.stdout


def test_plain_peft_loads_the_run_and_answers_the_same(run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from etude.models import gguf, loading

    target = opening.open_target(str(run), [])
    ids = torch.tensor([target.renderer.prompt([{"role": "user", "content": "I love this!"}])])
    base = AutoModelForCausalLM.from_pretrained(loading.locate(gguf.SAMPLE), dtype=torch.float32)
    with torch.no_grad():
        untuned = base(ids).logits
        plain = PeftModel.from_pretrained(base, run)(ids).logits
        merged = target.tuned()(ids).logits
    torch.testing.assert_close(plain, merged, rtol=1e-3, atol=2e-3)
    assert (plain - untuned).abs().max() > 0.5


def tweets(target, rows):
    settings = Dataset(train=str(ROOT / "data/tweets_sentiment.train.jsonl"))
    table = splits.sample(dataset.read(settings.train, settings), rows, seed=1)
    return dataset.encode(table, target.renderer, settings, "train").examples


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packing_is_proven_and_its_mistakes_found_out_in_either_format(dtype, monkeypatch):
    target = opening.open_target("smollm2-135m", [f"model.dtype={dtype}", "training.use_cpu=true"])
    model, examples = target.base.model, tweets(target, 4)
    assert str(model.dtype) == f"torch.{dtype}"
    assert packing.why_not_packed(model, 256, examples) is None
    forward = model.forward
    for ignored in ("attention_mask", "position_ids"):
        monkeypatch.setattr(
            model, "forward", lambda off=ignored, **given: forward(**{**given, off: None})
        )
        reason = packing.why_not_packed(model, 256, examples)
        assert reason.startswith("packed losses would differ by 0."), (ignored, reason)


def test_packed_gradients_are_those_of_padded_rows():
    target = opening.open_target("smollm2-135m", ["model.dtype=float32", "training.use_cpu=true"])
    torch.manual_seed(0)
    model = lora.attach(target.base.model, Lora(), "sample")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would make the gradients of A zero
            torch.nn.init.normal_(parameter, std=0.02)
    examples = tweets(target, 8)

    def gradients(passes):
        model.zero_grad()
        total = 0.0
        for batch in passes:
            loss = packing.token_losses(model, batch).sum() / 16
            loss.backward()
            total += loss.item()
        found = [p.grad.flatten().clone() for p in model.parameters() if p.requires_grad]
        return total, torch.cat(found)

    packed_loss, packed = gradients(packing.pack(examples, 512))
    padded_loss, padded = gradients(packing.pad(examples, 4))
    assert packed_loss == pytest.approx(padded_loss, rel=1e-5)
    assert padded.norm() > 0
    assert (packed - padded).norm() / padded.norm() < 1e-5
    # The control: other rows have other gradients.
    _, other = gradients(packing.pad(examples[:7], 4))
    assert (other - padded).norm() / padded.norm() > 1e-2
