"""The report of a run: loss.png, and report.html with its curves, options and environment in one file."""

from __future__ import annotations

import html
import io
import math
import platform
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch

from puna.files import write_bytes
from puna.train.monitor import Metrics

PLOTS = (("loss", "loss"), ("lr", "learning rate"), ("grad_norm", "gradient norm"), ("tokens_per_second", "tokens/s"))
SMOOTHED = 25  # the loss is also drawn as a moving mean over this fraction of its points
STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .2rem 1rem .2rem 0; }
pre { background: #f4f4f2; padding: 1rem; overflow-x: auto; } svg { max-width: 100%; height: auto; }"""


def write_report(folder: Path, metrics: Sequence[Metrics], config: str, environment: dict[str, str]) -> None:
    """Write loss.png and report.html into a run's folder. `config` is its options as YAML."""
    if not metrics:
        return
    write_bytes(folder / "loss.png", _figure(metrics, PLOTS[:1], "png"))
    last = metrics[-1]
    best = min((float(line["validation_loss"]) for line in metrics if "validation_loss" in line), default=None)
    facts = {
        "steps": last["step"],
        "trained tokens": f"{last['tokens']:,}",
        "last loss": f"{float(last['loss']):.4f}",
        "best validation loss": "none" if best is None else f"{best:.4f}",
        "tokens/s per device, median": f"{_median([line['tokens_per_second'] for line in metrics]):,.0f}",
        "TFLOP/s per device, median": f"{_median([line['tflops'] for line in metrics]):.3g}"
        f" ({_median([line['tflops_published'] for line in metrics]):.3g} by the published formula)",
        "peak memory": f"{last['memory_gb']:.2f} GB",
    }
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(folder.name)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(folder.name)}</h1>
{_table(facts)}
{_svg(_figure(metrics, PLOTS, "svg").decode())}
<h2>Settings</h2><pre>{html.escape(config)}</pre>
<h2>Environment</h2>{_table(environment)}
</body></html>
"""
    write_bytes(folder / "report.html", page.encode())


def environment(ranks: int, device: torch.device) -> dict[str, str]:
    """The machine and the libraries of a run."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "devices": str(ranks),
        "gpu": gpu,
        "threads": str(torch.get_num_threads()),
    }


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the up to `window - 1` before it; non-finite values are skipped."""
    recent: deque[float] = deque(maxlen=window)
    means = []
    for value in values:
        if math.isfinite(value):
            recent.append(value)
        means.append(sum(recent) / len(recent) if recent else math.nan)
    return means


def _figure(metrics: Sequence[Metrics], plots: Sequence[tuple[str, str]], file_format: str) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(len(plots), 1, figsize=(9, 3.2 * len(plots)), squeeze=False)
    for axis, (name, label) in zip(axes[:, 0], plots, strict=True):
        steps, values = [line["step"] for line in metrics], [float(line[name]) for line in metrics]
        window = len(values) // SMOOTHED if name == "loss" else 0
        axis.plot(steps, values, label=label, lw=1, alpha=0.4 if window > 1 else 1)
        if window > 1:
            axis.plot(steps, smooth(values, window), label=f"mean of {window}", lw=1.5, color="C0")
        validated = [line for line in metrics if "validation_loss" in line] if name == "loss" else []
        if validated:
            losses = [float(line["validation_loss"]) for line in validated]
            axis.plot(
                [line["step"] for line in validated], losses, marker="o", ms=3, color="C1", label="validation loss"
            )
        if window > 1 or validated:
            axis.legend()
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file_format, dpi=120)
    pyplot.close(figure)
    return buffer.getvalue()


def _svg(text: str) -> str:
    return text[text.index("<svg") :]


def _table(facts: dict[str, str]) -> str:
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    return f"<table>{rows}</table>"


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
