"""A checkpoint exists whole or not at all, and what is damaged is never taken for one."""

import errno
import json
import os

import pytest
import torch

from etude import files
from etude.training import checkpoints


@pytest.fixture
def home(tmp_path):
    """Two checkpoints, after steps 9 and 10: in the order of their names they stand the other way."""
    for step in (9, 10):
        make(tmp_path, step)
    return tmp_path


def make(home, step):
    with checkpoints.writing(home / checkpoints.name(step)) as work:
        (work / "adapter_model.safetensors").write_bytes(bytes(range(256)) * step)
        checkpoints.save_state(work, {"step": step}, {"moment": torch.full((4,), float(step))})


def names(checkpoint):
    found = sorted(path.name for path in checkpoint.iterdir())
    assert len(found) == 4
    return found


def leftovers(home):
    return [path.name for path in home.iterdir() if not path.name.startswith("checkpoint-")]


def test_the_newest_is_by_number_and_holds_what_was_written(home):
    newest, corrupt = checkpoints.newest(home)
    assert (newest.name, corrupt) == ("checkpoint-10", [])
    assert checkpoints.step_of(newest) == 10
    progress, tensors = checkpoints.load_state(newest)
    assert progress == {"step": 10}
    assert torch.equal(tensors["moment"], torch.full((4,), 10.0))
    assert leftovers(home) == []


@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed", "emptied"])
def test_damage_to_any_file_is_found_and_the_one_before_is_taken(home, damage):
    for name in names(home / "checkpoint-10"):
        file = home / "checkpoint-10" / name
        content = file.read_bytes()
        if damage == "truncated":
            file.write_bytes(content[:-1])
        elif damage == "flipped":
            at = len(content) // 2
            file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        elif damage == "removed":
            file.unlink()
        else:
            file.write_bytes(b"")
        newest, corrupt = checkpoints.newest(home)
        assert newest.name == "checkpoint-9"
        assert len(corrupt) == 1
        assert corrupt[0].startswith(f"{home / 'checkpoint-10'}: skipped: corrupt, ")
        assert name in corrupt[0] or name == checkpoints.SUMS
        file.write_bytes(content)
        assert checkpoints.newest(home) == (home / "checkpoint-10", [])


def test_a_file_that_does_not_belong_is_found(home):
    (home / "checkpoint-10" / "optimizer.pt").write_bytes(b"pickle")
    assert "not its own: optimizer.pt" in checkpoints.why_not(home / "checkpoint-10")


def test_nothing_whole_is_none(tmp_path):
    assert checkpoints.newest(tmp_path / "nothing") == (None, [])
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-4").write_text("a file")
    newest, corrupt = checkpoints.newest(tmp_path)
    assert newest is None
    assert len(corrupt) == 1


@pytest.mark.parametrize("call", ["fsync", "rename", "write"])
def test_an_error_while_writing_leaves_what_was_there(home, monkeypatch, call):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"fsync": "os.fsync", "rename": "pathlib.Path.rename", "write": "json.dumps"}[call]
    monkeypatch.setattr(target, full)
    for step in (11, 9):  # a new one, and one in the place of another
        with pytest.raises(OSError, match="No space left"):
            make(home, step)
    monkeypatch.undo()
    # Its own leftovers are gone; what stood there verifies, the newest at least.
    assert checkpoints.newest(home) == (home / "checkpoint-10", [])
    assert not (home / "checkpoint-11").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_an_error_and_no_loss(home):
    home.chmod(0o500)
    with pytest.raises(PermissionError):
        make(home, 11)
    home.chmod(0o700)
    assert checkpoints.newest(home) == (home / "checkpoint-10", [])


def test_a_damaged_one_is_replaced(home):
    (home / "checkpoint-10" / checkpoints.PROGRESS).unlink()
    make(home, 10)
    assert checkpoints.newest(home) == (home / "checkpoint-10", [])
    assert leftovers(home) == []


def test_the_last_and_the_best_are_kept_and_leftovers_go(home):
    for step in range(11, 16):
        make(home, step)
    (home / f"{files.UNFINISHED}{17:016x}").mkdir()
    checkpoints.retain(home, 15, 2, best=11)
    assert sorted(path.name for path in home.iterdir()) == [
        "checkpoint-11", "checkpoint-14", "checkpoint-15"
    ]  # fmt: skip
    checkpoints.retain(home, 15, 1, best=None)
    assert [path.name for path in home.iterdir()] == ["checkpoint-15"]


def test_a_damaged_one_does_not_count_in_place_of_the_one_just_made(home):
    make(home, 12)
    (home / "checkpoint-12" / checkpoints.PROGRESS).unlink()
    make(home, 11)  # resumed from 10, and one step further
    checkpoints.retain(home, 11, 1, best=None)
    assert checkpoints.newest(home) == (home / "checkpoint-11", [])
    assert [path.name for path in home.iterdir()] == ["checkpoint-11"]


def test_a_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "config.yml"
    files.write_text(file, "first")
    monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        files.write_text(file, "second, and longer")
    assert file.read_text() == "first"


def test_an_optimizer_comes_back_bit_for_bit(tmp_path):
    torch.manual_seed(1)

    def trained(steps, state=None):
        torch.manual_seed(2)
        layer = torch.nn.Linear(5, 3)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, betas=(0.8, 0.95), fused=True)
        if state:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            layer(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
        return optimizer.state_dict()

    before = trained(3)
    groups, tensors = checkpoints.split_optimizer(before)
    checkpoints.save_state(tmp_path, {"groups": groups}, tensors)
    progress, loaded = checkpoints.load_state(tmp_path)
    after = trained(0, checkpoints.join_optimizer(progress["groups"], loaded))
    assert json.dumps(after["param_groups"]) == json.dumps(before["param_groups"])
    assert after["state"].keys() == before["state"].keys() == {0, 1}
    for number, values in before["state"].items():
        assert values.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(after["state"][number][key], values[key]) for key in values)


def test_random_numbers_go_on_where_they_stood(tmp_path):
    checkpoints.save_state(tmp_path, {}, checkpoints.random_state())
    first = torch.rand(3)
    assert not torch.equal(torch.rand(3), first)
    checkpoints.set_random_state(checkpoints.load_state(tmp_path)[1])
    assert torch.equal(torch.rand(3), first)
