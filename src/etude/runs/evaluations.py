"""An evaluation as it is kept: the folder of its report, and report.json."""

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etude.config.loading import key_paths, value_at
from etude.config.schema import Config
from etude.data import dataset
from etude.errors import UserError, command
from etude.measure import intervals
from etude.models import lora
from etude.runs.folder import entries, free_name
from etude.runs.manifest import current_environment

# The settings that decide the figures of an evaluation, beside the weights and the rows.
DECIDING = ("model.", "dataset.", "evaluation.", "generation.", "training.seed")
PER_ROW = ("truth", "predicted", "said", "called", "losses")  # kept in predictions.jsonl


@contextlib.contextmanager
def report_folder(name: str, out: Path | None) -> Iterator[Path]:
    """An empty folder for the report, new but for an empty `out`; without a report it goes again.

    Raises:
        UserError: `out` holds something.
    """
    if out:
        folder = out
        folder.mkdir(parents=True, exist_ok=True)
        if there := entries(folder):
            what = "a report" if "report.json" in there else ", ".join(there[:5])
            raise UserError(
                f"--out: {folder} holds {what} already; give a new folder: "
                f"{command('--out', free_name(folder))}"
            )
    else:
        # A model's own folder is no place for reports; a run's is.
        run = lora.is_adapter(Path(name))
        home = Path(name) if run else Path("runs") / re.sub(r"\W+", "-", name).strip("-")
        home.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = home / (f"evaluation-{number}" if number > 1 else "evaluation")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()  # of two processes, only one makes it
                break
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def assemble(
    name: str,
    settings: Config,
    table: dataset.Table,
    measured: dict[str, dict[str, Any]],
    given: Sequence[str] = (),
) -> dict[str, Any]:
    """report.json: what was measured on what, each model's figures, and base against tuned.

    `given` are the settings that were given on top of the run's own, as key=value.
    """
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
        "settings": {
            key: value_at(settings, key) for key in key_paths() if key.startswith(DECIDING)
        },
        "given": list(given),
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
