"""Kill, starve and damage real trainings; each must end as the uninterrupted one, bit for bit.

    python tools/crash_sweep.py [--kills 220] [--seed 0] [--model tiny|sample]

A training is `etude train` itself, forked from a process that has imported torch already. With the
tiny random model that the script makes, these are done:

- Kills: SIGKILL at random moments, half of them while something unfinished lies in the run's folder.
  After each, every checkpoint must be whole by its sums, and the newest no older than before.
- A full disk, on a small tmpfs (root on Linux only): the error is a sentence and an exit code, the
  checkpoints stay whole, and with space again the training goes on.
- Damage: each file of the newest checkpoint is truncated, has a bit flipped, or is deleted. Resume
  says so and takes the one before.
- Controls: damage of which the sums know nothing must end differently, or the comparison is blind.

Compared are the adapter, the last checkpoint (weights, optimizer, random states, progress), the logged
losses and what lies around. `--model sample` kills the bundled model five times instead, in float32
and int8. Exit code 1 at the first violation, with the folder kept. Needs os.fork.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent.parent / "data"
ENOUGH = 5  # kills from which a training counts as often killed
CHECKPOINTS, SUMS, UNFINISHED = "checkpoints", "sha256.json", ".unfinished-"
ADAPTER, STATE = "adapter_model.safetensors", "state.safetensors"
DISK = 16 * 2**20  # bytes
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)


class Violation(Exception):
    """Something that must never happen."""


class Sweep:
    """One training, started again and again in one folder, and the counts of what was done to it."""

    def __init__(self, home: Path, settings: list[str], seed: int, proven: bool) -> None:
        """Train in `home` as `settings` say; `proven` by a new process at the end, which takes seconds."""
        self.out, self.log = home / "out", home / "log"
        self.folder = self.out / "run"  # always the same, for checkpoints hold its path
        self.copy = home / "copy"
        self.settings = [*settings, f"output.dir={self.folder}"]
        self.draw = random.Random(seed)
        self.proven = proven
        self.counts: Counter[str] = Counter()
        self.step = 0  # the newest checkpoint's
        self.starting = self.training = 0.0  # seconds that an uninterrupted run takes for either
        self.out.mkdir()
        begun = time.monotonic()
        self.started = 0.0
        self.finish()
        self.starting, self.training = self.started - begun, time.monotonic() - self.started
        self.steps = self.check()
        self.reference = self.end()

    def start(self) -> int:
        """Fork a process that trains; its output goes to the log."""
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            import typer

            from etude import proof, train_with_config

            if not self.proven:
                proof.in_a_new_process = lambda folder: "left out"
            try:
                train_with_config.train(self.settings, None, ["quickstart"])
                code = 0
            except typer.Exit as end:
                code = end.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def run(self, strike: Callable[[int, float | None], bool]) -> int | None:
        """Train until it ends, with its exit code, or until `strike` has killed it: None.

        `strike` gets the process and the seconds since its first step, or None before that.
        """
        metrics = self.folder / "metrics.jsonl"
        before = identity(metrics)
        child = self.start()
        self.started = 0.0
        try:
            while not (ended := os.waitpid(child, os.WNOHANG))[0]:
                now = time.monotonic()
                if not self.started and identity(metrics) not in (None, before):
                    self.started = now
                if strike(child, now - self.started if self.started else None):
                    os.kill(child, signal.SIGKILL)
                    ended = os.waitpid(child, 0)
                    break
                time.sleep(0.0003)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            raise
        code = os.waitstatus_to_exitcode(ended[1])
        return None if code == -signal.SIGKILL else code

    def finish(self) -> None:
        """Train to the end, undisturbed."""
        code = self.run(lambda *_: False)
        if code != 0 or not (self.folder / "manifest.json").is_file():
            raise Violation(f"the training ended with exit code {code}")

    def afresh(self, like: Path | None = None) -> None:
        """Begin with no run at all, or with a copy of one."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.step = 0
        if like:
            shutil.copytree(like, self.folder)

    def check(self) -> int:
        """Hold what lies there to the rule: all checkpoints whole, the newest no older than before."""
        from etude import checkpoints

        newest, passed_over = checkpoints.newest(self.folder / CHECKPOINTS)
        for checkpoint in self.made():
            # Not by `checkpoints.why_not`, which is what is tested.
            sums = json.loads((checkpoint / SUMS).read_text())
            if sums != {k: v for k, v in digests(checkpoint).items() if k != SUMS}:
                raise Violation(f"{checkpoint} is not whole")
        step = checkpoints.step_of(newest) if newest else 0
        if passed_over or newest != max(self.made(), key=number, default=None):
            raise Violation(f"the newest is said to be {newest}: {passed_over}")
        if step < self.step:
            raise Violation(f"step {self.step} was done, and the newest checkpoint has {step}")
        self.step = step
        return step

    def made(self) -> list[Path]:
        """The checkpoints in the folder, oldest first."""
        return sorted((self.folder / CHECKPOINTS).glob("checkpoint-*"), key=number)

    def unfinished(self) -> set[Path]:
        """What is being written, or was when a kill came."""
        return {*self.folder.glob(f"{UNFINISHED}*"), *self.folder.glob(f"*/{UNFINISHED}*")}

    def end(self) -> dict[str, Any]:
        """All that a finished run ended with, except times."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").open()]
        results = json.loads((self.folder / "manifest.json").read_text())["results"]
        last = self.made()[-1]
        return {
            "adapter": hashlib.sha256((self.folder / ADAPTER).read_bytes()).hexdigest(),
            "logged losses": [{k: v for k, v in x.items() if k != "seconds"} for x in lines],
            "results": [results[key] for key in ("steps", "train_loss", "eval_loss")],
            "checkpoints": [checkpoint.name for checkpoint in self.made()],
            "leftovers": sorted(str(path) for path in self.unfinished()),
            **{f"last {name}": digest for name, digest in digests(last).items()},
        }

    def differences(self) -> list[str]:
        """In what the finished run is not the uninterrupted one."""
        now = self.end()
        keys = now.keys() | self.reference.keys()
        return sorted(key for key in keys if now.get(key) != self.reference.get(key))

    def compare(self) -> None:
        """Hold the finished run to the uninterrupted one."""
        self.check()
        if differing := self.differences():
            raise Violation(f"other than the uninterrupted run: {', '.join(differing)}")
        self.counts["compared with the uninterrupted run, equal bit for bit"] += 1

    # --- what is done to a training ------------------------------------------------------------

    def killer(self, share: float) -> Callable[[int, float | None], bool]:
        """A random moment: one in ten while it starts, else within a `share` of the training."""
        left_behind, began = self.unfinished(), time.monotonic()
        early, saving = self.draw.random() < 0.1, self.draw.random() < 0.5
        moment = self.draw.uniform(0, self.starting if early else self.training * share)
        # Somewhere in the save that is under way, not always at its beginning.
        pause = self.draw.uniform(0, self.training / self.steps / 2)

        def strike(child: int, seconds: float | None) -> bool:
            passed = time.monotonic() - began if early else seconds
            if passed is None or passed < moment:
                return False
            if saving and not early:
                if not self.unfinished() - left_behind:
                    return False
                time.sleep(pause)
            return True

        return strike

    def killed(self, limit: int, share: float) -> int:
        """A training from its start, killed up to `limit` times, then compared; how often it was."""
        self.afresh()
        kills = 0
        while kills < limit:
            there = self.unfinished()
            code = self.run(self.killer(share))
            if code is not None:
                break
            kills += 1
            self.check()
            new = self.unfinished() - there
            if any(path.parent.name == CHECKPOINTS for path in new):
                where = "while a checkpoint was written or removed"
            elif new:
                where = "while another file was written"
            elif not self.started:
                where = "while it started"
            else:
                where = "after the last step" if self.step == self.steps else "between saves"
            self.counts[f"kills {where}"] += 1
        if kills == limit:
            self.finish()
        elif code != 0:
            raise Violation(f"the training ended with exit code {code}")
        self.compare()
        self.counts[f"trainings killed {ENOUGH} times or more"] += kills >= ENOUGH
        return kills

    def full_disk(self, times: int) -> None:
        """Fill the disk under a training `times` times, then let it end."""
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "crash-sweep", str(self.out)]
        try:
            subprocess.run(mount, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            print("full disk: skipped, for this user may not mount a tmpfs")
            return
        ballast = self.out / "ballast"
        try:
            self.afresh()
            for turn in range(times):
                # Space for some files of a checkpoint, not for all.
                spare = self.draw.randrange(self.size)
                # Every third time the disk is full already when the training goes on.
                goal = 0 if turn % 3 == 2 else self.step + self.draw.randint(1, 3)

                def fill(
                    child: int, seconds: float | None, goal: int = goal, spare: int = spare
                ) -> bool:
                    steps = [number(path) for path in self.made()]
                    if max(steps, default=0) >= goal:
                        disk = os.statvfs(self.out)
                        room = disk.f_bavail * disk.f_frsize - spare
                        if room > 0:
                            with contextlib.suppress(OSError), ballast.open("ab") as stream:
                                os.posix_fallocate(stream.fileno(), stream.tell(), room)
                    return False

                code = self.run(fill)
                self.check()
                told = self.log.read_text()
                if code != 2 or "disk is full" not in told or "Traceback" in told:
                    raise Violation(f"a full disk ended with exit code {code}")
                if self.step < goal:
                    raise Violation(f"step {self.step} after {goal} on a full disk")
                ballast.unlink()
                self.counts["full disks, each told in a sentence, exit code 2"] += 1
            self.finish()
            self.compare()
        finally:
            subprocess.run(["umount", str(self.out)], check=False)

    def halfway(self) -> None:
        """Keep a copy of a training that was killed in its middle, to damage."""
        self.afresh()
        self.run(lambda *_: bool(self.made()) and number(self.made()[-1]) >= self.steps // 2)
        self.check()
        self.newest, self.before = self.made()[-1], self.made()[-2]
        self.size = sum(file.stat().st_size for file in self.newest.iterdir())
        shutil.copytree(self.folder, self.copy)

    def damage(self, limit: int) -> None:
        """Damage each file of the newest checkpoint in each way; resume takes the one before."""
        cases = [(name, way) for name in sorted(digests(self.newest)) for way in WAYS]
        for name, way in self.draw.sample(cases, min(limit, len(cases))):
            self.afresh(self.copy)
            file = self.newest / name
            content = WAYS[way](file.read_bytes(), self.draw)
            file.unlink() if content is None else file.write_bytes(content)
            self.finish()
            told = self.log.read_text()
            if f"{self.newest}: passed over, " not in told or f"from {self.before}\n" not in told:
                raise Violation(f"{name} was {way}, and resume did not say so")
            self.compare()
            self.counts[f"files {way}: found, and the checkpoint before taken"] += 1

    def controls(self) -> None:
        """Damage that the sums know nothing of is not found, and the end must differ."""
        flipped = bytearray((self.copy / CHECKPOINTS / self.newest.name / ADAPTER).read_bytes())
        flipped[-6] ^= 0x10  # in the mantissa of a weight
        older = self.copy / CHECKPOINTS / self.before.name
        for what, file, content in (
            ("optimizer and random states of the step before", STATE, None),
            ("place in the data of the step before", "trainer_state.json", None),
            ("one bit flipped in a weight", ADAPTER, flipped),
        ):
            self.afresh(self.copy)
            (self.newest / file).write_bytes(content or (older / file).read_bytes())
            sums = {k: v for k, v in digests(self.newest).items() if k != SUMS}
            (self.newest / SUMS).write_text(json.dumps(sums))
            self.finish()
            if f"from {self.newest}\n" not in self.log.read_text():
                raise Violation(f"control ({what}): not resumed from {self.newest}")
            if f"last {ADAPTER}" not in self.differences():
                raise Violation(f"control ({what}): the comparison saw no difference")
            self.counts[f"control: {what}, sums rewritten: differs"] += 1


def cut(content: bytes, draw: random.Random) -> bytes:
    """The beginning of a file."""
    return content[: draw.randrange(len(content))]


def flip(content: bytes, draw: random.Random) -> bytes:
    """A file with one bit flipped."""
    changed = bytearray(content)
    changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(changed)


WAYS: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "truncated": cut,
    "flipped": flip,
    "deleted": lambda *_: None,
}


def number(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def identity(file: Path) -> int | None:
    """What tells one file from another of the same name."""
    try:
        return file.stat().st_ino
    except OSError:
        return None


def make_tiny(folder: Path) -> None:
    """A random Llama of 2 layers that reads bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *letters]
    reader = Tokenizer(models.BPE({token: at for at, token in enumerate(tokens)}, []))
    reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reader.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=reader, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare(home: Path, sample: bool) -> list[str]:
    """Write the data and, unless it is the `sample`, the model; returns the settings."""
    for split, rows in (("train", 26), ("validation", 6)):
        lines = (DATA / f"tweets_sentiment.{split}.jsonl").read_text().splitlines()[:rows]
        (home / f"{split}.jsonl").write_text("\n".join(lines))
    if not sample and not os.fork():  # in a child, for torch may start threads
        make_tiny(home / "tiny")
        os._exit(0)
    if not sample and os.wait()[1]:
        raise Violation("the tiny model was not made")
    return [
        *([] if sample else [f"model.name={home / 'tiny'}"]),
        *(f"dataset.{split}={home / split}.jsonl" for split in ("train", "validation")),
        # Dropout for random numbers; logged, validated and ended an epoch out of step.
        *("dataset.test=null", "lora.r=4", "lora.dropout=0.1", "training.batch_size=2"),
        *("training.num_epochs=2", "training.save_steps=1", "training.logging_steps=3"),
        *("training.eval_steps=5", "training.compile=false", "training.lr_scheduler=cosine"),
    ]


