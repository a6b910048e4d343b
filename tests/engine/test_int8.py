"""An int8 base: how near it stays to the base it is made of, and where it is refused."""

import copy
import json

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from etude.cli import app
from etude.config.loading import load_config
from etude.config.schema import Lora
from etude.conversation.encoding import Example
from etude.engine import int8, packing
from etude.engine.int8 import Int8Linear, quantize_asymmetric, quantize_symmetric
from etude.engine.setup import configure_engine
from etude.errors import UserError
from etude.models import device, loading, lora
from etude.runs import opening
from etude.runs.folder import METRICS

# --- rows of numbers -----------------------------------------------------------------------------

SCALES = st.sampled_from([0.0, 1e-35, 1e-8, 1.0, 1e8, 1e30])
ROWS = st.builds(
    lambda shape, scale: (shape * scale).astype(np.float32),
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=12),
        elements=st.floats(-1, 1, width=32),
    ),
    SCALES,
)
SPECIAL = np.array(
    [[0, 0, 0], [3, 3, 3], [-3, -3, -3], [1e30, -1e30, 1], [1e-38, 0, -1e-38], [1e30, 1e-30, 0]],
    np.float32,
)


@given(rows=ROWS)
@example(rows=SPECIAL)
def test_symmetric_numbers_come_back_within_half_a_step(rows):
    x = torch.from_numpy(rows)
    q, scale = quantize_symmetric(x)
    assert q.dtype == torch.int8 and scale.shape == (len(x), 1)
    assert (scale > 0).all()
    assert ((q * scale - x).abs() <= scale * 0.5001).all()
    # The steps are no larger than they must be: the largest number gets the last one.
    present = x.abs().amax(1) > 1e-28
    assert (q.abs().amax(1)[present] == 127).all()


@given(rows=ROWS)
@example(rows=SPECIAL)
def test_asymmetric_numbers_come_back_within_half_a_step(rows):
    x = torch.from_numpy(rows)
    q, scale, zero = quantize_asymmetric(x)
    assert q.dtype == torch.int8 and scale.shape == zero.shape == (len(x), 1)
    assert (scale > 0).all()
    assert (((q - zero) * scale - x).abs() <= scale * 0.5001).all()
    present = x.abs().amax(1) > 1e-28
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    torch.testing.assert_close(scale[present, 0] * 255, (high - low)[present])
    # Zero is a number of its own, so that padding and dead channels stay exact.
    assert torch.equal(zero, zero.to(torch.int8).float())


def test_positive_numbers_get_steps_half_as_large_with_a_zero_point():
    x = torch.rand(4, 100)
    assert (quantize_asymmetric(x)[1] < 0.51 * quantize_symmetric(x)[1]).all()


# --- one layer -----------------------------------------------------------------------------------


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(64, 48).requires_grad_(False)


@pytest.fixture
def x(linear):
    return torch.randn(40, 64)


def maxima(x):
    return x.detach().abs().amax(0)


def both(layer, x, direction):
    """What comes out, and the gradient of the input where `direction` comes back."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(direction)
    return y.detach(), x.grad


def error(found, exact):
    return float((found - exact).norm() / exact.norm())


def test_an_int8_layer_is_its_linear_layer_in_both_directions(linear, x):
    direction = torch.randn(40, 48)
    exact, found = both(linear, x, direction), both(Int8Linear(linear, maxima(x)), x, direction)
    assert 0 < error(found[0], exact[0]) < 0.02
    assert 0 < error(found[1], exact[1]) < 0.02


def test_rows_in_any_shape_and_format_come_out_as_they_went_in(linear, x):
    layer = Int8Linear(linear, maxima(x))
    assert torch.equal(layer(x.view(2, 20, 64)), layer(x).view(2, 20, 48))
    half = copy.deepcopy(linear).bfloat16()
    y, gradient = both(Int8Linear(half, maxima(x)), x.bfloat16(), torch.ones(40, 48).bfloat16())
    assert y.dtype == gradient.dtype == torch.bfloat16
    assert error(y.float(), linear(x)) < 0.03


def test_the_bias_is_kept_exactly(linear, x):
    layer = Int8Linear(linear, maxima(x))
    without = Int8Linear(linear, maxima(x))
    without.bias = None
    assert linear.bias.abs().min() > 0
    assert torch.equal(layer(x), without(x) + linear.bias)
    plain = Int8Linear(nn.Linear(64, 48, bias=False), maxima(x))
    assert plain.bias is None and plain(x).shape == (40, 48)


def test_an_outlier_channel_harms_less_when_its_size_is_known(linear, x):
    x[:, 5] *= 100
    direction = torch.randn(40, 48)
    exact = both(linear, x, direction)
    known = both(Int8Linear(linear, maxima(x)), x, direction)
    flat = both(Int8Linear(linear, torch.ones(64)), x, direction)
    # What the other channels say drowns in the steps of the outlier, unless it is scaled down.
    rest = exact[0] - x[:, 5:6] * linear.weight[:, 5]
    assert (known[0] - exact[0]).norm() < 0.05 * rest.norm()
    assert (known[0] - exact[0]).norm() < 0.4 * (flat[0] - exact[0]).norm()
    assert error(known[1], exact[1]) < 0.05


def test_a_tokens_numbers_do_not_depend_on_its_neighbours(linear, x):
    layer = Int8Linear(linear, maxima(x))
    direction = torch.randn(40, 48)
    other, turned = x.clone(), direction.clone()
    other[7] *= 50
    turned[7] *= -50
    y, gradient = both(layer, x, direction)
    changed_y, changed_gradient = both(layer, other, turned)
    rest = torch.arange(40) != 7
    assert torch.equal(y[rest], changed_y[rest])
    assert torch.equal(gradient[rest], changed_gradient[rest])
    # The control: its own did change.
    assert not torch.equal(y[7], changed_y[7]) and not torch.equal(gradient[7], changed_gradient[7])


# --- a whole model -------------------------------------------------------------------------------

torch.manual_seed(1)
EXAMPLES = [
    Example([1, 2, *torch.randint(3, 97, (n,)).tolist()], [False] * 3 + [True] * (n - 1))
    for n in range(6, 20)
]


def llama(tuned=True, **shape):
    """A tiny random Llama; with an adapter on the attention that already changes something."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1, **shape,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False)
    if not tuned:
        return model
    model = lora.attach(model, Lora(r=4, alpha=8), "tiny")
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return model


