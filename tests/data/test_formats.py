import json

import pytest
import yaml
from data_files import ASKED, FROM, KINDS, MORE, PAIR, SHAPES, TALK, TOLD, encode, pairs, refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from etude.config.loading import load_config
from etude.config.schema import Dataset
from etude.conversation.renderer import Renderer
from etude.data import dataset, formats, readers
from etude.errors import UserError


@pytest.mark.parametrize("form", ["auto", "named"])
@pytest.mark.parametrize(("shape", "kind"), [(s, kind) for s in SHAPES for kind in KINDS[s]])
def test_every_format_from_every_file_gives_the_same_messages(write, shape, kind, form):
    row, messages = SHAPES[shape]
    source = write(f"rows{kind}", [row, row])

    table = dataset.read(source, Dataset(format=shape if form == "named" else "auto"))

    assert table.format == shape
    assert [dataset.conversation(row, table.labels, Dataset()) for row in table.rows] == [
        messages
    ] * 2


@pytest.mark.parametrize("kind", readers.SUFFIXES)
def test_classification_and_text_from_every_file(write, kind):
    rows = [{"text": ASKED, "label": "bad"}, {"text": "ok {label} {text}", "label": "good"}]
    options = Dataset(instruction="{text}! One of {labels}?", labels=["good", "bad"])

    table = dataset.read(write(f"rows{kind}", rows), options)

    assert (table.format, table.labels) == ("classification", ["good", "bad"])
    assert [dataset.conversation(row, table.labels, options) for row in table.rows] == [
        [
            {"role": "user", "content": f"{row['text']}! One of good, bad?"},
            {"role": "assistant", "content": row["label"]},
        ]
        for row in rows
    ]
    text = dataset.read(write(f"text{kind}", [{"text": ASKED}]), Dataset())
    assert (text.format, text.rows[0].text, text.rows[0].messages) == ("text", ASKED, [])
    with_labels = dataset.read(f"rows{kind}", Dataset(format="text"))
    assert (with_labels.format, with_labels.rows[0].label) == ("text", None)


def test_alpaca_input_joins_the_instruction(write):
    source = write("rows.jsonl", [{"instruction": "Translate.", "input": "Ja", "output": "Yes"}])
    assert dataset.read(source, Dataset()).rows[0].messages[0]["content"] == "Translate.\n\nJa"


def test_quality_comes_along(write):
    rows = [{"prompt": "p", "completion": "c", "quality": word} for word in ("good", "poor", None)]
    table = dataset.read(write("rows.jsonl", rows), Dataset())
    assert [row.quality for row in table.rows] == ["good", "poor", None]


def test_columns_are_mapped_by_name(write):
    source = write(
        "stars.csv",
        [{"review": "Fine", "stars": 5, "text": "x"}, {"review": "Bad", "stars": 1, "text": "y"}],
    )
    table = dataset.read(source, Dataset(columns={"text": "review", "label": "stars"}))
    assert [(row.text, row.label) for row in table.rows] == [("Fine", "5"), ("Bad", "1")]
    assert "did you mean label?" in refusal(source, columns={"text": "review", "lable": "stars"})
    assert "stars.csv: no row has a column grade (for label); its columns are review" in refusal(
        source, format="classification", columns={"label": "grade"}
    )


def test_whole_numbers_are_labels_and_labels_are_collected(write):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": "1"}]
    assert dataset.read(write("rows.jsonl", rows), Dataset()).labels == ["0", "1"]


@pytest.mark.parametrize(
    "head", ["text, label", "text,Label", "\ufeff\ufeffText,LABEL ", " text\t,label", "text,label"]
)
def test_headers_are_compared_trimmed_and_caseless(write, head):
    table = dataset.read(write("x.csv", f"{head}\na,good\n b ,bad\n"), Dataset())
    assert (table.format, table.labels, table.unused) == ("classification", ["bad", "good"], {})
    assert [row.text for row in table.rows] == ["a", " b "]


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ("prompt_completion", {"Prompt": "a", "Completion ": "b"}),
        ("alpaca", {"INSTRUCTION": "a", "output": "b", "Input": "c"}),
        ("messages", {"Messages": PAIR}),
        ("classification", {"Text": "a", "label": "b"}),
    ],
)
def test_names_of_every_format_are_caseless(write, shape, row):
    other = {**row, "label": "c"} if "label" in row else row
    assert dataset.read(write("x.jsonl", [row, other]), Dataset()).format == shape


