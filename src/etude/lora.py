"""Attach, count, save, load and merge LoRA adapters, on PEFT."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from etude import foreign
from etude.config import Lora
from etude.errors import UserError, nearest


class Count(NamedTuple):
    """How many parameters train."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = self.trainable / self.total
        return f"{self.trainable:,} of {self.total:,} parameters train, {share:.2%}"


def attach(model: Any, settings: Lora, base_name: str) -> Any:
    """Wrap `model` with a fresh adapter: y = W x + (alpha/r) B A x, with A random and B zero.

    A has shape [r, in], B [out, r]; so the first step starts from the base's own function.
    Source: Hu et al., LoRA, arXiv:2106.09685; rsLoRA arXiv:2312.03732; DoRA arXiv:2402.09353.

    Raises:
        UserError: target modules that the model does not have, with those it has.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    everything = settings.target_modules == ["all-linear"]
    linear = linear_names(model)
    unknown = [] if everything else [name for name in settings.target_modules if name not in linear]
    if unknown:
        guesses = [guess for name in unknown if (guess := nearest(name, linear))]
        hint = f"; did you mean {', '.join(guesses)}?" if guesses else "."
        raise UserError(
            f"lora.target_modules: {', '.join(unknown)}: no linear layer of that name in "
            f"{base_name}{hint} "
            f"It has: {', '.join(f'{name} ({count}x)' for name, count in linear.items())}; or "
            "[all-linear]"
        )
    peft_config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT only ever divides by it
        lora_dropout=settings.dropout,
        target_modules="all-linear" if everything else list(settings.target_modules),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        task_type=TaskType.CAUSAL_LM,
    )
    tuned = get_peft_model(model, peft_config)
    # The name that the user knows, not the path of a cache on this machine.
    tuned.peft_config["default"].base_model_name_or_path = base_name
    return tuned


def linear_names(model: Any) -> dict[str, int]:
    """Last names of the linear layers, the output head aside, and how often each occurs."""
    import torch

    head = model.get_output_embeddings()
    return dict(
        Counter(
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        )
    )


def count(model: Any) -> Count:
    """Trainable and all parameters of a tuned model; tied weights count once, 4-bit ones as one each."""
    return Count(*model.get_nb_trainable_parameters())


def save(model: Any, folder: Path) -> None:
    """Write a standard PEFT folder: adapter_config.json and adapter_model.safetensors."""
    # save_embedding_layers would ask the Hub whether the vocabulary was resized; it never is here.
    model.save_pretrained(folder, save_embedding_layers=False)


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds a PEFT adapter."""
    return (folder / "adapter_config.json").is_file()


def load(model: Any, folder: Path) -> Any:
    """Put the adapter in `folder` on `model`, unmerged.

    Raises:
        UserError: an adapter that is damaged or made for another base.
    """
    from peft import PeftModel

    foreign.check_adapter(folder)
    try:
        with warnings.catch_warnings():
            # PEFT goes on with a fresh adapter where weights find no place: it would change nothing.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            tuned = PeftModel.from_pretrained(model, str(folder), local_files_only=True)
    except Exception as error:  # what PEFT and safetensors stumble over has no common kind
        reason = f"{'; '.join(str(error).strip().splitlines()[:3]):.300}"
        raise UserError(f"{folder}: the adapter does not load on this base: {reason}") from None
    tuned.eval()
    return tuned


def merge(tuned: Any) -> Any:
    """Fold the adapter into the weights, W + (alpha/r) B A: same answers, no extra products."""
    return tuned.merge_and_unload()
