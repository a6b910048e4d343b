"""Decoder layers compiled by torch.compile: fewer trips through memory between the products."""

import logging
from typing import Any

import torch

from etude.engine.packing import Pass, token_losses
from etude.errors import first_line
from etude.models.device import Device

log = logging.getLogger(__name__)

# What training saves by it must exceed the half minute that compiling takes on two cores:
# floating-point operations of a whole training in its frozen layers.
WORTH_IT = 4e13


def operations(model: Any, tokens: int) -> float:
    """Operations of training on `tokens` tokens: 2 forward and 2 backward a weight and token."""
    embedding: int = model.get_input_embeddings().weight.numel()
    parameters: int = sum(parameter.numel() for parameter in model.parameters())
    return 4.0 * tokens * (parameters - embedding)


def worth_it(model: Any, tokens: int, place: Device) -> bool:
    """Whether training on `tokens` tokens saves more by compiling than compiling takes; CPU alone."""
    return place.name == "cpu" and operations(model, tokens) >= WORTH_IT


def decoder_layers(model: Any) -> list[Any]:
    """The layers that transformers itself never splits over devices: one decoder block each."""
    names = set(model.get_base_model()._no_split_modules or [])
    return [module for module in model.modules() if type(module).__name__ in names]


def compile_layers(model: Any, batch: Pass) -> str | None:
    """Compile the decoder layers of `model` in place, once for all of them and for all lengths.

    `batch` is computed forward and backward to see that it works; its gradients are thrown away.
    Returns None, or the reason why the layers stay as they were.
    """
    layers = decoder_layers(model)
    if not layers:
        return "its decoder layers were not found"
    model.train()  # as in training, or the first step would compile everything again
    try:
        for layer in layers:
            layer.compile(dynamic=True)
        with torch.random.fork_rng():
            token_losses(model, batch).sum().backward()
    except Exception as error:  # compilers raise errors of many kinds
        for layer in layers:
            layer._compiled_call_impl = None
        log.debug("torch.compile", exc_info=error)
        return f"{type(error).__name__}: {first_line(error):.200}"
    finally:
        model.zero_grad()
    return None
