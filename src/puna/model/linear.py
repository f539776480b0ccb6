"""One linear layer with slots: storage of the weight, matrix product, added update, access to parameters.

The slots compose where classes would multiply: a quantised layer under tensor parallelism with a LoRA adapter is this
class with three slots filled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kernel = Callable[[Tensor, "Linear"], Tensor]  # (x [..., in], layer) -> [..., out] without bias and adapter


class Scheme(Protocol):
    """What a layer knows of its quantisation scheme; the record is `puna.quant.scheme.QuantScheme`."""

    @property
    def stored(self) -> Mapping[str, Any]:
        """The tensors that replace `weight`, by attribute name."""
        ...


def dense(x: Tensor, linear: Linear) -> Tensor:
    """The product with a plain weight: x [..., in] -> [..., out]."""
    return F.linear(x, linear.get_param(linear, "weight"))


class Linear(nn.Module):
    """y = x W^T + b, W [out_features, in_features].

    `scheme`: how the weight is stored; None as `weight`, in a float dtype. `kernel`: the product with what is stored,
    set by whoever sets the scheme, packs the weight for a device or trains in mixed precision. `adapter`: an update
    that is added (LoRA). `get_param(self, name)` returns the weight or bias to compute with: the stored parameter, or
    what a training layout makes of it (its local shard, a cast). None of the four knows of the others. Collectives are
    not here: `Attention` and `MLP` do one per region.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.scheme: Scheme | None = None
        self.kernel: Kernel = dense
        self.adapter: Callable[[Tensor], Tensor] | None = None
        self.get_param: Callable[[nn.Module, str], Tensor] = getattr

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] without bias (a row-split layer adds it after the reduction)."""
        y = self.kernel(x, self)
        return y if self.adapter is None else y + self.adapter(x)

    def add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.get_param(self, "bias")

    def forward(self, x: Tensor) -> Tensor:
        return self.add_bias(self.matmul(x))
