"""A Kubernetes Job with one pod a node, and the Service by which the pods find each other."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from puna.cluster.torchrun import torchrun_arguments


def job_manifest(
    command: Sequence[str],
    *,
    nproc: int,
    nnodes: int,
    name: str,
    gpus: bool,
    cpus: int,
    image: str,
    volume: str,
) -> str:
    """The YAML for `puna COMMAND`: a headless Service and an indexed Job whose pods meet at the first one."""
    limits: dict[str, object] = {"cpu": nproc * cpus}
    if gpus:
        limits["nvidia.com/gpu"] = nproc
    arguments = torchrun_arguments(command, nproc=nproc, nnodes=nnodes, rendezvous=f"{name}-0.{name}:29500")
    container = {
        "name": "puna",
        "image": image,
        "command": ["torchrun", *arguments],
        "env": [{"name": "OMP_NUM_THREADS", "value": str(cpus)}],
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
            "completions": nnodes,
            "parallelism": nnodes,
            "backoffLimit": 3 * nnodes,
            "template": {
                "spec": {
                    "subdomain": name,
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": 120,
                    "containers": [container],
                    "volumes": [
                        {"name": "work", "persistentVolumeClaim": {"claimName": volume}},
                        {"name": "shm", "emptyDir": {"medium": "Memory"}},
                    ],
                }
            },
        },
    }
    return yaml.safe_dump_all([service, job], sort_keys=False).rstrip()
