"""Attention over the paged KV cache for one flat batch: decodes in one padded call, each prefill chunk in its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.model.attention import sdpa


@dataclass
class PrefillChunk:
    """A chunk of several tokens of one sequence."""

    rows: slice  # of the flat batch
    blocks: Tensor | slice  # its cache blocks
    length: int  # keys, its own included
    mask: Tensor | None  # [count, length] bool, keys that each query sees; None when the chunk starts its sequence


@dataclass
class PagedAttention:
    """`attend` of a flat batch of N tokens. Its first `decodes` rows are decodes, one token of one sequence each.

    Each call writes the layer's new keys and values into the cache, then reads all that the batch attends to.
    """

    cache: Tensor  # [layers, 2, kv_heads, blocks, block_size, head_dim]
    slots: Tensor  # [N] int64, positions in the flattened cache that receive the new keys and values
    decodes: int
    table: Tensor | slice  # [decodes * width] block tables, short ones padded with their last block
    length: int  # keys that the decodes read, <= width * block_size
    mask: Tensor | None  # [decodes, 1, 1, length] added to their scores; None when all are equally long
    prefills: list[PrefillChunk]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, Hq, D], k and v [N, Hkv, D] -> [N, Hq, D]."""
        cache = self.cache[layer]
        slots = cache.flatten(2, 3)  # [2, Hkv, positions, D]
        slots[0].index_copy_(1, self.slots, k.transpose(0, 1))
        slots[1].index_copy_(1, self.slots, v.transpose(0, 1))
        outputs = [self._decode(cache, q[: self.decodes])] if self.decodes else []
        for chunk in self.prefills:
            keys, values = gather(cache, chunk.blocks, 1, chunk.length)
            query = q[chunk.rows].transpose(0, 1).unsqueeze(0)  # [1, Hq, count, D]
            outputs.append(sdpa(query, keys, values, chunk.mask, is_causal=chunk.mask is None)[0].transpose(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _decode(self, cache: Tensor, q: Tensor) -> Tensor:
        """The query heads of a key/value head take the place of query positions, so that no key is repeated."""
        keys, values = gather(cache, self.table, self.decodes, self.length)
        grouped = q.view(self.decodes, keys.shape[1], -1, q.shape[-1])
        return F.scaled_dot_product_attention(grouped, keys, values, self.mask).view_as(q)


def gather(cache: Tensor, blocks: Tensor | slice, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [rows, Hkv, length, D] out of one layer's cache [2, Hkv, blocks, block_size, D]."""
    read = cache[:, :, blocks] if isinstance(blocks, slice) else cache.index_select(2, blocks)
    read = read.reshape(2, cache.shape[1], rows, -1, cache.shape[-1])[:, :, :, :length].transpose(1, 2)
    return read[0], read[1]


def length_mask(lengths: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[rows, 1, 1, length]: 0 for the first `lengths[i]` keys of row i, -inf for the others."""
    hidden = torch.arange(length, device=lengths.device) >= lengths[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=lengths.device).masked_fill_(hidden, -torch.inf)[:, None, None]
