"""Training checkpoints: whole or absent, checked, rotated, the best kept; damaged ones are refused by name."""

import errno
import json
import pickle
import shutil

import pytest
import torch
from torch import nn

from puna.errors import UserError
from puna.train import checkpoint
from puna.train.checkpoint import CheckpointManager, read_manifest


def state(value=0.0):
    return {"model": {"w": torch.full((300,), value)}, "optimizer": {"state.w.step": torch.tensor(value), "lr": value}}


@pytest.fixture(params=[True, False], ids=["asynchronous", "synchronous"])
def folder(tmp_path, request):
    return tmp_path / "checkpoints", request.param


def opened(folder, **options):
    path, asynchronous = folder
    return CheckpointManager(path, asynchronous=asynchronous, **options)


def names(folder):
    return sorted(path.name for path in folder[0].iterdir())


def test_what_is_saved_comes_back(folder):
    made = opened(folder)
    tensors = state(3.0)
    made.save(7, tensors, {"data": {"cursor": 5}, "validation_loss": None})
    tensors["model"]["w"].fill_(9)  # training goes on
    made.wait()
    saved = made.newest()
    assert saved.step == 7 and saved.facts["data"] == {"cursor": 5} and saved.score is None
    found = state()
    made.load(saved, found)
    assert torch.equal(found["model"]["w"], torch.full((300,), 3.0)) and found["optimizer"]["lr"] == 3.0
    assert names(folder) == ["step-00000007"]
    made.close()


def test_the_last_and_the_best_stay(folder):
    made = opened(folder, keep=2)
    for step, score in enumerate((3.0, 1.0, 2.0, None, 2.5), 1):
        made.save(step, state(), {"validation_loss": score})
    made.wait()
    assert names(folder) == ["step-00000002", "step-00000004", "step-00000005"]
    assert made.best().step == 2


def test_a_step_saved_twice_is_there_once(folder):
    made = opened(folder)
    for value in (1.0, 2.0):
        made.save(1, state(value), {})
    made.wait()
    found = state()
    made.load(made.newest(), found)
    assert found["model"]["w"][0] == 2 and names(folder) == ["step-00000001"]


def test_what_a_killed_process_left_is_removed(folder):
    opened(folder)
    left = folder[0] / ".step-00000003.part"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    made = opened(folder)
    assert names(folder) == [] and made.newest() is None


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda path: flip(path / "__0_0.distcp"), "is damaged: __0_0.distcp is not what was saved"),
        (lambda path: (path / "__0_0.distcp").write_bytes(b"short"), "is incomplete: __0_0.distcp has 5 of"),
        (lambda path: (path / ".metadata").unlink(), "is incomplete: .metadata is missing"),
        (lambda path: (path / "manifest.json").unlink(), "is not a checkpoint of puna train: it has no manifest.json"),
        (
            lambda path: (path / "manifest.json").write_text('{"format": '),
            "is damaged, or a checkpoint of another version of puna: its manifest.json can't be read",
        ),
        (lambda path: (path / "manifest.json").write_text('{"format": "other"}'), "its manifest.json can't be read"),
    ],
)
def test_one_that_is_not_whole_is_skipped_with_a_word(tmp_path, capsys, harm, says):
    made = CheckpointManager(tmp_path)
    for step in (1, 2):
        made.save(step, state(), {})
    made.wait()
    harm(tmp_path / "step-00000002")
    assert made.newest().step == 1
    said = capsys.readouterr().err
    assert f"skipping a checkpoint: {tmp_path}/step-00000002 is " in said and says in said
    with pytest.raises(UserError, match=says.split(":")[0]):
        made.open(tmp_path / "step-00000002")


def resign(path):
    """Make the manifest's sums right again, as one would who changed a file on purpose."""
    content = json.loads((path / "manifest.json").read_text())
    for name in content["files"]:
        content["files"][name] = {
            "size": (path / name).stat().st_size, "sha256": checkpoint.sha256(path / name),
        }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(content))


class Evil:
    def __reduce__(self):
        return eval, ("1/0",)


def test_a_foreign_file_runs_no_code(tmp_path):
    made = CheckpointManager(tmp_path)
    made.save(1, state(), {})
    made.wait()
    path = tmp_path / "step-00000001"
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    resign(path)
    with pytest.raises(UserError, match=r"asks for builtins\.eval, which no checkpoint of puna does"):
        made.load(made.newest(), state())


def test_a_value_that_runs_code_is_refused(tmp_path):
    made = CheckpointManager(tmp_path, asynchronous=False)
    tensors = state()
    tensors["optimizer"]["lr"] = Evil()
    made.save(1, tensors, {})
    made.wait()
    with pytest.raises(UserError, match="can't be loaded"):
        made.load(made.newest(), state())


