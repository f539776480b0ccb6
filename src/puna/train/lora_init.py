"""Training that continues an adapter (`lora.init`), with its configuration and its tensors."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from puna.errors import UserError
from puna.model.config import ModelConfig
from puna.model.lora import adapted, saved
from puna.model.lora_options import LoraOptions
from puna.train.options import TrainLoraOptions
from puna.weights.adapter import Adapter, check_adapter, read_adapter

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
TAKEN = ("rank", "alpha", "rslora", "rank_pattern", "alpha_pattern")
DEFAULTS = TrainLoraOptions(rank=0)


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
