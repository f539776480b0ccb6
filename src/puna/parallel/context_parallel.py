"""Context parallelism: each rank holds a part of every sequence, and attends to the keys of all ranks.

Rank r of n takes chunks r and 2n - 1 - r of 2n, so that under a causal mask all have the same work. Keys and values
travel either all at once (`allgather`: simple and fast, they are small with grouped heads) or from rank to rank
(`ring`, arXiv 2310.01889: no rank ever holds those of the whole sequence).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from puna.model.attention import Attend, document_attention
from puna.parallel.collectives import gather_sequence
from puna.parallel.model_part import ModelPart

QUERIES = 1024  # per block of scores in the ring


def local_positions(length: int, rank: int, size: int) -> Tensor:
    """Positions in a sequence of `length` of the tokens that a rank holds, int64 [length / size]."""
    chunks = torch.arange(length).chunk(2 * size)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


def apply_cp(part: ModelPart, group: dist.ProcessGroup, method: str) -> None:
    """Let the part attend over the sequence parts of all ranks of `group`; `method` is allgather or ring."""
    part.attention = lambda documents: cp_attention(documents, group, method)


def cp_attention(documents: Tensor | None, group: dist.ProcessGroup, method: str) -> Attend:
    """Attention of this rank's part of each sequence over the whole; documents [B, t] int are those of the part."""
    assert documents is not None  # `ParallelStrategy` adds them where there are none
    device, size = documents.device, group.size()
    length = documents.shape[1] * size
    orders = [local_positions(length, rank, size).to(device) for rank in range(size)]
    order = orders[group.rank()]
    all_documents = gather_sequence(documents.unsqueeze(-1), group).squeeze(-1)
    if method == "allgather":
        inner = document_attention(documents, all_documents, order, torch.cat(orders))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return inner(layer, q, gather_sequence(k, group), gather_sequence(v, group))

        return attend
    parts = all_documents.chunk(size, 1)
    masks = [
        (documents.unsqueeze(2) == part.unsqueeze(1)) & (order.unsqueeze(1) >= other)
        for part, other in zip(parts, orders, strict=True)
    ]
    return lambda layer, q, k, v: _Ring.apply(q, k, v, masks, group)


class _Ring(torch.autograd.Function):
    """Softmax over keys that arrive rank after rank, with the running maximum and sum of arXiv 1805.02867.

    The backward pass sends keys, values and their gradients around the ring once more; each rank stores its part only.
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
                moving = _rotate_ring(moving, group)
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
                d_heads, q_heads = (
                    d_out[:, rows].unflatten(2, (-1, groups)),
                    q[:, rows].to(exact).unflatten(2, (-1, groups)),
                )
                d_weights = torch.einsum("bthgd,bphd->bthgp", d_heads, moving[1]).flatten(2, 3)
                d_scores = weights * (d_weights - shared[:, rows]) * q.shape[-1] ** -0.5
                d_q[:, rows] += _weighted(d_scores, moving[0])
                d_moving[0] += torch.einsum("bthgp,bthgd->bphd", d_scores.unflatten(2, (-1, groups)), q_heads)
                d_moving[1] += torch.einsum("bthgp,bthgd->bphd", weights.unflatten(2, (-1, groups)), d_heads)
            moving, d_moving = _rotate_ring(torch.stack((moving, d_moving)), group)
        return d_q.to(q.dtype), d_moving[0].to(k.dtype), d_moving[1].to(v.dtype), None, None


def _scores(q: Tensor, k: Tensor, mask: Tensor, exact: torch.dtype) -> Tensor:
    """q [B, T, Hq, D] times k [B, P, Hkv, D], scaled; -inf where mask [B, T, P] is false: [B, T, Hq, P]."""
    grouped = q.to(exact).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bthgd,bphd->bthgp", grouped, k.to(exact)).flatten(2, 3) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~mask.unsqueeze(2), -math.inf)


def _weighted(weights: Tensor, v: Tensor) -> Tensor:
    """weights [B, T, Hq, P] over v [B, P, Hkv, D]: [B, T, Hq, D]."""
    return torch.einsum("bthgp,bphd->bthgd", weights.unflatten(2, (v.shape[2], -1)), v).flatten(2, 3)


def _rotate_ring(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send x to the next rank of the group and receive that of the previous one."""
    received = torch.empty_like(x)
    rank, size = group.rank(), group.size()
    sends = dist.P2POp(dist.isend, x.contiguous(), group=group, group_peer=(rank + 1) % size)
    receives = dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % size)
    for work in dist.batch_isend_irecv([sends, receives]):
        work.wait()
    return received