def test_a_state_of_another_shape_is_refused(tmp_path):
    made = CheckpointManager(tmp_path)
    made.save(1, state(), {})
    made.wait()
    other = state()
    other["model"]["v"] = torch.zeros(2)
    with pytest.raises(UserError, match="it lacks model.v"):
        made.load(made.newest(), other)
    other = state()
    other["model"]["w"] = torch.zeros(2)
    with pytest.raises(UserError, match="can't be loaded"):
        made.load(made.newest(), other)


@pytest.mark.parametrize("where", ["data", "manifest"])
def test_a_full_disk_is_said_and_nothing_is_lost(folder, monkeypatch, where):
    made = opened(folder)
    made.save(1, state(1.0), {})
    made.wait()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "data":
        monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    else:
        monkeypatch.setattr("puna.files.os.fsync", full)
    with pytest.raises(UserError, match="step 2 could not be saved: the disk is full; earlier checkpoints"):
        made.save(2, state(2.0), {})
        made.wait()
    monkeypatch.undo()
    assert names(folder) == ["step-00000001"] and made.newest().step == 1
    made.save(3, state(3.0), {})
    made.wait()
    assert made.newest().step == 3


def test_a_manifest_points_to_no_other_folder(tmp_path):
    made = CheckpointManager(tmp_path)
    made.save(1, state(), {})
    made.wait()
    path = tmp_path / "step-00000001"
    content = json.loads((path / "manifest.json").read_text())
    content["files"]["../elsewhere"] = {"size": 1, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="damaged"):
        read_manifest(path)


def test_a_moved_checkpoint_is_read(tmp_path):
    made = CheckpointManager(tmp_path / "a")
    made.save(1, {"model": nn.Linear(3, 3).state_dict()}, {})
    made.wait()
    shutil.move(tmp_path / "a/step-00000001", tmp_path / "moved")
    found = {"model": nn.Linear(3, 3).state_dict()}
    made.load(made.open(tmp_path / "moved"), found)


def test_new_checkpoints_stay_where_damaged_ones_have_higher_numbers(folder, capsys):
    made = opened(folder, keep=2)
    for step in (4, 6):
        made.save(step, state(9.0), {"validation_loss": 0.1})
    made.wait()
    for step in (4, 6):
        (folder[0] / f"step-{step:08d}/__0_0.distcp").write_bytes(b"short")
    assert made.newest() is None
    made.retire(0)
    for step in (1, 2, 3):
        made.save(step, state(float(step)), {})
    made.wait()
    assert names(folder) == ["retired-00000004", "retired-00000006", "step-00000002", "step-00000003"]
    assert made.newest().step == 3
    assert "retired-00000004, retired-00000006" in capsys.readouterr().err


def test_damaged_checkpoints_count_for_nothing(folder):
    made = opened(folder, keep=2)
    for step, score in ((1, 3.0), (2, 2.0), (3, 1.0)):
        made.save(step, state(), {"validation_loss": score})
    made.wait()
    (folder[0] / "step-00000003/__0_0.distcp").write_bytes(b"short")
    made.save(4, state(), {"validation_loss": 5.0})
    made.wait()
    assert names(folder) == ["step-00000002", "step-00000003", "step-00000004"]
    assert made.best().step == 2


def test_a_rewind_retires_what_came_after(folder):
    made = opened(folder, keep=9)
    for step in (2, 4, 5, 6):
        made.save(step, state(float(step)), {"validation_loss": 1.0 / step})
    made.wait()
    for _ in range(2):
        made.retire(2)
        made.save(5, state(50.0), {"validation_loss": 9.0})
        made.wait()
        found = state()
        made.load(made.newest(), found)
        assert found["model"]["w"][0] == 50 and made.best().step == 2
    assert names(folder) == [
        "retired-00000004", "retired-00000005", "retired-00000005-1", "retired-00000006",
        "step-00000002", "step-00000005",
    ]  # fmt: skip
    content = made.open(folder[0] / "retired-00000006")
    assert content.step == 6  # complete, and still there to resume from


def test_a_replacement_that_was_interrupted_is_put_back(folder):
    made = opened(folder)
    made.save(1, state(1.0), {})
    made.wait()
    (folder[0] / "step-00000001").rename(folder[0] / ".step-00000001.replaced")
    made = opened(folder)
    assert made.newest().step == 1
    shutil.copytree(folder[0] / "step-00000001", folder[0] / ".step-00000001.replaced")
    opened(folder)
    assert names(folder) == ["step-00000001"]
