"""An sbatch script that starts `puna launch` on every node of a job."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence

from puna.errors import UserError

PORT = 29500
TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")  # sbatch --time: minutes, hours:minutes:seconds, days-hours ...
NAME = re.compile(r"[\w.-]+")


def sbatch_script(
    command: Sequence[str],
    *,
    nproc: int,
    nnodes: int,
    name: str,
    gpus: bool,
    cpus: int,
    time: str,
    rendezvous: str | None = None,
) -> str:
    """The script for `puna COMMAND` in `nproc` processes on each of `nnodes` nodes.

    The nodes meet at `rendezvous`, or at the first of them. They run this Python, so that its environment has to be on
    a file system that they share. Raises UserError for a name or time that sbatch doesn't take.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"--name {name!r} is not a job name: use letters, digits, dots and dashes.")
    if not TIME.fullmatch(time):
        raise UserError(f"--time {time!r} is not a time limit of Slurm: give HOURS:MINUTES:SECONDS or DAYS-HOURS.")
    request = f"#SBATCH --gpus-per-node={nproc}\n" if gpus else ""
    endpoint = shlex.quote(rendezvous) if rendezvous else f'"$head:{PORT}"'
    launch = f"launch --nproc {nproc} --nnodes {nnodes} --rendezvous {endpoint} -- {shlex.join(command)}"
    return f"""#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nnodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={nproc * cpus}
{request}#SBATCH --time={time}
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=%x-%j.log

# Queued again, to resume: after a preemption or a node failure (--requeue), and 120 seconds before the time limit, when
# a training saves its state and ends with 143. Errors and scancel end the job.
set -uo pipefail
export OMP_NUM_THREADS={cpus}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun {shlex.quote(sys.executable)} -m puna {launch}
status=$?
if [ "$status" -eq 143 ] && [ "$(date +%s)" -ge "$((${{SLURM_JOB_END_TIME:-9999999999}} - 180))" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status\""""
