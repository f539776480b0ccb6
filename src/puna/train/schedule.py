"""The learning rate as a pure function of the step, so that a resumed run needs no state for it.

The formulas are those of transformers' `get_scheduler`, with a floor `min_lr` besides: the factor f in [0, 1] becomes
min_lr + f (lr - min_lr) after the warm-up.
"""

from __future__ import annotations

import math

from puna.errors import UserError
from puna.train.options import ScheduleOptions


def check_schedule(options: ScheduleOptions, lr: float) -> None:
    """Raises UserError for invalid values."""
    if not 0 <= options.min_lr <= lr:
        raise UserError(f"schedule.min_lr {options.min_lr:g} must lie between 0 and optim.lr {lr:g}.")
    if not 0 <= options.warmup_ratio < 1 or (options.warmup_steps or 0) < 0:
        raise UserError("schedule: warmup_ratio must be at least 0 and below 1, warmup_steps at least 0.")
    if options.cycles < 1 or options.power <= 0 or not 0 < options.decay_ratio <= 1:
        raise UserError("schedule: cycles must be at least 1, power above 0, decay_ratio above 0 and at most 1.")


def warmup(options: ScheduleOptions, steps: int) -> int:
    """Number of warm-up steps in a run of `steps`."""
    return math.ceil(steps * options.warmup_ratio) if options.warmup_steps is None else options.warmup_steps


def check_warmup(options: ScheduleOptions, steps: int) -> None:
    """Raises UserError for a warm-up longer than a run of `steps`."""
    if warmup(options, steps) > steps:
        raise UserError(
            f"schedule.warmup_steps {options.warmup_steps} is longer than the run of {steps} steps: lower it."
        )


def learning_rate(options: ScheduleOptions, lr: float, step: int, steps: int) -> float:
    """The learning rate of step `step`, counted from 0, of a run of `steps`."""
    ramp = warmup(options, steps)
    if step < ramp:
        return lr * step / ramp
    return options.min_lr + _factor(options, step - ramp, max(1, steps - ramp), steps) * (lr - options.min_lr)


def _factor(options: ScheduleOptions, done: int, after: int, steps: int) -> float:
    """The fraction between min_lr (0) and lr (1) after `done` of the `after` steps that follow the warm-up."""
    progress = min(1.0, done / after)
    match options.name:
        case "linear":
            return 1 - progress
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "cosine_restarts":
            return 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * (progress * options.cycles % 1)))
        case "polynomial":
            return (1 - progress) ** options.power
        case "wsd":
            decay = min(after, max(1, round(steps * options.decay_ratio)))
            return min(1.0, max(0.0, (after - done) / decay))
        case _:
            return 1.0
