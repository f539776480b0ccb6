"""Running puna on every device of one or several machines by torchrun, with the exit code of the rank that failed."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence


def torchrun_arguments(
    command: Sequence[str], *, nproc: int, nnodes: int = 1, rendezvous: str | None = None
) -> list[str]:
    """torchrun's arguments for `puna COMMAND` in `nproc` processes on each of `nnodes` machines.

    `rendezvous`: HOST:PORT of the first machine; None on a single one. torchrun would parse options of the command
    that abbreviate its own, such as --n; the `--` prevents that.
    """
    flags = [f"--nproc-per-node={nproc}"]
    if rendezvous is None:
        flags.append("--standalone")
    else:
        flags += [f"--nnodes={nnodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={rendezvous}", "--rdzv-id=puna"]
    return [*flags, "-m", "puna", "--", *command]


def run_ranks(arguments: Sequence[str]) -> int:
    """Runs torchrun in this process. Returns the exit code of the first rank that failed, or 128 + a signal's number.

    A failing rank has printed its own error, so torchrun's report and traceback are left out.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.disable(logging.ERROR)
    try:
        run(parse_args(list(arguments)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        memory = ", most likely because memory ran out" if name == "SIGKILL" else ""
        print(f"puna: Rank {rank} was ended by {name}{memory}.", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def threads_per_rank(ranks: int) -> int:
    """OpenMP threads of each rank, so that the ranks of a machine together have no more than it has cores."""
    return max(1, (os.cpu_count() or 1) // ranks)
