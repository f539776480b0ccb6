"""`puna launch`: a run on several devices by torchrun, or the manifest with which Slurm or Kubernetes start it there.

A wrapper of torchrun and its flags, which the manifests share.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from puna.cluster.kubernetes import job_manifest
from puna.cluster.slurm import sbatch_script
from puna.cluster.torchrun import run_ranks, threads_per_rank, torchrun_arguments
from puna.commands import command, split_verb
from puna.errors import UserError
from puna.options import argument, option, parse

ENDPOINT = re.compile(r"([\w.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")  # HOST:PORT, [IPv6]:PORT


@dataclass(kw_only=True)
class LaunchOptions:
    """Run a verb on several devices or machines by torchrun, Slurm or Kubernetes.

    With --slurm or --k8s the job script or manifest is printed and nothing is run. The exit code is that of the rank
    that failed first. puna's own options end where the verb begins.

    Examples:
      puna launch --nproc 2 train run.yaml --mesh.tp 2
      puna launch --nproc 8 --nnodes 4 --rendezvous node0:29500 train run.yaml
      puna launch --nproc 8 --nnodes 4 --slurm train run.yaml > job.sh
      puna launch --nproc 8 --nnodes 4 --k8s --image registry/puna:latest train run.yaml > job.yaml
    """

    command: tuple[str, ...] = argument("the verb and its arguments, all that follows", default=(), rest=True)
    nproc: int = option(1, "processes on each node, one a device", minimum=1)
    nnodes: int = option(1, "machines", minimum=1)
    rendezvous: str | None = option(None, "HOST:PORT of the first node, for the rendezvous; manifests determine it")
    slurm: bool = option(False, "print an sbatch script")
    k8s: bool = option(False, "print a Kubernetes Job with its Service")
    name: str = option("puna", "manifests: the job's name")
    gpus: bool = option(True, "manifests: request a GPU for each process")
    cpus: int = option(8, "manifests: CPU cores per process", minimum=1)
    time: str = option("24:00:00", "Slurm: longest time of the job")
    image: str | None = option(None, "Kubernetes: container image with puna")
    volume: str = option("workspace", "Kubernetes: claim of the volume that all pods share, mounted as /workspace")


def run(options: LaunchOptions) -> int:
    """Returns the exit code of the rank that failed first, or 0 after printing a manifest."""
    if not options.command:
        raise UserError("puna launch needs the verb to run and its arguments: puna launch --nproc 2 train run.yaml.")
    if options.slurm and options.k8s:
        raise UserError("--slurm and --k8s are two manifests: choose one.")
    if options.k8s and options.image is None:
        raise UserError("--k8s needs --image, a container image with puna.")
    if options.rendezvous is not None and not ENDPOINT.fullmatch(options.rendezvous):
        raise UserError(f"--rendezvous takes HOST:PORT, as node0:29500, not {options.rendezvous!r:.200}.")
    manifest_only = options.slurm or options.k8s
    check_command(options.command, files_are_here=not manifest_only)
    if manifest_only:
        print(manifest(options))
        return 0
    if options.nnodes > 1 and options.rendezvous is None:
        raise UserError("More than one node needs --rendezvous HOST:PORT, the address of the first node.")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(options.nproc)))
    return run_ranks(
        torchrun_arguments(options.command, nproc=options.nproc, nnodes=options.nnodes, rendezvous=options.rendezvous)
    )


def check_command(words: Sequence[str], *, files_are_here: bool) -> None:
    """Raises UserError for a verb or options that every rank would refuse. YAML files may be on another machine."""
    verb, rest = split_verb(words)
    if verb == "launch":
        raise UserError("puna launch runs a verb other than launch.")
    missing = [word for word in rest if word.endswith((".yaml", ".yml")) and not Path(word).exists()]
    if files_are_here or not missing:
        with redirect_stderr(StringIO()):  # notes on former spellings are the first rank's
            parse(verb, command(verb)[1], rest)


def manifest(options: LaunchOptions) -> str:
    """The sbatch script or the Kubernetes manifest."""
    settings: Any = {
        "nproc": options.nproc,
        "nnodes": options.nnodes,
        "name": options.name,
        "gpus": options.gpus,
        "cpus": options.cpus,
        "rendezvous": options.rendezvous,
    }
    if options.slurm:
        return sbatch_script(options.command, time=options.time, **settings)
    return job_manifest(options.command, image=options.image or "", volume=options.volume, **settings)
