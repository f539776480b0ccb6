"""The training loop: gradients against transformers', accumulation, resuming bit for bit, what it says and refuses."""

import copy
import json
import math
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launching import SECONDS, launch
from puna.data.indexed_dataset import open_dataset
from puna.data.loader import PackedLoader, collate
from puna.errors import UserError
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.parallel.strategy import ParallelStrategy
from puna.train.monitor import read_metrics
from puna.train.optim import make_optimizer
from puna.train.options import OptimOptions, ScheduleOptions, TrainDataOptions, TrainModelOptions, TrainOptions
from puna.train.safe_load import _Reader
from puna.train.trainer import Trainer
from puna.weights.open import open_checkpoint
from training_runs import LENGTH, VOCAB, losses, start, words

SHAPE = ModelConfig(VOCAB, 32, 48, 2, 4, 2, 8, max_position_embeddings=64)


def trainer(prefix, *, dtype=torch.float32, packing="best_fit", shape=SHAPE, **changes) -> Trainer:
    """A trainer of a tiny random model in this process."""
    strategy = ParallelStrategy.single()
    options = TrainOptions(
        out=Path("unused"),
        model=TrainModelOptions(name="tiny", weights="random"),
        data=TrainDataOptions(train=(prefix,), seq_len=LENGTH, packing=packing),
        **({"precision": "fp32", "batch_size": 4, "steps": 8} | changes),
    )
    with torch.device("meta"):
        model = Llama(shape)
    parts = strategy.prepare(model, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for name, p in strategy.parameters(parts).items():
        noise = torch.randn(p.shape, generator=generator)
        p.data.copy_(1 + 0.1 * noise if "norm" in name else noise * 0.1)
    loader = PackedLoader([(open_dataset(prefix), None)], LENGTH, 0, packing=packing)
    return Trainer(
        options, shape, strategy, parts, make_optimizer(strategy.parameters(parts), options.optim), loader, steps=8
    )


def gradients(made: Trainer, rows) -> tuple[dict[str, torch.Tensor], float, float]:
    """Gradients of the mean loss per token, by checkpoint name, the loss, and the number of trained tokens."""
    total, tokens, _ = made.strategy.step(made.parts, made._batches(rows), made.loss).tolist()
    made.strategy.scale_grads(made.parts, 1 / tokens)
    found = {name: p.grad.clone() for name, p in made.strategy.parameters(made.parts).items()}
    made.optimizer.zero_grad()
    return found, total / tokens, tokens


def reference(made: Trainer, sequences):
    """The same by transformers' model and loss, each sequence (ids, labels, not shifted) in a forward of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{k: v for k, v in made.config.to_hf().items() if k not in ("architectures", "model_type")})
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).to(next(made.parts[0].parameters()).dtype)
    state = {name: p.detach() for name, p in made.strategy.parameters(made.parts).items()}
    model.load_state_dict(state, strict=not made.config.tie_word_embeddings)
    model.tie_weights()
    trained = sum(int((labels[1:] != -100).sum()) for _, labels in sequences)
    loss = sum(
        model(input_ids=ids[None], labels=labels[None]).loss * int((labels[1:] != -100).sum()) / trained
        for ids, labels in sequences
        if (labels[1:] != -100).any()
    )
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.item()


def close(mine, theirs, tolerance):
    assert set(mine) == set(theirs)
    for name, gradient in mine.items():
        scale = theirs[name].abs().max().item()
        assert (gradient - theirs[name]).abs().max().item() <= tolerance * max(1.0, scale), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["text", "talk"])
@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_gradients_are_those_of_transformers(stores, kind, packing, tied):
    made = trainer(stores[0] if kind == "text" else stores[2], packing=packing,
                   shape=replace(SHAPE, tie_word_embeddings=tied))  # fmt: skip
    rows = made.loader.next_batch(4)
    mine, loss, _ = gradients(made, rows)
    dataset = made.loader.datasets[0]
    if kind == "talk":  # samples fit whole
        sequences = [
            tuple(torch.from_numpy(x).long() for x in dataset.sample(i)) for row in rows for _, i in row.samples
        ]
    else:  # long text is in pieces: take them from the rows
        sequences = []
        for row in rows:
            for number in dict.fromkeys(row.documents.tolist()):
                ids, labels = (torch.from_numpy(x[row.documents == number]) for x in (row.ids, row.labels))
                last = labels[-1:]  # a piece that goes on elsewhere also predicts the token after it
                whole = torch.cat((ids, last.clamp(min=0)))
                sequences.append((whole, torch.cat((torch.tensor([-100]), labels))))
    theirs, their_loss = reference(made, sequences)
    assert loss == pytest.approx(their_loss, abs=1e-5)
    close(mine, theirs, 1e-5)


def test_packed_equals_each_document_alone_in_float64(stores):
    made = trainer(stores[2], dtype=torch.float64, precision="fp64")
    rows = made.loader.next_batch(4)
    mine, loss, tokens = gradients(made, rows)
    summed: dict[str, torch.Tensor] = {}
    total = 0.0
    for row in rows:
        for number in dict.fromkeys(row.documents.tolist()):
            keep = row.documents == number
            alone = {key: torch.from_numpy(getattr(row, key)[keep])[None] for key in ("ids", "labels", "positions")}
            total += made.strategy.step(made.parts, [alone], made.loss)[0].item() / tokens
            for name, p in made.strategy.parameters(made.parts).items():
                summed[name] = summed.get(name, 0) + p.grad / tokens
            made.optimizer.zero_grad()
    assert loss == pytest.approx(total, abs=1e-12)
    close(mine, summed, 1e-12)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_accumulation_equals_one_batch_with_uneven_tokens(stores, size):
    one, several = (
        trainer(stores[2], dtype=torch.float64, precision="fp64", micro_batch_size=n, batch_size=6) for n in (6, size)
    )
    rows = one.loader.next_batch(6)
    counts = [int((row.labels != -100).sum()) for row in rows]
    assert len(set(counts)) > 1
    whole, loss, _ = gradients(one, rows)
    parts, other, _ = gradients(several, rows)
    assert other == pytest.approx(loss, abs=1e-12)
    close(parts, whole, 1e-12)


class Notes:
    """A monitor that keeps what is said."""

    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(text)

    def watch(self, step, samples):
        from contextlib import nullcontext

        return nullcontext()


def test_clipping_and_schedule_of_a_step(stores):
    made = trainer(stores[0], optim=OptimOptions(lr=0.1, clip=0.01, weight_decay=0.0),
                   schedule=ScheduleOptions(name="linear", warmup_steps=2))  # fmt: skip
    norms = []
    plain = made.optimizer.step
    made.optimizer.step = lambda: (norms.append(made.strategy.grad_norm(made.parts)), plain())
    found = [made.step(Notes()) for _ in range(8)]
    assert [one["lr"] for one in found] == pytest.approx([0, 0.05, 0.1, *(0.1 * left / 6 for left in range(5, 0, -1))])
    assert norms == pytest.approx([0.01] * 8, rel=1e-4) and all(one["grad_norm"] > 0.01 for one in found)


def test_z_loss_is_apart_from_the_loss(stores):
    plain, with_z = (trainer(stores[0], optim=OptimOptions(z_loss=weight)) for weight in (0.0, 1e-2))
    one, other = plain.step(Notes()), with_z.step(Notes())
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-6) and other["z_loss"] > 0
    assert other["grad_norm"] != pytest.approx(one["grad_norm"], rel=1e-4)


def poison(made):
    """Make the loss of one sample no number; returns that sample."""
    rows = PackedLoader([(made.loader.datasets[0], None)], LENGTH, 0, packing="none").next_batch(4)
    (store, sample), *_ = rows[2].samples
    bad = rows[2].ids.tolist()
    plain = made.strategy.step, made.strategy.evaluate

    def broken(function):
        def call(parts, batches, loss, **rest):
            hit = any(bad in batch["ids"].tolist() for batch in batches)
            sums = function(parts, batches, loss, **rest)
            return sums * torch.tensor([math.nan if hit else 1.0, 1.0, 1.0])

        return call

    made.strategy.step, made.strategy.evaluate = map(broken, plain)
    return sample


def test_a_loss_that_is_no_number_stops_and_names_the_sample(stores):
    made = trainer(stores[2], packing="none")
    sample = poison(made)
    with pytest.raises(UserError, match=rf"step 1: the loss is not a finite number; samples: .*talk {sample};"):
        made.step(Notes())


def test_or_the_step_is_skipped(stores):
    made, notes = trainer(stores[2], packing="none", on_nan="skip"), Notes()
    before = copy.deepcopy([p.detach() for p in made.parts[0].parameters()])
    sample = poison(made)
    assert made.step(notes)["skipped"] == 1 and f"talk {sample}; skipped" in notes.said[0]
    assert all(torch.equal(a, b) for a, b in zip(before, made.parts[0].parameters(), strict=True))
    assert "skipped" not in made.step(notes)


def test_float16_scale_goes_down_on_overflow_and_up_again(stores):
    made, notes = trainer(stores[0], precision="fp16-mixed", batch_size=1), Notes()
    made.scale = 2.0**127  # beyond float32 with any loss
    metrics = made.step(notes)
    assert metrics["skipped"] == 1 and made.scale == 2.0**126 and "beyond float16" in notes.said[0]
    made.scale, made.good = 8.0, 1999
    assert "skipped" not in made.step(notes) and made.scale == 16.0


# Whole runs


@pytest.fixture(scope="module")
def whole_run(stores, tmp_path_factory):
    """A run that nobody interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert start(stores, out) == 0
    return out


def test_a_run_learns_and_leaves_what_it_says(whole_run, capsys):
    found = read_metrics(whole_run)
    assert [line["step"] for line in found] == list(range(1, 13))
    assert found[-1]["loss"] < found[0]["loss"] - 1
    assert [line["step"] for line in found if "validation_loss" in line] == [3, 4, 6, 8, 9, 12]
    for name in ("loss.png", "report.html", "config.yaml", "model/config.json", "model/model.safetensors"):
        assert (whole_run / name).stat().st_size > 0
    assert (whole_run / "loss.png").read_bytes().startswith(b"\x89PNG")
    page = (whole_run / "report.html").read_text()
    assert "<svg" in page and "seq_len: 32" in page and torch.__version__ in page and "http://www.w3.org" in page
    with open_checkpoint(whole_run / "model") as source:
        assert source.config.vocab_size == VOCAB
        assert json.loads((whole_run / "model/puna.json").read_text())["step"] == 12
    assert sorted(path.name for path in (whole_run / "checkpoints").iterdir()) == ["step-00000009", "step-00000012"]


def test_the_result_computes_what_the_run_validated(whole_run, stores):
    """transformers reads it, and its loss on the validation rows is the last one of the run."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(whole_run / "model", dtype=torch.float32)
    loader = PackedLoader([(open_dataset(stores[1]), None)], LENGTH, 0)
    total = count = 0
    for (row,) in loader.validation_batches(1):
        for number in dict.fromkeys(row.documents.tolist()):
            keep = row.documents == number
            ids, labels = (torch.from_numpy(x[keep]) for x in (row.ids, row.labels))
            with torch.no_grad():
                logits = model(ids[None]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
            count += int((labels != -100).sum())
    assert read_metrics(whole_run)[-1]["validation_loss"] == pytest.approx(total / count, rel=1e-5)


def test_going_on_is_bit_equal(whole_run, stores, tmp_path, capsys):
    out = tmp_path / "run"
    assert start(stores, out, **{"checkpoint.every": 5, "checkpoint.keep": 9}) == 0
    for gone in out.glob("checkpoints/step-00000010"), out.glob("checkpoints/step-00000012"):
        for path in gone:
            (path / "manifest.json").unlink()  # as when the process had been killed before
    assert losses(out) == losses(whole_run)
    capsys.readouterr()
    assert start(stores, out) == 0
    said = capsys.readouterr().err
    assert "skipping a checkpoint" in said and f"resuming from {out}/checkpoints/step-00000005: step 5 of 12" in said
    assert losses(out) == losses(whole_run)
    mine, other = ((path / "model/model.safetensors").read_bytes() for path in (out, whole_run))
    assert mine == other


@pytest.mark.parametrize("name", ["adamw8bit", "adafactor", "bf16 state"])
def test_other_optimizers_go_on_bit_equal_too(stores, tmp_path, name):
    if name == "adamw8bit":
        pytest.importorskip("torchao", reason="needs torchao")
    changes = {"optim.state": "bf16"} if name == "bf16 state" else {"optim.name": name}
    # Averages of 4,096 elements and more are kept in 8 bits
    given = {"steps": 4, "checkpoint.every": 2, "eval_every": 0, "model.vocab_size": 256, **changes}
    out = tmp_path / "run"
    assert start(stores, out, **given) == 0
    whole, result = losses(out), (out / "model/model.safetensors").read_bytes()
    (out / "checkpoints/step-00000004/manifest.json").unlink()
    assert start(stores, out, **given) == 0
    assert losses(out) == whole and (out / "model/model.safetensors").read_bytes() == result


def test_a_finished_run_is_not_trained_again(whole_run, stores, capsys):
    before = (whole_run / "metrics.jsonl").read_text()
    assert start(stores, whole_run) == 0
    assert (whole_run / "metrics.jsonl").read_text() == before
    assert "step 12 of 12" in capsys.readouterr().err


def launch_run(stores, out, **changes):
    command = [sys.executable, "-m", "puna", "train", *words(stores, out, **changes)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(stores, tmp_path, number):
    out = tmp_path / "run"
    process = launch_run(stores, out, steps=100000, eval_every=0)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(losses(out)) > 4, process)
    process.send_signal(number)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number, said
    done = max(losses(out))
    assert f"stopped after step {done} of 100000, which is saved" in said
    assert (out / f"checkpoints/step-{done:08d}/manifest.json").exists()


def wait_for(done, process, seconds=SECONDS):
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_at_random_moments_also_while_saving(stores, whole_run, tmp_path):
    """SIGKILL, three times, at any moment after the first steps; a checkpoint is being written most of the time."""
    out, kills = tmp_path / "run", 0
    while kills < 3:
        process = launch_run(stores, out, **{"checkpoint.every": 1, "checkpoint.keep": 1})
        seen = len(losses(out)) if (out / "metrics.jsonl").exists() else 0
        try:
            wait_for(lambda: (out / "metrics.jsonl").exists() and len(losses(out)) > min(seen, 8) + 1, process)  # noqa: B023
        except AssertionError:
            if process.poll() == 0:
                break
            raise
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        process.communicate()
        kills += 1
    process = launch_run(stores, out, **{"checkpoint.every": 1, "checkpoint.keep": 1})
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    assert losses(out) == losses(whole_run)
    assert (out / "model/model.safetensors").read_bytes() == (whole_run / "model/model.safetensors").read_bytes()
    assert not list(out.glob("checkpoints/.*"))


@pytest.mark.slow
def test_going_on_with_other_ranks_and_another_layout(stores, tmp_path):
    """One process; two data ranks; from their middle on two tensor ranks, and in one process: the same losses."""
    given = {"steps": 6, "batch_size": 4, "precision": "fp64", "checkpoint.keep": 9, "model.vocab_size": VOCAB + 1,
             "eval_every": 2}  # fmt: skip
    assert start(stores, tmp_path / "one", **given) == 0
    expected = read_metrics(tmp_path / "one")

    def agrees(out):
        found = read_metrics(out)
        assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
        for mine, theirs in zip(found, expected, strict=True):
            for name in ("loss", "grad_norm", "validation_loss", "tokens"):
                assert mine.get(name, 0) == pytest.approx(theirs.get(name, 0), abs=1e-9, rel=1e-9), mine["step"]

    def forget_the_end(out):
        (out / "checkpoints/step-00000006/manifest.json").unlink()

    def with_two(**mesh):
        ranks = launch(2, "-m", "puna", "train", *words(stores, out, **given, **mesh))
        assert [rank.code for rank in ranks] == [0, 0], ranks[0].err
        assert not ranks[1].err

    out = tmp_path / "two"
    with_two()
    agrees(out)
    forget_the_end(out)
    with_two(**{"mesh.tp": 2})
    agrees(out)
    forget_the_end(out)
    assert start(stores, out, **given) == 0
    agrees(out)
    one, two = (open_checkpoint(path / "model") for path in (tmp_path / "one", out))
    for name in one.tensors:
        torch.testing.assert_close(two.read(name), one.read(name), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optim.lrr": 1}, "has no option --optim.lrr (did you mean '--optim.lr'?)"),
        ({"optim.betas": "0.9"}, "optim.betas takes two numbers"),
        ({"schedule.min_lr": 1}, "schedule.min_lr 1 must lie between 0 and optim.lr 0.01"),
        ({"data.seq_len": 512}, "data.seq_len 512 is longer than the model's context of 256"),
        ({"data.train": "nothing"}, "There is no token data nothing_text_document.idx"),
        ({"data.weights": "1,2"}, "data.weights needs a number for every prefix"),
        ({"batch_size": 0}, "batch-size must be at least 1"),
        ({"batch_size": 3, "micro_batch_size": 2}, "cannot be dealt out"),
        ({"mesh.tp": 2}, "tp 2 needs a multiple of 2 ranks, not 1"),
        ({"lora.rank": 4}, "not of random weights"),
        ({"model.name": "tinyy"}, "tinyy"),
        ({"model.weights": "auto"}, "tiny is a preset, a shape without weights: give --model.weights random"),
        (
            {"model.vocab_size": 50},
            "is beyond the model's vocabulary of 50: give a larger --model.vocab-size, or prepare",
        ),
        ({"checkpoint.keep": 0}, "checkpoint.keep must be at least 1"),
    ],
)
def test_refusals(stores, tmp_path, changes, says):
    with pytest.raises(UserError) as caught:
        start(stores, tmp_path / "run", **changes)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.name": "tiny-gqa"}, "its model has num_attention_heads 4, not 8"),
        ({"data.seq_len": 16}, "The data are not those that the checkpoint was trained on"),
        ({"optim.name": "adafactor"}, "its optimizer is adamw, not adafactor"),
        ({"resume": "never"}, "holds checkpoints of an earlier run"),
        ({"resume": "no/such"}, "no/such is not a checkpoint of puna train"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(whole_run, stores, changes, says):
    before = sorted(path.name for path in whole_run.rglob("*"))
    with pytest.raises(UserError, match=says):
        start(stores, whole_run, **changes)
    assert sorted(path.name for path in whole_run.rglob("*")) == before


def test_lora_trains_and_saves_its_adapter_alone(tiny_checkpoint, stores, tmp_path):
    base = tiny_checkpoint()
    out = tmp_path / "run"
    changes = {"model.name": base, "model.weights": "auto", "lora.rank": 4, "lora.dropout": 0.1}
    assert start(stores, out, **changes, **{"model.vocab_size": None}) == 0
    found = losses(out)
    assert found[12] < found[1]
    saved = _Reader(out / "checkpoints/step-00000012").read_metadata().state_dict_metadata
    assert all(".adapter." in name for name in saved) and any(name.endswith("adapter.a") for name in saved)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), out / "adapter")
    assert any(p.abs().sum() > 0 for name, p in theirs.named_parameters() if "lora_B" in name)


def test_rows_of_collate_match_the_loader(stores):
    made = trainer(stores[0])
    rows = made.loader.next_batch(4)
    assert torch.equal(torch.cat([b["ids"] for b in made._batches(rows)]), collate(rows)["ids"])


@pytest.mark.parametrize("name", ["seed", "data.seed"])
def test_seeds_have_bounds_and_the_largest_trains(stores, tmp_path, name):
    for value, says in ((-1, "at least 0, not -1"), (2**63, f"at most {2**63 - 1}, not {2**63}")):
        with pytest.raises(UserError, match=f"--{name} must be {says}"):
            start(stores, tmp_path / "run", **{name: value})
    assert start(stores, tmp_path / "run", **{name: 2**63 - 1}, steps=1) == 0
