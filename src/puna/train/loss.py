"""Cross entropy of hidden states against an output layer, without materialising all logits.

A vocabulary of 128k entries makes the logits of 4,096 tokens 2 GB in float32, and their gradient as much again. Here
the logits of `chunk` tokens are computed, turned into their gradient in place, multiplied into the gradients of the
hidden states and of the weight, and freed, all in the forward pass, as in Liger Kernel (arXiv 2410.10989): three
matrix products, as many as without chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

IGNORED = -100
CACHED = 1 << 19  # elements: 2 MB of float32, about the L2 cache of a CPU core


@dataclass(frozen=True)
class VocabPart:
    """The vocabulary shard of this rank's output layer, from id `first` on; `group` holds the whole vocabulary."""

    group: dist.ProcessGroup
    first: int


def chunked_loss(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    chunk: int = 1024,
    z_loss: float = 0.0,
    tp: VocabPart | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, count, z) of hidden [..., d], labels [...] int64 (-100 is not trained) and weight [vocab, d].

    `loss` is the sum over trained tokens of cross entropy plus `z_loss` times z, the sum of squared logsumexps (PaLM,
    arXiv 2204.02311); it alone has a gradient. `count` is int64. Sums are in float32, or float64 for float64 input;
    products run in the type of `hidden`, to which `weight` is cast. With `tp` the weight is a part of the vocabulary,
    and the gradient of `hidden` is a partial sum, to be reduced over the group by the caller.
    """
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    loss, z = _ChunkedLoss.apply(hidden, weight, labels, chunk, z_loss, tp)
    return loss, (labels != IGNORED).sum(), z


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, z_loss: float, tp: VocabPart | None
    ) -> tuple[Tensor, Tensor]:
        exact = _exact(hidden)
        used = weight.to(hidden.dtype)
        # Validation needs no gradient; a frozen output layer (LoRA) saves the third product.
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden) if want_hidden else None
        d_weight: Tensor | None = None
        sums = hidden.new_zeros(2, dtype=exact)
        trained = (labels != IGNORED).nonzero().squeeze(-1)
        for rows in trained.split(chunk) if len(trained) else ():
            x = hidden[rows]
            logits = x @ used.t()
            at_once = _rows_at_once(logits, tp)
            for part, target in zip(logits.split(at_once), labels[rows].split(at_once), strict=True):
                sums += _loss_to_gradient(part, target, z_loss, tp)  # in place of the logits
            if d_hidden is not None:
                d_hidden[rows] = logits @ used
            if want_weight:
                partial = logits.t() @ x
                d_weight = partial.to(exact) if d_weight is None else d_weight.add_(partial)
        if want_weight and d_weight is None:
            d_weight = torch.zeros_like(used, dtype=exact)
        ctx.save_for_backward(*(part for part in (d_hidden, d_weight) if part is not None))
        ctx.wanted, ctx.weight_dtype = (want_hidden, want_weight), weight.dtype
        loss, z = sums.unbind()
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        parts = list(ctx.saved_tensors)
        if scale.device.type != "cpu" or scale != 1:  # on a GPU, reading the value costs more than multiplying
            parts = [part * scale.to(part.dtype) for part in parts]
        d_hidden = parts.pop(0) if ctx.wanted[0] else None
        d_weight = parts.pop(0).to(ctx.weight_dtype) if ctx.wanted[1] else None
        return d_hidden, d_weight, None, None, None, None


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows_at_once(logits: Tensor, tp: VocabPart | None) -> int:
    """Rows per block: as many as fit a CPU's cache; all where each block would cost kernel launches or collectives."""
    return max(1, CACHED // logits.shape[-1]) if logits.device.type == "cpu" and tp is None else len(logits)


def _loss_to_gradient(logits: Tensor, target: Tensor, z_loss: float, tp: VocabPart | None) -> Tensor:
    """[loss, z] summed over the rows of logits [N, V], which become their own gradient.

    d loss / d logits = softmax (1 + 2 z_loss lse) - onehot.
    """
    x = logits.to(_exact(logits))
    top = x.amax(-1, keepdim=True)
    local, held = target, None
    if tp is not None:
        dist.all_reduce(top, dist.ReduceOp.MAX, group=tp.group)
        local = target - tp.first
        held = (local >= 0) & (local < x.shape[-1])
        local = local.masked_fill(~held, 0)
    rows = torch.arange(len(x), device=x.device)
    chosen = x[rows, local] - top.squeeze(-1)
    if held is not None:
        chosen = chosen * held
    x = x.sub_(top).exp_()
    total = x.sum(-1)
    if tp is not None:
        both = torch.stack((total, chosen))
        dist.all_reduce(both, group=tp.group)
        total, chosen = both.unbind()
    lse = total.log() + top.squeeze(-1)
    z = lse.square().sum()
    x.mul_(((1 + 2 * z_loss * lse) / total).unsqueeze(-1))
    x[rows, local] -= 1 if held is None else held.to(x.dtype)
    logits.copy_(x)
    return torch.stack(((total.log() - chosen).sum() + z_loss * z, z))
