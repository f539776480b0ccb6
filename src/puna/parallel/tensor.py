"""Tensor parallelism for inference: each rank holds a slice of every large weight, by `TP_PLAN`, as plain tensors.

Two all-reduces a layer (after attention and after the MLP), one after the embedding, one gather of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from puna.model.llama import MLP, Attention, Embedding, Llama
from puna.model.plan import check_tp, chunk, tp_slice


@dataclass(frozen=True)
class TensorParallel:
    """This process's place among the ranks. Tensors go through `group`, Python objects through `control`."""

    rank: int
    size: int
    group: dist.ProcessGroup
    control: dist.ProcessGroup

    def reduce(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks."""
        x = x.contiguous()
        dist.all_reduce(x, group=self.group)
        return x

    def share(self, value: Any) -> Any:
        """Rank 0's value; what the others give is ignored."""
        box = [value if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return value if self.rank == 0 else box[0]

    def least(self, value: int) -> int:
        """The smallest value that a rank gives."""
        box = torch.tensor(value)
        dist.all_reduce(box, dist.ReduceOp.MIN, group=self.control)
        return int(box)


def split(model: Llama, tp: TensorParallel) -> None:
    """Cut a meta model's parameters to this rank's part and set the collectives. UserError when it can't be cut."""
    config = model.config
    check_tp(config, tp.size)
    for name, shape in config.tensors().items():
        owner, _, kind = name.removeprefix("model.").rpartition(".")
        index = tp_slice(name, shape, config, tp.rank, tp.size)
        local = torch.empty([part.stop - part.start for part in index], device="meta")
        setattr(model.get_submodule(owner), kind, nn.Parameter(local))
    model.tie()
    for module in model.modules():
        if isinstance(module, Attention):
            module.kv_heads = module.k_proj.weight.shape[0] // module.head_dim
        if isinstance(module, Attention | MLP):
            module.leave = tp.reduce
        elif isinstance(module, Embedding):
            module.first, module.leave = chunk(config.vocab_size, tp.rank, tp.size).start, tp.reduce
    model.gather = lambda logits: gather_vocab(logits, config.vocab_size, tp)


def gather_vocab(logits: Tensor, vocab_size: int, tp: TensorParallel) -> Tensor:
    """Logits [..., local vocab] -> [..., vocab]; the last ranks' parts may be shorter."""
    step = -(-vocab_size // tp.size)
    padded = nn.functional.pad(logits, (0, step - logits.shape[-1])).contiguous()
    parts = [torch.empty_like(padded) for _ in range(tp.size)]
    dist.all_gather(parts, padded, group=tp.group)
    return torch.cat(parts, -1)[..., :vocab_size]
