"""Resuming: one timeline of checkpoints, what must be the same, what may change, and the folder that a run owns."""

import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from puna.errors import UserError
from puna.train.checkpoint import read_manifest
from puna.train.monitor import read_metrics
from puna.train.trainer import Trainer
from training_runs import LENGTH, losses, start

SHORT = {"steps": 6, "checkpoint.every": 1, "checkpoint.keep": 9, "eval_every": 0}


@pytest.fixture(scope="module")
def base_run(stores, tmp_path_factory):
    """A run of 6 steps with a checkpoint of each; tests copy it."""
    out = tmp_path_factory.mktemp("runs") / "base"
    assert start(stores, out, **SHORT) == 0
    return out


@pytest.fixture
def out(base_run, tmp_path):
    return shutil.copytree(base_run, tmp_path / "run")


def steps(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def damage(out, *numbers):
    for number in numbers:
        (out / f"checkpoints/step-{number:08d}/__0_0.distcp").write_bytes(b"short")


# One timeline


def test_a_rewind_goes_on_from_its_own_checkpoints(stores, out, capsys):
    rewind = {**SHORT, "resume": out / "checkpoints/step-00000002", "optim.lr": 1e-3}
    assert start(stores, out, **{**rewind, "steps": 4}) == 0
    assert steps(out) == [*(f"retired-{n:08d}" for n in (3, 4, 5, 6)), *(f"step-{n:08d}" for n in (1, 2, 3, 4))]
    capsys.readouterr()
    rewound = losses(out)
    assert start(stores, out, **{**SHORT, "optim.lr": 1e-3}) == 0
    assert "step-00000004: step 4 of 6" in capsys.readouterr().err
    assert {step: loss for step, loss in losses(out).items() if step <= 4} == rewound


def test_damaged_checkpoints_of_later_steps_cost_no_new_one(stores, out):
    damage(out, 2, 3, 4, 5, 6)
    assert start(stores, out, **{**SHORT, "steps": 4, "checkpoint.keep": 2}) == 0
    kept = [name for name in steps(out) if name.startswith("step-")]
    assert kept == ["step-00000002", "step-00000003", "step-00000004"][-len(kept) :] and len(kept) >= 2
    assert read_manifest(out / "checkpoints/step-00000004").facts["steps"] == 4


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(stores, out):
    """Days of training may be in them: that they are given up is the user's decision."""
    damage(out, 1, 2, 3, 4, 5, 6)
    before, lines = steps(out), len(read_metrics(out))
    with pytest.raises(UserError, match="None of the checkpoints in .* can be read: move that folder away"):
        start(stores, out, **SHORT)
    assert steps(out) == before and len(read_metrics(out)) == lines
    shutil.move(out / "checkpoints", out / "damaged")
    assert start(stores, out, **{**SHORT, "steps": 2}) == 0 and steps(out) == ["step-00000001", "step-00000002"]


def test_a_checkpoint_of_another_version_is_never_renamed(stores, out):
    file = out / "checkpoints/step-00000005/manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": "puna training checkpoint 2"}))
    damage(out, 6)
    before = steps(out)
    with pytest.raises(UserError, match="step-00000005 was written by another version of puna"):
        start(stores, out, **SHORT)
    assert steps(out) == before


def test_a_checkpoint_beyond_the_last_step_is_refused(stores, out):
    before = steps(out)
    with pytest.raises(UserError, match="step-00000006 is at step 6, and the run ends after 3: raise --steps"):
        start(stores, out, **{**SHORT, "steps": 3})
    assert steps(out) == before and len(read_metrics(out)) == 6


def test_a_checkpoint_of_elsewhere_is_not_mixed_with_own_ones(stores, out, base_run, tmp_path):
    foreign = base_run / "checkpoints/step-00000002"
    with pytest.raises(UserError, match="holds checkpoints of its own"):
        start(stores, out, **SHORT, resume=foreign)
    assert start(stores, tmp_path / "fresh", **SHORT, resume=foreign) == 0
    assert losses(tmp_path / "fresh") == {step: loss for step, loss in losses(base_run).items() if step > 2}


# What must be the same, and what may change

LORA = {"model.weights": "auto", "model.vocab_size": None, "lora.rank": 4, "lora.alpha": 8, "optim.lr": 1e-3}


@pytest.fixture(scope="module")
def lora_run(stores, tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "lora"
    assert start(stores, out, **SHORT, **LORA | {"model.name": tiny_checkpoint()}) == 0
    return out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora.rank": 8}, "its lora has rank 4, not 8"),
        ({"lora.alpha": 16}, "its lora has alpha 8.0, not 16.0"),
        ({"lora.rslora": True}, "its lora has rslora False, not True"),
        ({"lora.targets": "q_proj"}, "its lora has targets "),
        ({"lora.modules_to_save": "norm"}, "its lora has modules_to_save "),
        ({"lora.rank": 0, "lora.alpha": None}, "its base belongs to other weights"),
        ({"precision": "bf16-mixed"}, "its precision is fp32, not bf16-mixed"),
        ({"optim.state": "bf16"}, "its optimizer state is fp32, not bf16"),
        ({"model.name": "other"}, "its base belongs to other weights"),
        ({"data.seq_len": 16}, "The data are not those"),
    ],
)
def test_another_run_is_refused(stores, lora_run, tiny_checkpoint, changes, says):
    names = {"model.name": tiny_checkpoint()}
    if changes.get("model.name"):
        changes = {"model.name": tiny_checkpoint(seed=1)}
    before = sorted(path.name for path in lora_run.rglob("*"))
    with pytest.raises(UserError, match=says):
        start(stores, lora_run, **SHORT | LORA | names | changes)
    assert sorted(path.name for path in lora_run.rglob("*")) == before


