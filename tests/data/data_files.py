"""Rows, and the files that tests of data write them to."""

import csv
import io
import json
from pathlib import Path

import pytest

from etude.config.schema import Dataset
from etude.data import dataset, formats
from etude.errors import UserError


def encoded(name, rows):
    """The rows in the form that the file's name asks for."""
    kind = Path(name).suffix
    if kind == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if kind == ".json":
        return json.dumps(rows, indent=1)
    if kind in (".csv", ".tsv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], delimiter="\t" if kind == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def refusal(source, **options):
    with pytest.raises(UserError) as caught:
        dataset.read(source, Dataset(**options))
    return str(caught.value)


def encode(table, renderer, **options):
    made = dataset.encode(table, renderer, Dataset(**options), "train")
    return made.examples, made.report


def labelled(*labels):
    return [{"text": f" t{n} ", "label": label} for n, label in enumerate(labels)]


def pairs(*texts):
    return [{"prompt": f"Q{text}", "completion": text} for text in texts]


def classified(*pairs):
    rows = [formats.Row(n, [], text, label) for n, (text, label) in enumerate(pairs, 1)]
    return dataset.Table("x.jsonl", "classification", rows, "", sorted({r.label for r in rows}))


ASKED, TOLD = 'Why?\n\nBecause, "really"\u2028so.', "Indeed,\nyes\x0cno 🙂"
PAIR = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": TOLD}]
MORE = [{"role": "system", "content": "Be brief."}, *PAIR]
FROM = {"user": "human", "assistant": "gpt", "system": "system"}
SHAPES = {
    "messages": ({"messages": MORE}, MORE),
    "sharegpt": ({"conversations": [{"from": FROM[m["role"]], "value": m["content"]} for m in MORE]}, MORE),
    "alpaca": ({"instruction": ASKED, "input": "", "output": TOLD}, PAIR),
    "prompt_completion": ({"prompt": ASKED, "completion": TOLD}, PAIR),
}  # fmt: skip
KINDS = {
    "messages": [".jsonl", ".json", ".parquet"],
    "sharegpt": [".jsonl", ".json", ".parquet"],
    "alpaca": [".jsonl", ".json", ".csv", ".parquet"],
    "prompt_completion": [".jsonl", ".json", ".csv", ".parquet"],
}


TALK = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "A first answer, not to be learnt."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "A second one."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "A third."},
]


GOOD = '{"prompt": "p", "completion": "c"}\n'
