"""Tensor parallelism for training: parameters are stored as DTensors, by the one rule of `puna.model.tp_plan`, and the
model computes with their local parts.

So FSDP2, and a checkpoint that another layout reads, know what each part is. Computing with plain tensors needs one
care: a parameter that all ranks hold whole, but use on a part of the heads or of the sequence, has a gradient that
is a part of a sum on each rank, and its DTensor has to be told so (`Partial`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from puna.model.config import ModelConfig
from puna.model.linear import Linear
from puna.model.llama import MLP, Attention, Embedding, RMSNorm
from puna.model.lora import LoRA
from puna.model.tp_plan import tp_slice
from puna.parallel.collectives import enter, leave


@dataclass(frozen=True)
class Use:
    """How a rank computes with a stored parameter: with the part of it that is here, or `rows` of it where all hold it
    whole; `partial` where the ranks' gradients of a whole one are to be summed.
    """

    placement: Placement
    rows: slice | None
    partial: bool


def split(model: nn.Module, config: ModelConfig, mesh: DeviceMesh, sequence: bool) -> None:
    """Store the parameters of a model or stage as DTensors over `mesh`.

    The parameters are still on the meta device. `sequence`: the residual stream is cut along the sequence.
    """
    group, rank = mesh.get_group(), mesh.get_local_rank()
    for name, part in model.named_modules():
        if isinstance(part, Linear | RMSNorm | Embedding | LoRA):
            uses = {
                kind: use(f"{name}.{kind}", tuple(parameter.shape), config, rank, mesh.size(), sequence)
                for kind, parameter in part.named_parameters(recurse=False)
            }
            for kind, how in uses.items():
                _store(part, kind, how.placement, mesh)
            part.get_param = reader(uses)
        if isinstance(part, Attention | MLP):
            part.enter, part.leave = enter(group, sequence), leave(group, sequence)
        if isinstance(part, Embedding):
            part.vocab_start, part.leave = vocab_start(config.vocab_size, rank, mesh.size()), leave(group, sequence)


def reader(uses: dict[str, Use]):  # type: ignore[no-untyped-def]
    """What a module computes with, by the name of its parameter."""

    def read(module: nn.Module, name: str) -> Tensor:
        how, stored = uses[name], getattr(module, name)
        local = stored.to_local(grad_placements=[Partial()] if how.partial else None)
        return local if how.rows is None else local[how.rows]

    return read


def use(name: str, shape: tuple[int, ...], config: ModelConfig, rank: int, size: int, sequence: bool) -> Use:
    """The rule of `tp_slice` as a placement. Where it gives ranks the same rows (few key and value heads), all store
    the whole and take those rows when they compute.
    """
    index = tp_slice(name, shape, config, rank, size)
    *_, module, kind = name.replace(".adapter.", ".").split(".")
    if module in ("k_proj", "v_proj") and config.num_key_value_heads < size and kind != "a":
        return Use(Replicate(), index[0], True)
    cut = [dimension for dimension, part in enumerate(index) if part != slice(0, shape[dimension])]
    if cut:
        return Use(Shard(cut[0]), None, False)
    on_a_part = kind in ("a", "b")  # of LoRA, the factor beside the one that is cut
    return Use(Replicate(), None, on_a_part or sequence)


def vocab_start(vocab_size: int, rank: int, size: int) -> int:
    """The first id of a rank's part of the vocabulary, cut as DTensor cuts: equal parts, the last ones smaller."""
    return min(rank * -(-vocab_size // size), vocab_size)


def _store(module: nn.Module, name: str, placement: Placement, mesh: DeviceMesh) -> None:
    whole: nn.Parameter = getattr(module, name)
    shape = list(whole.shape)
    if isinstance(placement, Shard):
        start = vocab_start(shape[placement.dim], mesh.get_local_rank(), mesh.size())
        end = vocab_start(shape[placement.dim], mesh.get_local_rank() + 1, mesh.size())
        shape[placement.dim] = end - start
    local = torch.empty(shape, dtype=whole.dtype, device=whole.device)
    stored = DTensor.from_local(local, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride())
    setattr(module, name, nn.Parameter(stored, requires_grad=whole.requires_grad))


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give the module's own parameters memory on `device`, uninitialised."""
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
    """This rank's part of a DTensor, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
