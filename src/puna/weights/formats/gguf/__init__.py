"""GGUF, llama.cpp's file format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.weights.formats.format import FLOATS, Format

if TYPE_CHECKING:
    from torch import Tensor

    from puna.weights.checkpoint import Checkpoint


def _detect(path: Path) -> bool:
    """Whether `path` is a GGUF file, or a directory with one."""
    from puna.weights.formats.gguf.container import is_gguf

    return any(path.glob("*.gguf")) if path.is_dir() else path.suffix == ".gguf" or is_gguf(path)


def _open(path: Path) -> Checkpoint:
    from puna.weights.formats.gguf.reader import open_gguf

    return open_gguf(path)


def _check(source: Checkpoint, dtype: Any, options: Any) -> None:
    from puna.weights.formats.gguf.writer import check_gguf

    check_gguf(source, dtype)


def _write(source: Checkpoint, dst: Path, dtype: Any, options: Any) -> None:
    from puna.weights.formats.gguf.writer import write_gguf

    write_gguf(source, dst, dtype)


def _stored(tensor: Tensor, dtype: Any) -> Tensor:
    from puna.weights.formats.gguf.writer import stored

    return stored(tensor, dtype)


FORMAT = Format(
    name="gguf",
    summary="a GGUF file of llama.cpp, or a directory with one, split files too",
    rope_order="interleaved",
    detect=_detect,
    open=_open,
    write=_write,
    check=_check,
    dtypes=FLOATS | {"q8_0": 34 / 32},  # a block of 32 numbers takes 34 bytes
    stored=_stored,
    weight_files=(r".*\.gguf",),
)
