"""Nothing that Etude did not write is ever replaced, one process writes a run, no link is followed."""

import contextlib
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from etude import chat, files, train_with_config
from etude.cli import app
from etude.config.loading import load_config, to_yaml
from etude.config.schema import Config
from etude.conversation import history
from etude.data import dataset
from etude.errors import UserError
from etude.models import device, gguf, loading, lora
from etude.runs import card, evaluations, manifest, opening, plots, proof, report
from etude.runs.folder import (
    CARD,
    CHECKPOINTS,
    CONFIG,
    LOCK,
    LOG,
    MANIFEST,
    METRICS,
    PICTURE,
    PROOF,
    STARTED,
    is_finished,
    locked,
    log,
    write_file,
)
from etude.training import checkpoints, planning, resuming
from etude.training.reporter import Reporter

QUICK = settings(max_examples=30, suppress_health_check=list(HealthCheck))
# What a training writes once and for all, and what it goes on with.
PRODUCTS = (CONFIG, lora.WEIGHTS, lora.ADAPTER_CONFIG, PROOF, CARD, PICTURE, MANIFEST)
OURS = {*PRODUCTS, STARTED, METRICS, LOG, CHECKPOINTS}
NAMES = [
    *PRODUCTS,
    CHECKPOINTS,
    "evaluation",
    "report.md",
    "report.json",
    "notes.txt",
    ".git",
]
LEFTOVER = files.UNFINISHED + "0123456789abcdef"
RESULT = {"models": {}}


@pytest.fixture(autouse=True, scope="module")
def plain_report():
    """Here a report's text does not matter, only where it is written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "evaluation_markdown", lambda *_: "text")
        patch.setattr(plots, "confusion_plot", lambda _, title, file: file.write_bytes(b"PNG"))
        yield


def etude(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def state(folder):
    """Every entry below `folder` but locks, with its content or where it leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path] = os.readlink(path)
        elif path.name != LOCK:
            found[path] = path.read_bytes() if path.is_file() else None
    return found


def intact(before, after):
    return {path: after.get(path, "gone") for path in before} == before


def write(folder, content):
    """Put files, folders and links of a person into `folder`."""
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    for name, (kind, text) in content.items():
        path = folder / name
        if os.path.lexists(path) and not path.is_symlink() and path.is_dir():
            continue
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "file":
            path.write_text(text)
        elif kind == "folder":
            path.mkdir()
            (path / "inside").write_text(text)
        else:
            (outside / "target").write_text("theirs")
            path.symlink_to(outside / ("target" if kind == "link" else "nothing"))


