"""A Kubernetes Job with one pod a node, and the Service by which the pods find each other."""

from __future__ import annotations

import re
from collections.abc import Sequence

import yaml

from puna.errors import UserError

PORT = 29500
LABEL = re.compile(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?")  # RFC 1035, short enough for the pods' suffixes
VOLUME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")  # RFC 1123 subdomain


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
    rendezvous: str | None = None,
) -> str:
    """The YAML for `puna COMMAND`: a headless Service and an indexed Job whose pods meet at `rendezvous` or the first.

    Raises UserError for names that Kubernetes doesn't take.
    """
    if not LABEL.fullmatch(name):
        raise UserError(
            f"--name {name!r} is not a name of Kubernetes: use at most 52 lower-case letters, digits and dashes,"
            " beginning with a letter."
        )
    if not VOLUME.fullmatch(volume):
        raise UserError(f"--volume {volume!r} is not a name of Kubernetes: use lower-case letters, digits and dashes.")
    if not image or image.split() != [image]:
        raise UserError(f"--image {image!r} is not the name of a container image.")
    limits: dict[str, object] = {"cpu": nproc * cpus}
    if gpus:
        limits["nvidia.com/gpu"] = nproc
    launch = ["puna", "launch", "--nproc", str(nproc), "--nnodes", str(nnodes)]
    launch += ["--rendezvous", rendezvous or f"{name}-0.{name}:{PORT}", "--", *command]
    container = {
        "name": "puna",
        "image": image,
        "command": launch,
        "env": [{"name": "OMP_NUM_THREADS", "value": str(cpus)}],
        "ports": [{"containerPort": PORT}],
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
