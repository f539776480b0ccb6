"""Attention over whole sequences, and the one call to torch's kernels. The paged form lives in the engine's runner."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Attend(Protocol):
    """Attention over whatever keys and values it owns. q [..., Hq, D], k and v [..., Hkv, D] -> [..., Hq, D]."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
    """Scaled dot product attention with grouped heads: q [B, Hq, T, D], k and v [B, Hkv, P, D] -> [B, Hq, T, D].

    `mask` is added to the scores, or a bool of what may be seen.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=True)
    if groups > 1:  # the CPU's fused kernel wants equal head counts, and without it the scores are made whole
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over a batch of whole sequences, [B, T, H, D]."""
    return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True).transpose(1, 2)
