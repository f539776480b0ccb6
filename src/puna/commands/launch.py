"""`puna launch`: a run on several devices by torchrun, or the manifest with which Slurm or Kubernetes start it there.

puna needs no launcher of its own; what it saves is remembering torchrun's flags, and having the manifests fit them.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import yaml

from puna.errors import UserError
from puna.option_sets import LaunchOptions


def run(options: LaunchOptions) -> int:
    """The verb: torchrun's exit code, or 0 after printing a manifest."""
    if options.nnodes < 1 or options.nproc < 1:
        raise UserError(f"--nnodes {options.nnodes} and --nproc {options.nproc} must be at least 1.")
    if not options.command:
        raise UserError("puna launch needs the verb to run and its arguments: puna launch --nproc 2 train run.yaml.")
    if options.slurm and options.k8s:
        raise UserError("--slurm and --k8s are two manifests: choose one.")
    if options.slurm:
        print(slurm(options))
        return 0
    if options.k8s:
        print(kubernetes(options))
        return 0
    if options.nnodes > 1 and options.rendezvous is None:
        raise UserError("more than one node needs --rendezvous HOST:PORT, the address of the first node.")
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun(options)]
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(_threads(options.nproc))}
    try:
        return subprocess.run(command, env=os.environ | threads, check=False).returncode
    except KeyboardInterrupt:  # torchrun has passed it on and waited for its ranks
        return 130


def torchrun(options: LaunchOptions, rendezvous: str | None = None) -> list[str]:
    """torchrun's arguments for the run."""
    where = rendezvous or options.rendezvous
    flags = [f"--nproc-per-node={options.nproc}"]
    if where is None:
        flags.append("--standalone")
    else:
        flags += [f"--nnodes={options.nnodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={where}", "--rdzv-id=puna"]
    return [*flags, "-m", "puna", *options.command]


def slurm(options: LaunchOptions) -> str:
    """An sbatch script: one torchrun a node, which meet at the first one. A stopped job is queued again and resumes."""
    flags = shlex.join(torchrun(options, "RENDEZVOUS")).replace("RENDEZVOUS", '"$head:29500"')
    gpus = f"#SBATCH --gpus-per-node={options.nproc}\n" if options.gpus else ""
    return f"""#!/bin/bash
#SBATCH --job-name={options.name}
#SBATCH --nodes={options.nnodes}
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task={options.nproc * options.cpus}
{gpus}#SBATCH --time={options.time}
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --output=%x-%j.log

set -euo pipefail
export OMP_NUM_THREADS={options.cpus}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun {flags}"""


def kubernetes(options: LaunchOptions) -> str:
    """A Service and an indexed Job: one pod a node, which meet at the first one by its name."""
    if options.image is None:
        raise UserError("--k8s needs --image, a container image with puna.")
    name = options.name
    limits: dict[str, object] = {"cpu": options.nproc * options.cpus}
    if options.gpus:
        limits["nvidia.com/gpu"] = options.nproc
    container = {
        "name": "puna",
        "image": options.image,
        "command": ["torchrun", *torchrun(options, f"{name}-0.{name}:29500")],
        "env": [{"name": "OMP_NUM_THREADS", "value": str(options.cpus)}],
        "ports": [{"containerPort": 29500}],
        "resources": {"limits": limits},
        "volumeMounts": [{"name": "work", "mountPath": "/workspace"}, {"name": "shm", "mountPath": "/dev/shm"}],
        "workingDir": "/workspace",
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": name}},
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "completionMode": "Indexed",
            "completions": options.nnodes,
            "parallelism": options.nnodes,
            "backoffLimit": 3 * options.nnodes,
            "template": {
                "spec": {
                    "subdomain": name,
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": 120,
                    "containers": [container],
                    "volumes": [
                        {"name": "work", "persistentVolumeClaim": {"claimName": options.volume}},
                        {"name": "shm", "emptyDir": {"medium": "Memory"}},
                    ],
                }
            },
        },
    }
    return yaml.safe_dump_all([service, job], sort_keys=False).rstrip()


def _threads(processes: int) -> int:
    """Threads of each rank, so that together they have no more than the machine has cores."""
    return max(1, (os.cpu_count() or 1) // processes)
