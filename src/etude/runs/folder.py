"""A run is a folder: the names in it, how a file gets there, and the one process that writes."""

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etude import distributed, files
from etude.errors import UserError, command

CONFIG, STARTED, MANIFEST = "config.yml", "started.json", "manifest.json"
METRICS, LOG, CHECKPOINTS = "metrics.jsonl", "train.log", "checkpoints"
CARD, PICTURE, PROOF = "README.md", "loss.png", "proof.json"
LOCK = ".etude-lock"
MADE_BY = {"program": "etude"}  # in started.json, by which a run is known

log = logging.getLogger(__name__)


def how_to_continue(folder: Path) -> str:
    """How the training in `folder` is brought to its end: from a checkpoint, if it has one."""
    if distributed.WORLD > 1:
        return "give the same command again"
    made = any((folder / CHECKPOINTS).glob("checkpoint-*"))
    resume = ["--resume"] if made else []
    again = command("etude", "train", folder / CONFIG, *resume, f"output.dir={folder}")
    return f"{'go on with' if made else 'start it again'}: {again}"


def free_name(path: Path) -> Path:
    """A name beside `path` that nothing has yet."""
    whole = path if path.name not in ("", "..") else Path("runs", "run")
    names = (whole.with_name(f"{whole.name}-{number}") for number in itertools.count(2))
    return next(name for name in names if not os.path.lexists(name))


def another_folder(folder: Path) -> str:
    """The setting that starts another run, beside `folder`."""
    return command(f"output.dir={free_name(folder)}")


def entries(folder: Path) -> list[str]:
    """What is in `folder`, a run's lock and what kills left behind aside."""
    left = {path.name for path in files.leftovers(folder)} | {LOCK}
    return sorted(path.name for path in folder.iterdir() if path.name not in left)


# --- what a run writes ------------------------------------------------------------------------


def read_started(folder: Path) -> dict[str, Any] | None:
    """What the run in `folder` started from, by which it is known; None if it is no run of Etude's."""
    try:
        facts = files.read_json(folder / STARTED)
    except ValueError:
        return None
    return facts if facts.items() >= MADE_BY.items() else None


def is_finished(folder: Path) -> bool:
    """Whether `folder` holds a finished run."""
    return (folder / MANIFEST).is_file()


def begin_run(folder: Path, facts: dict[str, Any]) -> None:
    """Write started.json, by which what a kill leaves in `folder` is known as a run: the first file."""
    files.write_text(folder / STARTED, json.dumps({**MADE_BY, **facts}, indent=1))


def write_file(folder: Path, name: str, text: str) -> None:
    """Write the file `name` of the run in `folder`, whole or not at all, as `move_in` does."""
    with files.scratch(folder) as work:
        (work / name).write_bytes(text.encode())
        move_in(folder, work / name)


def move_in(folder: Path, work: Path) -> None:
    """Give the finished file `work` its name in the run's folder; what else has that name is kept, renamed."""
    file = folder / work.name
    same = file.is_file() and not file.is_symlink() and files.sha256(file) == files.sha256(work)
    if os.path.lexists(file) and not same:
        kept = free_name(file)
        file.rename(kept)
        log.warning("%s was there already; it is kept as %s", file, kept.name)
    files.put(work, file)


# --- one writer -------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the one process that writes in `folder`, which is made; if it is empty at the end, it goes again.

    The lock is the kernel's: a process that was killed holds none.

    Raises:
        UserError: another process holds it.
    """
    import filelock

    file, made = folder / LOCK, not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(file, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0.2)
    except filelock.Timeout:
        raise UserError(
            f"{folder} is being written by another process. Wait for its end, or choose another "
            f"folder: {free_name(folder)}"
        ) from None
    except OSError as error:  # a file system without locks, say
        log.warning(
            "%s: cannot be locked (%s); start nothing else that writes there",
            folder,
            error.strerror,
        )
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                file.unlink()
            lock.release()
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def is_live(folder: Path) -> bool:
    """Whether a process writes in the run's `folder` at this moment."""
    import filelock

    if not (folder / LOCK).is_file():
        return False
    try:
        with filelock.FileLock(folder / LOCK, timeout=0, fallback_to_soft=False):
            return False
    except filelock.Timeout:
        return True
    except OSError:  # not to be written by this user, or no locks here
        return False
