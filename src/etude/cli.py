"""`etude train | evaluate | chat | ...`: the programs under one name."""

from pathlib import Path
from typing import Annotated

import typer

from etude import chat, evaluation, terminal, train_with_config
from etude import config as configuration
from etude.errors import UserError

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
        with file.open("x", encoding="utf-8") as stream:
            stream.write(configuration.to_yaml(configuration.Config()))
    except FileExistsError:
        raise UserError(
            f"{file} exists and is not overwritten; give another name: etude init other.yml"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from None
    terminal.out.print(f"Wrote {file}. Edit it, then: etude validate {file}; etude train {file}")


@app.command()
@terminal.command
def validate(
    arguments: train_with_config.Arguments = None,
    config: train_with_config.ConfigFile = None,
    preset: train_with_config.Presets = None,
) -> None:
    """Check the configuration and read the data, without loading a model."""
    settings = train_with_config.load_config(arguments or [], config, preset or [])
    tables = train_with_config.read_tables(settings)
    for split, table in tables.items():
        labels = f", labels {', '.join(table.labels)}" if table.labels else ""
        terminal.out.print(
            f"{split:<10} {table.source}: {len(table.rows):,} rows, format {table.format}{labels}"
        )
    terminal.out.print("The configuration is valid.")


@app.command("version")
def show_version() -> None:
    """Print Etude's version."""
    from importlib.metadata import version

    typer.echo(f"etude {version('etude')}")


def main() -> None:
    """Entry point of the `etude` command."""
    app()
