"""A standard model folder: the adapter folded into its base, with tokenizer, template and stop tokens."""

import copy
from pathlib import Path
from typing import Any

from etude.engine import generation
from etude.models import loading, lora
from etude.runs.opening import Target

TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def stored_type(target: Target) -> str:
    """The type that the base's weights are stored in; f32 for one that has no name here."""
    model = target.config.model
    stored = str(loading.outline(model.name, model.revision).stored).removeprefix("torch.")
    return next((kind for kind, name in TYPES.items() if name == stored), "f32")


def write(target: Target, tuned: Any, kind: str, place: Path) -> None:
    """Merge the adapter of `tuned`, in place, and write the whole model in the type `kind`.

    `tuned` is in float32, so that W + (alpha/r) B A is rounded once, at the end.
    """
    import torch

    model = lora.merge(tuned).to(getattr(torch, TYPES[kind]))
    model.generation_config = generation_config(target)
    model.save_pretrained(place)
    tokenizer = copy.deepcopy(target.base.tokenizer)
    tokenizer.chat_template = target.renderer.portable_template()
    tokenizer.save_pretrained(place)


def generation_config(target: Target) -> Any:
    """How other programs generate: with the run's stop tokens, and sampled as the run's chat samples."""
    from transformers import GenerationConfig

    tokenizer = target.renderer.tokenizer
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=target.renderer.stop_ids,
        pad_token_id=tokenizer.pad_token_id,
        **generation.choice(target.config.generation),
    )
