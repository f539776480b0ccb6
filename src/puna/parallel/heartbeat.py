"""Noticing that a rank has ended, whatever ended it, and which: the others then end too, and say so.

A collective with a rank that is gone fails at once on gloo, without its number, and waits for its timeout on NCCL. So
each rank counts up a number in the store that the ranks met at, and watches that of the next rank.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from puna.errors import UserError

BEAT = 1.0  # seconds between two counts
LOST = 30.0  # without a count: also a busy machine gives a thread a moment in this time


class RankLost(UserError):
    """Another rank has ended, and with it the run."""


class Heartbeat:
    """A thread that shows that this rank lives. Every rank of the default group makes one."""

    def __init__(self, rank: int, size: int, lost_after: float = LOST) -> None:
        self.rank, self.next, self.lost_after = rank, (rank + 1) % size, lost_after
        self.lost: int | None = None
        self.known, self.closed = threading.Event(), threading.Event()
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: the main thread may wait on another.
        store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=lost_after))
        self.store = dist.PrefixStore(f"alive/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self.thread = threading.Thread(target=self._run, name="alive", daemon=True)
        self.thread.start()

    def say(self) -> None:
        """Tell the others that this rank is about to end, before its work is done."""
        self._declare(self.rank)

    def verdict(self) -> int | None:
        """Which rank has ended; None when all turn out to live. Waits until that is known.

        Under torchrun, which ends all ranks when one has ended and says which, only for a rank that has said so itself.
        """
        self.known.wait(3 * BEAT if "TORCHELASTIC_RUN_ID" in os.environ else 2 * self.lost_after)
        return self.lost

    def close(self) -> None:
        """The work is done on this rank."""
        self.closed.set()
        self.thread.join()

    def _run(self) -> None:
        count, theirs, since = 0, "", time.monotonic()
        try:
            while not self.closed.wait(BEAT):
                count += 1
                self.store.set(str(self.rank), str(count))
                if self.store.check(["lost"]):
                    return self._end(int(self.store.get("lost")))
                now = self._read(self.next)
                if now != theirs:
                    theirs, since = now, time.monotonic()
                elif now != "done" and time.monotonic() - since > self.lost_after:
                    self._declare(self.next)
            self.store.set(str(self.rank), "done")
        except (RuntimeError, OSError):  # the store ends with the rank or the launcher that keeps it
            if not self.closed.is_set():
                self._end(0)

    def _read(self, rank: int) -> str:
        return self.store.get(str(rank)).decode() if self.store.check([str(rank)]) else ""

    def _declare(self, rank: int) -> None:
        if not self.store.check(["lost"]):
            self.store.set("lost", str(rank))

    def _end(self, rank: int) -> None:
        """The main thread has failed in a collective and waits for this, or hangs in one and cannot end itself."""
        self.lost = rank
        self.known.set()
        if rank == self.rank or self.closed.wait(10 * BEAT):
            return
        print(f"puna: {ended(rank)}", file=sys.stderr, flush=True)
        os._exit(1)


def ended(rank: int | None) -> str:
    which = "another rank" if rank is None else f"rank {rank}"
    says = "torchrun's report says which" if rank is None else "its own message says why"
    return f"{which} has ended, and so this one ends; {says}. The last checkpoint is whole."


def is_lost(error: BaseException | None) -> bool:
    """Whether this is how a collective fails when another rank is gone; a pipeline's stage wraps that once more."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "connection closed", "nccl"))
        ):
            return True
        error = error.__cause__
    return False
