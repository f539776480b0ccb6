"""Tensor parallelism for inference: each rank holds a slice of every large weight, by `TP_PLAN`, as plain tensors.

Two all-reduces a layer (after attention and after the MLP), one after the embedding, one all-gather of the logits.
"""

from __future__ import annotations

import atexit
import pickle
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from puna.errors import UserError
from puna.model.llama import MLP, Attention, Embedding, Llama
from puna.model.tp_plan import check_tp, chunk, tp_slice
from puna.parallel.process_group import RankLost, choose_device, init_ranks, world_size

BROADCAST_BYTES = 8192  # sent by every `broadcast_object`: the tokens of some hundred sequences


@dataclass
class TensorParallel:
    """This process's rank in a tensor-parallel group. Tensors travel through `group`, Python objects through `control`.

    Every method but `shutdown` is a collective: all ranks call it, in the same order. Raises RankLost when another rank
    has ended.
    """

    rank: int
    size: int
    group: dist.ProcessGroup
    control: dist.ProcessGroup
    broken: bool = False  # a step was interrupted: the ranks no longer agree on the next collective

    @classmethod
    def start(cls, device: str) -> TensorParallel | None:
        """Join all ranks that torchrun started, on `device` (auto, cpu or cuda); None for a process that runs alone.

        The other ranks wait for rank 0 as long as its user thinks (a chat), so the control group's timeout is 30 days;
        it still fails at once when a rank ends. Raises UserError when the device can't be used and when this process
        has joined a group before.
        """
        size = world_size()
        if size == 1:
            return None
        if dist.is_initialized():
            raise UserError(
                "This process has joined its ranks already: under torchrun a script makes one LLM, which sets up"
                " torch.distributed, and the other ranks end with it."
            )
        gpu = torch.cuda.is_available() and device.startswith(("auto", "cuda"))
        init_ranks(gpu=gpu)
        control = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        assert dist.group.WORLD is not None
        tp = cls(dist.get_rank(), size, dist.group.WORLD, control)
        atexit.register(tp.shutdown)
        with tp.raise_together():
            chosen = torch.device(choose_device(device))
            if chosen.type == "cuda":
                torch.cuda.set_device(chosen)
        return tp

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks; x is overwritten where it is contiguous."""
        x = x.contiguous()
        self._run(dist.all_reduce, x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's x, in the order of ranks; all have the same shape."""
        gathered = [torch.empty_like(x) for _ in range(self.size)]
        self._run(dist.all_gather, gathered, x.contiguous(), group=self.group)
        return gathered

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value on every rank; the other ranks' values are ignored.

        The ranks wait for this twice a step: it is one broadcast, where torch's `broadcast_object_list` makes two, as
        long as the pickle fits into BROADCAST_BYTES. Longer ones take a second.
        """
        if self.broken:
            raise UserError("The other ranks have ended, since a step was interrupted; start the script again.")
        data = pickle.dumps(value) if self.rank == 0 else b""
        message = bytearray(struct.pack("<q", len(data)) + data).ljust(BROADCAST_BYTES)
        head, rest = message[:BROADCAST_BYTES], message[BROADCAST_BYTES:]
        self._broadcast(head)
        (size,) = struct.unpack_from("<q", head)
        if size + 8 > BROADCAST_BYTES:
            rest = rest or bytearray(size + 8 - BROADCAST_BYTES)
            self._broadcast(rest)
        return value if self.rank == 0 else pickle.loads((head + rest)[8 : 8 + size])

    def all_reduce_min(self, value: int) -> int:
        """The smallest value of any rank."""
        smallest = torch.tensor(value)
        self._run(dist.all_reduce, smallest, dist.ReduceOp.MIN, group=self.control)
        return int(smallest)

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """A UserError inside it on any rank ends all: rank 0 raises it, the other ranks exit without output.

        So either all ranks reach the next collective or none does.
        """
        error = None
        try:
            yield
        except UserError as raised:
            error = raised
        messages: list[str | None] = [None] * self.size
        self._run(dist.all_gather_object, messages, str(error) if error else None, group=self.control)
        failed = next((rank for rank, message in enumerate(messages) if message is not None), None)
        if failed is not None:
            if self.rank > 0:
                raise SystemExit(0)
            raise error or UserError(f"Rank {failed}: {messages[failed]}")

    def serve(self, run_worker: Callable[[], None]) -> NoReturn:
        """Run a rank other than 0 until rank 0 releases it, then end its process.

        It prints nothing: when rank 0 has ended without releasing it, rank 0 or torchrun has told the user.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all ranks, and rank 0 decides what it ends
        try:
            run_worker()
        except RankLost:
            raise SystemExit(1) from None
        raise SystemExit(0)

    def shutdown(self) -> None:
        """At the end of the process: destroy the groups and join gloo's threads, which may still have to free a tensor.

        With NCCL that would wait, after an interrupted step, for ranks that wait for this one: there the end of the
        process frees both.
        """
        if not self.broken or dist.get_backend(self.group) == "gloo":
            del self.group, self.control  # the last references, so that their threads are joined here
            dist.destroy_process_group()

    def _broadcast(self, data: bytearray) -> None:
        """Overwrite `data` with rank 0's."""
        self._run(dist.broadcast, torch.frombuffer(data, dtype=torch.uint8), 0, group=self.control)

    def _run(self, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            collective(*args, **kwargs)
        except RuntimeError as error:
            self.broken = True
            raise RankLost("Another rank has ended; its own message or torchrun's report says why.") from error


def split(model: Llama, tp: TensorParallel) -> None:
    """Cut a meta model's parameters to this rank's slices and set the collectives. UserError when it can't be cut."""
    config = model.config
    check_tp(config, tp.size)
    for name, shape in config.tensors().items():
        owner, _, attribute = name.removeprefix("model.").rpartition(".")
        module = model.get_submodule(owner)
        sizes = [part.stop - part.start for part in tp_slice(name, shape, config, tp.rank, tp.size)]
        local = torch.empty(sizes, dtype=getattr(module, attribute).dtype, device="meta")
        setattr(module, attribute, nn.Parameter(local))
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
    """Logits [..., local vocab] -> [..., vocab]. All ranks send the size of the longest part; some are one shorter."""
    parts = [chunk(vocab_size, rank, tp.size) for rank in range(tp.size)]
    lengths = [part.stop - part.start for part in parts]
    gathered = tp.all_gather(nn.functional.pad(logits, (0, lengths[0] - lengths[tp.rank])))
    return torch.cat([part[..., :length] for part, length in zip(gathered, lengths, strict=True)], -1)
