"""What a training was planned to hold, beside what it held, over a grid of settings.

python benchmarks/memory.py

Each setting is one `etude train` on the sample model in a process of its own, a few steps and a
validation long. Planned is the peak that etude.training.memory reports before the weights are loaded, measured
the process's own peak of resident memory (VmHWM, Linux). Both are in the run's manifest.
Four constants of etude.training.memory were fitted to all settings of this grid.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from train import RESULTS, ROOT, WORKLOADS, environment, joined

DEFAULTS = (
    "model.name=smollm2-135m",
    "model.dtype=float32",
    "training.use_cpu=true",
    "training.max_steps=2",
    "training.compile=false",
    "dataset.test=null",
)
ROWS, HELD_OUT = 32, 2  # of each data set: few enough to be quick, all lengths among them
ONE = ("training.gradient_accumulation_steps=1",)
TWO = ("training.batch_size=2", *ONE)  # packed passes of 512 tokens: full-length rows
CHECKPOINTING = "training.gradient_checkpointing=true"
INT8, COMPILED = "model.quantization=int8", "training.compile=true"
ALL = "lora.target_modules=[all-linear]"
# Data set, name, settings. "long" are conversations of 400 to 500 tokens.
GRID: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("tweets", "1 x 8", ()),
    ("tweets", "8 x 1", ("training.batch_size=8", *ONE)),
    ("tweets", "8 x 1, checkpointing", ("training.batch_size=8", *ONE, CHECKPOINTING)),
    ("tweets", "8 x 1, int8", ("training.batch_size=8", *ONE, INT8)),
    ("tweets", "32 x 1, max_length 96", ("training.batch_size=32", *ONE, "dataset.max_length=96")),
    ("tweets", "1 x 4, r=256 on all-linear",
     ("training.gradient_accumulation_steps=4", "lora.r=256", ALL)),
    ("dictionary", "1 x 8", ()),
    ("dictionary", "16 x 1", ("training.batch_size=16", *ONE)),
    ("dictionary", "16 x 1, compiled", ("training.batch_size=16", *ONE, COMPILED)),
    ("long", "2 x 1", TWO),
    ("long", "2 x 1, max_length 128", (*TWO, "dataset.max_length=128")),
    ("long", "2 x 1, checkpointing", (*TWO, CHECKPOINTING)),
    ("long", "2 x 1, all-linear", (*TWO, ALL)),
    ("long", "2 x 1, int8", (*TWO, INT8)),
    ("long", "2 x 1, compiled", (*TWO, COMPILED)),
    ("long", "2 x 1, int8, compiled", (*TWO, INT8, COMPILED)),
    ("dictionary", "4 x 2, all-linear", ("training.batch_size=4",
     "training.gradient_accumulation_steps=2", ALL)),
    ("long", "1 x 4, r=8, max_length 256", ("training.gradient_accumulation_steps=4", "lora.r=8",
     "dataset.max_length=256", "training.max_steps=4")),
    ("long", "4 x 1, 6 steps", ("training.batch_size=4", *ONE, "training.max_steps=6")),
)  # fmt: skip


def write_rows(folder: Path) -> None:
    """Write the data sets to `folder`: the first rows of two of ours, and long ones made of them."""
    import random

    from transformers import AutoTokenizer

    from etude.config.schema import Dataset
    from etude.conversation.renderer import Renderer
    from etude.data import dataset
    from etude.models import gguf, loading

    def write(name: str, lines: list[str]) -> None:
        (folder / f"{name}.train.jsonl").write_text("".join(lines[:ROWS]))
        (folder / f"{name}.validation.jsonl").write_text("".join(lines[ROWS : ROWS + HELD_OUT]))

    for name in ("tweets", "dictionary"):
        write(name, (ROOT / WORKLOADS[name]).read_text().splitlines(keepends=True))
    renderer = Renderer(AutoTokenizer.from_pretrained(loading.locate(gguf.SAMPLE)))
    settings = Dataset(train=WORKLOADS["dictionary"])
    table = dataset.read(str(ROOT / settings.train), settings)
    conversations = [dataset.conversation(row, table.labels, settings) for row in table.rows]
    random.Random(42).shuffle(conversations)
    rows = joined(conversations, renderer)
    write("long", [json.dumps({"messages": messages}) + "\n" for messages in rows])


def worker(settings: list[str]) -> None:
    """Train as `etude train` does, but for the proof, which is another process's."""
    from etude import screen, train_with_config
    from etude.config.loading import load_config
    from etude.runs import proof

    proof.in_a_new_process = lambda folder: "left out"
    train_with_config.run_training(load_config(None, overrides=settings), screen.Screen())


def measure(name: str, overrides: tuple[str, ...], rows: Path) -> dict[str, Any]:
    """Train once in a new process; planned and measured peak in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        files = [
            f"dataset.{split}={rows}/{name}.{split}.jsonl" for split in ("train", "validation")
        ]
        settings = [*DEFAULTS, *files, *overrides, f"output.dir={run}"]
        done = subprocess.run(
            [sys.executable, __file__, "--worker", *settings],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder},
        )
        if done.returncode:
            raise SystemExit(f"error: {settings}:\n{done.stdout[-500:]}{done.stderr[-3000:]}")
        manifest = json.loads((run / "manifest.json").read_text())
        found: dict[str, Any] = manifest["results"]["memory"]
    return found


def main() -> None:
    """Measure the grid, print the table, write the JSON to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="settings whose name holds this")
    parser.add_argument("--jobs", type=int, default=1, help="settings measured at once")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder))
        print(f"{'setting':<40}{'planned':>9}{'measured':>10}{'deviation':>11}")
        chosen = [one for one in GRID if options.only in f"{one[0]}, {one[1]}"]
        with ThreadPoolExecutor(options.jobs) as pool:
            started = [pool.submit(measure, rows, more, Path(folder)) for rows, _, more in chosen]
            for (rows, what, overrides), job in zip(chosen, started, strict=True):
                memory, name = job.result(), f"{rows}, {what}"
                deviation = memory["planned"] / memory["peak"] - 1
                found[name] = {**memory, "deviation": deviation, "overrides": overrides}
                planned, peak = memory["planned"] / 1e9, memory["peak"] / 1e9
                print(f"{name:<40}{planned:>9.2f}{peak:>10.2f}{deviation:>+11.1%}", flush=True)
    worst = max(found.values(), key=lambda one: abs(one["deviation"]))["deviation"]
    print(f"worst {worst:+.1%}, {len(found)} settings (GB)")
    if not options.only:
        record = {
            "environment": environment(),
            "defaults": DEFAULTS,
            "settings": found,
            "worst": worst,
        }
        file = RESULTS / f"plan-{time.strftime('%Y%m%d-%H%M%S')}.json"
        file.write_text(json.dumps(record, indent=1))
        print(file)


if __name__ == "__main__":
    main()
