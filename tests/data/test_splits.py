"""Which rows are trained on and which are held out."""

import dataclasses
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from data_files import classified, pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from etude.config.loading import load_config
from etude.config.schema import Dataset
from etude.data import dataset, formats, splits

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture
def table(write):
    return dataset.read(write("rows.jsonl", pairs(*map(str, [*range(50), *range(10)]))), Dataset())


def test_split_is_disjoint_complete_and_stable(table):
    train, held = splits.split_rows(table, 0.2, seed=1)

    assert sorted(row.line for row in train.rows + held.rows) == list(range(1, 61))
    assert not {row.key for row in train.rows} & {row.key for row in held.rows}
    assert len({row.key for row in held.rows}) == 10
    assert [row.line for row in train.rows] == sorted(row.line for row in train.rows)
    assert splits.split_rows(table, 0.2, seed=1) == (train, held)
    assert splits.split_rows(table, 0.2, seed=2) != (train, held)
    assert splits.overlap(train, held, "validation") is None


def test_no_split_where_nothing_would_be_held(table):
    assert splits.split_rows(table, 0.0, seed=1) == (table, None)
    lonely = dataclasses.replace(table, rows=table.rows[:1])
    assert splits.split_rows(lonely, 0.5, seed=1) == (lonely, None)


def test_few_rows_still_get_a_validation_of_one(table):
    few = dataclasses.replace(table, rows=table.rows[:3])
    for share in (0.001, 0.99):
        train, validation = splits.split_rows(few, share, seed=1)
        assert train.rows and validation.rows
        assert len(train.rows) + len(validation.rows) == 3


def test_sample_draws_by_seed_in_order(table):
    some = splits.sample(table, 10, seed=3)
    assert len(some.rows) == 10 and some == splits.sample(table, 10, seed=3)
    assert some != splits.sample(table, 10, seed=4)
    assert [row.line for row in some.rows] == sorted(row.line for row in some.rows)
    assert some.drawn == f"10 of {len(table.rows)} rows" and not table.drawn
    assert splits.sample(table, None, seed=3) is table and splits.sample(table, 99, seed=3) is table


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 25), st.sampled_from("abcdef")), min_size=2, max_size=60
    ),
    share=st.floats(0.01, 0.9),
    seed=st.integers(0, 5),
)
def test_the_cut_of_a_classification_leaves_every_class_a_row_to_train_on(rows, share, seed):
    made = [formats.Row(n, [], f"text {text}", label) for n, (text, label) in enumerate(rows, 1)]
    table = dataset.Table("x", "classification", made, "", sorted({label for _, label in rows}))
    train, held = splits.split_rows(table, share, seed)
    cut = held.rows if held else []
    assert sorted([*train.rows, *cut], key=lambda row: row.line) == made
    assert not {row.text for row in train.rows} & {row.text for row in cut}
    assert {row.label for row in train.rows} == {row.label for row in made}
    assert len({row.text for row in cut}) <= max(1, round(len({text for text, _ in rows}) * share))
    assert splits.split_rows(table, share, seed) == (train, held)


def test_a_cut_is_stratified_and_a_class_of_one_row_stays():
    table = classified(
        *((f"t{n}", "often" if n % 10 else "seldom") for n in range(200)), ("one", "once")
    )
    train, held = splits.split_rows(table, 0.1, seed=1)
    assert Counter(row.label for row in held.rows) == {"often": 18, "seldom": 2}
    assert sum(row.label == "once" for row in train.rows) == 1
    # Every class of one row: nothing can be cut.
    alone = classified(("a", "x"), ("b", "y"), ("c", "z"))
    assert splits.split_rows(alone, 0.5, seed=1) == (alone, None)
    # Without classes the draw is what it was.
    texts = [formats.Row(n, [], f"t{n}") for n in range(10)]
    _, held = splits.split_rows(dataset.Table("x", "text", texts, ""), 0.3, seed=1)
    assert {r.line for r in held.rows} == set(random.Random(1).sample(range(10), 3))


@pytest.mark.parametrize(("most", "share", "held"), [(50, 0.1, 5), (20, 0.5, 10), (None, 0.1, 40)])
def test_validation_is_cut_from_the_rows_drawn(write, most, share, held):
    source = write("rows.jsonl", pairs(*map(str, range(400))))
    drawn = load_config(None, (), [f"dataset.train={source}", f"dataset.validation_split={share}"])
    some = drawn.dataset.model_copy(update={"max_rows": most})
    tables = splits.read_splits(some, drawn.training.seed)[0]
    assert len(tables["validation"].rows) == held
    assert len(tables["train"].rows) == (most or 400) - held
    lines = [row.line for table in tables.values() for row in table.rows]
    assert len(set(lines)) == (most or 400)
    assert {table.drawn for table in tables.values()} == {f"{most} of 400 rows" if most else ""}


def test_a_validation_of_its_own_stays_whole(write):
    train, other = write("a.jsonl", pairs(*"abcdefgh")), write("b.jsonl", pairs(*"ijklm"))
    settings = Dataset(train=str(train), validation=str(other), max_rows=3)
    tables, _ = splits.read_splits(settings, 42)
    assert [len(table.rows) for table in tables.values()] == [3, 5]


def test_overlap_is_reported_with_its_lines(write, table):
    other = dataset.read(write("test.jsonl", pairs("new", "3", "7")), Dataset())
    assert splits.overlap(table, other, "test") == (
        "test: 2 of 3 rows are in train too, so its figures flatter: lines 2, 3"
    )


@pytest.fixture(scope="module")
def bundled():
    """The tables of data/README.md's files, by name, with the rows and the sum that it tells."""
    told = re.findall(
        r"\| `([\w.]+\.jsonl)` \| ([\d,]+) \| `(\w{64})` \|", (DATA / "README.md").read_text()
    )
    assert len(told) == 6 == len(list(DATA.glob("*.jsonl")))
    return {
        name: (dataset.read(str(DATA / name), Dataset()), int(rows.replace(",", "")), digest)
        for name, rows, digest in told
    }


def test_bundled_data_is_what_its_page_says(bundled):
    for name, (table, rows, digest) in bundled.items():
        assert len(table.rows) == rows == len({row.key for row in table.rows}), name
        assert table.fingerprint == digest
        assert table.format == (
            "classification" if name.startswith("tweets") else "prompt_completion"
        )


def test_label_counts_are_those_of_the_page(bundled):
    page = (DATA / "README.md").read_text()
    lines = re.findall(
        r"\| (positive|negative|neutral) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|", page
    )
    assert len(lines) == 3
    for label, *told in lines:
        for split, count in zip(("train", "validation", "test"), told, strict=True):
            rows = bundled[f"tweets_sentiment.{split}.jsonl"][0].rows
            assert sum(row.label == label for row in rows) == int(count.replace(",", ""))


@pytest.mark.parametrize("name", ["tweets_sentiment", "devils_dictionary"])
def test_splits_of_the_bundled_data_do_not_overlap(bundled, name):
    train, validation, test = (
        bundled[f"{name}.{split}.jsonl"][0] for split in ("train", "validation", "test")
    )
    assert splits.overlap(train, validation, "v") is splits.overlap(train, test, "t") is None
    assert splits.overlap(validation, test, "t") is None
    assert splits.overlap(train, train, "t") is not None
