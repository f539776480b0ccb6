"""Attention over whole sequences, and the one call to torch's kernels. Paged attention is in the engine."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attend(Protocol):
    """Attention with its own mask and cache. q [..., Hq, D], k and v [..., Hkv, D] -> [..., Hq, D]."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
    """Scaled dot product attention with grouped heads: q [B, Hq, T, D], k and v [B, Hkv, P, D] -> [B, Hq, T, D].

    `mask` [B, 1 or Hq, T, P] is added to the scores, or is a bool of the keys that each query sees.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=True)
    if groups > 1:  # the CPU's fused kernel needs equal head counts; the unfused one would write all scores
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over a batch of whole sequences, [B, T, H, D]."""
    return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True).transpose(1, 2)


def packed_attention(documents: Tensor, alone: Attend = causal) -> Attend:
    """Causal attention within each document of packed rows; documents [B, T]: the id of each token's document.

    On a CPU `alone` attends to one document after another, at the cost of the sum of their squared lengths.
    """
    order = torch.arange(documents.shape[1], device=documents.device)
    if documents.is_cuda:
        return document_attention(documents, documents, order, order)
    changes = documents[:, 1:] != documents[:, :-1]
    rows = [[0, *(row.nonzero().squeeze(-1) + 1).tolist(), documents.shape[1]] for row in changes]
    if all(len(bounds) == 2 for bounds in rows):
        return alone

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for row, bounds in enumerate(rows):
            parts = [slice(start, end) for start, end in zip(bounds, bounds[1:], strict=False)]
            out.append(torch.cat([alone(layer, *(x[row : row + 1, part] for x in (q, k, v))) for part in parts], 1))
        return torch.cat(out)

    return attend


def document_attention(queries: Tensor, keys: Tensor, query_order: Tensor, key_order: Tensor) -> Attend:
    """Attention of queries with document ids [B, T] and positions in their row [T] over keys with [B, P] and [P].

    A query sees the keys of its document up to its own position. On a GPU one kernel skips blocks that no query sees
    (FlexAttention, arXiv 2412.05496); elsewhere, and without Triton, the plain twin makes a mask [B, T, P].
    """

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (queries[row, query] == keys[row, key]) & (query_order[query] >= key_order[key])

    if queries.is_cuda and importlib.util.find_spec("triton"):
        flex, make_mask = _flex()
        blocks = make_mask(sees, queries.shape[0], None, queries.shape[1], keys.shape[1], queries.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            out: Tensor = flex(q, k, v, block_mask=blocks, enable_gqa=True)
            return out.transpose(1, 2)

        return attend
    mask = (queries.unsqueeze(2) == keys.unsqueeze(1)) & (query_order.unsqueeze(1) >= key_order)
    return masked_attention(mask)


def masked_attention(visible: Tensor) -> Attend:
    """Attention by a mask, bool [B, T, P], of the keys that each query attends to."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), visible.unsqueeze(1)).transpose(1, 2)

    return attend


@functools.cache
def _flex() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention), torch.compile(create_block_mask)
