"""A run is a folder: config.yml, adapter, manifest.json, metrics.jsonl, plots. This file opens and writes it."""

import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from etude import config as configuration
from etude import device, foreign, lora, models, ranks
from etude.config import Config
from etude.conversation import Renderer
from etude.errors import UserError, command

CONFIG, STARTED, MANIFEST = "config.yml", "started.json", "manifest.json"
METRICS, LOG, CHECKPOINTS = "metrics.jsonl", "train.log", "checkpoints"
TEMPLATE_LIMIT = 2**20  # bytes
LIBRARIES = (
    "etude",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "safetensors",
    "datasets",
)


@dataclass(frozen=True)
class Target:
    """What a program works on: a base, how to render for it, and the adapter's folder if it is a run."""

    base: models.Base
    renderer: Renderer
    config: Config
    adapter: Path | None

    def tuned(self) -> Any:
        """The model to answer with: the adapter merged into the base (in place), or the base alone.

        A 4-bit base stays as it is: merged into it, the adapter would be rounded to 4 bits too.
        """
        if self.adapter is None:
            return self.base.model
        tuned = lora.load(self.base.model, self.adapter)
        return tuned if getattr(self.base.model, "is_quantized", False) else lora.merge(tuned)


class _Checked(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _TrainedOn(_Checked):
    identity: str
    device: str = "cpu"


class Manifest(_Checked):
    """The part of a manifest.json that programs read."""

    base: _TrainedOn | None = None
    config: dict[str, Any] | None = None
    chat_format: dict[str, Any] | None = None
    data: dict[str, dict[str, Any]] = {}
    environment: dict[str, Any] = {}


class _Loss(_Checked):
    split: Literal["train", "validation"]
    data: str
    rows: int = Field(ge=1)
    value: float


class Proof(_Checked):
    """What a proof.json holds."""

    sha256: str
    dtype: str | None = None
    quantization: Literal["int8", "nf4"] | None = None
    loss: _Loss


def go_on(folder: Path) -> str:
    """How the training in `folder` is brought to its end: from a checkpoint, if it has one."""
    if ranks.WORLD > 1:
        return "give the same command again"
    made = any((folder / CHECKPOINTS).glob("checkpoint-*"))
    resume = ["--resume"] if made else []
    again = command("etude", "train", folder / CONFIG, *resume, f"output.dir={folder}")
    return f"{'go on with' if made else 'start it again'}: {again}"


def open_config(name: str, overrides: list[str]) -> Config:
    """The configuration of a run, of an adapter made elsewhere, or the default one for a model's name.

    Raises:
        UserError: no such run, one without an adapter, or faults in its configuration.
    """
    folder = foreign.expanded(name)
    if lora.is_adapter(folder):
        if (folder / CONFIG).is_file():
            return configuration.load(folder / CONFIG, overrides=overrides)
        # An adapter made elsewhere tells its base only.
        named = lora.describe(folder).base_model_name_or_path
        if not named:
            raise UserError(f"{name}: adapter_config.json does not name the adapter's base")
        name = named
    elif (folder / CONFIG).is_file():
        raise UserError(
            f"{name}: this run has no adapter yet; its training did not end. "
            f"To finish it, {go_on(folder)}"
        )
    elif name.startswith(("runs/", "./", "../", "/", "~")) and not folder.exists():
        there = sorted(str(path.parent) for path in folder.parent.glob("*/adapter_config.json"))
        raise UserError(
            f"{name}: no such run; there are: {', '.join(there) or 'none yet (etude train makes one)'}"
        )
    return configuration.load(None, overrides=[f"model.name={name}", *overrides])


def open_target(name: str, overrides: list[str]) -> Target:
    """Open a run folder, a PEFT adapter folder or a model by name, with its base loaded.

    Raises:
        UserError: not there, or an adapter that was trained on another base or chat format.
    """
    config = open_config(name, overrides)
    folder = foreign.expanded(name)
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    base, renderer = _load(config)
    adapter = folder if lora.is_adapter(folder) else None
    if adapter:
        lora.check_base(adapter, base.identity)
    if manifest:
        check_base(name, manifest, base)
        renderer.check_state(manifest["chat_format"], name)
    return Target(base, renderer, config, adapter)


def check_base(name: str, manifest: dict[str, Any], base: models.Base) -> None:
    """Hold `base` against the one that the run `name` was trained on.

    Raises:
        UserError: it is another one.
    """
    trained_on = manifest["base"]["identity"]
    if trained_on != base.identity:
        raise UserError(
            f"{name}: this adapter was trained on another base ({trained_on}) than {base.name} is now "
            f"({base.identity}). Pin model.revision, or give the base it was trained on"
        )


def _load(config: Config) -> tuple[models.Base, Renderer]:
    place = device.choose(config.model.dtype, config.training.use_cpu)
    # An int8 base is made for training; a 4-bit one where there is no room for another.
    quantization = "nf4" if config.model.quantization == "nf4" else None
    base = models.load(config.model.name, place, config.model.revision, quantization)
    return base, renderer_for(base, config)


def renderer_for(base: models.Base | models.Outline, config: Config) -> Renderer:
    """The renderer of a base under a config.

    Raises:
        UserError: a template file that cannot be read, or a template that cannot be used.
    """
    template = None
    if config.model.chat_template:
        try:
            file = foreign.expanded(config.model.chat_template)
            template = foreign.read_text(file, TEMPLATE_LIMIT)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"model.chat_template: {config.model.chat_template}: cannot be read: {error}"
            ) from None
    return Renderer(base.tokenizer, template, config.dataset.system_prompt)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a run folder.

    Raises:
        UserError: unreadable or no object.
    """
    try:
        return foreign.read_json(path)
    except ValueError as error:
        raise UserError(
            f"{path}: cannot be read: {error}; the run is damaged, train it again"
        ) from None


def read_manifest(folder: Path, *more: str) -> dict[str, Any]:
    """The manifest of the run in `folder`, its form checked; it has a base, a chat_format and `more`.

    Raises:
        UserError: it is not what Etude writes.
    """
    manifest = read_checked(folder / MANIFEST, Manifest)
    missing = [key for key in ("base", "chat_format", *more) if not manifest.get(key)]
    if missing:
        raise UserError(
            f"{folder / MANIFEST}: no {', '.join(missing)} in it; the run is damaged, train it again"
        )
    return manifest


def read_checked(path: Path, form: type[BaseModel]) -> dict[str, Any]:
    """A JSON object from a run folder that has the form of `form`.

    Raises:
        UserError: unreadable, or another form.
    """
    value = read_json(path)
    try:
        form.model_validate(value)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
        )
        raise UserError(
            f"{path}: not what Etude writes ({faults:.500}); the run is damaged, train it again"
        ) from None
    return value


def environment() -> dict[str, Any]:
    """Versions and machine: what decides how numbers are rounded, for the manifest."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": capabilities.get("cpu_name") or platform.processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": sorted(name for name, there in capabilities.items() if there is True),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def environment_differences(stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two environments, as "name: stored, now ..."; flags and versions one by one."""
    first, second = _flat(stored), _flat(now)
    return [
        f"{name}: {first.get(name, 'not recorded')}, now {second.get(name, 'none')}"
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    ]


def changes_since(folder: Path) -> list[str]:
    """How the environment differs from the one that the run in `folder` was trained in."""
    if not (folder / MANIFEST).is_file():
        return []
    stored = read_json(folder / MANIFEST).get("environment")
    return environment_differences(stored, environment()) if isinstance(stored, dict) else []


def _flat(environment: dict[str, Any]) -> dict[str, Any]:
    """An environment with its libraries and flags on one level."""
    flat = {key: value for key, value in environment.items() if not isinstance(value, dict | list)}
    libraries, flags = environment.get("libraries"), environment.get("cpu_flags")
    flat |= libraries if isinstance(libraries, dict) else {}
    return flat | ({f"CPU flag {flag}": "yes" for flag in flags} if isinstance(flags, list) else {})
