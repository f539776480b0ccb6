"""An sbatch script that starts one torchrun a node."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from puna.cluster.torchrun import torchrun_arguments


def sbatch_script(
    command: Sequence[str], *, nproc: int, nnodes: int, name: str, gpus: bool, cpus: int, time: str
) -> str:
    """The script for `puna COMMAND`. The ranks meet at the first node; a stopped job is queued again and resumes."""
    arguments = torchrun_arguments(command, nproc=nproc, nnodes=nnodes, rendezvous="RENDEZVOUS")
    flags = shlex.join(arguments).replace("RENDEZVOUS", '"$head:29500"')
    request = f"#SBATCH --gpus-per-node={nproc}\n" if gpus else ""
    return f"""#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nnodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={nproc * cpus}
{request}#SBATCH --time={time}
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=%x-%j.log

set -euo pipefail
export OMP_NUM_THREADS={cpus}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun {flags}"""
