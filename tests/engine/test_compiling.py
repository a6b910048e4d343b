"""Compiled decoder layers compute what they computed before, whatever the length of a pass."""

import copy
import shutil

import pytest
import torch
from test_trainer import fit
from tiny_llama import llama, texts
from torch import nn

from etude.config.loading import load_config
from etude.engine import compiling, int8, packing
from etude.models import device

# PyTorch's own, while it imports its compiler and while it compiles.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated",
    "ignore:The .grad attribute of a Tensor",
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated",
)
needs_a_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++ here")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Nothing compiled by one test, or on another day, is there for another."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def passes(*lengths):
    """One packed pass of two examples for each length."""
    return [batch for n in lengths for batch in packing.pack(texts(n, n + 1), 10_000)]


def learn(model, batch):
    """The losses of a pass, and the gradients of their mean."""
    model.zero_grad()
    losses = packing.token_losses(model, batch)
    losses.mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return losses.detach(), found


def graphs():
    """How often something was compiled since the test began."""
    return torch._dynamo.utils.counters["frames"]["total"]


def assert_compiled_is_eager(model, compilations, tolerance):
    """After one compilation of `model`, passes of several lengths give what they gave before."""
    first, *others = passes(20, 7, 33, 58, 1)
    expected = [learn(model, batch) for batch in (first, *others)]
    start = graphs()

    assert compiling.compile_layers(model, first) is None

    # One for the first layer, whose input needs no gradient, and one for all others.
    assert graphs() - start == compilations
    assert all(p.grad is None for p in model.parameters())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, (losses, gradients) in zip((first, *others), expected, strict=True):
            found, found_gradients = learn(model, batch)
            torch.testing.assert_close(found, losses, atol=tolerance, rtol=tolerance)
            for name, gradient in gradients.items():
                assert gradient.norm() > 1e-3
                error = (found_gradients[name] - gradient).norm()
                assert error <= tolerance * gradient.norm(), name
        # The control: this would have been seen.
        with pytest.raises(torch._dynamo.exc.RecompileError):
            learn(model.eval(), first)


def fitted(model, folder, *overrides):
    settings = load_config(
        None,
        overrides=[
            "model.dtype=float32", "training.use_cpu=true", "training.num_epochs=1",
            "training.logging_steps=1", "training.eval_steps=2", "dataset.max_length=64", *overrides,
        ],
    )  # fmt: skip
    folder.mkdir()
    examples = {"train": texts(*range(1, 41)), "validation": texts(*range(30, 36))}
    place = device.choose("float32", True)
    return fit(model, settings, place, examples, folder)


@needs_a_compiler
def test_compiled_layers_learn_the_same_at_every_length_and_are_compiled_once(tmp_path):
    # The one test that compiles, for it takes long: float32, a whole training, and int8.
    model = llama(layers=3, name=tmp_path)
    model.config.save_pretrained(tmp_path)
    eager, trained = copy.deepcopy(model), copy.deepcopy(model)
    assert_compiled_is_eager(model, compilations=2, tolerance=1e-5)

    before = graphs()
    found = fitted(trained, tmp_path / "compiled", "training.compile=true")
    expected = fitted(eager, tmp_path / "eager", "training.compile=false")
    # Its layers are the same code: nothing new for any step, nor for a validation.
    assert graphs() == before
    assert found["engine"] == expected["engine"] + ", compiled layers"
    assert found["steps"] == expected["steps"] == 5
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)

    quantised = llama(layers=1)
    int8.quantize(quantised, passes(9, 30), torch.float32)
    # Wider, for where a last bit differs a number may round to its neighbour.
    assert_compiled_is_eager(quantised.train(), compilations=1, tolerance=0.02)


def test_the_trial_leaves_no_gradient_and_draws_none_of_the_trainings_numbers(monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: None)
    model = llama(dropout=0.5)
    [batch] = passes(20)
    state = torch.get_rng_state()
    assert compiling.compile_layers(model, batch) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    # The control: a pass of the training draws some, and leaves its gradients.
    packing.token_losses(model, batch).sum().backward()
    assert any(p.grad is not None for p in model.parameters())
    assert not torch.equal(torch.get_rng_state(), state)


# --- where it does not work ----------------------------------------------------------------------


def assert_eager(model, expected):
    """`model` computes as before, and nothing is left of a compilation that failed."""
    [batch] = passes(20)
    assert all(p.grad is None for p in model.parameters())
    losses, gradients = learn(model, batch)
    assert torch.equal(losses, expected[0])
    assert all(torch.equal(gradients[name], expected[1][name]) for name in expected[1])


def test_without_a_compiler_the_layers_stay_as_they_were():
    from torch._inductor import config as inductor

    model = llama(layers=1)
    [batch] = passes(20)
    expected = learn(model, batch)
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        reason = compiling.compile_layers(model, batch)
    assert reason.startswith("InductorError: InvalidCxxCompiler: No working C++ compiler found")
    assert "\n" not in reason
    assert_eager(model, expected)


def test_a_failure_of_any_kind_is_reported_in_a_line(monkeypatch):
    model = llama()
    [batch] = passes(20)
    expected = learn(model, batch)
    asked = []

    def broken(self, **how):
        asked.append((type(self).__name__, how))
        self._compiled_call_impl = fail

    def fail(*_, **__):
        raise ValueError("\nnot today: " + "x" * 1000 + "\nand more")

    monkeypatch.setattr(nn.Module, "compile", broken)
    reason = compiling.compile_layers(model, batch)
    assert asked == [("LlamaDecoderLayer", {"dynamic": True})] * 2
    assert reason.startswith("ValueError: not today: xxx")
    assert len(reason) < 250 and "\n" not in reason
    assert_eager(model, expected)


# --- where it is worth it ------------------------------------------------------------------------


def test_the_decoder_layers_are_found_and_nothing_else():
    model = llama(layers=3)
    assert compiling.decoder_layers(model) == list(model.get_base_model().model.layers)
    assert len(compiling.decoder_layers(model)) == 3


def test_operations_are_counted_as_by_hand():
    model = llama()
    attention = 32 * 32 + 2 * (32 * 16) + 32 * 32  # q, k and v of two heads, o
    adapter = 4 * (32 + 32) + 4 * (32 + 16)  # of q and of v
    layer = attention + adapter + 3 * 32 * 64 + 2 * 32  # its feed-forward, its norms
    head = 32 * 97
    # The embedding is looked up, not multiplied.
    assert compiling.operations(model, 1000) == 4 * 1000 * (2 * layer + 32 + head)
