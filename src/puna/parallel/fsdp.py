"""Data parallelism: weights, gradients and optimizer state cut over ranks by FSDP2, a block gathered when it is used.

Gradients are sums over the ranks, never means: a step's loss is a sum over its tokens wherever they are (D9 of
docs/architecture.md).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from puna.errors import UserError
from puna.parallel.model_part import ModelPart


def shard(part: ModelPart, mesh: DeviceMesh, compute_dtype: torch.dtype | None, *, reshard: bool) -> None:
    """Cut the part's weights over `mesh` (shards; or replicas x shards) in place; they are on their device.

    With `compute_dtype` they are gathered in that type, and gradients are summed in float32. `reshard`: let go of a
    block's gathered weights between its forward and backward pass.
    """
    size = mesh.size(mesh.ndim - 1)
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32 if compute_dtype is not None else None,
        cast_forward_inputs=False,  # cos and sin stay exact
    )

    def placement(parameter: nn.Parameter) -> Shard | None:
        """FSDP2 and checkpoints cut a dimension twice only where tensor parallelism has cut it evenly."""
        if size == 1 or not isinstance(parameter, DTensor):
            return None
        (how,), ranks = parameter.placements, parameter.device_mesh.size()
        if not (isinstance(how, Shard) and how.dim == 0 and parameter.shape[0] % ranks):
            return None
        if parameter.shape[1] % size:
            raise UserError(
                f"a vocabulary of {parameter.shape[0]} over tp {ranks} needs a hidden size that dp_shard x cp {size}"
                f" divides, not {parameter.shape[1]}; change the mesh."
            )
        return Shard(1)

    for module in (*part.model.layers.values(), part):
        # The ends of the model are used first and last, so that letting go of them between saves little.
        keep = module is part or not reshard
        fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=placement, reshard_after_forward=not keep)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other kind
