"""Kernels for training in bfloat16 on a CPU: they work on few rows at a time, so that intermediates stay in its cache,
and save nothing for the backward pass but their inputs.

Torch's own forms write every intermediate to memory and save most of them; its fused attention takes three times as
long in bfloat16 as the products that it consists of. Each function here has a plain twin of the same signature, to
which the tests compare it: `rms_norm`, `swiglu` and `residual_add` of `puna.model.llama`, `F.linear` with the weight
cast, and `causal` of `puna.model.attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 256  # of a norm: 0.6 MB in float32 for SmolLM2
QUERIES = 128


def mixed_precision_linear(dtype: torch.dtype) -> Callable[[Tensor, nn.Module], Tensor]:
    """A linear layer's kernel that multiplies in `dtype` with a weight that stays as it is stored, in float32.

    The cast weight is not kept for the backward pass, and the gradient has the stored dtype.
    """
    return lambda x, linear: _Product.apply(x.to(dtype), linear.weight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        # x is needed for the weight's gradient alone: not where the weight is frozen.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        d_x = gradient @ weight.to(gradient.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return d_x, None
        return d_x, (gradient.flatten(0, -2).t() @ x.flatten(0, -2)).to(weight.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d] / rms(x) * weight [d], computed in float32, in the weight's type; x may be wider."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, scale = x.reshape(-1, x.shape[-1]), weight.float()
        out, inverse = torch.empty_like(rows, dtype=weight.dtype), rows.new_empty(len(rows), 1, dtype=torch.float32)
        for part, to, r in zip(rows.split(ROWS), out.split(ROWS), inverse.split(ROWS), strict=True):
            exact = part.to(torch.float32, copy=True)
            mean = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(x.shape[-1])
            r.copy_(mean.add_(eps).rsqrt_())
            to.copy_(exact.mul_(r).mul_(scale))
        ctx.save_for_backward(rows, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        rows, weight, inverse = ctx.saved_tensors
        scale = weight.float()
        d_rows, d_weight = torch.empty_like(rows), torch.zeros_like(scale)
        gradients = gradient.reshape(rows.shape).split(ROWS)
        for part, to, r, g in zip(rows.split(ROWS), d_rows.split(ROWS), inverse.split(ROWS), gradients, strict=True):
            normed, exact = part * r, g.to(torch.float32, copy=True)
            product = normed * exact
            d_weight += product.sum(0)
            mean = (product @ scale).div_(rows.shape[-1]).unsqueeze(-1)
            to.copy_(exact.mul_(scale).sub_(normed.mul_(mean)).mul_(r))
        return d_rows.view(gradient.shape), d_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None


def residual_add(x: Tensor, update: Tensor) -> Tensor:
    """x + update in the dtype of x, without the copy of a narrower update that torch's type promotion makes."""
    return x + update if x.dtype == update.dtype else update.to(x.dtype).add_(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over whole sequences: q [B, T, Hq, D], k and v [B, T, Hkv, D] -> [B, T, Hq, D].

    Scores are rounded to q's type, as q and k were, and summed and normalised in float32.
    """
    return _Causal.apply(q, k, v)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        out, mask = torch.empty_like(q), _mask(q, k)
        for b in range(q.shape[0]):
            queries, keys, values = _by_head(q[b], k), k[b].transpose(0, 1), v[b].transpose(0, 1)
            for start in range(0, q.shape[1], QUERIES):
                part = slice(start, start + QUERIES)
                weights = _weights(queries[:, :, part], keys, mask, start)
                o = torch.bmm(weights, values[:, : start + QUERIES])
                out[b, part] = _by_token(o, q.shape[2])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        d_q, d_k, d_v, mask = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), _mask(q, k)
        length, scale = q.shape[1], q.shape[-1] ** -0.5
        for b in range(q.shape[0]):
            queries, keys, values = _by_head(q[b], k), k[b].transpose(0, 1), v[b].transpose(0, 1)
            gradients = gradient[b].unflatten(1, (k.shape[2], -1)).permute(1, 2, 0, 3)
            sum_k = torch.zeros(keys.shape, dtype=torch.float32)
            sum_v = torch.zeros(keys.shape, dtype=torch.float32)
            for start in range(0, length, QUERIES):
                part, seen = slice(start, start + QUERIES), slice(0, min(start + QUERIES, length))
                weights = _weights(queries[:, :, part], keys, mask, start)
                g = gradients[:, :, part].flatten(1, 2)
                sum_v[:, seen] += torch.bmm(weights.transpose(1, 2), g)
                d_weights = torch.bmm(g, values[:, seen].transpose(1, 2))
                d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
                d_q[b, part] = _by_token(torch.bmm(d_scores, keys[:, seen]).mul_(scale), q.shape[2])
                sum_k[:, seen] += torch.bmm(d_scores.transpose(1, 2), queries[:, :, part].flatten(1, 2))
            d_k[b], d_v[b] = sum_k.transpose(0, 1), sum_v.transpose(0, 1)
        return d_q, d_k, d_v


def _mask(q: Tensor, k: Tensor) -> Tensor:
    """The causal mask of a block of QUERIES queries over as many keys, per head of a group: -inf for later keys."""
    later = torch.full((QUERIES, QUERIES), -math.inf, dtype=q.dtype).triu(1)
    return later.repeat(q.shape[2] // k.shape[2], 1, 1)


def _by_head(q: Tensor, k: Tensor) -> Tensor:
    """q [T, Hq, D] scaled, as [Hkv, Hq / Hkv, T, D]."""
    return (q * q.shape[-1] ** -0.5).unflatten(1, (k.shape[2], -1)).permute(1, 2, 0, 3)


def _by_token(o: Tensor, heads: int) -> Tensor:
    """o [Hkv, groups * t, D] -> [t, Hq, D] of `heads` query heads."""
    return o.unflatten(1, (heads // o.shape[0], -1)).flatten(0, 1).transpose(0, 1)


def _weights(queries: Tensor, keys: Tensor, mask: Tensor, start: int) -> Tensor:
    """Softmax over the keys up to each query: queries [Hkv, groups, t, D] from `start` -> [Hkv, groups * t, seen]."""
    t = queries.shape[2]
    scores = torch.bmm(queries.flatten(1, 2), keys[:, : start + t].transpose(1, 2))
    scores.unflatten(1, (-1, t))[..., start:] += mask[:, :t, :t]
    return scores.softmax(-1)
