"""LoRA (arXiv 2106.09685): trained low-rank updates beside frozen weights, put into a model from outside.

Targets and modules to save are chosen as `peft` chooses them, and adapters are initialised as there, so that either
continues the other's training. The tensors of an adapter are named `model.layers.0.self_attn.q_proj.adapter.a` and
`.b`; `puna.model.tp_plan` splits them over ranks, `puna.weights.adapter` stores them.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.errors import UserError, nearest
from puna.model.config import ModelConfig
from puna.model.linear import Linear
from puna.model.llama import Llama
from puna.model.lora_options import LINEARS, LoraOptions, matches_end

T = TypeVar("T")
ALL_LINEAR = "all-linear"  # peft's name for every linear layer but the output layer


class LoRA(nn.Module):
    """x [..., in] -> (x A^T) B^T * scale [..., out] in x's dtype, A [r, in], B [out, r]; sits in `Linear.adapter`."""

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout = scale, dropout
        self.get_param: Callable[[nn.Module, str], Tensor] = getattr

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.get_param(self, "a").to(x.dtype), self.get_param(self, "b").to(x.dtype)
        return F.linear(F.linear(F.dropout(x, self.dropout, self.training), a), b) * self.scale


def adapted(config: ModelConfig, options: LoraOptions) -> list[str]:
    """The linear layers that get an update, `model.layers.0.self_attn.q_proj` and so on, in model order.

    A layer that is trained whole gets none. Raises UserError for a pattern that matches no linear layer, or for one
    of a rank or alpha that matches no adapted layer.
    """
    linears = [name for name in _modules(config) if name.split(".")[-1] in (*LINEARS, "lm_head")]
    if options.rank < 1:
        raise UserError(f"A LoRA rank must be a positive integer, not {options.rank}.")
    if not options.targets:
        raise UserError(f"LoRA needs targets: some of {', '.join(LINEARS)}.")
    flat = [name for target in options.targets for name in (LINEARS if target == ALL_LINEAR else [target])]
    whole = saved(config, options)
    names = [name for name in select(flat, linears, "linear layer") if name not in whole]
    for pattern in [*options.rank_pattern, *options.alpha_pattern]:
        _check_pattern(pattern, names, linears)
    return names


def saved(config: ModelConfig, options: LoraOptions) -> list[str]:
    """The modules that are trained and stored whole. A tied embedding and output layer go together."""
    chosen = select(options.modules_to_save, _modules(config), "module")
    tied = ("model.embed_tokens", "lm_head")
    if config.tie_word_embeddings and not set(tied).isdisjoint(chosen):
        chosen = [name for name in _modules(config) if name in (*chosen, *tied)]
    return chosen


def lora_tensors(config: ModelConfig, options: LoraOptions) -> dict[str, tuple[int, ...]]:
    """Every tensor of the updates: name -> whole shape, A [r, in] and B [out, r] of each adapted layer."""
    shapes = config.tensors() | {"lm_head.weight": (config.vocab_size, config.hidden_size)}
    tensors: dict[str, tuple[int, ...]] = {}
    for module in adapted(config, options):
        rows, columns = shapes[f"{module}.weight"]
        rank = options.rank_of(module)
        tensors |= {f"{module}.adapter.a": (rank, columns), f"{module}.adapter.b": (rows, rank)}
    return tensors


def initial(name: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The initial value of an update's tensor, by its name alone: A uniform in +-1/sqrt(in) (kaiming with
    a = sqrt(5), as in torch and peft), B zero. `shape` is the whole tensor's; a rank takes its slice of the result.
    """
    if name.endswith(".adapter.b"):
        return torch.zeros(shape, dtype=dtype)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(name.encode())) % 2**64)
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator).to(dtype)


def add_lora(model: Llama, options: LoraOptions, *, seed: int = 0) -> list[str]:
    """Give a whole (unsplit) model its updates, float32 on its weights' device; returns the adapted layers' names.

    From here on only the updates and `modules_to_save` require gradients. On the meta device the updates' values are
    the caller's to fill (`initial`). Raises UserError for a pattern that matches nothing.
    """
    config = model.config
    names, tensors = adapted(config, options), lora_tensors(config, options)
    model.requires_grad_(False)
    for name in saved(config, options):
        model.get_submodule(name.removeprefix("model.")).requires_grad_(True)
    for name in names:
        linear = model.get_submodule(name.removeprefix("model."))
        assert isinstance(linear, Linear)
        device = linear.weight.device
        a, b = (_fresh(f"{name}.adapter.{part}", tensors, seed, device) for part in "ab")
        linear.adapter = LoRA(a, b, options.scale_of(name), options.dropout)
    return names


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` is the name, its end after a dot, or a regular expression for the whole of it."""
    return name == pattern or name.endswith(f".{pattern}") or bool(re.fullmatch(pattern, name))


def select(patterns: Iterable[str], names: list[str], what: str) -> list[str]:
    """Those of `names` that one of the patterns matches. Raises UserError for a pattern that matches none."""
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            matching = [name for name in names if matches(pattern, name)]
        except re.error as error:
            raise UserError(f"{pattern!r} is neither a {what} nor a regular expression: {error}.") from None
        if not matching:
            short = dict.fromkeys(name.split(".")[-1] for name in names)
            hint = nearest(pattern, [*short, *names]) or f"; there are {', '.join(short)}"
            raise UserError(f"the model has no {what} {pattern!r}{hint}.")
        chosen.update(matching)
    return [name for name in names if name in chosen]


def _check_pattern(pattern: str, names: list[str], linears: list[str]) -> None:
    """Raises UserError for a pattern of ranks or alphas that matches none of the adapted layers `names`."""
    try:
        if any(matches_end(pattern, name) for name in names):
            return
        known = any(matches_end(pattern, name) for name in linears)
    except re.error as error:
        raise UserError(f"The LoRA pattern {pattern!r} is not a regular expression: {error}.") from None
    if known:
        raise UserError(f"The LoRA pattern {pattern!r} matches no layer that gets an update: add it to the targets.")
    short = dict.fromkeys(name.split(".")[-1] for name in names)
    near = nearest(pattern, [*short, *names, *(name.removeprefix("model.") for name in names)])
    raise UserError(f"The LoRA pattern {pattern!r} matches no layer{near or '; there are ' + ', '.join(short)}.")


def _modules(config: ModelConfig) -> list[str]:
    """Every module that holds weights, a tied output layer too."""
    names = dict.fromkeys(name.rpartition(".")[0] for name in config.tensors())
    return list(names | {"lm_head": None})


def _fresh(name: str, tensors: dict[str, tuple[int, ...]], seed: int, device: torch.device) -> Tensor:
    if device.type == "meta":
        return torch.empty(tensors[name], device=device)
    return initial(name, tensors[name], seed).to(device)
