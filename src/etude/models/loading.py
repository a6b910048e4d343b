"""A name in, a model and its tokenizer out: Hub id, folder, .gguf file or the bundled sample."""

import copy
import hashlib
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude import files
from etude.errors import UserError, first_line, nearest, shortage
from etude.models import gguf
from etude.models.device import Device

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Base:
    """A loaded base and its tokenizer.

    Attributes:
        name: as the user wrote it.
        identity: what exactly was loaded: ``commit:...`` on the Hub, else ``sha256:...``.
    """

    model: Any
    tokenizer: Any
    name: str
    identity: str
    device: Device


@dataclass(frozen=True)
class Outline:
    """A base before its weights are loaded: tokenizer and shape.

    Attributes:
        name: as the user wrote it.
        config: its transformers configuration.
        folder: the local folder that it is in; None on the Hub.
        options: how `from_pretrained` reads it.
    """

    name: str
    config: Any
    tokenizer: Any
    folder: Path | None
    options: dict[str, Any]

    @property
    def stored(self) -> "torch.dtype":
        """The number format that the weights are stored in; float32 where the model does not say."""
        import torch

        named = self.config.get_text_config().dtype
        return named if isinstance(named, torch.dtype) else torch.float32

    def model(self, dtype: "torch.dtype") -> Any:
        """The model with frozen parameters in `dtype` on the meta device: shapes without numbers."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            empty: Any = AutoModelForCausalLM.from_config(
                copy.deepcopy(self.config), dtype=dtype, trust_remote_code=False
            )
        empty.requires_grad_(False)
        return empty


def outline(name: str, revision: str | None = None) -> Outline:
    """Read what a model is without its weights; on the Hub, at the commit that `revision` is now.

    Raises:
        UserError: nothing of that name, not reachable, or not a causal language model.
    """
    from huggingface_hub import resolve_revision
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    # Its progress bars and warnings; every model is opened through here.
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    folder = locate(name)
    if revision and folder:
        raise UserError(
            f"model.revision: {name} is no Hub model and has no revisions; set it to null"
        )
    # What is local must not ask the Hub.
    offline = folder is not None or not hub_reachable()
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": offline}
    try:
        if folder is None:
            found = resolve_revision(name, revision=revision, local_files_only=offline)
            options["revision"] = found.resolved
        tokenizer = AutoTokenizer.from_pretrained(str(folder or name), **options)
        config = AutoConfig.from_pretrained(str(folder or name), **options)
    except Exception as error:  # transformers raises errors of many kinds
        raise _explain(name, folder, offline, error) from None
    for part in (config, config.get_text_config()):
        # With the package `kernels` transformers would fetch code of that name, and run it.
        if "/" in f"{part._attn_implementation} {part._experts_implementation}":
            raise UserError(
                f"model.name {name}: its config.json names code of the Hub (attn_implementation or "
                "experts_implementation), and Etude runs no foreign code; remove that line"
            )
    _check_ends(tokenizer, f"model.name {name}")
    return Outline(name, config, tokenizer, folder, options)


def _check_ends(tokenizer: Any, where: str) -> None:
    if tokenizer.eos_token_id is None:
        raise UserError(f"{where}: its tokenizer has no end token; add eos_token to its files")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def own_tokenizer(folder: Path) -> Any | None:
    """The tokenizer in an adapter's folder; None if it has none.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # transformers raises errors of many kinds
        raise UserError(
            f"{folder}: its tokenizer cannot be read: {first_line(error):.300}. Copy the adapter again"
        ) from None
    _check_ends(tokenizer, str(folder))
    return tokenizer


