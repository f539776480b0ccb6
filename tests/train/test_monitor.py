"""What is shown and written of a run: metrics, spikes, stalls, TensorBoard; and the arithmetic behind its figures."""

import json
import threading
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from launching import SECONDS
from puna.errors import UserError
from puna.model.llama import Llama
from puna.model.presets import PRESETS
from puna.train.flops import flops_per_token, peak_tflops, published_flops_per_token
from puna.train.monitor import Monitor, _panel, keep_until, read_metrics
from puna.train.options import LogOptions


def metrics(step, loss=2.0, **rest):
    return {"step": step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "tokens": step * 10, "tokens_per_second": 1234.5,
            "tflops": 1.5, "tflops_published": 1.4, "memory_gb": 2.0, "samples": f"data {step}"} | rest  # fmt: skip


def opened(folder, steps=100, step=0, writes=True, **options):
    return Monitor(folder, LogOptions(**options), steps, step=step, writes=writes)


def test_lines_are_json_and_no_number_stays_readable(tmp_path):
    monitor = opened(tmp_path, every=2)
    for step in (1, 2, 3):
        monitor.step(metrics(step))
    monitor.step(metrics(4, float("nan"), mfu=0.5))
    monitor.close()
    found = read_metrics(tmp_path)
    assert [line["step"] for line in found] == [2, 4] and "samples" not in found[0]
    assert found[1]["loss"] == "nan" and found[1]["mfu"] == 0.5


def test_a_spike_is_named_with_its_samples(tmp_path, capsys):
    monitor = opened(tmp_path)
    for step in range(1, 7):
        monitor.step(metrics(step, 2.0))
    monitor.step(metrics(7, 3.9))
    monitor.step(metrics(8, 4.4))
    monitor.close()
    said = capsys.readouterr().err
    assert "step 8: loss 4.4 is a spike over 2.271; its samples: data 8" in said and "step 7: " not in said


def test_a_stall_is_named_while_it_lasts(tmp_path, capsys):
    monitor, said = opened(tmp_path, stall=0.05), ""
    with monitor.watch(3, "data 5, 6"):
        while not said:
            said = capsys.readouterr().err
    assert "step 3 has taken 0.05 s so far; its samples: data 5, 6" in said
    monitor.close()


def test_a_step_in_time_is_not_named(tmp_path, capsys):
    monitor = opened(tmp_path, stall=3600)
    with monitor.watch(4, "data 7"):
        (timer,) = (thread for thread in threading.enumerate() if isinstance(thread, threading.Timer))
    timer.join(SECONDS)
    assert not timer.is_alive() and not capsys.readouterr().err
    monitor.close()


def test_lines_without_a_terminal(tmp_path, capsys):
    monitor = opened(tmp_path, steps=3)
    for step in (1, 2, 3):
        monitor.step(metrics(step, mfu=0.31))
    monitor.close()
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("step 1/3, loss 2.0000, lr 0.001, norm 1, 1,234 tok/s per device, 1.5 TFLOP/s, MFU 31.0%")
    assert last.endswith("2.00 GB, 0:00:00 left")


def test_the_live_view_shows_both_formulas():
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as captured:
        console.print(_panel(metrics(5, mfu=0.42), 10, "0:01:00"))
    shown = captured.get()
    assert "5 of 10, 0:01:00 left" in shown and "1.5 TFLOP/s (1.4 by the published formula), MFU 42.0%" in shown


def test_other_ranks_say_and_write_nothing(tmp_path, capsys):
    monitor = opened(tmp_path / "x", writes=False)
    monitor.step(metrics(1))
    monitor.note("hello")
    monitor.close()
    assert not (tmp_path / "x").exists() and not capsys.readouterr().err


def test_steps_that_are_made_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 2, "lo')
    keep_until(path, 2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_tensorboard_gets_the_numbers(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    monitor = opened(tmp_path, tensorboard=True)
    for step in (1, 2):
        monitor.step(metrics(step, 2.0 / step))
    monitor.close()
    read = events.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(one.step, one.value) for one in read.Scalars("loss")] == [(1, 2.0), (2, 1.0)]


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        opened(tmp_path, wandb="project")
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="log.tensorboard needs TensorBoard"):
        opened(tmp_path, tensorboard=True)


def by_products(layer, q, k, v):
    """Attention as two plain products, which torch counts on every device."""
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))
    return ((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_that_torch_counts(tied):
    config = replace(PRESETS["tiny"], num_key_value_heads=2, tie_word_embeddings=tied)
    model, length = Llama(config), 32
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    positions = torch.arange(length)[None]
    with FlopCounterMode(display=False) as counter:
        model.logits(model(torch.zeros(1, length, dtype=torch.long), positions, by_products)).sum().backward()
    assert counter.get_total_flops() / length == pytest.approx(flops_per_token(config, length), rel=1e-6)


def test_flops_of_adapters_leave_out_the_weights_gradients():
    config = PRESETS["llama2-7b"]
    full, lora = flops_per_token(config, 4096), flops_per_token(config, 4096, trained=0)
    attention = 12 * 32 * 4096 * 4096
    assert (full - attention) / (lora - attention) == pytest.approx(1.5)


@pytest.mark.parametrize(("preset", "speed", "tflops"), [("llama2-7b", 2662, 122.39), ("llama2-13b", 1400.832, 120.69)])
def test_the_published_formula_gives_the_published_figures(preset, speed, tflops):
    assert speed * published_flops_per_token(PRESETS[preset], 4096) / 1e12 == pytest.approx(tflops, rel=0.01)


def test_peaks_by_name():
    assert peak_tflops("NVIDIA H200") == 989 and peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert peak_tflops("NVIDIA H100 PCIe") == 756 and peak_tflops("") is None


def test_a_line_has_the_mean_loss_since_the_one_before(tmp_path):
    monitor = opened(tmp_path, every=4)
    for step in range(1, 9):
        monitor.step(metrics(step, float(step), **({"skipped": 1} if step in (1, 2, 5) else {})))
    monitor.close()
    assert [(line["step"], line["loss"], line.get("skipped")) for line in read_metrics(tmp_path)] == [
        (4, 2.5, 2), (8, 6.5, 1)
    ]  # fmt: skip


def test_a_step_that_is_validated_or_saved_has_a_line_whatever_the_interval(tmp_path):
    monitor = opened(tmp_path, every=4)
    monitor.step(metrics(1, 1.0))
    monitor.step(metrics(2, 2.0, validation_loss=0.5))
    monitor.step(metrics(3, 3.0), line=True)
    monitor.step(metrics(4, 5.0))
    monitor.close()
    found = read_metrics(tmp_path)
    assert [(line["step"], line["loss"]) for line in found] == [(2, 1.5), (3, 3.0), (4, 5.0)]
    assert found[0]["validation_loss"] == 0.5
