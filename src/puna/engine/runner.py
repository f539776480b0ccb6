"""From a batch to logits: the seam where eager torch, CUDA graphs, a native CPU core or an exported graph may stand.

`Runner.run` is all that the engine knows. This one is eager torch over a paged cache; the tokens of all sequences lie
flat in one tensor, those of sequences with one pending token first, since they share one attention call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from puna.engine.sequence import Batch, Chunk
from puna.model.attention import sdpa
from puna.model.llama import Attention, Llama

BLOCK_SIZE = 16  # positions; large enough for copies to run at memory speed, small enough to share short prefixes


class Runner(Protocol):
    """What computes a step."""

    def run(self, batch: Batch) -> Tensor:
        """Logits [rows, vocab]: of every chunk's `logit_rows`, chunk after chunk."""
        ...

    def clear(self, blocks: Iterable[int]) -> None:
        """Make the content of these blocks finite again, so that whoever gets them next can mask it."""
        ...


@dataclass
class PrefillChunk:
    """A chunk of more than one token: its rows of the flat batch, its cache blocks, and which keys it may see."""

    rows: slice
    blocks: Tensor | slice
    length: int  # keys, its own included
    mask: Tensor | None  # [count, length], None when it starts its sequence


@dataclass
class PagedAttention:
    """`attend` over the paged cache for one flat batch of N tokens; the first `singles` are one per sequence."""

    cache: Tensor  # [layers, 2, kv_heads, blocks, block_size, head_dim]
    slots: Tensor  # [N] where each token's key and value go, in positions of the whole cache
    decodes: int
    table: Tensor | slice  # [singles * width] their blocks, short ones filled up with their own last
    length: int  # keys that they see, <= width * block_size
    mask: Tensor | None  # [singles, 1, 1, length] added to their scores; None when nothing is filled up
    prefills: list[PrefillChunk]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [N, Hq, D], k and v [N, Hkv, D] -> [N, Hq, D]."""
        cache = self.cache[layer]
        slots = cache.flatten(2, 3)  # [2, Hkv, positions, D]
        slots[0].index_copy_(1, self.slots, k.transpose(0, 1))
        slots[1].index_copy_(1, self.slots, v.transpose(0, 1))
        parts = [self._decodes(cache, q[: self.decodes])] if self.decodes else []
        for run in self.prefills:
            keys, values = gather(cache, run.blocks, 1, run.length)
            query = q[run.rows].transpose(0, 1).unsqueeze(0)  # [1, Hq, count, D]
            parts.append(sdpa(query, keys, values, run.mask, is_causal=run.mask is None)[0].transpose(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decodes(self, cache: Tensor, q: Tensor) -> Tensor:
        """The query heads that share a key/value head stand as that head's query positions: nothing is repeated."""
        keys, values = gather(cache, self.table, self.decodes, self.length)
        grouped = q.view(self.decodes, keys.shape[1], -1, q.shape[-1])
        return F.scaled_dot_product_attention(grouped, keys, values, self.mask).view_as(q)