def load_base(
    name: str,
    device: Device,
    revision: str | None = None,
    quantization: str | None = None,
    known: Outline | None = None,
) -> Base:
    """Load a causal language model for training or inference, frozen weights in `device.dtype`.

    With `quantization` int8 they stay in the format they are stored in, for `int8.quantize`; with
    nf4 the linear layers are 4-bit (QLoRA, arXiv:2305.14314), by bitsandbytes. Only safetensors are
    read and no code from a model folder is run. `known` is the model's outline, if there is one.

    Raises:
        UserError: nothing of that name, not reachable, or not a causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    known = known or outline(name, revision)
    folder = known.folder
    weights: dict[str, Any] = {"dtype": "auto" if quantization == "int8" else device.torch_dtype}
    if quantization == "nf4":
        weights |= {"quantization_config": _nf4(device), "device_map": {"": device.name}}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder or name),
            use_safetensors=True,
            output_loading_info=True,
            **weights,
            **known.options,
        )
    except Exception as error:  # transformers raises errors of many kinds
        raise _explain(name, folder, known.options["local_files_only"], error) from None
    model, facts = loaded
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"model.name {name}: this is an adapter, not a model; name its base here")
    if facts["missing_keys"]:  # transformers fills them with random numbers and goes on
        raise UserError(
            f"model.name {name}: weights are missing: {', '.join(sorted(facts['missing_keys'])[:3])}. "
            "Copy the model again, or take one with a language model's head"
        )
    if quantization == "nf4":
        _keep_gradients(model)
    elif device.name != "cpu":
        model = model.to(torch.device(device.name))
    # The model's own would be mixed into every generation: beams by the thousand, say.
    ends = {key: getattr(model.generation_config, key) for key in ENDS}
    model.generation_config = GenerationConfig(**ends)
    model.requires_grad_(False)
    model.eval()
    identity = (
        f"sha256:{_weights_hash(folder)}" if folder else f"commit:{known.options['revision']}"
    )
    return Base(model, known.tokenizer, name, identity, device)


def _nf4(device: Device) -> Any:
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "model.quantization: nf4 needs bitsandbytes: pip install bitsandbytes, or set it to int8 "
            "or null"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=device.torch_dtype,
    )


def _keep_gradients(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit layers on a CPU.

    At the first pass without gradients, a validation say, it would pack them for good, for a product
    without gradients: training would silently go on with wrong ones.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def locate(name: str) -> Path | None:
    """The folder that holds the model `name`, converting a GGUF file if need be; None for a Hub id.

    Raises:
        UserError: a path that is not there, or a name that is no possible Hub id.
    """
    file = gguf.gguf_file(name)
    if file:
        return gguf.from_gguf(file)
    path, where = Path(name), f"model.name {name}"
    if path.is_dir():
        # With an adapter_config.json transformers would load what that names, wherever it is.
        adapter = (path / "adapter_config.json").exists()
        if adapter or not (path / "config.json").is_file():
            hint = "it is an adapter; name its base here" if adapter else "no config.json"
            raise UserError(f"{where}: this folder is not a model ({hint})")
        if not list(path.glob("*.safetensors")):
            raise UserError(
                f"{where}: no .safetensors file in this folder; pickled weights (.bin, .pt) can run "
                "code and are not read. Write it again with transformers: model.save_pretrained(FOLDER)"
            )
        return path
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise UserError(
            f"{where}: not a model folder, a .gguf file or a Hub id; examples: Qwen/Qwen2-1.5B, "
            f"./folder, {gguf.SAMPLE} (the bundled sample)"
        )
    if "/" not in name and nearest(name.lower(), [gguf.SAMPLE]):
        raise UserError(f"{where}: did you mean {gguf.SAMPLE}, the bundled sample?")
    return None


def hub_reachable() -> bool:
    """Whether the Hub answers within 5 s; asking once spares the clients' minute of retries."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # whatever the HTTP client raises: no answer
        log.debug("The Hub does not answer: %s", error)
        return False
    return True


def window(config: Any) -> int | None:
    """How many positions a model has by its transformers configuration; None where it does not say."""
    positions = getattr(config and config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def broken_weights(model: Any) -> str:
    """A sentence about weights of `model` that are not finite numbers, with what to do; else empty."""
    floats = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    broken = [name for name, weight in floats.items() if not weight.isfinite().all()]
    if not broken:
        return ""
    return (
        f"The weights of the model are not all finite numbers: {len(broken):,} of {len(floats):,} "
        f"tensors ({', '.join(broken[:3])}). Copy the model again, or set model.dtype=float32"
    )


def not_finite(model: Any, what: str, rows: Iterable[str]) -> UserError:
    """The error where `what` of a model is not a finite number in `rows`, given by ``file:line``."""
    named = list(dict.fromkeys(rows))
    more = f" and {len(named) - 10:,} more" if len(named) > 10 else ""
    return UserError(
        f"{what} is not a finite number: {', '.join(named[:10])}{more}. "
        + (
            broken_weights(model)
            or "The model's weights are finite; check these rows, or set model.dtype=float32"
        )
    )


def _weights_hash(folder: Path) -> str:
    """One SHA-256 over the weight files of a folder (their sums, in the order of their names)."""
    sums = [files.sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def _explain(name: str, folder: Path | None, offline: bool, error: Exception) -> UserError:
    """What transformers or the Hub's client raised, in one sentence."""
    from huggingface_hub import constants
    from huggingface_hub.errors import RevisionResolutionError

    where, text = f"model.name {name}", first_line(error)
    if folder and str(folder) != name:  # a converted .gguf file
        where += f" ({folder})"
    if lack := shortage(error, folder or constants.HF_HUB_CACHE):
        return UserError(f"{where}: {lack}")
    if folder is None and isinstance(error, OSError | RevisionResolutionError):
        if offline:
            return UserError(
                f"{where}: the Hub cannot be reached and the model is not in the local cache. These "
                f"names work offline: {gguf.SAMPLE} (bundled sample), a model folder, a .gguf file"
            )
        return UserError(
            f"{where}: {text} (check the name and model.revision on huggingface.co; for a private "
            "model log in with `hf auth login`)"
        )
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return UserError(
            f"{where}: this model needs code from its own folder to run, and Etude runs no foreign "
            "code. Take a model whose architecture transformers itself knows"
        )
    return UserError(f"{where}: not a causal language model that transformers can load: {text}")
