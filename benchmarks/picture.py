"""The newest recorded training results as a Markdown table, and as bars in results/training.png.

python benchmarks/picture.py
"""

import json
import re
from typing import Any

from train import RESULTS

COLOURS = {
    "etude-int8": "#0b6e4f",
    "etude-bf16": "#257f5c",
    "etude": "#3fa37c",
    "trl": "#8d99ae",
    "trl-bf16": "#6c7a96",
    "transformers": "#b8c0cc",
    "main": "#d9dde3",
}


def newest() -> dict[str, dict[str, Any]]:
    """The summary of the newest file of each workload."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(RESULTS.glob("train-*.json"), key=lambda path: path.stem[-15:]):
        summary = json.loads(file.read_text())["summary"]
        what = re.sub(r"^train-(.*)-\d{8}-\d{6}$", r"\1", file.stem)
        if all("share_of_products" in engine for engine in summary.values()):
            found[what] = summary
    return found


def table(groups: dict[str, dict[str, Any]]) -> str:
    """One line an engine: speed, ratio, share of bare products, first step, memory, last loss."""
    lines = [
        "| workload | engine | rows/s | against TRL | bare products | first step | peak memory | last loss |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for what, summary in groups.items():
        for number, (engine, found) in enumerate(summary.items()):
            ratio = "-"
            if "trl" in summary:
                ratio = f"{found['rows_per_second'] / summary['trl']['rows_per_second']:.1f}x"
            lines.append(
                f"| {'' if number else what} | {engine} | {found['rows_per_second']:.2f} "
                f"| {ratio} | {found['share_of_products']:.0%} "
                f"| {found['first_step_seconds']:.0f} s | {found['peak_gb']:.1f} GB "
                f"| {found['losses'][-1]:.5f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Print the table; draw one group of bars a workload, in rows a second relative to TRL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    recorded = newest()
    print(table(recorded))
    groups = {what: summary for what, summary in recorded.items() if "trl" in summary}
    heights = [len(summary) for summary in groups.values()]
    figure, axes = plt.subplots(
        len(groups),
        1,
        figsize=(8, 0.55 * sum(heights) + 0.6 * len(groups)),
        sharex=True,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
        squeeze=False,
    )
    for axis, (what, summary) in zip(axes[:, 0], groups.items(), strict=True):
        base = summary["trl"]["rows_per_second"]
        order = sorted(summary, key=lambda name: summary[name]["rows_per_second"])
        ratios = [summary[name]["rows_per_second"] / base for name in order]
        bars = axis.barh(order, ratios, color=[COLOURS[name] for name in order])
        axis.bar_label(
            bars,
            [
                f"{ratio:.1f}x  ({summary[name]['rows_per_second']:.2f} rows/s)"
                for name, ratio in zip(order, ratios, strict=True)
            ],
            padding=4,
        )
        axis.axvline(1, color="#8d99ae", linewidth=0.8, linestyle=":")
        axis.set_title(what.replace("-", " ", 1).replace("rows", " rows a step"), loc="left")
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(length=0)
    axes[-1, 0].set_xlabel("rows a second, TRL = 1")
    axes[0, 0].margins(x=0.3)
    figure.savefig(RESULTS / "training.png", dpi=150)


if __name__ == "__main__":
    main()
