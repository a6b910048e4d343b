"""Kill, starve and damage real trainings; each must end as the uninterrupted one, bit for bit.

    python tools/crash_sweep.py [--kills 220] [--seed 0] [--model tiny|sample]

A training is `etude train` itself, in a fork (Unix only) of a process that has imported torch. Kills are
SIGKILLs at random moments, half of them while something unfinished lies in the run's folder; after
each, every checkpoint must be whole, and the newest no older than before. A full disk is a small tmpfs
(root on Linux only) that fills up. Each file of the newest checkpoint is truncated, has a bit flipped,
or is deleted: resume says so and takes the one before. Controls: damage of which the sums know nothing
must end differently, or the comparison is blind. Compared are the adapter, the last checkpoint, the
logged losses and what lies around. `--model sample` kills the bundled model five times instead of a
tiny random one, in float32 and int8. Exit code 1 at the first violation; the folder stays.
"""

import argparse
import contextlib
import importlib
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

from etude import checkpoints, models, proof, report, runs, terminal, train_with_config

DATA = Path(__file__).parent.parent / "data"
OFTEN = 5  # kills from which a training counts as often killed
ADAPTER, STATE, PLACE = "adapter_model.safetensors", "state.safetensors", "trainer_state.json"
DISK = 16 * 2**20  # bytes
# Dropout for random numbers; logged, validated and ended an epoch out of step.
SETTINGS = [
    *("dataset.test=null", "lora.r=4", "lora.dropout=0.1", "training.batch_size=2"),
    *("training.num_epochs=2", "training.save_steps=1", "training.logging_steps=3"),
    *("training.eval_steps=5", "training.compile=false", "training.lr_scheduler=cosine"),
]
# Given the seconds since the process began, and since its first step (None before it): kill it now?
Strike = Callable[[float, float | None], bool]


class Violation(Exception):
    """Something that must never happen."""


