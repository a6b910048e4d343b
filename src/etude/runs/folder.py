"""A run is a folder: config.yml, adapter, manifest.json, metrics.jsonl, plots. This file opens and writes it."""

import contextlib
import dataclasses
import datetime
import errno
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from etude import distributed, files
from etude.config.loading import load_config
from etude.config.schema import Config
from etude.conversation.renderer import Renderer
from etude.errors import UserError, command
from etude.models import device, loading, lora

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
TEMPLATE = "chat_template.jinja"  # beside the adapter, as transformers writes it
TEMPLATE_LIMIT = 2**20  # bytes
LIBRARIES = (
    "etude",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "safetensors",
    "datasets",
)

log = logging.getLogger(__name__)


class Busy(UserError):
    """Another process writes in the folder."""


@dataclass(frozen=True)
class Target:
    """What a program works on: a base, how to render for it, and the adapter's folder if it is a run."""

    base: loading.Base
    renderer: Renderer
    config: Config
    adapter: Path | None

    def tuned(self) -> Any:
        """The model to answer with: with the adapter, merged (in place) where the base is in float32.

        Folded into 4- or 16-bit weights, the adapter would be rounded with them, and the model another
        one than was trained and proven: on the sample, tuned in bfloat16, the loss of 0.3239 becomes
        0.3193, or 0.3230 merged in float32 and rounded once. Unmerged costs a tenth of the time.
        """
        if self.adapter is None:
            return self.base.model
        tuned = lora.load(self.base.model, self.adapter)
        return lora.merge(tuned) if lora.mergeable(tuned) else tuned


class _Checked(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _TrainedOn(_Checked):
    identity: str
    device: str = "cpu"


class Manifest(_Checked):
    """The part of a manifest.json that programs read."""

    base: _TrainedOn | None = None
    config: dict[str, Any] | None = None
    chat_format: dict[str, Any] | None = None
    data: dict[str, dict[str, Any]] = {}
    environment: dict[str, Any] = {}


class _Loss(_Checked):
    split: Literal["train", "validation"]
    data: str
    rows: int = Field(ge=1)
    value: float


class Proof(_Checked):
    """What a proof.json holds."""

    sha256: str
    dtype: str | None = None
    quantization: Literal["int8", "nf4"] | None = None
    loss: _Loss


def go_on(folder: Path) -> str:
    """How the training in `folder` is brought to its end: from a checkpoint, if it has one."""
    if distributed.WORLD > 1:
        return "give the same command again"
    made = any((folder / CHECKPOINTS).glob("checkpoint-*"))
    resume = ["--resume"] if made else []
    again = command("etude", "train", folder / CONFIG, *resume, f"output.dir={folder}")
    return f"{'go on with' if made else 'start it again'}: {again}"


def open_config(name: str, overrides: list[str]) -> Config:
    """The configuration of a run, of an adapter made elsewhere, or the default one for a model's name.

    Raises:
        UserError: no such run, one without an adapter, or faults in its configuration.
    """
    folder = files.expanded(name)
    if lora.is_adapter(folder):
        if (folder / CONFIG).is_file():
            return load_config(folder / CONFIG, overrides=overrides)
        # An adapter made elsewhere tells its base only.
        named = lora.describe(folder).base_model_name_or_path
        if not named:
            raise UserError(f"{name}: adapter_config.json does not name the adapter's base")
        name = named
    elif started(folder) is not None:
        refuse_live(name)
        raise UserError(
            f"{name}: this run has no adapter yet; its training did not end. "
            f"To finish it, {go_on(folder)}"
        )
    elif (folder / CONFIG).is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{name}: there is a {CONFIG} but neither an adapter nor a run of Etude's in this folder. "
            f"To train by it: {command('etude', 'train', folder / CONFIG)}"
        )
    elif name.startswith(("runs/", "./", "../", "/", "~")) and not folder.exists():
        there = sorted(str(path.parent) for path in folder.parent.glob("*/adapter_config.json"))
        raise UserError(
            f"{name}: no such run; there are: {', '.join(there) or 'none yet (etude train makes one)'}"
        )
    return load_config(None, overrides=[f"model.name={name}", *overrides])


def open_target(name: str, overrides: list[str]) -> Target:
    """Open a run folder, a PEFT adapter folder or a model by name, with its base loaded.

    Raises:
        UserError: not there, or an adapter that was trained on another base or chat format.
    """
    config = open_config(name, overrides)
    folder = files.expanded(name)
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    base = _load(config)
    adapter = folder if lora.is_adapter(folder) else None
    template = None
    if adapter:
        lora.check_base(adapter, base.identity)
        if not (folder / CONFIG).is_file():  # made elsewhere; Etude's own runs have the base's
            base, template = _with_its_own(base, folder)
    run = adapter and (folder / CONFIG).is_file()
    renderer = renderer_for(base, config, recorded_date(folder) if run else today(), template)
    if manifest:
        check_base(name, manifest, base)
        renderer.check_state(manifest["chat_format"], name)
    return Target(base, renderer, config, adapter)


