"""An evaluation as it is kept: the folder of its report, and report.json."""

import contextlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etude.config.loading import check_config, key_paths, value_at
from etude.config.schema import Config
from etude.data import dataset
from etude.errors import UserError, command
from etude.files import expanded
from etude.measure import intervals
from etude.models import lora
from etude.runs import opening
from etude.runs.folder import MANIFEST, Busy, entries, free_name, locked
from etude.runs.manifest import current_environment, read_manifest

# What decides the figures of an evaluation, beside the weights and the rows.
DECIDING = (
    *(f"model.{key}" for key in ("name", "revision", "dtype", "quantization", "chat_template")),
    *(f"dataset.{key}" for key in ("instruction", "system_prompt", "labels", "format", "columns")),
    *(
        f"dataset.{key}"
        for key in ("max_length", "overlength", "special_tokens", "on_bad_row", "ignore")
    ),
    "training.seed",
    "evaluation.",
    "generation.",
)
PER_ROW = ("truth", "predicted", "said", "losses")  # kept in predictions.jsonl


@contextlib.contextmanager
def report_folder(name: str, out: Path | None) -> Iterator[Path]:
    """An empty folder for the report, made and locked for this process; without a report it goes again.

    Raises:
        UserError: `out` holds something, or another process writes there.
    """
    if out:
        folder = expanded(str(out))
        with locked(folder):
            there = entries(folder)
            if there:
                what = "a report" if "report.json" in there else ", ".join(there[:5])
                raise UserError(
                    f"--out: {folder} holds {what} already; give a new folder: "
                    f"{command('--out', free_name(folder))}"
                )
            yield folder
        return
    # A model's own folder is no place for reports; a run's is.
    run = lora.is_adapter(expanded(name))
    home = expanded(name) if run else Path("runs") / re.sub(r"\W+", "-", name).strip("-")
    if not run and not Path(os.path.realpath(home)).is_relative_to(os.path.realpath("runs")):
        raise UserError(f"{home} is a link that leads out of runs/; give a folder: --out FOLDER")
    with contextlib.ExitStack() as stack:
        for number in itertools.count(1):
            folder = home / (f"evaluation-{number}" if number > 1 else "evaluation")
            if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
                continue
            if folder.is_dir() and entries(folder):
                continue
            with contextlib.suppress(Busy):
                stack.enter_context(locked(folder))
                if not entries(folder):
                    break
                stack.close()  # another process was quicker
        yield folder


def settings_in_force(name: str, settings: Config) -> dict[str, Any]:
    """The settings that decide the figures, and which of them are not those of the run (or a default).

    A run's are those that its manifest says it was trained with; its config.yml may have changed since.
    """
    folder = expanded(name)
    before = Config().model_copy(update={"model": settings.model})
    with contextlib.suppress(UserError):  # a run of another version, or faults that overrides fix
        if (folder / MANIFEST).is_file():
            before = check_config(read_manifest(folder)["config"], {})
        else:
            before = opening.open_config(name, [])
    keys = [key for key in key_paths() if key.startswith(DECIDING)]
    values = {key: value_at(settings, key) for key in keys}
    return {
        "settings": values,
        "overridden": {
            key: {"before": value_at(before, key), "now": value}
            for key, value in values.items()
            if value != value_at(before, key)
        },
    }


def assemble(
    name: str, settings: Config, table: dataset.Table, measured: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """report.json: what was measured on what, each model's figures, and base against tuned."""
    method = settings.evaluation.method if table.format == "classification" else "greedy"
    heuristics = "heuristics" in measured
    result: dict[str, Any] = {
        "target": name,
        "base": None if heuristics else settings.model.name,
        "data": {
            "source": table.source,
            "sha256": table.fingerprint,
            "rows": len(table.rows),
            "drawn": table.drawn,
            "dropped": table.dropped,
            "format": table.format,
        },
        "method": "heuristics" if heuristics else method,
        "models": {
            model: {key: value for key, value in figures.items() if key not in PER_ROW}
            for model, figures in measured.items()
        },
        **settings_in_force(name, settings),
        "environment": current_environment(),
    }
    if len(measured) == 2:
        result["comparison"] = compared(measured["base"], measured["tuned"])
    return result


def compared(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The paired test of two models measured on the same rows."""
    if first["kind"] == "classification":
        return intervals.mcnemar(first["truth"], first["predicted"], second["predicted"])
    return intervals.paired_losses(first["losses"], second["losses"])
