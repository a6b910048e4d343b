import copy

import pytest
import torch

from etude import lora
from etude.config import Lora
from etude.errors import UserError

SMALL = Lora(r=4, alpha=8)
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def base(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture
def model(base):
    return copy.deepcopy(base)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def stir(tuned):
    """Make B non-zero, as training would."""
    torch.manual_seed(1)
    found = [weight for name, weight in tuned.named_parameters() if "lora_B" in name]
    assert found
    for weight in found:
        torch.nn.init.normal_(weight, std=0.3)
    return tuned


def test_the_default_adapter_on_qwen2_1_5b():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
        model.tie_weights()
        tuned = lora.attach(model, Lora(), "Qwen/Qwen2-1.5B")

    count = lora.count(tuned)

    assert count == (8_716_288, 1_552_430_592)
    assert str(count) == "8,716,288 of 1,552,430,592 parameters train, 0.56%"


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does(model):
    plain = logits(model)
    tuned = lora.attach(model, SMALL, "tiny")
    assert torch.equal(logits(tuned), plain)
    stir(tuned)
    assert (logits(tuned) - plain).abs().max() > 0.1


def test_only_the_adapter_trains(model):
    tuned = lora.attach(model, SMALL, "tiny")
    trains = {name for name, weight in tuned.named_parameters() if weight.requires_grad}
    assert len(trains) == 2 * 2 * 2  # layers x modules x matrices
    assert all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in trains)
    # q_proj is 32 -> 32, v_proj is 32 -> 16 (two of four heads).
    assert lora.count(tuned).trainable == 2 * 4 * ((32 + 32) + (32 + 16))
    assert lora.count(tuned).total == sum(weight.numel() for weight in tuned.parameters())
    assert tuned.peft_config["default"].base_model_name_or_path == "tiny"


@pytest.mark.parametrize(
    "settings", [SMALL, Lora(r=4, alpha=8, use_rslora=True), Lora(r=4, alpha=8, use_dora=True)],
    ids=["lora", "rslora", "dora"],
)  # fmt: skip
def test_merged_is_unmerged(model, base, settings):
    tuned = stir(lora.attach(model, settings, "tiny"))
    unmerged = logits(tuned)

    merged = lora.merge(tuned)

    torch.testing.assert_close(logits(merged), unmerged, atol=1e-4, rtol=0)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert (logits(merged) - logits(base)).abs().max() > 0.1


def test_rslora_scales_by_the_root_of_the_rank(model):
    tuned = lora.attach(model, Lora(r=4, alpha=8, use_rslora=True), "tiny")
    assert tuned.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 8 / 2
    plain = lora.attach(copy.deepcopy(tuned.unload()), SMALL, "tiny")
    assert plain.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 8 / 4


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_saved_and_loaded_is_bitwise_the_same(model, base, tmp_path, use_dora):
    tuned = stir(lora.attach(model, Lora(r=4, alpha=8, use_dora=use_dora), "tiny"))
    lora.save(tuned, tmp_path)
    assert lora.is_adapter(tmp_path) and not lora.is_adapter(tmp_path.parent)
    assert (tmp_path / "adapter_model.safetensors").is_file()

    again = lora.load(copy.deepcopy(base), tmp_path)

    expected = {name: weight for name, weight in tuned.named_parameters() if "lora" in name}
    got = {name: weight for name, weight in again.named_parameters() if "lora" in name}
    assert got.keys() == expected.keys() and len(got) >= 8
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert torch.equal(logits(again), logits(tuned))
    assert not again.training and not any(weight.requires_grad for weight in got.values())


def test_a_damaged_adapter_is_refused_in_words(model, base, tmp_path):
    lora.save(lora.attach(model, SMALL, "tiny"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        lora.load(copy.deepcopy(base), tmp_path)


def test_an_adapter_for_another_base_is_refused(model, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    lora.save(lora.attach(model, SMALL, "tiny"), tmp_path)
    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )
    with pytest.raises(UserError, match=r"does not load on this base.*size mismatch"):
        lora.load(other, tmp_path)


def test_an_adapter_that_fits_nowhere_is_refused(model, base, tmp_path):
    # PEFT only warns of weights that find no place; the adapter would be a silent no-op.
    from safetensors.torch import load_file, save_file

    lora.save(stir(lora.attach(model, SMALL, "tiny")), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(
        {
            name.replace("self_attn", "attention"): weight
            for name, weight in load_file(file).items()
        },
        file,
    )
    with pytest.raises(UserError, match=r"does not load on this base: Found missing adapter keys"):
        lora.load(copy.deepcopy(base), tmp_path)


def test_unknown_target_module_names_the_nearest(model):
    with pytest.raises(UserError) as caught:
        lora.attach(model, Lora(target_modules=["q_porj", "v_proj"]), "tiny")
    message = str(caught.value)
    assert "lora.target_modules: q_porj: no linear layer of that name in tiny" in message
    assert (
        "did you mean q_proj?" in message and "v_proj (2x)" in message and "[all-linear]" in message
    )
    with pytest.raises(UserError) as caught:
        lora.attach(model, Lora(target_modules=["zzz"]), "tiny")
    assert "in tiny. It has: q_proj (2x)" in str(caught.value)


def test_all_linear_takes_every_layer_but_the_head(model):
    names = lora.linear_names(model)
    assert set(names) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert set(names.values()) == {2}
    tuned = lora.attach(model, Lora(r=4, target_modules=["all-linear"]), "tiny")
    adapted = {name for name, _ in tuned.named_modules() if name.endswith("lora_A.default")}
    assert len(adapted) == 7 * 2 and not any("lm_head" in name for name in adapted)
