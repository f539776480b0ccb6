"""Decode as CUDA graphs: a step that is one token a sequence is replayed instead of launched kernel by kernel.

A graph needs tensors of fixed shape at fixed addresses, so steps are padded up to a bucket of rows and of cache blocks
a row. Padding rows write into one spare block and see only that. The same padded step without a graph is the slow twin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from puna.engine.eager_runner import EagerRunner
from puna.engine.paged_attention import PagedAttention, length_mask
from puna.engine.sequence import Batch, Chunk
from puna.model.llama import Llama

MAX_ROWS = 256  # above it launches cost little beside the computation


class PaddedDecode:
    """The inputs and output of a decode step of `rows` sequences with up to `width` blocks each."""

    def __init__(self, model: Llama, cache: Tensor, rows: int, width: int, spare: int) -> None:
        self.model, self.cache, self.rows, self.width, self.spare = model, cache, rows, width, spare
        self.block_size = cache.shape[4]
        # ids, positions and slots of each row, then the rows' blocks: one tensor, so that a step is one transfer.
        self.inputs = torch.zeros(rows * (3 + width), dtype=torch.int64, device=cache.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None

    def fill(self, chunks: list[Chunk]) -> None:
        """Put a step's inputs where the graph reads them."""
        size, padding = self.block_size, self.rows - len(chunks)
        ids = [c.sequence.tokens[c.start] for c in chunks] + [0] * padding
        positions = [c.start for c in chunks] + [0] * padding
        slots = [c.sequence.blocks[c.start // size] * size + c.start % size for c in chunks]
        slots += [self.spare * size] * padding
        tables = [c.sequence.blocks[: c.start // size + 1] for c in chunks] + [[self.spare]] * padding
        table = [block for t in tables for block in (*t, *t[-1:] * (self.width - len(t)))]
        values = torch.tensor([*ids, *positions, *slots, *table])
        if self.inputs.is_cuda:
            values = values.pin_memory()
        self.inputs.copy_(values, non_blocking=True)

    def compute(self) -> Tensor:
        """Logits [rows, vocab] of what was filled in."""
        rows, length = self.rows, self.width * self.block_size
        ids, positions, slots = self.inputs[: 3 * rows].view(3, rows)
        mask = length_mask(positions + 1, length, self.cache.dtype)
        paged = PagedAttention(self.cache, slots, rows, self.inputs[3 * rows :], length, mask, [])
        return self.model.logits(self.model(ids, positions, paged))

    def capture(self) -> None:
        """Record `compute` as a graph, after a warm-up that lets libraries allocate what they need."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.compute()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.compute()

    def run(self, chunks: list[Chunk]) -> Tensor:
        """Logits [len(chunks), vocab]; valid until the next run."""
        self.fill(chunks)
        if self.graph is None:
            return self.compute()[: len(chunks)]
        assert self.logits is not None
        self.graph.replay()
        return self.logits[: len(chunks)]


class GraphRunner(EagerRunner):
    """Eager for prefill and mixed steps, a graph per bucket for pure decode. `capture=False` keeps decode eager too."""

    def __init__(self, model: Llama, num_blocks: int, block_size: int, *, capture: bool = True) -> None:
        super().__init__(model, num_blocks + 1, block_size)  # the last block is the padding's
        self.spare, self.capture = num_blocks, capture
        self.steps: dict[tuple[int, int], PaddedDecode] = {}

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        chunks = batch.chunks
        if batch.copies or len(chunks) > MAX_ROWS or any(c.count > 1 for c in chunks):
            return super().run(batch)
        rows = _bucket(len(chunks))
        width = _bucket(max(c.start // self.block_size + 1 for c in chunks))
        step = self.steps.get((rows, width))
        if step is None:
            step = self.steps[rows, width] = PaddedDecode(self.model, self.cache, rows, width, self.spare)
            if self.capture:
                step.fill([])
                step.capture()
        return step.run(chunks)


def _bucket(n: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24 ...: at most a third more than needed."""
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power
