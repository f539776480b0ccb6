"""From a model on the meta device to the parts that one rank trains, in one fixed order."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from puna.model.llama import Llama
from puna.parallel.activation_checkpoint import apply_activation_checkpoint
from puna.parallel.context_parallel import apply_cp
from puna.parallel.fsdp import apply_fsdp
from puna.parallel.mesh import MeshOptions, check_model
from puna.parallel.model_part import ModelPart
from puna.parallel.pipeline import split_stage
from puna.parallel.tp_training import apply_tp, materialise
from puna.parallel.transforms import apply_compile, apply_compute_dtype, apply_cpu_kernels


def parallelize(
    model: Llama,
    options: MeshOptions,
    device: torch.device,
    mesh: DeviceMesh | None = None,
    cp_group: dist.ProcessGroup | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    recompute_blocks: str = "none",
    compile_blocks: bool = False,
) -> list[ModelPart]:
    """Cut a whole model on the meta device to this rank's parts (pipeline stages), with uninitialised parameters.

    `mesh` has the axes pp, dp_replicate, fsdp (dp_shard x cp) and tp, None for one process; `cp_group` is that of the
    ranks with the other parts of the same sequences, None without context parallelism.

    Trained parameters are stored in `dtype`; products run in `compute_dtype` where given, and what isn't trained is
    stored in it. The residual stream has `residual_dtype` of that, as in inference. `recompute_blocks`: none, selective
    or full; `compile_blocks`: by torch.compile. Raises UserError where the model cannot be cut this way.
    """
    compute_dtype = compute_dtype or dtype
    check_model(model.config, options)
    pp_rank = mesh.get_local_rank("pp") if mesh is not None else 0
    stages = range(pp_rank, options.stages, options.pp)
    parts = [ModelPart(split_stage(model, stage, options.stages)) for stage in stages]
    for part in parts:
        _set_dtypes(part, dtype, compute_dtype)
        if mesh is not None and options.tp > 1:
            apply_tp(part, mesh["tp"], sequence_parallel=options.sequence_parallel)
        if cp_group is not None:
            apply_cp(part, cp_group, options.cp_method)
        if mesh is None and compute_dtype != dtype:  # with ranks FSDP2 casts a block's weights as it gathers them
            apply_compute_dtype(part.model, compute_dtype)
        if device.type == "cpu" and compute_dtype == torch.bfloat16 and cp_group is None:
            apply_cpu_kernels(part)
        materialise(part, device)
        part.model.tie()
        apply_activation_checkpoint(part.model, recompute_blocks)
        if compile_blocks:
            apply_compile(part)
        if mesh is not None:
            apply_fsdp(part, mesh, options, None if compute_dtype == dtype else compute_dtype)
    return parts


def _set_dtypes(part: ModelPart, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
    for parameter in part.parameters():
        parameter.data = parameter.data.to(dtype if parameter.requires_grad else compute_dtype)
