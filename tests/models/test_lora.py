import contextlib
import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from etude.config.schema import Lora
from etude.errors import UserError
from etude.models import lora

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

    assert lora.count(tuned) == "8,716,288 of 1,552,430,592 parameters train, 0.56%"


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
    total = sum(weight.numel() for weight in tuned.parameters())
    assert lora.count(tuned).startswith(
        f"{2 * 4 * ((32 + 32) + (32 + 16))} of {total:,} parameters"
    )
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

    again = lora.load_adapter(copy.deepcopy(base), tmp_path)

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
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is corrupt"):
        lora.load_adapter(copy.deepcopy(base), tmp_path)


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
    with pytest.raises(
        UserError,
        match=r"does not load on this base: 8 misshapen of 8 keys \(.*lora_A.weight is \[4, 32\], not \[4, 64\]",
    ):
        lora.load_adapter(other, tmp_path)


def test_an_adapter_that_fits_nowhere_is_refused(model, base, tmp_path):
    # PEFT only warns of weights that find no place; the adapter would be a silent no-op.
    lora.save(stir(lora.attach(model, SMALL, "tiny")), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(
        {
            name.replace("self_attn", "attention"): weight
            for name, weight in load_file(file).items()
        },
        file,
    )
    with pytest.raises(
        UserError, match=r"8 missing of 8 keys \(.*; 8 extra of 8 keys \(.*attention"
    ):
        lora.load_adapter(copy.deepcopy(base), tmp_path)


def test_unknown_target_modules_are_refused_with_those_there_are(model):
    with pytest.raises(UserError) as caught:
        lora.attach(model, Lora(target_modules=["q_porj", "v_proj"]), "tiny")
    message = str(caught.value)
    assert "lora.target_modules: q_porj: no linear layer of that name in tiny. It has: q" in message
    assert "v_proj (2x)" in message and "[all-linear]" in message


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_the_linear_layers_of_gpt2_have_another_class():
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    assert set(lora.linear_names(model)) == {"c_attn", "c_proj", "c_fc"}
    tuned = lora.attach(model, Lora(r=2, target_modules=["c_attn"]), "gpt2")
    assert lora.count(tuned).startswith(f"{2 * (16 + 48)} of")


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


# --- adapters that are not what they should be -----------------------------------------------


@pytest.fixture
def saved(model, tmp_path):
    lora.save(stir(lora.attach(model, SMALL, "tiny")), tmp_path)
    return tmp_path


def rewrite(folder, change):
    """Change the saved tensors by a function of their dict."""
    file = folder / lora.WEIGHTS
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def reconfigure(folder, **changes):
    file = folder / lora.ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(base, folder):
    with pytest.raises(UserError) as caught:
        lora.load_adapter(copy.deepcopy(base), folder)
    return str(caught.value)


def test_missing_extra_misshapen_and_infinite_keys_are_listed_at_once(base, saved):
    def change(tensors):
        names = sorted(tensors)
        assert len(names) == 8
        del tensors[names[0]]
        tensors["base_model.model.stray.lora_A.weight"] = torch.zeros(2)
        tensors[names[1]] = tensors[names[1]][:, :-1].contiguous()
        tensors[names[2]] = torch.full_like(tensors[names[2]], float("nan"))

    lora.load_adapter(copy.deepcopy(base), saved)  # the control
    rewrite(saved, change)
    message = refused(base, saved)
    for words in (
        "1 missing of 8 keys (base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight)",
        "1 extra of 8 keys (base_model.model.stray.lora_A.weight)",
        "1 misshapen of 8 keys (base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight is "
        "[32, 3], not [32, 4]",
        "1 not finite of 8 keys (",
    ):
        assert words in message


def test_many_wrong_keys_are_counted_and_the_first_are_named(base, saved):
    reconfigure(saved, target_modules=["q_proj"])
    message = refused(base, saved)
    assert "4 extra of 4 keys (" in message and "v_proj.lora_A.weight" in message
    assert message.endswith(", ...)")


def test_pickled_weights_are_not_read(base, saved):
    class Harm:
        def __reduce__(self):
            return (saved.joinpath("harmed").touch, ())

    pickled = saved / "adapter_model.bin"
    torch.save({"x": Harm()}, pickled)
    lora.load_adapter(
        copy.deepcopy(base), saved
    )  # safetensors are there, so nothing else is looked at
    (saved / lora.WEIGHTS).unlink()
    assert (
        "no adapter_model.safetensors in this folder (pickled weights, .bin, can run code"
        in refused(base, saved)
    )
    assert not (saved / "harmed").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "Etude does not do this: peft_type 'IA3'"),
        ({"r": -1}, "does not load on this base"),
        ({"r": "4"}, "does not load on this base"),
        ({"r": 10**9}, "has rank 1000000000, and no tensor is so large"),
        ({"r": 10**30}, "does not load on this base"),
        ({"r": 8}, "q_proj.lora_A.weight is [4, 32], not [8, 32]"),
        ({"rank_pattern": {"q_proj": 10**9}}, "has rank 1000000000"),
        ({"target_modules": ["nothing"]}, "does not load on this base: Target modules"),
        ({"target_modules": "("}, "does not load on this base"),
        ({"bias": "all"}, "Etude does not do this: bias 'all'"),
        ({"init_lora_weights": "pissa"}, "Etude does not do this: init_lora_weights 'pissa'"),
        ({"modules_to_save": ["lm_head"]}, "Etude does not do this: modules_to_save ['lm_head']"),
        ({"trainable_token_indices": [1]}, "this: trainable_token_indices [1]"),
        ({"layer_replication": [[0, 2]]}, "this: layer_replication [[0, 2]]"),
        ({"megatron_config": {"x": 1}}, "this: megatron_config"),
        ({"not_yet_invented": True}, "this: not_yet_invented True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_is_not_for_us_is_refused(base, saved, changes, words):
    reconfigure(saved, **changes)
    assert words in refused(base, saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 10**5, "\udc80"])