def in_int8(model, dtype=torch.float32):
    found = copy.deepcopy(model)
    passes = (batch.to("cpu", model.dtype) for batch in packing.pack(EXAMPLES, 128))
    int8.quantize(found, passes, dtype)
    return found


def learn(model):
    """The mean loss over all examples, and its gradients."""
    model.zero_grad()
    count = sum(sum(one.supervised) for one in EXAMPLES)
    total = 0.0
    for batch in packing.pack(EXAMPLES, 128):
        loss = packing.token_losses(model, batch).sum() / count
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_all_frozen_linears_but_the_head_become_int8():
    exact = llama()
    frozen = set(int8.frozen_linears(exact))
    model = in_int8(exact)
    quantised = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert quantised == frozen and len(frozen) == 2 * 7
    assert {name.rpartition(".")[2] for name in linear} == {"default", "lm_head"}
    assert sum("lora_A" in name for name in linear) == sum("lora_B" in name for name in linear) == 4

    for name in frozen:
        before, after = exact.get_submodule(name).weight, model.get_submodule(name).weight
        assert after.dtype == torch.int8 and after.shape == before.shape
        assert after.nbytes * 4 == before.nbytes
    # What trains trains as before, and nothing else does.
    trains = {name: p for name, p in exact.named_parameters() if p.requires_grad}
    still = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert still.keys() == trains.keys()
    assert all(torch.equal(still[name], trains[name]) for name in trains)


def test_the_largest_inputs_of_all_passes_decide_how_a_layer_is_smoothed():
    exact, found = llama(), llama()
    passes = list(packing.pack(EXAMPLES, 32))
    int8.quantize(found, passes, torch.float32)
    first, quantised = (model.get_base_model().model.layers[0] for model in (exact, found))
    layer = first.self_attn.q_proj.base_layer
    inputs = [
        first.input_layernorm(exact.get_input_embeddings()(batch.input_ids)) for batch in passes
    ]
    smooth = Int8Linear(layer, maxima(torch.cat(inputs, dim=1)[0])).smooth
    assert torch.equal(quantised.self_attn.q_proj.base_layer.smooth, smooth)
    # The control: no pass alone has them all.
    assert len(passes) > 2
    for x in inputs:
        assert not torch.equal(Int8Linear(layer, maxima(x[0])).smooth, smooth)


def test_an_int8_base_teaches_what_its_own_base_teaches():
    exact = llama()
    loss, gradients = learn(exact)
    found, approximate = learn(in_int8(exact))
    assert found != loss and found == pytest.approx(loss, rel=0.02)
    assert len(gradients) == 8
    for name, gradient in gradients.items():
        cosine = torch.cosine_similarity(approximate[name].flatten(), gradient.flatten(), dim=0)
        assert gradient.abs().max() > 1e-3 and cosine > 0.98, name
    # The control: another base teaches otherwise.
    torch.manual_seed(5)
    for weight in exact.parameters():
        if not weight.requires_grad:
            weight.data = weight[torch.randperm(len(weight))]
    _, foreign = learn(exact)
    cosines = [
        torch.cosine_similarity(foreign[name].flatten(), gradients[name].flatten(), dim=0)
        for name in gradients
    ]
    assert max(cosines) < 0.9


