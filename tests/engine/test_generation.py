"""The generation loop: greedy parity, batches, stopping, streaming, interrupts."""

import math

import pytest
import torch

from etude.config.schema import Generation
from etude.conversation.renderer import Renderer
from etude.engine.generation import _Finite, _Streamer, generate
from etude.errors import UserError
from etude.runs import opening

GREEDY = Generation(temperature=0.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return opening.open_target(str(tiny_model), ["model.dtype=float32", "training.use_cpu=true"])


def prompts_of(target, *texts):
    return [target.renderer.prompt([{"role": "user", "content": text}]) for text in texts]


def by_hand(model, ids, steps, stop_ids):
    """Greedy decoding without a cache, one full forward a token."""
    ids, written = list(ids), []
    with torch.no_grad():
        for _ in range(steps):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
            written.append(token)
            if token in stop_ids:
                break
    return written


def test_greedy_equals_a_loop_by_hand_alone_and_in_a_batch(tiny):
    prompts = prompts_of(tiny, "Hi", "A much longer question, with many more words in it?")
    batch = generate(tiny.base.model, tiny.renderer, prompts, GREEDY)
    for prompt, answer in zip(prompts, batch, strict=True):
        (alone,) = generate(tiny.base.model, tiny.renderer, [prompt], GREEDY)
        expected = by_hand(tiny.base.model, prompt, 12, tiny.renderer.stop_ids)
        assert alone == answer
        assert answer.tokens == len(expected)
        decoded = tiny.renderer.tokenizer.decode(expected, skip_special_tokens=True).strip()
        assert answer.text == decoded


def test_finished_is_an_end_and_not_the_token_limit(tiny, monkeypatch):
    (prompt,) = prompts_of(tiny, "Hi")
    (cut,) = generate(tiny.base.model, tiny.renderer, [prompt], GREEDY)
    assert not cut.finished
    assert cut.tokens == 12
    first = by_hand(tiny.base.model, prompt, 1, [])
    monkeypatch.setattr(tiny.renderer, "stop_ids", first)
    (ended,) = generate(tiny.base.model, tiny.renderer, [prompt], GREEDY)
    assert ended.finished
    assert ended.tokens == 1


def test_a_seed_repeats_the_sample_and_another_seed_changes_it(tiny):
    (prompt,) = prompts_of(tiny, "Hi")

    def sampled(seed):
        settings = Generation(temperature=1.5, top_p=1.0, top_k=0, max_new_tokens=20, seed=seed)
        return generate(tiny.base.model, tiny.renderer, [prompt], settings)[0].text

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def only_text(pieces):
    """A listener that keeps the pieces of the answer."""
    return lambda piece, reasoning: reasoning or pieces.append(piece)


def test_the_stream_is_the_text(tiny):
    (prompt,) = prompts_of(tiny, "Hi")
    pieces = []
    (answer,) = generate(tiny.base.model, tiny.renderer, [prompt], GREEDY, only_text(pieces))
    assert len(pieces) > 1
    assert "".join(pieces).strip() == answer.text


def test_no_piece_of_a_stream_ends_inside_a_character(sample_tokenizer):
    ids = sample_tokenizer("naïve 🙂 日本語", add_special_tokens=False).input_ids
    assert len(ids) > 8  # the emoji alone is several tokens of bytes
    pieces = []
    streamer = _Streamer(Renderer(sample_tokenizer), only_text(pieces))
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == "naïve 🙂 日本語"
    assert not any("\ufffd" in piece for piece in pieces)


def test_ctrl_c_keeps_what_was_written_when_streaming_and_leaves_otherwise(tiny):
    (prompt,) = prompts_of(tiny, "Hi")
    whole = generate(tiny.base.model, tiny.renderer, [prompt], GREEDY)[0].text
    seen = []

    def interrupt(piece, reasoning):
        seen.append(piece)
        if len(seen) == 3:
            raise KeyboardInterrupt

    (answer,) = generate(tiny.base.model, tiny.renderer, [prompt], GREEDY, interrupt)
    assert answer.interrupted
    assert not answer.finished
    assert answer.text
    assert whole.startswith(answer.text)

    class Broken:
        device, config = "cpu", None

        def generate(self, **_):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(Broken(), tiny.renderer, [prompt], GREEDY)


@pytest.mark.parametrize(
    ("scores", "wrong"),
    [
        ([[1.0, -math.inf], [0.0, 2.0]], []),  # a token that is ruled out is right
        ([[1.0, math.nan], [0.0, 2.0]], ["x:1"]),
        ([[1.0, 2.0], [0.0, math.inf]], ["x:2"]),
        ([[-math.inf, -math.inf], [math.nan, math.nan]], ["x:1", "x:2"]),
    ],
)
def test_scores_that_are_no_numbers_end_a_generation(tiny, scores, wrong):
    watch = _Finite(tiny.base.model, ["x:1", "x:2"])
    given = torch.tensor(scores)
    if wrong:
        with pytest.raises(UserError, match=f"finite number: {', '.join(wrong)}\\. The"):
            watch(None, given)
    else:
        assert watch(None, given) is given


def test_an_answer_ends_with_the_window(tiny, monkeypatch):
    (prompt,) = prompts_of(tiny, "Hi")
    monkeypatch.setattr(tiny.base.model.config, "max_position_embeddings", len(prompt) + 3)
    (answer,) = generate(tiny.base.model, tiny.renderer, [prompt], GREEDY)
    assert answer.tokens <= 3 and not answer.finished
    with pytest.raises(UserError, match=r"window \d+; shorten it"):
        generate(tiny.base.model, tiny.renderer, [prompt + prompt], GREEDY)
