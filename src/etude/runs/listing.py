"""What runs there are: the table of `etude runs`."""

import contextlib
from pathlib import Path
from typing import Any

from etude import files
from etude.errors import UserError
from etude.runs.folder import MANIFEST, METRICS, STARTED, how_to_continue, live, read_started
from etude.runs.manifest import read_manifest, read_metrics
from etude.runs.report import terminal_table

COLUMNS = ("run", "base", "data", "rows", "steps", "loss", "accuracy", "size", "date")
TUNED = "tuned"  # what an evaluation calls a run's model


def describe(folder: Path) -> dict[str, Any]:
    """The run in `folder` by COLUMNS, None where a figure is not known.

    Loss is that of the validation, or of the training where there is none; size is in bytes. "state" is
    finished, live, unfinished or corrupt, and "problem" says why it is not finished.
    """
    row: dict[str, Any] = dict.fromkeys((*COLUMNS, "problem"))
    row |= {"run": str(folder), "state": "finished", "size": _size(folder)}
    who = live(folder)
    try:
        if (folder / MANIFEST).is_file():
            row |= _finished(folder)
        elif facts := read_started(folder):
            logged = read_metrics(folder / METRICS)
            row |= {"steps": logged[-1]["step"] if logged else 0, **_configured(facts["config"])}
            row["state"] = "live" if who else "unfinished"
            row["problem"] = f"trained by {who}" if who else how_to_continue(folder)
        else:
            raise UserError(f"{folder / STARTED}: cannot be read")
    except UserError as error:
        row |= {"state": "corrupt", "problem": str(error)}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        problem = f"{folder}: a file in it is not what Etude writes ({error!r:.80})"
        row |= {"state": "corrupt", "problem": problem}
    return row


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # a live run removes what it has made
            total += path.lstat().st_size if path.is_file() else 0
    return total


def _configured(config: dict[str, Any]) -> dict[str, Any]:
    return {"base": str(config["model"]["name"]), "data": str(config["dataset"]["train"])}


def _finished(folder: Path) -> dict[str, Any]:
    """What the manifest and the newest evaluation of a finished run say."""
    manifest = read_manifest(folder)
    results = manifest["results"]
    loss = results["train_loss"] if results["eval_loss"] is None else results["eval_loss"]
    measured = (report["models"].get(TUNED, {}) for _, report in evaluations(folder))
    return {
        **_configured(manifest["config"]),
        "rows": int(manifest["data"]["train"]["kept"]),
        "steps": int(results["steps"]),
        "loss": float(loss),
        "accuracy": next((one["accuracy"] for one in measured if "accuracy" in one), None),
        "date": str(manifest["created"])[:10],
    }


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
    """The evaluations in a run's folder with their report.json, the newest first; others are left out."""
    found = []
    for file in folder.glob("evaluation*/report.json"):
        try:
            report = files.read_json(file)
        except ValueError:
            continue
        if isinstance(report.get("models"), dict) and isinstance(report.get("data"), dict):
            found.append((file.parent, report))
    return sorted(found, key=lambda each: each[0].joinpath("report.json").stat().st_mtime)[::-1]


def tables(rows: list[dict[str, Any]]) -> list[Any]:
    """What the terminal shows of runs: a table, then a line for each one that is not finished."""
    lines = []
    for row in rows:
        names = {key: Path(row[key] or "").name for key in ("run", "base")}
        names |= {"data": Path(row["data"] or "").stem}
        size = f"{row['size'] / 1e6:,.1f} MB"
        shown = row | names | {"size": size, "date": row["date"] or row["state"]}
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
