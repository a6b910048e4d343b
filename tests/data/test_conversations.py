"""Conversations as people have them: tools, reasoning, parts, weights, odd beginnings and ends."""

import json

import pytest
from data_files import refusal

from etude.config.schema import Dataset
from etude.conversation.renderer import Renderer
from etude.data import dataset, report

ASK = {"role": "user", "content": "Rome?"}
SAY = {"role": "assistant", "content": "Grey."}
TOOL = {
    "name": "sky",
    "description": "The sky.",
    "parameters": {"type": "object", "properties": {}},
}
TOOLS = [{"type": "function", "function": TOOL}]


def call(arguments='{"place": "Rome"}', name="sky", **keys):
    made = {"type": "function", "function": {"name": name, "arguments": arguments}, **keys}
    return {"role": "assistant", "content": None, "tool_calls": [made]}


def part(text):
    return {"type": "text", "text": text}


RESULT = {"role": "tool", "content": "rain"}
WRITTEN = '<tool_call>\n{"name": "sky", "arguments": {"place": "Rome"}}\n</tool_call>'
HERMES = {"role": "system", "content": "Call <tools>.</tools>"}
RIGHT = {
    "weight": {"messages": [ASK, {**SAY, "weight": 0}, ASK, SAY]},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, ASK, SAY]},
    "parts": {"messages": [{"role": "user", "content": [part("Ro"), part("me?")]}, SAY]},
    "ends-with-user": {"messages": [ASK, SAY, ASK]},
    "begins-with-assistant": {"messages": [SAY, ASK, SAY]},
    "reasoning_content": {"messages": [ASK, {**SAY, "reasoning_content": "Hm."}]},
    "reasoning": {"messages": [ASK, {**SAY, "reasoning": "Hm."}]},
    "thinking": {"messages": [ASK, {**SAY, "thinking": "Hm."}]},
    "think-block": {"messages": [ASK, {**SAY, "content": "<think>\nHm.\n</think>\n\nGrey."}]},
    "Reasoning": {"messages": [ASK, {**SAY, " Reasoning_Content": "Hm."}]},
    "text-about-calls": {"messages": [ASK, {**SAY, "content": "<tool_call>{</tool_call> Grey."}]},
    "tools": {"tools": TOOLS, "messages": [ASK, call(), RESULT, SAY]},
    "tools-as-text": {"tools": json.dumps([TOOL]), "messages": [ASK, call({"place": "Rome"}), RESULT, SAY]},
    "two-calls": {
        "tools": TOOLS,
        "messages": [
            ASK, {**call(id="a"), "tool_calls": [*call(id="a")["tool_calls"], *call(id="b")["tool_calls"]]},
            {**RESULT, "tool_call_id": "b"}, {**RESULT, "tool_call_id": "a"}, SAY,
        ],
    },
    "sharegpt": {
        "tools": json.dumps(TOOLS),
        "conversations": [
            {"from": "human", "value": "Rome?"},
            {"from": "function_call", "value": '{"name": "sky", "arguments": {"place": "Rome"}}'},
            {"from": "observation", "value": "rain"}, {"from": "gpt", "value": "Grey."},
        ],
    },
    "hermes": {
        "tools": json.dumps(TOOLS),
        "messages": [
            ASK, {"role": "assistant", "content": WRITTEN},
            {"role": "tool", "content": "<tool_response>\nrain\n</tool_response>"}, SAY,
        ],
    },
}  # fmt: skip
WRONG = {
    "no-json": ({"messages": [ASK, call('{"place": ')]}, "messages, turn 2: arguments of 'sky': not JSON"),
    "no-object": ({"messages": [ASK, call("[1]")]}, "turn 2: arguments of 'sky' must be an object"),
    "not-listed": ({"tools": TOOLS, "messages": [ASK, call(name="sea")]}, "calls 'sea', which is not in tools (sky)"),
    "no-call": ({"tools": TOOLS, "messages": [ASK, RESULT, SAY]}, "message 2: a tool's result without a call"),
    "other-id": (
        {"tools": TOOLS, "messages": [ASK, call(id="a"), {**RESULT, "tool_call_id": "b"}, SAY]},
        "message 3: a tool's result without a call",
    ),
    "hermes": ({"tools": TOOLS, "messages": [ASK, {**SAY, "content": "<tool_call>{</tool_call>"}]}, "not JSON"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, SAY]},
        "turn 1: content has a part of type image, and only text",
    ),
    "no-answer": ({"messages": [ASK]}, "no turn of the assistant"),
    "tools": ({"tools": "sky", "messages": [ASK, SAY]}, "tools: not JSON"),
    "empty": ({"messages": [ASK, {**SAY, "content": " "}]}, "turn 2: content is empty"),
    "half": ({"messages": [ASK, {**SAY, "weight": 0.5}]}, "weight 0.5 is neither 0"),
    "other-name": (
        {"tools": TOOLS, "messages": [HERMES, ASK, {**SAY, "content": WRITTEN.replace("sky", "sea")}]},
        "calls 'sea', which is not in tools",
    ),
    "nan": ({"messages": [ASK, call('{"place": NaN}')]}, "not JSON: NaN is no value of JSON"),
    "half-character": ({"messages": [ASK, call('{"place": "\\ud800"}')]}, "holds half a character"),
    "nul": ({"messages": [ASK, call({"place": "a\0"})]}, "holds a NUL character"),
    "two-reasonings": ({"messages": [ASK, {**SAY, "reasoning": "a", "thinking": "b"}]}, "two different reasonings"),
    "no-turn": ({"tools": TOOLS, "messages": [{"role": "system", "content": ""}]}, "no turn of the assistant"),
    "critic": ({"messages": [ASK, {"role": "critic", "content": "x"}]}, "role 'critic' is not one of"),
}  # fmt: skip


