"""What a run leaves: a checkpoint in the native layout, or an adapter in peft's, with the tokenizer of its base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.files import MANIFEST, staged, write_json
from puna.model.config import ModelConfig
from puna.model.lora import LoraOptions
from puna.parallel.model_part import ModelPart
from puna.parallel.strategy import ParallelStrategy
from puna.tokenizer import Tokenizer
from puna.weights.adapter import write_adapter
from puna.weights.checkpoint import Checkpoint, Index, TensorInfo
from puna.weights.formats.hf import write_hf


@dataclass(frozen=True)
class Origin:
    """What a run starts from, beside the weights: goes unchanged into its result."""

    name: str
    config: ModelConfig
    hf_config: dict[str, Any]
    generation: dict[str, Any]
    tokenizer: Tokenizer | None


def export(
    strategy: ParallelStrategy,
    parts: list[ModelPart],
    origin: Origin,
    folder: Path,
    dtype: torch.dtype,
    said: dict[str, Any],
    lora: LoraOptions | None,
) -> Path:
    """Write `folder/model`, or with `lora` `folder/adapter`, replacing an earlier one; `said` goes into puna.json.

    Collective: every rank gives its part, the first writes, one whole tensor in memory at a time. Raises UserError when
    the disk is full; the run's checkpoints stay.
    """
    dst = folder / ("model" if lora is None else "adapter")
    tensors = strategy.full_state(parts, trained=lora is not None)
    if not strategy.is_first:
        for _ in tensors:
            pass
        return dst
    try:
        with staged(dst, overwrite=True) as path:
            if lora is None:
                write_hf(_source(origin, tensors, dtype), path)
            else:
                trained = {name: tensor.to(torch.float32) for name, tensor in tensors}
                write_adapter(path, trained, origin.config, lora, base=origin.name, tokenizer=origin.tokenizer)
            write_json(path / MANIFEST, said)
    finally:
        for _ in tensors:  # the other ranks are in it until its end
            pass
    return dst


def _source(origin: Origin, tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> Checkpoint:
    """The trained model as a checkpoint, read once and in order; what comes early waits until it is asked for."""
    early: dict[str, Tensor] = {}

    def read(name: str, index: Index | None) -> Tensor:
        while name not in early:
            found, tensor = next(tensors)
            early[found] = tensor
        return early.pop(name)

    shapes = origin.config.tensors()
    return Checkpoint(
        path=Path(origin.name),
        format="hf",
        config=origin.config,
        hf_config=origin.hf_config,
        generation=origin.generation,
        tensors={name: TensorInfo(shape, dtype) for name, shape in shapes.items()},
        files=[],
        details={},
        reader=read,
        load_tokenizer=lambda: origin.tokenizer,
    )
