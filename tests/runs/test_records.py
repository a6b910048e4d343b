"""What a run keeps of itself: its log, its figures, its card; and what reads them when they are damaged."""

import ast
import copy
import json
import os
import re
import stat
import types

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from etude import console, train_with_config
from etude.cli import app
from etude.config.loading import check_config, load_config, to_yaml
from etude.config.schema import Config, Lora
from etude.conversation import history
from etude.conversation.renderer import Renderer
from etude.data import dataset, splits
from etude.errors import Stopped, UserError
from etude.models import gguf, loading, lora
from etude.runs import opening, plots, proof
from etude.runs.card import model_card
from etude.runs.folder import STARTED
from etude.runs.manifest import make_manifest, read_metrics
from etude.training import checkpoints, guards, resuming, trainer

FEW = settings(max_examples=60, suppress_health_check=list(HealthCheck))
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d ")


def etude(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(model, folder, *more):
    return etude(
        "train", "--preset", "cpu", f"model.name={model}", f"dataset.train={folder}/rows.jsonl",
        "dataset.validation=null", "dataset.test=null", "dataset.validation_split=0.2",
        "training.num_epochs=1", "lora.r=4", "training.compile=false", "training.logging_steps=1",
        "training.batch_size=2", "training.gradient_accumulation_steps=1", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(20)]
    lines[3]["prompt"] = "bell \x07 and \x1b[31mred\x1b[0m [bold]Question[/bold]"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


@pytest.fixture
def unproven(monkeypatch):
    """Trainings here leave the proof's new process out, which test_proof.py looks at."""
    monkeypatch.setattr(proof, "in_a_new_process", lambda folder: "left out")


# --- train.log ---------------------------------------------------------------------------------


def test_a_log_holds_what_was_printed_and_goes_on_after_a_stop(
    tiny_model, rows, tmp_path, monkeypatch, unproven
):
    run = tmp_path / "run"
    original = trainer.StepTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise Stopped("stopped immediately; nothing", 130)
        loss = original(self, *args, **kwargs)
        if self.state.global_step == 1:
            guards.log.warning("step 2: the loss \x1b[31mjumped")
            self._save_checkpoint(self.model, None)
        return loss

    monkeypatch.setattr(trainer.StepTrainer, "training_step", step)
    first = train(tiny_model, rows, f"output.dir={run}", "training.save_steps=1")
    assert first.exit_code == 130
    log = (run / "train.log").read_text()
    lines = [STAMP.sub("", line) for line in log.splitlines()]
    assert all(STAMP.match(line) for line in log.splitlines())
    assert log.rstrip().endswith("stopped immediately; nothing")
    # All that was on the screen, data report and plan included, without what drives a terminal.
    printed = console.printable(first.output).split()
    assert {word for word in printed if word.strip("─")} <= set(log.split())
    for part in ("data      train:", "example ", "plan ", "engine ", "step 1/8", "adapter "):
        assert any(line.startswith(part) for line in lines), part
    assert "step 2: the loss [31mjumped" in lines
    assert not console.CONTROL.search(log.replace("\n", ""))

    monkeypatch.setattr(trainer.StepTrainer, "training_step", original)
    settings = load_config(run / "config.yml")
    again = etude("train", run / "config.yml", f"output.dir={settings.output.dir}")
    assert again.exit_code == 0, again.output
    whole = (run / "train.log").read_text()
    assert whole.startswith(log)
    assert " resume    from " in whole[len(log) :]
    assert re.search(r"done +8 steps", whole) and "proof     left out" in whole
    assert len(re.findall("step 8/8", whole)) == 1
    results = json.loads((run / "manifest.json").read_text())["results"]
    assert results["seconds"] > 0 and results["examples_per_second"] > 0


@pytest.mark.parametrize("fault", ["lora.target_modules=[nothing]", "dataset.test=gone.jsonl"])
def test_what_is_refused_before_it_starts_leaves_no_log(tiny_model, rows, tmp_path, fault):
    result = train(tiny_model, rows, f"output.dir={tmp_path}/run", fault)
    assert result.exit_code == 2
    assert not list(tmp_path.rglob("train.log"))
    # Nor does what was said there get into the log of another program.
    console.say("later", "text")
    assert console.log.file is None


def test_an_error_that_nobody_expected_is_in_the_log(
    tiny_model, rows, tmp_path, monkeypatch, unproven
):
    def broken(*_):
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(trainer, "fit", broken)
    result = train(tiny_model, rows, f"output.dir={tmp_path}/run")
    assert isinstance(result.exception, ZeroDivisionError)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "Traceback" in log and "ZeroDivisionError: a mistake of ours" in log


def test_a_log_is_never_written_through_a_link(tmp_path):
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / "train.log").symlink_to(tmp_path / "theirs")
    try:
        console.log.start()
        console.log.file = tmp_path / "train.log"
        console.say("some", "text")
    finally:
        console.log.file = console.log.lines = None
    assert (tmp_path / "theirs").read_text() == "precious"