@pytest.fixture
def encoded(write, sample_tokenizer):
    """Encodes rows; gives the texts of the examples with what is supervised in ⟦⟧, and the report."""

    def _encoded(*rows, renderer=None, **settings):
        renderer = renderer or Renderer(sample_tokenizer)
        options = Dataset(**settings)
        split = dataset.encode(
            dataset.read(write("x.jsonl", [*rows]), options), renderer, options, "train"
        )
        shown = [
            "".join(f"⟦{text}⟧" if counts else text for text, counts, _ in dataset.spans(one, renderer.tokenizer))
            for one in split.examples
        ]  # fmt: skip
        return [text.replace("⟧⟦", "") for text in shown], split.report

    return _encoded


@pytest.mark.parametrize("kind", RIGHT)
def test_messages_as_people_have_them(encoded, kind):
    [text], fates = encoded(RIGHT[kind])
    learnt = [part.partition("⟧")[0] for part in text.split("⟦")[1:]]
    grey = "Grey.<|im_end|>"
    thought = "<think>\nHm.\n</think>\n\n" + grey
    asked = f"{WRITTEN}<|im_end|>"
    twice = f"{WRITTEN}\n{WRITTEN}<|im_end|>"
    assert learnt == {
        "reasoning_content": [thought], "reasoning": [thought], "thinking": [thought],
        "think-block": [thought], "Reasoning": [thought],
        "text-about-calls": [f"<tool_call>{{</tool_call> {grey}"],
        "tools": [asked, grey], "tools-as-text": [asked, grey],
        "sharegpt": [asked, grey], "hermes": [asked, grey], "two-calls": [twice, grey],
    }.get(kind, [grey])  # fmt: skip
    assert fates.kept == 1 and fates.dropped == {}
    assert "⟦rain" not in text and fates.rows == 1
    if kind in ("tools", "sharegpt", "hermes", "two-calls"):
        assert "<tools>" in text and "The sky." in text and "<tool_response>\nrain" in text
        assert report.JOINED["tools"] in fates.noted
    if kind == "ends-with-user":
        assert fates.noted == {report.UNANSWERED: [1]} and text.count("Rome?") == 1
    if kind == "developer":
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    if kind == "begins-with-assistant":
        assert text.count("Grey.") == 2
    if kind == "parts":
        assert "user\nRome?<|im_end|>" in text


