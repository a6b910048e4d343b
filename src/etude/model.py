"""A model to work with from Python, and what the programs work with: generate, chat, score, evaluate."""

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

from etude.config.schema import Config, Generation
from etude.conversation.encoding import RenderError
from etude.conversation.history import Conversation, fit
from etude.conversation.messages import Message
from etude.data import dataset, splits
from etude.engine import generation
from etude.errors import UserError, nearest
from etude.measure import labels, likelihood, responses
from etude.models import loading
from etude.runs import evaluations, opening

log = logging.getLogger(__name__)


def load(run_or_model: str, **settings: dict[str, Any]) -> "Model":
    """Open a run's folder, an adapter, or a model by name, to work with from Python.

    Settings are given by section: `load("runs/quickstart", generation={"temperature": 0})`.

    Raises:
        UserError: not there, not whole, or a setting that is not allowed.
    """
    target = opening.open_target(os.path.expanduser(run_or_model), [settings])
    return Model(target, target.tuned())


class Model:
    """An opened run or base: its weights, its renderer, its configuration.

    Attributes:
        target: what was opened: base, renderer, config, the adapter's folder if there is one.
        network: the PyTorch module that answers.
        window: how many tokens it can read at once; None without a limit.
    """

    def __init__(self, target: opening.Target, network: Any) -> None:
        """Work with `network`, opened as `target`."""
        self.target, self.network = target, network
        self.window: int | None = loading.window(network.config)

    @property
    def config(self) -> Config:
        """The configuration it was opened with."""
        return self.target.config

    def generate(self, prompt: str | Sequence[Message], **settings: Any) -> str:
        """The answer to a text, or to the messages of a conversation; sampled by `settings`.

        `settings` are keys of the section generation: `generate("Hi", temperature=0)`.

        Raises:
            UserError: a prompt that does not fit the window, or a setting that is not allowed.
        """
        messages = [_user(prompt)] if isinstance(prompt, str) else list(prompt)
        return self.respond(messages, sampling(self.config.generation, settings))[0].text

    def chat(self, system: str | None = None) -> "Chat":
        """A conversation with the model, which remembers what was said."""
        return Chat(self, Conversation(system))

    def respond(
        self,
        messages: Sequence[Message],
        settings: Generation,
        on_text: Callable[[str, bool], None] | None = None,
    ) -> tuple[generation.Response, int]:
        """The answer to `messages`, and how many turns at the beginning did not fit the window.

        `on_text` gets the answer piece by piece as it is written, and whether it is reasoning.

        Raises:
            UserError: the last message alone does not fit, or the chat template refuses them.
        """
        renderer = self.target.renderer
        try:
            fitting, dropped = fit(renderer, messages, self.window, settings.max_new_tokens)
            ids = renderer.prompt(fitting)
        except RenderError as error:
            raise UserError(f"The chat template refuses this conversation: {error}") from None
        tools = [fitting[0].get("tools")] if fitting else []
        (response,) = generation.generate(
            self.network, renderer, [ids], settings, on_text, tools=tools
        )
        return response, dropped

    def prompt(self, text: str) -> list[Message]:
        """The messages that ask about one text: of a classification, with its instruction."""
        renderer, settings = self.target.renderer, self.config.dataset
        if settings.labels:
            room = dataset.check_labels(renderer, settings.labels)
            return dataset.question(renderer, text, settings.labels, settings, room)[0]
        return [_user(text)]

    def score(self, text: str) -> dict[str, float]:
        """The probability of each label for one text, by a run that classifies.

        Raises:
            UserError: a run without labels.
        """
        names = self.config.dataset.labels
        if not names:
            raise UserError(f"{self.target.base.name}: no labels to score; dataset.labels is null")
        (scores,) = likelihood.label_log_likelihoods(
            self.network,
            self.target.renderer,
            [self.prompt(text)],
            names,
            self.config,
            ["the text"],
        )
        return dict(zip(names, likelihood.softmax(scores), strict=True))

    def measure(
        self, table: dataset.Table, bar: likelihood.Bar = likelihood.no_bar
    ) -> dict[str, Any]:
        """Every figure of the model on one data set, and what it said to every row.

        Raises:
            UserError: rows that cannot be measured, with their lines.
        """
        function = (
            labels.measure_labels
            if table.format == "classification"
            else responses.measure_responses
        )
        dtype = str(self.network.dtype).removeprefix("torch.")
        facts = {"device": self.target.base.device.name, "dtype": dtype}
        return {**facts, **function(self.network, self.target.renderer, table, self.config, bar)}

    def evaluate(self, source: str | None = None) -> dict[str, Any]:
        """Measure the model on a file or Hub data set, else on dataset.test; writes nothing.

        Returns what `etude evaluate` writes as report.json; the figures are in ["models"].

        Raises:
            UserError: no data set is named, or it cannot be used.
        """
        table = read_table(self.config, source)
        title = "tuned" if self.target.adapter else "model"
        name = str(self.target.adapter or self.target.base.name)
        return evaluations.assemble(name, self.config, table, {title: self.measure(table)})


class Chat:
    """A conversation with a model."""

    def __init__(self, model: Model, conversation: Conversation) -> None:
        """Talk to `model`, going on with `conversation`."""
        self.model, self.conversation = model, conversation

    def ask(self, text: str, **settings: Any) -> str:
        """Say something and return the answer; `settings` are keys of the section generation.

        Raises:
            UserError: the text does not fit the window, or a setting that is not allowed.
        """
        self.conversation.ask(text)
        chosen = sampling(self.model.config.generation, settings)
        response, _ = self.model.respond(self.conversation.sent(), chosen)
        self.conversation.answer(response.message)
        return response.text


def sampling(settings: Generation, changes: dict[str, Any]) -> Generation:
    """`settings` with some keys changed, checked by the schema.

    Raises:
        UserError: a key that is not there, or a value that is not allowed.
    """
    if "thinking" in changes:
        raise UserError(
            "thinking belongs to the prompts, so it is set when a model is opened: "
            "generation.thinking=false"
        )
    try:
        return Generation.model_validate({**settings.model_dump(), **changes})
    except ValidationError as error:
        fault = error.errors()[0]
        key = str(fault["loc"][0])
        known = Generation.model_fields
        if key in known:
            problem = f"{changes[key]} {fault['msg'].replace('Input should', 'should')}"
            raise UserError(f"{key}: {problem} ({known[key].description})") from None
        guess = nearest(key, known)
        hint = f"did you mean {guess}?" if guess else f"there are {', '.join(known)}"
        raise UserError(f"{key}: no such setting; {hint}") from None


def read_table(settings: Config, source: str | None) -> dataset.Table:
    """The rows to measure, at most `evaluation.max_rows` of them.

    Raises:
        UserError: no data set is named, or it cannot be used.
    """
    source = source or settings.dataset.test
    if source is None:
        raise UserError("Nothing to measure: dataset.test is null; give a file: --data FILE")
    table = dataset.read(source, settings.dataset)
    for notice in table.drops("test") + table.notices:
        log.info(notice)
    # The answer that is measured is the last one that would be trained on.
    rows = [dataclasses.replace(row, messages=row.messages[: row.answer + 1]) for row in table.rows]
    table = dataclasses.replace(table, rows=rows)
    return splits.sample(table, settings.evaluation.max_rows, settings.training.seed)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