# --- files that are damaged --------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([10**400, -1, 0])
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(st.characters(exclude_categories=()), max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)  # fmt: skip


def places(value, path=()):
    """The paths of all values in nested JSON."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def changed(value, path, new):
    """`value` with what is at `path` replaced, or removed where `new` is ...."""
    if not path:
        return None if new is ... else new
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if new is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return value


def damage(value, limit=3):
    """JSON values near `value`: most shallow places of it replaced or removed."""
    shallow = [path for path in places(value) if len(path) <= limit]
    return st.builds(
        lambda path, new: changed(value, path, new),
        st.sampled_from(shallow),
        VALUES | st.just(...),
    )


def for_any_damage(value, read):
    """Calls `read` with the JSON of values near `value`."""

    @FEW
    @given(damage(value))
    def anything(damaged):
        read(json.dumps(damaged))

    anything()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, sample_tokenizer, rows):
    """A run folder without weights: what is in it, and a base that fits."""
    folder = tmp_path_factory.mktemp("finished")
    config = load_config(None, overrides=[
        f"dataset.train={rows}/rows.jsonl", "dataset.validation_split=0", "model.name=./x",
        "dataset.test=null",
    ])  # fmt: skip
    (folder / "config.yml").write_text(to_yaml(config))
    described = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / lora.ADAPTER_CONFIG).write_text(json.dumps(described))
    place = types.SimpleNamespace(why="cpu")
    model = types.SimpleNamespace(config=None)
    base = loading.Base(model, sample_tokenizer, "./x", "sha256:0", place)
    renderer = Renderer(sample_tokenizer)
    tables = splits.read_splits(config.dataset, config.training.seed)[0]
    encoded = dataset.encode_splits(tables, renderer, config.dataset)
    results = {"steps": 1, "eval_loss": 1.0, "seconds": 1.0}
    manifest = make_manifest(config, base, renderer.state(), encoded, results)
    loss = {"split": "train", "data": tables["train"].fingerprint, "rows": 2, "value": 1.0}
    expected = {"sha256": "0" * 64, "dtype": "float32", "quantization": None}
    return folder, base, renderer, json.loads(json.dumps(manifest)), {**expected, "loss": loss}


@pytest.fixture
def readers(finished, monkeypatch):
    """Programs of this folder, up to where they would load or train."""
    _, base, renderer, _, _ = finished
    monkeypatch.setattr(opening, "_load", lambda config: base)
    monkeypatch.setattr(opening, "renderer_for", lambda *_: renderer)
    monkeypatch.setattr(proof, "mean_loss", lambda *_: 1.0)

    def examine(name, target, expected, examples):
        model = types.SimpleNamespace(dtype=torch.float32)
        return proof.compare_losses(name, model, target, expected, examples)

    def run_training(settings, reporter, force, repeated):
        resuming.check_data(
            repeated, splits.read_splits(settings.dataset, settings.training.seed)[0]
        )
        lora.check_base("the run", repeated["base"]["identity"], base.identity)
        raise UserError("as far as this")

    monkeypatch.setattr(proof, "examine", examine)
    monkeypatch.setattr(train_with_config, "run_training", run_training)


def sentence(result):
    """The output of a program that ended well or with one sentence."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (0, 2)
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_damaged_manifests_end_in_one_sentence(finished, readers):
    folder, _, _, manifest, _ = finished

    def read(content):
        (folder / "manifest.json").write_text(content)
        try:
            opening.open_target(str(folder), [])  # evaluate and chat
            opened = "opened"
        except UserError as error:
            opened = str(error)
        return opened, sentence(etude("reproduce", folder))

    # The control: a whole one.
    opened, repeated = read(json.dumps(manifest))
    assert opened == "opened" and "as far as this" in repeated
    for path, new, words in (
        (("config", "lora", "r"), "many", "lora.r"),
        (("config",), ..., "no config in it"),
        (("base",), ..., "no base in it"),
        ((), ..., "not a JSON object"),
    ):
        _, repeated = read(json.dumps(changed(manifest, path, new)))
        assert words in repeated and "Traceback" not in repeated
    assert "cannot be read" in read("{")[0]


