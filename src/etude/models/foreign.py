"""What others wrote is looked at here before a library reads it: files, model and adapter folders."""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from etude import files
from etude.errors import UserError, first_line, shortage

# Keys of config.json that say how many layers are built, and how wide: transformers builds what
# they say before it looks at a weight.
LAYERS = re.compile(r"(^|_)layers?$")
WIDTHS = {
    "vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_attention_heads",
    "num_key_value_heads", "n_embd", "n_head", "n_inner", "d_model", "d_ff", "ffn_dim",
}  # fmt: skip
HIDDEN = {"hidden_size", "n_embd", "d_model"}
MOST_LAYERS = 1000


def check_files(folder: Path, where: str) -> None:
    """Refuse a folder with a pipe or a device in it, at which a reader would wait for ever.

    Raises:
        UserError: which, after `where`.
    """
    for path in sorted(folder.iterdir()):
        if not path.is_file() and not path.is_dir():
            raise UserError(f"{where}{path.name} is neither a file nor a folder; remove it")


def check_model(folder: Path, name: str) -> None:
    """Refuse a model folder that would hang, grow or lead elsewhere when transformers reads it.

    The numbers of layers and widths in config.json are held against the weight files, for
    transformers builds what they say before it looks at a weight.

    Raises:
        UserError: what is wrong and in which file.
    """
    where = f"model.name {name}: "
    check_files(folder, where)
    shapes = _shapes(sorted(folder.glob("*.safetensors")), where)
    widest = max((max(shape, default=1) for shape in shapes.values()), default=0)
    try:
        config = files.read_json(folder / "config.json")
    except ValueError as error:
        raise UserError(
            f"{where}config.json cannot be read: {error}; copy the model again"
        ) from None
    entries = list(_entries(config))
    numbers = [(key, value) for key, value in entries if type(value) is int]
    hidden = max((value for key, value in numbers if key in HIDDEN), default=1)
    total = sum(math.prod(shape) for shape in shapes.values())
    deepest, widest = min(len(shapes), MOST_LAYERS), min(widest, total // max(hidden, 1))
    for key, number in numbers:
        most = deepest if LAYERS.search(key) else widest if key in WIDTHS else None
        if most is not None and not 0 <= number <= most:
            raise UserError(
                f"{where}config.json says {key}: {number}, and by its weight files it is at most "
                f"{most:,}; the two do not belong together, copy the model again"
            )
    for key, value in entries:
        if key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise UserError(
                f"{where}config.json names code of the Hub ({key}: {value!r:.60}), and Etude runs "
                "no foreign code; remove that line"
            )
    for index in sorted(folder.glob("*.index.json")):
        _check_index(index, where)
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        try:
            names = files.read_json(tokenizer).get("fast_tokenizer_files") or []
        except ValueError as error:
            raise UserError(
                f"{where}tokenizer_config.json cannot be read: {error}; copy the model again"
            ) from None
        _plain_names(names, where, tokenizer.name)


def _shapes(files: list[Path], where: str) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor; safetensors checks headers and offsets against the file's length."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - a safe_open is no mapping
                    shape = tuple(tensors.get_slice(key).get_shape())
                    if 0 not in shape:  # a tensor without numbers may say any width
                        shapes[key] = shape
        except (SafetensorError, OSError, ValueError, OverflowError) as error:
            if lack := shortage(error):
                raise UserError(f"{where}{file.name}: {lack}") from None
            raise UserError(
                f"{where}{file.name} is not a readable safetensors file: {first_line(error)}; "
                "copy it again"
            ) from None
    return shapes


def _entries(value: object) -> Iterator[tuple[str, object]]:
    """Every key and value of nested JSON objects."""
    left = [value]
    while left:
        inner = left.pop()
        if isinstance(inner, dict):
            left += inner.values()
            yield from inner.items()


def _check_index(index: Path, where: str) -> None:
    try:
        weights = files.read_json(index).get("weight_map")
    except ValueError as error:
        raise UserError(f"{where}{index.name} cannot be read: {error}; copy it again") from None
    names = list(weights.values()) if isinstance(weights, dict) else [None]
    _plain_names(names, where, index.name)
    if not all(str(name).endswith(".safetensors") for name in names):
        raise UserError(
            f"{where}{index.name} names weights that are no .safetensors file; "
            "pickled ones can run code and are not read"
        )


def _plain_names(names: object, where: str, file: str) -> None:
    for name in names if isinstance(names, list) else [names]:
        if (
            not isinstance(name, str)
            or name in ("", "..")
            or name != os.path.basename(name)
            or "\\" in name
        ):
            raise UserError(
                f"{where}{file} names the file {name!r:.80}, which is not one of the model's own "
                "folder; copy the model again"
            )
