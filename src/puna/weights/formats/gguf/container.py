"""The GGUF container: header, metadata and tensor index of a memory-mapped file, all untrusted.

Every count, length and offset is checked against the size of the file before use, so that a truncated or hostile file
gives a one-sentence error and costs no memory. The gguf package's own reader does neither, and makes numpy arrays of
every string (seconds and hundreds of megabytes for a vocabulary of 128k); its tables of types and its dequantisation
are used as they are. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from puna.errors import UserError
from puna.files import open_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # where general.alignment doesn't say otherwise

UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?",
           UINT64: "<Q", 11: "<q", 12: "<d"}  # fmt: skip
TENSOR_ENTRY_BYTES = 8 + 4 + 4 + 8  # minimum size in the index: name length, dimensions, type, offset
FIELD_BYTES = 8 + 4 + 1


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor as stored. `shape` is in row-major order (GGUF writes it reversed), `offset` is from the file's start,
    `block` elements of a row are stored in `block_bytes` bytes."""

    shape: tuple[int, ...]
    type: str
    offset: int
    block: int
    block_bytes: int
    data: np.memmap

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.block * self.block_bytes

    def rows(self) -> np.ndarray:
        """The stored bytes, uint8 [rows, bytes of a row], mapped. A vector is as many rows of one element."""
        whole = self.data[self.offset : self.offset + self.nbytes]
        return whole.reshape(self.shape[0] if len(self.shape) == 1 else math.prod(self.shape[:-1]), -1)


@dataclass(frozen=True)
class GGUFFile:
    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that starts as a GGUF file does."""
    with open_file(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf(path: Path) -> GGUFFile:
    """Reads metadata and tensor index, maps the data. Raises `UserError` for anything but a whole GGUF file."""
    if not is_gguf(path):
        raise UserError(f"{path} is not a GGUF file: it doesn't start with {MAGIC.decode()}")
    cursor = _Cursor(path)
    cursor.offset = len(MAGIC)
    version = cursor.scalar(UINT32)
    if version not in VERSIONS:
        kind = "big-endian GGUF" if version & 0xFFFF == 0 else f"GGUF version {version}"
        raise UserError(f"{path} is {kind}, puna reads little-endian versions 2 and 3: convert it again with llama.cpp")
    tensor_count = cursor.count(TENSOR_ENTRY_BYTES, "tensors")
    field_count = cursor.count(FIELD_BYTES, "metadata fields")

    metadata: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.name()
        if key in metadata:
            cursor.fail(f"metadata key {key} is in it twice")
        metadata[key] = cursor.value(cursor.scalar(UINT32))

    entries = [_tensor_entry(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        cursor.fail(f"its alignment is {alignment}")
    start = -(-cursor.offset // alignment) * alignment

    tensors: dict[str, GGUFTensor] = {}
    for name, shape, type_id, offset in entries:
        if name in tensors:
            cursor.fail(f"tensor {name} is in it twice")
        tensors[name] = _tensor(cursor, name, shape, type_id, start + offset)
    return GGUFFile(path, version, metadata, tensors)


def write_file(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[tuple[int, ...], str]],
    chunks: Callable[[str], Iterable[np.ndarray]],
) -> None:
    """Writes a version 3 file: header, `metadata`, index of `tensors` (row-major shape and type), then for each tensor
    its bytes as `chunks(name)` gives them, one chunk in memory at a time.

    Python ints go out as uint32 (int32 in lists), floats as float32.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    sizes: dict[str, int] = {}
    index, offset = b"", 0
    for name, (shape, kind) in tensors.items():
        number = GGMLQuantizationType[kind]
        block, block_bytes = GGML_QUANT_SIZES[number]
        sizes[name] = math.prod(shape) // block * block_bytes
        index += _pack(name)[1] + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), number, offset)
        offset += sizes[name] + -sizes[name] % ALIGNMENT
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata)))
        for key, value in metadata.items():
            kind_of_value, packed = _pack(value)
            file.write(_pack(key)[1] + struct.pack("<I", kind_of_value) + packed)
        file.write(index)
        for name, size in sizes.items():
            file.write(bytes(-file.tell() % ALIGNMENT))
            start = file.tell()
            for chunk in chunks(name):
                file.write(chunk.data)
            if file.tell() - start != size:
                raise ValueError(f"{name} has {file.tell() - start} bytes, announced as {size}")
        file.write(bytes(-file.tell() % ALIGNMENT))


