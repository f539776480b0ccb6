"""The arguments of a torchrun that runs puna on every device of one or several machines."""

from __future__ import annotations

import os
from collections.abc import Sequence


def torchrun_arguments(
    command: Sequence[str], *, nproc: int, nnodes: int = 1, rendezvous: str | None = None
) -> list[str]:
    """torchrun's arguments for `puna COMMAND` in `nproc` processes on each of `nnodes` machines.

    `rendezvous`: HOST:PORT of the first machine; None on a single one.
    """
    flags = [f"--nproc-per-node={nproc}"]
    if rendezvous is None:
        flags.append("--standalone")
    else:
        flags += [f"--nnodes={nnodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={rendezvous}", "--rdzv-id=puna"]
    return [*flags, "-m", "puna", *command]


def threads_per_rank(ranks: int) -> int:
    """OpenMP threads of each rank, so that the ranks of a machine together have no more than it has cores."""
    return max(1, (os.cpu_count() or 1) // ranks)
