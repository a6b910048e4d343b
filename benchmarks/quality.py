"""What training on a base in another format costs in quality: held-out loss and accuracy.

    python benchmarks/quality.py --seeds 1,2,3

Each seed trains one epoch on the tweets and one on the dictionary, through `etude train`, on each
of BASES; "other passes" is float32 again with the same steps cut into other passes, which changes
nothing but the rounding, and shows how far rounding alone carries a training. Held-out losses are
in nats a token on the test set: on the base that the adapter was trained on, and on the float32
base, where `etude evaluate` and `etude chat` use it. Accuracy is `etude evaluate`'s.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train import RESULTS, ROOT, environment

PRESETS = {"tweets": "quickstart", "dictionary": "dictionary"}
TESTS = {"tweets": "tweets_sentiment", "dictionary": "devils_dictionary"}
BASES = {
    "float32": (),
    "other passes": ("training.batch_size=1", "training.gradient_accumulation_steps=8"),
    "bfloat16": ("model.dtype=bfloat16",),
    "int8": ("model.quantization=int8",),
}


def etude(*words: str) -> None:
    """Run the program and fail with what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "etude", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"error: etude {' '.join(words)} failed:\n{done.stderr[-2000:]}")


def measure(workload: str, seed: int, base: str, folder: Path) -> dict[str, Any]:
    """Train one run and measure it, row by row; the predictions of the 800 tweets come along."""
    from etude.data import dataset
    from etude.measure import likelihood
    from etude.runs import opening

    run = folder / f"{workload}-{seed}-{base.replace(' ', '-')}"
    etude(
        "train",
        "config.yml",
        "--preset",
        PRESETS[workload],
        f"training.seed={seed}",
        "training.num_epochs=1",
        "training.eval_steps=null",
        "dataset.max_rows=null",
        f"dataset.validation=data/{TESTS[workload]}.test.jsonl",
        f"output.dir={run}",
        *BASES[base],
    )
    results = json.loads((run / "manifest.json").read_text())["results"]
    target = opening.open_target(str(run), ["model.dtype=float32"])
    settings = target.config
    table = dataset.read(str(settings.dataset.test), settings.dataset)
    examples = dataset.encode(table, target.renderer, settings.dataset, "test").examples
    found = {
        "own_base_loss": results["eval_loss"],
        "losses": likelihood.sequence_losses(target.tuned(), examples, settings),
        "tokens": sum(sum(example.supervised) for example in examples),
        "seconds": results["seconds"],
    }
    if workload == "tweets":
        etude("evaluate", str(run), "model.dtype=float32")
        lines = (run / "evaluation" / "predictions.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        found["truth"] = [row["label"] for row in rows]
        found["predicted"] = [row["tuned"]["predicted"] for row in rows]
    return found


def compare(first: dict[str, Any], second: dict[str, Any]) -> str:
    """`second` beside `first`: held-out losses with a 95 % paired bootstrap interval, and accuracy."""
    from scipy.stats import bootstrap

    from etude.measure.intervals import mcnemar

    loss = sum(second["losses"]) / second["tokens"]
    own = second["own_base_loss"]
    line = f"{own:.4f} ({own / first['own_base_loss'] - 1:+.2%}); on float32 {loss:.4f}"
    if second is not first:

        def relative(a: Any, b: Any, axis: int) -> Any:
            return b.mean(axis=axis) / a.mean(axis=axis) - 1

        pair = (first["losses"], second["losses"])
        low, high = bootstrap(pair, relative, paired=True, rng=0).confidence_interval
        difference = sum(second["losses"]) / sum(first["losses"]) - 1
        line += f" ({difference:+.2%}, [{low:+.2%}, {high:+.2%}])"
    if "truth" in second:
        right = sum(map(str.__eq__, second["truth"], second["predicted"]))
        tested = mcnemar(first["truth"], first["predicted"], second["predicted"])
        line += f"; accuracy {right / len(second['truth']):.4f}, p = {tested['p_value']:.2f}"
    return line


def main() -> None:
    """Train all runs, print the table and write the JSON to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--workloads", default="dictionary,tweets")
    parser.add_argument(
        "--bases", default=",".join(BASES), help="the first is what the others are held against"
    )
    options = parser.parse_args()
    file = RESULTS / f"quality-{time.strftime('%Y%m%d-%H%M%S')}.json"
    record: list[dict[str, Any]] = []
    for workload in options.workloads.split(","):
        for seed in map(int, options.seeds.split(",")):
            run: dict[str, Any] = {"workload": workload, "seed": seed, "bases": {}}
            record.append(run)
            for base in options.bases.split(","):
                with tempfile.TemporaryDirectory() as folder:
                    run["bases"][base] = measure(workload, seed, base, Path(folder))
                line = compare(next(iter(run["bases"].values())), run["bases"][base])
                print(f"{workload:<11} seed {seed}  {base:<13} {line}", flush=True)
                # After each run: what was measured outlives an interrupt.
                file.write_text(json.dumps({"environment": environment(), "runs": record}))
    print(f"\n{file}")


if __name__ == "__main__":
    main()
