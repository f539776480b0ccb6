"""The LLaMA decoder. It knows nothing of ranks, pages, quantisation or adapters; those are set from outside.

Leading dimensions are free: [B, T] tokens in training, [N] tokens of many sequences in serving. `attend` owns masks and
caches. Modules carry Hugging Face's names and rotate-half RoPE, so that importing a checkpoint is
`removeprefix("model.")`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.errors import UserError
from puna.model.attention import Attend, causal
from puna.model.config import ModelConfig
from puna.model.linear import Linear
from puna.model.rope import cos_sin, rope_frequencies, rotate


def identity(x: Tensor) -> Tensor:
    return x


def residual_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the residual stream of a model whose products run in `compute_dtype`: float32 in half precision.

    The stream is a sum over all layers; in bfloat16 its rounding is the largest error of a forward (SmolLM2: mean error
    of the logits 0.095, with a float32 sum 0.059). Training and inference, and what pipeline stages exchange, agree.
    """
    return torch.float32 if compute_dtype in (torch.bfloat16, torch.float16) else compute_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps).to(weight.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def residual_add(x: Tensor, update: Tensor) -> Tensor:
    """x + update in the dtype of x, the residual stream's; `update` may be narrower."""
    return x + update


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467), accumulated in float32 or better.

    The result has the weight's dtype, which is what the products after it compute in; x may be wider.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.get_param: Callable[[nn.Module, str], Tensor] = getattr
        self.kernel: Callable[[Tensor, Tensor, float], Tensor] = rms_norm

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x, self.get_param(self, "weight"), self.eps)


class Embedding(nn.Module):
    """Token ids [...] -> vectors [..., hidden].

    `vocab_start`: the first id of this rank's shard of a split vocabulary, None for a whole one.
    """

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.vocab_start: int | None = None
        self.leave: Callable[[Tensor], Tensor] = identity
        self.get_param: Callable[[nn.Module, str], Tensor] = getattr

    def forward(self, ids: Tensor) -> Tensor:
        weight = self.get_param(self, "weight")
        if self.vocab_start is None:
            return self.leave(F.embedding(ids, weight))
        local = ids - self.vocab_start
        outside = (local < 0) | (local >= weight.shape[0])
        x = F.embedding(local.masked_fill(outside, 0), weight)
        return self.leave(x.masked_fill(outside.unsqueeze(-1), 0))


class Attention(nn.Module):
    """Grouped-query self-attention. Head counts follow from the weights, so that a rank's slice needs no other code.

    `enter` and `leave` bracket the region whose weights may be split: identity until a parallel layout sets them.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        d, head, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.layer, self.head_dim = layer, head
        self.q_proj = Linear(d, config.num_attention_heads * head, bias)
        self.k_proj = Linear(d, config.num_key_value_heads * head, bias)
        self.v_proj = Linear(d, config.num_key_value_heads * head, bias)
        self.o_proj = Linear(config.num_attention_heads * head, d, bias)
        self.qkv_proj: Linear | None = None  # set by model_loader.fuse, which then removes the three
        self.kv_heads = config.num_key_value_heads  # of this rank
        self.enter: Callable[[Tensor], Tensor] = identity
        self.leave: Callable[[Tensor], Tensor] = identity

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = self.enter(x)
        if self.qkv_proj is None:
            q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        else:
            qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
            turned = qkv.shape[-2] - self.kv_heads
            qk, v = qkv.split((turned, self.kv_heads), -2)
            q, k = rotate(qk, cos, sin).split((turned - self.kv_heads, self.kv_heads), -2)
        o = attend(self.layer, q, k, v)
        return self.o_proj.add_bias(self.leave(self.o_proj.matmul(o.flatten(-2))))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, ffn, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj, self.up_proj = Linear(d, ffn, bias), Linear(d, ffn, bias)
        self.down_proj = Linear(ffn, d, bias)
        self.gate_up_proj: Linear | None = None  # set by model_loader.fuse, which then removes the two
        self.kernel: Callable[[Tensor, Tensor], Tensor] = swiglu
        self.enter: Callable[[Tensor], Tensor] = identity
        self.leave: Callable[[Tensor], Tensor] = identity

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj.add_bias(self.leave(self.down_proj.matmul(self.kernel(gate, up))))


class Block(nn.Module):
    """One decoder layer: attention and MLP, each on a normed copy, added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.kernel: Callable[[Tensor, Tensor], Tensor] = residual_add

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = self.kernel(x, self.self_attn(self.input_layernorm(x), cos, sin, attend))
        return self.kernel(x, self.mlp(self.post_attention_layernorm(x)))


class Llama(nn.Module):
    """Embedding, blocks keyed by their global index, norm, output layer. Parameters are uninitialised until loaded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in range(config.num_hidden_layers)})
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.gather: Callable[[Tensor], Tensor] = identity  # joins the logits of a split vocabulary
        self.rope_length: int | None = None
        self._frequencies: dict[tuple[Any, ...], tuple[Tensor, float]] = {}  # by (length, device, dtype)
        self.tie()

    def tie(self) -> None:
        """Share the output layer's weight with the embedding where the config says so; call again after loading.

        On a pipeline stage that lacks either there is nothing to share.
        """
        if self.config.tie_word_embeddings and self.embed_tokens is not None and self.lm_head is not None:
            self.lm_head.weight = self.embed_tokens.weight

    def fix_rope(self, length: int) -> None:
        """Fix the base of `dynamic` RoPE for sequences of up to `length` tokens.

        Its angles depend on the length of a forward; keys that are cached must not change when the sequence grows.
        """
        self.rope_length = length

    def rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [..., 1, head_dim] for positions [...], in float32 (float64 for a float64 model)."""
        length = self.rope_length
        if length is None and (self.config.rope_scaling or {}).get("rope_type") == "dynamic":
            length = int(positions.max()) + 1
        precision = torch.float64 if dtype == torch.float64 else torch.float32
        key = (length, positions.device, precision)
        if key not in self._frequencies:
            frequencies, factor = rope_frequencies(self.config, length)
            self._frequencies = {key: (frequencies.to(positions.device, precision), factor)}
        return cos_sin(*self._frequencies[key], positions)

    def forward(self, x: Tensor, positions: Tensor | None = None, attend: Attend = causal) -> Tensor:
        """Token ids [...] and positions [...] -> hidden states [..., hidden] after the last norm.

        Without positions, ids [B, T] are whole sequences; `logits` of the result gives logits [B, T, vocab]. On a later
        pipeline stage x is the hidden states of the one before; a stage lacks `embed_tokens` or `norm`.
        """
        if positions is None:
            if x.ndim < 2:
                raise UserError("The model takes token ids [batch, length] where no positions are given.")
            positions = torch.arange(x.shape[1], device=x.device)
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        x = x.to(residual_dtype(x.dtype))
        cos, sin = self.rope(positions, x.dtype)
        for block in self.layers.values():
            x = block(x, cos, sin, attend)
        if self.norm is not None:
            x = self.norm(x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., hidden] -> logits [..., vocab]; not in `forward`, so that only needed rows are made."""
        return self.gather(self.lm_head(hidden))
