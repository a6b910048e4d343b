"""Whatever a run, model or file is called: nothing is written outside the run root, and no name crashes.

An audit hook sees every file that Python writes, makes, moves or removes, before it happens, and stops
what lies outside. Names are tried as a user types them, and as they stand in files of others.
"""

import json
import os
import random
import re
import sys
from pathlib import Path

import pytest

from etude.config.loading import load_config, preset_path
from etude.conversation import history
from etude.data import readers
from etude.errors import UserError
from etude.models import gguf, loading, lora
from etude.runs import evaluations, opening
from etude.training import resuming

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
NOT_TYPED = re.compile("[\0\ud800-\udbff]")  # what no argument can hold; a file can


class Watch:
    """What an audit hook stopped while it had a root. A hook stays for good, hence one object."""

    root: Path | None = None
    stopped: list[str]

    def __call__(self, event, args):
        if self.root is None:
            return
        if event == "open":
            mode, flags = args[1] or "", args[2]
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if not (set(mode) & set("wax+") if mode else writes):
                return
        elif event not in WRITES:
            return
        for raw in args[:2] if event != "open" else args[:1]:
            if isinstance(raw, (str, bytes, os.PathLike)):
                path = Path(os.path.realpath(os.fsdecode(raw)))
                if not path.is_relative_to(self.root):
                    self.stopped.append(f"{event} {path}")
                    raise PermissionError(13, "outside the run root", str(path))


@pytest.fixture(scope="module")
def watch():
    hook = Watch()
    sys.addaudithook(hook)
    return hook


def names(count):
    """The known hostile names, then atoms joined at random."""
    draw = random.Random(0)
    made = WHOLE.copy()
    while len(made) < count:
        parts = [draw.choice(ATOMS) for _ in range(draw.randint(1, 6))]
        start = draw.choice(["", "", "/", "./", "../", "runs/"])
        made.append(start + draw.choice("//////\\.").join(parts))
    return made


def furnish(root):
    """A run, an adapter, a model, and links that lead out of the run root."""
    tensor = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    weights = len(tensor).to_bytes(8, "little") + tensor + bytes(16)
    adapter = {"peft_type": "LORA", "r": 1, "base_model_name_or_path": "model"}
    for folder in (root / "runs/run", root / "adapter", root.parent / "out/adapter"):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
        (folder / "adapter_model.safetensors").write_bytes(weights)
    (root / "model").mkdir()
    (root / "model/config.json").write_text("{}")
    (root / "model/model.safetensors").write_bytes(weights)
    (root / "runs/run/config.yml").write_text("model:\n  name: model\n")
    (root / "file.gguf").write_bytes(b"GGUF")
    (root / "runs/link").symlink_to(root.parent / "out")
    (root / "runs/loop").symlink_to("loop")


def report(name):
    with evaluations.report_folder(name, None) as folder:
        (folder / "report.json").write_text("{}")


def output(name):
    resuming.open_folder(load_config(None, overrides=[f"output.dir={name}"]), None)


def save(name):
    history.save(history.Conversation(), Path(os.path.expanduser(name)))


def locate(name, *_):
    loading.locate(name)
    raise UserError("the rest is transformers', on a folder that has passed")


def in_adapter(name):
    values = {
        "peft_type": "LORA",
        "r": 1,
        "base_model_name_or_path": name,
        "target_modules": [name],
    }
    Path("adapter/adapter_config.json").write_text(json.dumps(values))
    lora.describe(Path("adapter"))
    loading.locate(opening.open_config("adapter", []).model.name)


TYPED = {
    "a run to open": lambda name: opening.open_target(name, []),
    "a report's folder": report,
    "output.dir": output,
    "a data file": lambda name: readers.read(name + ".jsonl"),
    "a preset": preset_path,
    "/save": save,
    "/load": lambda name: history.load(Path(os.path.expanduser(name))),
}
WRITTEN = {"a model": loading.locate, "in an adapter": in_adapter}
# These write where the user's own words lead: into an adapter that is elsewhere, to FILE.
FOLLOWS = {"a report's folder", "/save"}


def test_no_name_leads_out_of_the_run_root(tmp_path, monkeypatch, watch):
    root = (tmp_path / "root").resolve()
    furnish(root)
    monkeypatch.chdir(root)
    monkeypatch.setenv("ETUDE_CACHE", str(root / "cache"))
    monkeypatch.setattr(loading, "load_base", locate)
    monkeypatch.setattr(
        gguf, "_convert", lambda file, folder: (folder / "model.safetensors").write_bytes(b"x")
    )
    outside, ends = [], {what: 0 for what in [*TYPED, *WRITTEN]}
    for number, name in enumerate(["runs/run", *names(300)]):
        for what, action in (WRITTEN if NOT_TYPED.search(name) else TYPED | WRITTEN).items():
            # The first name only imports what there is to import.
            watch.root, watch.stopped = root if number else None, []
            try:
                action(name)
            except (UserError, OSError) as error:
                assert str(error)
                ends[what] += 1
            finally:
                watch.root = None
            if what not in FOLLOWS:
                outside += [f"{what}({name!r}): {stopped}" for stopped in watch.stopped]
    assert outside == []
    assert all(count > 5 for count in ends.values()), ends
    # The control: a naive join is caught.
    watch.root = root
    with pytest.raises(PermissionError, match="outside the run root"):
        Path("runs", "../../elsewhere").mkdir()
    watch.root = None
