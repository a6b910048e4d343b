"""`etude train | evaluate | chat | ...`: the programs under one name."""

from pathlib import Path
from typing import Annotated

import typer

from etude import chat, data, evaluation, files, models, proof, runs, terminal, train_with_config
from etude import config as configuration
from etude.errors import UserError, command
from etude.foreign import expanded

app = typer.Typer(
    help="Fine-tune a small language model with LoRA from one YAML file, measure it, chat with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train_with_config.train)
app.command()(evaluation.evaluate)
app.command()(chat.chat)


@app.command()
@terminal.command
def init(
    file: Annotated[Path, typer.Argument(help="where to write it")] = Path("config.yml"),
) -> None:
    """Write a config.yml with every key, its default and what it does."""
    try:
        files.write_new(file, configuration.to_yaml(configuration.Config()).encode())
    except FileExistsError:
        raise UserError(
            f"{file} exists and is not overwritten; give another name: etude init other.yml"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from None
    then = "; ".join(command("etude", program, file) for program in ("validate", "train"))
    terminal.out.print(f"Wrote {file}. Edit it, then: {then}")


@app.command()
@terminal.command
def validate(
    arguments: train_with_config.Arguments = None,
    config: train_with_config.ConfigFile = None,
    preset: train_with_config.Presets = None,
) -> None:
    """Check the configuration, read the data, and plan memory and time, without the model's weights."""
    settings = train_with_config.load_config(arguments or [], config, preset or [])
    terminal.say("config", "valid")
    tables = train_with_config.read_tables(settings)
    for split, table in tables.items():
        labels = f", labels {', '.join(table.labels)}" if table.labels else ""
        rows = f"{len(table.rows):,} rows, format {table.format}{labels}"
        terminal.say("read", f"{split}: {table.source}: {rows}")
    place = train_with_config.choose_device(settings)
    terminal.quiet_transformers()
    outline = models.outline(settings.model.name, settings.model.revision)
    renderer = runs.renderer_for(outline, settings)
    examples, reports = train_with_config.encode(
        tables, renderer, settings, models.window(outline.config)
    )
    train_with_config.show_data(examples, reports, outline.tokenizer)
    planned, fits = train_with_config.make_plan(settings, outline, place, examples)
    fitting = "and the training fits" if fits else "but by the plan the training does not fit"
    terminal.say("result", f"valid{f', {fitting} in memory' if planned else ''}")


@app.command()
@terminal.command
def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run folder")],
) -> None:
    """Prove that a run's adapter lives: its tensors, logits and loss are those of its training."""
    folder = expanded(run)
    settings = runs.open_config(run, [])
    expected = proof.read_expected(folder)
    terminal.quiet_transformers()
    table, split = None, expected["loss"]["split"]
    try:
        table = train_with_config.read_tables(settings).get(split)
    except UserError as error:
        terminal.notice(str(error))
    target = runs.open_target(run, [])
    examples = None
    if table and table.fingerprint == expected["loss"]["data"]:
        examples, _ = data.encode(
            table,
            target.renderer,
            settings.dataset,
            split,
            models.window(target.base.model.config),
        )
        examples = examples[: expected["loss"]["rows"]]
    terminal.say("proof", proof.examine(run, target, expected, examples))


@app.command()
@terminal.command
def reproduce(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run's folder")],
    out: Annotated[
        Path | None, typer.Option(help="folder of the second run; else RUN-reproduced")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="go on although memory is short")] = False,
) -> None:
    """Train a run again from its manifest and compare: exit code 0 if it is the same, else 1."""
    terminal.start_log()
    folder = expanded(str(run))
    if not (folder / runs.MANIFEST).is_file():
        raise UserError(f"{run}: not a finished run (no {runs.MANIFEST}), so it cannot be repeated")
    manifest = runs.read_manifest(folder, "config", "data")
    try:
        settings = configuration.check(manifest["config"], {})
    except UserError as error:
        raise UserError(f"{folder / runs.MANIFEST}: its config is damaged: {error}") from None
    whole = folder.resolve()
    again = expanded(str(out)) if out else whole.with_name(f"{whole.name}-reproduced")
    output = settings.output.model_copy(update={"dir": str(again)})
    settings = settings.model_copy(update={"output": output})
    elsewhere = runs.environment_differences(manifest.get("environment", {}), runs.environment())
    for difference in elsewhere:
        terminal.notice(f"since the first training: {difference}")
    train_with_config.run_training(settings, force=force, again=manifest)
    found = proof.compare_runs(folder, again)
    terminal.say("losses", found.losses)
    terminal.say("adapter", found.adapter)
    if found.same:
        terminal.say("result", f"{again} is {folder}, bit for bit")
        return
    excused = elsewhere or not manifest["base"].get("device", "cpu").startswith("cpu")
    if excused and found.close:
        why = "the environment differs" if elsewhere else "a GPU does not add in one order"
        terminal.say(
            "result", f"the same within {proof.REPEATED:.0%} of each loss, not bit for bit: {why}"
        )
        return
    terminal.say("result", f"{again} is not {folder}; the figures stand above", "bold red")
    raise typer.Exit(1)


@app.command("version")
def show_version() -> None:
    """Print Etude's version."""
    from importlib.metadata import version

    typer.echo(f"etude {version('etude')}")


def main() -> None:
    """Entry point of the `etude` command."""
    app()
