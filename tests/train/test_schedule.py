"""The learning rate against transformers' schedulers, and what holds of every schedule."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.errors import UserError
from puna.train.options import ScheduleOptions
from puna.train.schedule import check_schedule, learning_rate, warmup

NAMES = ("constant", "linear", "cosine", "cosine_restarts", "polynomial", "wsd")


def theirs(name, ramp, steps, **extra):
    """The rates of transformers' schedule of this name for lr 1, step by step."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(name, optimizer, ramp, steps, scheduler_specific_kwargs=extra)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("ramp", [0, 1, 7])
@pytest.mark.parametrize(
    ("options", "name", "extra"),
    [
        (ScheduleOptions(name="constant"), "constant_with_warmup", {}),
        (ScheduleOptions(name="linear"), "linear", {}),
        (ScheduleOptions(name="cosine"), "cosine", {}),
        (ScheduleOptions(name="cosine_restarts", cycles=3), "cosine_with_restarts", {"num_cycles": 3}),
        (ScheduleOptions(name="polynomial", power=2.0), "polynomial", {"lr_end": 1e-12, "power": 2.0}),
        (ScheduleOptions(name="wsd", decay_ratio=0.2), "warmup_stable_decay",
         {"num_decay_steps": 10, "decay_type": "linear"}),
        (ScheduleOptions(name="cosine", min_lr=0.1), "cosine_with_min_lr", {"min_lr": 0.1}),
    ],
)  # fmt: skip
def test_equals_transformers(options, name, extra, ramp):
    steps = 50
    ours = [learning_rate(replace(options, warmup_steps=ramp), 1.0, step, steps) for step in range(steps)]
    assert ours == pytest.approx(theirs(name, ramp, steps, **extra), abs=1e-9)


options = st.builds(
    ScheduleOptions,
    name=st.sampled_from(NAMES),
    warmup_steps=st.none() | st.integers(0, 60),
    warmup_ratio=st.floats(0, 0.99),
    min_lr=st.floats(0, 1e-3),
    cycles=st.integers(1, 5),
    power=st.floats(0.1, 4),
    decay_ratio=st.floats(0.01, 1),
)


@settings(max_examples=200)
@given(options=options, steps=st.integers(1, 500), lr=st.floats(1e-3, 1))
def test_warms_up_to_the_peak_and_stays_between_the_bounds(options, steps, lr):
    check_schedule(options, lr)
    rates = [learning_rate(options, lr, step, steps) for step in range(steps + 3)]
    ramp = warmup(options, steps)
    assert all(0 <= rate <= lr * (1 + 1e-12) for rate in rates)
    assert rates[: ramp + 1] == sorted(rates[: ramp + 1])
    if ramp < steps:
        assert rates[ramp] == pytest.approx(lr)
        assert all(rate >= options.min_lr * (1 - 1e-12) for rate in rates[ramp:])
    if options.name not in ("constant", "cosine_restarts"):
        assert rates[ramp:] == sorted(rates[ramp:], reverse=True)
    if options.name != "constant" and ramp <= steps:
        assert rates[steps + (ramp == steps)] == pytest.approx(options.min_lr)


@pytest.mark.parametrize(
    "wrong",
    [{"min_lr": 1.0}, {"min_lr": -1.0}, {"warmup_ratio": 1.0}, {"warmup_steps": -1}, {"cycles": 0}, {"power": 0.0},
     {"decay_ratio": 0.0}],
)  # fmt: skip
def test_impossible_values_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        check_schedule(ScheduleOptions(**wrong), 1e-3)
