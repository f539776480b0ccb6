"""Joining the other ranks when torchrun started this process as one of several, and serving rank 0 as one of them."""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from puna.errors import UserError
from puna.parallel.tp_inference import RankLost, TensorParallel


def start(device: str) -> TensorParallel | None:
    """The group of all ranks that torchrun started; None for a process that runs alone.

    NCCL carries tensors between GPUs, gloo between CPUs. The ranks wait for rank 0 as long as its user thinks (a chat),
    so the group that carries requests has no timeout to speak of; it fails at once when a rank ends.
    Raises UserError when the ranks cannot be placed or when this process has joined a group before.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return None
    if dist.is_initialized():
        raise UserError(
            "this process has joined its ranks already: under torchrun a script makes one LLM, which sets up"
            " torch.distributed, and the other ranks leave with it."
        )
    on_gpu = torch.cuda.is_available() and device.startswith(("auto", "cuda"))
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    except ValueError as error:
        raise UserError(
            f"WORLD_SIZE is {size}, but torchrun started no ranks: {error}; use it or unset that."
        ) from None
    control = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    assert dist.group.WORLD is not None
    tp = TensorParallel(dist.get_rank(), size, dist.group.WORLD, control)
    atexit.register(tp.shutdown)
    with tp.raise_together():
        if on_gpu:
            _take_gpu(device, int(os.environ["LOCAL_RANK"]))
    return tp


def _take_gpu(device: str, local_rank: int) -> None:
    if ":" in device:
        raise UserError(f"under torchrun each rank takes a GPU of its own; use --device cuda, not {device}.")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"torchrun started more ranks than this machine has GPUs ({torch.cuda.device_count()});"
            " lower --nproc-per-node or use --device cpu."
        )
    torch.cuda.set_device(local_rank)


def serve(run_worker: Callable[[], None]) -> NoReturn:
    """What a rank other than 0 does once the model is there, until rank 0 lets it go; then its process ends.

    It says nothing: when rank 0 is gone without a word to it, rank 0 or torchrun has told the user.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all ranks, and rank 0 decides what it ends
    try:
        run_worker()
    except RankLost:
        raise SystemExit(1) from None
    raise SystemExit(0)
