"""What one rank trains: the model, or a stage of it, with the loss as the end of its forward pass.

The loss stands inside, so that whoever shards a module's weights (FSDP2) or runs a stage (pipelining) sees one module
from tokens to a number, output layer included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from puna.errors import UserError
from puna.kernels import cpu_bf16
from puna.model.attention import Attend, causal, packed_attention
from puna.model.linear import Linear
from puna.model.llama import MLP, Block, Llama, RMSNorm, identity
from puna.model.lora import LoRA

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Head:
    """The output layer that a loss multiplies with: weight [ids, hidden] of the ids from `vocab_start` on.

    `group` is that of the ranks that hold the other ids, None when all are here. A loss returns, of the gradient of its
    hidden states, this part's share; the shares are summed outside.
    """

    weight: Tensor
    vocab_start: int = 0
    group: dist.ProcessGroup | None = None


Loss = Callable[
    [Tensor, Tensor, Head], Tensor
]  # (hidden [B, T, d], labels [B, T], head) -> sums [k], the first minimised


class ModelPart(nn.Module):
    """A model or pipeline stage: token ids, or hidden states of the stage before -> hidden states, or loss sums."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model
        self.loss: Loss | None = None  # set before each step
        self.attention: Callable[[Tensor | None], Attend] = attention
        self.enter: Callable[[Tensor], Tensor] = identity  # into the output layer, where its ids are split
        self.group: dist.ProcessGroup | None = None
        self.vocab_start = 0

    def forward(self, x: Tensor, *, positions: Tensor, labels: Tensor, documents: Tensor | None = None) -> Tensor:
        hidden = self.model(x, positions, self.attention(documents))
        if self.model.lm_head is None:
            return hidden
        assert self.loss is not None
        return self.loss(self.enter(hidden), labels, Head(self._head(), self.vocab_start, self.group))

    def _head(self) -> Tensor:
        layer = self.model.lm_head
        weight = layer.get_param(layer, "weight")
        if isinstance(layer.adapter, LoRA):  # the loss wants one matrix
            a, b = (layer.adapter.get_param(layer.adapter, name).to(weight.dtype) for name in "ab")
            weight = torch.addmm(weight, b, a, alpha=layer.adapter.scale)
        return weight


def attention(documents: Tensor | None) -> Attend:
    """Attention over whole rows: causal, and within each document where there are several."""
    return causal if documents is None else packed_attention(documents)


def compute_in(model: Llama, dtype: torch.dtype) -> None:
    """Multiply in `dtype` with weights that stay as they are stored; their gradients come in the stored type.

    The embedding is cast after the lookup, so that the gradients of a frequent token are summed in the stored type; the
    output layer's weight is left to the loss, for the same reason.
    """

    def get_param(module: nn.Module, name: str) -> Tensor:
        return getattr(module, name).to(dtype)

    for module in model.modules():
        if isinstance(module, Linear) and module is not model.lm_head:
            module.kernel, module.get_param = cpu_bf16.mixed_precision_linear(dtype), get_param
        elif isinstance(module, RMSNorm):
            module.get_param = get_param
    model.embed_tokens.leave = lambda x: x.to(dtype)


def use_blocked(part: ModelPart) -> None:
    """Let the part compute with `puna.kernels.cpu_bf16`: on a CPU, in 16 bits."""
    for module in part.modules():
        if isinstance(module, RMSNorm):
            module.kernel = cpu_bf16.rms_norm
        elif isinstance(module, MLP):
            module.kernel = cpu_bf16.swiglu
    part.attention = lambda documents: (
        cpu_bf16.causal if documents is None else packed_attention(documents, cpu_bf16.causal)
    )


def compile_blocks(part: ModelPart) -> None:
    """Compile each block by torch.compile; attention within documents stays out, as it is another one at every step."""
    for block in part.model.layers.values():
        # Training keeps no cache by layer, and with numbers of their own the blocks would be compiled one by one.
        assert isinstance(block, Block)
        block.self_attn.layer = 0
        block.compile()
    plain = part.attention
    part.attention = lambda documents: causal if documents is None else torch.compiler.disable(plain(documents))


def recompute(block: nn.Module, how: str) -> None:
    """Drop the block's activations after the forward pass: all of them, or all but the results of matrix products."""
    if how not in RECOMPUTE:
        raise UserError(f"recompute is one of {', '.join(RECOMPUTE)}, not {how!r}.")
    if how == "none":
        return
    context: dict[str, Any] = {}
    if how == "selective":
        context["context_fn"] = lambda: create_selective_checkpoint_contexts(_keep_products)
    plain = block.forward
    # On the instance, not by a wrapping module, so that names stay; and inside the hooks of FSDP2.
    block.forward = lambda *args: checkpoint(plain, *args, use_reentrant=False, **context)


_aten = torch.ops.aten
PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def whole(parts: Iterable[ModelPart]) -> nn.Module:
    """One module of all of a rank's parts, under checkpoint names; a tied weight goes by the embedding's alone."""
    top, inner, layers = nn.Module(), nn.Module(), nn.ModuleDict()
    for part in parts:
        model = part.model
        for name, block in model.layers.items():
            layers[name] = block
        if model.embed_tokens is not None:
            inner.embed_tokens = model.embed_tokens
        if model.norm is not None:
            inner.norm = model.norm
        if model.lm_head is not None and not model.config.tie_word_embeddings:
            top.lm_head = model.lm_head
        elif model.lm_head is not None:
            top.lm_head = nn.Module()
            if isinstance(model.lm_head.adapter, nn.Module):
                top.lm_head.adapter = model.lm_head.adapter
            if model.embed_tokens is None and not hasattr(inner, "embed_tokens"):
                inner.embed_tokens = nn.Module()
                inner.embed_tokens.weight = model.lm_head.weight
    inner.layers = layers
    top.model = inner
    return top