def gather(cache: Tensor, blocks: Tensor | slice, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [rows, Hkv, length, D] out of one layer's cache [2, Hkv, blocks, block_size, D]."""
    part = cache[:, :, blocks] if isinstance(blocks, slice) else cache.index_select(2, blocks)
    part = part.reshape(2, cache.shape[1], rows, -1, cache.shape[-1])[:, :, :, :length].transpose(1, 2)
    return part[0], part[1]


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take memory page by page as they are written to. torch.zeros writes to all of them on the CPU, which
    for a cache of many gigabytes takes seconds, and the memory from others."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)


class EagerRunner:
    """The model in eager torch, on the CPU or a GPU."""

    def __init__(self, model: Llama, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        self.model, self.block_size = model, block_size
        weight = model.embed_tokens.weight
        self.device = weight.device
        # Zeros, not whatever memory held: masked scores must be finite.
        self.cache = zeros(cache_shape(model, num_blocks, block_size), weight.dtype, self.device)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        if batch.copies:
            source, target = (self._ints(side) for side in zip(*batch.copies, strict=True))
            self.cache.index_copy_(3, target, self.cache.index_select(3, source))
        order = sorted(range(len(batch.chunks)), key=lambda i: batch.chunks[i].count > 1)
        chunks = [batch.chunks[i] for i in order]
        ids = [token for c in chunks for token in c.sequence.tokens[c.start : c.start + c.count]]
        positions = [position for c in chunks for position in c.positions]
        hidden = self.model(self._ints(ids), self._ints(positions), self._attend(chunks))
        rows = _logit_rows(batch, order)
        return self.model.logits(hidden if rows == list(range(len(hidden))) else hidden[self._ints(rows)])

    def clear(self, blocks: Iterable[int]) -> None:
        self.cache.index_fill_(3, self._ints(blocks), 0)

    def _attend(self, chunks: list[Chunk]) -> PagedAttention:
        size = self.block_size
        slots = [c.sequence.blocks[p // size] * size + p % size for c in chunks for p in c.positions]
        decodes = [c for c in chunks if c.count == 1]
        prefills, row = [], len(decodes)
        for c in chunks[row:]:
            length = c.start + c.count
            mask = None
            if c.start:
                seen = torch.arange(c.start, length, device=self.device)
                mask = torch.arange(length, device=self.device) <= seen[:, None]
            blocks = self._run(c.sequence.blocks[: -(-length // size)])
            prefills.append(PrefillChunk(slice(row, row + c.count), blocks, length, mask))
            row += c.count
        lengths = [c.start + 1 for c in decodes]
        length = max(lengths, default=0)
        width = -(-length // size)
        tables = [c.sequence.blocks[:width] for c in decodes]
        table = self._run([block for t in tables for block in (*t, *t[-1:] * (width - len(t)))])
        mask = None
        if min(lengths, default=0) < length:
            mask = length_mask(self._ints(lengths), length, self.cache.dtype)
        return PagedAttention(self.cache, self._ints(slots), len(decodes), table, length, mask, prefills)

    def _run(self, blocks: list[int]) -> Tensor | slice:
        """Neighbouring blocks are read in place, others through an index."""
        if blocks and blocks == list(range(blocks[0], blocks[0] + len(blocks))):
            return slice(blocks[0], blocks[0] + len(blocks))
        return self._ints(blocks)

    def _ints(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64).to(self.device, non_blocking=True)


def length_mask(lengths: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[rows, 1, 1, length]: 0 for the first `lengths[i]` keys of row i, -inf for the others."""
    hidden = torch.arange(length, device=lengths.device) >= lengths[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=lengths.device).masked_fill_(hidden, -torch.inf)[:, None, None]


def cache_shape(model: Llama, num_blocks: int, block_size: int) -> tuple[int, ...]:
    """[layers, 2, kv_heads of this rank, blocks, block_size, head_dim]."""
    config = model.config
    kv_heads = next(m.kv_heads for m in model.modules() if isinstance(m, Attention))
    return (config.num_hidden_layers, 2, kv_heads, num_blocks, block_size, config.head_dim)


def _logit_rows(batch: Batch, order: list[int]) -> list[int]:
    """Rows of the flat batch (chunks in `order`) whose logits are needed, in the order of `batch.chunks`."""
    first, row = {}, 0
    for i in order:
        first[i] = row
        row += batch.chunks[i].count
    return [first[i] + offset for i, chunk in enumerate(batch.chunks) for offset in chunk.logit_rows]


def make_runner(model: Llama, num_blocks: int, block_size: int) -> Runner:
    """The fastest runner for where the model is."""
    if model.embed_tokens.weight.is_cuda:
        from puna.engine.cuda_graphs import GraphRunner

        return GraphRunner(model, num_blocks, block_size)
    return EagerRunner(model, num_blocks, block_size)