def test_a_broken_configuration_gets_a_sentence(base, saved, text):
    (saved / lora.ADAPTER_CONFIG).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "adapter_config.json: " in refused(base, saved)


@given(
    st.dictionaries(
        st.sampled_from([*sorted(lora.TAKEN), *lora.CHOICES, "modules_to_save", "x"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
        | st.lists(st.text(max_size=3), max_size=2) | st.dictionaries(st.text(max_size=3), st.integers()),
    )
)  # fmt: skip
def test_any_configuration_loads_or_gets_a_sentence(fuzzed, changes):
    base, folder = fuzzed
    good = (folder / lora.ADAPTER_CONFIG).read_text()
    reconfigure(folder, **changes)
    with contextlib.suppress(UserError):
        lora.load_adapter(copy.deepcopy(base), folder)
    (folder / lora.ADAPTER_CONFIG).write_text(good)


@pytest.fixture(scope="module")
def fuzzed(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzed")
    lora.save(lora.attach(copy.deepcopy(base), SMALL, "tiny"), folder)
    return base, folder


def test_an_adapter_carries_its_base_wherever_it_is_copied(model, tmp_path):
    lora.save(lora.attach(model, SMALL, "tiny", "sha256:1"), tmp_path)
    lora.check_base("x", lora.describe(tmp_path).revision, "sha256:1")
    with pytest.raises(UserError, match=r"trained on another base \(sha256:1\) than .*sha256:2"):
        lora.check_base("x", lora.describe(tmp_path).revision, "sha256:2")
    commit = "a" * 40
    for revision, identity, fits in (
        (commit, f"commit:{commit}", True),
        (commit, f"commit:{'b' * 40}", False),
        ("main", f"commit:{commit}", True),  # a branch cannot be compared
        (None, f"commit:{commit}", True),
        (commit, "sha256:2", True),  # nor can a copy in a folder
    ):
        reconfigure(tmp_path, revision=revision)
        with contextlib.nullcontext() if fits else pytest.raises(UserError):
            lora.check_base("x", lora.describe(tmp_path).revision, identity)


def test_weights_in_16_bits_are_read_as_peft_reads_them(base, saved):
    from peft import PeftModel

    rewrite(saved, lambda t: t.update({name: value.bfloat16() for name, value in t.items()}))
    plain = PeftModel.from_pretrained(copy.deepcopy(base), saved)
    assert torch.equal(logits(lora.load_adapter(copy.deepcopy(base), saved)), logits(plain.eval()))


def test_the_digest_distinguishes_adapters_and_survives_saving(base, saved):
    loaded = lora.state(lora.load_adapter(copy.deepcopy(base), saved))
    digest = lora.digest(lora.read_weights(saved))
    assert lora.digest(loaded) == digest
    assert lora.digest(dict(reversed(loaded.items()))) == digest
    name = next(iter(loaded))
    assert lora.digest({**loaded, name: loaded[name] + 1e-6}) != digest
    assert lora.digest({**loaded, name: loaded[name].view(-1)}) != digest
    assert lora.digest({**loaded, "other": loaded[name]}) != digest
