"""`etude train | evaluate | chat | ...`: the programs under one name."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from etude import __version__, chat, console, evaluation, export, files, screen, train_with_config
from etude.config.loading import json_schema, load_config, to_yaml
from etude.config.schema import Config
from etude.errors import UserError, command
from etude.runs import comparison, listing, proof
from etude.runs.folder import MANIFEST
from etude.runs.manifest import changes_since, read_manifest
from etude.training import planning

SCHEMA = "config.schema.json"  # beside config.yml, where editors find it by the first line there
MODELINE = f"# yaml-language-server: $schema={SCHEMA}\n"

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def examples(*lines: str) -> str:
    """The end of a help page."""
    return "\n\n".join(["Examples:", *lines])


app.command(
    epilog=examples(
        "etude train config.yml --preset quickstart",
        "etude train my.yml training.learning_rate=1e-4 output.dir=runs/second",
        "etude train my.yml   (again: resumes what was interrupted)",
    )
)(train_with_config.train)
app.command(
    epilog=examples(
        "etude evaluate runs/quickstart --base",
        'etude evaluate runs/quickstart --text "What a wonderful day"',
        "etude evaluate smollm2-135m --data rows.jsonl evaluation.max_rows=200",
    )
)(evaluation.evaluate)
app.command(
    epilog=examples(
        "etude chat runs/quickstart",
        'etude chat runs/quickstart --prompt "Hello" generation.temperature=0',
        "etude chat runs/quickstart --compare",
    )
)(chat.chat)
app.command(
    epilog=examples(
        "etude export runs/quickstart exports/quickstart",
        "etude export runs/quickstart exports/half --type f16",
        "etude export runs/quickstart exports/again --data rows.jsonl",
    )
)(export.export)


def print_version(wanted: bool) -> None:
    """Print Etude's version and exit, if that is wanted."""
    if wanted:
        typer.echo(f"etude {__version__}")
        raise typer.Exit


@app.callback(
    epilog=examples(
        "etude init my.yml             write every key with its default",
        "etude validate my.yml         check keys and data, estimate memory and time",
        "etude train my.yml            train; the result is a folder under runs/",
        "etude evaluate runs/default   measure it",
        "etude chat runs/default       talk to it",
        "etude export runs/default out write it for other programs",
    )
)
def etude(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=print_version, help="print the version"),
    ] = False,
) -> None:
    """Fine-tune a small language model with LoRA from one YAML file, measure it, chat with it."""


@app.command(epilog=examples("etude init", "etude init my.yml"))
@console.command
def init(
    file: Annotated[Path, typer.Argument(help="where to write it")] = Path("config.yml"),
) -> None:
    """Write a config.yml with every key, its default and its meaning, and its JSON Schema."""
    try:
        files.write_text(file, f"{MODELINE}{to_yaml(Config())}", new=True)
        if not os.path.lexists(file.with_name(SCHEMA)):
            files.write_text(file.with_name(SCHEMA), json_schema(), new=True)
    except FileExistsError:
        raise UserError(
            f"{file} exists and is not overwritten; give another name: etude init other.yml"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from None
    then = "; ".join(command("etude", program, file) for program in ("validate", "train"))
    console.out.print(f"Wrote {file}. Edit it, then: {then}")


@app.command()
@console.command
def schema() -> None:
    """Print the JSON Schema of config.yml, with which editors complete and check keys."""
    console.out.print(json_schema(), end="")


@app.command(
    epilog=examples(
        "etude validate my.yml", "etude validate --preset quickstart training.batch_size=4"
    )
)
@console.command
def validate(
    arguments: train_with_config.Arguments = None,
    config: train_with_config.ConfigFile = None,
    preset: train_with_config.Presets = None,
) -> None:
    """Check the configuration and the data, and estimate memory and time, without loading the weights."""
    settings = train_with_config.config_from(arguments or [], config, preset or [])
    console.say("config", "valid")
    reporter = screen.Screen()
    tables = train_with_config.read_tables(settings, reporter)
    for split, table in tables.items():
        labels = f", labels {', '.join(table.labels)}" if table.labels else ""
        rows = f"{len(table.rows):,} rows, format {table.format}{labels}"
        console.say("read", f"{split}: {table.source}: {rows}")
    plan = planning.plan_training(settings, tables, reporter)
    fitting = "and the training fits" if plan.fits else "but by the plan the training does not fit"
    console.say("result", f"valid, {fitting} in memory")


@app.command(epilog=examples("etude verify runs/quickstart"))
@console.command
def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder")],
) -> None:
    """Check that a run's adapter still gives the tensors, logits and loss of its training."""
    console.say("proof", proof.verify(run))


@app.command(epilog=examples("etude reproduce runs/quickstart"))
@console.command
def reproduce(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run's folder")],
    out: Annotated[
        Path | None, typer.Option(help="folder of the second run (default: RUN-reproduced)")
    ] = None,
    force: train_with_config.Force = False,
) -> None:
    """Train a run again from its manifest and compare: exit code 0 if it is the same, otherwise 1."""
    if not (run / MANIFEST).is_file():
        raise UserError(f"{run}: not a finished run (no {MANIFEST}), so it cannot be repeated")
    manifest = read_manifest(run)
    folder = out or Path(f"{run.resolve()}-reproduced")
    settings = load_config(None, overrides=[manifest["config"], f"output.dir={folder}"])
    reporter = screen.Screen()
    differences = changes_since(manifest["environment"])
    for difference in differences:
        console.notice(f"since the first training: {difference}")
    done = train_with_config.run_training(settings, reporter, force=force, repeated=manifest)
    train_with_config.show_end(settings, done.results)
    again = done.folder
    same, deviation, figures = comparison.compare_training(run, again)
    console.say("compared", figures)
    if same:
        console.say("result", f"{again} is the same as {run}, bit for bit")
    elif deviation <= comparison.REPEATED and (
        differences or not manifest["base"]["device"].startswith("cpu")
    ):
        why = "the environment differs" if differences else "a GPU does not add in one order"
        within = f"the same within {comparison.REPEATED:.0%} of each loss"
        console.say("result", f"{within}, not bit for bit: {why}")
    else:
        console.say(
            "result", f"{again} is not the same as {run}; the figures are above", "bold red"
        )
        raise typer.Exit(1)


@app.command(epilog=examples("etude runs", "etude runs runs/first runs/second"))
@console.command
def runs(
    names: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FOLDER | RUN RUN]", help="a folder of runs (default: runs), or two runs"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List the runs in a folder, or compare two runs: is the first better than the second?"""
    paths = names or [Path("runs")]
    if len(paths) > 2:
        raise UserError("command line: give one folder of runs, or two runs to compare")
    if len(paths) == 2:
        found: Any = comparison.compare(*paths)
        blocks = comparison.tables(found, *paths)
    else:
        found = listing.list_runs(*paths)
        blocks = listing.tables(found)
    for block in [json.dumps(found, indent=1)] if as_json else blocks:
        console.out.print(block)


def main() -> None:
    """Entry point of the `etude` command."""
    app()
