"""The runner in eager PyTorch, on the CPU or a GPU.

The tokens of all sequences form one flat tensor; sequences with one pending token come first, since they share one
attention call.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from puna.engine.kv_cache import BLOCK_SIZE, allocate
from puna.engine.paged_attention import PagedAttention, PrefillChunk, length_mask
from puna.engine.sequence import Batch, Chunk
from puna.model.llama import Llama


class EagerRunner:
    """A `Runner` that calls the model once per step, over a paged KV cache."""

    def __init__(self, model: Llama, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        self.model, self.block_size = model, block_size
        self.cache = allocate(model, num_blocks, block_size)
        self.device = self.cache.device

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
                last = torch.arange(c.start, length, device=self.device)
                mask = torch.arange(length, device=self.device) <= last[:, None]
            blocks = self._index(c.sequence.blocks[: -(-length // size)])
            prefills.append(PrefillChunk(slice(row, row + c.count), blocks, length, mask))
            row += c.count
        lengths = [c.start + 1 for c in decodes]
        length = max(lengths, default=0)
        width = -(-length // size)
        tables = [c.sequence.blocks[:width] for c in decodes]
        table = self._index([block for t in tables for block in (*t, *t[-1:] * (width - len(t)))])
        mask = None
        if min(lengths, default=0) < length:
            mask = length_mask(self._ints(lengths), length, self.cache.dtype)
        return PagedAttention(self.cache, self._ints(slots), len(decodes), table, length, mask, prefills)

    def _index(self, blocks: list[int]) -> Tensor | slice:
        """Consecutive blocks are read in place by a slice, others through an index."""
        if blocks and blocks == list(range(blocks[0], blocks[0] + len(blocks))):
            return slice(blocks[0], blocks[0] + len(blocks))
        return self._ints(blocks)

    def _ints(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64).to(self.device, non_blocking=True)


def _logit_rows(batch: Batch, order: list[int]) -> list[int]:
    """Rows of the flat batch (chunks in `order`) whose logits are needed, in the order of `batch.chunks`."""
    first, row = {}, 0
    for i in order:
        first[i] = row
        row += batch.chunks[i].count
    return [first[i] + offset for i, chunk in enumerate(batch.chunks) for offset in chunk.logit_rows]
