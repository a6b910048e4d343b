"""Calls as every template writes them, parsed back; and what is no call, or a broken one."""

import copy
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.conversation.calling import Malformed, call
from etude.conversation.encoding import RenderError
from etude.conversation.renderer import Renderer

HERE = Path(__file__).parent / "templates"
TYPES = {"place": "string", "days": "integer", "exact": "boolean", "tags": "array", "by": "object"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Looks something up.",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": kind} for key, kind in TYPES.items()},
            },
        },
    }
    for name in ("look_up", "other.one")
]
ONE_CALL_ONLY = ("llama3_1", "llama3_2", "gptoss")  # the template writes or allows no second one


def templates():
    """The templates beside this file, and TRL's where it is installed: text ones, untouched."""
    found = {path.stem: path for path in HERE.glob("*.jinja")}
    trl = find_spec("trl")
    if trl and trl.submodule_search_locations:
        folder = Path(trl.submodule_search_locations[0]) / "chat_templates"
        other = re.compile("_training|vl|idefics|llava|smolvlm")
        found |= {p.stem: p for p in folder.glob("*.jinja") if not other.search(p.stem)}
    return [pytest.param(path, id=name) for name, path in sorted(found.items())]


CONTROL = re.compile(
    r"<\|[^<>|\s{}%]*\|>|<｜[^<>{}\s]*?｜>|<\|[a-z_]+>|<[a-z_]+\|>|<(?:start|end)_of_turn>|\[gMASK\]"
)


@pytest.fixture
def made(sample_tokenizer):
    """Makes the renderer of a template, its control tokens added to the sample's tokenizer."""

    def make(path):
        template = path.read_text(encoding="utf-8")
        tokenizer = copy.deepcopy(sample_tokenizer)
        tokens = {*CONTROL.findall(template), '<|"|>'}
        tokenizer.add_special_tokens({"additional_special_tokens": sorted(tokens)})
        return Renderer(tokenizer, template)

    return make


def target(renderer, calls, content="", **more):
    """The ids that the model is to write as this answer."""
    answer = {"role": "assistant", "content": content, "tool_calls": calls, **more}
    example = renderer.answer([{"role": "user", "content": "Rome?", "tools": TOOLS}, answer])
    return [one for one, wanted in zip(example.ids, example.supervised, strict=True) if wanted]


def functions(calls):
    return [one["function"] for one in calls]


CASES = {
    "every type": [
        call("look_up", place='Ro\n"me', days=2, exact=True, tags=["a", 1], by={"k": {"x": None}})
    ],
    "no arguments": [call("look_up")],
    "two": [call("look_up", place="Rome"), call("other.one", place="Oslo", days=3)],
    "two without arguments": [call("look_up"), call("other.one")],
    "white space": [call("look_up", place="  a \n b\n\n")],
    "what looks like syntax": [
        call("look_up", place='it\'s {x} "a", b=3) ] \\ \\n </x>', tags=["a, b=3", "c)"])
    ],
    "letters of the world": [call("look_up", place="東京 🙂 é", exact=False)],
    "digits that are a text": [call("look_up", place="12345")],
}


@pytest.mark.parametrize("path", templates())
def test_every_template_gives_its_calls_back(made, path):
    renderer = made(path)
    for name, calls in CASES.items():
        if len(calls) > 1 and path.stem in ONE_CALL_ONLY:
            with pytest.raises(RenderError):
                target(renderer, calls)
            continue
        parts = renderer.parts_of(target(renderer, calls), TOOLS)
        assert functions(parts.calls) == functions(calls), name
        assert (parts.reasoning, parts.text.strip(), parts.malformed) == ("", "", False), name