def test_a_base_with_biases_and_a_tied_head_is_quantised_too():
    exact = llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    for name, weight in exact.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight)
    model = in_int8(exact)
    base = model.get_base_model()
    assert base.lm_head.weight is base.get_input_embeddings().weight
    assert base.lm_head.weight.dtype == torch.float32
    assert learn(model)[0] == pytest.approx(learn(exact)[0], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stays_of_a_bfloat16_base_gets_the_format_asked_for(dtype):
    model = in_int8(llama().bfloat16(), dtype)
    rest = {name: p.dtype for name, p in model.named_parameters() if not p.requires_grad}
    # The embedding, the head, the norms; the adapter is not touched.
    assert len(rest) == 2 + 2 * 2 + 1
    assert set(rest.values()) == {dtype}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


def test_a_base_that_becomes_int8_is_loaded_in_its_own_format(tmp_path, sample_tokenizer):
    llama(tuned=False).bfloat16().save_pretrained(tmp_path)
    sample_tokenizer.save_pretrained(tmp_path)
    place = device.choose("float32", True)
    own = loading.load_base(str(tmp_path), place, quantization="int8").model
    assert {weight.dtype for weight in own.parameters()} == {torch.bfloat16}
    plain = loading.load_base(str(tmp_path), place).model
    assert {weight.dtype for weight in plain.parameters()} == {torch.float32}


def test_a_bfloat16_base_trains_in_float32_once_it_is_int8():
    settings = load_config(None, overrides=["model.quantization=int8"])
    place = device.choose("float32", True)
    model = llama().bfloat16()
    engine = configure_engine(model, settings, place, EXAMPLES, 1)
    assert str(engine) == "packed passes of 512 tokens, int8 base" and not engine.notices
    assert engine.cutter.dtype == torch.float32
    for batch in engine.cutter(EXAMPLES):
        assert batch.attention_mask.dtype == torch.float32
        assert packing.token_losses(model, batch).isfinite().all()


# --- where it is refused -------------------------------------------------------------------------


def no_product(*_):
    raise RuntimeError("not implemented for 'Int'\nat line 1")


def test_a_machine_without_the_product_is_refused(monkeypatch):
    assert int8.why_not(llama(), "cpu") is None
    monkeypatch.setattr(torch, "_int_mm", no_product)
    assert int8.why_not(llama(), "cpu") == "cpu has no int8 product: not implemented for 'Int'"
    monkeypatch.setattr(int8, "frozen_linears", lambda _: {})
    assert int8.why_not(llama(), "cpu") == "the model has no frozen linear layers"


def test_dora_needs_the_bases_own_weights():
    with pytest.raises(UserError, match=r"lora\.use_dora: DoRA needs.* use_dora: false"):
        load_config(None, overrides=["model.quantization=int8", "lora.use_dora=true"])
    for alone in ("model.quantization=int8", "lora.use_dora=true"):
        load_config(None, overrides=[alone])


# --- the program ---------------------------------------------------------------------------------


@pytest.fixture
def train(tiny_model, tmp_path):
    rows = [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(folder, *overrides):
        return CliRunner().invoke(
            app,
            [
                "train", "--preset", "cpu", f"model.name={tiny_model}",
                f"dataset.train={tmp_path}/pairs.jsonl", "dataset.validation=null",
                "dataset.test=null", "training.num_epochs=1", "model.dtype=float32",
                f"output.dir={tmp_path / folder}", *overrides,
            ],
        )  # fmt: skip

    return run


def test_training_on_int8_is_refused_where_there_is_no_product(train, monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", no_product)
    result = train("run", "model.quantization=int8")
    assert result.exit_code == 2
    assert "model.quantization: int8: cpu has no int8 product" in result.output
    assert "Traceback" not in result.output


def test_training_on_int8_learns_what_training_on_the_base_learns(train, tmp_path):
    losses = {}
    for folder, kind in (("plain", "null"), ("int8", "int8")):
        result = train(folder, f"model.quantization={kind}")
        assert result.exit_code == 0, result.output
        assert ("int8 base" in result.output) == (kind == "int8")
        lines = (tmp_path / folder / METRICS).read_text().splitlines()
        losses[kind] = [json.loads(line)["eval_loss"] for line in lines if "eval_loss" in line]
    assert losses["int8"] != losses["null"]
    assert losses["int8"] == pytest.approx(losses["null"], rel=0.02)
    # Its adapter goes on any copy of the base.
    target = opening.open_target(str(tmp_path / "int8"), [])
    ids = torch.tensor([[5, 6, 7]])
    before = target.base.model(ids).logits
    after = target.tuned()(ids).logits
    assert after.isfinite().all() and not torch.equal(after, before)
