"""config.yml in, a trained run out."""

import dataclasses
import datetime
import json
import logging
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from etude import batching, data, device, lora, models, report, runs, terminal
from etude import config as configuration
from etude.config import Config
from etude.errors import UserError
from etude.foreign import expanded

log = logging.getLogger(__name__)


Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]",
        help="config file (./config.yml), then settings: lora.r=16",
        show_default=False,
    ),
]
ConfigFile = Annotated[Path | None, typer.Option(help="config file, as an option")]
Presets = Annotated[
    list[str] | None,
    typer.Option(help=f"{', '.join(configuration.preset_names())}, or a .yml file"),
]


# About so many tokens of the training rows show the int8 base how large its inputs get.
CALIBRATION = 2048
RESOLVED = ("dataset.labels", "model.revision")


@terminal.command
def train(
    arguments: Arguments = None,
    config: ConfigFile = None,
    preset: Presets = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the unfinished run in output.dir, if any")
    ] = False,
) -> None:
    """Fine-tune a model with LoRA as the configuration says."""
    settings = load_config(arguments or [], config, preset or [])
    folder, checkpoint = open_folder(settings, resume)

    # The data is read before the model is loaded: its faults show in a second, not after minutes.
    tables = read_tables(settings)
    folder.mkdir(parents=True, exist_ok=True)
    place = device.choose(
        settings.model.dtype,
        settings.training.use_cpu,
        settings.training.fp16,
        settings.training.bf16,
    )
    terminal.say("device", place.why)
    terminal.quiet_transformers()
    base = models.load(
        settings.model.name,
        place,
        settings.model.revision,
        settings.model.quantization,
    )
    renderer = runs.renderer_for(base, settings)
    terminal.say("model", f"{base.name} ({base.identity[:19]})")

    examples, reports = {}, {}
    for split, table in tables.items():
        examples[split], reports[split] = data.encode(table, renderer, settings.dataset, split)
    show_data(examples, reports, base.tokenizer)

    import transformers

    # Before the adapter is made: its A starts at random.
    transformers.set_seed(settings.training.seed)
    model = lora.attach(base.model, settings.lora, base.name)
    parameters = str(lora.count(model))
    terminal.say(
        "adapter", f"r={settings.lora.r} on {', '.join(settings.lora.target_modules)}: {parameters}"
    )

    settings = resolved(settings, tables["train"], base)
    start_folder(folder, checkpoint, tables, base)
    (folder / runs.CONFIG).write_text(configuration.to_yaml(settings), encoding="utf-8")
    results = fit(model, settings, place, examples, folder, checkpoint)

    lora.save(model, folder)
    manifest = make_manifest(settings, base, renderer.state(), reports, tables, results)
    (folder / "README.md").write_text(
        report.model_card(settings, manifest, parameters), encoding="utf-8"
    )
    # Last of what matters: a folder with a manifest is a finished run.
    (folder / runs.MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    report.loss_plot(folder / runs.METRICS, folder / "loss.png")
    show_end(settings, results)


def load_config(arguments: list[str], option: Path | None, presets: list[str]) -> Config:
    """The configuration from a file (an argument, --config, or ./config.yml), presets and settings.

    Raises:
        UserError: no configuration at all, two files, or faults in it.
    """
    name, overrides = terminal.split_arguments(arguments)
    if name and option:
        raise UserError(f"command line: two configurations, {name} and {option}; give one")
    path = Path(name) if name else option
    if path is None and Path(runs.CONFIG).is_file():
        path = Path(runs.CONFIG)
    if path is None and not presets:
        raise UserError(
            "There is no config.yml here. Write one with `etude init`, or name yours: etude train FILE"
        )
    return configuration.load(path, presets, overrides)


def open_folder(settings: Config, resume: bool) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint to go on from.

    Raises:
        UserError: the folder holds something already, or other settings than those to go on with.
    """
    folder = expanded(settings.output.dir)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return folder, None
    if not (folder / runs.CONFIG).is_file():
        raise UserError(
            f"output.dir: {folder} exists and is not a run; choose another: output.dir=runs/NAME"
        )
    free = next(name for n in range(2, 10**6) if not (name := Path(f"{folder}-{n}")).exists())
    if (folder / runs.MANIFEST).is_file():
        raise UserError(
            f"output.dir: {folder} holds a finished run, which is never overwritten. Choose another folder "
            f"(output.dir={free}), or remove that one"
        )
    # The Trainer writes its state last: a checkpoint without it is half a one.
    checkpoints = sorted(
        (
            path.parent
            for path in (folder / runs.CHECKPOINTS).glob("checkpoint-*/trainer_state.json")
        ),
        key=step_of,
    )
    if not checkpoints:  # it came to nothing, so there is nothing to lose
        return folder, None
    if not resume:
        raise UserError(
            f"output.dir: {folder} holds a run that did not end. Go on with it: --resume; or start another: "
            f"output.dir={free}"
        )
    stored = configuration.load(folder / runs.CONFIG)
    differing = [
        key
        for key in configuration.key_paths()
        if configuration.value(stored, key) != configuration.value(settings, key)
        # What was left open at the start was written out when it was found.
        and not (key in RESOLVED and configuration.value(settings, key) is None)
    ]
    if differing:
        raise UserError(
            f"--resume: {folder} was started with other settings: "
            + "; ".join(
                f"{k} {configuration.value(stored, k)} (now {configuration.value(settings, k)})"
                for k in differing
            )
            + f". Go on with its own: etude train {folder / runs.CONFIG} --resume output.dir={folder}"
        )
    return folder, checkpoints[-1]


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was made."""
    return int(checkpoint.name.rpartition("-")[2])


def start_folder(
    folder: Path, checkpoint: Path | None, tables: dict[str, data.Table], base: models.Base
) -> None:
    """Note what the run starts from; on resume, hold that against what it started from.

    Raises:
        UserError: the data or the base changed in between.
    """
    facts = {
        "base": base.identity,
        **{f"{split} data": table.fingerprint for split, table in tables.items()},
        "labels": tables["train"].labels,
    }
    file = folder / runs.STARTED
    if checkpoint is None:
        (folder / runs.METRICS).unlink(missing_ok=True)
        file.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        return
    stored = runs.read_json(file)
    differing = [key for key in facts if facts[key] != stored.get(key)]
    if differing:
        raise UserError(
            f"--resume: since {folder} was started, these changed: {', '.join(differing)}. Bring "
            "them back, or start another run: output.dir=runs/NAME"
        )
    # What was logged after the checkpoint is about to happen again; a torn last line goes too.
    metrics = folder / runs.METRICS
    lines = [line for line in report.read_metrics(metrics) if line["step"] <= step_of(checkpoint)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_tables(settings: Config) -> dict[str, data.Table]:
    """The training and, if any, validation rows; the test set is looked at only for rows it shares.

    Raises:
        UserError: data that cannot be used.
    """
    dataset, seed = settings.dataset, settings.training.seed
    table = data.read(dataset.train, dataset)
    labelled = dataset.model_copy(update={"labels": table.labels})
    others = {
        name: data.read(source, labelled)
        for name, source in (("validation", dataset.validation), ("test", dataset.test))
        if source
    }
    for name, other in others.items():
        if other.format != table.format:
            raise UserError(
                f"dataset.{name}: {other.source} has format {other.format}, and {table.source} {table.format}; "
                "all splits must have one"
            )
        shared = data.overlap(table, other, name)
        if shared:
            terminal.notice(shared)
    tables = {"train": table}
    if "validation" in others:
        tables["validation"] = others["validation"]
    else:
        train_part, validation = data.split_rows(table, dataset.validation_split, seed)
        tables = {"train": train_part} | ({"validation": validation} if validation else {})
    if dataset.validation_split and "validation" not in tables:
        terminal.notice("no validation: there are too few different rows to cut one from train")
    for name, used in tables.items():
        if used.unused:
            columns = ", ".join(f"{column} ({n:,})" for column, n in used.unused.items())
            terminal.notice(f"{name}: columns that nothing reads: {columns}")
    tables["train"] = data.sample(tables["train"], dataset.max_rows, seed)
    return tables


def show_data(
    examples: dict[str, list[Any]],
    reports: dict[str, data.Report],
    tokenizer: Any,
) -> None:
    """Print the fate of all rows, and two examples as the model sees them."""
    from rich.text import Text

    for item in reports.values():
        terminal.say("data", f"{item.split}: {item.source} (format {item.format})")
    terminal.out.print(report.data_table(list(reports.values())))
    for item in reports.values():
        if item.labels:
            terminal.say(
                "labels",
                f"{item.split}: " + ", ".join(f"{k} {v:,}" for k, v in sorted(item.labels.items())),
            )
        for notice in item.notices():
            terminal.notice(notice)
    for number, example in enumerate(examples["train"][:2], 1):
        terminal.say("example", f"{number}, the supervised part marked:")
        for text, supervised in data.spans(example, tokenizer):
            # Where there is no colour, brackets mark it.
            plain = supervised and not terminal.out.is_terminal
            style = "green underline" if supervised else "dim"
            shown = terminal.printable(f"⟦{text}⟧" if plain else text)
            terminal.out.print(Text(shown, style=style), end="")
        terminal.out.print()


def resolved(settings: Config, table: data.Table, base: models.Base) -> Config:
    """The configuration with what was found written out: the labels, and the Hub's commit."""
    dataset = settings.dataset.model_copy(update={"labels": table.labels})
    kind, _, commit = base.identity.partition(":")
    model = (
        settings.model.model_copy(update={"revision": commit})
        if kind == "commit"
        else settings.model
    )
    return settings.model_copy(update={"dataset": dataset, "model": model})


def fit(
    model: Any,
    settings: Config,
    place: device.Device,
    examples: dict[str, list[Any]],
    folder: Path,
    checkpoint: Path | None,
) -> dict[str, Any]:
    """Train `model` in place and return the results; the best adapter by validation loss is in it at the end.

    Raises:
        UserError: a warm-up that is not shorter than the training, or a loss that is not finite.
    """
    import transformers

    from etude import trainer

    steps = trainer.steps(settings, len(examples["train"]))
    if settings.training.warmup_steps >= 1 and settings.training.warmup_steps >= steps:
        raise UserError(
            f"training.warmup_steps: {settings.training.warmup_steps:g} is not shorter than the training, which has "
            f"{steps} steps; lower it, or give a share such as 0.03"
        )
    cutter, engine = prepare(model, settings, place, examples["train"], steps)
    terminal.say("engine", engine)
    if checkpoint:
        terminal.say("resume", f"from {checkpoint}")
    rows = settings.training.batch_size * settings.training.gradient_accumulation_steps
    terminal.say("training", f"{steps} steps of {rows} rows")
    callbacks: list[Any] = []
    if settings.training.early_stopping_patience and "validation" in examples:
        callbacks.append(
            transformers.EarlyStoppingCallback(settings.training.early_stopping_patience)
        )
    started = time.perf_counter()
    with terminal.Progress(settings.training.logging_steps) as progress:
        recorder = trainer.Recorder(folder, progress.update)
        loop = trainer.StepTrainer(
            cutter=cutter,
            model=model,
            args=trainer.arguments(settings, place, folder, "validation" in examples),
            train_dataset=examples["train"],
            eval_dataset=examples.get("validation"),
            callbacks=[*callbacks, recorder],
        )
        recorder.trainer = loop
        loop.remove_callback(transformers.PrinterCallback)
        try:
            loop.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except KeyboardInterrupt:
            saved = any((folder / runs.CHECKPOINTS).glob("checkpoint-*/trainer_state.json"))
            raise KeyboardInterrupt(
                f"stopped at step {loop.state.global_step} of {steps}; "
                + (
                    f"go on with: etude train {folder / runs.CONFIG} --resume output.dir={folder}"
                    if saved
                    else "no checkpoint was made yet"
                )
            ) from None
    if not all(value.isfinite().all() for value in model.parameters() if value.requires_grad):
        raise UserError(
            "The adapter holds numbers that are not finite, so it was not saved. Lower "
            "training.learning_rate, or use float32 in place of float16"
        )
    seconds = time.perf_counter() - started
    return {
        "steps": loop.state.global_step,
        "seconds": round(seconds, 1),
        "examples_per_second": round(
            (loop.state.global_step - recorder.first_step) * rows / seconds, 2
        ),
        "train_loss": loop.step_loss,
        "eval_loss": loop.state.best_metric,
        "engine": engine,
    }


def prepare(
    model: Any, settings: Config, place: device.Device, examples: list[Any], steps: int
) -> tuple[batching.Cutter, str]:
    """Make `model` fast, in place: its passes, its base in int8, its layers compiled; and say what was done.

    Raises:
        UserError: int8 where it would not be faster.
    """
    import torch

    from etude import compiled, int8

    training = settings.training
    cutter = batching.Cutter.of(model, training.batch_size, settings.dataset.max_length)
    if cutter.why_padded:
        terminal.notice(f"plain padded batches instead of packed ones: {cutter.why_padded}")
    done = ["padded passes" if cutter.why_padded else f"packed passes of {cutter.budget} tokens"]
    step = examples[: training.batch_size * training.gradient_accumulation_steps]
    tokens = steps * sum(batch.input_ids.numel() for batch in cutter(step))
    worth_it = place.name == "cpu" and compiled.operations(model, tokens) >= compiled.WORTH_IT
    if settings.model.quantization == "int8":
        reason = int8.why_not(model, cutter.budget, place.torch_dtype)
        if reason:
            raise UserError(f"model.quantization: int8: {reason}. Set it to null")
        rows = max(4, CALIBRATION // max(map(len, examples[:CALIBRATION])))
        int8.quantize(model, cutter(examples[:rows]), place.torch_dtype)
        cutter = dataclasses.replace(cutter, dtype=place.torch_dtype)
        done.append("int8 base")
    if training.compile is True or (training.compile == "auto" and worth_it):
        terminal.say("compile", "the decoder layers, about half a minute on two cores")
        # In the format in which the steps will run, or they would compile everything again.
        half = torch.float16 if training.fp16 else torch.bfloat16
        with torch.autocast(place.name, half, enabled=training.fp16 or training.bf16):
            reason = compiled.compile_layers(model, next(cutter(step)))
        if reason:
            terminal.notice(f"not compiled, so slower: {reason}")
        else:
            done.append("compiled layers")
    return cutter, ", ".join(done)


def make_manifest(
    settings: Config,
    base: models.Base,
    chat_format: dict[str, Any],
    reports: dict[str, data.Report],
    tables: dict[str, data.Table],
    results: dict[str, Any],
) -> dict[str, Any]:
    """Everything that is needed to know how the adapter came about, as JSON values."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "base": {"name": base.name, "identity": base.identity, "device": base.device.why},
        "seed": settings.training.seed,
        "chat_format": chat_format,
        "data": {
            split: {**dataclasses.asdict(item), "sha256": tables[split].fingerprint}
            for split, item in reports.items()
        },
        "results": results,
        "environment": runs.environment(),
    }


def show_end(settings: Config, results: dict[str, Any]) -> None:
    """Print what came out and what can be done with it."""
    loss = (
        "" if results["eval_loss"] is None else f", best validation loss {results['eval_loss']:.4f}"
    )
    terminal.say(
        "done",
        f"{results['steps']} steps in {results['seconds']:.0f} s{loss}; saved in {settings.output.dir}",
    )
    terminal.say("next", f"etude evaluate {settings.output.dir} --base")
    terminal.say("", f"etude chat {settings.output.dir}")


if __name__ == "__main__":
    terminal.run(train)
