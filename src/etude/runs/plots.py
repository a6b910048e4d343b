"""The pictures of a run: its losses, and the confusion matrices of its evaluations."""

from pathlib import Path
from typing import Any

from etude.measure.metrics import UNPARSEABLE
from etude.runs.manifest import read_metrics


def loss_plot(metrics_file: Path, picture: Path) -> None:
    """Draw training and validation loss (nats per supervised token) over steps as a PNG."""
    from matplotlib.figure import Figure

    lines = read_metrics(metrics_file)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=5)
    axes.set(xlabel="step", ylabel="loss (nats per supervised token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


def confusion_plot(figures: dict[str, Any], title: str, picture: Path) -> None:
    """Draw a confusion matrix as a PNG: rows are the truth, columns the prediction, shares of a row."""
    import matplotlib
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    size = len(figures["columns"])
    side = min(2 + 0.9 * size, 30)
    figure = Figure(figsize=(side, side), layout="constrained")
    # A dollar sign in a label begins no formula.
    with matplotlib.rc_context({"text.parse_math": False}):
        axes = figure.subplots()
        ConfusionMatrixDisplay.from_predictions(
            figures["truth"], [label or UNPARSEABLE for label in figures["predicted"]],
            labels=figures["columns"], normalize="true", ax=axes, cmap="Blues",
            xticks_rotation=30, values_format=".0%", include_values=size <= 30,
        )  # fmt: skip
        axes.set_title(title)
        figure.savefig(picture, dpi=120)
