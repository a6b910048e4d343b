"""Tables and pictures: what a person reads of a run, as markdown, PNG and terminal tables."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from etude import files
from etude.config.yaml import scalar
from etude.data.dataset import Report, Row
from etude.errors import command
from etude.models.loading import SAMPLE


def data_table(reports: Sequence[Report]) -> Table:
    """What became of the rows of every split, a column each."""
    table = Table("", box=box.SIMPLE)
    for report in reports:
        table.add_column(report.split, justify="right")
    for name, numbers in {
        "rows": [report.rows for report in reports],
        "kept": [report.kept for report in reports],
        "examples": [report.examples for report in reports],
        "truncated": [len(report.truncated) for report in reports],
        "dropped": [report.rows - report.kept for report in reports],
        "tokens": [report.tokens for report in reports],
        "tokens lost": [report.lost for report in reports],
        "supervised": [report.supervised for report in reports],
        "longest": [report.longest for report in reports],
    }.items():
        table.add_row(name, *(f"{number:,}" for number in numbers))
    return table


def plan_table(rows: Sequence[tuple[str, int, str]]) -> Table:
    """What a training takes in memory, part by part."""
    table = Table("memory", box=box.SIMPLE)
    table.add_column("GB", justify="right")
    table.add_column("")
    for name, size, remark in rows:
        table.add_row(name, f"{size / 1e9:.2f}", remark)
    return table


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


def loss_plot(metrics_file: Path, picture: Path) -> None:
    """Draw training and validation loss (nats a supervised token) over steps as a PNG."""
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


def confusion_plot(result: dict[str, Any], title: str, picture: Path) -> None:
    """Draw a confusion matrix as a PNG: rows are the truth, columns the prediction, shares of a row."""
    import numpy as np
    from matplotlib.figure import Figure

    counts = np.array(result["confusion"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # To matplotlib a dollar sign begins a formula.
    labels, columns = ([n.replace("$", r"\$") for n in result[k]] for k in ("labels", "columns"))
    legible = len(labels) <= 30
    size = (2.2 + 0.9 * len(columns), 1.8 + 0.8 * len(labels)) if legible else (12, 10)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    if legible:
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        axes.set_yticks(range(len(labels)), labels)
        for (row, column), count in np.ndenumerate(counts):
            ink = "white" if shares[row, column] > 0.5 else "black"
            share = f"{count}\n{shares[row, column]:.0%}"
            axes.text(column, row, share, ha="center", va="center", color=ink)
    figure.colorbar(image, label="share of the true class")
    figure.savefig(picture, dpi=120)


def model_card(config: Any, manifest: dict[str, Any], parameters: str) -> str:
    """README.md of a run folder: what the adapter is, how it was trained, how to load it."""
    results, train = manifest["results"], manifest["data"]["train"]
    loss = f"{results['eval_loss']:.4f}" if results.get("eval_loss") is not None else "not measured"
    name, folder = config.model.name, config.output.dir
    converted = name == SAMPLE or name.endswith(".gguf")
    source = f"locate({name!r})" if converted else repr(name)
    folder_import = "from etude.models import locate\n" if converted else ""
    return f"""---
base_model: {scalar(name)}
library_name: peft
tags: [lora, etude]
---

# {_cell(Path(folder).name)}

A LoRA adapter for {_code(name)} ({manifest["base"]["identity"]}), trained with Etude
{manifest["environment"]["libraries"]["etude"]}. {parameters}.

| | |
| --- | --- |
| data | {_cell(_code(config.dataset.train))}, {train["kept"]:,} rows, format {train["format"]} |
| rank, alpha, layers | {config.lora.r}, {config.lora.alpha:g}, {_cell(", ".join(config.lora.target_modules))} |
| steps | {results["steps"]:,} of {config.training.batch_size * config.training.gradient_accumulation_steps} examples |
| learning rate | {config.training.learning_rate:g}, {config.training.lr_scheduler} |
| validation loss | {loss} nats a token |

