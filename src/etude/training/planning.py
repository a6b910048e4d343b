"""What is known of a training before the weights of its base are loaded: its rows, its steps, its memory."""

import datetime
from typing import NamedTuple

from etude.config.schema import Config
from etude.conversation.encoding import Example
from etude.conversation.renderer import Renderer
from etude.data import dataset
from etude.engine import packing
from etude.models import device, loading
from etude.runs import opening
from etude.training import memory, order
from etude.training.reporter import Reporter


class Planned(NamedTuple):
    """All that is known of a training before the weights of its base are loaded."""

    device: device.Device
    outline: loading.Outline
    renderer: Renderer
    splits: dict[str, dataset.Split]
    steps: int
    memory: memory.Plan
    fits: bool

    @property
    def examples(self) -> dict[str, list[Example]]:
        """The examples of each split."""
        return {name: split.examples for name, split in self.splits.items()}


def plan_training(
    settings: Config,
    tables: dict[str, dataset.Table],
    reporter: Reporter,
    date: datetime.date | None = None,
    force: bool = False,
) -> Planned:
    """Render every row, and plan memory and time from the shape of the model.

    Raises:
        UserError: rows that cannot be used; or more memory than there is, and not `force`.
    """
    model, training = settings.model, settings.training
    chosen = device.choose(model.dtype, training.use_cpu, training.fp16, training.bf16)
    reporter.say("device", chosen.why)
    # Whether it fits is known from the model's shape, before its weights are loaded.
    outline = loading.outline(model.name, model.revision)
    renderer = opening.renderer_for(outline, settings, date)
    window = loading.window(outline.config)
    splits = dataset.encode_splits(tables, renderer, settings.dataset, window)
    reporter.show_data(splits, outline.tokenizer)
    examples = {name: split.examples for name, split in splits.items()}
    steps = order.step_count(settings, len(packing.by_row(examples["train"])))

    def plan(changed: Config) -> memory.Plan:
        return memory.estimate(changed, outline, chosen, examples, steps)

    planned = plan(settings)
    reporter.show_plan(planned.rows())
    reporter.say("plan", f"{planned}, {steps:,} steps")
    fits = memory.check(planned, settings, chosen, plan, force)
    return Planned(chosen, outline, renderer, splits, steps, planned, fits)