def _pack(value: Any, whole: int = UINT32) -> tuple[int, bytes]:
    """A metadata value: its type and its bytes."""
    if isinstance(value, str):
        raw = value.encode()
        return STRING, struct.pack("<Q", len(raw)) + raw
    if isinstance(value, list):
        items = [_pack(item, INT32) for item in value]
        kinds = {kind for kind, _ in items}
        if len(kinds) != 1:
            raise ValueError(f"a GGUF array holds values of one type, not {kinds or 'nothing'}")
        return ARRAY, struct.pack("<IQ", *kinds, len(items)) + b"".join(raw for _, raw in items)
    kind = BOOL if isinstance(value, bool) else whole if isinstance(value, int) else FLOAT32
    return kind, struct.pack(SCALARS[kind], value)


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.name()
    dimensions = cursor.scalar(UINT32)
    if not 1 <= dimensions <= 4:
        cursor.fail(f"tensor {name} has {dimensions} dimensions")
    shape = tuple(cursor.scalar(UINT64) for _ in range(dimensions))[::-1]
    return name, shape, cursor.scalar(UINT32), cursor.scalar(UINT64)


def _tensor(cursor: _Cursor, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> GGUFTensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(type_id)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise UserError(
            f"{cursor.path}: tensor {name} has type {type_id}, which the installed gguf package doesn't know;"
            " update it with pip install -U gguf"
        ) from None
    if 0 in shape or shape[-1] % block:
        cursor.fail(f"tensor {name} of shape {list(shape)} can't be stored as {kind.name}")
    tensor = GGUFTensor(shape, kind.name, offset, block, block_bytes, cursor.data)
    if offset + tensor.nbytes > cursor.size:
        cursor.fail(f"tensor {name} ends {offset + tensor.nbytes - cursor.size:,} bytes behind the end of the file")
    return tensor


class _Cursor:
    """Reads a mapped file front to back, within its bounds."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0
        self.data = np.memmap(path, dtype=np.uint8, mode="r")
        self.size = len(self.data)
        self.bytes = self.data.data  # slices of it are cheaper than those of an array

    def fail(self, what: str) -> NoReturn:
        raise UserError(f"{self.path} is damaged, {what}: fetch or convert it again")

    def take(self, size: int) -> memoryview:
        if size > self.size - self.offset:
            self.fail("it ends in the middle of its header")
        self.offset += size
        return self.bytes[self.offset - size : self.offset]

    def scalar(self, kind: int) -> Any:
        layout = SCALARS[kind]
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def count(self, least: int, of: str) -> int:
        """A count of items of at least `least` bytes each, checked against the rest of the file."""
        number = self.scalar(UINT64)
        if number > (self.size - self.offset) // least:
            self.fail(f"it says that it has {number:,} {of}")
        return int(number)

    def string(self) -> str:
        raw = self.take(self.scalar(UINT64))
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            self.fail("a string in its header isn't UTF-8")

    def name(self) -> str:
        name = self.string()
        return name if name.isprintable() else self.fail("a name in its header isn't one")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(kind)
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            self.fail(f"its metadata has a value of type {kind}")
        item = self.scalar(UINT32)
        if item == STRING:
            return [self.string() for _ in range(self.count(8, "strings in an array"))]
        if item not in SCALARS:
            self.fail(f"its metadata has an array of type {item}")
        layout = np.dtype(SCALARS[item])
        items = self.count(layout.itemsize, "items in an array")
        return np.frombuffer(self.take(items * layout.itemsize), layout).tolist()
