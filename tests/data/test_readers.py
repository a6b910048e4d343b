import csv
import hashlib
import io
import json
import math
from pathlib import Path

import pytest
from data_files import GOOD, refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from etude.config.schema import Dataset
from etude.data import dataset, formats, readers
from etude.errors import UserError


def test_lines_are_those_of_the_file(write):
    jsonl = write("a.jsonl", '\n{"text": "a\u2028b"}\r\n\n{"text": "c"}')
    assert [row.line for row in dataset.read(jsonl, Dataset()).rows] == [2, 4]
    many = write("a.json", '\n[\n {"text":\n "a"}, {"text": "b"},\n\n{"text": "c"}]')
    assert [row.line for row in dataset.read(many, Dataset()).rows] == [3, 4, 6]
    table = write("a.csv", 'text,x\r\n"a\r\nb",1\r\n\r\nc\u2028d,2\r\ne,3')
    assert [row.line for row in dataset.read(table, Dataset()).rows] == [2, 5, 6]
    assert dataset.read(table, Dataset()).rows[1].text == "c\u2028d"


def test_fingerprint_is_the_files_own(write):
    source = write("a.jsonl", '{"text": "a"}\n')
    expected = hashlib.sha256(Path(source).read_bytes()).hexdigest()
    assert dataset.read(source, Dataset()).fingerprint == expected


