"""The parallel strategy of a training run: the one interface between the trainer and sharded weights.

    strategy = ParallelStrategy.start(MeshOptions(tp=2), device="cuda")  # or .single("cpu"): no process group
    with torch.device("meta"):
        model = Llama(config)                                  # add_lora(model, ...) here
    parts = strategy.prepare(model, compute_dtype=torch.bfloat16, recompute_blocks="selective")
    strategy.load(parts, read)                                 # read(name, index): checkpoint.read, random_reader
    optimizer = AdamW([p for p in strategy.parameters(parts).values() if p.requires_grad])
    sums = strategy.step(parts, microbatches, loss)            # gradients of sums[0], summed over all data ranks
    strategy.scale_grads(parts, 1 / sums[1]); norm = strategy.grad_norm(parts); optimizer.step(); optimizer.zero_grad()

A microbatch is a dict of tensors [B, T]: ids, labels (already shifted, -100 is not trained), positions, and documents
(int, equal within a document) or no `documents` for plain causal rows. Every data rank gives its own rows
(`data_rank` of `data_size`), all of one shape; ranks of one tp, cp or pp group give the same.

loss(hidden [B, T, d], labels [B, T], head: Head) -> Tensor [k]: sums over this microbatch's tokens. The first is
minimised, the others are only added up ([loss + z, tokens, z]). `head.weight` [vocab part, d] has a gradient;
`head.group` is the tensor-parallel group when the vocabulary is split (ids from `head.vocab_start` on), else None.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from puna.errors import UserError
from puna.model.llama import Llama, residual_dtype
from puna.parallel.context_parallel import local_positions
from puna.parallel.heartbeat import LOST_AFTER, watch_ranks
from puna.parallel.mesh import MeshOptions, check_length, resolve
from puna.parallel.model_part import Loss, ModelPart, combine_parts
from puna.parallel.parallelize import parallelize
from puna.parallel.pipeline import Pipeline
from puna.parallel.process_group import choose_device, init_ranks, world_size
from puna.parallel.tp_training import local, local_index

Read = Callable[[str, tuple[slice, ...]], Tensor]
Batch = dict[str, Tensor]


class ParallelStrategy:
    """This process's place in a training run. Every method but the properties is a collective: all ranks call it."""

    def __init__(self, options: MeshOptions, device: torch.device, mesh: DeviceMesh | None = None) -> None:
        self.options, self.device, self.mesh = options, device, mesh
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if mesh is not None else (0, 1)
        # Ranks by their coordinates along pp, dp_replicate, dp_shard, cp, tp, the last one varying fastest.
        sizes = (options.pp, options.dp_replicate, options.dp_shard, options.cp, options.tp)
        ranks = torch.arange(self.size).view(sizes)
        coordinates = [int(i) for i in (ranks == self.rank).nonzero()[0]]
        self.pp_rank, replica, shard, self.cp_rank, self.tp_rank = coordinates
        self.data_rank, self.data_size = replica * options.dp_shard + shard, options.data_size
        self.pipeline: Pipeline | None = None
        self.cp_group = _group_of_this_rank(ranks.transpose(3, 4)) if options.cp > 1 else None
        # The first and the last stage, which share tied embeddings.
        self.tied_group = _group_of_this_rank(ranks[[0, -1]].movedim(0, -1)) if options.pp > 1 else None

    @classmethod
    def single(cls, device: str | torch.device = "cpu") -> ParallelStrategy:
        """One process on one device: no process group, no sharding."""
        return cls(MeshOptions(dp_shard=1), torch.device(device))

    @classmethod
    def start(cls, options: MeshOptions, device: str = "cpu", *, timeout: float = 600) -> ParallelStrategy:
        """Join the ranks that torchrun started on `device` (auto, cpu, cuda); `single` for a process that it did not.

        `timeout`: seconds after which a collective that not all ranks entered fails. Raises UserError where the device
        cannot be used and where the ranks do not make the mesh.
        """
        options = resolve(options, world_size())
        chosen = torch.device(choose_device(device))
        if world_size() == 1:
            return cls.single(chosen)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        # Gathering a weight that is cut twice takes two steps, which torch would log for each shape.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        if not dist.is_initialized():
            init_ranks(gpu=chosen.type == "cuda", timeout=timedelta(seconds=timeout))
        # cp ranks hold different tokens and so share weights as data ranks do: FSDP2 sums their gradients.
        sizes = (options.pp, options.dp_replicate, options.dp_shard * options.cp, options.tp)
        mesh = init_device_mesh(chosen.type, sizes, mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))
        return cls(options, chosen, mesh)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints and writes for all."""
        return self.rank == 0

    # Making the model

    def prepare(
        self,
        model: Llama,
        *,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        recompute_blocks: str = "none",
        compile_blocks: bool = False,
    ) -> list[ModelPart]:
        """This rank's parts of a whole model on the meta device, with uninitialised parameters: see `parallelize`."""
        parts = parallelize(
            model,
            self.options,
            self.device,
            self.mesh,
            self.cp_group,
            dtype=dtype,
            compute_dtype=compute_dtype,
            recompute_blocks=recompute_blocks,
            compile_blocks=compile_blocks,
        )
        if self.mesh is not None and self.options.pp > 1:
            exchanged = residual_dtype(compute_dtype or dtype)
            group = self.mesh.get_group("pp")
            self.pipeline = Pipeline(parts, self.options, group, exchanged, model.config.hidden_size)
        return parts

    def parameters(self, parts: Iterable[ModelPart]) -> dict[str, nn.Parameter]:
        """This rank's parameters by their checkpoint names, trained and frozen; under a mesh each is a DTensor."""
        return dict(combine_parts(parts).named_parameters())

    @torch.no_grad()
    def load(self, parts: Iterable[ModelPart], read: Read) -> None:
        """Fill every parameter; `read(name, index)` gives the asked part of a full tensor."""
        for name, parameter in self.parameters(parts).items():
            mine, tensor = local(parameter), read(name, local_index(parameter))
            if tensor.shape != mine.shape:
                raise UserError(f"{name} has shape {list(tensor.shape)} where this rank holds {list(mine.shape)}.")
            mine.copy_(tensor)

    # Training

    def step(self, parts: list[ModelPart], microbatches: list[Batch], loss: Loss, *, scale: float = 1.0) -> Tensor:
        """Forward and backward of a step: the loss sums over all ranks, float64 [k] on the CPU.

        Adds to each trained parameter's `grad` the gradient of scale * sums[0], summed over data ranks, not averaged.
        To be called once between two `zero_grad`s.
        """
        for part in parts:
            part.train()
        mine = [self._local_batch(batch) for batch in microbatches]
        if self.pipeline is not None:
            sums = self.pipeline.step(mine, loss, scale)
            self.reduce_tied_grads(parts)
            return self.sum(sums)
        (part,) = parts
        part.loss, sums = loss, []
        for batch in mine:
            out = part(batch.pop("ids"), **batch)
            (out[0] * scale).backward()
            sums.append(out.detach())
        return self.sum(sums)

    @torch.no_grad()
    def evaluate(self, parts: list[ModelPart], microbatches: list[Batch], loss: Loss) -> Tensor:
        """The loss sums of `step`, without gradients."""
        for part in parts:
            part.eval()
        mine = [self._local_batch(batch) for batch in microbatches]
        if self.pipeline is not None:
            return self.sum(self.pipeline.evaluate(mine, loss))
        (part,) = parts
        part.loss = loss
        return self.sum([part(batch.pop("ids"), **batch) for batch in mine])

    def _local_batch(self, batch: Batch) -> Batch:
        """A microbatch on this rank's device, of each sequence the part that the rank computes."""
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        check_length(self.options, batch["ids"].shape[1])
        if self.cp_group is None:
            return batch
        batch.setdefault("documents", torch.zeros_like(batch["ids"]))
        kept = local_positions(batch["ids"].shape[1], self.cp_rank, self.options.cp).to(self.device)
        return {name: tensor[:, kept] for name, tensor in batch.items()}

    def sum(self, sums: list[Tensor]) -> Tensor:
        """The microbatches' sums over all ranks; those of one tensor-parallel group have computed the same ones."""
        total = torch.stack([one.to("cpu", torch.float64) for one in sums]).sum(0) if sums else None
        if self.mesh is None:
            assert total is not None
            return total
        lengths = torch.tensor(0 if total is None else len(total))
        dist.all_reduce(lengths, dist.ReduceOp.MAX)
        if total is None or self.tp_rank > 0:
            total = torch.zeros(int(lengths), dtype=torch.float64)
        dist.all_reduce(total)
        return total

    def reduce_tied_grads(self, parts: list[ModelPart]) -> None:
        """Give the first and the last stage, which both hold tied embeddings, the sum of their two gradients."""
        if not parts[0].model.config.tie_word_embeddings or self.tied_group is None:
            return
        tied = self.parameters(parts).get("model.embed_tokens.weight")
        if tied is not None and tied.requires_grad:
            if tied.grad is None:  # a loss that does not use the output layer
                tied.grad = torch.zeros_like(tied)
            dist.all_reduce(local(tied.grad), group=self.tied_group)

    def grad_norm(self, parts: list[ModelPart]) -> float:
        """The L2 norm of all gradients together, each parameter counted once."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, parameter in self.parameters(parts).items():
            if parameter.grad is not None:
                total += _square(local(parameter.grad)) / self._copies(name, parameter, parts)
        total = total.cpu()
        if self.mesh is not None:
            dist.all_reduce(total)
        return float(total.sqrt())

    def trained(self, parts: list[ModelPart]) -> int:
        """The number of trained parameters, each counted once."""
        mine = {name: p for name, p in self.parameters(parts).items() if p.requires_grad}
        total = torch.tensor(0.0, dtype=torch.float64)
        for name, parameter in mine.items():
            total += local(parameter).numel() / self._copies(name, parameter, parts)
        if self.mesh is not None:
            dist.all_reduce(total)
        return round(float(total))

    def _copies(self, name: str, parameter: nn.Parameter, parts: list[ModelPart]) -> int:
        """The number of ranks that hold the same local tensor."""
        copies = self.options.dp_replicate
        if isinstance(parameter, DTensor) and self.options.tp > 1 and not isinstance(parameter.placements[-1], Shard):
            copies *= self.options.tp
        if self.options.pp > 1 and name == "model.embed_tokens.weight" and parts[0].model.config.tie_word_embeddings:
            copies *= 2
        return copies

    def scale_grads(self, parts: list[ModelPart], factor: float) -> None:
        """Multiply every gradient."""
        for parameter in self.parameters(parts).values():
            if parameter.grad is not None:
                local(parameter.grad).mul_(factor)

    # Saving

    def full_state(self, parts: list[ModelPart], *, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Every full tensor by its name: on rank 0, on the CPU, one at a time; the other ranks take part and get none.

        `trained`: only those that require gradients (adapters).
        """
        self.check_tied_embeddings(parts)
        mine = {
            name: parameter
            for name, parameter in self.parameters(parts).items()
            if parameter.requires_grad or not trained
        }
        if self.mesh is None:
            yield from ((name, parameter.detach().cpu()) for name, parameter in mine.items())
            return
        described: list[Any] = [None] * self.size
        dist.all_gather_object(described, {name: (tuple(p.shape), p.dtype) for name, p in mine.items()})
        stage_ranks = self.size // self.options.pp
        seen: set[str] = set()
        for stage in range(self.options.pp):
            owner = stage * stage_ranks  # the first rank of that stage
            for name, (shape, dtype) in described[owner].items():
                if name in seen:
                    continue
                seen.add(name)
                if self.pp_rank == stage:
                    full = mine[name].full_tensor().detach().cpu()  # type: ignore[attr-defined]
                if owner > 0 and self.rank == owner:
                    dist.send(full, 0)
                if self.is_first:
                    if owner > 0:
                        full = torch.empty(shape, dtype=dtype)
                        dist.recv(full, owner)
                    yield name, full

    def check_tied_embeddings(self, parts: list[ModelPart]) -> None:
        """Raises RuntimeError if the first and the last stage's copies of tied embeddings, saved as one, differ."""
        if self.tied_group is None or not parts[0].model.config.tie_word_embeddings:
            return
        tied = self.parameters(parts).get("model.embed_tokens.weight")
        if tied is not None:
            here = local(tied).detach().cpu()
            other = here.clone()
            dist.broadcast(other, group_src=0, group=self.tied_group)
            if not torch.equal(here, other):
                raise RuntimeError("the tied embeddings of the first and the last pipeline stage differ")

    def watch_ranks(self, lost_after: float = LOST_AFTER) -> AbstractContextManager[None]:
        """Around a run: raises RankLost, which names the rank, when another one ends; see `heartbeat.watch_ranks`."""
        return nullcontext() if self.mesh is None else watch_ranks(self.rank, self.size, lost_after)

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier()

    def close(self) -> None:
        """Destroy the process group."""
        if self.mesh is not None:
            dist.destroy_process_group()


def _square(x: Tensor) -> Tensor:
    """The sum of squares, float64, without a float64 copy of x; a CPU sums long float32 tensors badly: in blocks."""
    exact = torch.promote_types(x.dtype, torch.float32)
    blocks = x.reshape(-1).split(1 << 18) if x.device.type == "cpu" else (x,)
    norms = torch.stack([torch.linalg.vector_norm(block, dtype=exact) for block in blocks])
    return norms.double().square().sum()


def _group_of_this_rank(ranks: Tensor) -> dist.ProcessGroup:
    """Make a process group of the ranks along each last dimension; returns the one that this rank is in."""
    groups = ranks.reshape(-1, ranks.shape[-1]).unique(dim=0).tolist()
    group: dist.ProcessGroup
    group, _ = dist.new_subgroups_by_enumeration(groups)
    return group
