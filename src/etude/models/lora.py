"""Attach, count, save, load and merge LoRA adapters, on PEFT."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude import files
from etude.config.schema import Lora
from etude.errors import UserError, first_line, shortage

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
State = dict[str, "torch.Tensor"]

# What an adapter_config.json may ask for: anything of these keys,
TAKEN = {
    "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "use_rslora", "use_dora", "fan_in_fan_out",
}  # fmt: skip
# one of these values (the other ways to begin, pissa or olora, also change the base),
CHOICES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
# and what PEFT notes there and a saved adapter does not need.
IGNORED = {"auto_mapping", "inference_mode", "peft_version", "megatron_core", "qalora_group_size"}


def attach(model: Any, settings: Lora, base_name: str, identity: str | None = None) -> Any:
    """Wrap `model` with a fresh adapter: y = W x + (alpha/r) B A x, with A random and B zero.

    A has shape [r, in], B [out, r]; so the first step starts from the base's own function. Wherever
    the adapter is saved, its adapter_config.json carries the `identity` of the base.
    Source: Hu et al., LoRA, arXiv:2106.09685; rsLoRA arXiv:2312.03732; DoRA arXiv:2402.09353.

    Raises:
        UserError: target modules that the model does not have, with those it has.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    everything = settings.target_modules == ["all-linear"]
    linear = linear_names(model)
    unknown = [] if everything else [name for name in settings.target_modules if name not in linear]
    if unknown:
        known = ", ".join(f"{name} ({count}x)" for name, count in linear.items())
        raise UserError(
            f"lora.target_modules: {', '.join(unknown)}: no linear layer of that name in {base_name}. "
            f"It has: {known}; or [all-linear]"
        )
    peft_config = LoraConfig(
        r=settings.r,
        # Other programs refuse 128.0; PEFT itself only ever divides by it.
        lora_alpha=int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules="all-linear" if everything else list(settings.target_modules),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        task_type=TaskType.CAUSAL_LM,
    )
    tuned = get_peft_model(model, peft_config)
    # The name that the user gave, not the path of a cache on this machine.
    tuned.peft_config["default"].base_model_name_or_path = base_name
    tuned.peft_config["default"].revision = identity and identity.removeprefix("commit:")
    return tuned


def linear_names(model: Any) -> dict[str, int]:
    """Last names of the linear layers, the output head aside, and how often each occurs."""
    import torch
    from transformers.pytorch_utils import Conv1D  # GPT-2's name for a linear layer

    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, Conv1D)
    layers = [
        name for name, one in model.named_modules() if isinstance(one, kinds) and one is not head
    ]
    return dict(Counter(name.rpartition(".")[2] for name in layers))


def count(model: Any) -> str:
    """How many parameters train, of how many; tied weights count once, 4-bit ones as one each."""
    trainable, total = model.get_nb_trainable_parameters()
    return f"{trainable:,} of {total:,} parameters train, {trainable / total:.2%}"


def save(model: Any, folder: Path) -> None:
    """Write a standard PEFT folder: adapter_config.json and adapter_model.safetensors."""
    # save_embedding_layers would ask the Hub whether the vocabulary was resized; it never is here.
    model.save_pretrained(folder, save_embedding_layers=False)
    files.usual_mode(folder / WEIGHTS)


def restore(tuned: Any, folder: Path, weights: State | None = None) -> None:
    """Give `tuned`, which has an adapter, the adapter `weights` in `folder`, bit for bit.

    Raises:
        UserError: they are not this adapter's.
    """
    from peft.utils import set_peft_model_state_dict

    weights = weights or read_weights(folder)
    faults = compare_keys(weights, state(tuned))
    if faults:
        raise _unfit(folder, "; ".join(faults))
    set_peft_model_state_dict(tuned, weights)


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds a PEFT adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def describe(folder: Path) -> "LoraConfig":
    """The adapter_config.json in `folder`, as PEFT reads it.

    Raises:
        UserError: it cannot be read, or asks for what Etude does not do.
    """
    from peft import LoraConfig, TaskType

    file = folder / ADAPTER_CONFIG
    try:
        asked = files.read_json(file)
        used = {key: value for key, value in asked.items() if key in TAKEN and value is not None}
        config = LoraConfig(**used, task_type=TaskType.CAUSAL_LM, inference_mode=True)
    except Exception as error:  # PEFT raises errors of many kinds
        raise UserError(
            f"{file}: cannot be read: {first_line(error)}; copy the adapter again"
        ) from None
    refused = [key for key, allowed in CHOICES.items() if asked.get(key, allowed[0]) not in allowed]
    refused += sorted(key for key in asked.keys() - TAKEN - CHOICES.keys() - IGNORED if asked[key])
    if refused:
        named = ", ".join(f"{key} {asked[key]!r:.40}" for key in refused)
        raise UserError(
            f"{file}: Etude does not do this: {named:.300}. It takes LoRA adapters of causal language "
            f"models that are all in {WEIGHTS}; merge this one with PEFT (merge_and_unload) and "
            "give the merged folder as model.name"
        )
    return config


