"""The one generation loop: prompts as ids in, responses out, streamed or in batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from etude.config.schema import Generation
from etude.conversation.calling import Tools
from etude.conversation.messages import Message
from etude.conversation.renderer import Renderer
from etude.errors import UserError
from etude.models import loading


@dataclass(frozen=True)
class Response:
    """What a model wrote.

    Attributes:
        text: without control tokens, calls and what the template writes around an answer, stripped.
        reasoning: the thoughts before it.
        calls: the calls of tools, as a message has them.
        malformed: whether a call has begun that cannot be read; it is in the text.
        tokens: how many were generated, the end token included.
        finished: whether the model ended by itself, not at the token limit or by an interrupt.
        interrupted: whether Ctrl-C cut it short.
    """

    text: str
    tokens: int
    finished: bool
    interrupted: bool = False
    reasoning: str = ""
    calls: Sequence[dict[str, Any]] = ()
    malformed: bool = False

    @property
    def message(self) -> Message:
        """The response as a turn of a conversation."""
        turn: Message = {"role": "assistant", "content": self.text}
        if self.reasoning:
            turn["reasoning_content"] = self.reasoning
        if self.calls:
            turn["tool_calls"] = list(self.calls)
        return turn


def generate(
    model: Any,
    renderer: Renderer,
    prompts: Sequence[list[int]],
    settings: Generation,
    on_text: Callable[[str, bool], None] | None = None,
    origins: Sequence[str] = (),
    tools: Sequence[Tools | None] = (),
) -> list[Response]:
    """Answer every prompt in one batch; with `on_text` (one prompt only) pieces come as they are made.

    `on_text` gets a piece, and whether it is of the reasoning. `tools` are those of each prompt; where
    there are none (None), a call stays text.

    Sampling: logits / temperature, then the `top_k` likeliest, then the smallest set that holds
    `top_p` of the probability (nucleus sampling, arXiv:1904.09751). Temperature 0 takes the
    likeliest token. Ctrl-C while streaming returns what there is, with `interrupted` set.

    Raises:
        UserError: a prompt that fills the model's window, or scores that are not finite numbers;
            `origins` name the prompts.
    """
    import torch
    from transformers import GenerationConfig

    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    longest = max(map(len, prompts))
    pad = renderer.stop_ids[0]
    # Padded on the left: the next token must follow the prompt's last one in every row.
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    each = tools or [None] * len(prompts)
    streamer = _Streamer(renderer, on_text, each[0]) if on_text else None
    interrupted = False
    try:
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=GenerationConfig(
                    max_new_tokens=_room(model, longest, settings),
                    eos_token_id=renderer.stop_ids,
                    pad_token_id=pad,
                    **choice(settings),
                ),
                streamer=streamer,
                logits_processor=[_Finite(model, origins)],
            )
        written: list[list[int]] = output[:, longest:].tolist()
    except KeyboardInterrupt:
        if streamer is None:
            raise
        written, interrupted = [streamer.ids], True
    return [
        _response(renderer, ids, interrupted, own) for ids, own in zip(written, each, strict=True)
    ]


def _room(model: Any, longest: int, settings: Generation) -> int:
    """How many tokens an answer may have."""
    # Beyond its window a model fails or, with rotary positions, writes noise.
    window = loading.window(model.config)
    if window and window <= longest:
        raise UserError(
            f"the text has {longest:,} tokens, and the model's window {window:,}; shorten it"
        )
    return min(settings.max_new_tokens, window - longest if window else settings.max_new_tokens)


def choice(settings: Generation) -> dict[str, Any]:
    """How the next token is chosen, in transformers' words."""
    values = {"repetition_penalty": settings.repetition_penalty}
    if settings.temperature == 0:
        return {**values, "do_sample": False}
    sampling = settings.model_dump(include={"temperature", "top_p", "top_k"})
    return {**values, **sampling, "do_sample": True}


def _response(
    renderer: Renderer, ids: list[int], interrupted: bool, tools: Tools | None = None
) -> Response:
    end = next((at for at, token in enumerate(ids) if token in renderer.stop_ids), None)
    used = ids if end is None else ids[: end + 1]
    reasoning, text, calls, malformed = renderer.parts_of(used, tools)
    return Response(
        text.strip(), len(used), end is not None, interrupted, reasoning.strip(), calls, malformed
    )


class _Finite:
    """Looks at the scores of every token, a logits processor of transformers.

    Of scores that are no numbers the greedy choice is token 0, without a word. -inf alone is right:
    a token that is ruled out.
    """

    def __init__(self, model: Any, origins: Sequence[str]) -> None:
        self._model, self._origins = model, origins

    def __call__(self, ids: Any, scores: Any) -> Any:
        """Return `scores` as they are, or raise UserError for rows without a finite maximum."""
        sound = scores.amax(-1).isfinite()  # which is NaN where one of them is
        if not sound.all():
            origins = self._origins or ["the prompt"] * len(sound)
            rows = [origin for origin, yes in zip(origins, sound.tolist(), strict=True) if not yes]
            raise loading.not_finite(self._model, "The score of a generated token", rows)
        return scores


class _Streamer:
    """Takes token ids from transformers' generate and passes on text as soon as it is certain.

    Text is certain up to the last character that later tokens cannot change: a character cut in
    the middle of its UTF-8 bytes decodes to U+FFFD until the rest has come.
    """

    def __init__(
        self,
        renderer: Renderer,
        on_text: Callable[[str, bool], None],
        tools: Tools | None = None,
    ) -> None:
        self.ids: list[int] = []
        self._tools = tools
        self._renderer, self._on_text = renderer, on_text
        self._sent = [0, 0]  # characters of the answer, of the reasoning
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Receive the prompt first, then each new token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        reasoning, text, *_ = self._renderer.parts_of(self.ids, self._tools, writing=True)
        if not (text or reasoning).endswith("\ufffd"):
            self._send(reasoning, text)

    def end(self) -> None:
        """Receive the end of the response."""
        self._send(*self._renderer.parts_of(self.ids, self._tools)[:2])

    def _send(self, reasoning: str, text: str) -> None:
        for thinking, written in ((True, reasoning), (False, text)):
            if len(written) > self._sent[thinking]:
                self._on_text(written[self._sent[thinking] :], thinking)
                self._sent[thinking] = len(written)