def test_columns_that_become_one_are_refused(write):
    row = {"text": "a", "Text": "b", "label": "c"}
    message = refusal(write("x.jsonl", [row]))
    assert "the columns 'text', 'Text' have one name but for case" in message
    rows = [row, {**row, "label": "d"}]
    table = dataset.read(write("x.jsonl", rows), Dataset(columns={"text": "Text"}))
    assert [r.text for r in table.rows] == ["b", "b"]


NEARLY = [
    (["text", "labels"], "{label: labels}"),
    (["text", "sentiment"], "{label: sentiment}"),
    (["text", "target"], "{label: target}"),
    (["text", "Class"], "{label: Class}"),
    (["id", "text", "lable"], "{label: lable}"),
    (["text", "label_text"], "{label: label_text}"),
    (["text", "isSpam"], "{label: isSpam}"),
    (["text", "answer"], "{prompt: text, completion: answer}"),
    (["text", "output"], "{prompt: text, completion: output}"),
    (["review", "stars"], "{text: review, label: stars}"),
    (["question", "answer"], "{prompt: question, completion: answer}"),
    (["input", "output"], "{prompt: input, completion: output}"),
    (["Prompt", "response"], "{completion: response}"),
    (["instruction", "response"], "{output: response}"),
    (["document", "id"], "{text: document}"),
    (["document", "summary"], "{prompt: document, completion: summary}"),
    (["text", "input", "output"], "{prompt: input, completion: output}"),
]


@pytest.mark.parametrize(("names", "mapping"), NEARLY, ids=["-".join(names) for names, _ in NEARLY])
def test_columns_that_are_nearly_right_get_a_proposal_that_works(write, names, mapping):
    rows = [dict.fromkeys(names, word) for word in ("one", "two")]
    source = write("x.jsonl", rows)
    message = refusal(source)
    assert f"dataset.columns: {mapping}" in message
    proposed = load_config(None, overrides=[f"dataset.columns={mapping}"]).dataset
    assert set(yaml.safe_load(mapping)) <= set(
        formats.FORMATS[dataset.read(source, proposed).format]
    )
    if "text" in names:  # who asks for raw text gets it
        assert "dataset.format: text" in message
        assert dataset.read(source, Dataset(format="text")).format == "text"


@pytest.mark.parametrize(
    "names", [["id", "url"], ["source", "date", "title"], ["language", "meta"]]
)
def test_raw_text_beside_what_is_no_answer_stays_raw_text(write, names):
    rows = [{"text": "Once upon a time", **dict.fromkeys(names, "x"), "label_id": None}]
    table = dataset.read(write("x.jsonl", rows), Dataset())
    assert table.format == "text" and list(table.unused) == names


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"dialogue": PAIR, "id": 1}, "{messages: dialogue}"),
        ({"chat": SHAPES["sharegpt"][0]["conversations"]}, "{messages: chat}"),
    ],
)
def test_turns_in_another_column_get_the_mapping(write, row, mapping):
    source = write("x.jsonl", [row])
    assert f"dataset.columns: {mapping}" in refusal(source)
    options = load_config(None, overrides=[f"dataset.columns={mapping}"]).dataset
    assert dataset.read(source, options).rows[0].messages[-2:] == PAIR


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    label=st.sampled_from(["label", "labels", "Sentiment", " target", "category", "answer", "OUTPUT", "user_label"]),
    others=st.lists(st.text(st.characters(codec="utf-8"), max_size=8), max_size=4),
    value=st.text("ab", min_size=1),
)  # fmt: skip
def test_no_file_with_a_label_or_an_answer_becomes_raw_text(write, label, others, value):
    row = {"text": "t", **dict.fromkeys(others, "x"), label: value}
    source = write("x.jsonl", [row, {**row, label: f"{value}2"}])
    try:
        assert dataset.read(source, Dataset()).format != "text"
    except UserError as error:
        assert source in str(error)


