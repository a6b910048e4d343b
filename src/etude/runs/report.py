"""Tables for the terminal, and the report of an evaluation: report.md, report.json, predictions.jsonl."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from etude import files
from etude.conversation.messages import dumps
from etude.data.formats import Row
from etude.data.report import CUT, TRUNCATED, Report
from etude.measure.calls import functions
from etude.runs import plots


def terminal_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> Table:
    """A table for the terminal, its columns after the first aligned to the right."""
    table = Table(box=box.SIMPLE, title=title or None)
    for name in head:
        table.add_column(name, justify="left" if name == head[0] else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], rule: str = "---:") -> str:
    """A table whose columns after the first are aligned by `rule`."""
    lines = [head, ["---", *[rule] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(markdown_cell(text) for text in row) + " |" for row in lines)


def markdown_cell(text: str) -> str:
    """Text as a cell of a table: on one line, a bar escaped."""
    return " ".join(text.splitlines()).replace("|", "\\|")


def data_table(reports: Sequence[Report]) -> Table:
    """What became of the rows of every split, a column each."""
    figures = {
        "rows": [report.rows for report in reports],
        "kept": [report.kept for report in reports],
        "examples": [report.examples for report in reports],
        "truncated": [
            sum(len(report.noted.get(what, [])) for what in (TRUNCATED, CUT)) for report in reports
        ],
        "dropped": [report.rows - report.kept for report in reports],
        "tokens": [report.tokens for report in reports],
        "tokens lost": [report.lost for report in reports],
        "supervised": [report.supervised for report in reports],
        "longest": [report.longest for report in reports],
    }
    rows = [[name, *(f"{number:,}" for number in numbers)] for name, numbers in figures.items()]
    return terminal_table(["", *(report.split for report in reports)], rows)


def plan_table(rows: Sequence[tuple[str, int, str]]) -> Table:
    """What a training takes in memory, part by part."""
    table = terminal_table(
        ["memory", "GB", ""], [[name, f"{size / 1e9:.2f}", remark] for name, size, remark in rows]
    )
    table.columns[2].justify = "left"
    return table


def shown(figures: dict[str, Any]) -> dict[str, str]:
    """The figures of one model by name, as every report prints them."""
    if figures["kind"] != "classification":
        rows = {"perplexity of the references": perplexity(figures)}
        if "exact_match" in figures:
            rows |= {
                "exact match": f"{figures['exact_match']:.3f}",
                "ROUGE-L": f"{figures['rouge_l']:.3f}",
                "chrF": f"{figures['chrf']:.1f}",
                "quality (heuristics)": f"{figures['quality']:.2f}",
                "good / fair / poor": " / ".join(map(str, figures["quality_labels"].values())),
            }
        if "finished" in figures:
            rows["stopped at EOS"] = f"{figures['finished']:.1%}"
        for name, of in figures.get("calls", {}).items():
            rows[f"{name} [{of['level']:.0%} interval]"] = (
                f"{_between(of['share'], of)} of {of['of']:,}"
            )
        if "compared" in figures:
            rows["rows compared in words"] = f"{figures['compared']:,}"
        return rows
    intervals, macro = figures["intervals"], figures["macro"]
    level = f"[{intervals['level']:.0%} interval]"
    rows = {
        f"accuracy {level}": _between(figures["accuracy"], intervals["accuracy"]),
        f"macro F1 {level}": _between(macro["f1"], intervals["macro_f1"]),
        "macro precision": f"{macro['precision']:.3f}",
        "macro recall": f"{macro['recall']:.3f}",
        "weighted F1": f"{figures['weighted']['f1']:.3f}",
    }
    if figures["unparseable"]:
        rows["unparseable answers"] = str(figures["unparseable"])
    return rows


def _between(value: float, ends: dict[str, float]) -> str:
    """A figure with its interval."""
    return f"{value:.3f} [{ends['low']:.3f}, {ends['high']:.3f}]"


def perplexity(figures: dict[str, Any]) -> str:
    """The perplexity of `figures`; where it is beyond all numbers, the loss that it would come from."""
    value = figures["perplexity"]
    return f"over 1e308 (loss {figures['loss']:.1f})" if value is None else f"{value:.2f}"


def summary(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The comparison table: its head (metric, then one column a model) and its rows."""
    models = {name: shown(figures) for name, figures in result["models"].items()}
    names = dict.fromkeys(itertools.chain(*models.values()))
    rows = [[name, *(figures.get(name, "0") for figures in models.values())] for name in names]
    return ["", *models], rows


def verdict(test: dict[str, Any], first: object = "base", second: object = "tuned") -> str:
    """What a paired test of two models on the same rows found, in one sentence."""
    chance = "p < 0.0001" if test["p_value"] < 1e-4 else f"p = {test['p_value']:.4f}"
    if "only_first_right" in test:
        return (
            f"On the same rows, {second} alone is right {test['only_second_right']} times and {first} "
            f"alone {test['only_first_right']} times (McNemar's exact test: {chance})."
        )
    return (
        f"The reference is likelier under {second} in {test['second_likelier']} rows and under {first} "
        f"in {test['first_likelier']} (Wilcoxon's signed-rank test: {chance})."
    )


