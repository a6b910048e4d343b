"""config.yml in, a trained run out."""

import contextlib
import dataclasses
import datetime
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from etude import console, distributed, files
from etude.config.loading import (
    check_config,
    key_paths,
    load_config,
    preset_names,
    to_yaml,
    value_at,
)
from etude.config.schema import Config
from etude.conversation.renderer import Example
from etude.data import dataset
from etude.engine import packing
from etude.errors import UserError, command, shortage
from etude.files import expanded
from etude.models import device, loading, lora
from etude.runs import opening, plots, proof, report
from etude.runs.card import model_card
from etude.runs.folder import (
    CARD,
    CHECKPOINTS,
    CONFIG,
    LOG,
    MANIFEST,
    METRICS,
    PICTURE,
    PRODUCTS,
    STARTED,
    another_folder,
    begin_run,
    entries,
    how_to_continue,
    is_finished,
    locked,
    move_in,
    read_started,
    refuse_foreign,
    write_file,
)
from etude.runs.manifest import (
    Started,
    current_environment,
    date_of,
    environment_differences,
    read_form,
    read_metrics,
    recorded_date,
)
from etude.training import checkpoints, order, rehearsal
from etude.training import memory as plan

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
    typer.Option(help=f"{', '.join(preset_names())}, or a .yml file"),
]


# About so many tokens of the training rows show the int8 base how large its inputs get.
CALIBRATION = 2048
BRACKETS = ("⟦⟧", "⟪⟫", "⦃⦄", "⦅⦆", "⟨⟩")  # around supervised text and control tokens in examples
RESOLVED = ("dataset.labels", "model.revision")
# The sections that decide what is learnt; a resumed training must have the same.
TRAINED_BY = ("model", "lora", "dataset", "training")


@console.command
def train(
    arguments: Arguments = None,
    config: ConfigFile = None,
    preset: Presets = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="go on with the unfinished run in output.dir; by default, if there is one",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="go on although settings, data or base changed, or memory is short"
        ),
    ] = False,
) -> None:
    """Fine-tune a model with LoRA as the configuration says."""
    settings = config_from(arguments or [], config, preset or [])
    with resumable(expanded(settings.output.dir)):
        run_training(settings, resume, force)


def run_training(
    settings: Config,
    resume: bool | None = None,
    force: bool = False,
    again: dict[str, Any] | None = None,
) -> None:
    """Train as `settings` say; with `again`, the manifest of a run, from its very data and base.

    Raises:
        UserError: whatever stands in the way, or a proof that fails.
    """
    console.start_log()
    training = settings.training
    distributed.check_launcher("fp16" if training.fp16 else "bf16" if training.bf16 else "no")
    folder = expanded(settings.output.dir)
    refuse_taken(folder)
    # One of several processes writes for all.
    with locked(folder) if distributed.FIRST else contextlib.nullcontext():
        _train_in(folder, settings, resume, force, again)


