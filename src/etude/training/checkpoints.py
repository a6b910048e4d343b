"""Checkpoints that exist whole or not at all, without pickle: safetensors, JSON and a list of sums.

A checkpoint is written beside its place, flushed to disk with the SHA-256 of every file, and only then
renamed. A kill, a full disk or a power cut leaves what was there before; what is damaged later
is found by its sums and skipped.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude import distributed, files
from etude.errors import UserError, first_line, shortage
from etude.files import usual_mode

if TYPE_CHECKING:
    import torch

SUMS = "sha256.json"
PROGRESS, TENSORS = "progress.json", "state.safetensors"


def name(step: int) -> str:
    """The folder of the checkpoint made after `step`."""
    return f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was made."""
    return int(checkpoint.name.rpartition("-")[2])


@contextlib.contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends; an error leaves nothing of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.scratch(target.parent) as work:
        yield work
        sums = {file.name: files.sha256(file) for file in _files(work)}
        files.write_text(work / SUMS, json.dumps(sums))
        for file in _files(work):
            usual_mode(file)
            files.flush(file)
        files.flush(work)
        remove(target)  # there only if it did not verify
        work.rename(target)
        files.flush(target.parent)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; its name goes first, so that no half of it is ever taken for one."""
    if checkpoint.exists():
        with files.scratch(checkpoint.parent) as gone:
            checkpoint.rename(gone / checkpoint.name)


def why_not(checkpoint: Path) -> str | None:
    """None if every file of `checkpoint` is what was written, else what is wrong."""
    try:
        sums = files.read_json(checkpoint / SUMS)
        found = {file.name: files.sha256(file) for file in _files(checkpoint) if file.name != SUMS}
    except (OSError, ValueError) as error:
        return f"{SUMS} cannot be read: {error}"
    differing = sorted(
        file for file in sums.keys() | found.keys() if sums.get(file) != found.get(file)
    )
    if differing or PROGRESS not in found:
        return f"missing, changed or not its own: {', '.join(differing) or PROGRESS}"
    return None


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in `folder` that verifies, and a sentence for each one that does not."""
    corrupt: list[str] = []
    for checkpoint in reversed(_all(folder)):
        reason = why_not(checkpoint)
        if reason is None:
            return checkpoint, corrupt
        corrupt.append(f"{checkpoint}: skipped: corrupt, {reason}")
    return None, corrupt


def retain(folder: Path, step: int, keep: int, best: int | None) -> None:
    """Delete all but the newest `keep` checkpoints, the best one aside, and what kills left behind.

    Folders of such a name without sums were made by something else; they stay and do not count.

    `step` is the training's. Later ones were skipped when it was resumed, so they are corrupt: they
    go too, for they must not count in place of whole ones.
    """
    ours = [checkpoint for checkpoint in _all(folder) if (checkpoint / SUMS).is_file()]
    kept = [checkpoint for checkpoint in ours if step_of(checkpoint) <= step][-keep:]
    for checkpoint in ours:
        if checkpoint not in kept and step_of(checkpoint) != best:
            remove(checkpoint)
    files.clear(folder)


def _all(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first, whole or not."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


# --- the state of a training: tensors to safetensors, the rest to JSON ------------------------------


def save_state(folder: Path, progress: dict[str, Any], tensors: "dict[str, torch.Tensor]") -> None:
    """Write what a training needs to go on: `progress` (JSON values) and `tensors`."""
    from safetensors.torch import save_file

    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(contiguous, folder / TENSORS)
    (folder / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")


def load_state(checkpoint: Path) -> "tuple[dict[str, Any], dict[str, torch.Tensor]]":
    """What `save_state` wrote."""
    from safetensors.torch import load_file

    progress: dict[str, Any] = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
    return progress, load_file(checkpoint / TENSORS)


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """The progress of a checkpoint that verifies.

    Raises:
        UserError: it is of another step: not what a training writes.
    """
    with reading(checkpoint):
        progress, _ = load_state(checkpoint)
        if progress["step"] != step_of(checkpoint):
            raise ValueError(f"{PROGRESS}: step {progress['step']}")
    return progress


@contextlib.contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Say in one sentence that a checkpoint whose sums are right is not what this version writes.

    It is of another version, or was changed by hand.

    Raises:
        UserError: the block failed.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if shortage(error):
            raise
        raise UserError(
            f"{checkpoint}: not what this version of Etude writes ({type(error).__name__}: "
            f"{first_line(error):.200}). Remove this checkpoint to go on from the one before it, "
            "or train a new run"
        ) from error


def split_optimizer(
    state: dict[str, Any],
) -> "tuple[list[dict[str, Any]], dict[str, torch.Tensor]]":
    """An optimizer's state_dict as its groups (JSON values) and its tensors by ``optimizer.N.name``."""
    tensors = {
        f"optimizer.{number}.{key}": value
        for number, values in state["state"].items()
        for key, value in values.items()
    }
    return state["param_groups"], tensors


def join_optimizer(
    groups: list[dict[str, Any]], tensors: "dict[str, torch.Tensor]"
) -> dict[str, Any]:
    """The state_dict that `split_optimizer` took apart."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            number, _, field = rest.partition(".")
            state.setdefault(int(number), {})[field] = value
    return {"state": state, "param_groups": groups}


def random_state() -> "dict[str, torch.Tensor]":
    """The state of torch's random generators, which dropout draws from; no other is used in a training.

    Several processes have those of each, one row a process; they all must ask.
    """
    import torch

    tensors = {"random.cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.random.get_rng_state()
    every = distributed.gather(tensors)
    return {key: torch.stack([one[key] for one in every]) for key in tensors}


def set_random_state(tensors: "dict[str, torch.Tensor]") -> None:
    """Put every generator where `random_state` found it."""
    import torch

    # With --force there may be more processes now. Cloned: torch reads a state from its storage's start.
    row = distributed.RANK % len(tensors["random.cpu"])
    torch.random.set_rng_state(tensors["random.cpu"][row].clone())
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.random.set_rng_state(tensors["random.cuda"][row].clone())
