"""The two orders in which the rows of the q and k projections are stored.

Hugging Face rotates halves: within a head, row j and row j + D/2 are a pair. Meta (and llama2.c, GGUF after it) rotates
neighbours: rows 2j and 2j + 1. A checkpoint read in the wrong order still talks, badly.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from puna.weights.checkpoint import Index


def unpermute(rows: Tensor, head_dim: int) -> Tensor:
    """Neighbours -> halves. `rows`: [heads * head_dim, ...], whole heads of a weight or a bias."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def permute(rows: Tensor, head_dim: int) -> Tensor:
    """Halves -> neighbours, the inverse of `unpermute`."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def read_unpermuted(read: Callable[[Index | None], Tensor], head_dim: int, index: Index | None) -> Tensor:
    """`tensor[index]` in halves of a tensor that `read` gives in neighbours; reads the heads that `index` touches."""
    if index is None:
        return unpermute(read(None), head_dim)
    start, stop, step = index[0].start or 0, index[0].stop, index[0].step
    first = start // head_dim * head_dim
    last = None if stop is None else -(-stop // head_dim) * head_dim
    heads = unpermute(read((slice(first, last), *index[1:])), head_dim)
    return heads[start - first : None if stop is None else stop - first : step]


def is_rotated(name: str) -> bool:
    """Whether the rows of the tensor with this Hugging Face name come in a RoPE order."""
    return name.split(".")[-2] in ("q_proj", "k_proj")
