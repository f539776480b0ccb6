"""Memory that a rank may allocate: what its GPU has free, or its part of what a machine shared by ranks has free."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")
GROUPS = (  # a container's limit, and what of it is in use: version 2 of Linux's control groups, and version 1
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.stat"), "anon"),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.stat"), "total_rss"),
)


def free_bytes(device: str | torch.device) -> int:
    """Bytes that this rank could allocate on a device. Pages of mapped files count as free: they can be dropped."""
    device = torch.device(device)
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, to be used again
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(_machine_free_bytes(), _container_free_bytes()) // ranks_here


def _machine_free_bytes() -> int:
    """Bytes that could be allocated without swapping: Linux's own estimate, elsewhere the physical memory."""
    try:
        words = MEMINFO.read_text().split()
        return int(words[words.index("MemAvailable:") + 1]) * 1024
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container_free_bytes() -> int:
    """Bytes left under the limit of this container, which the machine's own numbers don't show."""
    for limit, stat, used in GROUPS:
        try:
            words = stat.read_text().split()
            return max(0, int(limit.read_text()) - int(words[words.index(used) + 1]))
        except (OSError, ValueError):  # no such file, or the limit is "max"
            continue
    return sys.maxsize
