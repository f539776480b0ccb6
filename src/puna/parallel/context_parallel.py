"""Context parallelism: each rank holds a part of every sequence, and attention meets the keys of the others.

Rank r of n takes the r-th and the (2n - 1 - r)-th of 2n chunks, so that under a causal mask all have the same work.
Keys and values travel either all at once (`allgather`: simple and fast, they are small with grouped heads) or one
neighbour at a time (`ring`, arXiv 2310.01889: no rank ever holds those of the whole sequence).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from puna.model.attention import Attend, document_attention
from puna.parallel.collectives import gather_sequence

QUERIES = 1024  # whose scores the ring makes at once


def local_positions(length: int, rank: int, size: int) -> Tensor:
    """Where the tokens of a rank's part stand in the sequence of `length`, int64 [length / size]."""
    chunks = torch.arange(length).chunk(2 * size)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


def attention(documents: Tensor | None, group: dist.ProcessGroup, method: str) -> Attend:
    """Attention for a rank's part of each sequence; documents [B, t] int are those of the part."""
    assert documents is not None  # the layout has made them up where there were none
    device, size = documents.device, group.size()
    length = documents.shape[1] * size
    orders = [local_positions(length, rank, size).to(device) for rank in range(size)]
    order = orders[group.rank()]
    everyones = gather_sequence(documents.unsqueeze(-1), group).squeeze(-1)
    if method == "allgather":
        inner = document_attention(documents, everyones, order, torch.cat(orders))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return inner(layer, q, gather_sequence(k, group), gather_sequence(v, group))

        return attend
    parts = everyones.chunk(size, 1)
    masks = [
        (documents.unsqueeze(2) == part.unsqueeze(1)) & (order.unsqueeze(1) >= other)
        for part, other in zip(parts, orders, strict=True)
    ]
    return lambda layer, q, k, v: _Ring.apply(q, k, v, masks, group)


class _Ring(torch.autograd.Function):
    """Softmax over keys that come by, rank after rank, with the running maximum and sum of arXiv 1805.02867.

    The backward pass sends keys, values and their gradients round once more; each rank keeps its own part only.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], group: dist.ProcessGroup) -> Tensor:
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = torch.zeros_like(q, dtype=exact)
        lse = torch.full(q.shape[:-1], -math.inf, dtype=exact, device=q.device)
        moving = torch.stack((k, v))
        for step in range(group.size()):
            mask = masks[(group.rank() - step) % group.size()]
            for rows in torch.arange(q.shape[1], device=q.device).split(QUERIES):
                scores = _scores(q[:, rows], moving[0], mask[:, rows], exact)
                part = scores.logsumexp(-1)
                new = torch.logaddexp(lse[:, rows], part)
                safe = new.masked_fill(new == -math.inf, 0)
                weights = (scores - safe.unsqueeze(-1)).exp()
                kept = (lse[:, rows] - safe).exp().unsqueeze(-1)
                out[:, rows] = out[:, rows] * kept + _weighted(weights, moving[1].to(exact))
                lse[:, rows] = new
            if step < group.size() - 1:
                moving = _pass_on(moving, group)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.masks, ctx.group, ctx.exact = masks, group, exact
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        group, exact = ctx.group, ctx.exact
        d_out = d_out.to(exact)
        shared = (d_out * out).sum(-1, keepdim=True)
        d_q = torch.zeros_like(out)
        moving = torch.stack((k, v)).to(exact)
        d_moving = torch.zeros_like(moving)
        groups = q.shape[2] // k.shape[2]
        for step in range(group.size()):
            mask = ctx.masks[(group.rank() - step) % group.size()]
            for rows in torch.arange(q.shape[1], device=q.device).split(QUERIES):
                scores = _scores(q[:, rows], moving[0], mask[:, rows], exact)
                weights = (scores - lse[:, rows].unsqueeze(-1)).exp()
                one, two = d_out[:, rows].unflatten(2, (-1, groups)), q[:, rows].to(exact).unflatten(2, (-1, groups))
                d_weights = torch.einsum("bthgd,bphd->bthgp", one, moving[1]).flatten(2, 3)
                d_scores = weights * (d_weights - shared[:, rows]) * q.shape[-1] ** -0.5
                d_q[:, rows] += _weighted(d_scores, moving[0])
                d_moving[0] += torch.einsum("bthgp,bthgd->bphd", d_scores.unflatten(2, (-1, groups)), two)
                d_moving[1] += torch.einsum("bthgp,bthgd->bphd", weights.unflatten(2, (-1, groups)), one)
            moving, d_moving = _pass_on(torch.stack((moving, d_moving)), group)
        return d_q.to(q.dtype), d_moving[0].to(k.dtype), d_moving[1].to(v.dtype), None, None


def _scores(q: Tensor, k: Tensor, mask: Tensor, exact: torch.dtype) -> Tensor:
    """q [B, T, Hq, D] times k [B, P, Hkv, D], scaled; -inf where mask [B, T, P] says no: [B, T, Hq, P]."""
    grouped = q.to(exact).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bthgd,bphd->bthgp", grouped, k.to(exact)).flatten(2, 3) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask.unsqueeze(2), -math.inf)


def _weighted(weights: Tensor, v: Tensor) -> Tensor:
    """weights [B, T, Hq, P] over v [B, P, Hkv, D]: [B, T, Hq, D]."""
    return torch.einsum("bthgp,bphd->bthgd", weights.unflatten(2, (v.shape[2], -1)), v).flatten(2, 3)


def _pass_on(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Give x to the next rank of the group, and take that of the one before."""
    received = torch.empty_like(x)
    here, size = group.rank(), group.size()
    sends = dist.P2POp(dist.isend, x.contiguous(), group=group, group_peer=(here + 1) % size)
    receives = dist.P2POp(dist.irecv, received, group=group, group_peer=(here - 1) % size)
    for work in dist.batch_isend_irecv([sends, receives]):
        work.wait()
    return received