def _train_in(
    folder: Path,
    settings: Config,
    resume: bool | None,
    force: bool,
    again: dict[str, Any] | None,
) -> None:
    """Train in `folder`, in which no other process writes."""
    folder, checkpoint = open_folder(settings, resume, force)

    # The data is read before the model is loaded: its faults show in a second, not after minutes.
    tables = read_tables(settings)
    if again:
        check_data(again, tables)
    place = choose_device(settings)
    console.quiet_transformers()
    # Whether it fits is known from the model's shape, before its weights are loaded.
    outline = loading.outline(settings.model.name, settings.model.revision)
    # For a template that writes it: a run that goes on, or is repeated, has the day it began with.
    date = recorded_date(folder) if checkpoint else opening.today()
    if again:
        date = date_of(again["chat_format"]) or date
    renderer = opening.renderer_for(outline, settings, date)
    window = loading.window(outline.config)
    splits = dataset.encode_splits(tables, renderer, settings.dataset, window)
    examples = {name: split.examples for name, split in splits.items()}
    show_data(splits, outline.tokenizer)
    steps = order.step_count(settings, len(examples["train"]))
    planned, _ = make_plan(settings, outline, place, examples, steps, force)

    base = loading.load(
        settings.model.name,
        place,
        settings.model.revision,
        settings.model.quantization,
        outline,
    )
    if again:
        lora.check_base("the run to repeat", again["base"]["identity"], base.identity)
    console.say("model", f"{base.name} ({base.identity[:19]})")

    import transformers

    from etude.training import trainer

    # Before the adapter is made: its A starts at random.
    transformers.set_seed(settings.training.seed)
    model = lora.attach(base.model, settings.lora, base.name, base.identity)
    parameters = str(lora.count(model))
    console.say(
        "adapter", f"r={settings.lora.r} on {', '.join(settings.lora.target_modules)}: {parameters}"
    )

    settings = resolved(settings, tables["train"], base)
    if distributed.FIRST:
        start_folder(folder, checkpoint, settings, tables, base, force, renderer.date)
        console.log_to(folder / LOG)
    cutter, engine = prepare(model, settings, place, examples["train"], steps)
    cutter = rehearsal.rehearse(model, cutter, examples, settings)
    console.say("engine", engine)
    if checkpoint:
        console.say("resume", f"from {checkpoint}")
    console.say("training", f"{steps} steps of {settings.training.rows_per_step} examples")
    with console.training_progress(settings.training.logging_steps) as show:
        results = trainer.fit(
            model, settings, place, examples, folder, cutter, checkpoint,
            lambda step: show(*step),
        )  # fmt: skip
    results["engine"] = engine
    results["memory"] = {
        "plan": planned and dataclasses.asdict(planned),
        "planned": planned and planned.peak,
        "peak": device.used_memory(place.name, peak=True),
    }
    if not distributed.FIRST:
        return

    with files.scratch(folder) as work:
        lora.save(model, work)
        for name in (lora.WEIGHTS, lora.ADAPTER_CONFIG):  # PEFT adds a card, and ours comes later
            move_in(folder, work / name)
    fingerprints = {split: table.fingerprint for split, table in tables.items()}
    digest = proof.expect(folder, model, settings, examples, fingerprints, results["eval_loss"])
    # The new process needs the memory in which this one holds its model.
    base = dataclasses.replace(base, model=None)
    del model
    device.free_memory()
    console.say("proof", proof.in_a_new_process(folder))
    manifest = make_manifest(settings, base, renderer.state(), splits, results)
    manifest["adapter"] = {"sha256": digest}
    write_file(folder, CARD, model_card(settings, manifest, parameters))
    with files.scratch(folder) as work:
        plots.loss_plot(folder / METRICS, work / PICTURE)
        move_in(folder, work / PICTURE)
    # Last: a folder with a manifest is a finished run.
    write_file(folder, MANIFEST, json.dumps(manifest, indent=1, allow_nan=False))
    show_end(settings, results)


@contextlib.contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Where memory or disk end a training, say how it goes on, if there is a checkpoint to go on from.

    Raises:
        UserError: what the machine lacks.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lack = shortage(error, folder)
        if not lack:
            raise
        newest, _ = checkpoints.newest(folder / CHECKPOINTS)
        then = f"; then {how_to_continue(folder)}" if newest else ""
        raise UserError(f"{lack}{then}") from error


def choose_device(settings: Config) -> device.Device:
    """The device and number format of a training, told with the reason."""
    model, training = settings.model, settings.training
    place = device.choose(model.dtype, training.use_cpu, training.fp16, training.bf16)
    console.say("device", place.why)
    return place


def config_from(arguments: list[str], option: Path | None, presets: list[str]) -> Config:
    """The configuration from a file (an argument, --config, or ./config.yml), presets and settings.

    Raises:
        UserError: no configuration at all, two files, or faults in it.
    """
    name, overrides = console.split_arguments(arguments)
    if name and option:
        raise UserError(f"command line: two configurations, {name} and {option}; give one")
    path = Path(name) if name else option
    if path is None and Path(CONFIG).is_file():
        path = Path(CONFIG)
    if path is None and not presets:
        raise UserError(
            "There is no config.yml here. Write one with `etude init`, or name yours: etude train FILE"
        )
    return load_config(path, presets, overrides)


