"""`etude runs`: every run in a row, whatever became of it, and two of them compared on the same rows."""

import json

import pytest
from typer.testing import CliRunner

from etude.cli import app
from etude.config.schema import Config
from etude.runs import comparison, listing
from etude.runs.folder import CONFIG, MANIFEST, METRICS, STARTED, begin_run, locked


def etude(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def config(**sections):
    whole = Config().model_dump(mode="json")
    return {key: value | sections.get(key, {}) for key, value in whole.items()}


def make(folder, eval_loss=0.5, **sections):
    """A finished run, as far as its records go."""
    folder.mkdir(parents=True)
    manifest = {
        "created": "2026-11-25T10:00:00+00:00",
        "base": {"identity": "sha256:1", "name": "base"},
        "config": config(**sections),
        "chat_format": {},
        "data": {"train": {"kept": 1200, "sha256": "a" * 64}},
        "results": {"steps": 300, "train_loss": 0.25, "eval_loss": eval_loss},
        "environment": {},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / "adapter_model.safetensors").write_bytes(b"0" * 2_500_000)
    return manifest


def evaluated(run, right, name="evaluation", sha256="b" * 64, losses=None):
    """An evaluation of a run on the rows of `right`: which ones it had right, or with which losses."""
    home = run / name
    home.mkdir()
    count = len(losses or right)
    data = {"sha256": sha256, "rows": count, "drawn": "", "format": "classification"}
    figures = {"kind": "responses", "perplexity": 2.0}
    if not losses:
        macro = {"f1": 0.5, "precision": 0.5, "recall": 0.5}
        ends = {"low": 0.1, "high": 0.9}
        figures = {
            "kind": "classification", "accuracy": sum(right) / count, "macro": macro, "weighted": macro,
            "per_class": {}, "unparseable": 0,
            "intervals": {"level": 0.95, "accuracy": ends, "macro_f1": ends},
        }  # fmt: skip
    lines = [
        {"line": n, "text": f"text {n}"}
        | (
            {"tuned": {"loss": losses[n]}}
            if losses
            else {"label": "yes", "tuned": {"predicted": "yes" if right[n] else None}}
        )
        for n in range(count)
    ]
    (home / "report.json").write_text(json.dumps({"data": data, "models": {"tuned": figures}}))
    (home / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_every_run_has_its_row_whatever_became_of_it(tmp_path):
    home = tmp_path / "runs"
    make(home / "done")
    evaluated(home / "done", [True, True, True, False])
    make(home / "unmeasured", eval_loss=None)
    (home / "stopped").mkdir()
    begin_run(home / "stopped", {"config": config(model={"name": "sample"})})
    (home / "stopped" / METRICS).write_text('{"step": 7, "seconds": 1, "loss": 1.0}\n')
    for name, content in (("bad", "{"), ("old", '{"base": 1}'), ("odd", None)):
        made = make(home / name)
        made["results"] = {"steps": 1, "eval_loss": 1}
        made["data"] = []
        (home / name / MANIFEST).write_text(json.dumps(made) if content is None else content)
    (home / "lost").mkdir()
    (home / "lost" / STARTED).write_text("[]")
    (home / "no run").mkdir()
    with locked(home / "stopped"):
        live = {row["run"].rpartition("/")[2]: row for row in listing.list_runs(home)}
    assert live["stopped"]["state"] == "live" and live["stopped"]["problem"] is None
    rows = {row["run"].rpartition("/")[2]: row for row in listing.list_runs(home)}
    assert rows.keys() == {"done", "unmeasured", "stopped", "bad", "old", "odd", "lost"}
    done = rows["done"]
    assert (done["rows"], done["steps"], done["loss"], done["accuracy"]) == (1200, 300, 0.5, 0.75)
    assert done["base"] == "Qwen/Qwen2-1.5B" and done["date"] == "2026-11-25"
    assert done["size"] > 2_500_000
    assert rows["unmeasured"]["loss"] == 0.25 and rows["unmeasured"]["accuracy"] is None
    stopped = rows["stopped"]
    assert (stopped["state"], stopped["steps"], stopped["base"]) == ("unfinished", 7, "sample")
    for name in ("bad", "old", "odd", "lost"):
        assert rows[name]["state"] == "corrupt" and rows[name]["problem"], rows[name]

    shown = etude("runs", home)
    assert shown.exit_code == 0
    assert "unfinished" in shown.output and "corrupt" in shown.output and "2.5 MB" in shown.output
    assert json.loads(etude("runs", home, "--json").output) == list(rows.values())
    (alone,) = listing.list_runs(home / "done")
    assert alone == done
    missing = etude("runs", tmp_path / "none")
    assert missing.exit_code == 2 and "no such folder" in missing.output
    assert etude("runs", "a", "b", "c").exit_code == 2


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ([1] * 40, [1] * 25 + [0] * 15, "Yes. On the same rows, B alone is right 0 times and A alone 15"),
        ([1] * 25 + [0] * 15, [1] * 40, "No. On the same rows, B alone is right 15 times and A alone 0"),
        ([1] * 39 + [0], [1] * 38 + [0] * 2, "Cannot tell, it may be chance. On the same rows, B alone"),
        ([1] * 4, [1] * 4, "Cannot tell, it may be chance. On the same rows, B alone is right 0 times"),
    ],
)  # fmt: skip
def test_is_a_better_than_b_by_labels(tmp_path, monkeypatch, first, second, words):
    monkeypatch.chdir(tmp_path)
    for name, right in (("A", first), ("B", second)):
        make(tmp_path / name, lora={"r": 8 if name == "A" else 16}, output={"dir": name})
        evaluated(tmp_path / name, right)
    output = " ".join(etude("runs", "A", "B").output.split())
    assert f"Is A better than B? {words}" in output
    assert "lora.r 8 16" in output and "output.dir" not in output
    assert "p = " in output or "p < " in output
    found = json.loads(etude("runs", "A", "B", "--json").output)
    assert found["settings"] == {"lora.r": [8, 16]}
    assert found["figures"]["loss"] == [0.5, 0.5]


def test_is_a_better_than_b_by_losses(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for run, losses in ((a, [0.5 + n / 100 for n in range(20)]), (b, [0.9 + n / 90 for n in range(20)])):  # fmt: skip
        make(run)
        evaluated(run, None, losses=losses)
    better = comparison.compare(a, b)["answer"]
    assert f"Yes. The reference is likelier under {b} in 0 rows and under {a} in 20" in better
    assert "No. The reference" in comparison.compare(b, a)["answer"]
    assert "Cannot tell" in comparison.compare(a, a)["answer"]


def test_without_the_same_rows_it_says_what_to_run(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    make(a)
    make(b)
    evaluated(a, [1, 0])
    evaluated(b, [1, 0], sha256="c" * 64)
    answer = comparison.compare(a, b)["answer"]
    assert "Evaluate both with the same --data FILE" in answer
    # The same file, read with other rows left out.
    evaluated(b, [1, 0], name="evaluation-2")
    predictions = b / "evaluation-2" / "predictions.jsonl"
    predictions.write_text(predictions.read_text().replace("text 1", "text 2"))
    assert "not evaluated on the same rows" in comparison.compare(a, b)["answer"]
    (b / MANIFEST).unlink()
    (b / CONFIG).write_text("")
    unfinished = etude("runs", a, b)
    assert unfinished.exit_code == 2 and "manifest.json" in unfinished.output
