"""How a model part computes, without changing what it computes: compute dtype, CPU kernels, torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from puna.kernels import cpu_bf16
from puna.model.attention import causal, packed_attention
from puna.model.linear import Linear
from puna.model.llama import MLP, Block, Llama, RMSNorm
from puna.parallel.model_part import ModelPart


def apply_compute_dtype(model: Llama, dtype: torch.dtype) -> None:
    """Mixed precision without FSDP2: multiply in `dtype`; weights keep their stored dtype, and so do their gradients.

    The embedding is cast after the lookup, so that the gradients of a frequent token are summed in the stored dtype;
    the output layer's weight is cast by the loss, for the same reason.
    """

    def get_param(module: nn.Module, name: str) -> Tensor:
        parameter: Tensor = getattr(module, name)
        return parameter.to(dtype)

    for module in model.modules():
        if isinstance(module, Linear) and module is not model.lm_head:
            module.kernel, module.get_param = cpu_bf16.mixed_precision_linear(dtype), get_param
        elif isinstance(module, RMSNorm):
            module.get_param = get_param
    model.embed_tokens.leave = lambda x: x.to(dtype)


def apply_cpu_kernels(part: ModelPart) -> None:
    """Use the kernels of `puna.kernels.cpu_bf16`: for a part that computes in bfloat16 on a CPU."""
    for module in part.modules():
        if isinstance(module, RMSNorm):
            module.kernel = cpu_bf16.rms_norm
        elif isinstance(module, MLP):
            module.kernel = cpu_bf16.swiglu
        elif isinstance(module, Block):
            module.kernel = cpu_bf16.residual_add
    part.attention = lambda documents: (
        cpu_bf16.causal if documents is None else packed_attention(documents, cpu_bf16.causal)
    )


def apply_compile(part: ModelPart) -> None:
    """Compile each block by torch.compile; attention within documents stays eager, since its masks differ each step."""
    for block in part.model.layers.values():
        # Training keeps no cache by layer, and with numbers of their own the blocks would be compiled one by one.
        assert isinstance(block, Block)
        block.self_attn.layer = 0
        block.compile()
    eager = part.attention
    part.attention = lambda documents: causal if documents is None else torch.compiler.disable(eager(documents))
