"""What is put to the trained model and to its export: rows of the run's data, as ids and as messages."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from etude.conversation import messages as forms
from etude.conversation.encoding import Example
from etude.conversation.messages import Message
from etude.data import dataset, splits
from etude.errors import UserError
from etude.models import loading
from etude.runs.opening import Target

ROWS = 200
ANSWERS = 8  # prompts that are answered
NEW_TOKENS = 32  # of each answer


@dataclass(frozen=True)
class Questions:
    """Rows as the run's own renderer made them.

    Attributes:
        source: the data set.
        groups: the answers of each question, whose likelihood is compared: one for each label, else
            one. The answers of a group have one prompt.
        truth: of a classification, which answer of each group is the right one.
        labels: of a classification.
        requests: messages and tools of each prompt, as another program hands them to the export's
            template; none for raw text.
        ids: what each prompt is to the trained model.
        spelled: how many prompts were left out because they spell control tokens.
    """

    source: str
    groups: list[list[Example]]
    truth: list[int] = field(default_factory=list)
    labels: Sequence[str] = ()
    requests: list[dict[str, Any]] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    spelled: int = 0

    @property
    def answers(self) -> list[Example]:
        """The answers of all groups, in order."""
        return [answer for group in self.groups for answer in group]

    @property
    def right(self) -> list[int]:
        """Where in `answers` the right one of each group is."""
        starts = range(0, len(self.answers), len(self.labels) or 1)
        return [
            start + at for start, at in zip(starts, self.truth or [0] * len(starts), strict=True)
        ]


def read(target: Target, data: str | None) -> Questions:
    """Up to ROWS rows of the run's validation data (of its training data, if it has none), or of `data`.

    Raises:
        UserError: the data is gone or cannot be used.
    """
    settings, renderer = target.config, target.renderer
    if data:
        table = dataset.read(data, settings.dataset)
    else:
        try:
            tables, _ = splits.read_splits(settings.dataset, settings.training.seed)
        except UserError as error:
            raise UserError(
                f"An export is proven on the run's data, which cannot be read: {error}. "
                "Bring it back, or give rows of the same form: --data FILE"
            ) from None
        table = tables.get("validation", tables["train"])
    table = splits.sample(table, ROWS, settings.training.seed)
    window = loading.window(target.base.model.config)
    examples = dataset.encode(table, renderer, settings.dataset, "validation", window).examples
    kept = {example.origin for example in examples}
    rows = [row for row in table.rows if f"{table.source}:{row.line}" in kept]
    if not table.labels:
        prompts = [row.messages[: row.answer] for row in rows if row.messages]
        return _with_prompts(target, table.source, [[one] for one in examples], prompts)
    room = dataset.check_labels(renderer, table.labels)
    prompts = [
        dataset.question(renderer, row.text, table.labels, settings.dataset, room)[0]
        for row in rows
    ]
    groups = [
        [renderer.answer([*prompt, {"role": "assistant", "content": one}]) for one in table.labels]
        for prompt in prompts
    ]
    truth = [table.labels.index(str(row.label)) for row in rows]
    return _with_prompts(target, table.source, groups, prompts, truth, table.labels)


def _with_prompts(
    target: Target,
    source: str,
    groups: list[list[Example]],
    prompts: list[list[Message]],
    truth: Sequence[int] = (),
    labels: Sequence[str] = (),
) -> Questions:
    """The questions, without the prompts that other programs cannot render as the run's renderer does."""
    asked = [prompt for prompt in prompts if prompt]
    # Etude alone keeps such text from becoming control tokens.
    spelled = target.renderer.encoder.spelled
    plain = [prompt for prompt in asked if not any(map(spelled, forms.strings(prompt)))]
    return Questions(
        source,
        groups,
        list(truth),
        labels,
        [target.renderer.request(prompt) for prompt in plain],
        [target.renderer.prompt(prompt) for prompt in plain],
        len(asked) - len(plain),
    )


def as_json(questions: Questions) -> dict[str, Any]:
    """What the new process needs."""
    return {
        "groups": [
            [{"ids": list(one.ids), "supervised": list(map(int, one.supervised))} for one in group]
            for group in questions.groups
        ],
        "prompts": questions.requests,
        "ids": questions.ids[:ANSWERS],
        "new_tokens": NEW_TOKENS,
    }
