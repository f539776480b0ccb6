"""One linear layer with slots for the concerns that meet in it, so that they compose instead of multiplying classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Scheme(Protocol):
    """How a weight is stored and multiplied."""

    def matmul(self, x: Tensor, linear: Linear) -> Tensor:
        """x [..., in_features] times the stored weight: [..., out_features], without bias."""
        ...


class Linear(nn.Module):
    """y = x W^T + b, W [out_features, in_features].

    `get_param(self, name)` returns the weight or bias to compute with: the stored parameter, or what a training layout
    makes of it (its local shard, a cast). `scheme` replaces the stored weight and the product (quantised, packed);
    `adapter` adds a low-rank update. None knows of the others. Collectives are not here: `Attention` and `MLP` do one
    per region.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.get_param: Callable[[nn.Module, str], Tensor] = getattr
        self.scheme: Scheme | None = None
        self.adapter: Callable[[Tensor], Tensor] | None = None

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] without bias (a row-split layer adds it after the reduction)."""
        y = F.linear(x, self.get_param(self, "weight")) if self.scheme is None else self.scheme.matmul(x, self)
        return y if self.adapter is None else y + self.adapter(x)

    def add_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.get_param(self, "bias")

    def forward(self, x: Tensor) -> Tensor:
        return self.add_bias(self.matmul(x))
