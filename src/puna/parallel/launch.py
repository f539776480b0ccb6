"""Joining the other ranks when torchrun started this process as one of several."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from puna.errors import UserError
from puna.parallel.tensor import TensorParallel


def start(device: str) -> TensorParallel | None:
    """The group of all ranks that torchrun started; None for a process that runs alone.

    NCCL carries tensors between GPUs, gloo between CPUs. The ranks wait for rank 0 as long as its user thinks (a chat),
    so the group that carries requests has no timeout to speak of; torchrun ends all ranks when one dies.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return None
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started more ranks than this machine has GPUs ({torch.cuda.device_count()});"
                " lower --nproc-per-node or use --device cpu."
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    control = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    assert dist.group.WORLD is not None
    return TensorParallel(dist.get_rank(), size, dist.group.WORLD, control)
