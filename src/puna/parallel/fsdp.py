"""Data parallelism by FSDP2: weights, gradients and optimizer state sharded over ranks, a block gathered when it runs.

Gradients are summed over the ranks, never averaged: the loss of a step is a sum over its tokens, on whichever rank they
are.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from puna.errors import UserError
from puna.parallel.mesh import MeshOptions
from puna.parallel.model_part import ModelPart


def apply_fsdp(part: ModelPart, mesh: DeviceMesh, options: MeshOptions, compute_dtype: torch.dtype | None) -> None:
    """Shard the part's parameters, which are on their device, over the mesh's fsdp axis; copies over dp_replicate.

    With `compute_dtype` weights are gathered in that dtype, and gradients are summed in float32. Raises UserError for a
    vocabulary that can't be cut by both tp and fsdp.
    """
    mesh = mesh["dp_replicate", "fsdp"] if options.dp_replicate > 1 else mesh["fsdp"]
    size = mesh.size(mesh.ndim - 1)
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32 if compute_dtype is not None else None,
        cast_forward_inputs=False,  # cos, sin and the residual stream keep their dtype
    )

    def placement(parameter: nn.Parameter) -> Shard | None:
        """Rows, but columns where tp has cut the rows unevenly: FSDP2 and checkpoints can't cut those once more."""
        if size == 1 or not isinstance(parameter, DTensor):
            return None
        (tp_placement,), ranks = parameter.placements, parameter.device_mesh.size()
        if not (isinstance(tp_placement, Shard) and tp_placement.dim == 0 and parameter.shape[0] % ranks):
            return None
        if parameter.shape[1] % size:
            raise UserError(
                f"A vocabulary of {parameter.shape[0]} over tp {ranks} needs a hidden size that dp_shard x cp {size}"
                f" divides, not {parameter.shape[1]}; change the mesh."
            )
        return Shard(1)

    for module in (*part.model.layers.values(), part):
        # Gathered weights are freed between forward and backward: but not those of embedding and output layer, used
        # first and last, nor in a pipeline, where each microbatch would gather them anew.
        reshard = module is not part and options.pp == 1
        fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=placement, reshard_after_forward=reshard)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
