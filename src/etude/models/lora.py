"""Attach, count, save, load and merge LoRA adapters, on PEFT."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from etude import files
from etude.config.schema import Lora
from etude.errors import UserError, first_line, nearest, shortage

if TYPE_CHECKING:
    import torch

WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
State = dict[str, "torch.Tensor"]
Alpha = Annotated[float, Field(gt=0)]


class Described(BaseModel):
    """The part of an adapter_config.json that Etude acts upon; what else it asks for is refused."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="allow", strict=True, frozen=True, allow_inf_nan=False
    )
    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int = Field(8, ge=1)
    lora_alpha: Alpha = 8
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | str
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    bias: Literal["none"] = "none"
    # How A and B began does not matter once they are read, but the other ways (pissa, olora, corda,
    # loftq) also change the base.
    init_lora_weights: bool | Literal["gaussian", "eva", "orthogonal"] = True


# What PEFT notes and a loaded adapter does not need.
IGNORED = {"auto_mapping", "inference_mode", "peft_version", "megatron_core", "qalora_group_size"}
NOT_FOR_PEFT = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "init_lora_weights",
}


class Count(NamedTuple):
    """How many parameters train."""

    trainable: int
    total: int

    def __str__(self) -> str:
        share = self.trainable / self.total
        return f"{self.trainable:,} of {self.total:,} parameters train, {share:.2%}"


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
        # Other programs refuse 128.0; PEFT itself only ever divides by it.
        lora_alpha=int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules="all-linear" if everything else list(settings.target_modules),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        task_type=TaskType.CAUSAL_LM,
    )
    tuned = get_peft_model(model, peft_config)
    # The name that the user knows, not the path of a cache on this machine.
    tuned.peft_config["default"].base_model_name_or_path = base_name
    tuned.peft_config["default"].revision = identity and identity.removeprefix("commit:")
    return tuned


def linear_names(model: Any) -> dict[str, int]:
    """Last names of the linear layers, the output head aside, and how often each occurs."""
    import torch
    from transformers.pytorch_utils import Conv1D  # GPT-2's name for a linear layer

    head = model.get_output_embeddings()
    return dict(
        Counter(
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
        )
    )


def count(model: Any) -> Count:
    """Trainable and all parameters of a tuned model; tied weights count once, 4-bit ones as one each."""
    return Count(*model.get_nb_trainable_parameters())


def save(model: Any, folder: Path) -> None:
    """Write a standard PEFT folder: adapter_config.json and adapter_model.safetensors."""
    # save_embedding_layers would ask the Hub whether the vocabulary was resized; it never is here.
    model.save_pretrained(folder, save_embedding_layers=False)
    files.usual_mode(folder / WEIGHTS)


def restore(tuned: Any, folder: Path) -> None:
    """Give `tuned`, which has an adapter, the adapter weights in `folder`, bit for bit.

    Raises:
        UserError: they are not this adapter's.
    """
    _set(tuned, read_weights(folder), folder)


def _set(tuned: Any, weights: State, folder: Path) -> None:
    from peft.utils import set_peft_model_state_dict

    faults = compare_keys(weights, state(tuned))
    if faults:
        raise _unfit(folder, "; ".join(faults))
    set_peft_model_state_dict(tuned, weights)


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds a PEFT adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def describe(folder: Path) -> Described:
    """The adapter_config.json in `folder`.

    Raises:
        UserError: it cannot be read, holds impossible values, or asks for what Etude does not do.
    """
    file = folder / ADAPTER_CONFIG
    try:
        described = Described.model_validate(files.read_json(file))
    except ValidationError as error:
        faults = {
            ".".join(str(part) for part in fault["loc"][:1]) or "the file": fault["msg"]
            for fault in error.errors()
        }
        listed = "; ".join(f"{key}: {text}" for key, text in faults.items())
        raise UserError(
            f"{file}: not an adapter that Etude can use: {listed:.500}. It takes LoRA adapters of "
            "causal language models, as PEFT writes them"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{file}: cannot be read: {first_line(error)}; copy the adapter again"
        ) from None
    asked = described.model_extra or {}
    more = sorted(key for key in asked.keys() - IGNORED if asked[key])
    if more:
        raise UserError(
            f"{file}: {', '.join(more):.300}: Etude does not do this. It takes LoRA adapters that "
            f"are all in {WEIGHTS}; merge this one with PEFT (merge_and_unload) and give "
            "the merged folder as model.name"
        )
    return described


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
        UserError: an adapter that is damaged, made for another base, or of which a key is missing,
            extra, misshapen or not finite; all of them are listed.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    described, weights = describe(folder), read_weights(folder)
    options = described.model_dump(
        include=set(Described.model_fields) - NOT_FOR_PEFT, exclude_none=True
    )
    ranks = [described.r, *(described.rank_pattern or {}).values()]
    largest = max((size for value in weights.values() for size in value.shape), default=0)
    if max(ranks) > largest:  # before PEFT makes room for it
        raise _unfit(folder, f"{ADAPTER_CONFIG} has rank {max(ranks)}, and no tensor is so large")
    try:
        tuned = get_peft_model(
            model, LoraConfig(**options, task_type=TaskType.CAUSAL_LM, inference_mode=True)
        )
    except Exception as error:  # what PEFT stumbles over has no common kind
        raise _unfit(folder, shortage(error) or first_line(error)) from None
    _set(tuned, weights, folder)
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
        pickled = (folder / "adapter_model.bin").is_file()
        raise UserError(
            f"{folder}: no {WEIGHTS} in this folder"
            + (
                "; adapter_model.bin is pickled, which can run code, and is not read. Where it is trusted, "
                "PEFT's save_pretrained writes it as safetensors"
                if pickled
                else "; copy the adapter again"
            )
        )
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        reason = shortage(error, file) or f"{file.name} is damaged: {first_line(error)}"
        raise _unfit(folder, reason) from None


def compare_keys(state: State, expected: State) -> list[str]:
    """What is wrong with the keys, shapes and values of a saved adapter: nothing, or a list of words."""
    misshapen = [
        f"{name} is {list(value.shape)}, not {list(expected[name].shape)}"
        for name, value in state.items()
        if name in expected
        and (value.shape != expected[name].shape or not value.is_floating_point())
    ]
    found = {
        "missing": sorted(expected.keys() - state.keys()),
        "extra": sorted(state.keys() - expected.keys()),
        "misshapen": sorted(misshapen),
        "not finite": sorted(
            name
            for name, value in state.items()
            if value.is_floating_point() and not value.isfinite().all()
        ),
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
