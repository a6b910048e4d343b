"""What runs there are: the table of `etude runs`."""

import contextlib
from pathlib import Path
from typing import Any

from etude import files
from etude.errors import UserError
from etude.runs.folder import MANIFEST, METRICS, STARTED, how_to_continue, is_finished, is_live
from etude.runs.manifest import read_manifest, read_metrics, read_record
from etude.runs.report import terminal_table

COLUMNS = ("run", "base", "data", "rows", "steps", "loss", "accuracy", "size", "date")
TUNED = "tuned"  # what an evaluation calls a run's model


def describe(folder: Path) -> dict[str, Any]:
    """The run in `folder` by COLUMNS, None where a figure is not known.

    Loss is that of the validation, or of the training where there is none; size is in bytes. "state" is
    finished, live, unfinished or corrupt; "problem" says why it is corrupt, or how the training goes on.
    """
    row: dict[str, Any] = dict.fromkeys((*COLUMNS, "problem"))
    row |= {"run": str(folder), "size": _size(folder)}
    try:
        if is_finished(folder):
            facts = _finished(folder)
        elif is_live(folder):
            facts = _begun(folder) | {"state": "live"}
        else:
            facts = _begun(folder) | {"state": "unfinished", "problem": how_to_continue(folder)}
    except Exception as error:  # whatever is wrong with one run, the others are listed
        problem = str(error) if isinstance(error, UserError) else f"cannot be read: {error!r:.80}"
        return row | {"state": "corrupt", "problem": problem}
    return row | facts


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # a live run removes what it has made
            total += path.lstat().st_size if path.is_file() else 0
    return total


def _begun(folder: Path) -> dict[str, Any]:
    """What is known of a run that has not ended."""
    logged = read_metrics(folder / METRICS)
    config = read_record(folder / STARTED, "config")["config"]
    return {"steps": logged[-1]["step"] if logged else 0, **_names(config)}


def _finished(folder: Path) -> dict[str, Any]:
    """What the manifest and the newest evaluation of a finished run say."""
    manifest = read_manifest(folder)
    results = manifest["results"]
    measured = (report["models"].get(TUNED, {}) for _, report in evaluations(folder))
    return {
        **_names(manifest["config"]),
        "rows": manifest["data"]["train"]["kept"],
        "steps": results["steps"],
        "loss": results["train_loss"] if results["eval_loss"] is None else results["eval_loss"],
        "accuracy": next((one["accuracy"] for one in measured if "accuracy" in one), None),
        "date": manifest["created"][:10],
        "state": "finished",
    }


def _names(config: dict[str, Any]) -> dict[str, Any]:
    return {"base": config["model"]["name"], "data": config["dataset"]["train"]}


def list_runs(home: Path) -> list[dict[str, Any]]:
    """The runs in the folder `home`, or the one that it is, by name.

    Raises:
        UserError: no such folder.
    """
    if not home.is_dir():
        raise UserError(f"{home}: no such folder; a training makes one: etude train")
    folders = [home, *sorted(path for path in home.iterdir() if path.is_dir())]
    return [
        describe(folder)
        for folder in folders
        if any((folder / name).is_file() for name in (STARTED, MANIFEST))
    ]


def evaluations(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The evaluations in a run's folder with their report.json, the newest first."""
    reports = folder.glob("evaluation*/report.json")
    newest = sorted(reports, key=lambda file: file.stat().st_mtime, reverse=True)
    return [(file.parent, files.read_json(file)) for file in newest]


def tables(rows: list[dict[str, Any]]) -> list[Any]:
    """What the terminal shows of runs: a table, then a line for each one that has ended unfinished."""
    lines = []
    for row in rows:
        shown = {
            **row,
            "run": Path(row["run"]).name,
            "base": Path(row["base"] or "").name,
            "data": Path(row["data"] or "").stem,
            "size": f"{row['size'] / 1e6:,.1f} MB",
            "date": row["date"] or row["state"],
        }
        lines.append([cell(shown[key]) for key in COLUMNS])
    problems = [f"{row['run']}: {row['state']}: {row['problem']}" for row in rows if row["problem"]]
    table = terminal_table(COLUMNS, lines)
    table.pad_edge, table.collapse_padding = False, True
    for column in table.columns:  # where the terminal is narrow, names wrap and figures do not
        column.no_wrap = column.header not in ("run", "base", "data")
    return [table, *problems]


def cell(value: Any) -> str:
    """A figure as a table shows it."""
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
