"""What a run records of itself: what it started from, its manifest, its environment, its losses."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from etude import files
from etude.config.schema import Config
from etude.data.dataset import Split
from etude.errors import UserError
from etude.models.loading import Base
from etude.runs.folder import MANIFEST, is_finished, read_started

LIBRARIES = (
    *("etude", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors"),
    "datasets",
)


def read_record(file: Path, *keys: str) -> dict[str, Any]:
    """A JSON object that a run keeps of itself, with at least these keys.

    Raises:
        UserError: it cannot be read, or lacks a key.
    """
    try:
        record = files.read_json(file)
    except ValueError as error:
        raise UserError(f"{file}: cannot be read: {error}; train the run again") from None
    if missing := set(keys) - record.keys():
        raise UserError(
            f"{file}: no {', '.join(sorted(missing))} in it, so it is not what Etude writes; train the "
            "run again"
        )
    return record


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
    """The manifest of the run in `folder`.

    Raises:
        UserError: it is not what Etude writes.
    """
    keys = ("base", "config", "chat_format", "data", "results", "environment")
    return read_record(folder / MANIFEST, *keys)


def recorded_date(folder: Path) -> datetime.date | None:
    """The day that a run was begun with, for templates that write it; None if it has none.

    Raises:
        UserError: the run is damaged.
    """
    if is_finished(folder):
        return date_of(read_manifest(folder)["chat_format"])
    return date_of(read_started(folder) or {})


def date_of(facts: dict[str, Any]) -> datetime.date | None:
    """The date in a manifest's chat_format or in started.json."""
    return datetime.date.fromisoformat(facts["date"]) if facts.get("date") else None


def current_environment() -> dict[str, Any]:
    """Versions and machine: what decides how numbers are rounded."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    flags = {f"CPU flag {name}": True for name, there in capabilities.items() if there is True}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": capabilities.get("cpu_name") or platform.processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
        **flags,
    }


def changes_since(stored: dict[str, Any]) -> list[str]:
    """How this environment differs from the one `stored`, as "name: stored, now ..."."""
    now = current_environment()
    return [
        f"{name}: {stored.get(name, 'none')}, now {now.get(name, 'none')}"
        for name in sorted(stored.keys() | now.keys())
        if stored.get(name) != now.get(name)
    ]


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that a kill cut short is left out."""
    found = []
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found
