"""A benchmark's rows as a table on stdout, as JSON, and as a plot."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from puna.files import replacing, write_json

Row = dict[str, Any]
Panel = tuple[str, str]  # the column of the y axis, its label


def write_report(path: Path, rows: Sequence[Row], options: Row, facts: Row) -> None:
    """Writes rows, options and the machine as JSON; `facts` are added to those of the machine."""
    content = {"machine": machine() | facts, "options": options, "rows": list(rows)}
    write_json(path, content)


def table(rows: Sequence[Row]) -> str:
    """The rows with their keys as the head, right-aligned."""
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells)


def plot(path: Path, rows: Sequence[Row], panels: Sequence[Panel], title: str) -> None:
    """Writes a PNG: one panel per measure over the batch size, one line per pair of lengths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(f"{row['input']} in, {row['output']} out", []).append(row)
    for axis, (column, label) in zip(axes[0], panels, strict=True):
        for name, points in lines.items():
            axis.plot([row["batch"] for row in points], [row[column] for row in points], marker="o", label=name)
        axis.set_xlabel("requests at once")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    figure.suptitle(title)
    figure.tight_layout()
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=120)
    pyplot.close(figure)


def machine() -> Row:
    """What the numbers were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)
