"""Whether two training runs have the same losses.

The criteria are those by which AscendSpeed's authors compare a run with a reference accelerator: the mean relative
error of the loss below 2 %, the mean absolute error below 0.005.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from puna.errors import UserError
from puna.files import replacing
from puna.train.monitor import read_metrics


@dataclass(frozen=True)
class LossReport:
    """Two runs' losses at the steps that both have. `relative` and `absolute` are means over those steps."""

    a: str
    b: str
    steps: int
    relative: float
    absolute: float
    largest: float
    largest_step: int
    first_step: int | None  # at which the absolute difference passes its limit
    same: bool


def compare(
    a: dict[int, float], b: dict[int, float], name_a: str, name_b: str, relative: float, absolute: float
) -> LossReport:
    """`a` is the reference: step -> loss. Raises UserError when the two share no step."""
    steps = sorted(a.keys() & b.keys())
    if not steps:
        raise UserError(f"{name_a} and {name_b} have no step in common.")
    differences = {step: abs(a[step] - b[step]) for step in steps}
    worst = max(steps, key=lambda step: differences[step] if math.isfinite(differences[step]) else math.inf)
    mean = sum(differences.values()) / len(steps)
    share = sum(differences[step] / max(abs(a[step]), 1e-12) for step in steps) / len(steps)
    return LossReport(
        a=name_a,
        b=name_b,
        steps=len(steps),
        relative=share,
        absolute=mean,
        largest=differences[worst],
        largest_step=worst,
        first_step=next((step for step in steps if not differences[step] < absolute), None),
        same=share < relative and mean < absolute,
    )


def text(report: LossReport, relative: float, absolute: float) -> str:
    """The report for people."""

    def part(name: str, value: float, shown: str, limit: float) -> str:
        return f"{name:<11}{'ok' if value < limit else 'DIFFERS':<9}{shown} on average, the limit is {limit:g}"

    lines = [
        f"A  {report.a}",
        f"B  {report.b}",
        "",
        part("relative", report.relative, f"{report.relative:.3%}", relative),
        part("absolute", report.absolute, f"{report.absolute:.5f}", absolute),
        f"{'':<20}largest {report.largest:.5f} at step {report.largest_step}; {report.steps} steps compared",
    ]
    if report.first_step is not None:
        lines.append(f"{'':<20}first above the absolute limit at step {report.first_step}")
    verdict = "The losses agree." if report.same else "The losses differ."
    return "\n".join([*lines, "", verdict])


def read_losses(path: Path) -> dict[int, float]:
    """Step -> loss of a run's folder or metrics.jsonl. Raises UserError when there is none."""
    losses = {line["step"]: float(line["loss"]) for line in read_metrics(path) if "loss" in line}
    if not losses:
        raise UserError(f"{path} has no step with a loss yet.")
    return losses


def plot(path: Path, a: dict[int, float], b: dict[int, float], report: LossReport) -> None:
    """Both curves and their difference as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(9, 6), sharex=True, height_ratios=(2, 1))
    for name, losses in ((f"A  {report.a}", a), (f"B  {report.b}", b)):
        upper.plot(list(losses), list(losses.values()), label=name, lw=1)
    upper.set_ylabel("loss")
    upper.legend()
    steps = sorted(a.keys() & b.keys())
    lower.plot(steps, [b[step] - a[step] for step in steps], lw=1, color="black")
    lower.set_xlabel("step")
    lower.set_ylabel("B - A")
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=120)
    pyplot.close(figure)
