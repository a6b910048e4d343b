"""One function decides how a training computes, of the loaded model and of its shape alone."""

import copy

import pytest
import torch
from tiny_llama import llama, texts

from etude.config.loading import load_config
from etude.config.schema import Lora
from etude.engine import compiling
from etude.engine.setup import configure_engine
from etude.models import device, lora


def shape(config):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return lora.attach(model, Lora(r=4, alpha=8), "tiny")


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.compile=true",),
        ("model.quantization=int8", "training.compile=false"),
        ("training.compile=auto",),
    ],
)
def test_a_shape_is_configured_as_its_model(monkeypatch, overrides):
    monkeypatch.setattr(compiling, "compile_layers", lambda *_: None)
    settings = load_config(None, overrides=["dataset.max_length=64", *overrides])
    place, examples, model = device.choose("float32", True), texts(10, 20, 30), llama()
    empty = shape(model.config)

    real = configure_engine(model, settings, place, examples, 100)
    found = configure_engine(empty, settings, place, examples, 100)

    assert found == real
    assert {weight.device.type for weight in (*empty.parameters(), *empty.buffers())} == {"meta"}


def test_a_shape_whose_layers_look_back_less_is_padded():
    settings = load_config(None, overrides=["dataset.max_length=64"])
    empty = shape(llama().config)
    empty.config.sliding_window = 32
    found = configure_engine(empty, settings, device.choose("float32", True), texts(10), 1)
    assert str(found) == "padded passes"
    assert "its layers look back 32 tokens" in found.notices[0]


# --- where compiling is worth it -----------------------------------------------------------------


def configured(monkeypatch, *overrides, reason=None):
    """The engine of 100 steps on two rows; compiling itself is replaced."""
    calls = []

    def compile_layers(model, batch):
        calls.append(batch.input_ids.numel())
        return reason

    monkeypatch.setattr(compiling, "compile_layers", compile_layers)
    settings = load_config(
        None,
        overrides=[
            "training.batch_size=2", "training.gradient_accumulation_steps=1",
            "dataset.max_length=64", *overrides,
        ],
    )  # fmt: skip
    place = device.choose("float32", True)
    return configure_engine(llama(), settings, place, texts(10, 20, 30), 100), calls


def test_layers_are_compiled_where_a_training_is_long_enough(monkeypatch):
    # 100 steps on the two first rows: 2 tokens that both begin with, 10 and 20 of their own.
    work = compiling.operations(llama(), 100 * 32)
    packed = "packed passes of 128 tokens"
    for worth_it, how, expected in (
        (work, "auto", [32]),
        (work + 1, "auto", []),
        (work + 1, "true", [32]),
        (work, "false", []),
    ):
        monkeypatch.setattr(compiling, "WORTH_IT", worth_it)
        engine, calls = configured(monkeypatch, f"training.compile={how}")
        assert calls == expected and engine.compiled == bool(expected)
        assert str(engine) == packed + (", compiled layers" if expected else "")


def test_layers_that_do_not_compile_are_reported_and_trained_all_the_same(monkeypatch):
    engine, calls = configured(monkeypatch, "training.compile=true", reason="no compiler")
    assert calls and str(engine) == "packed passes of 128 tokens"
    assert engine.notices == ["not compiled, so slower: no compiler"]
