"""The safetensors file format: a JSON header over raw tensors. Mapped for reading, streamed for writing.

The safetensors package writes a file from tensors that are all in memory at once; here the header goes first and each
tensor follows as it is read. Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna import files
from puna.errors import UserError
from puna.weights.checkpoint import TensorInfo

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors package


@dataclass(frozen=True)
class Mapped:
    """A safetensors file whose tensors are read by touching its pages, in no other memory."""

    path: Path
    tensors: dict[str, TensorInfo]
    starts: dict[str, int]  # of each tensor, in bytes from the beginning of the file
    data: Tensor  # the whole file, uint8

    def read(self, name: str) -> Tensor:
        """The tensor as a view of the file; don't write into it."""
        info = self.tensors[name]
        raw = self.data[self.starts[name] : self.starts[name] + info.nbytes]
        if self.starts[name] % info.dtype.itemsize:  # old files don't pad their header to a multiple of 8
            raw = raw.clone()
        return raw.view(info.dtype).view(info.shape)


def open_file(path: Path) -> Mapped:
    """Maps the file and checks its header: bounded, well-formed, tensors side by side up to the end of the file.

    Raises `UserError` for anything else, such as an incomplete download.
    """
    with files.open_file(path) as file:
        prefix = file.read(8)
        size = os.fstat(file.fileno()).st_size
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise UserError(f"{path} is cut off or no safetensors file: its header of {length:,} bytes is impossible")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        unknown = {name: entry["dtype"] for name, entry in header.items() if entry["dtype"] not in DTYPES}
        if unknown and all(re.fullmatch("[A-Z][A-Z0-9_]{0,20}", dtype) for dtype in unknown.values()):
            name, dtype = next(iter(unknown.items()))
            raise UserError(f"{path} stores {name} as {dtype}, a data type that puna doesn't read.")
        entries = {name: _entry(entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged: its safetensors header can't be read; fetch the file again") from None
    tensors, starts, end = {}, {}, 8 + length
    for name, (info, start, stop) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if 8 + length + start != end or stop - start != info.nbytes:
            raise UserError(f"{path} is damaged: the place of tensor {name} in it is impossible; fetch the file again")
        tensors[name], starts[name], end = info, end, end + info.nbytes
    if end != size:
        raise UserError(f"{path} is cut off or damaged: it has {size:,} bytes where its header says {end:,}")
    return Mapped(path, tensors, starts, files.map_file(path))


def _entry(entry: dict[str, Any]) -> tuple[TensorInfo, int, int]:
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int or not 0 <= number < 1 << 62 for number in (*shape, start, stop)):
        raise ValueError
    if math.prod(shape) >= 1 << 62:
        raise ValueError
    return TensorInfo(shape, DTYPES[entry["dtype"]]), start, stop


def write_file(path: Path, tensors: Mapping[str, TensorInfo], read: Callable[[str], Tensor]) -> None:
    """Writes `read(name)` for each of `tensors`, one in memory at a time."""
    # Wide types first, so that each tensor stays aligned; within a type the given order.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        info = tensors[name]
        stop = start + info.nbytes
        header[name] = {"dtype": NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(_bytes(name, read(name), tensors[name]))


def _bytes(name: str, tensor: Tensor, info: TensorInfo) -> memoryview:
    if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, announced as {info}")
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
