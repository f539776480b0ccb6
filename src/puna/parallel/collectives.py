"""The collectives of a forward pass, each with the one that its gradient needs, over plain tensors.

`enter` and `leave` bracket a region whose weights are split over a group: its input is replicated, its output a partial
sum. With sequence parallelism the residual stream outside the region is split along the sequence, and the same bytes
travel as an all-gather and a reduce-scatter (arXiv 2205.05198).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 has renamed them and warns about the old names.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def enter(group: dist.ProcessGroup, sequence: bool) -> Callable[[Tensor], Tensor]:
    """Into a split region: x [B, T, d], or with `sequence` this rank's T / size of it, -> x [B, T, d]."""
    return partial(_apply, _Gather if sequence else _SumBackward, group)


def leave(group: dist.ProcessGroup, sequence: bool) -> Callable[[Tensor], Tensor]:
    """Out of a split region, summing over the ranks: x [B, T, d] -> x, or with `sequence` this rank's part."""
    return partial(_apply, _Scatter if sequence else _Sum, group)


def gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x [B, t, ...] of every rank, concatenated along dimension 1; gradients are reduce-scattered."""
    return _apply(_Gather, group, x)


def _apply(function: type[torch.autograd.Function], group: dist.ProcessGroup, x: Tensor) -> Tensor:
    out: Tensor = function.apply(x, group)
    return out


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(gradient, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(gradient, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_gather(gradient, ctx.group), None


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Along dimension 1; the collective itself joins along the first."""
    first = x.transpose(0, 1).contiguous()
    joined = first.new_empty(first.shape[0] * group.size(), *first.shape[1:])
    _gather_into(joined, first, group=group)
    return joined.transpose(0, 1).contiguous()


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    first = x.transpose(0, 1).contiguous()
    part = first.new_empty(first.shape[0] // group.size(), *first.shape[1:])
    _scatter_into(part, first, group=group)
    return part.transpose(0, 1).contiguous()
