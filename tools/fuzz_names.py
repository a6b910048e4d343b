"""Fuzz the names that become paths: runs, adapters, models, weights, data, saved conversations.

    python tools/fuzz_names.py [--names 10000] [--seed 0]

Every name is tried twice: as one that the user typed, and as one that stands inside a file of an
adapter or model folder. The rule that is held:

- Written is nothing outside the run root. Two things follow the user's own words: the report of an
  adapter that lies elsewhere goes into that adapter's folder, and `/save FILE` writes FILE.
- Read is nothing outside the run root but Python's own files, and what the name itself literally
  points to, with what lies in it. The folder around it may be listed, to name what is near.
- Every name ends in a path, a UserError or an OSError, which the programs tell in one sentence.

An audit hook sees every file that Python opens, lists, makes, moves or removes, before it happens,
and stops what is against the rule. Exit code 1 if there was any, or if the negative control, a
naive join, was not caught.
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ATOMS = [
    *("..", ".", "", "~", "~root", "~nobody", "%2e%2e", "%2f", "%00", "．．", "‥", "․․", "∕", "／"),
    *("\0", "\\", "..\\..", "C:", "\\\\host\\share", "CON", "NUL", "aux.txt", "COM1", "a" * 300),
    *("\udcff", "\ud800", "e\u0301", "é", "\u202e", "\u200b", "\n", "\r", "\t", "\x1b[2J", "\x7f"),
    *(" ", "x ", "x.", "x...", "-rf", "--help", "$HOME", "`id`", "{text}", "*", "?", "[a]", ":", "=", "#"),
    *("etc", "passwd", "tmp", "root", "dev", "zero", "proc", "self", "fd", "environ"),
    *("runs", "run", "adapter", "model", "link", "loop", "out", "file.gguf", "x.yml", "d.jsonl"),
    *("checkpoint-1", "evaluation", "report.json", "manifest.json", "model.safetensors", "smollm2-135m"),
]  # fmt: skip
WHOLE = [
    *("../../../etc/passwd", "/etc/passwd", "//etc//passwd", "/", "/..", "~/.ssh/id_rsa", "/dev/zero"),
    *("/proc/self/environ", "....//....//etc/passwd", "..%2f..%2fetc%2fpasswd", "..;/etc/passwd"),
    *("runs/link", "runs/loop", "../out/adapter", "file:///etc/passwd", "runs/../../out", "a/" * 600),
    *("\ud800/x", "a\0b", "/etc/passwd\0.safetensors", "runs/run/../../../out/adapter", "x" * 5000),
]  # fmt: skip
WRITES = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate",
    "os.chmod", "os.chown", "os.utime", "shutil.rmtree", "shutil.move", "shutil.copyfile",
    "tempfile.mkdtemp", "tempfile.mkstemp",
}  # fmt: skip
READS = {"os.listdir", "os.scandir"}


class Watch:
    """What an audit hook saw and stopped while it was armed. A hook stays for good, hence one object."""

    def __init__(self, root: Path) -> None:
        """Watch everything outside `root` and the Python installation."""
        own = [
            *sysconfig.get_paths().values(),
            sys.prefix,
            sys.base_prefix,
            str(Path(__file__).parent.parent),
        ]
        self.root = root.resolve()
        self.installed = [Path(path).resolve() for path in own if path]
        self.on = self.armed = False
        self.typed: Path | None = None  # where the name itself literally points
        self.writable = False  # whether that may be written
        self.seen: Counter[str] = Counter()
        self.violations: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        """Note one event; raise before one that is against the rule."""
        if not self.armed or (event != "open" and event not in WRITES | READS):
            return
        self.armed = False  # what this function itself does is not watched
        try:
            write = event in WRITES
            if event == "open":
                mode, flags = args[1] or "", args[2]
                write = any(sign in mode for sign in "wax+") if mode else bool(
                    flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                )  # fmt: skip
            two = event in ("os.rename", "os.symlink", "os.link", "shutil.move", "shutil.copyfile")
            for raw in args[:2] if two else args[:1]:
                if isinstance(raw, int) or raw is None:
                    continue
                path = Path(os.path.realpath(os.fsdecode(raw)))
                self.seen["written" if write else "read"] += 1
                if not self.allowed(path, write, event in READS):
                    self.violations.append(f"{event} {'writes' if write else 'reads'} {path}")
                elif not write or path.is_relative_to(self.root):
                    continue
                # Also what the rule allows: a fuzz writes nothing outside its root.
                raise PermissionError(13, "outside the run root", str(path))
        except (ValueError, UnicodeError):  # no possible path: the call itself will fail
            pass
        finally:
            self.armed = True

    def allowed(self, path: Path, write: bool, listing: bool) -> bool:
        """Whether the rule allows to read or write `path`."""
        if path.is_relative_to(self.root):
            return True
        typed = self.typed and (path == self.typed or path.is_relative_to(self.typed))
        if write:
            # A file is made beside its place, under a name of Etude's own.
            beside = self.typed and path.parent == self.typed.parent
            typed = typed or (beside and path.name.startswith(".unfinished-"))
            return bool(typed) and self.writable
        around = listing and self.typed is not None and path == self.typed.parent
        return bool(typed) or around or any(path.is_relative_to(own) for own in self.installed)


def literal(name: str) -> Path | None:
    """Where a name points when nothing is made of it but a path; None if it can be none."""
    try:
        return Path(os.path.realpath(Path(os.path.expanduser(name))))
    except (OSError, ValueError, RuntimeError):
        return None


def names(count: int, seed: int) -> list[str]:
    """`count` hostile names: the known ones, then atoms joined at random."""
    draw = random.Random(seed)
    made = WHOLE[:count]
    while len(made) < count:
        parts = [draw.choice(ATOMS) for _ in range(draw.randint(1, 6))]
        made.append(
            draw.choice(["", "", "/", "./", "../", "runs/"]) + draw.choice("//////\\.").join(parts)
        )
    return made


def furnish(root: Path) -> Path:
    """The run root with a run, an adapter, a model and links that lead out; returns what lies outside."""
    outside = root.parent / "out"
    for folder in (root / "runs/run", root / "adapter", root / "model", outside / "adapter"):
        folder.mkdir(parents=True)
    tensor = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    weights = len(tensor).to_bytes(8, "little") + tensor + bytes(16)
    adapter = json.dumps({"peft_type": "LORA", "r": 1, "base_model_name_or_path": "model"})
    for folder in (root / "runs/run", root / "adapter", outside / "adapter"):
        (folder / "adapter_config.json").write_text(adapter)
        (folder / "adapter_model.safetensors").write_bytes(weights)
    (root / "model/config.json").write_text("{}")
    (root / "model/model.safetensors").write_bytes(weights)
    (root / "runs/run/config.yml").write_text("model:\n  name: model\n")
    (root / "file.gguf").write_bytes(b"GGUF")
    (root / "runs/link").symlink_to(outside)
    (root / "runs/loop").symlink_to("loop")
    return outside


def fuzz(count: int, seed: int) -> tuple[Watch, Counter[str], list[str]]:
    """Try `count` names on everything that makes a path of a name; what was seen, ended and crashed."""
    home = Path(tempfile.mkdtemp(prefix="fuzz-names-"))
    root = home / "root"
    furnish(root)
    # The libraries' own caches, set before they are imported.
    os.environ |= {
        "ETUDE_CACHE": str(root / "cache"),
        "HF_HOME": str(root / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    # What a library reads when it is imported is its own.
    import datasets  # noqa: F401
    import filelock  # noqa: F401
    import huggingface_hub  # noqa: F401

    from etude import evaluation
    from etude import train_with_config as training
    from etude.config.loading import load_config, preset_path
    from etude.conversation import history
    from etude.data import readers
    from etude.errors import UserError
    from etude.models import loading, lora
    from etude.runs import opening

    before = Path.cwd()
    os.chdir(root)
    watch = Watch(root)
    ends: Counter[str] = Counter()
    crashes: list[str] = []

    def load(name: str, *_: object) -> None:
        # Up to the model: the rest is transformers', on a folder that has passed.
        loading.locate(name)
        raise UserError("the model is not loaded here")

    def report(name: str) -> None:
        with evaluation.report_folder(name, None) as folder:
            (folder / "report.json").write_text("{}")

    def output(name: str) -> None:
        training.open_folder(load_config(None, overrides=[f"output.dir={name}"]), None)

    def save(name: str) -> None:
        history.save(history.Conversation(), Path(os.path.expanduser(name)))

    def in_adapter(name: str) -> None:
        values = {
            "peft_type": "LORA",
            "r": 1,
            "base_model_name_or_path": name,
            "target_modules": [name],
        }
        Path("adapter/adapter_config.json").write_text(json.dumps(values))
        loading.locate(opening.open_config("adapter", []).model.name)

    def in_modules(name: str) -> None:
        lora.describe(Path("adapter"))

    def in_index(name: str) -> None:
        index = Path("model/model.safetensors.index.json")
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        try:
            loading.locate("model")
        finally:
            index.unlink()

    def in_tokenizer(name: str) -> None:
        file = Path("model/tokenizer_config.json")
        file.write_text(json.dumps({"fast_tokenizer_files": [name]}))
        try:
            loading.locate("model")
        finally:
            file.unlink()

    def control(name: str) -> None:
        folder = Path("runs", name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text("{}")

    def attempt(
        what: str, action: Callable[[str], object], name: str, typed: bool, writable: bool = False
    ) -> None:
        watch.typed = literal(name) if typed else None
        watch.writable = writable
        watch.armed = watch.on
        try:
            action(name)
            end = "a path"
        except UserError:
            end = "a sentence"
        except OSError:
            end = "the system's sentence"
        except Exception as error:
            end = "a crash"
            crashes.append(f"{what}({name!r:.80}): {type(error).__name__}: {error!s:.100}")
        finally:
            watch.armed = False
        ends[f"{what}: {end}"] += 1

    # What no argument and no line typed can hold; a file can.
    impossible = re.compile("[\0\ud800-\udbff]")

    def convert(file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(bytes(8))

    converter, loading._convert = loading._convert, convert
    loader, loading.load = loading.load, load  # type: ignore[assignment]
    try:
        for name in ["runs/run", *names(count, seed)]:
            if not impossible.search(name):
                attempt(
                    "a run to open", lambda name: opening.open_target(name, []), name, typed=True
                )
                own = is_adapter(name)
                attempt("a report's folder", report, name, typed=True, writable=own)
                attempt("output.dir", output, name, typed=True)
                attempt("a data file", readers.read, name + ".jsonl", typed=True)
                attempt("a preset", preset_path, name, typed=True)
                attempt("/save", save, name, typed=True, writable=True)
                attempt(
                    "/load",
                    lambda name: history.load(Path(os.path.expanduser(name))),
                    name,
                    typed=True,
                )
            attempt("a model", loading.locate, name, typed=True)
            attempt("a base in an adapter", in_adapter, name, typed=True)
            attempt("layers in an adapter", in_modules, name, typed=False)
            attempt("a file in a weight index", in_index, name, typed=False)
            attempt("a file in a tokenizer", in_tokenizer, name, typed=False)
            watch.on = True  # the first name only imported what there is to import
        found, watch.violations = watch.violations, []
        for name in ("../../out", "/tmp/fuzz-names-control"):
            attempt("control", control, name, typed=False)
            if not watch.violations:
                found.append(f"the negative control, a naive join of {name}, was not caught")
            watch.violations = []
        watch.violations = found
    finally:
        loading.load, loading._convert = loader, converter
        os.chdir(before)
        shutil.rmtree(home)
    return watch, ends, crashes


def is_adapter(name: str) -> bool:
    """Whether `name` is an adapter's folder; False where it is no possible path."""
    path = literal(name)
    try:
        return path is not None and (path / "adapter_config.json").is_file()
    except OSError:
        return False


def main() -> int:
    """Fuzz, print the counts, and say by the exit code whether the rule held."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--names", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    watch, ends, crashes = fuzz(options.names, options.seed)
    for what, times in sorted(ends.items()):
        print(f"{times:>8,}  {what}")
    print(f"{watch.seen['read']:,} reads and {watch.seen['written']:,} writes were watched")
    for line in [*watch.violations[:20], *crashes[:20]]:
        print(f"AGAINST THE RULE: {line}")
    print(
        f"{options.names:,} names: {len(watch.violations)} outside the rule, {len(crashes)} crashes"
    )
    return 1 if watch.violations or crashes else 0


if __name__ == "__main__":
    sys.exit(main())
