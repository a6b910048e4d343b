"""Which rows are trained on, and which are held out: max_rows, the validation cut, rows in both."""

import math
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from etude.config.schema import Dataset
from etude.data import dataset, report
from etude.data.dataset import Table
from etude.data.report import lines_of
from etude.errors import UserError


def read_splits(settings: Dataset, seed: int) -> tuple[dict[str, Table], list[str]]:
    """The training and, if any, validation rows, and notices about what was found in reading them.

    The test set is read only for rows that it shares with the training.

    Raises:
        UserError: data that cannot be used.
    """
    # Drawn before the validation is cut off, so that both shrink alike.
    train = sample(dataset.read(settings.train, settings), settings.max_rows, seed)
    labelled = settings.model_copy(update={"labels": train.labels})
    tables = {"train": train}
    notices: list[str] = []
    for name, source in (("validation", settings.validation), ("test", settings.test)):
        if source is None:
            continue
        tables[name] = table = dataset.read(source, labelled)
        if table.format != train.format:
            raise UserError(
                f"dataset.{name}: {source} has format {table.format}, and {train.source} "
                f"{train.format}; all splits must have one"
            )
        if shared := overlap(train, table, name):
            notices.append(shared)
    for name, table in tables.items():
        # The dropped rows of the other splits are in their reports.
        notices += [f"{name}: {notice}" for notice in table.notices]
        notices += table.drops(name) if name == "test" else []
        if table.unused and name != "test":
            unused = [f"{column or '(no name)'} ({n:,})" for column, n in table.unused.items()]
            notices.append(f"{name}: unused columns: {', '.join(unused)}")
    if "validation" not in tables:
        tables["train"], cut = split_rows(train, settings.validation_split, seed)
        if cut:
            tables["validation"] = cut
        elif settings.validation_split:
            notices.append("no validation: there are too few different rows to cut one from train")
    return {name: tables[name] for name in ("train", "validation") if name in tables}, notices


def sample(table: Table, max_rows: int | None, seed: int) -> Table:
    """At most `max_rows` rows, drawn by `seed`, in their order."""
    if max_rows is None or max_rows >= len(table.rows):
        return table
    kept = sorted(random.Random(seed).sample(range(len(table.rows)), max_rows))
    drawn = f"{max_rows:,} of {len(table.rows):,} rows"
    return replace(table, rows=[table.rows[at] for at in kept], drawn=drawn)


def overlap(train: Table, other: Table, name: str) -> str | None:
    """A sentence about rows of `other` that are in `train` too, or contradict it, or None."""
    lines, contradictions = report.repeats(other.rows, train.rows)
    rows = len(other.rows)
    shared = (
        f"{name}: {len(lines)} of {rows} rows are in train too, so its figures flatter: "
        f"{lines_of(lines)}"
    )
    found = report.contradicting(name, rows, contradictions, " train's")
    return "; ".join([shared] * bool(lines) + found) or None


def split_rows(table: Table, share: float, seed: int) -> tuple[Table, Table | None]:
    """Cut a share of the rows off for validation, drawn by `seed`; the same rows stay together.

    Every class of a classification gives its share, and keeps a row to train on.
    """
    classes: dict[str, set[str]] = {}
    for row in table.rows:
        classes.setdefault(row.key, set()).add(str(row.label))
    # Few rows still get a validation of one, as long as one is left to train on.
    count = min(max(1, round(len(classes) * share)), len(classes) - 1) if share else 0
    draw = random.Random(seed)
    held = (
        _stratified(classes, count, draw) if table.labels else set(draw.sample([*classes], count))
    )
    if not held:
        return table, None

    def part(chosen: bool) -> Table:
        rows = [row for row in table.rows if (row.key in held) == chosen]
        # What was dropped in reading counts once: with the rows to train on.
        return replace(table, rows=rows, dropped={} if chosen else table.dropped)

    return part(False), part(True)


def _stratified(classes: Mapping[str, set[str]], count: int, draw: random.Random) -> set[str]:
    """At most `count` keys of `classes`, each class's share of them, and never the last of a class."""
    total = Counter(label for labels in classes.values() for label in labels)
    left, share = total.copy(), count / len(classes)
    order = draw.sample([*classes], len(classes))
    held: set[str] = set()
    # First the whole part of every class's share, then what rounding left over.
    for rounded in (math.floor, math.ceil):
        for key in order:
            if (
                key not in held
                and len(held) < count
                and all(
                    left[label] > max(1, total[label] - rounded(total[label] * share))
                    for label in classes[key]
                )
            ):
                held.add(key)
                left.subtract(classes[key])
    return held