def test_a_moved_base_is_the_same_base(stores, lora_run, tiny_checkpoint, tmp_path, capsys):
    out = shutil.copytree(lora_run, tmp_path / "run")
    moved = shutil.copytree(tiny_checkpoint(), tmp_path / "moved")
    assert start(stores, out, **SHORT | LORA | {"model.name": moved}) == 0
    assert f"changed since that checkpoint: model.name {tiny_checkpoint()} -> {moved}" in capsys.readouterr().err


def test_what_may_change_is_reported_and_has_an_effect(stores, out, capsys, monkeypatch):
    seen = []
    plain = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, monitor: (plain(self, monitor), seen.append(self.optimizer))[0])
    changes = {"steps": 7, "optim.lr": 0.5, "optim.weight_decay": 0.3, "optim.betas": "0.8,0.9"}
    assert start(stores, out, **SHORT | changes) == 0
    said = capsys.readouterr().err
    assert "changed since that checkpoint: steps 6 -> 7; optim.lr 0.01 -> 0.5; optim.betas [0.9, 0.95] -> [0.8, 0.9];" \
        " optim.weight_decay 0.1 -> 0.3" in said  # fmt: skip
    (optimizer,) = seen
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


# The folder of a run


def test_a_second_training_is_refused_while_the_first_one_runs(stores, out):
    with (out / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        before = sorted(path.name for path in out.rglob("*"))
        with pytest.raises(UserError, match=f"Another process is training in {out}"):
            start(stores, out, **SHORT)
    assert sorted(path.name for path in out.rglob("*")) == before
    assert start(stores, out, **SHORT) == 0


def test_the_lock_of_a_killed_process_is_free(stores, out):
    code = "import fcntl, os, sys; fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(out / ".lock")], check=False).returncode == -9
    assert start(stores, out, **SHORT) == 0


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "loss.png", "report.html", "model/notes.txt", "adapter"]
)
def test_what_puna_did_not_write_stays(stores, tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(UserError, match="was not written by puna train"):
        start(stores, tmp_path / "run", **SHORT)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'
    assert [one for one in (tmp_path / "run").rglob("*") if one.is_file()] == [path]


def test_a_converted_model_is_no_result_of_a_training(stores, tmp_path):
    model = tmp_path / "run/model"
    model.mkdir(parents=True)
    (model / "puna.json").write_text(json.dumps({"puna": "1", "source": "elsewhere"}))
    with pytest.raises(UserError, match="model was not written by puna train"):
        start(stores, tmp_path / "run", **SHORT)


def test_an_own_config_named_by_the_user_is_no_obstacle(stores, out):
    assert (out / "config.yaml").read_text().startswith("# Written by puna train")
    from puna.commands.train import run
    from puna.options import parse
    from puna.train.options import TrainOptions

    assert run(parse("train", TrainOptions, [str(out / "config.yaml")])) == 0


def test_an_impossible_folder_is_refused_at_once(stores, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="file is a file, not a folder"):
        start(stores, tmp_path / "file/run", **SHORT)
    for folder in (tmp_path / "link", tmp_path / "link/run"):
        with pytest.raises(UserError, match="link is a symbolic link to nothing"):
            start(stores, folder, **SHORT)


def test_the_working_directory_can_be_the_folder(stores, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert start(stores, Path(), **SHORT | {"steps": 2}) == 0
    assert (tmp_path / "report.html").exists() and (tmp_path / "model/config.json").exists()


# Steps that are skipped, and errors that end a run


def broken_after(step, monkeypatch):
    """Every step after this one has a loss that is not a number."""
    plain = Trainer.loss

    def loss(self, hidden, labels, head):
        sums = plain(self, hidden, labels, head)
        return sums * sums.new_tensor([math.nan if self.step_number >= step else 1.0, 1.0, 1.0])

    monkeypatch.setattr(Trainer, "loss", loss)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_nan_stop_leaves_the_checkpoint_before_it(stores, tmp_path, monkeypatch, step):
    broken_after(step, monkeypatch)
    with pytest.raises(UserError, match=f"step {step + 1}: the loss is not a finite number"):
        start(stores, tmp_path / "run", **SHORT)
    assert steps(tmp_path / "run") == [f"step-{n:08d}" for n in range(1, step + 1)]


def test_skipping_ends_after_so_many_in_a_row(stores, tmp_path, monkeypatch, capsys):
    broken_after(2, monkeypatch)
    with pytest.raises(UserError, match=r"step 5: the loss .*; 3 steps in a row \(3 in all\) were skipped"):
        start(stores, tmp_path / "run", **SHORT, on_nan="skip", max_skipped=3)
    assert not (tmp_path / "run/model").exists()


def test_skipped_steps_are_counted_over_a_resume(stores, tmp_path, monkeypatch, capsys):
    plain = Trainer.loss

    def loss(self, hidden, labels, head):
        sums = plain(self, hidden, labels, head)
        return sums * sums.new_tensor([math.nan if self.step_number in (1, 4) else 1.0, 1.0, 1.0])

    monkeypatch.setattr(Trainer, "loss", loss)
    out = tmp_path / "run"
    assert start(stores, out, **SHORT | {"steps": 3}, on_nan="skip", max_skipped=2) == 0
    assert "1 of 3 steps were skipped" in capsys.readouterr().err
    assert start(stores, out, **SHORT, on_nan="skip", max_skipped=2) == 0
    assert "2 of 6 steps were skipped" in capsys.readouterr().err


def test_a_run_without_a_good_step_writes_no_model(stores, tmp_path, monkeypatch):
    broken_after(0, monkeypatch)
    with pytest.raises(UserError, match="Every step was skipped"):
        start(stores, tmp_path / "run", **SHORT, on_nan="skip", max_skipped=99)
    assert not (tmp_path / "run/model").exists()


@pytest.mark.parametrize(("value", "dtype"), [(math.nan, "float32"), (math.inf, "float32"), (1e5, "float16")])
def test_a_model_with_values_that_are_not_finite_is_not_written(stores, out, monkeypatch, value, dtype):
    plain = Trainer.fit

    def ruin(self, monitor, checkpoints):
        plain(self, monitor, checkpoints)
        with torch.no_grad():
            next(iter(self.parts[0].parameters())).view(-1)[3] = value

    monkeypatch.setattr(Trainer, "fit", ruin)
    before = (out / "model/model.safetensors").read_bytes()
    with pytest.raises(UserError, match=f"embed_tokens.weight holds values that are not finite in {dtype}"):
        start(stores, out, **SHORT | {"checkpoint.export_dtype": dtype})
    assert (out / "model/model.safetensors").read_bytes() == before


def test_a_step_without_a_trained_token_changes_nothing(stores, tmp_path, monkeypatch, capsys):
    plain = Trainer._batches

    def masked(self, rows):
        batches = plain(self, rows)
        for batch in batches:
            if self.step_number == 1:
                batch["labels"].fill_(-100)
        return batches

    monkeypatch.setattr(Trainer, "_batches", masked)
    weights = []
    step = Trainer.step

    def record(self, monitor):
        metrics = step(self, monitor)
        weights.append([p.detach().clone() for p in self.parts[0].parameters()])
        return metrics

    monkeypatch.setattr(Trainer, "step", record)
    assert (
        start(stores, tmp_path / "run", **SHORT | {"steps": 3, "optim.weight_decay": 0.5, "data.validation": None}) == 0
    )
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(weights[1], weights[2], strict=True))
    assert "step 2: none of its tokens is trained, so it changes nothing" in capsys.readouterr().err


# Validations and lines


def test_validations_between_lines_are_kept(stores, tmp_path):
    out = tmp_path / "run"
    given = {"steps": 8, "eval_every": 2, "log.every": 4, "checkpoint.every": 0}
    assert start(stores, out, **given) == 0
    found = read_metrics(out)
    assert [line["step"] for line in found] == [2, 4, 6, 8]
    assert all("validation_loss" in line for line in found)
    best = min(line["validation_loss"] for line in found)
    assert f"<th>best validation loss</th><td>{best:.4f}</td>" in (out / "report.html").read_text()


def test_samples_that_were_cut_are_reported(stores, tmp_path, capsys):
    given = SHORT | {"steps": 1, "data.train": stores[2], "data.seq_len": LENGTH // 2, "data.long": "cut"}
    assert start(stores, tmp_path / "run", **given) == 0
    said = capsys.readouterr().err
    assert f"of 40 samples are longer than {LENGTH // 2} tokens and were cut" in said
    assert "had no trained token left and were dropped" in said


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"eval_every": -1}, "eval-every must be at least 0, not -1"),
        ({"eval_rows": 0}, "eval-rows must be at least 1"),
        ({"checkpoint.every": -5}, "checkpoint.every must be at least 0, not -5"),
        ({"log.every": 0}, "log.every must be at least 1, not 0"),
        ({"log.stall": 0}, "log.stall must be above 0, not 0"),
        ({"max_skipped": 0}, "max-skipped must be at least 1"),
        ({"device": "tpu"}, "tpu"),
        pytest.param(
            {"device": "cuda"}, "cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
        ),
        ({"schedule.warmup_steps": 7}, "schedule.warmup_steps 7 is longer than the run of 6 steps"),
    ],
)
def test_options_without_a_meaning_are_refused(stores, tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        start(stores, tmp_path / "run", **SHORT | changes)
    assert not (tmp_path / "run/checkpoints").exists() and not os.path.exists(tmp_path / "run/metrics.jsonl")
