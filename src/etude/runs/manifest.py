"""What a run records of itself: what it started from, its manifest, its environment, its losses."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from etude import files
from etude.config.schema import Config
from etude.data.dataset import Split
from etude.errors import UserError
from etude.models.loading import Base
from etude.runs.folder import MANIFEST, STARTED

LIBRARIES = (
    *("etude", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors"),
    "datasets",
)


class _Form(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Environment(_Form):
    libraries: dict[str, str] = {}
    cpu_flags: list[str] = []


class _Dated(_Form):
    """A chat format, or the start of a run: with the day that a template wrote, if it wrote one."""

    date: Annotated[str, AfterValidator(datetime.date.fromisoformat)] | None = None


class _Base(_Form):
    identity: str
    device: str = "cpu"


class Manifest(_Form):
    """The part of a manifest.json that programs read."""

    base: _Base
    config: dict[str, Any]
    chat_format: _Dated
    data: dict[str, dict[str, Any]]
    environment: _Environment = _Environment()


class Started(_Dated):
    """The part of a started.json that a resumed training reads."""

    config: dict[str, Any] | None = None
    environment: _Environment


class _Loss(_Form):
    split: Literal["train", "validation"]
    data: str
    rows: int = Field(ge=1)
    value: float


class Proof(_Form):
    """What a proof.json holds."""

    sha256: str
    dtype: str | None = None
    quantization: Literal["int8", "nf4"] | None = None
    loss: _Loss


def read_form(path: Path, form: type[BaseModel]) -> dict[str, Any]:
    """A JSON object from a run folder that has the form of `form`.

    Raises:
        UserError: unreadable, or another form.
    """
    try:
        value = files.read_json(path)
        form.model_validate(value)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
        )
        problem = f"not what Etude writes ({faults:.500})"
    except ValueError as error:
        problem = f"cannot be read: {error}"
    else:
        return value
    raise UserError(f"{path}: {problem}; the run is damaged, train it again")


def make_manifest(
    settings: Config,
    base: Base,
    chat_format: dict[str, Any],
    splits: dict[str, Split],
    results: dict[str, Any],
) -> dict[str, Any]:
    """Everything that is needed to know how an adapter came about, as JSON values."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "base": {"name": base.name, "identity": base.identity, "device": base.device.why},
        "seed": settings.training.seed,
        "config": settings.model_dump(mode="json"),
        "chat_format": chat_format,
        "data": {
            name: {**dataclasses.asdict(split.report), "sha256": split.table.fingerprint}
            for name, split in splits.items()
        },
        "results": results,
        "environment": current_environment(),
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the run in `folder`, its form checked.

    Raises:
        UserError: it is not what Etude writes.
    """
    return read_form(folder / MANIFEST, Manifest)


def recorded_date(folder: Path) -> datetime.date | None:
    """The day that a run was begun with, for templates that write it; None if it has none.

    Raises:
        UserError: the run is damaged.
    """
    if (folder / MANIFEST).is_file():
        return date_of(read_manifest(folder)["chat_format"])
    if (folder / STARTED).is_file():
        return date_of(read_form(folder / STARTED, _Dated))
    return None


def date_of(facts: dict[str, Any]) -> datetime.date | None:
    """The date in a manifest's chat_format or in started.json."""
    return datetime.date.fromisoformat(facts["date"]) if facts.get("date") else None


# --- environment ------------------------------------------------------------------------------


def current_environment() -> dict[str, Any]:
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
    first, second = _flat(**stored), _flat(**now)
    return [
        f"{name}: {first.get(name, 'not recorded')}, now {second.get(name, 'none')}"
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    ]


def _flat(
    libraries: dict[str, str] | None = None, cpu_flags: list[str] | None = None, **others: Any
) -> dict[str, Any]:
    """An environment with its libraries and flags on one level."""
    flags = {f"CPU flag {flag}": "yes" for flag in cpu_flags or []}
    return others | (libraries or {}) | flags


def changes_since(folder: Path) -> list[str]:
    """How the environment differs from the one that the run in `folder` was trained in."""
    if not (folder / MANIFEST).is_file():
        return []
    return environment_differences(
        read_manifest(folder).get("environment", {}), current_environment()
    )


# --- metrics.jsonl ----------------------------------------------------------------------------


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that a kill cut short is left out, and what is no such line."""
    found = []
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    for written in text.splitlines():
        try:
            line = json.loads(written)
            losses = [float(line[key]) for key in ("loss", "eval_loss") if key in line]
            if type(line["step"]) is int and all(map(math.isfinite, losses)):
                found.append(line)
        except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError):
            continue
    return found