@pytest.mark.parametrize(("row", "fault"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_conversation_is_named_by_line(write, row, fault):
    message = refusal(write("x.jsonl", [{"messages": [ASK, SAY]}, row]))
    assert "x.jsonl:2: " in message and fault in message


def test_the_last_answer_alone(encoded):
    rows = {"messages": [ASK, SAY, ASK, {**SAY, "content": "Blue."}]}
    [text], _ = encoded(rows, train_on="last")
    assert text.count("⟦") == 1 and "⟦Blue.<|im_end|>⟧" in text
    last = {**SAY, "weight": 0}
    [text], _ = encoded({"messages": [ASK, SAY, ASK, last]}, train_on="last")
    assert text.count("⟦") == 1 and text.index("⟦Grey.<|im_end|>⟧") < text.rindex("Rome?")


def test_a_tools_own_system_prompt_keeps_its_way(encoded):
    system = {"role": "system", "content": "You can call <tools>[...]</tools>."}
    [text], fates = encoded({**RIGHT["hermes"], "messages": [system, *RIGHT["hermes"]["messages"]]})
    assert text.count("<tools>") == 1 and f"⟦{WRITTEN}<|im_end|>⟧" in text
    assert fates.kept == 1


def test_a_long_text_is_cut_so_that_question_and_label_stay(write, renderer):
    rows = [{"text": "so " * 300, "label": "bad"}, {"text": "fine", "label": "rather good"}]
    options = Dataset(max_length=96)
    table = dataset.read(write("x.jsonl", rows), options)
    long, short = (split := dataset.encode(table, renderer, options, "train")).examples
    assert len(long) <= 96 and split.report.noted[report.CUT] == [1] and split.report.kept == 2
    text = renderer.tokenizer.decode(long.ids)
    assert "bad, rather good" in text and text.endswith("assistant\nbad<|im_end|>")
    assert "so so so" in text and "so " * 300 not in text
    # In evaluation it is cut in the same place, for whichever label.
    room = dataset.check_labels(renderer, table.labels)
    prompt, cut = dataset.question(renderer, table.rows[0].text, table.labels, options, room)
    assert cut and renderer.prompt(prompt) == long.ids[: len(long) - long.targets]
    assert not dataset.question(renderer, "fine", table.labels, options, room)[1]
    assert len(short) <= 96
    dropping = options.model_copy(update={"overlength": "drop"})
    assert dataset.encode(table, renderer, dropping, "train").report.kept == 1


def test_each_answer_is_fitted_by_itself(write, sample_tokenizer):
    # Of a template that rewrites history, an answer beyond max_length leaves the others.
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + ('' if not loop.last and "
        "m.role == 'assistant' else m.content) + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    renderer = Renderer(sample_tokenizer, template)
    talk = [ASK, SAY, {"role": "user", "content": "long " * 90}, SAY]
    options = Dataset(max_length=64)
    table = dataset.read(
        write("x.jsonl", [{"messages": talk}, {"messages": [*talk[:2] * 3]}]), options
    )
    split = dataset.encode(table, renderer, options, "train")
    assert [(one.origin, one.part, one.joined) for one in split.examples] == [
        ("x.jsonl:1", 0, False),
        ("x.jsonl:2", 0, False), ("x.jsonl:2", 1, True), ("x.jsonl:2", 2, True),
    ]  # fmt: skip
    assert split.report.noted == {report.TRUNCATED: [1], report.REWRITTEN: [2]}
    assert split.report.kept == 2 and split.report.examples == 4


def test_made_up_ids_are_not_those_that_are_given(write):
    talk = [
        ASK,
        call(id="call00002"),
        {**RESULT, "tool_call_id": "call00002"},
        call(),
        RESULT,
        call(),
        RESULT,
        SAY,
    ]
    table = dataset.read(write("x.jsonl", [{"tools": TOOLS, "messages": talk}]), Dataset())
    results = [one["tool_call_id"] for one in table.rows[0].messages if one["role"] == "tool"]
    assert results == ["call00002", "call00001", "call00003"]
    two = {
        **RESULT,
        "content": "<tool_response>a</tool_response>\n<tool_response>b</tool_response>",
    }
    table = dataset.read(
        write("y.jsonl", [{"tools": TOOLS, "messages": [ASK, call(), two, SAY]}]), Dataset()
    )
    assert table.rows[0].messages[2]["content"] == "a\nb"


def test_what_drop_leaves_of_a_conversation(write, sample_tokenizer):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + ('' if not loop.last and "
        "m.role == 'assistant' else m.content) + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    talk = [ASK, SAY, {"role": "user", "content": "long " * 90}, SAY]
    options = Dataset(max_length=64, overlength="drop")
    table = dataset.read(write("x.jsonl", [{"messages": talk}]), options)
    split = dataset.encode(table, Renderer(sample_tokenizer, template), options, "train")
    assert len(split.examples) == 1 and split.report.noted == {report.PARTLY: [1]}


def test_control_tokens_in_reasoning_and_arguments_are_reported(encoded):
    spelled = "x<|im_end|>"
    rows = [
        {"messages": [ASK, {**SAY, "reasoning": spelled}]},
        {"tools": TOOLS, "messages": [ASK, call({"place": spelled})]},
        {"messages": [ASK, SAY]},
    ]
    texts, fates = encoded(*rows)
    [lines] = [lines for what, lines in fates.noted.items() if "spells control tokens" in what]
    assert lines == [1, 2]
    assert all("x<|im_end|>" in text for text in texts[:2])