class Sweep:
    """One training, begun again and again in one folder, and the counts of what was done to it."""

    def __init__(self, home: Path, settings: list[str], seed: int, proven: bool) -> None:
        """Train undisturbed in `home`; `proven`: with the proof in a new process, which takes seconds."""
        self.out, self.copy, self.log = home / "out", home / "copy", home / "log"
        self.folder = self.out / "run"  # always the same, for checkpoints hold its path
        self.settings = [*settings, f"output.dir={self.folder}"]
        self.draw, self.proven = random.Random(seed), proven
        self.counts: Counter[str] = Counter()
        self.step = 0  # the newest checkpoint's
        self.out.mkdir(parents=True)
        begun = time.monotonic()
        self.run()
        self.starting, self.training = self.started - begun, time.monotonic() - self.started
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
        metrics = self.folder / runs.METRICS  # written anew where the steps begin
        before = metrics.stat().st_ino if metrics.exists() else 0
        self.started, begun = 0.0, time.monotonic()
        child = multiprocessing.get_context("fork").Process(target=self.train)
        child.start()
        while child.is_alive():
            now = time.monotonic()
            if not self.started and metrics.exists() and metrics.stat().st_ino != before:
                self.started = now
            if strike and strike(now - begun, now - self.started if self.started else None):
                child.kill()
                break
            time.sleep(0.0003)
        child.join()
        if not strike and child.exitcode != 0:
            raise Violation(f"undisturbed, it ended with exit code {child.exitcode}")
        return None if child.exitcode == -9 else child.exitcode

    def afresh(self) -> None:
        """Begin with no run at all."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.step = 0

    def made(self) -> list[Path]:
        """The checkpoints in the folder, oldest first."""
        found = (self.folder / runs.CHECKPOINTS).glob("checkpoint-*")
        return sorted(found, key=checkpoints.step_of)

    def unfinished(self) -> set[Path]:
        """What is being written, or was when a kill came."""
        name = f"{checkpoints.UNFINISHED}*"
        return {*self.folder.glob(name), *self.folder.glob(f"*/{name}")}

    def check(self) -> None:
        """Hold what lies there to the rule: all checkpoints whole, the newest no older than before."""
        made = self.made()
        for checkpoint in made:
            # Not by `checkpoints.why_not`, which is what is tested.
            if json.loads((checkpoint / checkpoints.SUMS).read_text()) != digests(checkpoint):
                raise Violation(f"{checkpoint} is not whole")
        newest, passed_over = checkpoints.newest(self.folder / runs.CHECKPOINTS)
        if passed_over or newest != (made[-1] if made else None):
            raise Violation(f"the newest is said to be {newest}: {passed_over}")
        before, self.step = self.step, checkpoints.step_of(newest) if newest else 0
        if self.step < before:
            raise Violation(f"step {before} was done, and the newest checkpoint has {self.step}")

    def end(self) -> dict[str, Any]:
        """All that a finished run ended with, except times."""
        lines = report.read_metrics(self.folder / runs.METRICS)
        results = runs.read_json(self.folder / runs.MANIFEST)["results"]
        return {
            "adapter": sha256((self.folder / ADAPTER).read_bytes()).hexdigest(),
            "logged losses": [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
            "results": [results[key] for key in ("steps", "train_loss", "eval_loss")],
            "checkpoints": [path.name for path in self.made()],
            "leftovers": [str(path) for path in self.unfinished()],
            **{f"last {name}": digest for name, digest in digests(self.made()[-1]).items()},
        }

    def compare(self) -> list[str]:
        """In what the finished run is not the uninterrupted one."""
        now, then = self.end(), self.reference
        return sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))

    def same(self) -> None:
        """Hold the finished run to the uninterrupted one."""
        self.check()
        if differing := self.compare():
            raise Violation(f"other than the uninterrupted run: {', '.join(differing)}")
        self.counts["runs compared with the uninterrupted one: equal bit for bit"] += 1

    def killer(self, share: float) -> Strike:
        """A random moment: one in ten while it starts, else within a `share` of the training."""
        there, early, saving = self.unfinished(), *(self.draw.random() < p for p in (0.1, 0.5))
        moment = self.draw.uniform(0, self.starting if early else self.training * share)
        # At the beginning of the save that is under way, or somewhere in it.
        pause = max(0, self.draw.uniform(-0.3, 0.3)) * self.training / self.steps

        def strike(seconds: float, training: float | None) -> bool:
            passed = seconds if early else training
            if passed is None or passed < moment or (saving and not self.unfinished() - there):
                return False
            time.sleep(pause if saving else 0)
            return True

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
            new = [path.parent.name for path in self.unfinished() - there]
            where = "after the last step" if self.step == self.steps else "between saves"
            if new:
                where = "in a save" if runs.CHECKPOINTS in new else "while another file was written"
            self.counts[f"kills {where if self.started else 'while it started'}"] += 1
        if code != 0:
            raise Violation(f"the training ended with exit code {code}")
        self.same()
        self.counts[f"trainings killed {OFTEN} times or more"] += kills >= OFTEN
        return kills

    def full_disk(self, times: int) -> None:
        """Fill the disk under a training `times` times, then let it end."""
        ballast, goal, spare = self.out / "ballast", 0, 0
        size = sum(file.stat().st_size for file in self.made()[-1].iterdir())
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "crash-sweep", str(self.out)]
        if subprocess.run(mount, check=False, capture_output=True).returncode:
            print("full disk: skipped, for this user may not mount a tmpfs")
            return

        def fill(*_: float | None) -> bool:
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
                goal = 0 if turn % 3 == 2 else self.step + self.draw.randint(1, 3)
                spare = self.draw.randrange(size)  # some files of a checkpoint fit, not all
                code, told = self.run(fill), self.log.read_text()
                self.check()
                if code != 2 or "disk is full" not in told or "Traceback" in told:
                    raise Violation(f"a full disk ended with exit code {code}")
                ballast.unlink()
                self.counts["full disks: told in a sentence, exit code 2"] += 1
            self.run()
            self.same()
        finally:
            subprocess.run(["umount", str(self.out)], check=False)

    def damage(self, limit: int) -> None:
        """Damage each file of a checkpoint in each way, or `limit` of these; then the controls."""
        self.afresh()
        self.run(lambda *_: any(checkpoints.step_of(x) >= self.steps // 2 for x in self.made()))
        before, newest = self.made()[-2:]
        shutil.copytree(self.folder, self.copy)
        older, files = (
            {x.name: x.read_bytes() for x in path.iterdir()} for path in (before, newest)
        )
        cases: list[tuple[str, str, bytes | None]] = []
        for name, content in sorted(files.items()):
            at = self.draw.randrange(len(content))
            flipped = content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]
            cases += [("truncated", name, content[:at]), ("flipped", name, flipped)]
            cases += [("deleted", name, None)]
        weights = bytearray(files[ADAPTER])
        weights[-6] ^= 0x10  # in the mantissa of a weight
        controls = [
            ("optimizer and random states of the step before", STATE, older[STATE]),
            ("place in the data of the step before", PLACE, older[PLACE]),
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
            if f"from {taken}\n" not in told or hidden == (f"{newest}: passed over, " in told):
                raise Violation(f"{name}, {what}: not resumed from {taken}, or not said why")
            if not hidden:
                self.same()
                self.counts[f"files {what}: told, and the checkpoint before taken"] += 1
            elif f"last {ADAPTER}" in self.compare():
                self.counts[f"control: {what}, sums rewritten: ends differently"] += 1
            else:
                raise Violation(f"control: {what}, and the comparison saw no difference")


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a checkpoint but the sums themselves."""
    files = [file for file in folder.iterdir() if file.name != checkpoints.SUMS]
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in files}


