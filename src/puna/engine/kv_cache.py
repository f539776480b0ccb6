"""How many blocks the KV cache gets: what was asked for, or what the free memory holds."""

from __future__ import annotations

import torch

from puna.engine.runner import cache_shape
from puna.errors import UserError
from puna.model.llama import Llama
from puna.parallel.memory import free_bytes
from puna.parallel.tp_inference import TensorParallel

GPU_SHARE = 0.85  # of the free memory once the weights are there; the rest is for activations and graphs
CPU_SHARE = 0.5  # of the available memory: others live there too. Pages are only taken when they are used


def cache_blocks(
    model: Llama,
    block_size: int,
    max_model_len: int,
    max_sequences: int,
    tokens: int | None,
    tp: TensorParallel | None,
) -> int:
    """Blocks of `block_size` positions; the same on every rank.

    `tokens` asks for that many positions. Else as many as fit, but no more than `max_sequences` of the longest could
    use. Raises UserError when not even one block fits.
    """
    if tokens is not None:
        if tokens < block_size:
            raise UserError(f"a cache of {tokens} tokens is less than one block of {block_size}; raise --kv-tokens.")
        return tokens // block_size
    weight = model.embed_tokens.weight
    block_bytes = torch.Size(cache_shape(model, 1, block_size)).numel() * weight.dtype.itemsize
    blocks = cache_bytes(weight.device) // block_bytes
    if tp is not None:
        blocks = tp.all_reduce_min(blocks)
    if blocks < 1:
        raise UserError("no memory is left for the KV cache; use a smaller dtype, more ranks or another device.")
    return min(blocks, max_sequences * -(-max_model_len // block_size))


def cache_bytes(device: torch.device) -> int:
    """Bytes that the cache may take on a device."""
    return int(free_bytes(device) * (GPU_SHARE if device.type == "cuda" else CPU_SHARE))
