"""The model run straight from a checkpoint, a slice of a weight at a time: logits of any size in constant memory.

Verification needs the logits of models that may not fit in memory twice, or once. Slow; the same computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.model.attention import causal
from puna.model.linear import Linear
from puna.model.llama import Llama
from puna.weights.checkpoint import Checkpoint

STEP = 1 << 21  # elements of a weight in memory at a time


class StreamedWeight:
    """A linear layer's kernel that reads the weight from the checkpoint some rows at a time."""

    def __init__(self, source: Checkpoint, name: str) -> None:
        self.source, self.name = source, name

    def __call__(self, x: Tensor, linear: Linear) -> Tensor:
        rows, columns = self.source.tensors[self.name].shape
        step = max(1, STEP // columns)
        y = x.new_empty(*x.shape[:-1], rows)
        for start in range(0, rows, step):
            part = (slice(start, min(start + step, rows)),)
            y[..., start : start + step] = F.linear(x, self.source.read(self.name, part).to(x.dtype))
        return y


@torch.inference_mode()
def trace(
    source: Checkpoint, ids: Tensor, dtype: torch.dtype = torch.float32, *, adapt: Callable[[Llama], None] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The outputs of the model for ids [B, T], layer after layer, in `dtype` on the CPU; `adapt` adds updates to it.

    Gives ("model.embed_tokens", [B, T, hidden]), ("model.layers.N", [B, T, hidden]) for every layer, ("model.norm",
    [B, T, hidden]) and ("lm_head", logits [B, T, vocab]).
    """
    with torch.device("meta"):
        model = Llama(source.config)
    embedding = "model.embed_tokens.weight"
    for name, module in model.named_modules():
        stored = name if name == "lm_head" else f"model.{name}"
        if isinstance(module, Linear):
            tied = stored == "lm_head" and source.config.tie_word_embeddings
            module.kernel = StreamedWeight(source, embedding if tied else f"{stored}.weight")
        for kind, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 1:
                setattr(module, kind, nn.Parameter(source.read(f"{stored}.{kind}").to(dtype), requires_grad=False))
    if adapt is not None:
        adapt(model)
    rows = [source.read(embedding, (slice(token, token + 1),)) for token in ids.flatten().tolist()]
    x = torch.cat(rows).to(dtype).unflatten(0, ids.shape)
    yield "model.embed_tokens", x
    cos, sin = model.rope(torch.arange(ids.shape[1]).expand(ids.shape), dtype)
    for index, block in model.layers.items():
        x = block(x, cos, sin, causal)
        yield f"model.layers.{index}", x
    x = model.norm(x)
    yield "model.norm", x
    yield "lm_head", model.logits(x)
