"""The end of a run on paper: loss.png, and report.html with its curves, settings and environment in one file."""

from __future__ import annotations

import html
import io
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from puna.files import write_bytes
from puna.train.monitor import Metrics

PLOTS = (("loss", "loss"), ("lr", "learning rate"), ("grad_norm", "gradient norm"), ("tokens_per_second", "tokens/s"))
STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .2rem 1rem .2rem 0; }
pre { background: #f4f4f2; padding: 1rem; overflow-x: auto; } svg { max-width: 100%; height: auto; }"""


def write_report(folder: Path, metrics: Sequence[Metrics], config: str, environment: dict[str, str]) -> None:
    """Writes loss.png and report.html into a run's folder. `config` is its YAML."""
    if not metrics:
        return
    write_bytes(folder / "loss.png", _figure(metrics, PLOTS[:1], "png"))
    last = metrics[-1]
    best = min((line["validation_loss"] for line in metrics if "validation_loss" in line), default=None)
    facts = {
        "steps": last["step"],
        "trained tokens": f"{last['tokens']:,}",
        "last loss": f"{float(last['loss']):.4f}",
        "best validation loss": "none" if best is None else f"{float(best):.4f}",
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
    """What the run ran on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "devices": str(ranks),
        "gpu": gpu,
        "threads": str(torch.get_num_threads()),
    }


def _figure(metrics: Sequence[Metrics], plots: Sequence[tuple[str, str]], kind: str) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(plots), 1, figsize=(9, 3.2 * len(plots)), squeeze=False)
    for axis, (name, label) in zip(axes[:, 0], plots, strict=True):
        axis.plot([line["step"] for line in metrics], [float(line[name]) for line in metrics], label=label, lw=1)
        held = [line for line in metrics if "validation_loss" in line] if name == "loss" else []
        if held:
            losses = [float(line["validation_loss"]) for line in held]
            axis.plot([line["step"] for line in held], losses, marker="o", ms=3, label="validation loss")
            axis.legend()
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=120)
    pyplot.close(figure)
    return buffer.getvalue()


def _svg(text: str) -> str:
    return text[text.index("<svg") :]


def _table(facts: dict[str, str]) -> str:
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    return f"<table>{rows}</table>"


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