def check_base(name: str, manifest: dict[str, Any], base: loading.Base) -> None:
    """Hold `base` against the one that the run `name` was trained on.

    Raises:
        UserError: it is another one.
    """
    trained_on = manifest["base"]["identity"]
    if trained_on != base.identity:
        raise UserError(
            f"{name}: this adapter was trained on another base ({trained_on}) than {base.name} is now "
            f"({base.identity}). Pin model.revision, or give the base it was trained on"
        )


def _with_its_own(base: loading.Base, folder: Path) -> tuple[loading.Base, str | None]:
    """`base` with the tokenizer in an adapter's `folder`, and the chat template there, if any."""
    tokenizer = loading.own_tokenizer(folder, base)
    template = None
    if tokenizer:
        base = dataclasses.replace(base, tokenizer=tokenizer)
    elif (folder / TEMPLATE).is_file():
        template = _read_template(folder / TEMPLATE, str(folder))
    kept = [
        *(["tokenizer"] if tokenizer else []),
        *(["chat template"] if template or (tokenizer and tokenizer.chat_template) else []),
    ]
    if kept:
        log.info("%s: its own %s in use, not the base's", folder, " and ".join(kept))
    return base, template


def today() -> datetime.date:
    """The day that a template which asks for it writes, where no run has fixed it."""
    return datetime.date.today()


def recorded_date(folder: Path) -> datetime.date | None:
    """The day that a run was begun with, for templates that write it; None if it has none.

    Raises:
        UserError: what stands there is no date.
    """
    if (folder / MANIFEST).is_file():
        return date_of(read_manifest(folder)["chat_format"], folder / MANIFEST)
    if (folder / STARTED).is_file():
        return date_of(read_json(folder / STARTED), folder / STARTED)
    return None


def date_of(facts: dict[str, Any], where: Path) -> datetime.date | None:
    """The date in a manifest's chat_format or in started.json.

    Raises:
        UserError: what stands there is no date.
    """
    written = facts.get("date")
    try:
        return None if written is None else datetime.date.fromisoformat(written)
    except (TypeError, ValueError):
        raise UserError(
            f"{where}: date: {written!r:.40} is no date; the run is damaged, train it again"
        ) from None


def _load(config: Config) -> loading.Base:
    place = device.choose(config.model.dtype, config.training.use_cpu)
    # An int8 base is made for training; a 4-bit one where there is no room for another.
    quantization = "nf4" if config.model.quantization == "nf4" else None
    return loading.load(config.model.name, place, config.model.revision, quantization)


def renderer_for(
    base: loading.Base | loading.Outline,
    config: Config,
    date: datetime.date | None = None,
    template: str | None = None,
) -> Renderer:
    """The renderer of a base under a config; `date` is for templates that write one.

    `template` is used where the config names no file.

    Raises:
        UserError: a template file that cannot be read, or a template that cannot be used.
    """
    if config.model.chat_template:
        file = files.expanded(config.model.chat_template)
        template = _read_template(file, f"model.chat_template: {config.model.chat_template}")
    # Raw text needs no template, so a bad one is an error of the first conversation.
    return Renderer(base.tokenizer, template, config.dataset.system_prompt, False, date)


def _read_template(file: Path, where: str) -> str:
    try:
        return files.read_text(file, TEMPLATE_LIMIT)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a run folder.

    Raises:
        UserError: unreadable or no object.
    """
    try:
        return files.read_json(path)
    except ValueError as error:
        raise UserError(
            f"{path}: cannot be read: {error}; the run is damaged, train it again"
        ) from None


def read_manifest(folder: Path, *more: str) -> dict[str, Any]:
    """The manifest of the run in `folder`, its form checked; it has a base, a chat_format and `more`.

    Raises:
        UserError: it is not what Etude writes.
    """
    manifest = read_checked(folder / MANIFEST, Manifest)
    missing = [key for key in ("base", "chat_format", *more) if not manifest.get(key)]
    if missing:
        raise UserError(
            f"{folder / MANIFEST}: no {', '.join(missing)} in it; the run is damaged, train it again"
        )
    return manifest


def read_checked(path: Path, form: type[BaseModel]) -> dict[str, Any]:
    """A JSON object from a run folder that has the form of `form`.

    Raises:
        UserError: unreadable, or another form.
    """
    value = read_json(path)
    try:
        form.model_validate(value)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
        )
        raise UserError(
            f"{path}: not what Etude writes ({faults:.500}); the run is damaged, train it again"
        ) from None
    return value


def environment() -> dict[str, Any]:
    """Versions and machine: what decides how numbers are rounded, for the manifest."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": capabilities.get("cpu_name") or platform.processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": sorted(name for name, there in capabilities.items() if there is True),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def environment_differences(stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two environments, as "name: stored, now ..."; flags and versions one by one."""
    first, second = _flat(stored), _flat(now)
    return [
        f"{name}: {first.get(name, 'not recorded')}, now {second.get(name, 'none')}"
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    ]


