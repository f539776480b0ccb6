"""The result of a run: a checkpoint in the Hugging Face layout, or an adapter in peft's, with the base's tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.errors import UserError
from puna.files import MANIFEST, staged, write_json
from puna.model.config import ModelConfig
from puna.model.lora_options import LoraOptions
from puna.parallel.model_part import ModelPart
from puna.parallel.strategy import ParallelStrategy
from puna.tokenizer import Tokenizer
from puna.weights.adapter import write_adapter
from puna.weights.checkpoint import Checkpoint, Index, TensorInfo
from puna.weights.formats.hf import write_hf


@dataclass(frozen=True)
class Origin:
    """The base of a run without its weights; copied unchanged into the result."""

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
    manifest: dict[str, Any],
    lora: LoraOptions | None,
) -> Path:
    """Write `folder/model`, or with `lora` `folder/adapter`, replacing an earlier one; `manifest` goes into puna.json.

    Collective: every rank gives its shards, the first writes, one whole tensor in memory at a time. Raises UserError
    when the disk is full, or a weight is not finite in `dtype`; an earlier result and the run's checkpoints stay.
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
                trained = {name: _finite(name, tensor, torch.float32) for name, tensor in tensors}
                write_adapter(path, trained, origin.config, lora, base=origin.name, tokenizer=origin.tokenizer)
            write_json(path / MANIFEST, manifest)
    finally:
        for _ in tensors:  # the other ranks iterate over all of it
            pass
    return dst


def _source(origin: Origin, tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> Checkpoint:
    """The trained model as a checkpoint that can be read once; tensors are kept until they are read."""
    early: dict[str, Tensor] = {}

    def read(name: str, index: Index | None) -> Tensor:
        while name not in early:
            found, tensor = next(tensors)
            early[found] = tensor
        return _finite(name, early.pop(name), dtype)

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


def _finite(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`. Raises UserError when it holds NaN, or a value beyond that type."""
    tensor = tensor.to(dtype)
    if not tensor.isfinite().all():
        raise UserError(
            f"{name} holds values that are not finite in {str(dtype).removeprefix('torch.')}, so no model was written:"
            " resume from an earlier checkpoint with a lower optim.lr, or choose another --checkpoint.export_dtype."
        )
    return tensor
