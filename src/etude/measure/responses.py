"""Responses: the perplexity of references, and what a model writes, judged and compared with them."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

from etude.config.schema import Config
from etude.conversation.calling import Tools
from etude.conversation.encoding import Example, RenderError
from etude.conversation.messages import Message
from etude.conversation.renderer import Renderer
from etude.data import dataset
from etude.engine import generation
from etude.errors import UserError
from etude.measure import calls, metrics, quality
from etude.measure.likelihood import Bar, no_bar, sequence_losses
from etude.models import loading

log = logging.getLogger(__name__)

ANSWER_TOKENS = 16  # room after a prompt: a label and its end


def measure_responses(
    model: Any, renderer: Renderer, table: dataset.Table, settings: Config, bar: Bar = no_bar
) -> dict[str, Any]:
    """Perplexity of the references; for conversations also greedy responses, judged and compared.

    Where a row has tools, the calls are compared with those of the reference.

    Raises:
        UserError: rows that cannot be measured, with their lines.
    """
    result = reference_losses(model, renderer, table, settings, bar)
    if table.format == "text":
        return result
    prompts = [row.messages[:-1] for row in table.rows]
    check_window(model, renderer, prompts, table, settings)
    origins = [f"{table.source}:{row.line}" for row in table.rows]
    tools = [calls.offered(row.messages) for row in table.rows]
    responses = respond(model, renderer, prompts, settings, origins, bar, tools)
    texts = [response.text for response in responses]
    measured = calls.call_metrics(
        [row.messages for row in table.rows], responses, settings.evaluation.confidence
    )
    # Where a call is due, there are no words to compare or to judge.
    worded = [at for at, row in enumerate(table.rows) if not row.messages[-1].get("tool_calls")]
    judgements = {
        at: judge(prompts[at][-1]["content"] if prompts[at] else "", responses[at], settings)
        for at in worded
    }
    if judgements:
        references = [table.rows[at].messages[-1]["content"] for at in worded]
        compared = metrics.text_metrics(references, [texts[at] for at in worded])
        result = {**compared, **result, **judged(list(judgements.values()))}
    return {
        **result,
        "finished": sum(response.finished for response in responses) / len(responses),
        **({"calls": measured, "compared": len(worded)} if measured else {}),
        "predicted": [
            judgements[at]["label"] if at in judgements else None for at in range(len(texts))
        ],
        "said": texts,
        "called": [calls.functions(response.calls) for response in responses],
    }


def judged(judgements: Sequence[quality.Judgement]) -> dict[str, Any]:
    """The mean quality of responses, how many have each label, and the mean of each heuristic."""
    count = len(judgements)
    return {
        "quality": sum(judgement["score"] for judgement in judgements) / count,
        "quality_labels": {
            label: sum(judgement["label"] == label for judgement in judgements)
            for label in quality.LABELS
        },
        "quality_shares": {
            heuristic: sum(judgement["shares"][heuristic] for judgement in judgements) / count
            for heuristic in judgements[0]["shares"]
        },
    }


def reference_losses(
    model: Any, renderer: Renderer, table: dataset.Table, settings: Config, bar: Bar = no_bar
) -> dict[str, Any]:
    """The loss and perplexity of the references, in all and row by row.

    Raises:
        UserError: rows that cannot be measured, with their lines.
    """
    # What was dropped in reading was reported then.
    whole = dataclasses.replace(table, dropped={})
    window = loading.window(model.config)
    split = dataset.encode(whole, renderer, settings.dataset, "test", window)
    examples, fate = split.examples, split.report
    if fate.dropped:
        raise UserError(
            f"{table.source}: rows that cannot be measured; fix them, leave them out or raise "
            "dataset.max_length:\n  " + "\n  ".join(fate.notices())
        )
    for notice in fate.notices():
        log.info(notice)
    # Rows stay rows, however many examples one was split into.
    losses: list[float] = []
    tokens: list[int] = []
    for example, loss in zip(
        examples, sequence_losses(model, examples, settings, bar), strict=True
    ):
        if example.part == 0:
            losses.append(0.0)
            tokens.append(0)
        losses[-1] += loss
        tokens[-1] += example.targets
    return {
        "kind": "responses",
        "rows": len(table.rows),
        **mean_and_perplexity(sum(losses), sum(tokens)),
        "tokens": sum(tokens),
        "tokens_lost": fate.lost,
        "losses": [loss / count for loss, count in zip(losses, tokens, strict=True)],
    }


def mean_and_perplexity(loss: float, tokens: int) -> dict[str, float | None]:
    """The mean loss in nats a token, and its exponential; None where that is beyond all numbers."""
    return {"perplexity": metrics.perplexity(loss, tokens), "loss": loss / tokens}


def own_perplexity(
    model: Any,
    renderer: Renderer,
    prompt: list[Message],
    response: generation.Response,
    settings: Config,
) -> dict[str, float | None]:
    """The perplexity of a response under the model that wrote it.

    Raises:
        RenderError: the template does not take the response as an answer.
    """
    answer = renderer.answer([*prompt, response.message])
    supervised = list(answer.supervised)
    if not response.finished:  # the end token is the template's, not the model's
        supervised[len(supervised) - 1 - supervised[::-1].index(True)] = False
    # Encoded again, an answer that filled the window can be longer.
    end = loading.window(model.config) or len(answer)
    answer = Example(answer.ids[:end], supervised[:end], "--text")
    (loss,) = sequence_losses(model, [answer], settings)
    return mean_and_perplexity(loss, answer.targets)


def judge(prompt: str, response: generation.Response, settings: Config) -> quality.Judgement:
    """The quality of one response by the heuristics."""
    return quality.judge(
        prompt,
        response.text,
        good_threshold=settings.evaluation.good_threshold,
        fair_threshold=settings.evaluation.fair_threshold,
        finished=response.finished,
    )


def check_window(
    model: Any,
    renderer: Renderer,
    prompts: Sequence[list[Message]],
    table: dataset.Table,
    settings: Config,
) -> None:
    """Raise UserError for prompts that leave the model no room for an answer, with their lines.

    Beyond its window a model fails or, with rotary positions, writes noise without a word.
    """
    window = loading.window(model.config)
    if window is None:
        return
    labels, room = table.labels or [], ANSWER_TOKENS
    with contextlib.suppress(RenderError):  # scoring the labels says why
        answers: list[list[Message]] = [[{"role": "assistant", "content": one}] for one in labels]
        sizes = [renderer.answer(prompts[0] + answer).targets for answer in answers]
        room = max([room, *sizes])
    beyond = [
        (f"{table.source}:{row.line}", size)
        for row, prompt in zip(table.rows, prompts, strict=True)
        if (size := len(renderer.prompt(prompt)) + room) > window
    ]
    if beyond:
        advice = f"Shorten them or leave them out; {room} tokens of each are room for the answer."
        advice += dataset.many_labels(labels)
        raise dataset.beyond_window(beyond, window, advice)


def respond(
    model: Any,
    renderer: Renderer,
    prompts: Sequence[list[Message]],
    settings: Config,
    origins: Sequence[str],
    bar: Bar = no_bar,
    tools: Sequence[Tools | None] = (),
) -> list[generation.Response]:
    """Greedy responses to all prompts, in batches of like length, in the prompts' order.

    `tools`: those of each prompt; where there are none (None), a call is text.
    """
    tools = tools or [None] * len(prompts)
    greedy = settings.generation.model_copy(update={"temperature": 0.0})
    ids = [renderer.prompt(prompt) for prompt in prompts]
    room = (loading.window(model.config) or math.inf) - max(map(len, ids))
    if room < greedy.max_new_tokens:
        log.info(
            "The model's window leaves the longest prompt %d tokens for an answer, fewer than "
            "generation.max_new_tokens %d", room, greedy.max_new_tokens,
        )  # fmt: skip
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]), reverse=True)
    responses: dict[int, generation.Response] = {}
    with bar("responses", len(order)) as advance:
        for start in range(0, len(order), settings.evaluation.batch_size):
            chosen = order[start : start + settings.evaluation.batch_size]
            batch, lines = [ids[index] for index in chosen], [origins[index] for index in chosen]
            own = [tools[index] for index in chosen]
            answers = generation.generate(model, renderer, batch, greedy, None, lines, own)
            responses.update(zip(chosen, answers, strict=True))
            advance(len(chosen))
    return [responses[index] for index in range(len(ids))]