def test_damaged_proofs_end_in_one_sentence(finished, readers):
    folder, _, _, manifest, expected = finished
    (folder / "manifest.json").write_text(json.dumps(manifest))

    def read(content):
        (folder / "proof.json").write_text(content)
        return sentence(etude("verify", folder))

    assert "train loss 1.0000 (1.0000 in training)" in read(json.dumps(expected))
    assert "no sha256 in it" in read(json.dumps(changed(expected, ("sha256",), ...)))
    assert "not a JSON object" in read("[]")
    assert "cannot be read" in read("{")


def test_damaged_chats_end_in_one_sentence(tmp_path, sample_tokenizer):
    file = tmp_path / "talk.json"
    talk = {
        "system": "Be brief.",
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "Bye"},
        ],
    }
    renderer = Renderer(sample_tokenizer)

    def read(value):
        file.write_text(json.dumps(value))
        loaded = history.load(file)
        renderer.prompt(loaded.sent())
        return loaded

    assert read(talk).sent()[1:] == talk["messages"]
    with pytest.raises(UserError, match="surrogates not allowed"):
        read({**talk, "system": "\ud800"})

    @FEW
    @given(damage(talk, 4))
    def anything(value):
        try:
            read(value)
        except UserError as error:
            assert str(error)

    anything()


def test_lines_of_metrics_that_were_cut_short_are_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    good = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.5}]
    lines = [json.dumps(good[0]), '{"step": 3, "loss": 1', json.dumps(good[1])]
    file.write_bytes("\n".join(lines).encode() + b'\n{"step": \xff\n')
    assert read_metrics(file) == good
    plots.loss_plot(file, tmp_path / "loss.png")
    assert read_metrics(tmp_path / "none") == []


def test_progress_of_another_step_ends_in_one_sentence(tmp_path):
    def read(value):
        with checkpoints.writing(tmp_path / "checkpoint-3") as work:
            checkpoints.save_state(work, value, {"moment": torch.zeros(1)})
        assert checkpoints.why_not(tmp_path / "checkpoint-3") is None
        return checkpoints.read_progress(tmp_path / "checkpoint-3")

    assert read({"step": 3}) == {"step": 3}
    for value in ({"step": 4}, {}, []):
        with pytest.raises(
            UserError, match=r"checkpoint-3: not what this version of Etude.*Remove this checkpoint"
        ):
            read(value)


def test_started_of_another_shape_ends_in_one_sentence(tmp_path, finished):
    _, base, _, _, _ = finished
    tables = {"train": dataset.Table("file", "text", [], "0")}
    config = Config()
    checkpoint = tmp_path / "checkpoint-1"
    resuming.start_folder(tmp_path, None, config, tables, base, False)
    resuming.start_folder(tmp_path, checkpoint, config, tables, base, False)  # the control
    whole = json.loads((tmp_path / STARTED).read_text())

    def read(value):
        (tmp_path / STARTED).write_text(json.dumps(value))
        resuming.start_folder(tmp_path, checkpoint, config, tables, base, False)

    for value in ([], {"program": "etude"}, {**whole, "base": None}):
        with pytest.raises(UserError):
            read(value)


