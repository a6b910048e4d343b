"""The data set of data/tools: made by its script byte by byte, read without a fault, split cleanly."""

import hashlib
import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from etude.config.schema import Dataset
from etude.data import dataset

FOLDER = Path(__file__).parents[2] / "data" / "tools"
KINDS = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list}


@pytest.fixture(scope="module")
def rows():
    return {
        split: [
            json.loads(line)
            for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").rstrip().split("\n")
        ]
        for split in ("train", "test")
    }


def script():
    spec = importlib.util.spec_from_file_location("make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_writes_the_same_bytes(tmp_path):
    script().main(tmp_path)
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in ("train.jsonl", "test.jsonl"):
        written = (tmp_path / name).read_bytes()
        assert written == (FOLDER / name).read_bytes()
        assert hashlib.sha256(written).hexdigest() in page


def test_every_row_is_read(rows):
    for split, given in rows.items():
        table = dataset.read(str(FOLDER / f"{split}.jsonl"), Dataset())
        assert table.format == "messages" and not table.dropped
        assert len(table.rows) == len(given) == (480 if split == "train" else 120)
        due = sum("tool_calls" in row.messages[-1] for row in table.rows)
        assert len(given) * 0.5 < due < len(given) * 0.65
        assert all(3 <= len(row.messages[0]["tools"]) <= 5 for row in table.rows)


def test_every_call_is_as_its_schema_says(rows):
    called = Counter()
    for row in [*rows["train"], *rows["test"]]:
        tools = {tool["function"]["name"]: tool["function"] for tool in row["tools"]}
        for call in (call for m in row["messages"] for call in m.get("tool_calls", [])):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            schema = tools[name]["parameters"]
            assert set(schema["required"]) <= arguments.keys() <= schema["properties"].keys()
            for key, value in arguments.items():
                kind = schema["properties"][key]
                assert isinstance(value, KINDS[kind["type"]]) and value not in ("", [])
                assert value in kind.get("enum", [value])
            called[name] += 1
    assert len(called) == 12 and min(called.values()) > 30


def test_no_question_of_the_test_set_is_in_the_training_set(rows):
    def asked(split):
        return [
            " ".join(m["content"] for m in row["messages"] if m["role"] == "user").lower()
            for row in rows[split]
        ]

    assert not set(asked("train")) & set(asked("test"))
    made = script()
    for tool in made.TOOLS.values():
        for phrasings in (tool.asked, tool.follow, tool.vague):
            assert not set(phrasings["train"]) & set(phrasings["test"])
    assert not {one for one, _ in made.TALK["train"]} & {one for one, _ in made.TALK["test"]}