def open_folder(
    settings: Config, resume: bool | None, force: bool = False
) -> tuple[Path, Path | None]:
    """The run's folder, and the newest checkpoint that verifies, to go on from.

    Raises:
        UserError: the folder holds what this run did not write, other settings than those to go on
            with, no checkpoint that is whole; or `resume` and nothing to go on with.
    """
    folder = expanded(settings.output.dir)
    refuse_taken(folder)
    if distributed.FIRST and read_started(folder):
        # The configuration is compared below, and is replaced only where it must be.
        refuse_foreign(folder, [name for name in PRODUCTS if name != CONFIG])
    other = another_folder(folder)
    checkpoint, corrupt = checkpoints.newest(folder / CHECKPOINTS)
    for notice in corrupt:
        console.notice(notice)
    if checkpoint is None and corrupt:
        raise UserError(
            f"output.dir: {folder} holds no checkpoint that is whole, so there is nothing to go on from. "
            f"Start another run: {other}"
        )
    if checkpoint is None and (folder / lora.WEIGHTS).exists():
        raise UserError(
            f"output.dir: {folder} holds an adapter and no checkpoint to go on from, so training there would "
            f"replace it. Start another run: {other}"
        )
    if checkpoint is None:  # it came to nothing, so there is nothing to lose
        if resume:
            raise UserError(f"--resume: {folder} holds no checkpoint to go on from; leave it out")
        return folder, None
    if resume is False:
        raise UserError(
            f"output.dir: {folder} holds a run that did not end. Go on with it: leave --no-resume out; or "
            f"start another: {other}"
        )
    # As noted at the start, for config.yml may have been edited since.
    facts = read_started(folder) or {}
    noted = facts.get("config")
    stored = check_config(noted, {}) if isinstance(noted, dict) else load_config(folder / CONFIG)
    differing = {
        key: (value_at(stored, key), value_at(settings, key))
        for key in key_paths()
        if key.partition(".")[0] in TRAINED_BY
        # What was left open at the start was written out when it was found.
        and not (key in RESOLVED and value_at(settings, key) is None)
    }
    processes = checkpoints.read_progress(checkpoint)["processes"]
    differing["processes"] = (processes, distributed.WORLD)
    changes = "; ".join(
        f"{key} {before} (now {now})" for key, (before, now) in differing.items() if before != now
    )
    if changes:
        program = ["etude", "train"]
        if processes > 1:
            program = ["torchrun", "--nproc_per_node", str(processes), "-m", train.__module__]
        same = command(*program, folder / CONFIG, "--resume", f"output.dir={folder}")
        refuse_unless(
            force,
            f"{folder} was started with other settings: {changes}. Go on with its own: "
            f"{same}; start another run: {other}; or go on all the same: --force",
        )
    return folder, checkpoint


def refuse_taken(folder: Path) -> None:
    """Raise UserError if `folder` holds a finished run, or anything that no training of Etude wrote."""
    if folder.exists() and not folder.is_dir():
        raise UserError(
            f"output.dir: {folder} exists and is no folder; choose another: {another_folder(folder)}"
        )
    there = entries(folder) if folder.is_dir() else []
    if there and is_finished(folder):
        raise UserError(
            f"output.dir: {folder} holds a finished run, which is never overwritten. Choose another folder: "
            f"{another_folder(folder)}"
        )
    if there and read_started(folder) is None:
        more = f" and {len(there) - 5:,} more" if len(there) > 5 else ""
        raise UserError(
            f"output.dir: {folder} is not a run: it holds {', '.join(there[:5])}{more}, which no training of "
            f"Etude wrote there, and which stays as it is. Choose another folder: {another_folder(folder)}"
        )


def refuse_unless(force: bool, problem: str) -> None:
    """Raise `problem` as a UserError, or with `force` only tell it."""
    if not force:
        raise UserError(f"--resume: {problem}")
    console.notice(f"--force: {problem}")


def check_data(manifest: dict[str, Any], tables: dict[str, dataset.Table]) -> None:
    """Hold the rows against those that the run of `manifest` was trained on.

    Raises:
        UserError: they changed.
    """
    stored = {split: facts.get("sha256") for split, facts in manifest["data"].items()}
    now = {split: table.fingerprint for split, table in tables.items()}
    changed = sorted(key for key in stored.keys() | now.keys() if stored.get(key) != now.get(key))
    if changed:
        files = ", ".join(sorted({table.source for table in tables.values()}))
        raise UserError(
            f"The data changed since the run was trained ({', '.join(changed)}; read from {files}), so "
            "it cannot be repeated. Bring the files back as they were, or train a new run"
        )