def changes_since(folder: Path) -> list[str]:
    """How the environment differs from the one that the run in `folder` was trained in."""
    if not (folder / MANIFEST).is_file():
        return []
    stored = read_json(folder / MANIFEST).get("environment")
    return environment_differences(stored, environment()) if isinstance(stored, dict) else []


def _flat(environment: dict[str, Any]) -> dict[str, Any]:
    """An environment with its libraries and flags on one level."""
    flat = {key: value for key, value in environment.items() if not isinstance(value, dict | list)}
    libraries, flags = environment.get("libraries"), environment.get("cpu_flags")
    flat |= libraries if isinstance(libraries, dict) else {}
    return flat | ({f"CPU flag {flag}": "yes" for flag in flags} if isinstance(flags, list) else {})


# --- whose a folder is: nothing but what this very run wrote is ever replaced -----------------


def started(folder: Path) -> dict[str, Any] | None:
    """What the run in `folder` started from, by which it is known; None if it is no run of Etude's.

    Its "written" names all that the run wrote, with the SHA-256 of what does not grow.
    """
    file = folder / STARTED
    try:
        facts = {} if file.is_symlink() else files.read_json(file)
    except ValueError:
        return None
    if facts.items() >= MADE_BY.items():
        return facts if isinstance(facts.get("written"), dict) else None
    # Runs of earlier versions are known by the versions that they note.
    stored = facts.get("environment")
    libraries = stored.get("libraries") if isinstance(stored, dict) else None
    if not isinstance(libraries, dict) or "etude" not in libraries:
        return None
    made = (folder / CHECKPOINTS).glob("*")
    written = [CONFIG, METRICS, LOG, *(f"{CHECKPOINTS}/{path.name}" for path in made)]
    return {**facts, **MADE_BY, "written": {name: [] for name in written}}


def is_finished(folder: Path) -> bool:
    """Whether `folder` holds a finished run; a manifest.json of another program does not make one."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        return files.read_json(folder / MANIFEST).keys() >= {"base", "chat_format"}
    except ValueError:
        return started(folder) is not None


def begin(folder: Path, facts: dict[str, Any]) -> None:
    """Write started.json, by which what a kill leaves in `folder` is known as a run: the first file."""
    before = started(folder) or {"written": {METRICS: [], LOG: []}}
    value = {**MADE_BY, **facts, "written": before["written"]}
    files.write_text(folder / STARTED, json.dumps(value, indent=1))


def record(folder: Path, name: str, digest: str | None = None) -> None:
    """Note in started.json that this run is about to write `name`; `digest` is its SHA-256 if it has one.

    Raises:
        UserError: something has that name which this run did not write.
    """
    refuse_foreign(folder, [name])
    facts = started(folder)
    assert facts is not None
    sums = facts["written"].setdefault(name, [])
    if digest is not None and digest not in sums:
        sums.append(digest)
    files.write_text(folder / STARTED, json.dumps(facts, indent=1))


def write(folder: Path, name: str, text: str) -> None:
    """Write the file `name` of the run in `folder`, whole or not at all.

    Raises:
        UserError: something has that name which this run did not write.
    """
    with files.beside(folder / name, text.encode()) as work:
        record(folder, name, None if name in LINES else files.sha256(work))
        files.replace(work, folder / name)


def move_in(folder: Path, work: Path) -> None:
    """Give the finished file `work` its name in the run's folder, as `write` does."""
    files.flush(work)
    record(folder, work.name, files.sha256(work))
    files.replace(work, folder / work.name)


def refuse_foreign(folder: Path, names: Sequence[str] = PRODUCTS) -> None:
    """Raise UserError where one of `names`, about to be written, is not what the run in `folder` wrote."""
    facts = started(folder)
    if facts is None:
        raise UserError(
            f"{folder}: its {STARTED}, by which it is known as a run, is gone or was changed, so "
            f"nothing more is written there. Put it back, or start another run: {elsewhere(folder)}"
        )
    found = [name for name in names if not _written_here(folder, name, facts["written"])]
    if found:
        raise UserError(
            f"{folder}: {', '.join(found)}: not as this run wrote it, so it is not replaced. Move it "
            f"elsewhere and go on, or start another run: {elsewhere(folder)}"
        )