{_code(command("etude", "chat", Path(folder)))} talks to it;
{_code(command("etude", "evaluate", Path(folder), "--base"))} measures it;
{_code(command("etude", "train", Path(folder, "config.yml"), "output.dir=runs/again"))} trains it
again. With PEFT alone:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
{folder_import}
base = AutoModelForCausalLM.from_pretrained({source})
model = PeftModel.from_pretrained(base, {folder!r})
```

`manifest.json` tells versions, seeds, data fingerprints and the chat format.
"""


# --- evaluation ------------------------------------------------------------------------------


def _percent(figures: dict[str, Any], key: str) -> str:
    interval = figures["intervals"][key]
    value = figures["accuracy"] if key == "accuracy" else figures["macro"]["f1"]
    return f"{value:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def perplexity(figures: dict[str, Any]) -> str:
    """The perplexity of `figures`; where it is beyond all numbers, the loss that it would come from."""
    value = figures["perplexity"]
    return f"over 1e308 (loss {figures['loss']:.1f})" if value is None else f"{value:.2f}"


def overridden(result: dict[str, Any]) -> list[str]:
    """A sentence about settings that decide the figures and are not those of the run, if any."""
    changed = result.get("overridden") or {}
    if not changed:
        return []
    shown = "; ".join(
        f"{key} {scalar(values['now']):.80} (was {scalar(values['before']):.80})"
        for key, values in changed.items()
    )
    return [f"measured with other settings than the run's or the defaults: {shown}"]


def summary(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The comparison table: its head (metric, then one column a model) and its rows."""
    models: dict[str, dict[str, Any]] = result["models"]
    first = next(iter(models.values()))
    rows: list[tuple[str, Any]] = []
    if first["kind"] == "classification":
        level = f"{first['intervals']['level']:.0%} interval"
        rows += [(f"accuracy [{level}]", lambda f: _percent(f, "accuracy"))]
        rows += [(f"macro F1 [{level}]", lambda f: _percent(f, "macro_f1"))]
        for name in ("precision", "recall"):
            rows += [(f"macro {name}", lambda f, name=name: f"{f['macro'][name]:.3f}")]
        rows += [("weighted F1", lambda f: f"{f['weighted']['f1']:.3f}")]
        for label in first["labels"]:
            rows += [
                (f"F1 of {label}", lambda f, label=label: f"{f['per_class'][label]['f1']:.3f}")
            ]
        if any(figures["unparseable"] for figures in models.values()):
            rows += [("unparseable answers", lambda f: str(f["unparseable"]))]
    else:
        rows += [("perplexity of the references", perplexity)]
        if "exact_match" in first:
            rows += [
                ("exact match", lambda f: f"{f['exact_match']:.3f}"),
                ("ROUGE-L", lambda f: f"{f['rouge_l']:.3f}"),
                ("chrF", lambda f: f"{f['chrf']:.1f}"),
                ("ended by itself", lambda f: f"{f['finished']:.1%}"),
                ("quality (heuristics)", lambda f: f"{f['quality']:.2f}"),
                (
                    "good / fair / poor",
                    lambda f: " / ".join(map(str, f["quality_labels"].values())),
                ),
            ]
    head = ["", *models]
    return head, [[name, *(show(figures) for figures in models.values())] for name, show in rows]


def verdict(result: dict[str, Any]) -> str:
    """One sentence: base against tuned by the paired test; empty when there is nothing to compare."""
    test = result.get("comparison")
    if not test:
        return ""
    p_value = "p < 0.0001" if test["p_value"] < 1e-4 else f"p = {test['p_value']:.4f}"
    if "only_first_right" in test:
        return (
            f"On the same rows, tuned alone is right {test['only_second_right']} times and base alone "
            f"{test['only_first_right']} times (McNemar's exact test: {p_value})."
        )
    return (
        f"The reference is likelier under tuned in {test['second_likelier']} rows and under base in "
        f"{test['first_likelier']} (Wilcoxon's signed-rank test: {p_value})."
    )


def _rows(source: dict[str, Any]) -> str:
    return f"{source['rows']:,} rows"


def evaluation_tables(result: dict[str, Any]) -> list[Any]:
    """What the terminal shows: the comparison, the confusion matrices, the verdict."""
    head, rows = summary(result)
    source = result["data"]
    table = Table(
        *head,
        box=box.SIMPLE,
        title=f"{result['target']} on {source['drawn'] or _rows(source)} of {source['source']}",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    blocks: list[Any] = [table]
    for name, figures in result["models"].items():
        if figures["kind"] == "classification":
            confusion = Table(
                "true \\ predicted", *figures["columns"], box=box.SIMPLE, title=f"confusion, {name}"
            )
            for label, counts in zip(figures["labels"], figures["confusion"], strict=True):
                confusion.add_row(label, *map(str, counts))
            blocks.append(confusion)
    return [*blocks, verdict(result)] if verdict(result) else blocks


def evaluation_markdown(result: dict[str, Any], pictures: dict[str, str], said: str) -> str:
    """report.md of an evaluation."""
    head, rows = summary(result)
    source = result["data"]
    parts = [
        f"# {_line(result['target'])}",
        f"{source['drawn'] or _rows(source)} of {_code(source['source'])} (format {source['format']}, "
        f"method {result['method']})"
        + (f"; base {_code(result['base'])}." if result["base"] else "."),
        "\n".join(
            f"- dropped: {len(lines):,} ({reason})" for reason, lines in source["dropped"].items()
        ),
        _markdown_table(head, rows),
        *map(_line, overridden(result)),
        verdict(result),
    ]
    for name, figures in result["models"].items():
        if figures["kind"] == "classification":
            counts = [
                [label, *map(str, row)]
                for label, row in zip(figures["labels"], figures["confusion"], strict=True)
            ]
            scores = [
                [
                    label,
                    *(f"{of[key]:.3f}" for key in ("precision", "recall", "f1")),
                    str(of["support"]),
                ]
                for label, of in figures["per_class"].items()
            ]
            parts += [
                f"## {name}",
                _markdown_table(["class", "precision", "recall", "F1", "rows"], scores),
                _markdown_table(["true \\ predicted", *figures["columns"]], counts),
                f"![confusion matrix of {name}]({pictures[name]})",
            ]
    return "\n\n".join(part for part in [*parts, said] if part) + "\n"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], rule: str = "---:") -> str:
    lines = [head, ["---", *[rule] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    return " ".join(text.splitlines())


def _code(text: str) -> str:
    """Text as code within a line, fenced by more backticks than it holds in a row."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{_line(text)}{pad}{fence}"


def write_evaluation(
    result: dict[str, Any], measured: dict[str, dict[str, Any]], rows: Sequence[Row], folder: Path
) -> None:
    """Write predictions.jsonl (every row, every answer), the pictures, report.md, and last report.json.

    Each is whole or not at all; a folder with a report.json has them all.

    Raises:
        FileExistsError: one of them is there already.
    """
    with files.scratch(folder) as work:
        with (work / "predictions.jsonl").open("w", encoding="utf-8") as stream:
            for at, row in enumerate(rows):
                line: dict[str, Any] = {"line": row.line, "text": row.text}
                line |= {"messages": row.messages, "label": row.label, "quality": row.quality}
                for name, figures in measured.items():
                    if "said" in figures:
                        line[name] = {
                            "predicted": figures["predicted"][at],
                            "said": figures["said"][at],
                        }
                kept = {k: v for k, v in line.items() if v}
                stream.write(json.dumps(kept, ensure_ascii=False, allow_nan=False) + "\n")
        classified = [n for n, f in result["models"].items() if f["kind"] == "classification"]
        pictures = {name: f"confusion-{name}.png" for name in classified}
        for name, file in pictures.items():
            figures = result["models"][name]
            confusion_plot(figures, f"{name}: accuracy {figures['accuracy']:.3f}", work / file)
        text = evaluation_markdown(result, pictures, _examples(measured, rows))
        (work / "report.md").write_text(text, encoding="utf-8")
        text = json.dumps(result, indent=1, allow_nan=False)
        (work / "report.json").write_text(text, encoding="utf-8")
        for file in ("predictions.jsonl", *pictures.values(), "report.md", "report.json"):
            files.flush(work / file)
            files.place(work / file, folder / file)


def _examples(measured: dict[str, dict[str, Any]], rows: Sequence[Row], count: int = 5) -> str:
    """The first few responses side by side, as markdown; empty for classifications."""
    responses = {
        name: figures["said"]
        for name, figures in measured.items()
        if figures["kind"] == "responses" and "said" in figures
    }
    if not responses:
        return ""
    lines = [
        [
            row.messages[-2]["content"] if len(row.messages) > 1 else "",
            row.messages[-1]["content"],
            *(said[at] for said in responses.values()),
        ]
        for at, row in enumerate(rows[:count])
    ]
    return "## Responses\n\n" + _markdown_table(["prompt", "reference", *responses], lines, "---")
