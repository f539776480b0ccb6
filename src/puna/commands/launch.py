"""`puna launch`: a run on several devices by torchrun, or the manifest with which Slurm or Kubernetes start it there.

puna needs no launcher of its own; this saves remembering torchrun's flags, and keeps the manifests in line with them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

from puna.cluster.kubernetes import job_manifest
from puna.cluster.slurm import sbatch_script
from puna.cluster.torchrun import threads_per_rank, torchrun_arguments
from puna.errors import UserError
from puna.options import argument, option


@dataclass(kw_only=True)
class LaunchOptions:
    """Run a verb on several devices or machines by torchrun, Slurm or Kubernetes.

    With --slurm or --k8s the job script or manifest is printed and nothing is run.

    Examples:
      puna launch --nproc 2 train run.yaml --mesh.tp 2
      puna launch --nproc 8 --nnodes 4 --rendezvous node0:29500 train run.yaml
      puna launch --nproc 8 --nnodes 4 --slurm train run.yaml > job.sh
      puna launch --nproc 8 --nnodes 4 --k8s --image registry/puna:latest train run.yaml > job.yaml
    """

    command: tuple[str, ...] = argument("the verb and its arguments, all that follows", default=(), rest=True)
    nproc: int = option(1, "processes on each node, one a device")
    nnodes: int = option(1, "machines")
    rendezvous: str | None = option(None, "HOST:PORT of the first node, where the nodes meet")
    slurm: bool = option(False, "print an sbatch script")
    k8s: bool = option(False, "print a Kubernetes Job with its Service")
    name: str = option("puna", "manifests: the job's name")
    gpus: bool = option(True, "manifests: request a GPU for each process")
    cpus: int = option(8, "manifests: CPU cores per process")
    time: str = option("24:00:00", "Slurm: longest time of the job")
    image: str | None = option(None, "Kubernetes: container image with puna")
    volume: str = option("workspace", "Kubernetes: claim of the volume that all pods share, mounted as /workspace")


def run(options: LaunchOptions) -> int:
    """Returns torchrun's exit code, or 0 after printing a manifest."""
    if options.nnodes < 1 or options.nproc < 1:
        raise UserError(f"--nnodes {options.nnodes} and --nproc {options.nproc} must be at least 1.")
    if not options.command:
        raise UserError("puna launch needs the verb to run and its arguments: puna launch --nproc 2 train run.yaml.")
    if options.slurm and options.k8s:
        raise UserError("--slurm and --k8s are two manifests: choose one.")
    if options.slurm or options.k8s:
        print(manifest(options))
        return 0
    if options.nnodes > 1 and options.rendezvous is None:
        raise UserError("more than one node needs --rendezvous HOST:PORT, the address of the first node.")
    arguments = torchrun_arguments(
        options.command, nproc=options.nproc, nnodes=options.nnodes, rendezvous=options.rendezvous
    )
    environment = {"OMP_NUM_THREADS": str(threads_per_rank(options.nproc))} | os.environ
    try:
        return subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *arguments], env=environment, check=False
        ).returncode
    except KeyboardInterrupt:  # torchrun has passed it on and waited for its ranks
        return 130


def manifest(options: LaunchOptions) -> str:
    """The sbatch script or the Kubernetes manifest."""
    if options.slurm:
        return sbatch_script(
            options.command,
            nproc=options.nproc,
            nnodes=options.nnodes,
            name=options.name,
            gpus=options.gpus,
            cpus=options.cpus,
            time=options.time,
        )
    if options.image is None:
        raise UserError("--k8s needs --image, a container image with puna.")
    return job_manifest(
        options.command,
        nproc=options.nproc,
        nnodes=options.nnodes,
        name=options.name,
        gpus=options.gpus,
        cpus=options.cpus,
        image=options.image,
        volume=options.volume,
    )
