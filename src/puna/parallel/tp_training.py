"""Tensor parallelism for training: parameters are stored as DTensors, by the one rule of `puna.model.tp_plan`, and the
model computes with their local tensors.

So FSDP2, and a checkpoint that another layout loads, know what each rank holds. Computing with plain tensors needs one
care: a parameter that is replicated, but used on a part of the heads or of the sequence, has a partial gradient on each
rank, and its DTensor has to be told so (`Partial`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from puna.model.config import ModelConfig
from puna.model.linear import Linear
from puna.model.llama import MLP, Attention, Embedding, RMSNorm
from puna.model.lora import LoRA
from puna.model.tp_plan import dtensor_chunk, dtensor_slice, has_replicated_heads, tp_slice
from puna.parallel.collectives import enter, leave
from puna.parallel.model_part import ModelPart


@dataclass(frozen=True)
class ParameterPlacement:
    """How a parameter is stored over the tensor-parallel ranks, and what a rank computes with.

    `rows` of the local tensor are used, None for all of them; `partial_grad` where the ranks' gradients of a replicated
    parameter have to be summed.
    """

    placement: Placement
    rows: slice | None = None
    partial_grad: bool = False


def apply_tp(part: ModelPart, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    """Store the parameters of a part on the meta device as DTensors over `mesh`, and set the collectives.

    `sequence_parallel`: the residual stream is split along the sequence.
    """
    model, config = part.model, part.model.config
    group, rank, size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
    vocab_start = dtensor_chunk(config.vocab_size, rank, size).start
    for name, module in model.named_modules():
        if isinstance(module, Linear | RMSNorm | Embedding | LoRA):
            placements = {
                key: parameter_placement(
                    f"{name}.{key}", tuple(parameter.shape), config, rank, size, sequence_parallel=sequence_parallel
                )
                for key, parameter in module.named_parameters(recurse=False)
            }
            for key, chosen in placements.items():
                _to_dtensor(module, key, chosen.placement, mesh)
            module.get_param = _local_getter(placements)
        if isinstance(module, Attention | MLP):
            module.enter, module.leave = enter(group, sequence_parallel), leave(group, sequence_parallel)
        if isinstance(module, Embedding):
            module.vocab_start, module.leave = vocab_start, leave(group, sequence_parallel)
    part.enter, part.group, part.vocab_start = enter(group, sequence_parallel), group, vocab_start


def parameter_placement(
    name: str, shape: tuple[int, ...], config: ModelConfig, rank: int, size: int, *, sequence_parallel: bool
) -> ParameterPlacement:
    """`tp_slice` as a placement. Key/value heads that are fewer than ranks are replicated, and a rank uses its rows."""
    index = tp_slice(name, shape, config, rank, size)
    *_, module, parameter = name.replace(".adapter.", ".").split(".")
    if has_replicated_heads(module, config, size) and parameter != "a":
        return ParameterPlacement(Replicate(), rows=index[0], partial_grad=True)
    split = [dimension for dimension, part in enumerate(index) if part != slice(0, shape[dimension])]
    if split:
        return ParameterPlacement(Shard(split[0]))
    lora = parameter in ("a", "b")  # the factor beside the one that is split
    return ParameterPlacement(Replicate(), partial_grad=lora or sequence_parallel)


def _local_getter(placements: dict[str, ParameterPlacement]) -> Callable[[nn.Module, str], Tensor]:
    """`get_param` of a module whose parameters are stored as DTensors."""

    def get_param(module: nn.Module, name: str) -> Tensor:
        chosen, stored = placements[name], getattr(module, name)
        local: Tensor = stored.to_local(grad_placements=[Partial()] if chosen.partial_grad else None)
        return local if chosen.rows is None else local[chosen.rows]

    return get_param


def _to_dtensor(module: nn.Module, name: str, placement: Placement, mesh: DeviceMesh) -> None:
    full: nn.Parameter = getattr(module, name)
    shape = list(full.shape)
    if isinstance(placement, Shard):
        part = dtensor_chunk(shape[placement.dim], mesh.get_local_rank(), mesh.size())
        shape[placement.dim] = part.stop - part.start
    local = torch.empty(shape, dtype=full.dtype, device=full.device)
    stored = DTensor.from_local(local, mesh, [placement], run_check=False, shape=full.shape, stride=full.stride())
    setattr(module, name, nn.Parameter(stored, requires_grad=full.requires_grad))


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give every parameter memory on `device`, uninitialised; tied weights come apart and have to be tied again."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty: Tensor
            if isinstance(parameter, DTensor):
                local = torch.empty_like(parameter.to_local(), device=device)
                empty = DTensor.from_local(
                    local, parameter.device_mesh, parameter.placements, run_check=False,
                    shape=parameter.shape, stride=parameter.stride(),
                )  # fmt: skip
            else:
                empty = torch.empty_like(parameter, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))


def local(tensor: Tensor) -> Tensor:
    """The local tensor of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_index(parameter: Tensor) -> tuple[slice, ...]:
    """Where `local(parameter)` lies in the full tensor. The innermost mesh axis (tp) cuts first, then fsdp."""
    cuts = []
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for axis in reversed(range(mesh.ndim)):
            placement = parameter.placements[axis]
            # torch marks a dimension that tp cuts before fsdp by _StridedShard, which not every version calls a shard.
            if placement.is_shard() or type(placement).__name__ == "_StridedShard":
                dimension: int = placement.dim  # type: ignore[attr-defined]
                cuts.append((dimension, mesh.get_local_rank(axis), mesh.size(axis)))
    return dtensor_slice(tuple(parameter.shape), cuts)
