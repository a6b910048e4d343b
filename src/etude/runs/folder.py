"""A run is a folder: the names in it, what may be replaced there, and the one process that writes."""

import contextlib
import datetime
import errno
import itertools
import json
import logging
import os
import platform
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etude import distributed, files
from etude.errors import UserError, command
from etude.models import lora

CONFIG, STARTED, MANIFEST = "config.yml", "started.json", "manifest.json"
METRICS, LOG, CHECKPOINTS = "metrics.jsonl", "train.log", "checkpoints"
CARD, PICTURE, PROOF = "README.md", "loss.png", "proof.json"
LOCK = ".etude-lock"
# All that a training writes but the file by which its folder is known.
PRODUCTS = (
    *(CONFIG, METRICS, LOG, CHECKPOINTS, lora.WEIGHTS, lora.ADAPTER_CONFIG),
    *(PROOF, CARD, PICTURE, MANIFEST),
)
# How the lines look that a training appends: such a file is known by them, for its sum changes.
LINES = {
    METRICS: re.compile(r'\{"step": \d+, "seconds": |\s*$'),
    LOG: re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d|\s*$"),
}
MADE_BY = {"program": "etude"}  # in the files by which a run and its lock are known
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}

log = logging.getLogger(__name__)


class Busy(UserError):
    """Another process writes in the folder."""


def how_to_continue(folder: Path) -> str:
    """How the training in `folder` is brought to its end: from a checkpoint, if it has one."""
    if distributed.WORLD > 1:
        return "give the same command again"
    made = any((folder / CHECKPOINTS).glob("checkpoint-*"))
    resume = ["--resume"] if made else []
    again = command("etude", "train", folder / CONFIG, *resume, f"output.dir={folder}")
    return f"{'go on with' if made else 'start it again'}: {again}"


def free_name(folder: Path) -> Path:
    """A name beside `folder` that nothing has yet."""
    whole = folder if folder.name not in ("", "..") else Path("runs", "run")
    names = (whole.with_name(f"{whole.name}-{number}") for number in itertools.count(2))
    return next(name for name in names if not os.path.lexists(name))


def another_folder(folder: Path) -> str:
    """The setting that starts another run, beside `folder`."""
    return command(f"output.dir={free_name(folder)}")


def entries(folder: Path) -> list[str]:
    """What is in `folder`, a run's lock and what kills left behind aside."""
    left = {path.name for path in files.leftovers(folder)} | {LOCK}
    return sorted(path.name for path in folder.iterdir() if path.name not in left)


# --- whose a folder is: nothing but what this very run wrote is ever replaced -----------------


def read_started(folder: Path) -> dict[str, Any] | None:
    """What the run in `folder` started from, by which it is known; None if it is no run of Etude's.

    Its "written" names all that the run wrote, with the SHA-256 of what does not grow.
    """
    file = folder / STARTED
    try:
        facts = {} if file.is_symlink() else files.read_json(file)
    except ValueError:
        return None
    known = facts.items() >= MADE_BY.items() and isinstance(facts.get("written"), dict)
    return facts if known else None


def is_finished(folder: Path) -> bool:
    """Whether `folder` holds a finished run; a manifest.json of another program does not make one."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        return files.read_json(folder / MANIFEST).keys() >= {"base", "chat_format"}
    except ValueError:
        return read_started(folder) is not None


def begin_run(folder: Path, facts: dict[str, Any]) -> None:
    """Write started.json, by which what a kill leaves in `folder` is known as a run: the first file."""
    before = read_started(folder) or {"written": {METRICS: [], LOG: []}}
    value = {**MADE_BY, **facts, "written": before["written"]}
    files.write_text(folder / STARTED, json.dumps(value, indent=1))


def record_file(folder: Path, name: str, digest: str | None = None) -> None:
    """Note in started.json that this run is about to write `name`; `digest` is its SHA-256 if it has one.

    Raises:
        UserError: something has that name which this run did not write.
    """
    refuse_foreign(folder, [name])
    facts = read_started(folder)
    assert facts is not None
    sums = facts["written"].setdefault(name, [])
    if digest is not None and digest not in sums:
        sums.append(digest)
    files.write_text(folder / STARTED, json.dumps(facts, indent=1))


def write_file(folder: Path, name: str, text: str) -> None:
    """Write the file `name` of the run in `folder`, whole or not at all.

    Raises:
        UserError: something has that name which this run did not write.
    """
    with files.scratch(folder) as work:
        (work / name).write_bytes(text.encode())
        move_in(folder, work / name)


def move_in(folder: Path, work: Path) -> None:
    """Give the finished file `work` its name in the run's folder, as `write_file` does."""
    record_file(folder, work.name, None if work.name in LINES else files.sha256(work))
    files.put(work, folder / work.name)


