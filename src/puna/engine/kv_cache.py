"""The KV cache as tensors: how many blocks fit the free memory, its shape, and its allocation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from puna.errors import UserError
from puna.model.llama import Attention, Llama
from puna.parallel.memory import free_bytes
from puna.parallel.tp_inference import TensorParallel

BLOCK_SIZE = 16  # positions; large enough for copies to run at memory speed, small enough to share short prefixes
GPU_FRACTION = 0.85  # of the memory that is free after loading; the rest is for activations and CUDA graphs
CPU_FRACTION = 0.5  # of the available memory, which other processes need too; pages are only taken when used


def check_cache_tokens(tokens: int, block_size: int, token_bytes: int, memory: int) -> None:
    """Raises UserError for a KV cache of less than one block, or larger than the free `memory` in bytes of a rank."""
    if tokens < block_size:
        raise UserError(
            f"A KV cache of {tokens} tokens is smaller than one block of {block_size}; raise kv_cache_tokens."
        )
    if tokens * token_bytes > memory:
        raise UserError(
            f"A KV cache of {tokens} tokens takes {tokens * token_bytes / 1e9:.1f} GB, and {memory / 1e9:.1f} GB of"
            f" memory are free; set kv_cache_tokens to at most {memory // token_bytes}."
        )


def cache_blocks(
    model: Llama,
    block_size: int,
    max_model_len: int,
    max_sequences: int,
    tokens: int | None,
    tp: TensorParallel | None,
) -> int:
    """Blocks of `block_size` positions; the same on every rank.

    `tokens`: that many positions, as `check_cache_tokens` accepts them. None: as many as fit the free memory, at most
    what `max_sequences` of the maximum length could use. Raises UserError when not even one block fits.
    """
    if tokens is not None:
        return tokens // block_size
    weight = model.embed_tokens.weight
    block_bytes = block_size * model.config.kv_bytes_per_token(weight.dtype.itemsize, _kv_heads(model))
    blocks = cache_bytes(weight.device) // block_bytes
    if tp is not None:
        blocks = tp.all_reduce_min(blocks)
    if blocks < 1:
        raise UserError("No memory is left for the KV cache; use a smaller dtype, more ranks or another device.")
    return min(blocks, max_sequences * -(-max_model_len // block_size))


def cache_bytes(device: torch.device) -> int:
    """Bytes that the KV cache may take on a device."""
    return int(free_bytes(device) * (GPU_FRACTION if device.type == "cuda" else CPU_FRACTION))


def allocate(model: Llama, num_blocks: int, block_size: int) -> Tensor:
    """The cache [layers, 2, kv_heads of this rank, blocks, block_size, head_dim], filled with zeros.

    Zeros, because masked scores must be finite. On the CPU they take memory page by page as they are written to;
    torch.zeros would write to all of them, which for many gigabytes takes seconds.
    """
    config, weight = model.config, model.embed_tokens.weight
    shape = (config.num_hidden_layers, 2, _kv_heads(model), num_blocks, block_size, config.head_dim)
    if weight.device.type != "cpu":
        return torch.zeros(shape, dtype=weight.dtype, device=weight.device)
    size = torch.Size(shape).numel() * weight.dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(weight.dtype).view(shape)


def _kv_heads(model: Llama) -> int:
    """Key/value heads of this rank."""
    return next(module.kv_heads for module in model.modules() if isinstance(module, Attention))
