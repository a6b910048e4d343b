"""config.yml in, a trained run out."""

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from etude import console, distributed, files, screen
from etude.config.loading import load_config, preset_names
from etude.config.schema import Config
from etude.data import dataset, splits
from etude.engine.setup import configure_engine
from etude.errors import UserError, command
from etude.models import device, loading, lora
from etude.runs import card, manifest, opening, plots, proof
from etude.runs import folder as run
from etude.training import memory, planning, resuming
from etude.training.reporter import Reporter

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]",
        help="config file (./config.yml), then settings: lora.r=16",
        show_default=False,
    ),
]
ConfigFile = Annotated[Path | None, typer.Option(help="config file, the same as CONFIG")]
Presets = Annotated[
    list[str] | None, typer.Option(help=f"{', '.join(preset_names())}, or a .yml file")
]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="continue even if settings, data or base changed, or memory is short"
    ),
]


@console.command
def train(
    arguments: Arguments = None,
    config: ConfigFile = None,
    preset: Presets = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="continue the unfinished run in output.dir; by default, if there is one",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Fine-tune a model with LoRA as the configuration says."""
    settings = config_from(arguments or [], config, preset or [])
    done = run_training(settings, screen.Screen(), resume, force)
    if distributed.FIRST:
        show_end(settings, done.results)


def config_from(arguments: list[str], option: Path | None, presets: list[str]) -> Config:
    """The configuration from a file (an argument, --config, or ./config.yml), presets and settings.

    Raises:
        UserError: no configuration at all, two files, or faults in it.
    """
    name, overrides = console.split_arguments(arguments)
    if name and option:
        raise UserError(f"command line: two configurations, {name} and {option}; give one")
    path = name or option or (run.CONFIG if Path(run.CONFIG).is_file() else None)
    if path is None and not presets:
        raise UserError(
            "There is no config.yml here. Write one with `etude init`, or name yours: etude train FILE"
        )
    return load_config(path, presets, overrides)


@dataclass(frozen=True)
class Run:
    """A training that has ended, its adapter verified.

    Attributes:
        folder: adapter, manifest and all else; see docs/run-folder.md.
        results: steps, seconds, losses and memory, as in its manifest.json.
    """

    folder: Path
    results: dict[str, Any]


def run_training(
    settings: Config,
    reporter: Reporter,
    resume: bool | None = None,
    force: bool = False,
    repeated: dict[str, Any] | None = None,
) -> Run:
    """Train as `settings` say; with `repeated`, the manifest of a run, from its very data and base.

    Raises:
        UserError: whatever stands in the way, or a proof that fails.
        Stopped: a signal came; the run can be resumed.
    """
    training = settings.training
    distributed.check_launcher("fp16" if training.fp16 else "bf16" if training.bf16 else "no")
    folder = Path(settings.output.dir)
    resuming.refuse_taken(folder)
    # One of several processes writes for all.
    lock = run.locked(folder) if distributed.FIRST else contextlib.nullcontext()
    with lock:
        return train_in(folder, settings, reporter, resume, force, repeated)


def train_in(
    folder: Path,
    settings: Config,
    reporter: Reporter,
    resume: bool | None,
    force: bool,
    repeated: dict[str, Any] | None,
) -> Run:
    """Train in `folder`, in which no other process writes: load, train, save, verify."""
    checkpoint = resuming.open_folder(settings, resume, force)
    # The data is read before the model is loaded: its faults show in a second, not after minutes.
    tables = read_tables(settings, reporter)
    if repeated:
        resuming.check_data(repeated, tables)
    # For a template that writes it: a run that goes on, or is repeated, has the day it began with.
    date = manifest.recorded_date(folder) if checkpoint else opening.today()
    if repeated:
        date = manifest.date_of(repeated["chat_format"]) or date
    plan = planning.plan_training(settings, tables, reporter, date, force)
    base, model = load_model(settings, plan, reporter, repeated)
    settings = resuming.with_found(settings, tables["train"], base)
    if distributed.FIRST:
        resuming.start_folder(folder, checkpoint, settings, tables, base, force, plan.renderer.date)
        reporter.log_to(folder / run.LOG)
    results = fit(model, settings, plan, folder, checkpoint, reporter)
    if distributed.FIRST:
        adapter = save_adapter(folder, model, settings, plan, results)
        parameters = str(lora.count(model))
        # The new process needs the memory in which this one holds its model.
        base = dataclasses.replace(base, model=None)
        del model
        device.free_memory()
        reporter.say("proof", proof.in_a_new_process(folder))
        facts = manifest.make_manifest(settings, base, plan.renderer.state(), plan.splits, results)
        finish(folder, settings, facts | {"adapter": adapter}, parameters)
    return Run(folder, results)


def read_tables(settings: Config, reporter: Reporter) -> dict[str, dataset.Table]:
    """The training and, if any, validation rows; reports what was found in reading them.

    Raises:
        UserError: data that cannot be used.
    """
    tables, notices = splits.read_splits(settings.dataset, settings.training.seed)
    for notice in notices:
        reporter.notice(notice)
    return tables


def load_model(
    settings: Config,
    plan: planning.Planned,
    reporter: Reporter,
    repeated: dict[str, Any] | None = None,
) -> tuple[loading.Base, Any]:
    """The base with its weights, and the same model with a new adapter."""
    import transformers

    model = settings.model
    base = loading.load_base(
        model.name, plan.device, model.revision, model.quantization, plan.outline
    )
    if repeated:
        lora.check_base("the run to repeat", repeated["base"]["identity"], base.identity)
    reporter.say("model", f"{base.name} ({base.identity[:19]})")
    # Before the adapter is made: its A starts at random.
    transformers.set_seed(settings.training.seed)
    tuned = lora.attach(base.model, settings.lora, base.name, base.identity)
    layers = ", ".join(settings.lora.target_modules)
    reporter.say("adapter", f"r={settings.lora.r} on {layers}: {lora.count(tuned)}")
    return base, tuned


def fit(
    model: Any,
    settings: Config,
    plan: planning.Planned,
    folder: Path,
    checkpoint: Path | None,
    reporter: Reporter,
) -> dict[str, Any]:
    """Make `model` fast, train it in place, and return the results; the best adapter is in it at the end."""
    from etude.training import trainer

    examples, training = plan.examples, settings.training
    engine = configure_engine(model, settings, plan.device, examples["train"], plan.steps)
    for notice in engine.notices:
        reporter.notice(notice)
    cutter = memory.rehearse(model, engine.cutter, examples["train"], settings)
    reporter.say("engine", str(engine))
    if checkpoint:
        reporter.say("resume", f"from {checkpoint}")
    reporter.say("training", f"{plan.steps} steps of {training.rows_per_step} examples")
    with reporter.progress(training.logging_steps) as on_step:
        results = trainer.fit(
            model, settings, plan.device, examples, folder, cutter, checkpoint, on_step
        )
    results["engine"] = str(engine)
    results["memory"] = {
        "plan": dataclasses.asdict(plan.memory),
        "planned": plan.memory.peak,
        "peak": device.used_memory(plan.device.name, peak=True),
    }
    return results


def save_adapter(
    folder: Path, model: Any, settings: Config, plan: planning.Planned, results: dict[str, Any]
) -> dict[str, str]:
    """Write the adapter, and what a new process must find there; returns its SHA-256 for the manifest."""
    with files.scratch(folder) as work:
        lora.save(model, work)
        for name in (lora.WEIGHTS, lora.ADAPTER_CONFIG):  # PEFT adds a card, and ours comes later
            run.move_in(folder, work / name)
    fingerprints = {name: split.table.fingerprint for name, split in plan.splits.items()}
    loss = results["eval_loss"]
    return {"sha256": proof.expect(folder, model, settings, plan.examples, fingerprints, loss)}


def finish(folder: Path, settings: Config, facts: dict[str, Any], parameters: str) -> None:
    """Write the model card, the plot of the losses and, last, the manifest: with it a run is finished."""
    run.write_file(folder, run.CARD, card.model_card(settings, facts, parameters))
    with files.scratch(folder) as work:
        plots.loss_plot(folder / run.METRICS, work / run.PICTURE)
        run.move_in(folder, work / run.PICTURE)
    run.write_file(folder, run.MANIFEST, json.dumps(facts, indent=1, allow_nan=False))


def show_end(settings: Config, results: dict[str, Any]) -> None:
    """Print what came out and what can be done with it."""
    best = results["eval_loss"]
    loss = "" if best is None else f", best validation loss {best:.4f}"
    seconds, folder = f"{results['seconds']:.0f} s", Path(settings.output.dir)
    console.say("done", f"{results['steps']} steps in {seconds}{loss}; saved in {folder}")
    console.say("next", command("etude", "evaluate", folder, "--base"))
    console.say("", command("etude", "chat", folder))


if __name__ == "__main__":
    typer.run(train)