def start_folder(
    folder: Path,
    checkpoint: Path | None,
    settings: Config,
    tables: dict[str, dataset.Table],
    base: loading.Base,
    force: bool,
    date: datetime.date | None = None,
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
    environment = current_environment()
    metrics, lines = folder / METRICS, []
    if checkpoint:
        stored = read_form(folder / STARTED, Started)
        for difference in environment_differences(stored["environment"], environment):
            console.notice(f"since the training began: {difference}")
        differing = [key for key in facts if facts[key] != stored.get(key)]
        if differing:
            refuse_unless(
                force,
                f"since {folder} was started, these changed: {', '.join(differing)}. Bring them back, "
                f"start another run: {another_folder(folder)}; or go on all the same: --force",
            )
        # What was logged after the checkpoint is about to happen again; a torn last line goes too.
        step = checkpoints.step_of(checkpoint)
        lines = [line for line in read_metrics(metrics) if line["step"] <= step]
    files.clear(folder)
    # The date that the template writes: of a resumed run, the one that it was begun with.
    started = {**facts, "date": date and date.isoformat(), "environment": environment}
    begin_run(folder, started | {"config": settings.model_dump(mode="json")})
    # One that was edited and says the same stays as it is, its comments too.
    file = folder / CONFIG
    if not file.exists() or load_config(file) != settings:
        write_file(folder, CONFIG, to_yaml(settings))
    write_file(folder, METRICS, "".join(json.dumps(line) + "\n" for line in lines))


def read_tables(settings: Config) -> dict[str, dataset.Table]:
    """The training and, if any, validation rows; prints what was found in reading them.

    Raises:
        UserError: data that cannot be used.
    """
    tables, notices = dataset.read_splits(settings.dataset, settings.training.seed)
    for notice in notices:
        console.notice(notice)
    return tables


def make_plan(
    settings: Config,
    outline: loading.Outline,
    place: device.Device,
    examples: dict[str, list[Example]],
    steps: int,
    force: bool = False,
) -> tuple[plan.Plan | None, bool]:
    """Print what the training will take in memory and time, if it can be told; and whether it fits.

    Raises:
        UserError: more than there is, and not `force`.
    """
    planned, fits = plan.estimate(settings, outline, place, examples, steps), False
    if planned:
        console.out.print(report.plan_table(planned.rows()))
        console.say("plan", f"{planned}, {steps:,} steps")
        fits = plan.check(planned, settings, outline, place, examples, steps, force)
    return planned, fits


def show_data(splits: dict[str, dataset.Split], tokenizer: Any) -> None:
    """Print the fate of all rows, and two examples as the model sees them."""
    reports = [split.report for split in splits.values()]
    for item in reports:
        drawn = f", drawn: {item.drawn}" * bool(item.drawn)
        console.say("data", f"{item.split}: {item.source} (format {item.format}{drawn})")
    console.out.print(report.data_table(reports))
    for item in reports:
        if item.labels:
            console.say(
                "labels",
                f"{item.split}: " + ", ".join(f"{k} {v:,}" for k, v in sorted(item.labels.items())),
            )
        for notice in item.notices():
            console.notice(notice)
    for number, example in enumerate(splits["train"].examples[:2], 1):
        show_example(number, example, tokenizer)


def show_example(number: int, example: Example, tokenizer: Any) -> None:
    """Print an example with its supervised part and its control tokens marked.

    Where there is no colour, brackets mark them; control tokens only if its text spells some.
    """
    from rich.text import Text

    stretches = list(dataset.spans(example, tokenizer))
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    typed = "\0".join(text for text, _, control in stretches if not control)
    mark = any(token in typed for token in special)
    coloured = console.out.is_terminal and console.out.color_system is not None
    whole = "".join(text for text, _, _ in stretches)
    # Brackets that the text does not hold, so that they cannot be its own.
    pairs = [pair for pair in BRACKETS if not set(pair) & set(whole)] or BRACKETS
    outer, inner = pairs[0], pairs[-1]
    tokens = ", control tokens too" if coloured else f" {outer}, control tokens {inner}"
    console.say("example", f"{number}, the supervised part marked{tokens if mark else ''}:")
    line, inside = Text(), False
    for text, supervised, control in [*stretches, ("", False, False)]:
        style = "green underline" if supervised else "dim"
        if control and coloured:
            style = "bold " + style.replace("dim", "cyan")
        if not coloured:
            text = f"{inner[0]}{text}{inner[1]}" if control and mark else text
            text = outer[inside] + text if supervised != inside else text
        inside = supervised
        line.append(console.printable(text), style=style)
    console.out.print(line)


def resolved(settings: Config, table: dataset.Table, base: loading.Base) -> Config:
    """The configuration with what was found written out: the labels, and the Hub's commit."""
    found = settings.dataset.model_copy(update={"labels": table.labels})
    kind, _, commit = base.identity.partition(":")
    model = (
        settings.model.model_copy(update={"revision": commit})
        if kind == "commit"
        else settings.model
    )
    return settings.model_copy(update={"dataset": found, "model": model})


def prepare(
    model: Any, settings: Config, place: device.Device, examples: list[Any], steps: int
) -> tuple[packing.Cutter, str]:
    """Make `model` fast, in place: its passes, its base in int8, its layers compiled; and say what was done.

    Raises:
        UserError: int8 where it would not be faster.
    """
    import torch

    from etude.engine import compiling, int8

    training = settings.training
    cutter = packing.Cutter.of(model, training.batch_size, settings.dataset.max_length, examples)
    if cutter.why_padded:
        console.notice(f"plain padded batches instead of packed ones: {cutter.why_padded}")
    done = ["padded passes" if cutter.why_padded else f"packed passes of {cutter.budget} tokens"]
    step = examples[: training.rows_per_step]
    tokens = steps * sum(batch.input_ids.numel() for batch in cutter(step))
    worth_it = place.name == "cpu" and compiling.operations(model, tokens) >= compiling.WORTH_IT
    if settings.model.quantization == "int8":
        reason = int8.why_not(model, cutter.budget, place.torch_dtype)
        if reason:
            raise UserError(f"model.quantization: int8: {reason}. Set it to null")
        rows = max(4, CALIBRATION // max(map(len, examples[:CALIBRATION])))
        int8.quantize(model, cutter(examples[:rows]), place.torch_dtype)
        cutter = dataclasses.replace(cutter, dtype=place.torch_dtype)
        done.append("int8 base")
    if training.compile is True or (training.compile == "auto" and worth_it):
        console.say("compile", "the decoder layers, about half a minute on two cores")
        # In the format in which the steps will run, or they would compile everything again.
        half = torch.float16 if training.fp16 else torch.bfloat16
        with torch.autocast(place.name, half, enabled=training.fp16 or training.bf16):
            reason = compiling.compile_layers(model, next(cutter(step)))
        if reason:
            console.notice(f"not compiled, so slower: {reason}")
        else:
            done.append("compiled layers")
    return cutter, ", ".join(done)


def make_manifest(
    settings: Config,
    base: loading.Base,
    chat_format: dict[str, Any],
    splits: dict[str, dataset.Split],
    results: dict[str, Any],
) -> dict[str, Any]:
    """Everything that is needed to know how the adapter came about, as JSON values."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "base": {"name": base.name, "identity": base.identity, "device": base.device.why},
        "seed": settings.training.seed,
        "config": settings.model_dump(mode="json"),
        "chat_format": chat_format,
        "data": {
            name: {**dataclasses.asdict(split.report), "sha256": split.table.fingerprint}
            for name, split in splits.items()
        },
        "results": results,
        "environment": current_environment(),
    }


def show_end(settings: Config, results: dict[str, Any]) -> None:
    """Print what came out and what can be done with it."""
    loss = (
        "" if results["eval_loss"] is None else f", best validation loss {results['eval_loss']:.4f}"
    )
    console.say(
        "done",
        f"{results['steps']} steps in {results['seconds']:.0f} s{loss}; saved in {settings.output.dir}",
    )
    folder = Path(settings.output.dir)
    console.say("next", command("etude", "evaluate", folder, "--base"))
    console.say("", command("etude", "chat", folder))


if __name__ == "__main__":
    console.run(train)
