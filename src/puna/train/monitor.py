"""Metrics of a run: live view, metrics.jsonl, TensorBoard, Weights & Biases; reports of loss spikes and stalls.

The first rank alone writes. metrics.jsonl has a line every `log.every` steps, and for each step that is validated or
saved; its loss is the mean over the steps since the line before.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from puna.errors import UserError
from puna.files import write_text
from puna.train.options import LogOptions
from puna.train.run_folder import METRICS

RECENT = 50  # steps that a spike is compared with
LINE_SECONDS = 10.0  # between lines where stderr is not a terminal
MEANS = ("loss", "z_loss")  # what a line of metrics.jsonl averages over its steps
Metrics = dict[str, Any]


class Monitor:
    """Takes the metrics of each step. `writes`: whether this rank writes and shows them."""

    def __init__(self, folder: Path, options: LogOptions, steps: int, *, step: int, writes: bool) -> None:
        self.options, self.steps, self.writes, self.first = options, steps, writes, step
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.pending: list[Metrics] = []  # of the steps since the last line of metrics.jsonl
        self.start = self.printed = time.perf_counter()
        self.live: Any = None
        self.board: Any = None
        self.wandb: Any = None
        if not writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        keep_until(folder / METRICS, step)
        self.file = (folder / METRICS).open("a", encoding="utf-8")
        if options.tensorboard:
            self.board = _tensorboard(folder / "tensorboard")
        if options.wandb:
            self.wandb = _wandb(options.wandb, folder)
        if sys.stderr.isatty():
            self.live = _live()

    def step(self, metrics: Metrics, *, line: bool = False) -> None:
        """Record the metrics of a step and report a loss spike. `line`: write a line regardless of `log.every`."""
        loss, step = metrics["loss"], metrics["step"]
        mean = statistics.fmean(self.recent) if len(self.recent) >= 5 else math.inf
        if loss > mean + self.options.spike:
            self.note(f"step {step}: loss {loss:.4g} is a spike over {mean:.4g}; its samples: {metrics['samples']}")
        if math.isfinite(loss):
            self.recent.append(loss)
        self.pending.append(metrics)
        if line or step % self.options.every == 0 or step == self.steps or "validation_loss" in metrics:
            means = {name: statistics.fmean(one[name] for one in self.pending) for name in MEANS if name in metrics}
            skipped = sum(one.get("skipped", 0) for one in self.pending)
            self.write({k: v for k, v in metrics.items() if k not in ("samples", "skipped")} | means
                       | ({"skipped": skipped} if skipped else {}))  # fmt: skip
            self.pending.clear()
        self._show(metrics)

    def write(self, metrics: Metrics) -> None:
        """Write a line of metrics.jsonl, and the same to TensorBoard and W&B."""
        if not self.writes:
            return
        finite = {name: value if _plain(value) else str(value) for name, value in metrics.items()}
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()
        numbers = {name: value for name, value in metrics.items() if name != "step" and isinstance(value, int | float)}
        if self.board is not None:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, metrics["step"])
        if self.wandb is not None:
            self.wandb.log(numbers, step=metrics["step"])

    def note(self, text: str) -> None:
        """Print a message for the user above the live line."""
        if self.live is not None:
            self.live.console.print(text)
        elif self.writes:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def watch(self, step: int, samples: str) -> Iterator[None]:
        """Report the step and its samples when the body takes longer than `log.stall` seconds."""
        if not self.writes:
            yield
            return
        seconds = self.options.stall
        text = f"step {step} has taken {seconds:g} s so far; its samples: {samples}"
        timer = threading.Timer(seconds, self.note, (text,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
        if self.writes:
            self.file.close()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _show(self, metrics: Metrics) -> None:
        now = time.perf_counter()
        if self.live is not None:
            self.live.update(_panel(metrics, self.steps, self._left(metrics["step"], now)), refresh=True)
        elif self.writes and (now - self.printed >= LINE_SECONDS or metrics["step"] in (self.first + 1, self.steps)):
            self.printed = now
            print(_line(metrics, self.steps, self._left(metrics["step"], now)), file=sys.stderr, flush=True)

    def _left(self, step: int, now: float) -> str:
        seconds = round((now - self.start) / max(1, step - self.first) * (self.steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def read_metrics(folder: Path) -> list[Metrics]:
    """The lines of a run's metrics.jsonl; `folder` may be that file too. Raises UserError without one."""
    path = folder / METRICS if folder.is_dir() else folder
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{folder} is not a run of puna train: it has no {METRICS}.") from None
    except ValueError:
        raise UserError(f"{path} is damaged: one of its lines is not JSON.") from None


def keep_until(path: Path, step: int) -> None:
    """Drop the lines after `step`, from which the run resumes: later steps are trained again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # cut short when the process was killed
    write_text(path, "".join(kept))


def _line(metrics: Metrics, steps: int, left: str) -> str:
    words = [f"step {metrics['step']}/{steps}", f"loss {metrics['loss']:.4f}", f"lr {metrics['lr']:.3g}"]
    words += [f"norm {metrics['grad_norm']:.3g}", f"{metrics['tokens_per_second']:,.0f} tok/s per device"]
    words += [f"{metrics['tflops']:.3g} TFLOP/s"]
    if "mfu" in metrics:
        words.append(f"MFU {metrics['mfu']:.1%}")
    return ", ".join([*words, f"{metrics['memory_gb']:.2f} GB", f"{left} left"])


def _panel(metrics: Metrics, steps: int, left: str) -> Any:
    from rich.table import Table

    rows = {
        "step": f"{metrics['step']} of {steps}, {left} left",
        "loss": f"{metrics['loss']:.4f}",
        "learning rate": f"{metrics['lr']:.3g}",
        "gradient norm": f"{metrics['grad_norm']:.3g}",
        "speed": f"{metrics['tokens_per_second']:,.0f} tokens/s per device",
        "arithmetic": f"{metrics['tflops']:.3g} TFLOP/s ({metrics['tflops_published']:.3g} by the published formula)",
        "memory": f"{metrics['memory_gb']:.2f} GB",
    }
    if "mfu" in metrics:
        rows["arithmetic"] += f", MFU {metrics['mfu']:.1%}"
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(f"[dim]{name}[/]", value)
    return table


def _live() -> Any:
    from rich.console import Console
    from rich.live import Live

    live = Live(console=Console(stderr=True), auto_refresh=False)
    live.start()
    return live


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("log.tensorboard needs TensorBoard: pip install 'puna[train]'.") from None
    return SummaryWriter(str(folder))


def _wandb(project: str, folder: Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("log.wandb needs Weights & Biases: pip install wandb.") from None
    return wandb.init(project=project, dir=str(folder), name=folder.name, resume="allow")


def _plain(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