@pytest.mark.parametrize("path", templates())
def test_words_and_reasoning_before_a_call_are_apart_from_it(made, path):
    renderer, calls = made(path), CASES["every type"]
    for content, more in (("I look.", {}), ("", {"reasoning_content": "Hm, well."})):
        try:
            ids = target(renderer, calls, content, **more)
        except RenderError:  # the template drops or forbids one of them: nothing is trained wrong
            continue
        parts = renderer.parts_of(ids, TOOLS)
        assert functions(parts.calls) == functions(calls)
        if path.stem == "gptoss" and content:  # which writes words before a call as reasoning
            assert parts.reasoning == content
        elif not re.fullmatch("gemma4(_v[234])?", path.stem):  # which has no place for reasoning
            assert (parts.reasoning, parts.text.strip()) == (
                more.get("reasoning_content", ""),
                content,
            )


@pytest.mark.parametrize("path", templates())
def test_no_template_raises_at_a_call_that_is_cut(made, path):
    renderer = made(path)
    ids = target(renderer, CASES["every type"])
    for size in range(len(ids) - 1):
        parts = renderer.parts_of([*ids[:size], renderer.stop_ids[0]], TOOLS)
        assert isinstance(parts.text, str)
        shown = renderer.parts_of(ids[:size], TOOLS, writing=True)
        assert not shown.calls and "look_up" not in shown.text


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(['"}', "{", "\n", "</tool_call>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc\"'é ", max_size=4), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.text("abcdé_", min_size=1, max_size=5), values, max_size=4))
def test_json_calls_give_any_arguments_back(renderer, arguments):
    made = renderer._calls
    written = json.dumps({"name": "look_up", "arguments": arguments}, ensure_ascii=False)
    text, calls = made.parse(f"Well.\n<tool_call>\n{written}\n</tool_call>", TOOLS)
    assert functions(calls) == [{"name": "look_up", "arguments": arguments}]
    assert text.strip() == "Well."


@given(st.text('<tool_call>{}"name:argument[], \n/1e9\\u', max_size=60))
def test_any_text_is_words_or_calls_or_malformed(renderer, text):
    try:
        words, calls = renderer._calls.parse(text)
    except Malformed:
        assert "<tool_call>" in text
    else:
        assert words == text or calls


@pytest.mark.parametrize(
    "written",
    [
        "<tool_call>",
        "<tool_call>\n{}\n</tool_call>",
        '<tool_call>{"name": "look_up"}</tool_call>',
        '<tool_call>{"name": "look_up", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "look_up", "arguments": {"place": }}</tool_call>',
        '<tool_call>{"name": "look_up", "arguments": {"days": NaN}}</tool_call>',
        '<tool_call>{"name": "look_up", "arguments": {"days": 1e999}}</tool_call>',
        '<tool_call>{"name": "look_up", "arguments": {"place": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "look_up", "arguments": {"place": "Rome"',
        '<tool_call>{"name": "look_up", "arguments": ' + "[" * 100_000,
    ],
)
def test_a_broken_call_is_text_and_malformed(renderer, written):
    ids = renderer.tokenizer(written).input_ids
    parts = renderer.parts_of([*ids, renderer.end_of_turn], TOOLS)
    assert parts == ("", written, [], True)


@pytest.mark.parametrize(
    "written",
    [
        '<tool_call>{"name": "look_up", "arguments": {"place": "Rome"}}</tool_call>',
        '<tool_call> {"arguments": {"place": "Rome"}, "name": "look_up"}\n\n</tool_call>\n',
        '<tool_call>\n{"name": "look_up", "arguments": "{\\"place\\": \\"Rome\\"}"}',
    ],
)
def test_other_white_space_order_and_a_missing_end_are_understood(renderer, written):
    text, calls = renderer._calls.parse(written)
    assert functions(calls) == [{"name": "look_up", "arguments": {"place": "Rome"}}]
    assert not text.strip()


def test_an_answer_in_json_is_no_call(made):
    renderer = made(HERE / "llama3_2.jinja")
    for answer in ('{"days": 3}', 'Say {"name": "look_up", "parameters": {}}'):
        ids = renderer.tokenizer(answer).input_ids
        parts = renderer.parts_of([*ids, renderer.end_of_turn], TOOLS)
        assert parts == ("", answer, [], False)
