"""Rotary position embeddings: frequencies for every scaling that LLaMA checkpoints use, and the rotation itself.

The formulas are those of transformers' `modeling_rope_utils` (linear: kaiokendev; dynamic: NTK by /u/emozilla; yarn:
arXiv 2309.00071; llama3: Llama 3.1's reference code), in float32 as there, so that logits agree.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from puna.model.config import ModelConfig


def rope_frequencies(config: ModelConfig, length: int | None = None) -> tuple[Tensor, float]:
    """Angles per position, float32 [head_dim / 2], and the factor on cos and sin (not 1 for yarn only).

    `length` (tokens) matters to `dynamic` alone, whose base grows with the sequence beyond the trained context.
    """
    dim, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling or {}
    exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    rope_type, factor = scaling.get("rope_type"), scaling.get("factor", 1.0)
    if rope_type == "dynamic":
        trained = config.max_position_embeddings
        stretch = factor * max(length or 0, trained) / trained - (factor - 1)
        return 1.0 / (theta * stretch ** (dim / (dim - 2))) ** exponent, 1.0
    frequencies = 1.0 / theta**exponent
    if rope_type == "linear":
        return frequencies / factor, 1.0
    if rope_type == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if rope_type == "yarn":
        return _yarn(frequencies, config), _yarn_attention_factor(scaling)
    return frequencies, 1.0


def _llama3(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between blended."""
    factor: float
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the trained context
    blend: Tensor = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / factor + blend * frequencies


def _yarn(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Slow the dimensions that turn less than beta_slow times in the trained context, keep those above beta_fast."""
    scaling, dim = config.rope_scaling or {}, config.head_dim
    trained = scaling.get("original_max_position_embeddings") or config.max_position_embeddings

    def dimension(turns: float) -> float:
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as transformers: no division by zero
    ramp: Tensor = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    factor: float = scaling["factor"]
    return frequencies / factor * ramp + frequencies * (1 - ramp)


def _yarn_attention_factor(scaling: dict[str, Any]) -> float:
    """The factor on cos and sin: given, or 0.1 ln(factor) + 1 (DeepSeek's mscale pair taken into account)."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)


def cos_sin(frequencies: Tensor, factor: float, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and signed sin for `rotate`, [..., 1, head_dim]: halves (cos, cos) and (-sin, sin)."""
    angle = positions.unsqueeze(-1).to(frequencies.dtype) * frequencies
    cos, sin = angle.cos() * factor, angle.sin() * factor
    return torch.cat((cos, cos), -1).unsqueeze(-2), torch.cat((-sin, sin), -1).unsqueeze(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE of x [..., heads, head_dim]; computed in cos's precision, returned in x's."""
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat((b, a), -1), sin).to(x.dtype)
