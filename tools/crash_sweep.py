"""Kill, starve and damage real trainings; each must end as the uninterrupted one, bit for bit.

    python tools/crash_sweep.py [--kills 220] [--seed 0] [--model tiny|sample]

A training is `etude train` itself, forked (Unix only) from a process that has imported torch. Kills are
SIGKILLs at random moments, half of them while something unfinished lies in the run's folder; after
each, every checkpoint must be whole, and the newest no older than before. A full disk is a small tmpfs
(root on Linux only) that fills up. Each file of the newest checkpoint is truncated, has a bit flipped,
or is deleted: resume says so and takes the one before. Controls: damage of which the sums know nothing
must end differently, or the comparison is blind. `--model sample` kills the bundled model five times
instead of a tiny random one, in float32 and int8. Exit code 1 at the first violation; all files stay.
"""

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import typer

from etude import files, train_with_config
from etude.models import gguf, loading
from etude.runs import proof
from etude.runs.folder import CHECKPOINTS, LOCK, MANIFEST, METRICS
from etude.runs.manifest import read_metrics
from etude.training import checkpoints

OFTEN = 5  # kills from which a training counts as often killed
ADAPTER = "adapter_model.safetensors"
# Dropout for random numbers; logged, validated and ended an epoch out of step.
SETTINGS = [
    *("dataset.validation=null", "dataset.validation_split=0.2", "dataset.test=null", "lora.r=4"),
    *("lora.dropout=0.1", "training.batch_size=2", "training.num_epochs=2"),
    *("training.save_steps=1", "training.eval_steps=5", "training.logging_steps=3"),
    "training.compile=false",
]
Strike = Callable[[float], bool]  # given the seconds since a training began: kill it now?


def must(hold: bool, told: str) -> None:
    """Raise AssertionError, also under -O, unless it holds."""
    if not hold:
        raise AssertionError(told)


