"""Two runs compared: what differs, whether one is better than the other, or the same training again."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from etude.config.loading import check_config, key_paths, value_at
from etude.config.yaml import scalar
from etude.errors import UserError, command
from etude.measure import intervals
from etude.models import lora
from etude.runs.folder import METRICS
from etude.runs.listing import TUNED, cell, describe, evaluations
from etude.runs.manifest import read_manifest, read_metrics
from etude.runs.report import p_value, shown, terminal_table

LEVEL = 0.95  # of the intervals; a difference counts where chance alone makes it in 5 % of cases or less
# How far the losses of a repeated training may be from the first's, on another machine.
REPEATED = 0.02
SAME_ROWS = ("sha256", "rows", "drawn", "format")


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
    for (home, one), (other_home, other) in _same_rows(first, second):
        test = paired_test(_predictions(home), _predictions(other_home))
        if test:
            measured = [shown(report["models"][TUNED]) for report in (one, other)]
            figures |= {key: [value, measured[1].get(key)] for key, value in measured[0].items()}
            answer = _answer(test, first, second)
            break
    else:
        data = configs[0].dataset.test
        option = [] if data and data == configs[1].dataset.test else ["--data", data or "FILE"]
        runs = " and ".join(command("etude", "evaluate", run, *option) for run in (first, second))
        answer = (
            f"cannot tell: they were not evaluated on the same rows. Run {runs}, then this again"
        )
    return {
        "settings": {
            key: pair
            for key, pair in settings.items()
            if pair[0] != pair[1] and key != "output.dir"
        },
        "figures": figures,
        "answer": f"Is {first} better than {second}? {answer[0].upper()}{answer[1:]}.",
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


def _same_rows(first: Path, second: Path) -> list[tuple[Any, Any]]:
    """The pairs of evaluations that may be of the same rows, the newest first."""
    return [
        (a, b)
        for a in evaluations(first)
        for b in evaluations(second)
        if all(a[1]["data"].get(key) == b[1]["data"].get(key) for key in SAME_ROWS)
        and a[1].get("method") == b[1].get("method")
        and all(TUNED in report["models"] for _, report in (a, b))
    ]


def _predictions(folder: Path) -> list[dict[str, Any]]:
    """The lines of an evaluation's predictions.jsonl.

    Raises:
        UserError: they cannot be read.
    """
    file = folder / "predictions.jsonl"
    try:
        text = file.read_text(encoding="utf-8")
        return [{TUNED: {}, **json.loads(line)} for line in text.split("\n") if line]
    except (OSError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: cannot be read: {error}. Evaluate the run again: etude evaluate {folder.parent}"
        ) from None


def paired_test(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, Any] | None:
    """A paired test on two models' predictions of the same rows; None if they are of others.

    Labels: the difference in accuracy, McNemar's exact test, and its interval by Clopper and Pearson's
    for the share s of the d discordant rows that the first has right: (2 s - 1) d / n, which holds 0
    just where the test finds nothing. Else: the difference in mean loss per row, negated so that more
    is better, Wilcoxon's signed-rank test, and Student's interval of the mean.
    """
    from scipy import stats

    keys, count = ("line", "text", "messages", "label"), len(first)
    rows = [[[line.get(key) for key in keys] for line in lines] for lines in (first, second)]
    ours, theirs = [line[TUNED] for line in first], [line[TUNED] for line in second]
    if not count or rows[0] != rows[1]:
        return None
    test: Any
    if all("loss" in line for line in ours + theirs):
        kind, losses = "loss", [[line["loss"] for line in lines] for lines in (ours, theirs)]
        test = intervals.paired_losses(*losses)
        better = [b - a for a, b in zip(*losses, strict=True)]
        mean, error = sum(better) / count, stats.sem(better) if count > 1 else 0.0
        low, high = stats.t.interval(LEVEL, count - 1, mean, error) if error else (mean, mean)
    elif all("predicted" in line for line in ours + theirs) and "label" in first[0]:
        kind, truth = "accuracy", [str(line.get("label")) for line in first]
        test = intervals.mcnemar(
            truth, *([line["predicted"] for line in lines] for lines in (ours, theirs))
        )
        right, wrong = test["only_first_right"], test["only_second_right"]
        apart, mean = right + wrong, (right - wrong) / count
        share = stats.binomtest(right, apart).proportion_ci(LEVEL) if apart else (0.5, 0.5)
        low, high = ((2 * end - 1) * apart / count for end in share)
    else:
        return None
    return {**test, "kind": kind, "rows": count, "difference": mean, "low": low, "high": high}


def _answer(test: dict[str, Any], first: Path, second: Path) -> str:
    """Whether the first is better, with the difference, its interval and the p-value."""
    rows = f"on the same {test['rows']:,} rows the {test['kind']}"
    if not test["difference"]:
        return f"cannot tell: {rows} of both is the same ({p_value(test)})"
    sure = test["p_value"] <= 1 - LEVEL and not test["low"] <= 0 <= test["high"]
    ahead = test["difference"] > 0
    word = ("yes" if ahead else "no") if sure else "cannot tell, it may be chance"
    points = test["kind"] == "accuracy"
    scale = (100 if points else 1) * (1 if ahead else -1)
    low, by, high = sorted(scale * test[end] for end in ("low", "difference", "high"))
    unit, form = ("points", ".1f") if points else ("nats per token", ".4f")
    return (
        f"{word}: {rows} of {first if ahead else second} is better by {by:{form}} {unit} "
        f"({LEVEL:.0%} interval {low:{form}} to {high:{form}}; {p_value(test)})"
    )


# --- is B the same training as A? --------------------------------------------------------------


class Comparison(NamedTuple):
    """Two runs side by side: the same bit for bit, or close, and the figures in words."""

    same: bool
    close: bool
    losses: str
    adapter: str


def compare_training(first: Path, second: Path) -> Comparison:
    """Compare the logged losses and the adapters of two runs.

    They are close if no loss deviates by more than REPEATED, relative to the first run's.

    Raises:
        UserError: a damaged adapter.
    """
    before, after = logged_losses(first), logged_losses(second)
    missing = len(before.keys() ^ after.keys())
    deviations = {
        key: abs(after[key] - loss) / max(abs(loss), 1e-6)
        for key, loss in before.items()
        if key in after
    }
    differing = [key for key, deviation in deviations.items() if deviation]
    losses = f"{len(deviations)} logged losses, all the same"
    if differing:
        step, kind = differing[0]
        worst = max(differing, key=deviations.__getitem__)
        losses = (
            f"{len(differing)} of {len(deviations)} logged losses differ, first at step {step} ({kind} "
            f"{before[step, kind]:.6f}, now {after[step, kind]:.6f}), by up to "
            f"{deviations[worst]:.2g} relative (step {worst[0]})"
        )
    if missing:
        losses += f"; {missing} are in one run only"
    old, new = lora.read_weights(first), lora.read_weights(second)
    faults, same = lora.compare_keys(new, old), lora.digest(old) == lora.digest(new)
    if faults:
        adapter = "; ".join(faults)
    elif same:
        adapter = f"the same, SHA-256 {lora.digest(new)}"
    else:
        largest = max(float((new[key] - old[key]).abs().max()) for key in old)
        scale = max(float(old[key].abs().max()) for key in old)
        adapter = f"differs by up to {largest:.2g} (its largest weight is {scale:.2g})"
    return Comparison(
        same=same and not (differing or missing),
        close=not (missing or faults) and max(deviations.values(), default=math.inf) <= REPEATED,
        losses=losses,
        adapter=adapter,
    )


def logged_losses(folder: Path) -> dict[tuple[int, str], float]:
    """The losses in metrics.jsonl by step and kind (loss, eval_loss), in their order."""
    return {
        (line["step"], kind): line[kind]
        for line in read_metrics(folder / METRICS)
        for kind in ("loss", "eval_loss")
        if kind in line
    }
