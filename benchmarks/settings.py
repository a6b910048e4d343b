"""What rank, rows and learning rate do to quality and time: the sample model on the tweets.

    python benchmarks/settings.py --changes lora.r=8,dataset.max_rows=200

One key at a time leaves the quickstart's value. Each trains one epoch through `etude train` and is
measured by `etude evaluate` on the 800 test tweets.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from quality import etude
from train import RESULTS, environment

# The first is the quickstart as it is.
CHANGES = [
    "training.seed=42",
    "dataset.max_rows=50",
    "dataset.max_rows=200",
    "dataset.max_rows=1000",
    "lora.r=8",
    "lora.r=256",
    "training.learning_rate=2e-5",
    "training.learning_rate=2e-3",
]


def measure(change: str, folder: Path) -> dict[str, Any]:
    """Train with one key changed; what the report and manifest say."""
    run = folder / "run"
    etude("train", "config.yml", "--preset", "quickstart", change, f"output.dir={run}")
    etude("evaluate", str(run))
    results = json.loads((run / "manifest.json").read_text())["results"]
    report = json.loads((run / "evaluation" / "report.json").read_text())
    return {"change": change, "results": results, "test": report["models"]["tuned"]}


def main() -> None:
    """Train all settings, print a line for each and write the JSON to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--changes", default=",".join(CHANGES))
    file = RESULTS / f"settings-{time.strftime('%Y%m%d-%H%M%S')}.json"
    record: list[dict[str, Any]] = []
    for change in parser.parse_args().changes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            record.append(found := measure(change, Path(folder)))
        results, test = found["results"], found["test"]
        print(
            f"{change:<28} accuracy {test['accuracy']:.4f}, macro-F1 {test['macro']['f1']:.4f}, "
            f"validation loss {results['eval_loss']:.4f}, {results['seconds']:.0f} s",
            flush=True,
        )
        # After each: what was measured outlives an interrupt.
        file.write_text(json.dumps({"environment": environment(), "runs": record}, indent=1))


if __name__ == "__main__":
    main()
