"""How many blocks the KV cache gets: what was asked for, or what the free memory holds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from puna.engine.runner import cache_shape
from puna.errors import UserError
from puna.model.llama import Llama
from puna.parallel.tensor import TensorParallel

GPU_SHARE = 0.85  # of the free memory once the weights are there; the rest is for activations and graphs
CPU_SHARE = 0.5  # of the available memory: others live there too. Pages are only taken when they are used
MEMINFO = Path("/proc/meminfo")
GROUPS = (  # a container's limit, and what of it is in use: version 2 of Linux's control groups, and version 1
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.stat"), "anon"),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.stat"), "total_rss"),
)


def cache_blocks(
    model: Llama,
    block_size: int,
    max_model_len: int,
    max_sequences: int,
    tokens: int | None,
    tp: TensorParallel | None,
) -> int:
    """Blocks of `block_size` positions; the same on every rank.

    `tokens` asks for that many positions. Else as many as fit, but no more than `max_sequences` of the longest could
    use. Raises UserError when not even one block fits.
    """
    if tokens is not None:
        if tokens < block_size:
            raise UserError(f"a cache of {tokens} tokens is less than one block of {block_size}; raise --kv-tokens.")
        return tokens // block_size
    weight = model.embed_tokens.weight
    block_bytes = torch.Size(cache_shape(model, 1, block_size)).numel() * weight.dtype.itemsize
    blocks = free_bytes(weight.device) // block_bytes
    if tp is not None:
        blocks = tp.least(blocks)
    if blocks < 1:
        raise UserError("no memory is left for the KV cache; use a smaller dtype, more ranks or another device.")
    return min(blocks, max_sequences * -(-max_model_len // block_size))


def free_bytes(device: torch.device) -> int:
    """Bytes that the cache may take on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * GPU_SHARE)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(min(_machine_room(), _container_room()) * CPU_SHARE / ranks_here)


def _machine_room() -> int:
    """Bytes that could be allocated without swapping: Linux's own estimate, else half of the physical memory."""
    try:
        words = MEMINFO.read_text().split()
        return int(words[words.index("MemAvailable:") + 1]) * 1024
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _container_room() -> int:
    """Bytes left under the limit of this container, which the machine's own numbers don't show."""
    for limit, stat, used in GROUPS:
        try:
            words = stat.read_text().split()
            return max(0, int(limit.read_text()) - int(words[words.index(used) + 1]))
        except (OSError, ValueError):  # no such file, or the limit is "max"
            continue
    return sys.maxsize