def check_base(where: str, trained_on: str | None, identity: str) -> None:
    """Compare the base that an adapter was trained on with the one here, by their identities.

    `trained_on` may be a bare revision, as other programs note it: a commit can be compared, a name cannot.

    Raises:
        UserError: it was trained on another base.
    """
    kind, _, revision = identity.partition(":")
    known = trained_on and (
        ":" in trained_on or (kind == "commit" and len(trained_on) == len(revision))
    )
    if known and trained_on not in (identity, revision):
        raise UserError(
            f"{where}: this adapter was trained on another base ({trained_on}) than the one here "
            f"({identity}). Pin model.revision, or give the base it was trained on"
        )


def load_adapter(model: Any, folder: Path) -> Any:
    """Put the adapter in `folder` on `model`, unmerged; only safetensors are read.

    Raises:
        UserError: an adapter that is corrupt, made for another base, or of which a key is missing,
            extra, misshapen or not finite; all of them are listed.
    """
    from peft import get_peft_model

    config, weights = describe(folder), read_weights(folder)
    config.base_model_name_or_path = None  # PEFT would warn where the base has another name here
    try:
        rank = max([config.r, *(config.rank_pattern or {}).values()])
        if rank > max((size for value in weights.values() for size in value.shape), default=0):
            # PEFT would make room for it.
            raise ValueError(f"{ADAPTER_CONFIG} has rank {rank}, and no tensor is so large")
        tuned = get_peft_model(model, config)
    except Exception as error:  # PEFT raises errors of many kinds
        raise _unfit(folder, shortage(error) or first_line(error)) from None
    restore(tuned, folder, weights)
    return tuned.eval()


def read_weights(folder: Path) -> State:
    """The tensors of the adapter in `folder` by name.

    Raises:
        UserError: no safetensors file there, or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(
            f"{folder}: no {WEIGHTS} in this folder (pickled weights, .bin, can run code and are not "
            "read). Copy the adapter again, or write it again with PEFT: model.save_pretrained(FOLDER)"
        )
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        reason = shortage(error, file) or f"{file.name} is corrupt: {first_line(error)}"
        raise _unfit(folder, reason) from None


def compare_keys(state: State, expected: State) -> list[str]:
    """What is wrong with the keys, shapes and values of a saved adapter: nothing, or a list of words."""
    shared = [name for name in sorted(state) if name in expected]
    found = {
        "missing": sorted(expected.keys() - state.keys()),
        "extra": sorted(state.keys() - expected.keys()),
        "misshapen": [
            f"{name} is {list(state[name].shape)}, not {list(expected[name].shape)}"
            for name in shared
            if state[name].shape != expected[name].shape
        ],
        "not finite": [name for name in shared if not state[name].isfinite().all()],
    }
    return [
        f"{len(names):,} {kind} of {len(expected):,} keys ({', '.join(names[:3])}"
        f"{', ...' if len(names) > 3 else ''})"
        for kind, names in found.items()
        if names
    ]


def _unfit(folder: Path, reason: str) -> UserError:
    return UserError(f"{folder}: the adapter does not load on this base: {reason:.1000}")


def state(tuned: Any) -> State:
    """The adapter's tensors on `tuned`, under the names that they are saved with."""
    from peft.utils import get_peft_model_state_dict

    found: State = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    return found


def digest(tensors: State) -> str:
    """SHA-256 of an adapter's tensors: names, shapes, formats and bytes, in the order of their names."""
    import torch

    sums = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sums.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        sums.update(raw.numpy().tobytes())
    return sums.hexdigest()


def mergeable(tuned: Any) -> bool:
    """Whether `merge` leaves the answers what they are: the base is in float32."""
    import torch

    return tuned.dtype == torch.float32 and not getattr(
        tuned.get_base_model(), "is_quantized", False
    )


def merge(tuned: Any) -> Any:
    """Fold the adapter into the weights, W + (alpha/r) B A: same answers, no extra products."""
    return tuned.merge_and_unload()