THINGS = st.dictionaries(
    st.sampled_from(NAMES) | st.text("abc.-_", min_size=1, max_size=4).filter(lambda x: x.strip(".")),
    st.tuples(
        st.sampled_from(["file", "file", "folder", "link", "dangling"]),
        st.sampled_from(["", "mine\n", "{}", '{"program": "etude"}', '{"a": 1}\n', "model:\n  name: x\n"]),
    ),
    max_size=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def program():
    """`etude train` with its own folders, locks and writes, but no model: fast enough to try often."""
    table = dataset.Table("file", "text", [], "0")
    base = loading.Base(None, None, "m", "sha256:1", device.Device("cpu", "float32", "cpu"))
    seen = SimpleNamespace(during=lambda folder: None, checkpoints=1)

    def fit(model, config, plan, folder, checkpoint, reporter):
        files.append(folder / METRICS, '{"step": 1, "seconds": 0.1, "loss": 1.0}\n')
        if seen.checkpoints:
            target = folder / CHECKPOINTS / "checkpoint-1"
            with checkpoints.writing(target) as work:
                (work / checkpoints.PROGRESS).write_text("{}")
            checkpoints.retain(target.parent, 1, 1, None)
        seen.during(folder)
        return {"eval_loss": 1.0, "steps": 1, "seconds": 1.0}

    def save(model, folder):
        for name in (lora.WEIGHTS, lora.ADAPTER_CONFIG, "README.md"):
            (folder / name).write_text("trained")

    def expect(folder, *_):
        write_file(folder, PROOF, "{}")
        return "digest"

    with pytest.MonkeyPatch.context() as patch:
        twc = train_with_config
        renderer = SimpleNamespace(state=dict, date=None)
        plan = planning.Planned(base.device, None, renderer, {}, 1, None, False)
        patch.setattr(twc, "read_tables", lambda *_: {"train": table})
        patch.setattr(planning, "plan_training", lambda *_: plan)
        for module in (resuming, manifest):
            patch.setattr(module, "current_environment", lambda: {"etude": "1"})
        patch.setattr(twc, "load_model", lambda *_: (base, None))
        patch.setattr(lora, "count", lambda _: "few")
        patch.setattr(twc, "fit", fit)
        patch.setattr(lora, "save", save)
        patch.setattr(proof, "expect", expect)
        patch.setattr(proof, "in_a_new_process", lambda _: "left out")
        patch.setattr(card, "model_card", lambda *_: "card")
        patch.setattr(plots, "loss_plot", lambda _, picture: picture.write_bytes(b"PNG"))
        patch.setattr(checkpoints, "read_progress", lambda _: {"processes": 1})
        patch.setattr(device, "used_memory", lambda *_, **__: 0)
        patch.setattr(device, "free_memory", lambda: None)
        # Neither it nor torch is needed here; and no power fails.
        patch.setitem(sys.modules, "transformers", SimpleNamespace(set_seed=lambda _: None))
        patch.setattr(os, "fsync", lambda _: None)
        yield seen


@pytest.fixture
def training(program):
    """The same for one test, which may say what happens during the training."""
    yield program
    program.during, program.checkpoints = lambda folder: None, 1


def settings_of(folder):
    return load_config(None, overrides=[f"output.dir={folder}"])


def train(folder, **options):
    train_with_config.run_training(settings_of(folder), Reporter(), **options)


def evaluate(folder, out=None):
    with evaluations.report_folder(str(folder), out) as home:
        report.write_evaluation(RESULT, {}, [], home)
    return home


# --- nothing but what this run wrote ----------------------------------------------------------


@QUICK
@given(content=THINGS)
def test_a_training_changes_nothing_that_it_did_not_write(program, tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("x") / "run"
    folder.mkdir()
    write(folder, content)
    before = state(folder.parent)
    if content:
        with pytest.raises(UserError) as refused:
            train(folder)
        assert "remove" not in str(refused.value).lower()
        assert state(folder.parent) == before
    else:
        train(folder)
        assert is_finished(folder) and {path.name for path in folder.iterdir()} >= OURS - {LOG}
    assert not (folder / LOCK).exists()


@QUICK
@given(content=THINGS, moment=st.sampled_from(["before", "during", "between"]))
def test_what_a_person_puts_into_a_run_stays(program, tmp_path_factory, content, moment):
    folder = tmp_path_factory.mktemp("x") / "run"

    def put(folder):
        # Theirs is what has another content than the run's own.
        write(folder, content)
        for path, value in state(folder.parent).items():
            first, *rest = path.relative_to(folder.parent).parts
            if first == "outside" or set(rest[:1]) & content.keys():
                theirs[path] = value

    theirs = {}
    if moment == "before":
        folder.mkdir()
        put(folder)
    program.during = put if moment == "during" else lambda folder: None
    with contextlib.suppress(UserError, OSError):
        train(folder)
    program.during = lambda folder: None
    if moment == "between":
        if is_finished(folder):
            (folder / MANIFEST).unlink()
        put(folder)
    for _ in range(2):
        with contextlib.suppress(UserError, OSError):
            train(folder)
        with contextlib.suppress(UserError, OSError):
            evaluate(folder)
    after = state(folder.parent)
    # What has the name of a file of the run is kept under another.
    found = list(after.values())
    assert all(after.get(path, "gone") == value or value in found for path, value in theirs.items())


@pytest.mark.parametrize("name", PRODUCTS[1:-1])  # config.yml is checked below
@pytest.mark.parametrize("moment", ["during", "between"])
def test_a_file_put_into_a_run_is_kept_under_another_name(
    training, tmp_path, caplog, monkeypatch, name, moment
):
    monkeypatch.setattr(log.parent, "propagate", True)
    folder = tmp_path / "run"

    def put(folder):
        (folder / name).write_text("# Mine")
        if moment == "between":
            raise ZeroDivisionError

    training.during = put
    with contextlib.suppress(ZeroDivisionError):
        train(folder)
    training.during = lambda folder: None
    if moment == "between":
        train(folder, force=True)
    assert is_finished(folder) and (folder / name).read_text() != "# Mine"
    assert (folder / f"{name}-2").read_text() == "# Mine"
    assert f"{name} was there already; it is kept as {name}-2" in caplog.text


def test_what_is_nobodys_business_is_no_obstacle(training, tmp_path):
    # The control: other files, an edited configuration that says the same, a torn line of the log.
    folder = tmp_path / "run"
    training.during = lambda folder: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(folder)
    (folder / "notes.txt").write_text("mine")
    edited = "# why r is 64\n" + (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(edited)
    with (folder / METRICS).open("a") as stream:
        stream.write('{"step": 2, "lo')
    training.during = lambda folder: None
    train(folder)
    assert (folder / f"{CONFIG}-2").read_text() == edited
    assert (folder / "notes.txt").read_text() == "mine"
    assert is_finished(folder)


def test_a_setting_edited_in_an_unfinished_runs_own_file_is_noticed(training, tmp_path):
    folder = tmp_path / "run"
    training.during = lambda folder: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(folder)
    file = folder / CONFIG
    file.write_text(file.read_text().replace("learning_rate: 2e-4", "learning_rate: 1e-3"))
    edited = load_config(file)
    with pytest.raises(UserError, match=r"training.learning_rate 0.0002 \(now 0.001\)"):
        train_with_config.run_training(edited, Reporter())
    with pytest.raises(ZeroDivisionError):  # with the settings it began with it goes on
        file.write_text(file.read_text().replace("learning_rate: 1e-3", "learning_rate: 2e-4"))
        train_with_config.run_training(load_config(file), Reporter())


def test_an_adapter_copied_with_its_configuration_is_no_run(training, tmp_path):
    train(tmp_path / "run")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in (CONFIG, lora.WEIGHTS, lora.ADAPTER_CONFIG):
        (copy / name).write_bytes((tmp_path / "run" / name).read_bytes())
    before = state(copy)
    with pytest.raises(UserError, match=r"is not a run: it holds adapter_config\.json"):
        train(copy)
    # With all but the manifest and the checkpoints it is a run, and its adapter stays.
    (copy / STARTED).write_bytes((tmp_path / "run" / STARTED).read_bytes())
    with pytest.raises(UserError, match="holds no checkpoint that is whole"):
        train(copy)
    (copy / STARTED).unlink()
    assert state(copy) == before


def test_a_finished_run_without_started_json_stays_what_it_is(training, tmp_path):
    train(tmp_path / "run")
    finished = tmp_path / "finished"
    (tmp_path / "run").rename(finished)
    (finished / STARTED).unlink()
    with pytest.raises(UserError, match="holds a finished run"):
        train(finished)


@pytest.mark.parametrize("number", range(20))
def test_a_kill_at_any_write_leaves_what_can_be_begun_again(
    training, tmp_path, monkeypatch, number
):
    folder, done = tmp_path / "run", []
    original = files.flush

    def killed(path):
        done.append(path)
        if len(done) > number:
            raise KeyboardInterrupt
        original(path)

    monkeypatch.setattr(files, "flush", killed)
    with pytest.raises(KeyboardInterrupt):
        train(folder)
    if number == 2:  # started.json, its name, then the next file
        assert [path.name for path in folder.iterdir()] == [STARTED]
    folder.mkdir(exist_ok=True)  # gone again where nothing was in it
    (folder / LEFTOVER).write_text("half a file")
    monkeypatch.undo()
    train(folder)
    assert is_finished(folder)
    assert not files.leftovers(folder)


def test_train_in_a_persons_folder_by_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configuration_text = to_yaml(Config())
    (tmp_path / CONFIG).write_text(configuration_text)
    for name in ("README.md", "metrics.jsonl", "proof.json", "loss.png"):
        (tmp_path / name).write_text("mine")
    before = state(tmp_path)
    for arguments in (["output.dir=."], [f"{tmp_path}/config.yml", f"output.dir={tmp_path}"]):
        result = etude("train", *arguments)
        assert result.exit_code == 2
        assert "not a run: it holds README.md, config.yml, loss.png" in result.output
        assert "Choose another folder, such as " in result.output
    assert state(tmp_path) == before


# --- reports ------------------------------------------------------------------------------------


def test_a_report_takes_the_next_folder_that_nothing_has(tmp_path):
    (tmp_path / lora.ADAPTER_CONFIG).write_text("{}")
    assert evaluate(tmp_path).name == "evaluation"
    (tmp_path / "evaluation-2").mkdir()
    (tmp_path / "evaluation-2" / "report.md").write_text("mine")
    (tmp_path / "evaluation-3").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "evaluation-4").write_text("a file")
    before = state(tmp_path)
    assert evaluate(tmp_path).name == "evaluation-5"
    assert intact(before, state(tmp_path))
    out = tmp_path / "out"
    out.mkdir()
    assert evaluate(tmp_path, out) == out
    with pytest.raises(UserError, match=rf"holds a report already.*--out {out}-2"):
        evaluate(tmp_path, out)


@pytest.mark.parametrize("name", ["report.md", "predictions.jsonl", "confusion-tuned.png", "a.txt"])
def test_out_with_something_in_it_is_refused(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"--out: .* holds {name} already"):
        evaluate("some-model", tmp_path)
    assert state(tmp_path) == {tmp_path / name: b"mine"}


def test_two_evaluations_at_once_take_two_folders(tmp_path):
    (tmp_path / lora.ADAPTER_CONFIG).write_text("{}")
    first, second = (evaluations.report_folder(str(tmp_path), None) for _ in range(2))
    with first as one, second as two:
        assert (one.name, two.name) == ("evaluation", "evaluation-2")
        report.write_evaluation(RESULT, {}, [], two)
    # The one without a report is gone.
    assert not one.exists() and (two / "report.json").exists()


def test_a_report_is_whole_or_not_at_all_and_ends_with_its_figures(tmp_path, monkeypatch):
    placed, original = [], files.put

    def put(work, file, new=False):
        assert new
        placed.append(file.name)
        original(work, file, new)

    measured = {"tuned": {"kind": "classification", "accuracy": 1.0}}
    monkeypatch.setattr(files, "put", put)
    report.write_evaluation(RESULT, measured, [], tmp_path)
    assert placed == ["confusion-tuned.png", "predictions.jsonl", "report.md", "report.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(placed)
    # Where it fails, nothing half is left.
    monkeypatch.setattr(plots, "confusion_plot", lambda *_: 1 / 0)
    (tmp_path / "b").mkdir()
    with pytest.raises(ZeroDivisionError):
        report.write_evaluation(RESULT, measured, [], tmp_path / "b")
    assert not list((tmp_path / "b").iterdir())


# --- one writer ---------------------------------------------------------------------------------


def test_a_second_training_is_refused_in_one_sentence(training, tmp_path):
    folder = tmp_path / "run"
    said = []

    def second(_):
        before = state(folder)
        for options in ({}, {"resume": True}, {"resume": False}, {"force": True}):
            with pytest.raises(UserError) as busy:
                train(folder, **options)
            said.append(str(busy.value))
        with pytest.raises(UserError, match="Wait until its training has ended"):
            opening.open_config(str(folder), [])
        assert state(folder) == before

    training.during = second
    train(folder)
    assert is_finished(folder) and not (folder / LOCK).exists()
    assert len(said) == 4 and f"output.dir={folder}-2" not in said[0]
    assert "is being written by another process" in said[0]
    assert "--resume" not in "".join(said)


COMMANDS = {
    "train": train,
    "resume": lambda folder: train(folder, resume=True),
    "evaluate": evaluate,
    "evaluate --out": lambda folder: evaluate("model", folder),
    "save": lambda folder: history.save(history.Conversation(), folder),
    "init": lambda folder: files.write_text(folder / CONFIG, "model:\n", new=True),
}


@QUICK
@given(
    st.sampled_from(sorted(COMMANDS)), st.lists(st.sampled_from(sorted(COMMANDS)), max_size=3),
    st.booleans(),
)  # fmt: skip
def test_any_commands_on_one_folder(program, tmp_path_factory, first, others, at_once):
    folder = tmp_path_factory.mktemp("x") / "run"

    def try_others(*_):
        for name in others:
            before = state(folder)
            with contextlib.suppress(UserError, OSError):
                COMMANDS[name](folder)
            after = state(folder)
            changed = {path.relative_to(folder).parts[0] for path in before if path not in after
                       or before[path] != after[path]}  # fmt: skip
            # Only a training goes on with its own files, and only where it has the folder to itself.
            may = OURS if name in ("train", "resume") and not at_once else set()
            assert changed <= may, (name, changed)

    if at_once and first in ("train", "resume"):
        program.during = try_others
    with contextlib.suppress(UserError, OSError):
        COMMANDS[first](folder)
    program.during = lambda folder: None
    if not at_once:
        try_others()
    assert not folder.is_dir() or not files.leftovers(folder)


HOLDER = """
import sys
from pathlib import Path
from etude.runs.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_killed_holder_blocks_nothing_and_a_live_one_everything(training, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="is being written by another process"):
            train(folder)
        result = etude("evaluate", folder)
        assert result.exit_code == 2 and "Wait until its training has ended" in result.output
        assert "--resume" not in result.output
        with pytest.raises(UserError, match="Wait until its training has ended"):
            chat_opens(folder)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert (folder / LOCK).exists()
    train(folder)
    assert is_finished(folder) and not (folder / LOCK).exists()


def chat_opens(folder):
    """What `etude chat FOLDER` does first, without its handling of mistakes."""
    chat.chat.__wrapped__([str(folder)], prompt="Hello")


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for folder in (Path("/proc/nothing/run"), tmp_path / "loop" / "run"):
        with pytest.raises((OSError, UserError)), locked(folder):
            pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    import filelock

    def none(*_, **__):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(filelock.FileLock, "acquire", none)
    monkeypatch.setattr(log.parent, "propagate", True)
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "a").write_text("")
    assert "cannot be locked (Function not implemented)" in caplog.text


# --- links --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *sorted(OURS - {MANIFEST}),
        LOCK,
        f"{CHECKPOINTS}/checkpoint-1",
    ],
)
@pytest.mark.parametrize("dangling", [False, True])
def test_a_received_run_writes_through_no_link(training, tmp_path, name, dangling):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    training.during = lambda folder: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(folder)
    outside.mkdir()
    target = outside / "theirs"
    path = folder / name
    if path.is_dir():
        path.rename(tmp_path / "moved")
    if not dangling:
        (tmp_path / "moved").rename(target) if (tmp_path / "moved").exists() else (
            target.write_bytes(path.read_bytes() if path.exists() else b"theirs")
        )
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    before = state(outside)
    training.during = lambda folder: None
    for program in (train, evaluate):
        with contextlib.suppress(UserError, OSError):
            program(folder)
    assert state(outside) == before


def test_a_run_behind_a_link_that_the_user_names_works(training, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    train(tmp_path / "runs" / "one")
    assert is_finished(tmp_path / "disk" / "one")
    (tmp_path / "disk" / "two").mkdir()
    (tmp_path / "two").symlink_to(tmp_path / "disk" / "two")
    train(tmp_path / "two")
    assert is_finished(tmp_path / "disk" / "two")
    assert evaluate(tmp_path / "two").parent == tmp_path / "two"
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        train(tmp_path / "gone")


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "folder"])
def test_new_files_are_written_over_nothing(tmp_path, kind):
    write(tmp_path, {"x.json": (kind, "mine")})
    before = state(tmp_path)
    result = etude("init", tmp_path / "x.json")
    assert result.exit_code == 2 and "not overwritten" in result.output
    with pytest.raises(UserError, match="not overwritten; choose another name"):
        history.save(history.Conversation(), tmp_path / "x.json")
    assert intact(before, state(tmp_path)) and not files.leftovers(tmp_path)


def test_writes_replace_links_themselves_have_the_usual_mode_and_never_meet(tmp_path, monkeypatch):
    theirs, link = tmp_path / "theirs", tmp_path / "link"
    theirs.write_text("precious")
    link.symlink_to(theirs)
    with pytest.raises(OSError, match="link"):
        files.append(link, "more")
    files.write_text(link, "ours")
    assert (theirs.read_text(), link.read_text(), link.is_symlink()) == ("precious", "ours", False)
    theirs.write_text("")
    assert stat.S_IMODE(link.stat().st_mode) == stat.S_IMODE(theirs.stat().st_mode)
    # Without hard links, too, a new file is written over nothing.
    monkeypatch.setattr(
        os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links"))
    )
    files.write_text(tmp_path / "new", "new", new=True)
    with pytest.raises(FileExistsError):
        files.write_text(tmp_path / "new", "other", new=True)
    assert (tmp_path / "new").read_bytes() == b"new"
    # A person's own file of a like name is not what a kill left.
    (tmp_path / ".unfinished-novel").write_text("mine")
    (tmp_path / LEFTOVER).mkdir()
    files.clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".unfinished-novel", "link", "new", "theirs"
    ]  # fmt: skip


def test_a_converted_model_is_written_through_no_link(tmp_path, monkeypatch):
    monkeypatch.setenv("ETUDE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(gguf, "_convert", lambda _, folder: (folder / "a").write_text("weights"))
    folder = gguf.from_gguf(file)
    (folder / "a").unlink()
    folder.rmdir()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "precious").write_text("precious")
    folder.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="could not be converted"):
        gguf.from_gguf(file)
    folder.unlink()
    folder.symlink_to(theirs)
    assert gguf.from_gguf(file) == folder
    folder.unlink()
    assert state(theirs) == {theirs / "precious": b"precious"}
    assert gguf.from_gguf(file) == folder and (folder / "a").exists()
