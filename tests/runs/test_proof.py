"""A finished run holds an adapter that works, and a run that is repeated is the same run."""

import json
import logging
import shutil
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from etude.cli import app
from etude.config.loading import load_config, to_yaml
from etude.config.schema import Config, Lora
from etude.data import dataset
from etude.errors import UserError
from etude.models import device, gguf, loading, lora
from etude.runs import comparison, opening, proof
from etude.runs.folder import CHECKPOINTS, CONFIG, MANIFEST, STARTED
from etude.runs.manifest import changes_since, current_environment
from etude.training import resuming


def etude(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(model, data, run, *more):
    return etude(
        "train", "--preset", "cpu", f"model.name={model}", f"dataset.train={data}/pairs.jsonl",
        "dataset.validation=null", "dataset.test=null", "training.num_epochs=1", "lora.r=4",
        "training.compile=false", "training.logging_steps=1", f"output.dir={run}", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny_model, files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    result = train(tiny_model, files, folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "copy")


@pytest.fixture
def same_process(monkeypatch):
    """The proof at the end of a training, without the seconds that a new process takes to start."""
    monkeypatch.setattr(proof, "in_a_new_process", lambda folder: proof.verify(str(folder)))


def verified(folder):
    """The proof of a run without a process of its own, each with a fresh base."""
    result = etude("verify", folder)
    assert "Traceback" not in result.output
    return result


def told(result):
    """What a program said, on one line."""
    return " ".join(result.output.split())


def test_training_ends_with_the_proof_of_a_new_process(finished):
    folder, output = finished
    expected = json.loads((folder / "proof.json").read_text())
    manifest = json.loads((folder / "manifest.json").read_text())
    loss = manifest["results"]["eval_loss"]
    assert "the saved adapter, opened in a new process: 8 tensors as trained, logits " in output
    assert f"validation loss {loss:.4f} ({loss:.4f} in training)" in output
    assert expected["loss"]["value"] == manifest["results"]["eval_loss"]
    digest = lora.digest(lora.read_weights(folder))
    assert expected["sha256"] == manifest["adapter"]["sha256"] == digest
    # No text and no tokens of the data are kept.
    assert "Answer" not in (folder / "proof.json").read_text()
    assert expected["loss"].keys() == {"split", "data", "rows", "value"}


def process(monkeypatch, code, result, stderr=""):
    """In place of the new process: one that ends with `code`, having written `result`."""
    seen = []

    def run(command, **options):
        seen.append(command)
        if result:
            Path(command[-1]).write_text(json.dumps(result))
        return types.SimpleNamespace(returncode=code, stderr=stderr)

    monkeypatch.setattr(proof.subprocess, "run", run)
    return seen


def test_it_really_is_another_process(tmp_path, monkeypatch):
    seen = process(monkeypatch, 0, {"proof": "all is well"})
    assert proof.in_a_new_process(tmp_path) == "all is well"
    assert seen[0][1:5] == ["-P", "-m", "etude.runs.proof", str(tmp_path)]
    assert not list(tmp_path.iterdir())


def test_what_the_new_process_writes(finished, copied, tmp_path, monkeypatch):
    def written(folder):
        proof.main(str(folder), str(tmp_path / "out.json"))
        return json.loads((tmp_path / "out.json").read_text())

    assert written(finished[0])["proof"] == proof.verify(str(finished[0]))
    (copied / "proof.json").unlink()
    assert "proof.json: cannot be read" in written(copied)["problem"]
    monkeypatch.setattr(proof, "verify", lambda _: (_ for _ in ()).throw(MemoryError()))
    assert "not enough memory" in written(copied)["problem"]
    monkeypatch.setattr(proof, "verify", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        written(copied)


def test_verify_holds_for_a_run_and_for_its_copy(finished, copied):
    for folder in (finished[0], copied):
        result = verified(folder)
        assert result.exit_code == 0, result.output
        assert "in training)" in told(result)


def test_another_adapter_in_its_place_is_seen(copied, tiny_model, files, tmp_path, same_process):
    other = tmp_path / "other"
    assert train(tiny_model, files, other, "training.seed=7").exit_code == 0
    assert verified(other).exit_code == 0  # it is a good adapter, of another run
    shutil.copy(other / lora.WEIGHTS, copied / lora.WEIGHTS)
    result = verified(copied)
    assert result.exit_code == 2
    assert "the adapter is not the one that was trained" in told(result)


def test_an_adapter_that_does_nothing_is_refused_at_the_end(tiny_model, files, tmp_path):
    # A learning rate that vanishes in float32.
    settings = ("training.max_steps=1", "training.warmup_steps=0", "training.learning_rate=1e-45")
    result = train(tiny_model, files, tmp_path / "run", *settings)
    assert result.exit_code == 2
    assert "the logits differ from the base's by 0.0, so it changes nothing" in told(result)
    assert "--resume" in told(result)
    assert (tmp_path / "run" / lora.WEIGHTS).is_file()
    assert not (tmp_path / "run" / MANIFEST).exists()


def test_a_loss_that_is_not_the_trainings_is_refused(copied):
    file = copied / "proof.json"
    expected = json.loads(file.read_text())
    for factor, code in ((1 + 1e-6, 0), (1.001, 2)):
        changed = {**expected["loss"], "value": expected["loss"]["value"] * factor}
        file.write_text(json.dumps({**expected, "loss": changed}))
        result = verified(copied)
        assert result.exit_code == code, result.output
    assert "further apart than rounding explains (0.0001 relative)" in told(result)
    # Trained on an int8 base it may be further.
    file.write_text(json.dumps({**expected, "loss": changed, "quantization": "int8"}))
    assert verified(copied).exit_code == 0


def test_without_its_data_the_rest_is_still_proven(finished, files):
    kept = (files / "pairs.jsonl").read_text()
    try:
        (files / "pairs.jsonl").write_text(kept.replace("Answer 7.", "Another."))
        changed = verified(finished[0])
        (files / "pairs.jsonl").unlink()
        gone = verified(finished[0])
    finally:
        (files / "pairs.jsonl").write_text(kept)
    for result in (changed, gone):
        assert result.exit_code == 0, result.output
        assert "8 tensors as trained" in told(result)
        assert "the loss was not compared, for its data is gone or was changed" in told(result)


def test_damage_of_every_kind_fails_the_proof(copied):
    weights = copied / lora.WEIGHTS
    whole = weights.read_bytes()
    for damage, words in (
        (whole[:-10], "is corrupt"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "not the one that was trained"),  # a single bit
        (b"", "is corrupt"),
    ):
        weights.write_bytes(damage)
        result = verified(copied)
        assert result.exit_code == 2
        assert words in told(result)
    weights.write_bytes(whole)
    proof = json.loads((copied / "proof.json").read_text())
    for key in ("sha256", "loss"):
        kept = {name: value for name, value in proof.items() if name != key}
        (copied / "proof.json").write_text(json.dumps(kept))
        assert f"no {key} in it" in told(verified(copied))
    (copied / "proof.json").unlink()
    assert "proof.json: cannot be read" in told(verified(copied))


def test_without_validation_the_first_training_rows_are_measured(
    tiny_model, files, tmp_path, same_process
):
    result = train(tiny_model, files, tmp_path / "run", "dataset.validation_split=0")
    assert result.exit_code == 0, result.output
    assert "train loss" in result.output and "in training)" in result.output
    expected = json.loads((tmp_path / "run" / "proof.json").read_text())
    assert (expected["loss"]["split"], expected["loss"]["rows"]) == ("train", 40)


def test_another_base_is_refused_for_a_bare_adapter_too(finished, tmp_path, tiny_model):
    other = shutil.copytree(tiny_model, tmp_path / "other-base")
    tensors = load_file(other / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    # Without manifest and configuration, as if copied out of the run; and a checkpoint of the run.
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in (lora.WEIGHTS, lora.ADAPTER_CONFIG):
        shutil.copy(finished[0] / file, bare / file)
    checkpoints = sorted((finished[0] / CHECKPOINTS).glob("checkpoint-*"))
    assert checkpoints
    for folder in (bare, checkpoints[0]):
        assert opening.open_target(str(folder), []).adapter == folder
        with pytest.raises(UserError, match="trained on another base"):
            opening.open_target(str(folder), [f"model.name={other}"])


# --- a base in 4 bits -------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["nf4", "int8", None])
def test_a_run_is_opened_on_the_base_that_it_is_used_on(
    copied, tiny_model, monkeypatch, quantization
):
    settings = load_config(copied / CONFIG)
    model = settings.model.model_copy(update={"quantization": quantization})
    changed = settings.model_copy(update={"model": model})
    (copied / CONFIG).write_text(to_yaml(changed))
    asked, original = [], loading.load_base

    def load(name, place, revision=None, quantization=None, known=None):
        asked.append(quantization)
        base = original(name, place, revision)
        base.model.is_quantized = quantization == "nf4"
        return base

    monkeypatch.setattr(loading, "load_base", load)
    target = opening.open_target(str(copied), [])
    assert asked == ["nf4" if quantization == "nf4" else None]
    # An adapter is not merged into 4 bits, and is merged elsewhere.
    tuned = target.tuned()
    assert hasattr(tuned, "peft_config") == (quantization == "nf4")
    # Whoever has the room may ask for the float base.
    opening.open_target(str(copied), ["model.quantization=null"])
    assert asked[1:] == [None]


@pytest.mark.parametrize(
    ("quantization", "off", "dtype", "proven"),
    [
        (None, 1e-3, "float32", False),
        ("nf4", 1e-3, "float32", False),
        ("nf4", 1e-6, "float32", True),
        ("nf4", 1e-2, "bfloat16", True),
        ("nf4", 0.04, "bfloat16", False),
        ("int8", 0.04, "float32", True),
    ],
)
def test_a_loss_in_4_bits_is_the_trainings_own(monkeypatch, quantization, off, dtype, proven):
    monkeypatch.setattr(proof, "mean_loss", lambda *_: 2.0 * (1 + off))
    model = types.SimpleNamespace(dtype=getattr(torch, dtype))
    target = opening.Target(None, None, Config(), None)
    expected = {"dtype": dtype, "quantization": quantization}
    expected["loss"] = {"split": "validation", "value": 2.0}
    if not proven:
        with pytest.raises(UserError, match="further apart than rounding explains"):
            proof.compare_losses("run", model, target, expected, [])
        return
    told = proof.compare_losses("run", model, target, expected, [])
    assert told == f"validation loss {2.0 * (1 + off):.4f} (2.0000 in training)"


def test_4_bit_layers_stay_fit_for_gradients_after_a_pass_without(tiny_model):
    class Layer(torch.nn.Linear):
        support_avx512bf16_for_cpu = True

    model = torch.nn.Sequential(Layer(2, 2), torch.nn.Linear(2, 2))
    loading._keep_gradients(model)
    assert not model[0].support_avx512bf16_for_cpu
    assert not hasattr(model[1], "support_avx512bf16_for_cpu")

    pytest.importorskip("bitsandbytes")
    base = loading.load_base(str(tiny_model), device.Device("cpu", "float32", ""), None, "nf4")
    ids = torch.arange(3, 40)[None]
    torch.manual_seed(0)
    tuned = lora.attach(base.model, Lora(r=4), "tiny")
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)

    def gradients():
        tuned.zero_grad()
        tuned.train()
        tuned(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in tuned.parameters() if p.requires_grad]

    before = gradients()
    tuned.eval()
    with torch.no_grad():
        tuned(input_ids=ids)
    assert all(grad.any() for grad in before)
    assert all(map(torch.equal, before, gradients()))


def test_a_training_in_4_bits_is_proven_in_4_bits(tiny_model, files, tmp_path):
    pytest.importorskip("bitsandbytes")
    run = tmp_path / "run"
    result = train(tiny_model, files, run, "model.quantization=nf4", "dataset.test=null")
    assert result.exit_code == 0, result.output
    assert "in training)" in told(result)
    assert "the plan was never compared" not in told(result)  # it fits
    target = opening.open_target(str(run), [])
    assert target.base.model.is_quantized and hasattr(target.tuned(), "peft_config")
    wanted = etude("evaluate", run, "--data", files / "pairs.jsonl", "evaluation.max_rows=4")
    assert wanted.exit_code == 0, wanted.output


# --- what the new process says when it fails -------------------------------------------------


@pytest.mark.parametrize(
    ("code", "result", "stderr", "words"),
    [
        (0, {"problem": "runs/x: all is lost"}, "", "not finished: runs/x: all is lost"),
        (-9, None, "", "ended with code -9, most likely for want of memory"),
        (1, None, "Traceback ...\nKeyError: 'x'\n", "finished: KeyError: 'x'"),
    ],
)
def test_a_proof_that_fails_leaves_the_run_unfinished(
    code, result, stderr, words, monkeypatch, tmp_path
):
    process(monkeypatch, code, result, stderr)
    (tmp_path / CHECKPOINTS / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        proof.in_a_new_process(tmp_path)
    assert words in str(caught.value)
    assert "--resume" in str(caught.value)


# --- the environment -------------------------------------------------------------------------


def test_the_environment_is_recorded_and_differences_are_reported():
    now = current_environment()
    assert json.loads(json.dumps(now)) == now
    assert now["threads"] == torch.get_num_threads()
    assert now["torch"] == torch.__version__
    assert changes_since(now) == []
    stored = {**now, "threads": 64, "CPU flag abacus": True, "torch": "1.0"}
    assert changes_since(stored) == [
        "CPU flag abacus: True, now none",
        f"threads: 64, now {now['threads']}",
        f"torch: 1.0, now {torch.__version__}",
    ]


def test_what_changed_since_is_reported_on_resume(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("etude"), "propagate", True)
    base = loading.Base(None, None, "folder", "sha256:1", device.choose("float32", True))
    tables = {"train": dataset.Table("file", "text", [], "0")}
    checkpoint = tmp_path / "checkpoint-1"
    settings = Config()
    resuming.start_folder(tmp_path, None, settings, tables, base, False)
    resuming.start_folder(tmp_path, checkpoint, settings, tables, base, False)
    assert "since the training began" not in caplog.text
    stored = json.loads((tmp_path / STARTED).read_text())
    stored["environment"]["threads"] = 64
    (tmp_path / STARTED).write_text(json.dumps(stored))
    resuming.start_folder(tmp_path, checkpoint, settings, tables, base, False)
    assert "since the training began: threads: 64, now" in caplog.text


# --- reproduce -------------------------------------------------------------------------------


def test_a_run_repeats_bit_for_bit(finished, tmp_path, same_process):
    folder, _ = finished
    result = etude("reproduce", folder, "--out", tmp_path / "again")
    assert result.exit_code == 0, result.output
    assert "bit for bit" in told(result)
    again = etude("reproduce", folder, "--out", tmp_path / "again")
    assert again.exit_code == 2 and f"such as {tmp_path / 'again'}-2" in told(again)
    digest = lora.digest(lora.read_weights(folder))
    assert json.loads((tmp_path / "again" / MANIFEST).read_text())["adapter"] == {"sha256": digest}
    assert "the same adapter" in told(result)
    first, second = ((path / lora.WEIGHTS).read_bytes() for path in (folder, tmp_path / "again"))
    assert first == second  # the files too


def test_another_seed_is_another_run_and_exits_with_1(copied, tmp_path, monkeypatch, same_process):
    # The control: the manifest's seed decides, not the one in config.yml.
    manifest = json.loads((copied / MANIFEST).read_text())
    manifest["config"]["training"]["seed"] += 1
    manifest["config"]["dataset"]["validation_split"] = 0.1
    (copied / MANIFEST).write_text(json.dumps(manifest))
    monkeypatch.chdir(copied)
    result = etude("reproduce", ".")
    assert result.exit_code == 1, result.output
    assert ", now 0." in told(result) or ", now 1" in told(result)
    assert "another adapter" in told(result)
    assert (copied.parent / "copy-reproduced" / MANIFEST).is_file()


def test_elsewhere_close_is_enough_and_the_difference_is_reported(copied, tmp_path, same_process):
    manifest = json.loads((copied / MANIFEST).read_text())
    manifest["environment"]["torch"] = "1.0"
    # As if rounded otherwise.
    manifest["adapter"]["sha256"] = "0" * 64
    manifest["results"]["eval_loss"] *= 1.001
    (copied / MANIFEST).write_text(json.dumps(manifest))
    result = etude("reproduce", copied)
    assert result.exit_code == 0, result.output
    assert "since the first training: torch: 1.0, now" in told(result)
    assert "the same within 2% of each loss, not bit for bit: the environment differs" in told(
        result
    )


def test_changed_data_or_base_is_refused_before_training(copied, files, tiny_model):
    again = copied.parent / "copy-reproduced"
    kept = (files / "pairs.jsonl").read_text()
    (files / "pairs.jsonl").write_text(kept.replace("Answer 7.", "Another."))
    result = etude("reproduce", copied)
    (files / "pairs.jsonl").write_text(kept)
    assert result.exit_code == 2
    assert "The data changed since the run was trained (train, validation)" in told(result)
    assert not again.exists()
    manifest = json.loads((copied / MANIFEST).read_text())
    manifest["base"]["identity"] = "sha256:0"
    (copied / MANIFEST).write_text(json.dumps(manifest))
    result = etude("reproduce", copied)
    assert result.exit_code == 2
    assert "trained on another base (sha256:0)" in told(result)
    assert not (again / lora.WEIGHTS).exists()
    assert "not a finished run" in told(etude("reproduce", files))


def test_the_figures_of_a_comparison(tmp_path):
    def run(name, **results):
        (tmp_path / name).mkdir()
        keys = dict.fromkeys(("base", "config", "chat_format", "data", "environment"))
        adapter = {"sha256": name} if results else None
        results = {"steps": 2, "train_loss": 0.5, "eval_loss": 1.0, **results}
        manifest = {**keys, "results": results, "adapter": adapter}
        (tmp_path / name / MANIFEST).write_text(json.dumps(manifest))
        return tmp_path / name

    first = run("first")
    words = "steps 2; train_loss 0.5; eval_loss 1.0; the same adapter"
    assert comparison.compare_training(first, first) == (True, 0.0, words)
    same, deviation, words = comparison.compare_training(first, run("near", eval_loss=1.01))
    assert (same, deviation) == (False, pytest.approx(0.01))
    assert words == "steps 2; train_loss 0.5; eval_loss 1.0, now 1.01; another adapter"
    assert comparison.compare_training(first, run("far", steps=1))[1] == 0.5


# --- the real sample -------------------------------------------------------------------------


@pytest.mark.real
def test_the_sample_trains_the_same_adapter_twice(tmp_path, files, same_process):
    arguments = ("dataset.max_rows=4", "training.batch_size=1", "training.max_steps=2",
                 "training.gradient_accumulation_steps=2", "training.warmup_steps=0",
                 "dataset.validation_split=0")  # fmt: skip
    first = tmp_path / "first"
    result = train(gguf.SAMPLE, files, first, *arguments)
    assert result.exit_code == 0, result.output
    assert "120 tensors as trained" in result.output
    again = etude("reproduce", first)
    assert again.exit_code == 0, again.output
    assert "bit for bit" in told(again)
