"""Packed passes on the architectures that people fine-tune: the same losses, and no leak."""

import pytest
import torch

from etude.config.schema import Lora
from etude.conversation.encoding import Example
from etude.engine.packing import pack, pad, sum_by_example, token_losses, why_not_packed
from etude.models import lora

WIDE = {"hidden_size": 64, "intermediate_size": 96}
# name -> (its class of configuration, what is special about this one)
PACKABLE = {
    "Llama": ("LlamaConfig", {}),
    "Llama, wide, tied": ("LlamaConfig", {**WIDE, "tie_word_embeddings": True}),
    "Qwen2": ("Qwen2Config", WIDE),
    "Qwen3": ("Qwen3Config", {"head_dim": 16}),
    "Mistral": ("MistralConfig", {"vocab_size": 199}),
    "Gemma": ("GemmaConfig", {"head_dim": 8}),
    "Gemma 2": ("Gemma2Config", {"head_dim": 8}),
    "Gemma 3": ("Gemma3TextConfig", {"head_dim": 8}),
}

BEGINNING = [3, 12, 9, 10, 4, 7]
# Sorted, and no token that a test changes decides the order: a changed pass has the same layout.
EXAMPLES = [
    Example([*BEGINNING, *body], [False] * len(BEGINNING) + [True] * len(body))
    for body in ([21, 5, 7, 5], [21, 6, 9, 2, 8, 4], [33, 6, 6, 3], [33, 9, 1, 14, 2], [48, 2])
]


def build(config_class, **special):
    """A random model of a class of configurations, far from uniform, so that a leak shows."""
    import transformers

    torch.manual_seed(0)
    shape = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    config = getattr(transformers, config_class)(**{**shape, **special})
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model(request):
    """With an adapter that changes something already."""
    config_class, special = PACKABLE[request.param]
    tuned = lora.attach(build(config_class, **special), Lora(r=4, alpha=8), request.param)
    torch.manual_seed(1)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return tuned.eval()


every_architecture = pytest.mark.parametrize("model", PACKABLE, indirect=True)


def alone(model, one):
    """The summed loss of one example, the plain way: transformers' own, no mask, no positions."""
    labels = [i if yes else -100 for i, yes in zip(one.ids, one.supervised, strict=True)]
    ids = torch.tensor([one.ids])
    found = model(input_ids=ids, labels=torch.tensor([labels]), use_cache=False)
    return found.loss * sum(one.supervised)


def adapter_gradients(model, losses):
    model.zero_grad()
    losses.sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


@every_architecture
def test_packed_losses_and_gradients_are_those_of_the_examples_one_by_one(model):
    assert why_not_packed(model, 64, EXAMPLES) is None
    plain = torch.stack([alone(model, one) for one in EXAMPLES])
    packed = sum_by_example(model, pack(EXAMPLES, 1000), len(EXAMPLES))
    assert len(list(pack(EXAMPLES, 1000))) == 1
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=1e-5)

    expected, found = adapter_gradients(model, plain), adapter_gradients(model, packed)
    assert len(expected) == 2 * 2 * 2
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-2
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def losses_of(model, examples):
    """The losses of each example's tokens out of one packed pass, and the pass."""
    [batch] = pack(examples, 1000)
    with torch.no_grad():
        losses = token_losses(model, batch)
    return [losses[batch.owner == index] for index in range(len(examples))], batch


def changed(examples, index, at):
    """The examples with another token at `at` of one of them."""
    ids = list(examples[index].ids)
    ids[at] = 90
    return [*examples[:index], Example(ids, examples[index].supervised), *examples[index + 1 :]]


@every_architecture
def test_a_token_is_seen_by_no_other_example_of_its_pass(model):
    before, batch = losses_of(model, EXAMPLES)
    for index, one in enumerate(EXAMPLES):
        # Its last token but one: its own, a target itself, and seen by the last.
        after, other = losses_of(model, changed(EXAMPLES, index, len(one) - 2))
        # The same pass but for this one token.
        assert (other.input_ids != batch.input_ids).sum() == 1
        assert torch.equal(other.attention_mask, batch.attention_mask)
        assert torch.equal(other.owner, batch.owner)
        for neighbour in range(len(EXAMPLES)):
            same = torch.equal(after[neighbour], before[neighbour])
            assert same == (neighbour != index), (index, neighbour)


@every_architecture
def test_a_token_of_the_shared_beginning_is_seen_by_every_example(model):
    # The control: what is to be seen is seen.
    before, batch = losses_of(model, EXAMPLES)
    others = EXAMPLES
    for index in range(len(EXAMPLES)):
        others = changed(others, index, 2)
    after, other = losses_of(model, others)
    assert (other.input_ids != batch.input_ids).sum() == 1
    for old, new in zip(before, after, strict=True):
        assert (new - old).abs().max() > 1e-3


# --- layers that look back over a window ---------------------------------------------------------


@pytest.mark.parametrize("config_class", ["MistralConfig", "Gemma2Config", "Gemma3TextConfig"])
def test_a_window_as_long_as_the_examples_is_packed_and_a_shorter_one_is_not(config_class):
    longest = max(map(len, EXAMPLES))
    head = {} if config_class == "MistralConfig" else {"head_dim": 8}
    model = build(config_class, sliding_window=longest, **head)
    assert why_not_packed(model, longest, EXAMPLES) is None
    assert "look back 12 tokens" in why_not_packed(model, longest + 1, EXAMPLES)
    # The pass is longer than the window, which counts from token to token, not from place to place.
    [batch] = pack(EXAMPLES, 1000)
    assert batch.input_ids.shape[1] > longest == 12
    with torch.no_grad():
        plain = torch.stack([alone(model, one) for one in EXAMPLES])
        packed = sum_by_example(model, [batch], len(EXAMPLES))
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=1e-5)


# --- architectures that carry state along the row ------------------------------------------------

RECURRENT = {
    "Mamba": ("MambaConfig", {"state_size": 4}),
    "RWKV": ("RwkvConfig", {"attention_hidden_size": 32}),
    "RecurrentGemma": ("RecurrentGemmaConfig", {"head_dim": 8}),
    "Jamba": ("JambaConfig", {"num_experts": 2, "mamba_d_state": 4}),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_what_cannot_be_packed_is_found_out_and_padding_is_exact(name):
    config_class, special = RECURRENT[name]
    model = build(config_class, **special)
    reason = why_not_packed(model, 64, EXAMPLES)
    assert reason and reason.startswith(
        ("it does not accept a custom mask: ", "packed losses would differ by ")
    )
    with torch.no_grad():
        plain = torch.stack([alone(model, one) for one in EXAMPLES])
        padded = sum_by_example(model, pad(EXAMPLES, len(EXAMPLES)), len(EXAMPLES))
    torch.testing.assert_close(padded, plain, atol=1e-4, rtol=1e-5)
