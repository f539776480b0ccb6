"""The parallel strategy of a training run: the one interface between the trainer and sharded weights.

    strategy = ParallelStrategy.start(MeshOptions(tp=2), device="cuda")  # or .single("cpu"): no process group
    with torch.device("meta"):
        model = Llama(config)                                  # add_lora(model, ...) here
    parts = strategy.prepare(model, compute_dtype=torch.bfloat16, recompute_blocks="selective")
    strategy.load(parts, read)                                   # read(name, index): source.read, random_reader
    optimizer = AdamW([p for p in strategy.parameters(parts).values() if p.requires_grad])
    sums = strategy.step(parts, microbatches, loss)              # gradients of sums[0], summed over all data ranks
    strategy.scale_grads(parts, 1 / sums[1]); norm = strategy.grad_norm(parts); optimizer.step(); optimizer.zero_grad()

A microbatch is a dict of tensors [B, T]: ids, labels (already shifted, -100 is not trained), positions, and documents
(int, equal within a document) or no `documents` for plain causal rows. Every data rank gives its own rows
(`data_rank` of `data_size`), all of one shape; ranks of one tp, cp or pp group give the same.

loss(hidden [B, T, d], labels [B, T], head: Head) -> Tensor [k]: sums over this microbatch's tokens. The first is what
is minimised, the others are only added up ([loss + z, tokens, z]). `head.weight` [vocab part, d] has a gradient;
`head.group` is the tensor-parallel group when the vocabulary is split (ids from `head.vocab_start` on), else None.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from puna.errors import UserError
from puna.model.llama import Llama
from puna.parallel import context_parallel, fsdp, tp_training
from puna.parallel.collectives import enter
from puna.parallel.heartbeat import LOST, Heartbeat, RankLost, ended, is_lost
from puna.parallel.mesh import MeshOptions, check_length, check_model, resolve
from puna.parallel.model_part import Loss, ModelPart, compile_blocks, compute_in, recompute, use_blocked, whole
from puna.parallel.pipeline import Pipeline, cut
from puna.parallel.tp_training import local, materialise

Read = Callable[[str, tuple[slice, ...]], Tensor]
Batch = dict[str, Tensor]


class ParallelStrategy:
    """This process's place in a training run. Every method but the properties is a collective: all ranks call it."""

    def __init__(self, options: MeshOptions, device: torch.device, mesh: DeviceMesh | None = None) -> None:
        self.options, self.device, self.mesh = options, device, mesh
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if mesh is not None else (0, 1)
        # Coordinates along pp, dp_replicate, dp_shard, cp, tp, the last one running fastest.
        sizes = (options.pp, options.dp_replicate, options.dp_shard, options.cp, options.tp)
        places = torch.arange(self.size).view(sizes)
        self.pp, replica, piece, self.cp, self.tp = (int(i) for i in (places == self.rank).nonzero()[0])
        self.data_rank, self.data_size = replica * options.dp_shard + piece, options.data_size
        self.pipeline: Pipeline | None = None
        self.context = _my_group(places.view(-1, options.cp, options.tp).transpose(1, 2)) if options.cp > 1 else None
        ends = places[[0, -1]].flatten(1).t()  # first and last stage, which share tied embeddings
        self.ends = _my_group(ends) if options.pp > 1 else None

    @classmethod
    def single(cls, device: str | torch.device = "cpu") -> ParallelStrategy:
        """One process on one device: no process group, no sharding."""
        return cls(MeshOptions(dp_shard=1), torch.device(device))

    @classmethod
    def start(cls, options: MeshOptions, device: str = "cpu", *, timeout: float = 600) -> ParallelStrategy:
        """Join the ranks that torchrun started; `single` for a process that it did not start and a mesh of one.

        `timeout`: seconds after which a collective that not all ranks came to is an error. Raises UserError where the
        ranks do not fill the mesh.
        """
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        options = resolve(options, ranks)
        if ranks == 1:
            return cls.single(device)
        kind = torch.device(device).type
        if kind == "cuda":
            gpu = int(os.environ["LOCAL_RANK"])
            if gpu >= torch.cuda.device_count():
                raise UserError(
                    f"torchrun started more ranks than this machine has GPUs ({torch.cuda.device_count()});"
                    " lower --nproc-per-node or train on the cpu."
                )
            torch.cuda.set_device(gpu)
        # Gathering a weight that is cut twice takes two steps, which torch would remark on for each shape.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        # cp ranks hold different tokens and so share weights as data ranks do: FSDP2 sums their gradients.
        sizes = (options.pp, options.dp_replicate, options.dp_shard * options.cp, options.tp)
        mesh = init_device_mesh(kind, sizes, mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))
        return cls(
            options, torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind), mesh
        )

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks and writes for all."""
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
        """Cut a whole model on the meta device to this rank's parts (stages), with uninitialised parameters of `dtype`.

        Products run in `compute_dtype` where given; weights that are not trained are stored in it. `recompute_blocks`
        is none, selective or full. Raises UserError where the model cannot be cut this way.
        """
        check_model(model.config, self.options)
        parts = [ModelPart(cut(model, index, self.options.stages)) for index in self._stages()]
        for part in parts:
            self._prepare(part, dtype, compute_dtype, recompute_blocks, compile_blocks)
        if self.options.pp > 1:
            assert self.mesh is not None
            exchanged = compute_dtype or dtype
            self.pipeline = Pipeline(
                parts, self.options, self.mesh.get_group("pp"), exchanged, model.config.hidden_size
            )
        return parts

    def _stages(self) -> range:
        return range(self.pp, self.options.stages, self.options.pp)

    def _prepare(
        self,
        part: ModelPart,
        dtype: torch.dtype,
        compute_dtype: torch.dtype | None,
        recompute_blocks: str,
        compiled: bool,
    ) -> None:
        model, options = part.model, self.options
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype if parameter.requires_grad else compute_dtype or dtype)
        if options.tp > 1:
            assert self.mesh is not None
            mesh = self.mesh["tp"]
            tp_training.split(model, model.config, mesh, options.sequence_parallel)
            part.enter, part.group = enter(mesh.get_group(), options.sequence_parallel), mesh.get_group()
            part.vocab_start = tp_training.vocab_start(model.config.vocab_size, self.tp, options.tp)
        if self.context is not None:
            group = self.context
            part.attention = lambda documents: context_parallel.attention(documents, group, options.cp_method)
        if self.mesh is None and compute_dtype not in (None, dtype):
            compute_in(model, compute_dtype)
        if self.device.type == "cpu" and self.context is None and (compute_dtype or dtype) == torch.bfloat16:
            use_blocked(part)
        for module in model.modules():
            materialise(module, self.device)
        if model.embed_tokens is not None and model.lm_head is not None:
            model.tie()
        for block in model.layers.values():
            recompute(block, recompute_blocks)
        if compiled:
            compile_blocks(part)
        if self.mesh is not None:
            mesh = self.mesh["dp_replicate", "fsdp"] if options.dp_replicate > 1 else self.mesh["fsdp"]
            fsdp.shard(part, mesh, compute_dtype, reshard=options.pp == 1)

    def parameters(self, parts: Iterable[ModelPart]) -> dict[str, nn.Parameter]:
        """This rank's parameters by their checkpoint names, trained or not; under a mesh each is a DTensor."""
        return dict(whole(parts).named_parameters())

    @torch.no_grad()
    def load(self, parts: Iterable[ModelPart], read: Read) -> None:
        """Fill every parameter; `read` gives `index` of the whole tensor of that name, each rank its own part."""
        for name, parameter in self.parameters(parts).items():
            mine, tensor = local(parameter), read(name, self._index(parameter))
            if tensor.shape != mine.shape:
                raise UserError(f"{name} has shape {list(tensor.shape)} where this rank holds {list(mine.shape)}.")
            mine.copy_(tensor)

    def _index(self, parameter: Tensor) -> tuple[slice, ...]:
        """This rank's part of a whole tensor: cut by tp first, then by fsdp, equal parts with the last ones smaller."""
        index = [slice(0, length) for length in parameter.shape]
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            for axis in reversed(range(mesh.ndim)):
                how = parameter.placements[axis]
                if how.is_shard() or type(how).__name__ == "_StridedShard":
                    was, size, rank = index[how.dim], mesh.size(axis), mesh.get_local_rank(axis)  # type: ignore[attr-defined]
                    part = -(-(was.stop - was.start) // size)
                    start = min(was.start + rank * part, was.stop)
                    index[how.dim] = slice(start, min(start + part, was.stop))  # type: ignore[attr-defined]
        return tuple(index)

    # Training

    def step(self, parts: list[ModelPart], microbatches: list[Batch], loss: Loss, *, scale: float = 1.0) -> Tensor:
        """Forward and backward of a step: the loss sums of all ranks, float64 [k] on the CPU.

        Adds to each trained parameter's `grad` the gradient of scale * sums[0], summed over data ranks, not divided.
        Call it once between two `zero_grad`s.
        """
        for part in parts:
            part.train()
        mine = [self._mine(batch) for batch in microbatches]
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
        """The loss sums alone."""
        for part in parts:
            part.eval()
        mine = [self._mine(batch) for batch in microbatches]
        if self.pipeline is not None:
            return self.sum(self.pipeline.evaluate(mine, loss))
        (part,) = parts
        part.loss = loss
        return self.sum([part(batch.pop("ids"), **batch) for batch in mine])

    def _mine(self, batch: Batch) -> Batch:
        """What this rank computes of a microbatch: its part of each sequence."""
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        check_length(self.options, batch["ids"].shape[1])
        if self.context is None:
            return batch
        batch.setdefault("documents", torch.zeros_like(batch["ids"]))
        kept = context_parallel.local_positions(batch["ids"].shape[1], self.cp, self.options.cp).to(self.device)
        return {name: tensor[:, kept] for name, tensor in batch.items()}

    def sum(self, sums: list[Tensor]) -> Tensor:
        """Microbatches' sums of all ranks; ranks of one tensor-parallel group have computed the same ones."""
        total = torch.stack([one.to("cpu", torch.float64) for one in sums]).sum(0) if sums else None
        if self.mesh is None:
            assert total is not None
            return total
        lengths = torch.tensor(0 if total is None else len(total))
        dist.all_reduce(lengths, dist.ReduceOp.MAX)
        if total is None or self.tp > 0:
            total = torch.zeros(int(lengths), dtype=torch.float64)
        dist.all_reduce(total)
        return total

    def reduce_tied_grads(self, parts: list[ModelPart]) -> None:
        """Tied embeddings are held by the first and the last stage: both get the sum of the two gradients."""
        if not parts[0].model.config.tie_word_embeddings or self.ends is None:
            return
        tied = self.parameters(parts).get("model.embed_tokens.weight")
        if tied is not None and tied.grad is not None:
            dist.all_reduce(local(tied.grad), group=self.ends)

    def grad_norm(self, parts: list[ModelPart]) -> float:
        """The L2 norm of all gradients together, each parameter counted once."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for name, parameter in self.parameters(parts).items():
            if parameter.grad is not None:
                total += self._share(name, parameter, parts) * _square(local(parameter.grad))
        total = total.cpu()
        if self.mesh is not None:
            dist.all_reduce(total)
        return float(total.sqrt())

    def trained(self, parts: list[ModelPart]) -> int:
        """How many numbers are trained, each counted once."""
        mine = {name: p for name, p in self.parameters(parts).items() if p.requires_grad}
        total = torch.tensor(0.0, dtype=torch.float64)
        for name, parameter in mine.items():
            total += self._share(name, parameter, parts) * local(parameter).numel()
        if self.mesh is not None:
            dist.all_reduce(total)
        return round(float(total))

    def _share(self, name: str, parameter: nn.Parameter, parts: list[ModelPart]) -> float:
        """One over the number of ranks that hold this same piece."""
        copies = self.options.dp_replicate
        if isinstance(parameter, DTensor) and self.options.tp > 1 and not isinstance(parameter.placements[-1], Shard):
            copies *= self.options.tp
        if self.options.pp > 1 and name == "model.embed_tokens.weight" and parts[0].model.config.tie_word_embeddings:
            copies *= 2
        return 1 / copies

    def scale_grads(self, parts: list[ModelPart], factor: float) -> None:
        """Multiply every gradient."""
        for parameter in self.parameters(parts).values():
            if parameter.grad is not None:
                local(parameter.grad).mul_(factor)

    # What leaves the run

    def full_state(self, parts: list[ModelPart], *, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Every tensor whole, by name: on the first rank on the CPU, one at a time; the others take part and get none.

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
        facts: list[Any] = [None] * self.size
        dist.all_gather_object(facts, {name: (tuple(p.shape), p.dtype) for name, p in mine.items()})
        column = self.size // self.options.pp
        seen: set[str] = set()
        for stage in range(self.options.pp):
            owner = stage * column  # the rank of that stage in the first rank's place
            for name, (shape, dtype) in facts[owner].items():
                if name in seen:
                    continue
                seen.add(name)
                if self.pp == stage:
                    full = mine[name].full_tensor().detach().cpu()  # type: ignore[attr-defined]
                if owner > 0 and self.rank == owner:
                    dist.send(full, 0)
                if self.is_first:
                    if owner > 0:
                        full = torch.empty(shape, dtype=dtype)
                        dist.recv(full, owner)
                    yield name, full

    def check_tied_embeddings(self, parts: list[ModelPart]) -> None:
        """Tied embeddings on both ends of a pipeline are saved as one: they must not have come to differ."""
        if self.ends is None or not parts[0].model.config.tie_word_embeddings:
            return
        tied = self.parameters(parts).get("model.embed_tokens.weight")
        if tied is not None:
            here = local(tied).detach().cpu()
            other = here.clone()
            dist.broadcast(other, group_src=0, group=self.ends)
            if not torch.equal(here, other):
                raise RuntimeError("the embeddings of the first and the last pipeline stage have come to differ")

    @contextmanager
    def watch_ranks(self, lost_after: float = LOST) -> Iterator[None]:
        """Around a run. When a rank ends in it, however it does, the others raise RankLost, which names it, or end.

        A rank is lost that gives no sign of life for `lost_after` seconds, or that an error has thrown out of here.
        """
        if self.mesh is None:
            yield
            return
        watch = Heartbeat(self.rank, self.size, lost_after)
        try:
            yield
            dist.barrier()  # so that none is missed while others still work
        except BaseException as error:
            if not is_lost(error):
                watch.say()
                raise
            lost = watch.verdict()
            if lost == self.rank or (lost is None and "TORCHELASTIC_RUN_ID" not in os.environ):
                raise
            raise RankLost(ended(lost)) from error
        finally:
            watch.close()

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier()

    def close(self) -> None:
        """Leave the ranks."""
        if self.mesh is not None:
            dist.destroy_process_group()


def _square(x: Tensor) -> Tensor:
    """The sum of squares, float64, without a copy of x in it. A CPU sums long float32 tensors badly: in pieces."""
    exact = torch.promote_types(x.dtype, torch.float32)
    pieces = x.reshape(-1).split(1 << 18) if x.device.type == "cpu" else (x,)
    norms = torch.stack([torch.linalg.vector_norm(piece, dtype=exact) for piece in pieces])
    return norms.double().square().sum()


def _my_group(places: Tensor) -> dist.ProcessGroup:
    """The group of those ranks, along the last dimension, that this rank is one of."""
    ranks = places.reshape(-1, places.shape[-1]).unique(dim=0).tolist()
    group, _ = dist.new_subgroups_by_enumeration(ranks)
    return group
