"""Joining the ranks that torchrun started, and the device that each of them takes; the same for inference and training.

torchrun describes a rank by environment variables: RANK of WORLD_SIZE, LOCAL_RANK of LOCAL_WORLD_SIZE on its machine,
MASTER_ADDR and MASTER_PORT of the rendezvous store.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from puna.errors import UserError, nearest

DEVICES = ("auto", "cpu", "cuda")


class RankLost(UserError):
    """Another rank has ended, and so the collective that this rank waited in has failed."""


def world_size() -> int:
    """The number of ranks that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def choose_device(device: str) -> str:
    """`cpu` or `cuda:N` for `auto`, `cpu`, `cuda` or `cuda:N`; under torchrun a rank's GPU is that of its local rank.

    Raises UserError for a device that doesn't exist, isn't supported, or is to be shared by several ranks.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        parsed = torch.device(device)
    except RuntimeError:
        raise UserError(f"There is no device {device!r}{nearest(device, DEVICES)}; use auto, cpu or cuda.") from None
    if parsed.type == "cpu":
        return "cpu"
    if parsed.type != "cuda":
        raise UserError(f"puna runs on cpu and cuda, not on {device!r}.")
    if not torch.cuda.is_available():
        raise UserError("The device is cuda, but torch sees no GPU here; use --device cpu.")
    gpus = torch.cuda.device_count()
    if world_size() == 1:
        index = torch.cuda.current_device() if parsed.index is None else parsed.index
        if index >= gpus:
            raise UserError(f"The device is {device}, but torch sees {gpus} GPU(s); use one below cuda:{gpus}.")
        return f"cuda:{index}"
    if parsed.index is not None:
        raise UserError(f"Under torchrun each rank takes a GPU of its own; use --device cuda, not {device}.")
    # By the number of ranks, not by this one's index: the ranks of a machine then agree.
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > gpus:
        raise UserError(
            f"torchrun started more ranks than this machine has GPUs ({gpus}); lower --nproc-per-node or use"
            " --device cpu."
        )
    return f"cuda:{os.environ['LOCAL_RANK']}"


def init_ranks(*, gpu: bool, timeout: timedelta | None = None) -> None:
    """Make the default process group of all ranks: gloo for CPU tensors, and NCCL for those of GPUs where `gpu`.

    `timeout`: after which a collective that not all ranks entered fails, by default torch's. Raises UserError where
    WORLD_SIZE is set but the rest of torchrun's environment is not.
    """
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timeout)
    except ValueError as error:
        raise UserError(
            f"WORLD_SIZE is {world_size()}, but torchrun started no ranks ({error}); start them by torchrun, or unset"
            " WORLD_SIZE."
        ) from None


def is_rank_lost(error: BaseException | None) -> bool:
    """Whether `error` is how a collective fails when another rank has ended; pipeline stages wrap it once more."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "connection closed", "nccl"))
        ):
            return True
        error = error.__cause__
    return False
