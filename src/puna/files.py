"""Small files read with care, large ones mapped."""

from __future__ import annotations

import json
import mmap
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from puna.errors import UserError

MAX_JSON = 256 << 20  # bytes; the largest index of a published model has some megabytes
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `UserError` when it can't be read or is damaged."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise UserError(f"{path} is too large for what it should be; fetch it again")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it isn't JSON; fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; fetch it again")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def map_file(path: Path) -> torch.Tensor:
    """The bytes of a file that isn't empty, uint8 [size], read when they are touched.

    The mapping is private, so that a write into it never reaches the file, and reserves no memory: a file may be larger
    than the machine's memory, which `torch.from_file` refuses on Linux.
    """
    with path.open("rb") as file:
        if sys.platform == "linux":
            flags, prot = mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            mapped = mmap.mmap(file.fileno(), 0, flags=flags, prot=prot)
        else:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(mapped, dtype=torch.uint8)
