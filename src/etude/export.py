"""A run in, a model for other programs out: merged, written, opened again and proven."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from etude import console, files
from etude.errors import UserError
from etude.exports import folder, merged, proof, questions
from etude.runs import opening
from etude.runs.manifest import current_environment

RECORD = "export.json"


@console.command
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="the new folder of the export")],
    kind: Annotated[
        Literal["f32", "f16", "bf16"] | None,
        typer.Option("--type", help="number format of the weights (default: the base's own)"),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="rows to prove it on (default: the run's validation rows)")
    ] = None,
) -> None:
    """Write a run as one model that transformers, vLLM and mlx-lm load, and prove that it is the run's."""
    out = files.expanded(str(out))
    with folder.new(out) as place:
        record = write_and_prove(files.expanded(run), place, kind, data)
        (place / RECORD).write_text(json.dumps(record, indent=1, allow_nan=False), encoding="utf-8")
        size = sum(file.stat().st_size for file in place.iterdir())
    console.say("saved", f"{out}: {size / 1e9:.2f} GB, weights in {record['type']}")


def write_and_prove(run: Path, place: Path, kind: str | None, data: str | None) -> dict[str, Any]:
    """Write the export of `run` into the folder `place`, prove it, and return the figures.

    Raises:
        UserError: no run, rows that cannot be read, or an export that is another model; with the stage.
    """
    # Whatever the base was trained in: merged in float32, nothing is rounded twice.
    target = opening.open_target(str(run), ["model.dtype=float32", "model.quantization=null"])
    if target.adapter is None:
        raise UserError(f"{run} is a model and no run, so there is nothing to merge; give a run")
    console.err.print(f"device    {target.base.device.why}")
    asked = questions.read(target, data)
    tuned = target.with_adapter()
    trained = proof.measure(target, tuned, asked, console.bar)
    kind = kind or merged.stored_type(target)
    merged.write(target, tuned, kind, place)
    record = {
        "run": str(run),
        "base": {"name": target.base.name, "identity": target.base.identity},
        "type": kind,
        "environment": current_environment(),
    }
    del target, tuned  # the new process needs their memory
    console.say("written", "now opened by transformers alone, in a new process")
    figures = proof.prove(place, kind, asked, trained)
    show(figures)
    return {**record, **figures}


def show(figures: dict[str, Any]) -> None:
    """Print the proof, stage by stage."""
    template, loss, labels = figures["template"], figures["loss"], figures["labels"]
    spelled = template["spelled"]
    console.say("rows", f"{figures['rows']} of {figures['source']}")
    console.say(
        "template",
        f"{template['same']} of {template['of']} prompts have the training's token ids"
        + (f"; {spelled} not compared, for they spell control tokens" if spelled else ""),
    )
    console.say("stops at", ", ".join(figures["stop_tokens"]))
    console.say(
        "loss",
        f"{loss['export']:.4f} nats a token, {loss['trained']:.4f} trained: difference "
        f"{loss['difference']:+.2g} ({loss['level']:.0%}: {loss['low']:+.2g} to {loss['high']:+.2g}); "
        f"base {loss['base']:.4f}",
    )
    if labels:
        console.say(
            "labels",
            f"{labels['export']:.1%} right, {labels['trained']:.1%} trained; "
            f"{labels['changed']} of {figures['rows']} predictions changed",
        )
    answers = figures["answers"]
    console.say("answers", f"{answers['same']} of {answers['of']} greedy answers are the same")