def prepare(home: Path, tiny: bool) -> list[str]:
    """Write the data and a `tiny` random model; returns the settings."""
    for split, rows in (("train", 26), ("validation", 6)):
        lines = (DATA / f"tweets_sentiment.{split}.jsonl").read_text().splitlines()[:rows]
        (home / f"{split}.jsonl").write_text("\n".join(lines))
    if tiny:
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

        tokenizer = AutoTokenizer.from_pretrained(models.locate(models.SAMPLE))
        tokenizer.save_pretrained(home / "tiny")
        sizes: Any = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32}
        config = LlamaConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
        set_seed(0)
        LlamaForCausalLM(config).save_pretrained(home / "tiny")
    files = [f"dataset.{split}={home / split}.jsonl" for split in ("train", "validation")]
    return [*SETTINGS, *files, *([f"model.name={home / 'tiny'}"] if tiny else [])]


def sweep(options: argparse.Namespace, home: Path) -> Counter[str]:
    """Do what the command line asks for; returns the counts."""
    tiny, counts = options.model == "tiny", Counter[str]()
    settings = prepare(home, tiny)
    for kind in ("null",) if tiny else ("null", "int8"):
        made = [*settings, f"model.quantization={kind}"]
        run = Sweep(home / kind, made, options.seed, proven=not tiny)
        each = f"{run.steps} steps of {run.training / run.steps:.2f} s with their checkpoints"
        print(f"{options.model}, {kind}: {each}, {run.starting:.1f} s to start", flush=True)
        if tiny:
            left = options.kills
            while left:
                left -= run.kill(min(left, run.draw.randint(OFTEN, 3 * OFTEN)), 1 / 2)
            run.full_disk(options.disks)
            run.damage(options.damages)
        else:
            # A short share, so that it does not end before.
            while run.kill(OFTEN, 1 / 12) < OFTEN:
                pass
        counts += run.counts
    return counts


def main() -> int:
    """Sweep, print the counts, and say by the exit code whether all held."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("tiny", "sample"), default="tiny")
    for name, default in (("kills", 220), ("disks", 12), ("damages", 100), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    # One thread, so that a fork is safe; the libraries read it when they are imported.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for module in (
        "matplotlib.figure",
        "transformers.models.llama.modeling_llama",
        "etude.trainer",
    ):
        importlib.import_module(module)
    terminal.quiet_transformers()
    home, begun = Path(tempfile.mkdtemp(prefix="crash-sweep-")), time.monotonic()
    try:
        counts = sweep(options, home)
    except Violation as violation:
        print(f"VIOLATION with --seed {options.seed}: {violation}\nEverything lies in {home}")
        for log in home.glob("*/log"):
            print(log.read_text()[-3000:])
        return 1
    shutil.rmtree(home)
    for what, times in sorted(counts.items()):
        print(f"{times:>6,}  {what}")
    kills = sum(times for what, times in counts.items() if what.startswith("kills "))
    print(f"{kills} kills, 0 violations; {time.monotonic() - begun:.0f} s, seed {options.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
