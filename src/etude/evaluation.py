"""A run or a base in, a report out: a whole data set with metrics, or a single text."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from etude import console
from etude.conversation.encoding import RenderError
from etude.errors import UserError
from etude.measure import labels, responses
from etude.model import Model, read_table
from etude.models import lora
from etude.runs import evaluations, opening, report
from etude.runs.folder import MANIFEST
from etude.runs.manifest import changes_since, read_manifest


@console.command
def evaluate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN [KEY=VALUE]",
            help="a run folder or a model name, then settings: evaluation.method=generate",
        ),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="measure the base, too")] = False,
    data_file: Annotated[
        str | None, typer.Option("--data", help="data set to measure (default: dataset.test)")
    ] = None,
    text: Annotated[str | None, typer.Option(help="one text instead of a data set")] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of the report (default: RUN/evaluation)")
    ] = None,
) -> None:
    """Measure a model: labels or responses against a data set, or the response to one text."""
    name, overrides = console.split_arguments(arguments or [])
    if name is None:
        raise UserError(
            "command line: which run or model? For example: etude evaluate runs/quickstart"
        )
    # Config and data first: their faults show before a model is loaded.
    settings = opening.open_config(name, overrides)
    if base and not lora.is_adapter(Path(name)):
        raise UserError(f"--base compares a run with its base, and {name} is no run; leave it out")
    if text is not None:
        if not text.strip() or data_file or out:
            raise UserError("--text takes one text that is not empty, and neither --data nor --out")
        for title, model in models(name, overrides, base):
            console.say(title, name if title == "tuned" else model.target.base.name)
            show_text(model, text)
        return
    table = read_table(settings, data_file)
    judged = [row for row in table.rows if row.quality]
    if judged:
        if base:
            raise UserError(
                f"{table.source} gives the quality of its own completions, so no model is "
                "measured; leave --base out"
            )
        table = dataclasses.replace(table, rows=judged, drawn="")
    # Before the long part: a folder that cannot be made is an error now, and no other process takes it.
    with evaluations.report_folder(name, out) as folder:
        if judged:
            measured = {"heuristics": labels.judge_completions(table, settings)}
        else:
            measured = {
                title: model.measure(table, console.bar)
                for title, model in models(name, overrides, base)
            }
        result = evaluations.assemble(name, settings, table, measured, overrides)
        report.write_evaluation(result, measured, table.rows, folder)
    for block in report.evaluation_tables(result):
        console.out.print(block)
    console.say("saved", f"{folder}/report.md, report.json, predictions.jsonl")


def models(name: str, overrides: list[str], with_base: bool) -> Iterator[tuple[str, Model]]:
    """The models to measure, one after the other in the same memory: base, then tuned."""
    target = opening.open_target(name, overrides)
    console.err.print(f"device    {target.base.device.why}")
    if (Path(name) / MANIFEST).is_file():
        for difference in changes_since(read_manifest(Path(name))["environment"]):
            console.notice(f"since the training: {difference}")
    if with_base:
        yield "base", Model(target, target.base.model)
    yield ("tuned" if target.adapter else "model"), Model(target, target.tuned())


def show_text(model: Model, text: str) -> None:
    """Answer one text; print the labels' probabilities or the response's quality and perplexity."""
    settings, prompt = model.config, model.prompt(text)
    if settings.dataset.labels:
        shares = model.score(text)
        for label in sorted(shares, key=lambda name: shares[name], reverse=True):
            console.out.print(f"{label:<16} {shares[label]:6.1%}")
    response, _ = model.respond(prompt, settings.generation)
    console.say("response", response.text)
    if settings.dataset.labels:
        return
    judgement = responses.judge(text, response, settings)
    parts = ", ".join(f"{name} {share:.2f}" for name, share in judgement["shares"].items())
    console.say("quality", f"{judgement['label']} ({judgement['score']:.2f}: {parts})")
    if response.text:
        renderer = model.target.renderer
        try:
            figures = responses.own_perplexity(model.network, renderer, prompt, response, settings)
        except RenderError as error:  # thoughts of a reasoning model, say
            console.say("perplexity", f"not measured: {error}")
            return
        value = report.perplexity(figures)
        console.say("perplexity", f"{value} of the response under the model itself")


if __name__ == "__main__":
    typer.run(evaluate)
