"""How programs end: a machine that is full, signals, closed streams, what kills leave behind."""

import errno
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from etude import cli, console, distributed, train_with_config
from etude.data import readers
from etude.errors import Stopped, UserError, shortage
from etude.models import gguf, loading, lora
from etude.runs import opening


class SafetensorError(Exception):
    pass


def raised_from(error, *causes):
    """`error`, raised from the first cause, and that from the next."""
    for outer, inner in zip((error, *causes), causes, strict=False):
        outer.__cause__ = inner
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "not enough memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (SafetensorError("Error: Cannot allocate memory (os error 12)"), "not enough memory"),
        (ImportError("libfoo.so: failed to map segment from shared object"), "not enough memory"),
        (raised_from(ValueError("no model"), MemoryError()), "not enough memory"),
        (raised_from(OSError("x"), ValueError("y"), OSError(28, "z", "/r/f")), "/r/f: the disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "/place: the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "/place: the disk is full, or its quota used up"),
        (OSError(errno.EROFS, "Read-only file system", "/r/f"), "/r/f: Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied", "/r/f"), "/r/f: Permission denied"),
        # What must stay what it is.
        (OSError("does not appear to have a file named config.json"), ""),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/r/f"), ""),
        (ValueError("Unrecognized model"), ""),
        (raised_from(KeyError("x"), UserError("not enough memory")), ""),
    ],
)  # fmt: skip
def test_a_shortage_is_known_by_its_number_wherever_it_arose(error, words):
    found = shortage(error, "/place")
    assert found.startswith(words) and bool(found) == bool(words)


NO_MEMORY = RuntimeError(
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)
FULL = OSError(errno.ENOSPC, "No space left on device")


def test_loaders_name_the_cause_and_not_the_model(monkeypatch, tmp_path):
    loaded = loading._explain("some/model", None, False, raised_from(OSError("no file"), FULL))
    assert "the disk is full" in str(loaded) and "check the name" not in str(loaded)
    assert "HF_HOME" in str(loaded)
    local = loading._explain("folder", Path("folder"), True, NO_MEMORY)
    assert "model.name folder: not enough memory" in str(local)
    assert "causal" in str(loading._explain("folder", Path("folder"), True, ValueError("odd")))
    assert "check the name" in str(
        loading._explain("some/modle", None, False, OSError("no such repository"))
    )

    monkeypatch.setenv("ETUDE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    for error, words in (
        (
            SafetensorError("No space left on device (os error 28)"),
            "the disk is full.*ETUDE_CACHE",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            "Permission denied; check who",
        ),
    ):
        monkeypatch.setattr(gguf, "_convert", lambda *_, error=error: throw(error))
        with pytest.raises(UserError, match=words):
            gguf.from_gguf(file)
    monkeypatch.setattr(gguf, "_convert", lambda *_: 1 / 0)
    with pytest.raises(UserError, match="division by zero"):
        gguf.from_gguf(file)
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: throw(FULL))
    with pytest.raises(UserError, match=r"the disk is full.*HF_HOME"):
        readers.read("some/data")
    (tmp_path / lora.WEIGHTS).write_bytes(b"x")
    monkeypatch.setattr("safetensors.torch.load_file", lambda *_: throw(NO_MEMORY_ON_LOAD))
    with pytest.raises(UserError, match="not enough memory"):
        lora.read_weights(tmp_path)


NO_MEMORY_ON_LOAD = OSError(errno.ENOMEM, "Cannot allocate memory")


def throw(error):
    raise error


@pytest.mark.parametrize("program", ["evaluate", "chat"])
def test_a_program_without_memory_ends_with_a_sentence(program, monkeypatch, tmp_path):
    monkeypatch.setattr(opening, "open_target", lambda *_: throw(NO_MEMORY))
    more = ["--text", "Hello"] if program == "evaluate" else ["--prompt", "Hello"]
    result = CliRunner().invoke(cli.app, [program, "smollm2-135m", *more])
    assert result.exit_code == 2
    assert "error: not enough memory; end other programs" in result.output
    assert "--resume" not in result.output


def test_a_training_on_a_full_disk_ends_with_a_sentence(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_with_config, "train_in", lambda *_: throw(FULL))
    result = CliRunner().invoke(cli.app, ["train", "--preset", "cpu"])
    assert result.exit_code == 2
    assert "error: the disk is full, or its quota used up; free some space" in result.output
    monkeypatch.setattr(train_with_config, "train_in", lambda *_: 1 / 0)
    result = CliRunner().invoke(cli.app, ["train", "--preset", "cpu"])
    assert isinstance(result.exception, ZeroDivisionError)


