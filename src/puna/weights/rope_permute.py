"""The two orders in which the rows of the q and k projections are stored.

Rotate-half (NeoX, Hugging Face): within a head, row j and row j + D/2 are rotated together. Interleaved (GPT-J; Meta,
llama2.c, GGUF): rows 2j and 2j + 1. A checkpoint that is read in the wrong order gives fluent text of high perplexity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from puna.weights.checkpoint import Index

if TYPE_CHECKING:
    from torch import Tensor


def unpermute(rows: Tensor, head_dim: int) -> Tensor:
    """Interleaved -> rotate-half. `rows`: [heads * head_dim, ...], whole heads of a weight or a bias."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def permute(rows: Tensor, head_dim: int) -> Tensor:
    """Rotate-half -> interleaved, the inverse of `unpermute`."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def read_unpermuted(read: Callable[[Index | None], Tensor], head_dim: int, index: Index | None) -> Tensor:
    """`tensor[index]` in rotate-half order, of a tensor that `read` gives interleaved; reads whole heads."""
    if index is None:
        return unpermute(read(None), head_dim)
    start, stop, step = index[0].start or 0, index[0].stop, index[0].step
    first = start // head_dim * head_dim
    last = None if stop is None else -(-stop // head_dim) * head_dim
    heads = unpermute(read((slice(first, last), *index[1:])), head_dim)
    return heads[start - first : None if stop is None else stop - first : step]


def is_rotated(name: str) -> bool:
    """Whether the rows of this tensor (Hugging Face name) have a RoPE order."""
    return name.split(".")[-2] in ("q_proj", "k_proj")
