"""Tensor parallelism for inference: each rank holds a slice of every large weight, by `TP_PLAN`, as plain tensors.

Two all-reduces a layer (after attention and after the MLP), one after the embedding, one gather of the logits.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from puna.errors import UserError
from puna.model.llama import MLP, Attention, Embedding, Llama
from puna.model.tp_plan import check_tp, chunk, tp_slice

BROADCAST_BYTES = 8192  # bytes that `broadcast_object` sends at once: the tokens of some hundred sequences


class RankLost(UserError):
    """A collective failed, as it does when another rank has ended."""


@dataclass
class TensorParallel:
    """This process's place among the ranks. Tensors go through `group`, Python objects through `control`.

    Every method but `shutdown` is a collective: all ranks call it, in the same order.
    """

    rank: int
    size: int
    group: dist.ProcessGroup
    control: dist.ProcessGroup
    broken: bool = False  # a step was left half way: the ranks no longer agree on what comes next

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks; x is overwritten."""
        x = x.contiguous()
        self._run(dist.all_reduce, x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's x, which all have the same shape."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._run(dist.all_gather, parts, x.contiguous(), group=self.group)
        return parts

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value; what the others give is ignored.

        The ranks wait for this twice a step: one broadcast, where torch's `broadcast_object_list` makes two, as
        long as the pickle fits into BROADCAST_BYTES bytes.
        """
        if self.broken:
            raise UserError("the other ranks are gone, since a step was broken off; start the script again.")
        data = pickle.dumps(value) if self.rank == 0 else b""
        message = bytearray(struct.pack("<q", len(data)) + data).ljust(BROADCAST_BYTES)
        first, rest = message[:BROADCAST_BYTES], message[BROADCAST_BYTES:]
        self._broadcast(first)
        (size,) = struct.unpack_from("<q", first)
        if size + 8 > BROADCAST_BYTES:
            rest = rest or bytearray(size + 8 - BROADCAST_BYTES)
            self._broadcast(rest)
        return value if self.rank == 0 else pickle.loads((first + rest)[8 : 8 + size])

    def all_reduce_min(self, value: int) -> int:
        """The smallest value that a rank gives."""
        box = torch.tensor(value)
        self._run(dist.all_reduce, box, dist.ReduceOp.MIN, group=self.control)
        return int(box)

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """What one rank cannot do, none goes on with: rank 0 raises the UserError of any, the others end in silence.

        Inside it, all ranks or none come to a collective.
        """
        mine = None
        try:
            yield
        except UserError as error:
            mine = error
        words: list[str | None] = [None] * self.size
        self._run(dist.all_gather_object, words, str(mine) if mine else None, group=self.control)
        failed = next((rank for rank, word in enumerate(words) if word is not None), None)
        if failed is not None:
            if self.rank > 0:
                raise SystemExit(0)
            raise mine or UserError(f"rank {failed}: {words[failed]}")

    def shutdown(self) -> None:
        """At the end of the process: end the groups and gloo's threads, one of which may still wait to free a tensor.

        With NCCL that would wait, after a step was broken off, for ranks that wait for this one: there the end of the
        process frees both.
        """
        if not self.broken or dist.get_backend(self.group) == "gloo":
            del self.group, self.control  # held by no one else, so that their threads are joined here
            dist.destroy_process_group()

    def _broadcast(self, data: bytearray) -> None:
        """Rank 0's bytes into those of the others."""
        self._run(dist.broadcast, torch.frombuffer(data, dtype=torch.uint8), 0, group=self.control)

    def _run(self, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            collective(*args, **kwargs)
        except RuntimeError as error:
            self.broken = True
            raise RankLost("another rank has ended; its own message or torchrun's report says why.") from error


def split(model: Llama, tp: TensorParallel) -> None:
    """Cut a meta model's parameters to this rank's part and set the collectives. UserError when it can't be cut."""
    config = model.config
    check_tp(config, tp.size)
    for name, shape in config.tensors().items():
        owner, _, kind = name.removeprefix("model.").rpartition(".")
        index = tp_slice(name, shape, config, tp.rank, tp.size)
        module = model.get_submodule(owner)
        local = torch.empty(
            [part.stop - part.start for part in index], dtype=getattr(module, kind).dtype, device="meta"
        )
        setattr(module, kind, nn.Parameter(local))
    model.tie()
    for module in model.modules():
        if isinstance(module, Attention):
            module.kv_heads = module.k_proj.weight.shape[0] // module.head_dim
        if isinstance(module, Attention | MLP):
            module.leave = tp.all_reduce
        elif isinstance(module, Embedding):
            module.vocab_start, module.leave = chunk(config.vocab_size, tp.rank, tp.size).start, tp.all_reduce
    model.gather = lambda logits: gather_vocab(logits, config.vocab_size, tp)


def gather_vocab(logits: Tensor, vocab_size: int, tp: TensorParallel) -> Tensor:
    """Logits [..., local vocab] -> [..., vocab]. Parts travel in one size; the last ones may be one shorter."""
    parts = [chunk(vocab_size, rank, tp.size) for rank in range(tp.size)]
    lengths = [part.stop - part.start for part in parts]
    gathered = tp.all_gather(nn.functional.pad(logits, (0, lengths[0] - lengths[tp.rank])))
    return torch.cat([part[..., :length] for part, length in zip(gathered, lengths, strict=True)], -1)
