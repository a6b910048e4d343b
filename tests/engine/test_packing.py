import json
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.config.schema import Dataset
from etude.conversation.encoding import Example
from etude.conversation.renderer import Renderer
from etude.data import dataset, splits
from etude.engine.packing import (
    SUPERVISED_BUDGET,
    Cutter,
    fitting,
    pack,
    pad,
    sum_by_example,
    token_losses,
    why_not_packed,
)
from etude.errors import UserError

TWEETS = Path(__file__).parents[2] / "data" / "tweets_sentiment.train.jsonl"
DICTIONARY = Path(__file__).parents[2] / "data" / "devils_dictionary.train.jsonl"


@pytest.fixture(scope="module")
def model(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def example(*ids, prompt=1):
    """An example whose tokens after the first `prompt` are supervised."""
    return Example(list(ids), [at >= prompt for at in range(len(ids))])


@st.composite
def examples(draw):
    """Few different tokens, so that beginnings are shared at all levels, as are whole examples."""
    ids = draw(st.lists(st.integers(1, 3), min_size=2, max_size=16))
    chosen = draw(st.sets(st.integers(1, len(ids) - 1), min_size=1))
    return Example(ids, [at in chosen for at in range(len(ids))])


SHARED = [
    example(5, 6, 7, 8, 9, prompt=3),
    example(5, 6, 7, 8, 9, prompt=3),  # the same
    example(5, 6, 7, 8, prompt=2),  # the beginning of another
    example(5, 6, 7, 9, 9, prompt=3),  # one token differs
    example(5, 6, 4, 8, 9, 1, 2, prompt=2),  # shares less
    example(3, 6, 7, 8, 9, prompt=3),  # shares nothing
    example(5, 6, prompt=1),
    example(7, 8, 9, 10, 11, 12, 13, prompt=1),
]


def alone(model, one):
    """The plain way: one example, full logits, no mask, no positions."""
    logits = model(torch.tensor([one.ids])).logits[0]
    at = torch.tensor([index for index, yes in enumerate(one.supervised) if yes])
    return F.cross_entropy(logits[at - 1], torch.tensor(one.ids)[at], reduction="none")


def by_owner(model, passes, count):
    """The losses of each example's targets, in order, out of all passes."""
    found = [[] for _ in range(count)]
    for batch in passes:
        for owner, loss in zip(batch.owner.tolist(), token_losses(model, batch), strict=True):
            found[owner].append(loss)
    return [torch.stack(losses) for losses in found]


@settings(max_examples=60)
@given(some=st.lists(examples(), min_size=1, max_size=8), limit=st.integers(1, 60))
def test_packed_and_padded_losses_are_those_of_each_example_alone(model, some, limit):
    with torch.no_grad():
        expected = [alone(model, one) for one in some]
        for passes in (pack(some, limit), pad(some, 3)):
            for got, want in zip(by_owner(model, passes, len(some)), expected, strict=True):
                torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_gradients_of_packed_and_padded_passes_are_the_plain_ones(model):
    def gradients(losses):
        model.zero_grad()
        torch.cat(losses).mean().backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    count = len(SHARED)
    plain = gradients([alone(model, one) for one in SHARED])
    packed = gradients(by_owner(model, pack(SHARED, 100), count))
    padded = gradients(by_owner(model, pad(SHARED, 4), count))
    model.zero_grad()

    assert any(grad.abs().max() > 1e-2 for grad in plain.values())
    for name in plain:
        torch.testing.assert_close(packed[name], plain[name], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(padded[name], plain[name], atol=1e-6, rtol=1e-4)


def test_a_plain_causal_mask_would_give_other_losses(model):
    # The negative control: the mask is what keeps packed examples apart.
    [batch] = pack(SHARED, 100)
    tokens = batch.input_ids.shape[1]
    causal = torch.full((tokens, tokens), float("-inf")).triu(1)[None, None]
    wrong = replace(batch, attention_mask=causal)
    misplaced = replace(batch, position_ids=torch.arange(tokens)[None])
    with torch.no_grad():
        right = token_losses(model, batch)
        assert (token_losses(model, wrong) - right).abs().max() > 0.05
        assert (token_losses(model, misplaced) - right).abs().max() > 1e-3


@given(some=st.lists(examples(), min_size=1, max_size=12), limit=st.integers(1, 80))
def test_passes_keep_the_budget_and_hold_every_target_once(some, limit):
    passes = list(pack(some, limit))

    expected = [
        (index, one.ids[at]) for index, one in enumerate(some) for at, yes in enumerate(one.supervised) if yes
    ]  # fmt: skip
    for found in (passes, list(pad(some, 2))):
        targets = [
            pair
            for batch in found
            for pair in zip(batch.owner.tolist(), batch.target.tolist(), strict=True)
        ]
        assert Counter(targets) == Counter(expected)
    for batch in passes:
        owners = set(batch.owner.tolist())
        tokens = batch.input_ids.shape[1]
        assert tokens <= limit or len({tuple(some[owner].ids) for owner in owners}) == 1
        # No token is computed twice: as many as there are different beginnings.
        beginnings = {
            tuple(some[owner].ids[:n]) for owner in owners for n in range(1, len(some[owner]) + 1)
        }
        assert tokens == len(beginnings)
    assert sorted(owner for batch in passes for owner in set(batch.owner.tolist())) == list(
        range(len(some))
    )


@given(some=st.lists(examples(), min_size=1, max_size=8))
def test_a_position_is_a_depth_and_a_token_sees_its_own_beginning(some):
    [batch] = pack(some, 10_000)
    visible = batch.attention_mask[0, 0] == 0
    ids, positions = batch.input_ids[0], batch.position_ids[0]
    seen = set()
    for token, depth in enumerate(positions.tolist()):
        sees = visible[token].nonzero().flatten()
        assert positions[sees].tolist() == list(range(depth + 1)) and sees[-1] == token
        seen.add(tuple(ids[sees].tolist()))
    assert seen == {tuple(one.ids[:n]) for one in some for n in range(1, len(one) + 1)}


def test_logits_are_needed_only_where_a_target_is_predicted():
    [batch] = pack([example(1, 2, 3, 4, prompt=3), example(1, 2, 3, 5, prompt=3)], 100)
    # Both targets are predicted at the same shared token.
    assert batch.keep.tolist() == [2] and batch.column.tolist() == [0, 0]
    assert batch.target.tolist() == [4, 5] and batch.owner.tolist() == [0, 1]
    assert batch.input_ids.shape == (1, 5)


def test_padding_is_masked_and_sorted_by_length():
    first, second = pad([example(1, 2, 3), example(1, 2), example(1, 2, 3, 4)], 2)
    assert first.input_ids.tolist() == [[1, 2, 0], [1, 2, 3]]
    assert first.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert second.input_ids.tolist() == [[1, 2, 3, 4]]


def test_moving_a_pass_brings_its_mask_into_the_models_format():
    [packed] = pack(SHARED, 100)
    [padded] = pad(SHARED, 100)
    assert packed.to("cpu", torch.bfloat16).attention_mask.dtype == torch.bfloat16
    assert padded.to("cpu", torch.bfloat16).attention_mask.dtype == torch.int64
    assert packed.to("cpu", torch.bfloat16).input_ids.dtype == torch.int64


def test_a_pass_ends_where_its_logits_would_get_too_large():
    # Each has one token of its own: only supervised tokens can fill a pass of this budget.
    some = [example(*[1] * 500, 2 + n, prompt=100) for n in range(11)]
    assert [len(batch.target) for batch in pack(some, 10_000)] == [5 * 401, 5 * 401, 401]
    assert 5 * 401 <= SUPERVISED_BUDGET < 6 * 401
    # Tokens that are not supervised do not count.
    last = [replace(one, supervised=[False] * 500 + [True]) for one in some]
    assert [len(batch.target) for batch in pack(last, 10_000)] == [11]
    # An example beyond it is a pass of its own.
    long = example(*[0] * (SUPERVISED_BUDGET + 2))
    assert [len(batch.target) for batch in pack([long, *some[:2]], 10_000)] == [2049, 802]


# --- a model's cutter ----------------------------------------------------------------------------


def test_the_budget_is_what_full_rows_hold_up_to_the_devices_cap(model, monkeypatch):
    assert Cutter.of(model, 4, 512, SHARED).budget == 512
    assert Cutter.of(model, 1, 256, SHARED).budget == 256
    cuda = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    monkeypatch.setattr("etude.engine.packing.why_not_packed", lambda *_: None)
    assert Cutter.of(cuda, 4, 512, SHARED).budget == 2048
    assert Cutter.of(cuda, 64, 512, SHARED).budget == 8192


def test_a_cutter_packs_where_that_is_proven_and_pads_where_it_is_not(model, monkeypatch):
    cutter = Cutter.of(model, 3, 4, SHARED)
    assert (cutter.rows, cutter.budget, cutter.why_padded) == (3, 12, None)
    packed = [batch.input_ids.shape for batch in cutter(SHARED)]
    assert packed == [batch.input_ids.shape for batch in pack(SHARED, 12)]

    monkeypatch.setattr("etude.engine.packing.why_not_packed", lambda *_: "no reason")
    cutter = Cutter.of(model, 3, 4, SHARED)
    assert cutter.why_padded == "no reason"
    padded = [batch.input_ids.shape for batch in cutter(SHARED)]
    assert padded == [batch.input_ids.shape for batch in pad(SHARED, 3)]
    assert padded != packed


def test_a_single_example_that_does_not_fit_is_refused_at_once(model, monkeypatch):
    monkeypatch.setattr("etude.models.device.free_memory", lambda: None)  # 10 halvings, seconds
    cutter, tried = Cutter.of(model, 4, 512, SHARED), []

    def run(smaller):
        tried.append(smaller.budget)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(UserError, match=r"^step 1: not even one example fits in memory"):
        fitting(cutter, 1, run, "step 1: ")
    assert tried == [512]
    with pytest.raises(UserError, match="not even one example"):
        fitting(cutter, 2, run)
    assert tried == [512, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1]


def test_a_cutters_masks_have_the_models_format(model):
    for dtype in (torch.float32, torch.bfloat16):
        [batch] = replace(Cutter.of(model, 1, 100, SHARED), dtype=dtype)(SHARED)
        assert batch.attention_mask.dtype == dtype


# --- whether a model may be packed at all --------------------------------------------------------


def test_a_plain_transformer_is_proven_packable(model):
    assert why_not_packed(model, 512, SHARED) is None
    assert not model.training


def test_a_model_that_ignores_the_mask_is_found_out(model, monkeypatch):
    forward = model.forward

    def deaf(attention_mask=None, **inputs):
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", deaf)
    assert "packed losses would differ by" in why_not_packed(model, 512, SHARED)


def test_a_model_that_takes_no_mask_of_its_own_is_found_out(model, monkeypatch):
    def strict(attention_mask=None, **inputs):
        raise ValueError("attention_mask must be [rows, tokens]\nmore")

    monkeypatch.setattr(model, "forward", strict)
    assert (
        why_not_packed(model, 512, SHARED)
        == "it does not accept a custom mask: attention_mask must be [rows, tokens]"
    )


def test_a_window_shorter_than_the_examples_forbids_packing(model, monkeypatch):
    monkeypatch.setattr(model.config, "sliding_window", 64, raising=False)
    assert (
        why_not_packed(model, 512, SHARED)
        == "its layers look back 64 tokens, and dataset.max_length is 512"
    )
    assert why_not_packed(model, 64, SHARED) is None
    monkeypatch.setattr(model.config, "layer_types", ["full_attention"] * 2, raising=False)
    assert why_not_packed(model, 512, SHARED) is None


@pytest.mark.real
def test_packed_losses_of_real_tweets_on_the_real_model(sample):
    settings = Dataset(max_rows=16)
    table = splits.sample(dataset.read(str(TWEETS), settings), 16, seed=0)
    tweets = dataset.encode(table, sample.renderer, settings, "train").examples
    assert len(tweets) == 16
    model = sample.base.model

    with torch.no_grad():
        plain = torch.stack([alone(model, one).sum() for one in tweets])
        packed = sum_by_example(model, pack(tweets, 512), 16)
        padded = sum_by_example(model, pad(tweets, 8), 16)

    assert plain.min() > 0.01
    torch.testing.assert_close(packed, plain, atol=1e-4, rtol=0)
    torch.testing.assert_close(padded, plain, atol=1e-4, rtol=0)
    # Most of a tweet's tokens are the same instruction, computed once a pass.
    tokens = sum(batch.input_ids.shape[1] for batch in pack(tweets, 512))
    assert tokens < 0.6 * sum(map(len, tweets))


def test_a_model_that_ignores_logits_to_keep_is_read_at_the_right_places(tiny_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)

    class Deaf(torch.nn.Module):
        def forward(self, logits_to_keep, **inputs):
            return model(**inputs)

    examples = [Example([1, 5, 9, 4], [False, False, True, True]), Example([1, 7], [False, True])]
    with torch.no_grad():
        for batch in pad(examples, 2):
            heard = token_losses(model, batch)
            assert torch.equal(token_losses(Deaf(), batch), heard)


# --- one example for each answer -------------------------------------------------------------------


def talks(renderer, count, asked, answered, turns=6):
    """The examples of conversations of `turns` answers, made of the dictionary's rows."""
    rows = [json.loads(line) for line in DICTIONARY.read_text("utf-8").splitlines()]
    rows = [row for row in rows if len(row["completion"]) < 400]
    found = []
    for at in range(count):
        chosen = [rows[(at * turns + turn) % len(rows)] for turn in range(turns)]
        messages = [
            {"role": role, "content": row[field]}
            for row in chosen
            for role, field in (("user", asked), ("assistant", answered))
        ]
        found.append(renderer.render(messages))
    return found


def thinking_renderer(tokenizer):
    """Qwen3's template: each answer is trained after a history without its block of thoughts."""
    folder = Path(find_spec("trl").origin).parent / "chat_templates"
    return Renderer(tokenizer, (folder / "qwen3.jinja").read_text())


def check_sharing(model, renderer, count, asked="prompt", answered="completion"):
    """Packed losses are those of the examples one by one; returns the tokens computed, and without sharing.

    Both as a multiple of the tokens of the whole conversation, rendered once.
    """
    rows = talks(renderer, count, asked, answered)
    assert [len(row) for row in rows] == [6] * count
    together = separate = 0
    for row in rows:
        packed = list(pack(row, 8192))
        with torch.no_grad():
            ours = sum_by_example(model, iter(packed), 6)
            plain = sum_by_example(model, pad(row, 1), 6)
        assert torch.allclose(ours, plain, rtol=1e-5)
        tree = {tuple(one.ids[:end]) for one in row for end in range(1, len(one) + 1)}
        assert sum(batch.input_ids.numel() for batch in packed) == len(tree)
        together += len(tree)
        separate += sum(map(len, row))
    once = sum(len(row[-1]) for row in rows)  # a rendering of the whole conversation
    return together / once, separate / once


def test_answers_of_a_conversation_share_their_history(sample_tokenizer):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(sample_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
        max_position_embeddings=4096,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    renderer = thinking_renderer(sample_tokenizer)
    # An answer is computed twice, after its block of thoughts and as history without it, so what is
    # left to save depends on how much of a conversation are answers.
    shared, alone = check_sharing(model, renderer, 20, "completion", "prompt")
    assert shared < 1.4 and alone > 3
    shared, alone = check_sharing(model, renderer, 20)
    assert shared < 1.8 and alone > 3


@pytest.mark.real
def test_answers_share_their_history_on_the_real_model(sample):
    shared, alone = check_sharing(
        sample.base.model, thinking_renderer(sample.renderer.tokenizer), 3
    )
    assert shared < 1.8 and alone > 3