# --- files that others read --------------------------------------------------------------------


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_adapter_and_checkpoints_have_the_usual_mode(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    for mask in (0o022, 0o077, 0o002):
        before = os.umask(mask)
        try:
            base = AutoModelForCausalLM.from_pretrained(tiny_model)
            folder = tmp_path / f"{mask:o}"
            model = lora.attach(base, Lora(), "tiny")
            lora.save(model, folder)
            with checkpoints.writing(folder / "checkpoint-1") as work:
                lora.save(model, work)
                checkpoints.save_state(work, {}, {"moment": torch.zeros(1)})
        finally:
            os.umask(before)
        found = [path for path in folder.rglob("*") if path.is_file()]
        assert {lora.WEIGHTS, lora.ADAPTER_CONFIG, checkpoints.TENSORS} <= {p.name for p in found}
        assert {mode(path) for path in found} == {0o666 & ~mask}
        assert mode(folder / "checkpoint-1") == 0o777 & ~mask


@pytest.mark.parametrize(("alpha", "written"), [(128.0, "128"), (16, "16"), (0.5, "0.5")])
def test_a_whole_alpha_is_written_as_an_integer(tiny_model, tmp_path, alpha, written):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    settings = check_config({"lora": {"r": 4, "alpha": alpha}}, {}).lora
    model = lora.attach(base, settings, "tiny")
    lora.save(model, tmp_path)
    assert f'"lora_alpha": {written},' in (tmp_path / lora.ADAPTER_CONFIG).read_text()
    assert lora.describe(tmp_path).lora_alpha == alpha
    scaling = [m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")]
    assert scaling and set(scaling) == {alpha / 4}
    # And as written before: other versions of Etude and PEFT write 128.0.
    described = json.loads((tmp_path / lora.ADAPTER_CONFIG).read_text())
    (tmp_path / lora.ADAPTER_CONFIG).write_text(
        json.dumps({**described, "lora_alpha": alpha * 1.0})
    )
    assert lora.describe(tmp_path).lora_alpha == alpha


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12) | (
    st.sampled_from(["a: b", "C:\\models\\x", "@name", "a #b", "a|b", "`x`", "no", "1e3", "'", '"',
                     "x\ny", "---", "- a", "{a}", "Qwen/Qwen2-1.5B", " x ", "~/m.gguf", "```"])
)  # fmt: skip


def card(name, folder, source):
    config = Config()
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"name": name}),
            "output": config.output.model_copy(update={"dir": folder}),
            "dataset": config.dataset.model_copy(update={"train": source}),
        }
    )
    manifest = {
        "results": {"steps": 3, "eval_loss": 1.5},
        "data": {"train": {"kept": 4, "format": "text"}},
        "base": {"identity": "sha256:0"},
        "environment": {"etude": "0"},
    }
    return model_card(config, manifest, "1 of 2 parameters train")


@given(NAMES, NAMES, NAMES)
def test_a_card_can_be_read_whatever_the_names(name, folder, source):
    text = card(name, folder, source)
    _, head, body = re.split("^---\n", text, maxsplit=2, flags=re.MULTILINE)
    front = yaml.safe_load(head)
    assert front == {"base_model": name, "library_name": "peft", "tags": ["lora", "etude"]}
    # The table keeps its rows and columns, the code is Python that names what was named.
    rows = re.findall(r"^\|.*\|$", body, re.M)
    assert len(rows) == 7
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
    code = body.split("```python\n", 1)[1].split("\n```\n", 1)[0]
    named = [n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)]
    assert name in named and folder in named


def test_a_plain_card_is_as_plain_as_before():
    text = card("Qwen/Qwen2-1.5B", "runs/a", "data/x.jsonl")
    assert text.startswith("---\nbase_model: Qwen/Qwen2-1.5B\nlibrary_name: peft\n")
    assert "`etude chat runs/a` chats with it" in text
    assert "| data | `data/x.jsonl`, 4 rows, format text |" in text
    (line,) = [line for line in card(gguf.SAMPLE, "a", "b").split("\n") if "etude.models" in line]
    namespace = {}
    exec(line, namespace)
    assert namespace["locate"] is loading.locate
