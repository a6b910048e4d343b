"""Label scoring side by side: Etude's packed passes and a plain row-by-row transformers loop.

python benchmarks/evaluate.py --rows 200

Both score every label of every test tweet by its exact log-likelihood under the sample model in
float32, in separate processes, in turn; the table tells rows a second, the ratio, and whether the
predictions are the same.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from train import RESULTS, ROOT, environment

ENGINES = ("etude", "transformers")
TEST = "data/tweets_sentiment.test.jsonl"


def score_etude(target: Any, prompts: list[Any], labels: list[str]) -> list[list[float]]:
    """As `etude evaluate` does."""
    from etude import evaluation

    return evaluation.label_log_likelihoods(
        target.base.model, target.renderer, prompts, labels, target.config, "benchmark"
    )


def score_transformers(target: Any, prompts: list[Any], labels: list[str]) -> list[list[float]]:
    """One forward for each row and label, as a simple script would."""
    import torch

    model, renderer = target.base.model, target.renderer
    scores = []
    for prompt in prompts:
        row = []
        start = len(renderer.prompt(prompt))
        for label in labels:
            ids = renderer.render([*prompt, {"role": "assistant", "content": label}]).ids
            end = start + ids[start:].index(renderer.end_of_turn) + 1
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : end - 1]
            logs = torch.log_softmax(logits, -1)
            row.append(float(logs.gather(1, torch.tensor(ids[start:end])[:, None]).sum()))
        scores.append(row)
    return scores


def worker(engine: str, rows: int) -> None:
    """Score with one engine and print what was measured as one JSON line."""
    from etude import data, runs, terminal

    terminal.quiet_transformers()
    target = runs.open_target("smollm2-135m", ["model.dtype=float32", "training.use_cpu=true"])
    settings = target.config.dataset
    table = data.sample(data.read(str(ROOT / TEST), settings), rows, 0)
    labels = table.labels or []
    prompts = [data.instruct(row.text, labels, settings) for row in table.rows]
    score = {"etude": score_etude, "transformers": score_transformers}[engine]
    score(target, prompts[:4], labels)  # warm-up
    started = time.perf_counter()
    scores = score(target, prompts, labels)
    seconds = time.perf_counter() - started
    print("RESULT " + json.dumps({"seconds": seconds, "scores": scores}))


def main() -> None:
    """Run both engines in turn and print the table; the JSON goes to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.rows)
        return
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    for number in range(options.rounds):
        for engine in ENGINES:
            command = [sys.executable, __file__, "--worker", engine, "--rows", str(options.rows)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if done.returncode or not lines:
                raise SystemExit(f"error: {engine} failed:\n{done.stderr[-3000:]}")
            found[engine].append(json.loads(lines[0].removeprefix("RESULT ")))
            print(f"round {number + 1}: {engine} done", file=sys.stderr)
    speed = {
        engine: options.rows / statistics.median(run["seconds"] for run in runs)
        for engine, runs in found.items()
    }
    mine, theirs = (found[engine][0]["scores"] for engine in ENGINES)
    same = sum(a.index(max(a)) == b.index(max(b)) for a, b in zip(mine, theirs, strict=True))
    furthest = max(
        abs(x - y) for a, b in zip(mine, theirs, strict=True) for x, y in zip(a, b, strict=True)
    )
    for engine, rate in speed.items():
        print(f"{engine:<14}{rate:>8.2f} rows/s{rate / speed['transformers']:>8.2f}x")
    print(
        f"same prediction in {same} of {options.rows} rows; log-likelihoods within {furthest:.1e}"
    )
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"evaluate-{options.rows}rows-{time.strftime('%Y%m%d-%H%M%S')}.json"
    seconds = {engine: [run["seconds"] for run in runs] for engine, runs in found.items()}
    summary = {"rows_per_second": speed, "same_predictions": same, "furthest": furthest}
    record = {"options": vars(options), "environment": environment()}
    file.write_text(json.dumps({**record, "summary": summary, "seconds": seconds}, indent=1))
    print(f"\n{file}")


if __name__ == "__main__":
    main()
