"""The largest pass of a training, computed once before it begins: whether memory suffices is seen early."""

from typing import Any

from etude.config.schema import Config
from etude.conversation.renderer import Example
from etude.engine import packing
from etude.models import device


def rehearse(
    model: Any,
    cutter: packing.Cutter,
    examples: dict[str, list[Example]],
    settings: Config,
) -> packing.Cutter:
    """Compute the largest pass forward and backward, and the largest of the validation, as training will.

    Returns the cutter, or where memory runs out, one whose passes are small enough. Leaves no trace:
    weights, gradients and random numbers are those before.

    Raises:
        UserError: not even the smallest pass fits.
    """
    if settings.training.gradient_checkpointing:
        model.activation_checkpointing_enable()
    _, fits = packing.fitting(
        cutter,
        len(examples["train"]),
        lambda smaller: _rehearse(model, smaller, examples, settings),
    )
    return fits


def _rehearse(
    model: Any, cutter: packing.Cutter, examples: dict[str, list[Example]], settings: Config
) -> None:
    import torch

    steps = list(packing.first_steps(settings, examples["train"]))
    if not any(steps):  # fewer examples than processes
        return
    batch, _ = packing.largest(b for step in steps for b in cutter(step))
    mixed = device.mixed_precision(settings.training, model.device.type)
    was_training = model.training
    try:
        model.train()
        with torch.random.fork_rng():
            with mixed:
                losses = packing.token_losses(model, batch)
            losses.sum().backward()
        if examples.get("validation"):
            model.eval()
            held_out, _ = packing.largest(cutter(packing.longest(examples["validation"])))
            with mixed:
                packing.total_loss(model, iter([held_out]))
    finally:
        model.zero_grad()
        model.train(was_training)
