"""The run's folder before a training: whether it is free, and what a training that goes on there must have."""

import datetime
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etude import distributed, files
from etude.config.loading import to_yaml
from etude.config.schema import Config
from etude.data.dataset import Table
from etude.errors import UserError, command
from etude.models import loading, lora
from etude.runs.folder import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    STARTED,
    another_folder,
    begin_run,
    entries,
    free_name,
    is_finished,
    read_started,
    write_file,
)
from etude.runs.manifest import changes_since, current_environment, read_metrics, read_record
from etude.training import checkpoints

# Left open in a configuration, and written out when they were found.
FOUND = ("dataset.labels", "model.revision")
# The sections that decide what is learnt; a resumed training must have the same.
TRAINED_BY = {"model", "lora", "dataset", "training"}

log = logging.getLogger(__name__)


def refuse_taken(folder: Path) -> None:
    """Raise UserError if `folder` holds a finished run, or anything that no training of Etude wrote."""
    there = entries(folder) if folder.is_dir() else []
    if not there and (folder.is_dir() or not folder.exists()):
        return
    if is_finished(folder):
        problem = "holds a finished run, which is never overwritten"
    elif read_started(folder):
        return
    else:
        problem = (
            f"is not a run: it holds {', '.join(there[:5]) or 'no files'}, which stays as it is"
        )
    raise UserError(
        f"output.dir: {folder} {problem}. Choose another folder, such as {free_name(folder)}"
    )


def open_folder(settings: Config, resume: bool | None, force: bool = False) -> Path | None:
    """The newest checkpoint in the run's folder that verifies, to go on from; None to begin there.

    Raises:
        UserError: the folder holds what this run did not write, other settings than those to go on
            with, no checkpoint that is whole; or `resume` and nothing to go on with.
    """
    folder = Path(settings.output.dir)
    refuse_taken(folder)
    home = folder / CHECKPOINTS
    if home.is_symlink():
        raise UserError(f"{home} is a link; nothing is written through it. Remove it")
    checkpoint, corrupt = checkpoints.newest(home)
    for notice in corrupt:
        log.warning(notice)
    if checkpoint and resume is not False:
        _check_settings(folder, checkpoint, settings, force)
        return checkpoint
    if checkpoint:
        problem = "holds a run that did not end; to go on with it, leave --no-resume out"
    elif corrupt or (folder / lora.WEIGHTS).exists():
        problem = "holds no checkpoint that is whole, so there is nothing to go on from"
    elif resume:  # it came to nothing, so there is nothing to lose
        problem = "holds no checkpoint to go on from; leave --resume out"
    else:
        return None
    raise UserError(
        f"output.dir: {folder} {problem}. To start another run: {another_folder(folder)}"
    )


def _check_settings(folder: Path, checkpoint: Path, settings: Config, force: bool) -> None:
    """Compare `settings` with those of the run, as noted at its start: config.yml may have been edited since."""
    noted = read_record(folder / STARTED, "config")["config"]
    processes = checkpoints.read_progress(checkpoint)["processes"]
    changes = [
        f"{section}.{key} {noted[section].get(key)} (now {value})"
        for section, values in settings.model_dump(mode="json", include=TRAINED_BY).items()
        for key, value in values.items()
        if value != noted[section].get(key) and not (value is None and f"{section}.{key}" in FOUND)
    ]
    if processes != distributed.WORLD:
        changes.append(f"processes {processes} (now {distributed.WORLD})")
    if changes:
        launcher = ["torchrun", "--nproc_per_node", str(processes), "-m", "etude.train_with_config"]
        program = launcher if processes > 1 else ["etude", "train"]
        same = command(*program, folder / CONFIG, "--resume", f"output.dir={folder}")
        _refuse_unless(
            force,
            f"{folder} was started with other settings: {'; '.join(changes)}. Go on with its own: {same}; "
            f"start another run: {another_folder(folder)}; or go on all the same: --force",
        )


def _refuse_unless(force: bool, problem: str) -> None:
    """Raise `problem` as a UserError, or with `force` only report it."""
    if not force:
        raise UserError(f"--resume: {problem}")
    log.warning("--force: %s", problem)


def check_data(manifest: dict[str, Any], tables: Mapping[str, Table]) -> None:
    """Compare the rows with those that the run of `manifest` was trained on.

    Raises:
        UserError: they changed.
    """
    stored = {split: facts.get("sha256") for split, facts in manifest["data"].items()}
    now = {split: table.fingerprint for split, table in tables.items()}
    changed = sorted(key for key in stored.keys() | now.keys() if stored.get(key) != now.get(key))
    if changed:
        raise UserError(
            f"The data changed since the run was trained ({', '.join(changed)}), so it cannot be repeated. "
            "Bring the files back as they were, or train a new run"
        )


def with_found(settings: Config, table: Table, base: loading.Base) -> Config:
    """The configuration with what was found written out: the labels, and the Hub's commit."""
    kind, _, commit = base.identity.partition(":")
    revision = {"revision": commit} if kind == "commit" else {}
    return settings.model_copy(
        update={
            "dataset": settings.dataset.model_copy(update={"labels": table.labels}),
            "model": settings.model.model_copy(update=revision),
        }
    )


def start_folder(
    folder: Path,
    checkpoint: Path | None,
    settings: Config,
    tables: Mapping[str, Table],
    base: loading.Base,
    force: bool,
    date: datetime.date | None = None,
) -> None:
    """Note what the run starts from; on resume, compare that with what it started from.

    `date` is the one that the template writes: of a resumed run, the one that it was begun with.

    Raises:
        UserError: the data or the base changed in between.
    """
    facts: dict[str, Any] = {
        "base": base.identity,
        **{f"{split} data": table.fingerprint for split, table in tables.items()},
        "labels": tables["train"].labels,
    }
    lines: list[dict[str, Any]] = []
    if checkpoint:
        stored = read_record(folder / STARTED, "environment")
        for difference in changes_since(stored["environment"]):
            log.warning("since the training began: %s", difference)
        differing = [key for key in facts if facts[key] != stored.get(key)]
        if differing:
            _refuse_unless(
                force,
                f"since {folder} was started, these changed: {', '.join(differing)}. Bring them back, "
                f"start another run: {another_folder(folder)}; or go on all the same: --force",
            )
        # What was logged after the checkpoint is about to happen again; a torn last line goes too.
        step = checkpoints.step_of(checkpoint)
        lines = [line for line in read_metrics(folder / METRICS) if line["step"] <= step]
    files.clear(folder)
    facts |= {"date": date and date.isoformat(), "environment": current_environment()}
    begin_run(folder, facts | {"config": settings.model_dump(mode="json")})
    write_file(folder, CONFIG, to_yaml(settings))
    files.write_text(folder / METRICS, "".join(json.dumps(line) + "\n" for line in lines))
