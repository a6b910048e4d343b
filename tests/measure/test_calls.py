"""The figures about calls, by hand and through `etude evaluate`."""

import json

import pytest
from scipy.stats import norm
from typer.testing import CliRunner

from etude.cli import app
from etude.conversation.calling import call
from etude.engine import generation
from etude.engine.generation import Response
from etude.measure.calls import call_metrics
from etude.measure.intervals import proportion
from etude.runs import report

TOOLS = [
    {"type": "function", "function": {
        "name": name,
        "description": "Finds something.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    }}
    for name in ("weather", "time")
]  # fmt: skip


def row(*calls, text="", tools=TOOLS):
    answer = {"role": "assistant", "content": text}
    if calls:
        answer["tool_calls"] = list(calls)
    return [{"role": "user", "content": "Well?", "tools": tools}, answer]


def said(*calls, text="", malformed=False):
    return Response(text, 5, True, calls=calls, malformed=malformed)


ROME, OSLO = call("weather", city="Rome"), call("weather", city="Oslo")


def figures(*pairs):
    rows, responses = zip(*pairs, strict=True)
    return {
        name: (of["count"], of["of"]) for name, of in call_metrics(rows, responses, 0.95).items()
    }


def test_each_row_counts_where_it_belongs():
    assert figures(
        (row(ROME), said(ROME)),
        (row(ROME), said(OSLO)),  # the tool is right, the argument is not
        (row(ROME), said(call("time", city="Rome"))),
        (row(ROME), said(text="It is sunny.")),
        (row(ROME), said(text="<tool_call>{", malformed=True)),
        (row(ROME, OSLO), said(OSLO, ROME)),
        (row(ROME, OSLO), said(ROME)),
        (row(text="Hello."), said(text="Hello.")),
        (row(text="Hello."), said(ROME)),
        (row(text="Hello."), said(text="<tool_call>", malformed=True)),
        (row(text="No tools.", tools=[]), said(text="Right.")),
    ) == {
        "right tool": (3, 7),
        "right arguments": (2, 7),
        "missing calls": (1, 7),
        "valid calls": (6, 8),
        "calls where none was due": (2, 3),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "equal"),
    [
        ({"a": 2, "b": [1, {"c": None}]}, True),
        ({"b": [1.0, {"c": None}], "a": 2.0}, True),
        ({"a": "2", "b": [1, {"c": None}]}, False),
        ({"a": 2, "b": [True, {"c": None}]}, False),
        ({"a": 2, "b": [{"c": None}, 1]}, False),
        ({"a": 2}, False),
    ],
)
def test_arguments_are_equal_as_json(given, equal):
    wanted = call("weather", a=2, b=[1, {"c": None}])
    right = figures((row(wanted), said(call("weather", **given))))["right arguments"]
    assert right == (int(equal), 1)


def test_without_tools_there_is_nothing_to_count():
    assert call_metrics([row(text="Hi.", tools=[])], [said(text="Hi.")], 0.95) == {}
    # A call in a row without tools is measured by its reference.
    assert figures((row(ROME, tools=[]), said(ROME)))["right tool"] == (1, 1)


@pytest.mark.parametrize(("count", "of"), [(0, 1), (7, 10), (10, 10), (431, 800)])
def test_the_interval_is_wilsons(count, of):
    found = proportion(count, of, level=0.9)
    z, share = norm.ppf(0.95), count / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * (share * (1 - share) / of + z * z / (4 * of * of)) ** 0.5
    assert (found["low"], found["high"]) == pytest.approx((middle - half, middle + half))
    assert (found["share"], found["count"], found["of"]) == (share, count, of)


def test_a_report_has_the_calls_of_base_and_tuned(tiny_model, tmp_path, monkeypatch):
    """The figures on the screen, in report.json and in report.md; every row's calls beside it."""
    rows = tmp_path / "rows.jsonl"
    bare = {"role": "user", "content": "Weather in Rome?"}
    written = {"role": "assistant", "content": None, "tool_calls": [ROME]}
    thanks = [bare, {"role": "assistant", "content": "Glad to help."}]
    conversations = [[bare, written], thanks]
    rows.write_text(
        "".join(json.dumps({"messages": each, "tools": TOOLS}) + "\n" for each in conversations)
    )
    model_said = {
        "Weather": Response("", 9, True, calls=[ROME]),
        "Glad": Response("Glad.", 3, True),
    }

    def generate(model, renderer, prompts, settings, on_text, lines, tools):
        assert [one[0]["function"]["name"] for one in tools] == ["weather"] * len(prompts)
        return [model_said["Weather" if line.endswith(":1") else "Glad"] for line in lines]

    monkeypatch.setattr(generation, "generate", generate)
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["evaluate", str(tiny_model), "--data", str(rows), "--out", str(out),
              "training.use_cpu=true"], env={"COLUMNS": "150"},
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((out / "report.json").read_text())["models"]["model"]
    assert found["rows"] == 2 and found["compared"] == 1
    assert found["calls"]["right arguments"]["count"] == 1
    assert found["calls"]["calls where none was due"]["of"] == 1
    page = (out / "report.md").read_text()
    for text in (result.output, page):
        assert "right tool [95% interval]" in text and "1.000 [0.207, 1.000] of 1" in text
    assert 'weather({"city": "Rome"})' in page
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert lines[0]["model"]["called"] == [ROME["function"]]
    assert lines[1]["model"]["predicted"] and lines[1]["model"]["called"] == []


def test_rows_of_calls_alone_have_no_words_to_compare():
    figures = {"kind": "responses", "perplexity": 3.0, "finished": 1.0, "compared": 0}
    shown = report.shown({**figures, "calls": {"right tool": proportion(1, 2, level=0.95)}})
    assert "exact match" not in shown and shown["stopped at EOS"] == "100.0%"
    assert shown["right tool [95% interval]"].endswith(" of 2")
