"""Heartbeats that detect a dead rank and report which one.

A collective with a rank that has died fails at once on gloo, without naming it, and waits for its timeout on NCCL. So
each rank increments a counter in the rendezvous store once a second and watches the counter of the next rank.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from puna.parallel.process_group import RankLost, is_rank_lost

INTERVAL = 1.0  # seconds between two heartbeats
LOST_AFTER = 30.0  # seconds without a heartbeat; on a busy machine too a thread runs within this time
FINISHED = "finished"  # the counter's value once a rank's work is done


@contextmanager
def watch_ranks(rank: int, size: int, lost_after: float = LOST_AFTER) -> Iterator[None]:
    """While inside, raise RankLost, naming the rank, when another of the `size` ranks ends in whatever way.

    A rank counts as lost when it sends no heartbeat for `lost_after` seconds or leaves by an exception. A rank that
    hangs in a collective, so that nothing can be raised in it, ends with the message on stderr and exit code 1.
    """
    heartbeat = Heartbeat(rank, size, lost_after)
    try:
        yield
        dist.barrier()  # no rank stops its heartbeat while others still work
    except BaseException as error:
        if not is_rank_lost(error):
            heartbeat.announce_failure()
            raise
        lost = heartbeat.wait_for_lost_rank()
        if lost == rank or (lost is None and "TORCHELASTIC_RUN_ID" not in os.environ):
            raise
        raise RankLost(rank_lost_message(lost)) from error
    finally:
        heartbeat.stop()


class Heartbeat:
    """A thread that sends this rank's heartbeat and watches the next rank's. Every rank of the default group makes one.

    The store holds a counter per rank, under its number, and under `lost` the first rank that was found dead.
    """

    def __init__(self, rank: int, size: int, lost_after: float = LOST_AFTER) -> None:
        self.rank, self.next_rank, self.lost_after = rank, (rank + 1) % size, lost_after
        self.lost: int | None = None
        self.detected, self.stopped = threading.Event(), threading.Event()
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A separate connection: the main thread may be waiting on another.
        store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=lost_after))
        self.store = dist.PrefixStore(f"heartbeat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.thread.start()

    def announce_failure(self) -> None:
        """Tell the other ranks that this one is about to end before its work is done."""
        self._mark_lost(self.rank)

    def wait_for_lost_rank(self) -> int | None:
        """The rank that has ended, None when all turn out to live; blocks until that is known.

        torchrun ends all ranks when one has ended, and reports which: under it only a rank that announced its failure
        is waited for.
        """
        self.detected.wait(3 * INTERVAL if "TORCHELASTIC_RUN_ID" in os.environ else 2 * self.lost_after)
        return self.lost

    def stop(self) -> None:
        """End the heartbeat: this rank's work is done."""
        self.stopped.set()
        self.thread.join()

    def _run(self) -> None:
        count, last_seen, since = 0, "", time.monotonic()
        try:
            while not self.stopped.wait(INTERVAL):
                count += 1
                self.store.set(str(self.rank), str(count))
                if self.store.check(["lost"]):
                    return self._end(int(self.store.get("lost")))
                seen = self._counter(self.next_rank)
                if seen != last_seen:
                    last_seen, since = seen, time.monotonic()
                elif seen != FINISHED and time.monotonic() - since > self.lost_after:
                    self._mark_lost(self.next_rank)
            self.store.set(str(self.rank), FINISHED)
        except (RuntimeError, OSError):  # the store ends with the rank or the launcher that holds it
            if not self.stopped.is_set():
                self._end(0)

    def _counter(self, rank: int) -> str:
        return self.store.get(str(rank)).decode() if self.store.check([str(rank)]) else ""

    def _mark_lost(self, rank: int) -> None:
        if not self.store.check(["lost"]):
            self.store.set("lost", str(rank))

    def _end(self, rank: int) -> None:
        """Wake the main thread, which waits after a failed collective; end the process if it hangs in one instead."""
        self.lost = rank
        self.detected.set()
        if rank == self.rank or self.stopped.wait(10 * INTERVAL):
            return
        print(f"puna: {rank_lost_message(rank)}", file=sys.stderr, flush=True)
        os._exit(1)


def rank_lost_message(rank: int | None) -> str:
    """What the other ranks report when `rank` has ended; None where it isn't known which."""
    name = "Another rank" if rank is None else f"Rank {rank}"
    reported_by = "torchrun's report" if rank is None else "its own message"
    return f"{name} has ended and this one ends with it; {reported_by} says why, and the last checkpoint is complete."
