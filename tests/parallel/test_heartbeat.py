"""Ranks that end in the middle of a run: the others end too, and say which it was."""

import pytest

from launching import launch

pytestmark = pytest.mark.slow

SCRIPT = """
import os, signal, sys, time
import torch, torch.distributed as dist
from puna.parallel.strategy import ParallelStrategy
from puna.parallel.mesh import MeshOptions

rank = int(os.environ["RANK"])
layout = ParallelStrategy.start(MeshOptions())
with layout.watch_ranks({lost_after}):
    for step in range(1000):
        if step == 3 and rank == 1:
            {act}
        dist.all_reduce(torch.ones(1))
        time.sleep(0.01)
        if step == 50:
            break
print("done")
layout.close()
"""


def ranks(act, lost_after=30):
    return launch(3, "-c", SCRIPT.format(act=act, lost_after=lost_after))


def test_a_killed_rank_is_named_by_the_others():
    first, second, third = ranks("os.kill(os.getpid(), signal.SIGKILL)", lost_after=8)
    assert second.code == -9
    for rank in (first, third):
        assert rank.code == 1 and "Rank 1 has ended" in rank.err and "done" not in rank.out


def test_a_rank_with_an_error_is_named_at_once():
    first, second, third = ranks("raise KeyError('oops')")
    assert second.code == 1 and "KeyError: 'oops'" in second.err
    for rank in (first, third):
        assert rank.code == 1 and "Rank 1 has ended" in rank.err


@pytest.mark.full
def test_ranks_that_hang_beside_a_dead_one_end_too():
    """As under NCCL, whose collectives do not fail when a rank is gone."""
    hang = "os.kill(os.getpid(), signal.SIGKILL)\n        if step == 3:\n            time.sleep(100)"
    first, _, third = ranks(hang, lost_after=8)
    for rank in (first, third):
        assert rank.code == 1 and rank.err.strip().endswith("the last checkpoint is complete.")


def test_a_run_that_ends_well_says_nothing():
    for rank in ranks("pass"):
        assert (rank.code, rank.out, rank.err) == (0, "done\n", "")
