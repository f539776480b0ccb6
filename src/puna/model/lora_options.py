"""LoRA's options: which layers get updates of which rank, in training and in an adapter's file. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from puna.errors import UserError
from puna.options import option

T = TypeVar("T")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = re.compile(r"[\w.-]+(,[\w.-]+)+")  # q_proj,v_proj


@dataclass(frozen=True)
class LoraOptions:
    """LoRA: low-rank updates of frozen weights.

    `targets`: linear layers by name (`q_proj`, `layers.0.mlp.up_proj`, or `all-linear`) or by a regular expression that
    matches the whole name (`.*layers\\.[0-3]\\..*_proj`). `modules_to_save`: modules that are trained in full, chosen
    the same way (`embed_tokens`, `lm_head`, `norm`). `rank_pattern` and `alpha_pattern` give single layers, by the end
    of their name or a regular expression for it, a rank or alpha of their own. The update is scaled by alpha / rank,
    with `rslora` by alpha / sqrt(rank) (arXiv 2312.03732)."""

    rank: int = option(16, "rank of the updates, usually 8 to 64; 0 trains all weights instead", minimum=0)
    alpha: float = option(32.0, "the update is scaled by alpha / rank", above=0)
    dropout: float = option(0.0, "dropout probability of the adapters' inputs", minimum=0)
    rslora: bool = option(False, "scale by alpha / sqrt(rank) instead")
    targets: tuple[str, ...] = option(LINEARS, "linear layers that get an update, by name or regular expression")
    modules_to_save: tuple[str, ...] = option((), "modules trained in full beside them, such as embed_tokens, lm_head")
    rank_pattern: Mapping[str, int] = option({}, "ranks of single layers, as in '{down_proj: 8}'")
    alpha_pattern: Mapping[str, float] = option({}, "alphas of single layers, as in '{down_proj: 16}'")

    def __post_init__(self) -> None:
        for name in ("targets", "modules_to_save"):
            object.__setattr__(self, name, _listed(getattr(self, name)))
        for rank, minimum in ((self.rank, 0), *((rank, 1) for rank in self.rank_pattern.values())):
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < minimum:
                raise UserError(f"A LoRA rank must be a positive integer, not {rank!r}.")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
                raise UserError(f"LoRA's alpha must be a number above 0, not {alpha!r}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoRA's dropout must be at least 0 and below 1, not {self.dropout}.")

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return _by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def _listed(patterns: str | tuple[str, ...]) -> tuple[str, ...]:
    """A pattern or several as a tuple; names joined by commas are several."""
    listed = (patterns,) if isinstance(patterns, str) else patterns
    return tuple(name for text in listed for name in (text.split(",") if NAMES.fullmatch(text) else [text]))


def _by_pattern(patterns: Mapping[str, T], module: str, default: T) -> T:
    """The value of the first pattern that matches the end of the name from a dot on, as peft looks them up."""
    for pattern, value in patterns.items():
        if matches_end(pattern, module):
            return value
    return default


def matches_end(pattern: str, module: str) -> bool:
    """Whether a regular expression matches the end of a module's name from a dot on, or the whole of it."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None
