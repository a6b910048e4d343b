"""What training on an int8 base costs in quality: held-out loss and accuracy beside float32's.

    python benchmarks/quality.py --seeds 1,2,3

Each seed trains one epoch on the tweets and one on the dictionary, once on the float32 base and
once on the int8 base, through `etude train`. The held-out loss is that on the test set, on the
base the adapter was trained on; accuracy is `etude evaluate`'s, where the base is always float32.
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


def measure(workload: str, seed: int, quantization: str, folder: Path) -> dict[str, Any]:
    """Train one run and measure it; the predictions of the 800 tweets come along."""
    run = folder / f"{workload}-{seed}-{quantization}"
    test = {"tweets": "tweets_sentiment", "dictionary": "devils_dictionary"}[workload]
    etude(
        "train",
        "config.yml",
        "--preset",
        PRESETS[workload],
        f"model.quantization={quantization}",
        f"training.seed={seed}",
        "training.num_epochs=1",
        "training.eval_steps=null",
        "dataset.max_rows=null",
        f"dataset.validation=data/{test}.test.jsonl",
        f"output.dir={run}",
    )
    results = json.loads((run / "manifest.json").read_text())["results"]
    found = {"loss": results["eval_loss"], "seconds": results["seconds"]}
    if workload == "tweets":
        etude("evaluate", str(run))
        lines = (run / "evaluation" / "predictions.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        found["truth"] = [row["label"] for row in rows]
        found["predicted"] = [row["tuned"]["predicted"] for row in rows]
    return found


def main() -> None:
    """Train all runs, print the table and write the JSON to benchmarks/results/."""
    from etude.metrics import mcnemar

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--workloads", default="dictionary,tweets")
    options = parser.parse_args()
    file = RESULTS / f"quality-{time.strftime('%Y%m%d-%H%M%S')}.json"
    record: list[dict[str, Any]] = []
    for workload in options.workloads.split(","):
        for seed in map(int, options.seeds.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                plain, int8 = (
                    measure(workload, seed, quantization, Path(folder))
                    for quantization in ("null", "int8")
                )
            line = f"{workload:<12}seed {seed}  held-out loss {plain['loss']:.4f} float32, "
            line += f"{int8['loss']:.4f} int8 ({int8['loss'] / plain['loss'] - 1:+.2%})"
            if "truth" in plain:
                found = mcnemar(plain["truth"], plain["predicted"], int8["predicted"])
                shares = [
                    sum(map(str.__eq__, one["truth"], one["predicted"])) / len(one["truth"])
                    for one in (plain, int8)
                ]
                line += (
                    f"; accuracy {shares[0]:.4f} and {shares[1]:.4f}, p = {found['p_value']:.2f}"
                )
            print(line, flush=True)
            record.append({"workload": workload, "seed": seed, "float32": plain, "int8": int8})
            # After each pair: what was measured outlives an interrupt.
            file.write_text(json.dumps({"environment": environment(), "runs": record}, indent=1))
    print(f"\n{file}")


if __name__ == "__main__":
    main()
