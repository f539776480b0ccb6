"""`Format`, the record of a checkpoint format, from which help texts, readers and writers follow.

A format's file ends in such a record and imports torch only inside functions: help texts list the formats, and must not
wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from puna.weights.checkpoint import Checkpoint

    Dtype = torch.dtype | str | None  # None: each tensor's own; a name for a type of the format's own, such as q8_0

# Names of data types to write -> bytes per element; None: as many as the source's.
FLOATS: dict[str, float | None] = {"auto": None, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class NoOptions:
    """The write options of a format that has none."""


def _as_cast(tensor: Tensor, dtype: Any) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def _nothing(source: Checkpoint, dtype: Dtype, options: Any) -> None:
    return None


@dataclass(frozen=True)
class Format:
    """A checkpoint format.

    `name`, `aliases`: for the command line. `summary`: its form on disk, a noun phrase. `rope_order`: the order
    of the rows of q and k in its files. `weight_files`: regular expressions for its weight files in a Hub
    repository, preferred first.

    `detect(path)` says whether a file or directory is in this format, from names and first bytes. `open(path)` gives a
    `Checkpoint` in Hugging Face names and rotate-half order.

    For formats that are written: `write(source, dst, dtype, options)` writes the file or directory `dst`, which doesn't
    exist yet. `check(source, dtype, options)` raises `UserError`, naming it, for what the format can't hold, before
    anything is written. `options`: a dataclass of `puna.options.option` fields. `dtypes`: names of the data types that
    it writes, with bytes per element. `stored(tensor, dtype)`: the numbers that remain of a tensor, or of rows of it.
    """

    name: str
    summary: str
    rope_order: Literal["rotate-half", "interleaved"]
    detect: Callable[[Path], bool]
    open: Callable[[Path], Checkpoint]
    aliases: tuple[str, ...] = ()
    weight_files: tuple[str, ...] = ()
    write: Callable[[Checkpoint, Path, Any, Any], None] | None = None
    check: Callable[[Checkpoint, Any, Any], None] = _nothing
    options: type = NoOptions
    dtypes: Mapping[str, float | None] = field(default_factory=lambda: FLOATS)
    stored: Callable[[Tensor, Any], Tensor] = _as_cast
