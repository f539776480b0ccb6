"""Activation checkpointing: a block's activations are dropped after the forward pass and recomputed in the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from puna.errors import UserError
from puna.model.llama import Llama

RECOMPUTE = ("none", "selective", "full")


def apply_activation_checkpoint(model: Llama, recompute: str) -> None:
    """Recompute each block: not at all (`none`), all but the results of its products (`selective`), or `full`.

    `full` keeps a block's input alone. Raises UserError for another word.
    """
    if recompute not in RECOMPUTE:
        raise UserError(f"recompute must be one of {', '.join(RECOMPUTE)}, not {recompute!r}.")
    if recompute == "none":
        return
    context: dict[str, Any] = {}
    if recompute == "selective":
        context["context_fn"] = lambda: create_selective_checkpoint_contexts(_keep_products)
    for block in model.layers.values():
        _checkpoint(block, context)


def _checkpoint(block: nn.Module, context: dict[str, Any]) -> None:
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
