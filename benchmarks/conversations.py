"""How fast conversations become examples, how much memory they take, and what sharing saves.

python benchmarks/conversations.py --rows 100000
python benchmarks/conversations.py --rows 2000 --template qwen3

Each row has six turns, made of the dictionary's rows. `--template` names one of TRL's
(trl/chat_templates): with Qwen3's every answer is an example of its own, because the template leaves
the thoughts out of earlier answers. Also the tweets, the rows of the quickstart.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from datetime import datetime
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from train import RESULTS, ROOT, environment

TURNS = 6


def conversations(rows: int) -> list[str]:
    """Lines of a file of conversations, no two alike."""
    path = ROOT / "data" / "devils_dictionary.train.jsonl"
    pairs = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    pairs = [pair for pair in pairs if len(pair["completion"]) < 400]
    draw = random.Random(0)
    lines = []
    for number in range(rows):
        messages = []
        for pair in draw.sample(pairs, TURNS):
            messages.append({"role": "user", "content": pair["prompt"]})
            answer = f"{pair['completion']} ({number})"
            messages.append({"role": "assistant", "content": answer})
        lines.append(json.dumps({"messages": messages}) + "\n")
    return lines


def tree(examples: list[Any]) -> int:
    """Tokens of a packed pass of these examples: every shared beginning once."""
    from etude.conversation.encoding import common

    ids = sorted(one.ids for one in examples)
    return sum(map(len, ids)) - sum(common(*two) for two in pairwise(ids))


def prepared(file: str, renderer: Any) -> dict[str, Any]:
    """Read and encode a file; seconds, rows a second, and the tokens that sharing saves."""
    from etude.config.schema import Dataset
    from etude.data import dataset
    from etude.engine import packing

    settings = Dataset(train=file, max_length=2048)
    started = time.perf_counter()
    table = dataset.read(file, settings)
    split = dataset.encode(table, renderer, settings, "train")
    seconds = time.perf_counter() - started
    rows = [[split.examples[at] for at in row] for row in packing.by_row(split.examples)[:2000]]
    once = sum(len(row[-1]) for row in rows)
    return {
        "rows": len(table.rows),
        "examples": len(split.examples),
        "tokens": split.report.tokens,
        "seconds": round(seconds, 1),
        "rows_per_second": round(len(table.rows) / seconds),
        "tokens_computed": round(sum(map(tree, rows)) / once, 2),
        "tokens_without_sharing": round(sum(len(one) for row in rows for one in row) / once, 2),
        "peak_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> None:
    """Measure, print, and write the JSON to benchmarks/results/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--template", help="one of TRL's; without it, the sample model's own")
    options = parser.parse_args()

    from transformers import AutoTokenizer

    from etude.conversation.renderer import Renderer
    from etude.models import gguf, loading

    template = None
    if options.template:
        folder = Path(str(find_spec("trl").origin)).parent / "chat_templates"  # type: ignore[union-attr]
        template = (folder / f"{options.template}.jinja").read_text()
    tokenizer = AutoTokenizer.from_pretrained(loading.locate(gguf.SAMPLE))
    renderer = Renderer(tokenizer, template)
    found = {"tweets": prepared(str(ROOT / "data" / "tweets_sentiment.train.jsonl"), renderer)}
    with tempfile.TemporaryDirectory() as folder_name:
        file = Path(folder_name) / "conversations.jsonl"
        file.write_text("".join(conversations(options.rows)))
        found["conversations"] = prepared(str(file), renderer)
    print(json.dumps(found, indent=1))
    name = f"conversations-{options.template or 'own'}-{options.rows}rows"
    record = {"template": options.template or "own", **found, "environment": environment()}
    path = RESULTS / f"{name}-{datetime.now():%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
