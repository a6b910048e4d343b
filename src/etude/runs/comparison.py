"""Two runs compared: what differs, whether one is better than the other, or the same training again."""

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from etude.config.loading import check_config, key_paths, value_at
from etude.config.yaml import scalar
from etude.runs.evaluations import compared
from etude.runs.listing import TUNED, cell, describe, evaluations
from etude.runs.manifest import read_manifest
from etude.runs.report import shown, terminal_table, verdict

# A difference counts where chance alone makes one as large in at most so many cases.
CHANCE = 0.05
# How far the losses of a repeated training may be from the first's, on another machine.
REPEATED = 0.02


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Two runs side by side: "settings" that differ, "figures", each a pair, and the "answer" in a sentence.

    The answer is of a paired test on the predictions of the newest evaluations of the same rows.

    Raises:
        UserError: one of them is not a finished run.
    """
    manifests = [read_manifest(folder) for folder in (first, second)]
    configs = [check_config(manifest["config"], {}) for manifest in manifests]
    settings = {key: [value_at(config, key) for config in configs] for key in key_paths()}
    for split in ("train", "validation"):
        sums = [manifest["data"].get(split, {}).get("sha256", "none") for manifest in manifests]
        settings[f"{split} rows (SHA-256)"] = [f"{value:.12}" for value in sums]
    rows = [describe(folder) for folder in (first, second)]
    figures = {key: [row[key] for row in rows] for key in ("rows", "steps", "loss", "size")}
    reports, answer = _better(first, second)
    if reports:
        one, other = (shown(report["models"][TUNED]) for report in reports)
        figures |= {key: [value, other.get(key)] for key, value in one.items()}
    return {
        "settings": {
            key: pair
            for key, pair in settings.items()
            if pair[0] != pair[1] and key != "output.dir"
        },
        "figures": figures,
        "answer": f"Is {first} better than {second}? {answer}",
    }


def tables(found: dict[str, Any], first: Path, second: Path) -> list[Any]:
    """What the terminal shows of a comparison."""
    names = [str(first), str(second)]
    settings = [
        [key, *(scalar(value) for value in pair)] for key, pair in found["settings"].items()
    ]
    figures = [[key, *map(cell, pair)] for key, pair in found["figures"].items()]
    return [
        terminal_table(["setting", *names], settings) if settings else "No setting differs.",
        terminal_table(["figure", *names], figures),
        found["answer"],
    ]


def _better(first: Path, second: Path) -> tuple[list[dict[str, Any]], str]:
    """The newest evaluations of the same rows, none if there are none; and whether the first is better."""
    for home, report in evaluations(first):
        for other_home, other in evaluations(second):
            how = [(each["data"]["sha256"], each.get("method")) for each in (report, other)]
            if how[0] == how[1] and TUNED in report["models"] and TUNED in other["models"]:
                lines = [_predictions(folder) for folder in (home, other_home)]
                if [_row(line) for line in lines[0]] == [_row(line) for line in lines[1]]:
                    kind = report["models"][TUNED]["kind"]
                    return [report, other], _answer(kind, lines, first, second)
    return [], (
        "Cannot tell: they were not evaluated on the same rows. Evaluate both with the same "
        "--data FILE (etude evaluate RUN --data FILE), then compare them again."
    )


def _predictions(folder: Path) -> list[dict[str, Any]]:
    """The lines of an evaluation's predictions.jsonl."""
    text = (folder / "predictions.jsonl").read_text(encoding="utf-8")
    return [{TUNED: {}, **json.loads(line)} for line in text.split("\n") if line]


def _row(line: dict[str, Any]) -> list[Any]:
    """The row that a prediction is of."""
    return [line.get(key) for key in ("line", "text", "messages", "label")]


def _answer(kind: str, predictions: list[list[dict[str, Any]]], first: Path, second: Path) -> str:
    """Whether the first is better by its predictions of the same rows, with what the paired test found."""
    measured = [
        {
            "kind": kind,
            "truth": [line.get("label") for line in lines],
            "predicted": [line[TUNED].get("predicted") for line in lines],
            "losses": [line[TUNED].get("loss", math.nan) for line in lines],
        }
        for lines in predictions
    ]
    test = compared(*measured)
    if kind == "classification":
        lead = test["only_first_right"] - test["only_second_right"]
    else:  # of two signs that differ, neither says which is better
        losses = [fmean(each["losses"]) for each in measured]
        more = test["first_likelier"] - test["second_likelier"]
        lead = more if more * (losses[1] - losses[0]) > 0 else 0
    word = "Cannot tell, it may be chance."
    if test["p_value"] <= CHANCE and lead:
        word = "Yes." if lead > 0 else "No."
    return f"{word} {verdict(test, first, second)}"


def compare_training(first: Path, second: Path) -> tuple[bool, float, str]:
    """Compare what two trainings ended with, as their manifests say.

    Returns:
        Whether losses and adapter are the same, bit for bit; by how much a loss differs at most, relative
        to the first run's; and that in words.

    Raises:
        UserError: one of them is not a finished run.
    """
    before, after = (read_manifest(folder) for folder in (first, second))
    deviation, words = 0.0, []
    for key in ("steps", "train_loss", "eval_loss"):
        old, new = (manifest["results"][key] for manifest in (before, after))
        words.append(f"{key} {old}" if old == new else f"{key} {old}, now {new}")
        if old != new:
            deviation = max(deviation, abs(new - old) / max(abs(old), 1e-6))
    same = before["adapter"] == after["adapter"]
    words.append("the same adapter" if same else "another adapter")
    return same and not deviation, deviation, "; ".join(words)