# --- signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_any_program_in_order(name, monkeypatch, capsys, tmp_path):
    number, before = getattr(signal, name), signal.getsignal(getattr(signal, name))

    @console.command
    def program():
        try:
            os.kill(os.getpid(), number)
            os.getpid()  # the handler runs by now
        except Exception:  # as loaders do
            pytest.fail("a signal is not an error")
        finally:
            (tmp_path / "cleaned").touch()

    with pytest.raises(SystemExit) as end:
        program()
    assert end.value.code == 128 + number
    assert (tmp_path / "cleaned").exists()
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(("name", "code"), [("SIGHUP", 129), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_training_ends_after_its_step(name, code, tmp_path):
    from etude.training.guards import SavePoints

    saves, args = SavePoints(tmp_path), SimpleNamespace(device="cpu")
    state = SimpleNamespace(global_step=3, max_steps=5)
    control = SimpleNamespace(should_save=False, should_evaluate=False)
    saves.on_step_end(args, state, control)
    saves.on_save(args, state, control)  # no signal, no stop
    assert not control.should_save
    handled = distributed.on_signals(saves.handle)
    with pytest.raises(Stopped, match="stopped at step 3 of 5") as stopped, handled:
        os.kill(os.getpid(), getattr(signal, name))
        saves.on_step_end(args, state, control)
        assert control.should_save
        saves.on_save(args, state, control)
    assert stopped.value.code == code


def test_nohup_stays(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with distributed.on_signals(lambda *_: pytest.fail("ended")):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupt_that_a_library_wrapped_is_an_interrupt(capsys):
    for error in (
        raised_from(ImportError("numpy failed"), KeyboardInterrupt()),
        raised_from(UserError("not a model"), ImportError(), KeyboardInterrupt()),
    ):
        with pytest.raises(Exception) as end:
            console.command(lambda error=error: throw(error))()
        assert end.value.exit_code == 130
        assert "stopped" in capsys.readouterr().err
    with pytest.raises(ImportError):
        console.command(lambda: throw(ImportError("numpy failed")))()


# --- streams ---------------------------------------------------------------------------------

PRINTS = """
import sys
from etude import console

@console.command
def main():
    for _ in range(3):
        console.say("line", "x" * 100_000)
        console.err.print("also")
        print("y" * 100_000)
    open(sys.argv[1], "x").close()

main()
"""


@pytest.mark.parametrize("closed", ["", ">&-", "| true", ">/dev/full"])
def test_a_closed_stdout_ends_nothing(closed, tmp_path):
    file = tmp_path / "done"
    program = f"{sys.executable} -c '{PRINTS}' {file}"
    script = f"({program}; echo $? >{tmp_path}/code) {closed}" if closed == "| true" else (
        f"{program} {closed}; echo $? >{tmp_path}/code"
    )  # fmt: skip
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (tmp_path / "code").read_text() == "0\n", done.stderr
    assert file.exists()
    assert "Error" not in done.stderr and "Traceback" not in done.stderr


def test_a_chat_without_streams_says_so(monkeypatch):
    from etude import chat

    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match=r"stdin is closed.*--prompt TEXT"):
        chat.read_question(None)
    assert chat.read_question("Hello") == "Hello"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
    assert chat.read_question(None) == "Hello"
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(Exception) as end:
        chat.chat(prompt="Hello")
    assert end.value.exit_code == 2


# --- leftovers -------------------------------------------------------------------------------


def test_what_killed_conversions_left_is_removed_by_the_next(monkeypatch, tmp_path):
    monkeypatch.setenv("ETUDE_CACHE", str(tmp_path))
    folder = tmp_path / "gguf"
    gone, other = (
        folder / name for name in (".unfinished-0123456789abcdef", "model-0123456789abcdef")
    )
    for path in (gone, other):
        path.mkdir(parents=True)
        (path / "model.safetensors").write_text("half")
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(gguf, "_convert", lambda _, work: (work / "model.safetensors").touch())
    made = gguf.from_gguf(file)
    assert sorted(folder.iterdir()) == sorted([other, made])


def test_of_two_conversions_at_once_one_converts_and_the_other_waits(monkeypatch, tmp_path):
    monkeypatch.setenv("ETUDE_CACHE", str(tmp_path))
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    calls, second = [], threading.Thread(target=lambda: gguf.from_gguf(file))

    def convert(_, work):
        calls.append(work)
        second.start()
        second.join(0.2)
        assert second.is_alive()  # it waits, and touches nothing of this one
        (work / "model.safetensors").touch()

    monkeypatch.setattr(gguf, "_convert", convert)
    made = gguf.from_gguf(file)
    second.join()
    assert len(calls) == 1 and list((tmp_path / "gguf").iterdir()) == [made]


@pytest.mark.parametrize("code", [129, 130, 143])
def test_the_command_keeps_the_exit_code_of_a_signal(code):
    """A program's Exit is raised while its KeyboardInterrupt is handled, and hides it."""
    import typer

    @console.command
    def program():
        raise Stopped("stopped", code)

    app = typer.Typer(add_completion=False)
    app.command()(program)
    with pytest.raises(SystemExit) as end:
        app([])
    assert end.value.code == code
