"""The two orders in which the rows of the q and k projections are stored.

Hugging Face rotates halves: within a head, row j and row j + D/2 are a pair. Meta (and llama2.c, GGUF after it) rotates
neighbours: rows 2j and 2j + 1. A checkpoint read in the wrong order still talks, badly.
"""

from __future__ import annotations

from torch import Tensor


def to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Neighbours -> halves. `rows`: [heads * head_dim, ...], whole heads of a weight or a bias."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Halves -> neighbours, the inverse of `to_halves`."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def is_rotated(name: str) -> bool:
    """Whether the rows of the tensor with this Hugging Face name come in a RoPE order."""
    return name.split(".")[-2] in ("q_proj", "k_proj")