def refuse_foreign(folder: Path, names: Sequence[str] = PRODUCTS) -> None:
    """Raise UserError where one of `names`, about to be written, is not what the run in `folder` wrote."""
    facts = read_started(folder)
    if facts is None:
        raise UserError(
            f"{folder}: its {STARTED}, by which it is known as a run, is gone or was changed, so "
            f"nothing more is written there. Put it back, or start another run: {another_folder(folder)}"
        )
    found = [name for name in names if not _written_here(folder, name, facts["written"])]
    if found:
        raise UserError(
            f"{folder}: {', '.join(found)}: not as this run wrote it, so it is not replaced. Move it "
            f"elsewhere and go on, or start another run: {another_folder(folder)}"
        )


def _written_here(folder: Path, name: str, written: dict[str, Any]) -> bool:
    """Whether `name` is free in `folder`, or what the run wrote there."""
    path = folder / name
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return True
    if name == CHECKPOINTS:
        return stat.S_ISDIR(mode)
    if name.startswith(f"{CHECKPOINTS}/"):
        return stat.S_ISDIR(mode) and (name in written or not any(path.iterdir()))
    if name not in written or not stat.S_ISREG(mode):
        return False
    if name in LINES:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        # A kill may have cut the last one short.
        return all(LINES[name].match(line) for line in lines[:-1])
    return files.sha256(path) in written[name]


# --- one writer -------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the one process that writes in `folder`, which is made; if it is empty at the end, it goes again.

    The lock is the kernel's, on a file that says who holds it: a process that was killed holds none.

    Raises:
        Busy: another process holds it.
        UserError: no folder, or a lock file that is not Etude's.
    """
    import filelock

    file, made = folder / LOCK, not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{folder} exists and is no folder; choose another") from None
    if file.is_symlink() or _holder(file) is None:
        raise UserError(
            f"{file} is not what Etude writes, and takes the name of its lock; move it elsewhere, or "
            f"choose another folder: {free_name(folder)}"
        )
    lock = filelock.FileLock(file, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0.2)
    except filelock.Timeout:
        raise Busy(
            f"{folder} is being written by {_holder(file)}. Wait for its end, or choose another "
            f"folder: {free_name(folder)}"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning(
            "%s: no locks on this file system; start nothing else that writes there", folder
        )
    try:
        since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        who = {**MADE_BY, "host": platform.node(), "process": os.getpid(), "since": since}
        if lock.is_locked:
            with contextlib.suppress(OSError):  # Windows lets nobody write it now
                file.write_text(json.dumps(who), encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        lock.release()
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _holder(file: Path) -> str | None:
    """Who holds the lock `file`, or held it last, in words; None if it is not a lock of Etude's."""
    try:
        # Empty after a kill, or when it is about to be written.
        who = json.loads(files.read_text(file) or json.dumps(MADE_BY))
    except OSError:  # there is none, or it cannot be read while it is locked
        who = MADE_BY
    except ValueError:
        return None
    if not isinstance(who, dict) or who.get("program") != "etude":
        return None
    process, host, since = (who.get(key) for key in ("process", "host", "since"))
    return f"process {process} on {host} since {since}" if since else "another process"


def live(folder: Path) -> str | None:
    """Who writes in the run's `folder` at this moment, in words; None if nobody does."""
    import filelock

    file = folder / LOCK
    if not file.is_file():
        return None
    try:
        with filelock.FileLock(file, timeout=0, fallback_to_soft=False):
            return None
    except filelock.Timeout:
        return _holder(file) or "another process"
    except OSError:  # not to be written by this user, or no locks here
        return None


def refuse_live(name: str) -> None:
    """Raise Busy if the run `name` is being trained at this moment."""
    who = live(files.expanded(name))
    if who:
        raise Busy(f"{name}: this run is being trained by {who}; wait for its end")