class Sweep:
    """One training, begun again and again in one folder, and the counts of what was done to it."""

    def __init__(self, home: Path, settings: list[str], seed: int, proven: bool) -> None:
        """Train undisturbed in `home`; `proven`: with the proof in a new process, which takes seconds."""
        self.out, self.copy, self.log = home / "out", home / "copy", home / "log"
        self.folder = self.out / "run"  # always the same, for checkpoints hold its path
        self.home = self.folder / CHECKPOINTS
        self.settings = [*settings, f"output.dir={self.folder}"]
        self.draw, self.proven = random.Random(seed), proven
        self.counts: Counter[str] = Counter()
        self.step = 0  # the newest checkpoint's
        self.out.mkdir(parents=True)
        begun = time.monotonic()
        self.run()
        self.seconds = time.monotonic() - begun
        self.check()
        self.steps, self.reference = self.step, self.end()

    def train(self) -> None:
        """What the forked process does."""
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if not self.proven:
            proof.in_a_new_process = lambda folder: "left out"
        try:
            train_with_config.train(self.settings, None, ["quickstart"])
        except typer.Exit as end:
            sys.exit(end.exit_code)

    def run(self, strike: Strike | None = None) -> int | None:
        """Train until it ends, with its exit code, or until `strike` had it killed: None."""
        begun = time.monotonic()
        child = multiprocessing.get_context("fork").Process(target=self.train)
        child.start()
        while child.is_alive():
            if strike and strike(time.monotonic() - begun):
                child.kill()
                break
            time.sleep(0.001)
        child.join()
        must(bool(strike) or child.exitcode == 0, f"undisturbed, exit code {child.exitcode}")
        return None if child.exitcode == -9 else child.exitcode

    def afresh(self) -> None:
        """Begin with no run at all."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.step = 0

    def made(self) -> list[Path]:
        """The checkpoints in the folder, oldest first."""
        return sorted(self.home.glob("checkpoint-*"), key=checkpoints.step_of)

    def unfinished(self) -> set[Path]:
        """What is being written, or was when a kill came."""
        name = f"{files.UNFINISHED}*"
        return {*self.folder.glob(name), *self.home.glob(name)}

    def check(self) -> None:
        """Hold what lies there to the rule: all checkpoints whole, the newest no older than before."""
        for checkpoint in self.made():
            # Not by `checkpoints.why_not`, which is what is tested.
            sums = json.loads((checkpoint / checkpoints.SUMS).read_text())
            must(sums == digests(checkpoint), f"{checkpoint} is not whole")
        newest, passed_over = checkpoints.newest(self.home)
        last = self.made()[-1] if self.made() else None
        must(newest == last and not passed_over, f"the newest is said to be {newest}")
        before, self.step = self.step, checkpoints.step_of(newest) if newest else 0
        must(self.step >= before, f"step {before} was done, and the newest has {self.step}")

    def end(self) -> dict[str, Any]:
        """All that a finished run ended with, except times."""
        lines = read_metrics(self.folder / METRICS)
        results = files.read_json(self.folder / MANIFEST)["results"]
        progress = files.read_json(self.made()[-1] / checkpoints.PROGRESS)
        del progress["tally"]["began"]  # a time
        return {
            "adapter": sha256((self.folder / ADAPTER).read_bytes()).hexdigest(),
            "logged losses": [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
            "results": [results[key] for key in ("steps", "train_loss", "eval_loss")],
            "checkpoints": [path.name for path in self.made()],
            "leftovers": [str(path) for path in self.unfinished()],
            "files": sorted(path.name for path in self.folder.iterdir()),
            **{f"last {name}": digest for name, digest in digests(self.made()[-1]).items()},
            f"last {checkpoints.PROGRESS}": progress,
        }

    def compare(self) -> None:
        """Hold the finished run to the uninterrupted one."""
        self.check()
        now, then = self.end(), self.reference
        differing = [key for key in now.keys() | then.keys() if now.get(key) != then.get(key)]
        must(not differing, f"other than the uninterrupted run: {differing}")
        self.counts["runs compared with the uninterrupted one: equal bit for bit"] += 1

    def killer(self, share: float) -> Strike:
        """A random moment within a `share` of the time of an undisturbed training."""
        there, saving = self.unfinished(), self.draw.random() < 0.5
        moment = self.draw.uniform(0, self.seconds * share)
        # At the beginning of the save that is under way, or somewhere in it.
        pause = saving * max(0, self.draw.uniform(-0.3, 0.3)) * self.seconds / self.steps

        def strike(seconds: float) -> bool:
            now = seconds >= moment and (not saving or bool(self.unfinished() - there))
            time.sleep(pause * now)
            return now

        return strike

    def kill(self, limit: int, share: float) -> int:
        """A training from its start, killed up to `limit` times, then compared; how often it was."""
        self.afresh()
        for kills in range(limit + 1):
            there = self.unfinished()
            code = self.run(self.killer(share) if kills < limit else lambda *_: False)
            if code is not None:
                break
            self.check()
            where = "in a save" if self.unfinished() - there else "elsewhere"
            where = "after the last checkpoint" if self.step == self.steps else where
            self.counts[f"kills {where}"] += 1
            self.counts["locks of killed processes taken over"] += (self.folder / LOCK).exists()
            if (self.folder / MANIFEST).is_file():  # the kill came when all was done
                code, kills = 0, kills + 1
                break
        must(code == 0, f"the training ended with exit code {code}")
        self.compare()
        self.counts[f"trainings killed {OFTEN} times or more"] += kills >= OFTEN
        return kills

    def full_disk(self, times: int) -> None:
        """Fill the disk under a training `times` times, then let it end."""
        ballast, goal, spare = self.out / "ballast", 0, 0
        size = sum(file.stat().st_size for file in self.made()[-1].iterdir())
        mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "crash-sweep", str(self.out)]
        if subprocess.run(mount, check=False, capture_output=True).returncode:
            print("full disk: skipped, for this user may not mount a tmpfs")
            return

        def fill(seconds: float) -> bool:
            disk = os.statvfs(self.out)
            room = disk.f_bavail * disk.f_frsize - spare
            if room > 0 and max(map(checkpoints.step_of, self.made()), default=0) >= goal:
                with contextlib.suppress(OSError), ballast.open("ab") as stream:
                    os.posix_fallocate(stream.fileno(), stream.tell(), room)
            return False

        try:
            self.afresh()
            for turn in range(times):
                # Every third time the disk is full already when the training goes on.
                goal = 0 if turn % 3 == 2 else min(self.step + 2, self.steps // 2)
                spare = self.draw.randrange(size)  # some files of a checkpoint fit, not all
                code, told = self.run(fill), self.log.read_text()
                self.check()
                clear = "error: " in told and "disk is full" in told and "Traceback" not in told
                must(code == 2 and clear, f"a full disk ended with exit code {code}")
                ballast.unlink()
                self.counts["full disks: told in a sentence, exit code 2"] += 1
            self.run()
            self.compare()
        finally:
            subprocess.run(["umount", str(self.out)], check=False)

    def damage(self, limit: int) -> None:
        """Damage each file of a checkpoint in each way, or `limit` of these; then the controls."""
        self.afresh()
        self.run(lambda *_: any(checkpoints.step_of(x) >= self.steps // 2 for x in self.made()))
        before, newest = self.made()[-2:]
        shutil.copytree(self.folder, self.copy)
        cases: list[tuple[str, str, bytes | None]] = []
        for file in sorted(newest.iterdir()):
            name, content = file.name, file.read_bytes()
            at = self.draw.randrange(len(content))
            flipped = content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]
            ways = {"truncated": content[:at], "flipped": flipped, "deleted": None}
            cases += [(way, name, changed) for way, changed in ways.items()]
        weights, last = bytearray((newest / ADAPTER).read_bytes()), f"last {ADAPTER}"
        weights[-6] ^= 0x10  # in the mantissa of a weight
        state, progress = "state.safetensors", checkpoints.PROGRESS
        earlier, later = (files.read_json(folder / progress) for folder in (before, newest))
        later["scheduler"] = earlier["scheduler"]
        controls = [
            ("moments and random states of the step before", state, (before / state).read_bytes()),
            ("learning rate of the step before", progress, json.dumps(later).encode()),
            ("a bit flipped in a weight", ADAPTER, bytes(weights)),
        ]
        for case in [*self.draw.sample(cases, min(limit, len(cases))), *controls]:
            (what, name, changed), hidden = case, case in controls
            self.afresh()
            shutil.copytree(self.copy, self.folder)
            (newest / name).unlink() if changed is None else (newest / name).write_bytes(changed)
            if hidden:
                (newest / checkpoints.SUMS).write_text(json.dumps(digests(newest)))
            self.run()
            told, taken = self.log.read_text(), newest if hidden else before
            must(f"from {taken}\n" in told, f"{name} {what}: not resumed from {taken}")
            must(
                hidden != (f"{newest}: skipped: corrupt, " in told), f"{name} {what}: not said why"
            )
            if hidden:
                must(self.end()[last] != self.reference[last], f"control: {what}: no difference")
                self.counts[f"control: {what}, sums rewritten: ends differently"] += 1
            else:
                self.compare()
                self.counts[f"files {what}: told, and the checkpoint before taken"] += 1


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a checkpoint but the sums themselves."""
    files = [file for file in folder.iterdir() if file.name != checkpoints.SUMS]
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in files}


