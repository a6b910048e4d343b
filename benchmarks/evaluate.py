"""Scoring and generating side by side: Etude and plain transformers loops.

python benchmarks/evaluate.py --task labels --rows 800
python benchmarks/evaluate.py --task generation --rows 16

The sample model in float32, engines in separate processes, in turn. `labels` scores every label of
test tweets by its exact log-likelihood: Etude's packed passes, and a forward for each row and
label. `generation` answers tweets greedily with an adapter: Etude merges it and answers 16 prompts
at once, as `etude evaluate` does; the plain loop leaves it unmerged, one prompt after the other.
"""

import argparse
import json
import statistics
import time
from typing import Any

from train import RESULTS, ROOT, environment, in_turn

ENGINES = ("etude", "transformers")
NEW_TOKENS = 48  # at most, in an answer
TEST = "data/tweets_sentiment.test.jsonl"


def score_etude(target: Any, prompts: list[Any], labels: list[str]) -> list[list[float]]:
    """As `etude evaluate` does."""
    from etude.measure import likelihood

    return likelihood.label_log_likelihoods(
        target.base.model, target.renderer, prompts, labels, target.config
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
            ids = renderer.answer([*prompt, {"role": "assistant", "content": label}]).ids
            end = start + ids[start:].index(renderer.end_of_turn) + 1
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : end - 1]
            logs = torch.log_softmax(logits, -1)
            row.append(float(logs.gather(1, torch.tensor(ids[start:end])[:, None]).sum()))
        scores.append(row)
    return scores


def tuned(model: Any) -> Any:
    """The model with an adapter that does something: B is not zero."""
    import torch

    from etude.config.schema import Lora
    from etude.models import lora

    torch.manual_seed(0)
    adapted = lora.attach(model, Lora(), "sample")
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    return adapted


def generate_etude(target: Any, prompts: list[Any], labels: list[str]) -> list[Any]:
    """As `etude evaluate evaluation.method=generate` does: merged, in batches."""
    from etude.engine import generation
    from etude.models import lora

    model = lora.merge(tuned(target.base.model))
    settings = target.config.generation.model_copy(
        update={"temperature": 0.0, "max_new_tokens": NEW_TOKENS}
    )
    size = target.config.evaluation.batch_size
    ids = [target.renderer.prompt(prompt) for prompt in prompts]
    answers = []
    for start in range(0, len(ids), size):
        found = generation.generate(model, target.renderer, ids[start : start + size], settings)
        answers += [[response.text, response.tokens] for response in found]
    return answers


def generate_transformers(target: Any, prompts: list[Any], labels: list[str]) -> list[Any]:
    """model.generate with the adapter as PEFT loads it, a prompt at a time."""
    import torch

    model, renderer = tuned(target.base.model).eval(), target.renderer
    answers = []
    for prompt in prompts:
        ids = torch.tensor([renderer.prompt(prompt)])
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=renderer.stop_ids,
                pad_token_id=renderer.stop_ids[0],
            )
        written = output[0, ids.shape[1] :]
        text = renderer.tokenizer.decode(written, skip_special_tokens=True).strip()
        answers.append([text, len(written)])
    return answers


def worker(task: str, engine: str, rows: int) -> None:
    """Do the task with one engine and print what was measured as one JSON line."""
    from etude.data import dataset, splits
    from etude.runs import opening

    target = opening.open_target("smollm2-135m", ["model.dtype=float32", "training.use_cpu=true"])
    settings = target.config.dataset
    table = splits.sample(dataset.read(str(ROOT / TEST), settings), rows, 0)
    labels = table.labels or []
    prompts = [dataset.instruct(row.text, labels, settings) for row in table.rows]
    if task == "generation":
        prompts = [
            [{"role": "user", "content": f"Answer this tweet: {row.text}"}] for row in table.rows
        ]
    do = globals()[f"{'score' if task == 'labels' else 'generate'}_{engine}"]
    if task == "labels":
        do(target, prompts[:4], labels)  # warm-up
    started = time.perf_counter()
    answers = do(target, prompts, labels)
    seconds = time.perf_counter() - started
    print("RESULT " + json.dumps({"seconds": seconds, "answers": answers}))


def main() -> None:
    """Run both engines in turn and print the table; the JSON goes to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--task", choices=("labels", "generation"), default="labels")
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.task, options.worker, options.rows)
        return
    task = ["--task", options.task, "--rows", str(options.rows)]
    found = in_turn({e: [__file__, "--worker", e, *task] for e in ENGINES}, options.rounds)
    answers = {engine: runs[0]["answers"] for engine, runs in found.items()}
    seconds = {engine: [run["seconds"] for run in runs] for engine, runs in found.items()}
    labels = options.task == "labels"
    unit = "rows/s" if labels else "tokens/s"
    work = {
        engine: len(each) if labels else sum(tokens for _, tokens in each)
        for engine, each in answers.items()
    }
    speed = {engine: work[engine] / statistics.median(seconds[engine]) for engine in ENGINES}
    for engine, rate in speed.items():
        print(f"{engine:<14}{rate:>8.2f} {unit}{rate / speed['transformers']:>8.2f}x")
    summary: dict[str, Any] = {"unit": unit, "speed": speed}
    pairs = list(zip(*answers.values(), strict=True))
    if labels:
        summary["same"] = sum(a.index(max(a)) == b.index(max(b)) for a, b in pairs)
        summary["furthest"] = max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True))
        print(f"log-likelihoods within {summary['furthest']:.1e}")
    else:
        summary["same"] = sum(a == b for a, b in pairs)
    print(f"the same answer in {summary['same']} of {len(pairs)} rows")
    RESULTS.mkdir(exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    file = RESULTS / f"evaluate-{options.task}-{options.rows}rows-{stamp}.json"
    record = {"options": vars(options), "environment": environment()}
    file.write_text(json.dumps({**record, "summary": summary, "seconds": seconds}, indent=1))
    print(f"\n{file}")


if __name__ == "__main__":
    main()
