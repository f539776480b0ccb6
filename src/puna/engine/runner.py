"""`Runner`, the interface from a batch to logits, implemented by eager PyTorch and by CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from puna.engine.cuda_graphs import GraphRunner
from puna.engine.eager_runner import EagerRunner
from puna.engine.sequence import Batch
from puna.model.llama import Llama


class Runner(Protocol):
    """Computes the logits of a step."""

    model: Llama

    def run(self, batch: Batch) -> Tensor:
        """Logits [rows, vocab] of every chunk's `logit_rows`, chunk after chunk."""
        ...

    def clear(self, blocks: Iterable[int]) -> None:
        """Zero these blocks, so that their next users can mask their content."""
        ...


def make_runner(model: Llama, num_blocks: int, block_size: int) -> Runner:
    """The fastest runner for the model's device."""
    if model.embed_tokens.weight.is_cuda:
        return GraphRunner(model, num_blocks, block_size)
    return EagerRunner(model, num_blocks, block_size)
