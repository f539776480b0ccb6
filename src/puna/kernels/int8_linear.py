"""A product with int8 weights on the CPU, x [..., in] in bfloat16: torch's fused operator reads each weight once, as
int8.

The operator is not public API (`torch._weight_int8pack_mm`), so its result is compared before it is used. Its float32
form is slower than a plain product and is left alone. The plain twin is `puna.quant.int8.matmul`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [..., in] bfloat16, weight int8 [out, in], scale [out, 1] -> scale * x weight^T, [..., out] bfloat16."""
    y = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), weight, scale.flatten().to(x.dtype))
    return y.view(*x.shape[:-1], -1)


@functools.cache
def int8_linear_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `int8_linear` runs on this device for activations of `dtype`, and gives the float64 product, rounded."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (48, 64), generator=generator, dtype=torch.int8)
    scale = torch.rand(48, 1, generator=generator).bfloat16().float()
    try:
        for rows in (1, 5, 33):
            x = torch.randn(rows, 64, generator=generator).to(dtype)
            exact = (x.double() @ weight.double().t()) * scale.double().t()
            summed = (x.double().abs() @ weight.double().abs().t()) * scale.double().t()
            error = (int8_linear(x, weight, scale).double() - exact).abs()
            if not (error <= 2**-8 * exact.abs() + 2**-18 * summed).all():  # one rounding, after a float32 sum
                return False
    except (RuntimeError, AttributeError):
        return False
    return True