def _written_here(folder: Path, name: str, written: dict[str, Any]) -> bool:
    """Whether `name` is free in `folder`, or what the run wrote there."""
    try:
        mode = (folder / name).lstat().st_mode
    except FileNotFoundError:
        return True
    if name == CHECKPOINTS:
        return stat.S_ISDIR(mode)
    if name.startswith(f"{CHECKPOINTS}/"):
        return stat.S_ISDIR(mode) and (name in written or not any((folder / name).iterdir()))
    if name not in written:
        return False
    if not stat.S_ISREG(mode):
        return False
    if name in LINES:
        lines = (folder / name).read_text(encoding="utf-8", errors="replace").split("\n")
        # A kill may have cut the last one short.
        return all(LINES[name].match(line) for line in lines[:-1])
    return not written[name] or files.sha256(folder / name) in written[name]


def free(folder: Path) -> Path:
    """A name beside `folder` that nothing has yet."""
    whole = folder if folder.name not in ("", "..") else Path("runs", "run")
    names = (whole.with_name(f"{whole.name}-{number}") for number in itertools.count(2))
    return next(name for name in names if not os.path.lexists(name))


def elsewhere(folder: Path) -> str:
    """The setting that starts another run, beside `folder`."""
    return command(f"output.dir={free(folder)}")


def entries(folder: Path) -> list[str]:
    """What is in `folder`, a run's lock and what kills left behind aside."""
    left = {path.name for path in files.leftovers(folder)} | {LOCK}
    return sorted(path.name for path in folder.iterdir() if path.name not in left)


# --- one writer -------------------------------------------------------------------------------


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Be the one process that writes in `folder`, which is made; if it is empty at the end, it goes again.

    The lock is the kernel's, on a file that says who holds it: a process that was killed holds none.

    Raises:
        Busy: another process holds it.
        UserError: no folder, or a lock file that is not Etude's.
    """
    import filelock

    file, made = folder / LOCK, False
    lock = filelock.FileLock(file, fallback_to_soft=False)
    for left in reversed(range(10)):
        try:
            made |= not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            _check_lock(file)
            lock.acquire(timeout=0.2)
            break
        except FileNotFoundError:  # who made the folder gave it up at this moment
            if not left:
                raise
        except FileExistsError:
            raise UserError(f"{folder} exists and is no folder; choose another") from None
        except filelock.Timeout:
            raise Busy(
                f"{folder} is being written by {_described(file)}. Wait for its end, or choose another "
                f"folder: {free(folder)}"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning(
                "%s: no locks on this file system; start nothing else that writes there", folder
            )
            break
    try:
        if lock.is_locked:
            since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
            who = {**MADE_BY, "host": platform.node(), "process": os.getpid(), "since": since}
            with contextlib.suppress(
                OSError
            ):  # for people to read; Windows lets nobody write it now
                file.write_text(json.dumps(who), encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        lock.release()
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _check_lock(file: Path) -> None:
    """Raise UserError if `file` is there and is no lock of Etude's; an empty one is, from a kill."""
    if os.path.lexists(file):
        try:
            text = files.read_text(file) if stat.S_ISREG(file.lstat().st_mode) else "another kind"
            ours = not text or text.startswith(json.dumps(MADE_BY)[:-1])
        except UnicodeDecodeError:
            ours = False
        if not ours:
            raise UserError(
                f"{file} is not what Etude writes, and takes the name of its lock; move it elsewhere, or "
                f"choose another folder: {free(file.parent)}"
            )


def _described(file: Path) -> str:
    """Who holds the lock `file`, in words."""
    try:
        who = files.read_json(file)
        return f"process {who['process']} on {who['host']} since {who['since']}"
    except (
        ValueError,
        KeyError,
    ):  # it is about to be written, or cannot be read while it is locked
        return "another process"


def refuse_live(name: str) -> None:
    """Raise Busy if the run `name` is being trained at this moment."""
    import filelock

    file = files.expanded(name) / LOCK
    if not file.is_file():
        return
    try:
        with filelock.FileLock(file, timeout=0, fallback_to_soft=False):
            pass
    except filelock.Timeout:
        raise Busy(
            f"{name}: this run is being trained by {_described(file)}; wait for its end"
        ) from None
    except OSError:  # not to be written by this user, or no locks here
        return
