import dataclasses

import pytest
from data_files import GOOD, classified, encode, pairs, refusal

from etude.config.schema import Dataset
from etude.data import dataset, formats, report, splits


def test_skipped_rows_are_at_most_a_screen_and_count_once(write, renderer):
    rows = [*pairs(*"abcdefghij"), *({"prompt": n, "completion": "x"} for n in range(25))]
    table = dataset.read(write("x.jsonl", rows), Dataset(on_bad_row="skip"))
    train, validation = splits.split_rows(table, 0.3, seed=1)
    _, fates = encode(train, renderer)
    assert fates.rows - fates.kept == 25 and validation.dropped == {}
    assert len(fates.notices()) == report.SHOWN + 1
    assert fates.notices()[-1] == "train: ... and 15 more of 32 rows dropped for other reasons"


def test_all_faults_are_reported_and_long_lists_cut(write):
    message = refusal(write("a.jsonl", GOOD + "{\n" * 25))
    assert message.startswith("25 rows cannot be used") and len(message.splitlines()) == 2
    assert (
        "a.jsonl:2: " in message
        and "(25 rows: lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ...)" in message
    )
    message = refusal(write("a.jsonl", GOOD + "".join(f"{' ' * n}x\n" for n in range(25))))
    assert message.startswith("25 rows cannot be used")
    assert "a.jsonl:2: " in message and "a.jsonl:11: " in message
    assert "a.jsonl:12: " not in message and "... and 15 more" in message


def test_report_counts_every_row_with_its_line(write, renderer):
    rows = pairs("a", "b", "a", "long " * 60, "c")
    rows[3]["prompt"], rows[4]["prompt"] = "short", "long " * 60
    table = dataset.read(write("rows.jsonl", rows), Dataset())

    examples, fates = encode(table, renderer, max_length=64)

    assert (fates.rows, fates.kept, len(examples)) == (5, 4, 4)
    assert fates.noted == {report.DUPLICATE: [3], report.TRUNCATED: [4]}
    assert fates.dropped == {"no supervised token within max_length 64": [5]}
    assert fates.tokens == sum(map(len, examples))
    assert fates.supervised == sum(sum(example.supervised) for example in examples)
    assert fates.longest == 64 == len(examples[3])
    whole = sum(len(renderer.answer(row.messages)) for row in table.rows)
    assert fates.lost == whole - fates.tokens
    assert fates.notices() == [
        "train: 1 of 5 rows dropped (no supervised token within max_length 64): line 5",
        "train: 1 of 5 rows duplicates of an earlier row: line 3",
        "train: 1 of 5 rows truncated, end token kept: line 4",
        f"train: {fates.lost} tokens lost beyond max_length ({fates.lost / whole:.1%})",
    ]


def test_a_clean_set_gives_no_notice(write, renderer):
    table = dataset.read(write("rows.jsonl", pairs("a", "b")), Dataset())
    _, fates = encode(table, renderer)
    assert fates.notices() == [] and (fates.rows, fates.kept) == (2, 2)


def test_labels_are_counted(write, renderer):
    rows = [{"text": str(n), "label": "odd" if n % 2 else "even"} for n in range(5)]
    _, fates = encode(dataset.read(write("rows.jsonl", rows), Dataset()), renderer)
    assert fates.labels == {"even": 3, "odd": 2}


@pytest.mark.parametrize("overlength", ["truncate", "drop", None])
def test_lost_tokens_are_counted(write, renderer, overlength):
    rows = pairs("a", "long " * 60)
    rows[1]["prompt"] = "short"
    table = dataset.read(write("rows.jsonl", rows), Dataset())
    examples, fates = encode(table, renderer, max_length=64, overlength=overlength)
    whole = sum(len(renderer.answer(row.messages)) for row in table.rows)
    assert fates.lost == whole - sum(map(len, examples)) > 0
    assert fates.notices()[-1].startswith(f"train: {fates.lost} tokens lost beyond max_length (")


def test_classes_with_one_row_or_none_are_reported(renderer):
    table = classified(("a", "x"), ("b", "x"), ("c", "y"), ("c", "y"))
    table = dataclasses.replace(table, labels=["w", "x", "y", "z"])
    fates = dataset.encode(table, renderer, Dataset(), "train").report
    assert fates.few == {"w": 0, "y": 1, "z": 0}
    assert fates.notices()[-2:] == [
        "train: no row to learn the labels 'w', 'z' from",
        "train: a single row to learn the label 'y' from",
    ]
    # A row that is dropped for its length teaches nothing either; a held-out split needs no word.
    long = classified(("a", "x"), ("b", "x"), ("so " * 600, "y"), ("d", "z"), ("e", "z"))
    fates = dataset.encode(long, renderer, Dataset(overlength="drop"), "train").report
    assert "train: no row to learn the label 'y' from" in fates.notices()
    fates = dataset.encode(table, renderer, Dataset(), "validation").report
    assert not any("to learn" in notice for notice in fates.notices())


def test_one_text_with_two_labels_is_a_contradiction(renderer):
    table = classified(("a", "x"), ("b", "y"), ("a", "y"), ("a", "x"), ("b", "y"), ("c", "x"))
    fates = dataset.encode(table, renderer, Dataset(), "train").report
    assert (fates.noted, fates.contradictions) == ({report.DUPLICATE: [4, 5]}, [(3, 1)])
    assert (
        "train: 1 of 6 rows have the text of another row and another label: line 3 contradicts "
        "line 1; one of each pair is wrong" in fates.notices()
    )
    other = classified(("c", "y"), ("new", "x"), ("b", "y"), ("b", "x"))
    assert splits.overlap(table, other, "test") == (
        "test: 1 of 4 rows are in train too, so its figures flatter: line 3; test: 2 of 4 rows have "
        "the text of another row and another label: line 1 contradicts train's line 6, line 4 "
        "contradicts train's line 2; one of each pair is wrong"
    )
    # A question can have several answers, and a conversation can go on in many ways.
    talks = [
        formats.Row(
            n,
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}],
        )
        for n, answer in enumerate(["Hello", "Hi there", "Hello"], 1)
    ]
    assert report.repeats(talks) == ([3], [])