def sweep(options: argparse.Namespace, home: Path) -> Counter[str]:
    """Do what the command line asks for; returns the counts."""
    if options.model == "sample":
        counts: Counter[str] = Counter()
        settings = prepare(home, True)
        for kind in ("null", "int8"):
            place = home / kind
            place.mkdir()
            run = Sweep(place, [*settings, f"model.quantization={kind}"], options.seed, proven=True)
            # A short share, so that the training does not end before.
            while run.killed(ENOUGH, 1 / 12) < ENOUGH:
                pass
            counts += Counter({f"quantization {kind}: {k}": v for k, v in run.counts.items()})
        return counts
    run = Sweep(home, prepare(home, False), options.seed, proven=False)
    print(
        f"{run.steps} steps, {run.training / run.steps:.3f} s each with its checkpoint; "
        f"{run.starting:.1f} s to start",
        flush=True,
    )
    left = options.kills
    while left:
        left -= run.killed(left, 1 / 4)
    run.halfway()
    run.full_disk(options.disks)
    run.damage(options.damages)
    run.controls()
    return run.counts


def main() -> int:
    """Sweep, print the counts, and say by the exit code whether all held."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=220)
    parser.add_argument("--disks", type=int, default=12, help="how often a disk is filled")
    parser.add_argument("--damages", type=int, default=100, help="at most so many damaged files")
    parser.add_argument("--model", choices=("tiny", "sample"), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # One thread, so that a fork is safe; the libraries read it when they are imported.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # All that a training imports, once.
    import matplotlib.figure
    import torch
    from transformers.models.llama import modeling_llama

    from etude import int8, proof, train_with_config, trainer

    assert all((matplotlib.figure, modeling_llama, int8, proof, train_with_config, trainer))
    torch.set_num_threads(1)
    home = Path(tempfile.mkdtemp(prefix="crash-sweep-"))
    begun = time.monotonic()
    try:
        counts = sweep(options, home)
    except Violation as violation:
        print(f"VIOLATION with --seed {options.seed}: {violation}\nEverything lies in {home}")
        if (log := home / "log").is_file():
            print(log.read_text()[-3000:])
        return 1
    shutil.rmtree(home)
    for what, times in sorted(counts.items()):
        print(f"{times:>6,}  {what}")
    kills = sum(times for what, times in counts.items() if "kills " in what)
    print(f"{kills} kills, 0 violations, {time.monotonic() - begun:.0f} s, seed {options.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
