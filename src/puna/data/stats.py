"""Totals of prepared data: tokens, lengths of samples, and how well they pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from puna.data.indexed_dataset import IGNORED, Dataset
from puna.data.packing import best_fit
from puna.files import replacing

BLOCK = 1 << 20


def facts(data: Dataset, seq_len: int | None = None) -> dict[str, str]:
    """A dataset's column of the table, by row name."""
    lengths = np.asarray(data.lengths)
    tokens, count = int(lengths.sum(dtype=np.int64)), trained(data)
    table: dict[str, Any] = {
        "samples": len(data),
        "tokens": tokens,
        "trained": count,
        "trained %": f"{100 * count / max(1, tokens):.1f}",
        "shortest": int(lengths.min()),
        "median": int(np.median(lengths)),
        "mean": f"{tokens / len(data):.1f}",
        "95 %": int(np.quantile(lengths, 0.95)),
        "longest": int(lengths.max()),
    }
    if seq_len:
        plan = best_fit(lengths, seq_len, 0)
        table |= {
            f"longer than {seq_len}": int((lengths > seq_len).sum()),
            f"rows of {seq_len}": len(plan),
            "filled %": f"{100 * tokens / (len(plan) * seq_len):.2f}",
        }
    metadata = data.metadata
    template = (metadata.get("template") or {}).get("name") or "none"
    table |= {"handler": metadata.get("handler", "?"), "template": template}
    return {name: f"{value:,}" if isinstance(value, int) else value for name, value in table.items()}


def trained(data: Dataset) -> int:
    """The number of trained tokens."""
    if data.labels is None:
        return len(data.ids.tokens)
    labels = data.labels.tokens
    return sum(int((labels[first : first + BLOCK] != IGNORED).sum()) for first in range(0, len(labels), BLOCK))


def plot(datasets: list[Dataset], path: Path) -> None:
    """The lengths of samples as a histogram, PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    longest = max(int(np.max(data.lengths)) for data in datasets)
    edges = np.unique(np.geomspace(1, longest + 1, 60).astype(int)).tolist()
    for data in datasets:
        axis.hist(np.asarray(data.lengths), edges, histtype="step", label=Path(data.prefix).name)
    axis.set(xscale="log", xlabel="tokens in a sample", ylabel="samples")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.tight_layout()
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=120)
    pyplot.close(figure)