def _classes(result: dict[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Of each model that classified a table: as what each class was predicted, and its scores."""
    return {
        name: (
            ["true \\ predicted", *figures["columns"], "precision", "recall", "F1"],
            [
                [label, *map(str, counts)]
                + [
                    f"{figures['per_class'][label][key]:.3f}"
                    for key in ("precision", "recall", "f1")
                ]
                for label, counts in zip(figures["labels"], figures["confusion"], strict=True)
            ],
        )
        for name, figures in result["models"].items()
        if figures["kind"] == "classification"
    }


def _measured_on(result: dict[str, Any]) -> str:
    data = result["data"]
    return data["drawn"] or f"{data['rows']:,} rows"


def evaluation_tables(result: dict[str, Any]) -> list[Any]:
    """What the terminal shows: the comparison, a table of the classes for each model, the verdict."""
    title = f"{result['target']} on {_measured_on(result)} of {result['data']['source']}"
    blocks: list[Any] = [terminal_table(*summary(result), title)]
    blocks += [terminal_table(*table, name) for name, table in _classes(result).items()]
    if "comparison" in result:
        blocks.append(verdict(result["comparison"]))
    return blocks


def evaluation_markdown(result: dict[str, Any], examples: str) -> str:
    """report.md of an evaluation."""
    data, base = result["data"], result["base"]
    parts = [
        f"# {markdown_cell(result['target'])}",
        f"{_measured_on(result)} of `{markdown_cell(data['source'])}` (format {data['format']}, method "
        f"{result['method']}){f'; base `{markdown_cell(base)}`' if base else ''}.",
        "\n".join(
            f"- dropped: {len(lines):,} ({reason})" for reason, lines in data["dropped"].items()
        ),
        markdown_table(*summary(result)),
        *(f"- given: {markdown_cell(setting)}" for setting in result["given"]),
        verdict(result["comparison"]) if "comparison" in result else "",
    ]
    for name, table in _classes(result).items():
        picture = f"![confusion matrix of {name}]({_picture(name)})"
        parts += [f"## {name}", markdown_table(*table), picture]
    return "\n\n".join(part for part in [*parts, examples] if part) + "\n"


def _picture(name: str) -> str:
    return f"confusion-{name}.png"


def write_evaluation(
    result: dict[str, Any], measured: dict[str, dict[str, Any]], rows: Sequence[Row], folder: Path
) -> None:
    """Write predictions.jsonl (every row, every answer), the pictures, report.md, and last report.json.

    Each is whole or not at all; a folder with a report.json has them all.

    Raises:
        FileExistsError: one of them is there already.
    """
    lines = [
        json.dumps(_prediction(row, measured, at), ensure_ascii=False, allow_nan=False) + "\n"
        for at, row in enumerate(rows)
    ]
    texts = {
        "predictions.jsonl": "".join(lines),
        "report.md": evaluation_markdown(result, _examples(measured, rows)),
        "report.json": json.dumps(result, indent=1, allow_nan=False),
    }
    with files.scratch(folder) as work:
        for name, figures in measured.items():
            if figures["kind"] == "classification":
                title = f"{name}: accuracy {figures['accuracy']:.3f}"
                plots.confusion_plot(figures, title, work / _picture(name))
                files.put(work / _picture(name), folder / _picture(name), new=True)
    for name, text in texts.items():
        files.write_text(folder / name, text, new=True)


def _prediction(row: Row, measured: dict[str, dict[str, Any]], at: int) -> dict[str, Any]:
    """The line of predictions.jsonl about `row`, the one at `at`: what each model made of it."""
    line: dict[str, Any] = {"line": row.line, "text": row.text, "messages": row.messages}
    line |= {"label": row.label, "quality": row.quality}
    for name, figures in measured.items():
        found = {"predicted": "predicted", "said": "said", "called": "called", "loss": "losses"}
        line[name] = {key: figures[many][at] for key, many in found.items() if many in figures}
    return {key: value for key, value in line.items() if value}


def _examples(measured: dict[str, dict[str, Any]], rows: Sequence[Row], count: int = 5) -> str:
    """The first few responses side by side, as markdown; empty for classifications."""
    responses = {
        name: list(zip(figures["said"], figures["called"], strict=True))
        for name, figures in measured.items()
        if figures["kind"] == "responses" and "said" in figures
    }
    if not responses:
        return ""
    lines = [
        [
            row.messages[-2]["content"] if len(row.messages) > 1 else "",
            _written(
                row.messages[-1]["content"], functions(row.messages[-1].get("tool_calls", []))
            ),
            *(_written(*said[at]) for said in responses.values()),
        ]
        for at, row in enumerate(rows[:count])
    ]
    head = ["prompt", "reference", *responses]
    return "## Responses\n\n" + markdown_table(head, lines, "---")


def _written(text: str, calls: Sequence[dict[str, Any]]) -> str:
    """An answer and its calls in one line."""
    written = (f"{call['name']}({dumps(call['arguments'])})" for call in calls)
    return " ".join(part for part in (text, *written) if part)
