"""LoRA's options in a training: their check, and the adapter that is continued (`lora.init`) with its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import TypeVar

import torch

from puna.errors import UserError
from puna.model.config import ModelConfig
from puna.model.lora import adapted, saved
from puna.model.lora_options import LoraOptions, matches_end
from puna.train.options import TrainLoraOptions
from puna.weights.adapter import Adapter, check_adapter, read_adapter

T = TypeVar("T")
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
TAKEN = ("rank", "alpha", "rslora")
DEFAULTS = TrainLoraOptions(rank=0)


def check_rank(options: TrainLoraOptions) -> None:
    """Raises UserError for LoRA options without a rank: they would be ignored, and all weights trained."""
    if options.rank or options.init:
        return
    for entry in fields(LoraOptions):
        if getattr(options, entry.name) != getattr(DEFAULTS, entry.name):
            raise UserError(
                f"lora.{entry.name} needs lora.rank, which is 0, so that all weights are trained: "
                f"give lora.rank (16 is usual), or leave lora.{entry.name} out."
            )


def open_initial(options: TrainLoraOptions, config: ModelConfig) -> tuple[TrainLoraOptions, Adapter | None]:
    """The LoRA options completed from the initial adapter's, and that adapter; None without `init`.

    Dropout is taken from the options. Raises UserError for an adapter of another model and for options that
    contradict the adapter's.
    """
    if options.init is None:
        return options, None
    adapter = read_adapter(options.init)
    check_adapter(adapter, config)
    whole = tuple(dict.fromkeys(name.rpartition(".")[0] for name in adapter.whole))
    both = config.tie_word_embeddings and {EMBEDDING, OUTPUT} <= adapter.whole.keys()
    if both and not torch.equal(adapter.read(EMBEDDING), adapter.read(OUTPUT)):
        raise UserError(
            f"{adapter.path} holds an output layer that differs from the embedding, which this model ties:"
            " merge it into the model (puna lora merge) and train the result."
        )
    taken = replace(
        options,
        **{name: getattr(adapter.options, name) for name in TAKEN},
        rank_pattern=_used(adapter.options.rank_pattern, adapter.modules),
        alpha_pattern=_used(adapter.options.alpha_pattern, adapter.modules),
        targets=tuple(adapter.modules),
        modules_to_save=whole,
    )
    for entry in fields(LoraOptions):
        asked, stored = getattr(options, entry.name), getattr(taken, entry.name)
        same = asked in (getattr(DEFAULTS, entry.name), stored)
        if not same and entry.name in ("targets", "modules_to_save"):
            choose = adapted if entry.name == "targets" else saved
            plain = LoraOptions(**{entry.name: asked})
            same = set(choose(config, plain)) == set(stored)
        if not same:
            raise UserError(
                f"lora.{entry.name} is {asked}, but the adapter {adapter.path} has {stored}: leave the option out."
            )
    return taken, adapter


def _used(patterns: Mapping[str, T], modules: Iterable[str]) -> dict[str, T]:
    """The patterns that match an adapted layer; peft accepts others too."""
    return {pattern: value for pattern, value in patterns.items() if any(matches_end(pattern, m) for m in modules)}
