"""`int8`: weights as int8 with one scale per output channel, activations whole (W8A16, PaddleNLP's WINT8).

    scale[o] = max_i |weight[o, i]| / 127, rounded up to bfloat16
    q[o, i]  = round(weight[o, i] / scale[o])
    y[o]     = scale[o] * sum_i x[i] q[o, i]

Round to nearest, half to even; symmetric, without a zero point. A scale that bfloat16 holds exactly is the same number
in every compute dtype. The attribute names are those of compressed-tensors' int-quantized layout, strategy `channel`
(https://github.com/vllm-project/compressed-tensors).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.kernels.int8_linear import int8_linear, int8_linear_works
from puna.model.linear import Kernel, Linear
from puna.quant.scheme import QuantScheme, StoredTensor

MAX = 127


def pack(weight: Tensor) -> dict[str, Tensor]:
    """weight [out, in] -> int8 [out, in] and float32 scales [out, 1]; a row of zeros has the scale 1."""
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = exact.abs().amax(1, keepdim=True).float() / MAX
    rounded = scale.bfloat16().float()
    up = torch.nextafter(rounded.bfloat16(), torch.full_like(rounded, torch.inf).bfloat16()).float()
    scale = torch.where(rounded < scale, up, rounded)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return {"weight": (exact / scale).round().clamp(-MAX, MAX).to(torch.int8), "weight_scale": scale}


def unpack(stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The dequantised weight [out, in], rounded once to `dtype`."""
    exact = torch.promote_types(dtype, torch.float32)
    return (stored["weight"].to(exact) * stored["weight_scale"].to(exact)).to(dtype)


def matmul(x: Tensor, linear: Linear) -> Tensor:
    """x [..., in] -> [..., out]; summed in float32 or better, rounded once to x's dtype."""
    stored = INT8.tensors(linear)
    exact = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(x.to(exact), stored["weight"].to(exact))
    return (y * stored["weight_scale"].squeeze(1).to(exact)).to(x.dtype)


def kernel(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """torch's fused product where this machine has one for the dtype and it is right."""
    if not int8_linear_works(device, dtype):
        return None
    return lambda x, linear: int8_linear(x, linear.weight, linear.weight_scale)  # type: ignore[arg-type]


INT8 = QuantScheme(
    name="int8",
    summary="int8 weights with a scale per output channel, activations whole",
    stored={
        "weight": StoredTensor(torch.int8, ("out", "in")),
        "weight_scale": StoredTensor(torch.float32, ("out", "1")),
    },
    pack=pack,
    unpack=unpack,
    matmul=matmul,
    kernel=kernel,
)
