"""Tensors that are sharded over several files: assembled whole, or only the slice that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from puna.errors import UserError
from puna.weights.checkpoint import Index

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorShard:
    """The slice of the whole tensor that a shard holds (bounds and step 1), and its reader."""

    place: Index
    read: Callable[[], Tensor]


def side_by_side(name: str, shapes: Sequence[Shape], dim: int) -> tuple[Shape, list[Index]]:
    """The shape of the shards of tensor `name` concatenated along `dim`, and the place of each in it."""
    if len({(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}) > 1:
        raise UserError(f"The shards of {name} don't fit together: their shapes are {', '.join(map(str, shapes))}.")
    places, start = [], 0
    for shape in shapes:
        stop = start + shape[dim]
        places.append(tuple(slice(start, stop) if d == dim else slice(0, n) for d, n in enumerate(shape)))
        start = stop
    return tuple(start if d == dim else n for d, n in enumerate(shapes[0])), places


def assemble(shape: Shape, dtype: torch.dtype, shards: Sequence[TensorShard], index: Index | None) -> Tensor:
    """`whole[index]`, slices of step 1, of the tensor of this `shape` that the shards make up.

    Reads the shards that the index touches; a view when one of them holds all of it.
    """
    import torch

    index = index or ()
    wanted = [range(n)[index[d]] if d < len(index) else range(n) for d, n in enumerate(shape)]
    result = torch.empty([len(want) for want in wanted], dtype=dtype)
    for shard in shards:
        pairs = list(zip(wanted, shard.place, strict=True))
        common = [range(max(want.start, have.start), min(want.stop, have.stop)) for want, have in pairs]
        if all(common):
            piece = shard.read()[_within(common, [have.start for have in shard.place])]
            if common == wanted:
                return piece
            result[_within(common, [want.start for want in wanted])] = piece
    return result


def _within(ranges: Sequence[range], starts: Sequence[int]) -> Index:
    return tuple(slice(r.start - start, r.stop - start) for r, start in zip(ranges, starts, strict=True))
