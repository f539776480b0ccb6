"""The module that one rank trains: the model or a pipeline stage, with the loss at the end of its forward pass.

With the loss inside, FSDP2 and pipelining see one module from token ids to a number, output layer included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from puna.model.attention import Attend, causal, packed_attention
from puna.model.llama import Llama, identity
from puna.model.lora import LoRA


@dataclass(frozen=True)
class Head:
    """The output layer that a loss multiplies with: `weight` [ids, hidden], of the ids from `vocab_start` on.

    `group`: the ranks that hold the rest of a split vocabulary, None when it is whole. The gradient that a loss then
    returns for its hidden states is a partial sum, which `ModelPart.enter` adds up over the group.
    """

    weight: Tensor
    vocab_start: int = 0
    group: dist.ProcessGroup | None = None


# (hidden [B, T, d], labels [B, T], head) -> sums [k] over the microbatch's tokens, of which the first is minimised
Loss = Callable[[Tensor, Tensor, Head], Tensor]


class ModelPart(nn.Module):
    """A model or pipeline stage: token ids, or hidden states of the stage before -> hidden states, or loss sums."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model
        self.loss: Loss | None = None  # set before each step
        self.attention: Callable[[Tensor | None], Attend] = causal_attention
        self.enter: Callable[[Tensor], Tensor] = identity  # into the output layer of a split vocabulary
        self.group: dist.ProcessGroup | None = None
        self.vocab_start = 0

    def forward(self, x: Tensor, *, positions: Tensor, labels: Tensor, documents: Tensor | None = None) -> Tensor:
        """x: ids [B, T] or hidden states [B, T, d]; the others [B, T]. Returns sums [k] or hidden states [B, T, d]."""
        hidden: Tensor = self.model(x, positions, self.attention(documents))
        if self.model.lm_head is None:
            return hidden
        assert self.loss is not None
        return self.loss(self.enter(hidden), labels, Head(self._output_weight(), self.vocab_start, self.group))

    def _output_weight(self) -> Tensor:
        layer = self.model.lm_head
        weight = layer.get_param(layer, "weight")
        if isinstance(layer.adapter, LoRA):  # the loss needs one matrix
            a, b = (layer.adapter.get_param(layer.adapter, name).to(weight.dtype) for name in "ab")
            weight = torch.addmm(weight, b, a, alpha=layer.adapter.scale)
        return weight


def causal_attention(documents: Tensor | None) -> Attend:
    """Causal attention over whole rows, or within each document of packed rows (documents [B, T])."""
    return causal if documents is None else packed_attention(documents)


def combine_parts(parts: Iterable[ModelPart]) -> nn.Module:
    """One module whose parameters are those of all parts of a rank, under checkpoint names.

    A tied weight has the embedding's name alone.
    """
    top, inner, layers = nn.Module(), nn.Module(), nn.ModuleDict()
    for part in parts:
        model = part.model
        for name, block in model.layers.items():
            layers[name] = block
        if model.embed_tokens is not None:
            inner.embed_tokens = model.embed_tokens
        if model.norm is not None:
            inner.norm = model.norm
        if model.lm_head is not None and not model.config.tie_word_embeddings:
            top.lm_head = model.lm_head
        elif model.lm_head is not None:
            top.lm_head = nn.Module()
            if isinstance(model.lm_head.adapter, nn.Module):
                top.lm_head.adapter = model.lm_head.adapter
            if model.embed_tokens is None and not hasattr(inner, "embed_tokens"):
                inner.embed_tokens = nn.Module()
                inner.embed_tokens.weight = model.lm_head.weight
    inner.layers = layers
    top.model = inner
    return top