def test_classes_give_their_names(write):
    import datasets

    names = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = {"text": ["a", "b", "c"], "label": [0, 1, -1]}
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet("classes.parquet")
    assert "classes.parquet:3: no 'label'" in refusal("classes.parquet")
    table = dataset.read("classes.parquet", Dataset(on_bad_row="skip"))
    assert [row.label for row in table.rows] == ["neg", "pos"] == table.labels
    plain = write("plain.parquet", [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    assert dataset.read(plain, Dataset()).labels == ["0", "1"]


def test_classes_of_a_hub_data_set_give_their_names(monkeypatch):
    import datasets

    names = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    table = dataset.read("owner/name", Dataset())
    assert [row.label for row in table.rows] == ["pos", "neg"]


def test_whole_numbers_with_a_gap_stay_whole(write):
    # As pandas writes them, where one is missing.
    source = write("x.parquet", [{"text": "a", "label": 1.0}, {"text": "b", "label": 0.0}])
    assert dataset.read(source, Dataset()).labels == ["0", "1"]
    source = write("x.parquet", [{"text": "a", "label": 1.0}, {"text": "b", "label": math.nan}])
    assert "x.parquet:2: no 'label'" in refusal(source)


TURNS = '{"messages": [{"role": "%s", "content": "x"}, {"role": "%s", "content": "y"}]}\n'
BROKEN = {
    "bad-json": ("a.jsonl", GOOD + '{"prompt": "p",}\n' + GOOD, "a.jsonl:2: not valid JSON: "),
    "cut-json": ("a.jsonl", GOOD * 3 + '{"prompt": "p", "comp', "a.jsonl:4: not valid JSON: Unterminated string"),
    "no-object": ("a.jsonl", GOOD + '["p", "c"]\n', "a.jsonl:2: a JSON object {...} is expected, not list"),
    "no-column": (
        "a.jsonl", GOOD + '{"prompt": "p", "answer": "c"}\n',
        "a.jsonl:2: no 'completion'; it has: prompt, answer",
    ),
    "null": ("a.jsonl", GOOD + '{"prompt": null, "completion": "c"}\n', "a.jsonl:2: no 'prompt'"),
    "type": ("a.jsonl", GOOD + '{"prompt": 7, "completion": "c"}\n', "a.jsonl:2: prompt must be text, not int (7)"),
    "blank": ("a.jsonl", GOOD + '{"prompt": " \\n", "completion": "c"}\n', "a.jsonl:2: prompt is empty"),
    "half-character": (
        "a.jsonl", GOOD + '{"prompt": "a\\ud83d", "completion": "c"}\n',
        "a.jsonl:2: prompt holds half a character ('\\ud83d')",
    ),
    "quality": (
        "a.jsonl", '{"prompt": "p", "completion": "c", "quality": "ok"}\n',
        "a.jsonl:1: quality 'ok' is not one of good",
    ),
    "role": (
        "a.jsonl", TURNS % ("user", "assistant") + TURNS % ("user", "bot"),
        "a.jsonl:2: messages, turn 2: role 'bot' is not one of system, developer, user",
    ),
    "odd-role": (
        "a.jsonl", '{"messages": [{"role": ["user"], "content": "x"}]}\n',
        "a.jsonl:1: messages, turn 1: role ['user'] is not one of",
    ),
    "odd-turn": ("a.jsonl", '{"messages": ["hi"]}\n', "a.jsonl:1: messages, turn 1: must be an object"),
    "no-turns": ("a.jsonl", '{"messages": []}\n', "a.jsonl:1: messages must be a list of turns"),
    "last-turn": (
        "a.jsonl", TURNS % ("system", "user"),
        "a.jsonl:1: messages has no turn of the assistant, which is what is learnt",
    ),
    "sharegpt": (
        "a.jsonl", '{"conversations": [{"from": "tool", "value": "x"}]}\n',
        "a.jsonl:1: message 1: a tool's result without a call before it",
    ),
    "utf8": ("a.jsonl", GOOD.encode() * 2 + b'{"prompt": "\xe9"}\n', "a.jsonl:3: not UTF-8 text (byte 0xe9)"),
    "empty": ("a.jsonl", "", "a.jsonl: no rows in it"),
    "blank-lines": ("a.jsonl", "\n\n", "a.jsonl: no rows in it"),
    "deep": ("a.jsonl", GOOD + "[" * 100_000 + "\n", "a.jsonl:2: nested too deeply"),
    "ragged-csv": (
        "a.csv", "prompt,completion\np,c\np,c,d\np\n",
        "a.csv:3: not as many fields as the header has (prompt, completion)",
    ),
    "open-csv": ("a.csv", 'prompt,completion\np,c\np,"c\n', "a.csv:3: not valid CSV: unexpected end of data"),
    "double-csv": ("a.csv", "prompt,prompt\np,c\n", "a.csv:1: the header has a duplicate column 'prompt'"),
    "empty-csv": ("a.csv", "prompt,completion\n", "a.csv: no rows in it"),
    "json-object": ("a.json", '{"prompt": "p"}', "a.json:1: a .json file is one list of objects"),
    "json-bad": (
        "a.json", '[\n{"prompt": "p"},\n{"prompt" "p"}\n]',
        "a.json:3: not valid JSON: Expecting ':' delimiter",
    ),
    "json-item": (
        "a.json", '[\n{"prompt": "p", "completion": "c"},\n\n7]',
        "a.json:4: a JSON object {...} is expected, not int",
    ),
    "parquet": ("a.parquet", b"PAR1 nonsense", "a.parquet: not a readable parquet file"),
    "format": (
        "a.jsonl", '{"question": "p", "answer": "c"}\n',
        "a.jsonl:1: no known format has the columns question, answer. Known: messages",
    ),
    "bool-label": (
        "a.jsonl", '{"text": "p", "label": true}\n',
        "a.jsonl:1: label must be text or a whole number, not bool (True)",
    ),
    "one-label": ("a.jsonl", '{"text": "p", "label": "x"}\n', "a.jsonl: only one label (x)"),
    "suffix": ("a.txt", "hello", "a.txt: unknown kind of file; known: .jsonl, .json, .csv, .parquet"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "phrase"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_refused_by_line(write, name, content, phrase):
    assert phrase in refusal(write(name, content))


SEPARATED = {
    "semicolon": ("a.csv", "text;label\ngood, really;yes\nbad;no\n", 2),
    "excel": ("a.csv", "\ufeffsep=;\r\ntext;label\r\ngood, really;yes\r\nbad;no\r\n", 3),
    "excel-comma": ("a.csv", 'sep=,\ntext,label\n"good, really",yes\nbad,no\n', 3),
    "tab": ("a.tsv", "text\tlabel\ngood, really\tyes\nbad\tno\n", 2),
    "tab-in-csv": ("a.csv", "text\tlabel\ngood, really\tyes\nbad\tno\n", 2),
    "bar": ("a.csv", "\n\ntext|label\ngood, really|yes\nbad|no\n", 4),
    "quoted-header": ("a.csv", '"text";"label";"a, b"\ngood, really;yes;1\nbad;no;2\n', 2),
    "old-mac": ("a.csv", "text;label\rgood, really;yes\rbad;no\r", 2),
    "upper-case": ("A.CSV", 'text,label\n"good, really",yes\nbad,no\n', 2),
    # As it was: with a comma in the header, nothing else separates.
    "comma": ("a.csv", 'text,label,x;y\n"good, really",yes,1\nbad,no,2\n', 2),
    "upper-jsonl": (
        "A.JSONL",
        '{"text": "good, really", "label": "yes"}\n{"text": "bad", "label": "no"}\n',
        1,
    ),
    "lines-in-json": (
        "a.json",
        '\n{"text": "good, really", "label": "yes"}\n{"text": "bad", "label": "no"}\n',
        2,
    ),
    "list-in-jsonl": (
        "a.jsonl",
        '\n[\n{"text": "good, really", "label": "yes"},\n{"text": "bad", "label": "no"}]\n',
        3,
    ),
    "list-on-a-line": (
        "a.jsonl",
        '[{"text": "good, really", "label": "yes"},\n{"text": "bad", "label": "no"}]',
        1,
    ),
}


@pytest.mark.parametrize(("name", "content", "line"), SEPARATED.values(), ids=SEPARATED)
def test_files_of_other_programs_are_read(write, name, content, line):
    table = dataset.read(write(name, content), Dataset())
    assert table.format == "classification"
    assert [(row.line, row.text, row.label) for row in table.rows] == [
        (line, "good, really", "yes"),
        (line + 1, "bad", "no"),
    ]
    assert table.fingerprint == hashlib.sha256(content.encode()).hexdigest()


ADVISED = {
    "trailing-comma": ("a.json", '[\n{"text": "a"},\n]', "a.json:3: not valid JSON: "),
    "inner-comma": ("a.jsonl", '{"text": "a"}\n{"text": "b",}\n', "a.jsonl:2: not valid JSON: "),
    "comma-after": ("a.jsonl", '{"text": "a"},\n', "a.jsonl:1: not valid JSON: Extra data at column 14"),
    "no-comma": ("a.json", '[{"text": "a"}\n{"text": "b"}]', "a.json:2: not valid JSON: Expecting ',"),
    "open-list": ("a.json", '[{"text": "a"},', "a.json:1: not valid JSON: "),
    "two-lists": ("a.jsonl", '[{"text": "a"}]\n[{"text": "b"}]\n', "a.jsonl:2: not valid JSON: Extra data at column 1"),
    "one-object": ("a.json", '{"text": "a"}', "write [ and ] around it"),
    "inside": ("a.json", '{"data": [{"text": "a"}], "n": 1}', "save its list 'data' alone"),
    "utf16": ("a.csv", "text,label\na,b\n".encode("utf-16"), "iconv -f UTF-16 -t UTF-8 a.csv > NEW.csv"),
    "utf16-unmarked": ("a.jsonl", '{"text": "a"}'.encode("utf-16-be"), "iconv -f UTF-16BE"),
    "latin1": ("a.csv", "text,label\ncafé,b\n".encode("latin-1"), "a.csv:2: not UTF-8 text (byte 0xe9)"),
    "gz": ("a.jsonl.gz", b"\x1f\x8b", "known: .jsonl, .json, .csv, .parquet, .tsv; unpack it first"),
    "txt": ("a.txt", "Call me Ishmael.", "write each text as a line"),
    "xlsx": ("a.xlsx", b"PK", "save the sheet as CSV"),
    "wrong-separator": ("a.csv", "text;a\tb\nx;1\n", "no known format has the columns"),
    "ragged": ("a.csv", "text;label\na;b;c\n", "separated by semicolons"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "phrase"), ADVISED.values(), ids=ADVISED)
def test_files_that_are_not_read_get_the_one_thing_to_do(write, name, content, phrase):
    assert phrase in refusal(write(name, content))


def test_long_fields_are_read(write):
    source = write("a.csv", [{"text": "a " * 100_000, "label": "x"}, {"text": "b", "label": "y"}])
    assert [len(row.text) for row in dataset.read(source, Dataset()).rows] == [200_000, 1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    rows=st.lists(
        st.tuples(
            st.text(alphabet='ab,;\t|"\n\r\u2028é', max_size=12), st.sampled_from(["yes", "no"])
        ),
        min_size=2,
        max_size=4,
    ),
    mark=st.sampled_from(",;\t|"),
    ending=st.sampled_from([("\n", csv.QUOTE_ALL), ("\r\n", csv.QUOTE_MINIMAL)]),
    named=st.booleans(),
)
def test_fields_come_back_whatever_separates_them(write, rows, mark, ending, named):
    text = io.StringIO()
    text.write(f"sep={mark}{ending[0]}" * named)
    writer = csv.writer(text, delimiter=mark, lineterminator=ending[0], quoting=ending[1])
    writer.writerows([("text", "label"), *rows])
    read, faults, _ = readers.read(write("a.csv", text.getvalue()))
    assert not faults
    assert [tuple(values.values()) for _, values in read] == rows


def test_missing_file_names_the_nearest(write):
    write("tweets.train.jsonl", GOOD)
    assert "no such file" in refusal("tweets.trian.jsonl")
    assert "did you mean tweets.train.jsonl?" in refusal("tweets.trian.jsonl")
    assert "neither a file" in refusal("not a name")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(
        st.binary(max_size=60),
        st.text(alphabet='[]{},:"\\ud8 \n\r\x00text1ab', max_size=60).map(str.encode),
        st.lists(
            st.dictionaries(
                st.sampled_from(
                    [*formats.FORMATS["prompt_completion"], "text", "label", "messages"]
                ),
                st.recursive(
                    st.none() | st.integers() | st.text(max_size=4), st.lists, max_leaves=3
                ),
            )
        ).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    ),
    kind=st.sampled_from(readers.SUFFIXES),
)
def test_any_bytes_are_read_or_refused_in_words(write, content, kind):
    source = write(f"any{kind}", content)
    try:
        table = dataset.read(source, Dataset())
    except UserError as error:
        assert source in str(error)
    else:
        assert table.rows


def test_hub_data_set_out_of_reach(write):
    message = refusal("stanfordnlp/imdb:test")
    assert "stanfordnlp/imdb:test: this Hub data set cannot be loaded" in message
    assert "Offline, give a file instead" in message


def test_an_object_that_is_not_closed_is_reported_where_it_ends(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two"\n{"text": "three"}\n')
    with pytest.raises(UserError, match=r"x\.jsonl:2: .* at column 15"):
        dataset.read(str(file), Dataset())


@pytest.mark.parametrize("text", [json.dumps, lambda rows: json.dumps(rows, indent=1)])
def test_bad_rows_of_one_line_count_each(tmp_path, text):
    """A list can stand in a single line, so its rows share one."""
    rows = [{"prompt": "p", "completion": answer} for answer in ("a", "", " ", "b")]
    file = tmp_path / "x.json"
    file.write_text(text(rows))
    with pytest.raises(UserError, match=r"^2 rows cannot be used"):
        dataset.read(str(file), Dataset())
    table = dataset.read(str(file), Dataset(on_bad_row="skip"))
    assert len(table.rows) == 2 and sum(map(len, table.dropped.values())) == 2


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text":\nhello\n[1]\n{"text": "b"}\n', [2, 3, 4]),
        ("a.csv", "text,n\na,1\nb\nc,1,2\nd,1\n", [3, 4]),
    ],
)
def test_lines_that_cannot_be_read_are_skipped_and_counted(write, name, content, lines):
    source = write(name, content)
    assert f"{len(lines)} rows cannot be used" in refusal(source)
    table = dataset.read(source, Dataset(on_bad_row="skip"))
    assert len(table.rows) == 2
    assert sorted(line for dropped in table.dropped.values() for line in dropped) == lines