def prepare(home: Path, rows: int, tiny: bool) -> list[str]:
    """Write `rows` rows of data and a `tiny` random model; returns the settings."""
    data = Path(__file__).parent.parent / "data" / "tweets_sentiment.train.jsonl"
    (home / "rows.jsonl").write_text("\n".join(data.read_text().splitlines()[:rows]))
    if tiny:
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

        tokenizer = AutoTokenizer.from_pretrained(loading.locate(gguf.SAMPLE))
        tokenizer.save_pretrained(home / "tiny")
        sizes: Any = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32}
        config = LlamaConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
        set_seed(0)
        LlamaForCausalLM(config).save_pretrained(home / "tiny")
    model = [f"model.name={home / 'tiny'}"] if tiny else []
    return [*SETTINGS, *model, f"dataset.train={home / 'rows.jsonl'}"]


def sweep(options: argparse.Namespace, home: Path) -> Counter[str]:
    """Do what the command line asks for; returns the counts."""
    tiny, counts = options.model == "tiny", Counter[str]()
    settings, left = prepare(home, options.rows, tiny), options.kills
    for kind in ("null",) if tiny else ("null", "int8"):
        run = Sweep(home / kind, [*settings, f"model.quantization={kind}"], options.seed, not tiny)
        print(f"{options.model}, {kind}: {run.steps} steps in {run.seconds:.1f} s", flush=True)
        while tiny and left:
            left -= run.kill(min(left, run.draw.randint(OFTEN, 3 * OFTEN)), 1 / 2)
            print(f"{left} kills to go", file=sys.stderr)
        while not tiny and run.kill(OFTEN, 1 / 4) < OFTEN:
            pass
        if tiny:
            run.full_disk(options.disks)
            run.damage(options.damages)
        counts += run.counts
    return counts


def main() -> int:
    """Sweep, print the counts, and say by the exit code whether all held."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("tiny", "sample"), default="tiny")
    defaults = {"kills": 220, "disks": 12, "damages": 99, "rows": 32, "seed": 0}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    # One thread, so that a fork is safe; the libraries read it when they are imported.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from matplotlib.backends import backend_agg  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    from etude.training import trainer  # noqa: F401

    gc.freeze()  # a child need not look through all that again
    home, begun = Path(tempfile.mkdtemp(prefix="crash-sweep-")), time.monotonic()
    try:
        counts = sweep(options, home)
    except AssertionError as violation:
        print(f"VIOLATION with --seed {options.seed}: {violation}; everything lies in {home}")
        return 1
    shutil.rmtree(home)
    for what, times in sorted(counts.items()):
        print(f"{times:>6,}  {what}")
    kills = sum(times for what, times in counts.items() if what.startswith("kills "))
    print(f"{kills} kills, 0 violations; {time.monotonic() - begun:.0f} s, seed {options.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
