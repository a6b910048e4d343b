"""The largest pass of a training, computed once before it begins: whether memory suffices is seen early."""

from typing import Any

from etude.config.schema import Config
from etude.conversation.renderer import Example
from etude.engine import packing


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

    training = settings.training
    steps = list(packing.first_steps(settings, examples["train"]))
    if not any(steps):  # fewer examples than processes
        return
    batch, _ = packing.largest(b for step in steps for b in cutter(step))
    half = torch.float16 if training.fp16 else torch.bfloat16
    mixed = torch.autocast(model.device.type, half, enabled=training.fp16 or training.bf16)
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
            with torch.compiler.set_stance("force_eager"), torch.no_grad(), mixed:
                packing.token_losses(model, held_out)
    finally:
        model.zero_grad()
        model.train(was_training)