MEANS = {
    "tools": ({"prompt": "a", "completion": "b", "tools": [{"name": "f"}]}, "'tools' is filled: calls of tools"),
    "functions": ({"prompt": "a", "completion": "b", "Functions": "f()"}, "'Functions' is filled: calls"),
    "tool-calls": (
        {"messages": [PAIR[0], {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
        "messages, turn 2: a call must be an object with a function's name",
    ),
    "tool-role": (
        {"messages": [PAIR[0], {"role": "tool", "content": "4"}, PAIR[1]]},
        "message 2: a tool's result without a call before it",
    ),
    "reasoning": (
        {"messages": [{**PAIR[0], "reasoning_content": "Hm."}, PAIR[1]]},
        "turn 1: 'reasoning_content' is filled: reasoning is read from",
    ),
    "thinking": ({"prompt": "a", "completion": "b", "thinking": "c"}, "'thinking' is filled: reasoning is read from"),
    "history": (
        {"instruction": "a", "output": "b", "history": [["c", "d"]]},
        "'history' is filled: earlier turns are read only as messages",
    ),
    "context": (
        {"instruction": "a", "output": "b", "context": "c"},
        "the prompt would lack it; join it to the prompt (in format alpaca: dataset.columns: {input:",
    ),
    "documents": ({"prompt": "a", "completion": "b", "documents": ["c"]}, "'documents' is filled: the answer"),
    "second-text": ({"text": "a", "label": "b", "sentence2": "c"}, "'sentence2' is filled: the answer rests"),
    "images": ({"messages": PAIR, "images": ["a.png"]}, "'images' is filled: only text"),
    "rejected": ({"prompt": "a", "completion": "b", "rejected": "c"}, "'rejected' is filled: preferences"),
    "verdict": ({"prompt": "a", "completion": "b", "label": False}, "'label' is filled: a verdict on the answer"),
    "score": ({"instruction": "a", "output": "b", "Score": 0}, "'Score' is filled: a verdict"),
    "correct": ({"messages": PAIR, "is_correct": 1}, "'is_correct' is filled: a verdict"),
    "system-prompt": ({"messages": PAIR, "system_prompt": "x"}, "dataset.columns: {system: its name}"),
    "instruction": ({"prompt": "a", "completion": "b", "input": "x"}, "'input' is filled: the answer rests"),
    "half": (
        {"messages": [PAIR[0], {**PAIR[1], "weight": 0.5}]},
        "turn 2: weight 0.5 is neither 0 (false) nor 1 (true)",
    ),
    "row-weight": ({"prompt": "a", "completion": "b", "weight": "0.5"}, "weight '0.5' is neither 0"),
    "contradiction": (
        {"messages": [PAIR[0], {**PAIR[1], "weight": 1, "train": False}]},
        "turn 2: weight and train contradict each other",
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, PAIR[1]]},
        "turn 1: content has a part of type image_url, and only text",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "phrase"), MEANS.values(), ids=MEANS)
def test_what_changes_a_rows_meaning_is_refused_by_name(write, row, phrase):
    plain = {"prompt": "q", "completion": "c"} if "messages" not in row else {"messages": PAIR}
    plain = {"instruction": "q", "output": "c"} if "instruction" in row else plain
    plain = {"text": "q", "label": "c"} if "text" in row else plain
    message = refusal(write("x.jsonl", [plain, row]))
    assert phrase in message and "x.jsonl:2: " in message


def test_a_column_that_is_refused_takes_one_line(write):
    rows = [{"prompt": "a", "completion": "b", "score": n, "tools": "f" * n} for n in range(50)]
    message = refusal(write("x.jsonl", rows))
    # The first row has no tools; the others have both columns.
    assert len(message.splitlines()) == 3 and message.startswith("50 rows cannot be used")
    assert "x.jsonl:1: 'score' is filled" in message
    assert "x.jsonl:2: 'score' is filled" in message and "; 'tools' is filled" in message
    assert message.endswith("(49 rows: lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ...)")
    # Rows without it can be used, but none is without a score.
    assert "'score' is filled" in refusal("x.jsonl", on_bad_row="skip")
    table = dataset.read("x.jsonl", Dataset(on_bad_row="skip", ignore=["score"]))
    assert [row.line for row in table.rows] == [1]


@pytest.mark.parametrize("value", [None, "", " ", [], {}, "[]"])
def test_a_key_that_is_empty_is_not_worth_a_word(write, value):
    turn = {**PAIR[1], "tool_calls": value, "weight": value}
    row = {"messages": [PAIR[0], turn], "tools": value, "context": value, "label": value}
    table = dataset.read(write("x.jsonl", [row]), Dataset())
    assert table.rows[0].messages == PAIR and not table.rows[0].untrained
    assert (table.unused, table.notices, table.dropped) == ({}, [], {})


def test_a_column_is_left_out_on_purpose(write):
    turns = [PAIR[0], {**PAIR[1], "reasoning_content": "Hm."}]
    source = write("x.jsonl", [{"messages": turns, "Score": 3}])
    table = dataset.read(source, Dataset(ignore=["score", "Reasoning_Content "]))
    assert table.rows[0].messages == PAIR and table.unused == {}
    assert "'Score' is filled" in refusal(source, ignore=["reasoning_content"])
    chosen = write("y.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert dataset.read(chosen, Dataset(columns={"completion": "chosen"})).unused == {"rejected": 1}


def test_one_part_of_text_is_read(write):
    turns = [{"role": "user", "content": [{"type": "text", "text": ASKED}]}, PAIR[1]]
    assert dataset.read(write("x.jsonl", [{"messages": turns}]), Dataset()).rows[0].messages == PAIR


@pytest.mark.parametrize(
    ("flags", "learnt"),
    [
        ({1: {"weight": 0}}, [3, 5]),
        ({1: {"weight": 0}, 3: {"weight": 1.0}, 5: {"weight": 0}}, [3]),
        ({1: {"train": False}, 3: {"train": True}}, [3, 5]),
        ({1: {"training": False}, 5: {"Loss": False}}, [3]),
        ({1: {"weight": 1}, 0: {"weight": 0}}, [1, 3, 5]),
        ({}, [1, 3, 5]),
    ],
)
@pytest.mark.parametrize("shape", ["messages", "sharegpt"])
def test_weight_and_train_are_in_the_mask(write, renderer, sample_tokenizer, shape, flags, learnt):
    turns = [{**turn, **flags.get(at, {})} for at, turn in enumerate(TALK)]
    if shape == "sharegpt":
        turns = [
            {"from": FROM[turn.pop("role")], "value": turn.pop("content"), **turn} for turn in turns
        ]
    row = {"messages" if shape == "messages" else "conversations": turns}
    table = dataset.read(write("x.jsonl", [row]), Dataset())

    [example], fates = encode(table, renderer)

    (whole,) = renderer.render(TALK)
    assert example.ids == whole.ids and table.unused == {}
    ends = "".join(f"{TALK[at]['content']}<|im_end|>" for at in learnt)
    assert (
        "".join(text for text, counts, _ in dataset.spans(example, sample_tokenizer) if counts)
        == ends
    )
    lengths = [len(sample_tokenizer(TALK[at]["content"]).input_ids) + 1 for at in learnt]
    assert sum(example.supervised) == fates.supervised == sum(lengths)


def test_a_system_prompt_of_the_configuration_shifts_no_weight(write, sample_tokenizer):
    renderer = Renderer(sample_tokenizer, system_prompt="Be brief.")
    turns = [*TALK[:1], {**TALK[1], "weight": 0}, *TALK[2:4]]
    [example], _ = encode(
        dataset.read(write("x.jsonl", [{"messages": turns}]), Dataset()), renderer
    )
    shown = [text for text, counts, _ in dataset.spans(example, sample_tokenizer) if counts]
    assert shown == ["A second one.", "<|im_end|>"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.parquet"])
@pytest.mark.parametrize(("flag", "no", "yes"), [("weight", 0, 1), ("train", False, True)])
def test_a_whole_row_is_left_out_by_its_weight(write, renderer, name, flag, no, yes):
    rows = [{**row, flag: no if row["completion"] == "b" else yes} for row in pairs("a", "b", "c")]
    table = dataset.read(write(name, rows), Dataset())
    examples, fates = encode(table, renderer)
    assert len(examples) == 2 and table.unused == {}
    [(reason, lines)] = fates.dropped.items()
    assert "no answer to train on" in reason and lines == [3 if name == "x.csv" else 2]
    everything = write("y.jsonl", [{**row, flag: no} for row in rows])
    assert "every row says that it is not to be trained on" in refusal(everything)


def test_a_weight_that_trains_no_answer_is_reported(write):
    turns = [{**PAIR[0], "train": True}, {**PAIR[1], "train": True}]
    table = dataset.read(write("x.jsonl", [{"messages": turns}]), Dataset())
    assert table.unused == {"train of a turn that is no answer": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": " "}, *PAIR]},
        {"messages": [{"role": "system", "content": None}, *PAIR], "system": ""},
        {"conversations": [{"from": "system", "value": ""}, *SHAPES["sharegpt"][0]["conversations"][1:]]},
        {"instruction": ASKED, "input": " \n", "output": TOLD, "system": " "},
        {"instruction": ASKED, "input": None, "output": TOLD},
    ],
)  # fmt: skip
def test_an_empty_system_turn_and_a_blank_input_are_absent(write, row):
    table = dataset.read(write("x.jsonl", [row]), Dataset())
    assert table.rows[0].messages == PAIR and table.dropped == {}


def test_two_system_prompts_are_one_too_many(write):
    message = refusal(write("x.jsonl", [{"system": "Be long.", "messages": MORE}]))
    assert "turn 1: a second system prompt, beside the column system" in message


def test_what_is_unused_is_counted_where_it_is_filled(write):
    turn = {"role": "assistant", "content": "b", "name": "Bo", "refusal": None}
    rows = [
        {"messages": [{"role": "user", "content": "a"}, turn], "id": n, "tools": None, "note": ""}
        for n in range(3)
    ]
    file = write("x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert dataset.read(file, Dataset()).unused == {"id": 3, "name of a turn": 3}


def test_the_format_is_that_of_all_rows_not_of_the_first(write):
    file = write(
        "x.jsonl", '{"text": "a"}\n{"text": "b", "label": "x"}\n{"text": "c", "label": "y"}\n'
    )
    with pytest.raises(UserError, match=r"x\.jsonl:1: no 'label'"):
        dataset.read(file, Dataset())


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"system": "Be brief.", "instruction": "a", "output": "b"},
        {"system": "Be brief.", "prompt": "a", "completion": "b"},
        {"system": "Be brief.", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ],
)  # fmt: skip
def test_a_system_prompt_in_a_column_of_its_own_is_kept(write, row):
    table = dataset.read(write("x.jsonl", json.dumps(row) + "\n"), Dataset())
    assert [m["content"] for m in table.rows[0].messages] == ["Be brief.", "a", "b"]
    assert table.rows[0].messages[0]["role"] == "system"


def test_two_columns_that_say_what_is_trained_on_are_refused(write):
    rows = [{"prompt": "p", "completion": "c", "weight": 1, "Weight ": 0}]
    with pytest.raises(UserError, match=r"'weight', 'Weight ' have one name"):
        dataset.read(write("x.jsonl", rows), Dataset())


def test_turns_of_either_style_are_read_in_either_column(write):
    shapes = ({"conversations": PAIR}, {"messages": SHAPES["sharegpt"][0]["conversations"]})
    for row in shapes:
        table = dataset.read(write("x.jsonl", [row]), Dataset())
        assert table.rows[0].messages[-2:] == PAIR and table.unused == {}


def test_no_column_is_proposed_for_two_fields(write):
    rows = [{"text": "a", "id": 1}, {"text": "b", "id": 2}]
    message = refusal(write("x.jsonl", rows), format="classification", columns={"label": "text"})
    assert "text: text" not in message
