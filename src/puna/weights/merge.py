"""A checkpoint merged with an adapter, as a checkpoint: tensors replaced, and updates added to the weights.

Sums are computed and returned in float32 (float64 for a float64 base); the writer or loader rounds once.
"""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.errors import UserError
from puna.model.config import ModelConfig
from puna.progress import track
from puna.tokenizer import Tokenizer
from puna.weights.adapter import Adapter, attach, check_adapter, read_adapter, rows_name
from puna.weights.checkpoint import Checkpoint, Index, TensorInfo, check_tensors, in_model_order
from puna.weights.convert import Conversion, Target, source_name, write
from puna.weights.formats.hf import EMBEDDING, OUTPUT
from puna.weights.layerwise import trace
from puna.weights.open import open_checkpoint
from puna.weights.verification import PROBE_SHAPE, VerificationError

BLOCK = 256  # rows of a weight whose update is computed at once
# Relative difference of the logits. The order of float32 sums leaves about a tenth of it in a deep model.
TOLERANCE = 1e-4


def merge_adapter(
    model: str | Path,
    adapter: str | Path,
    dst: str | Path,
    to: str = "hf",
    dtype: str = "auto",
    *,
    revision: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    **options: Any,
) -> Conversion:
    """Writes `model` with `adapter` (a directory in peft's layout) merged into it, as `weights.convert.convert` writes.

    `to`, `dtype` and `options` as there; `dtype` auto is the one that the model is stored in, float32 for a quantised
    one. Raises `UserError` when the adapter isn't one of this model, `VerificationError` when the result isn't the
    model with its adapter.
    """
    target = Target.of(to, dtype, **options)
    lora = read_adapter(adapter)
    with open_checkpoint(model, revision=revision) as source:
        merged = merge(source, lora)
        if dtype == "auto":
            own = source.hf_config["torch_dtype"]
            dtype = own if own in target.format.dtypes else "float32"
        target = Target.of(to, dtype, **options)
        facts = {
            "name": lora.path.resolve().name,
            "base": lora.base,
            "rank": lora.options.rank,
            "alpha": lora.options.alpha,
            "layers": len(lora.modules),
            "replaced": list(lora.whole),
            "token_rows": {name: list(ids) for name, ids in lora.token_rows.items()},
            "difference": _logit_difference(source, lora, merged) if verify else None,
        }
        name = source_name(source, model)
        return write(merged, dst, target, name, overwrite=overwrite, verify=verify, facts={"adapter": facts})


def _logit_difference(source: Checkpoint, adapter: Adapter, merged: Checkpoint) -> float:
    """The largest difference of the merged model's logits from the unmerged one's, both in float32."""
    ids = torch.randint(merged.config.vocab_size, PROBE_SHAPE, generator=torch.Generator().manual_seed(0))
    apart = trace(replaced(source, adapter), ids, adapt=partial(attach, adapter=adapter, dtype=torch.float32))
    expected, found = (
        dict(track(steps, "Computing logits", total=merged.config.num_hidden_layers + 3))["lm_head"]
        for steps in (apart, trace(merged, ids))
    )
    worst = (expected - found).abs().max().item()
    if not worst <= TOLERANCE * expected.abs().max().item():
        raise VerificationError(
            f"the merged model's logits are up to {worst:.3g} from those of the model with its adapter"
        )
    return worst


def replaced(source: Checkpoint, adapter: Adapter) -> Checkpoint:
    """`source` with the tensors that the adapter carries whole, its vocabulary and its tokenizer; without the updates.

    An output layer that was tied to the embedding is untied where the adapter makes them differ. Raises
    UserError when the adapter is not one of this model.
    """
    config, whole = _config(source, adapter), adapter.whole
    check_adapter(adapter, config)
    if config.tie_word_embeddings and OUTPUT in whole:
        whole.setdefault(EMBEDDING, whole.pop(OUTPUT))
    tensors = {**source.tensors, **whole}
    if not config.tie_word_embeddings:
        tensors.setdefault(OUTPUT, source.tensors[EMBEDDING])
    for name in adapter.token_rows:
        dtype = adapter.tensors[rows_name(name)].dtype
        tensors[name] = dataclasses.replace(tensors[name], dtype=torch.promote_types(tensors[name].dtype, dtype))
    tied_away = {OUTPUT: EMBEDDING} if OUTPUT not in source.tensors else {}

    def read(name: str, index: Index | None) -> Tensor:
        if name in whole:
            tensor = adapter.read(name if name in adapter.tensors else OUTPUT)
            tensor = tensor if index is None else tensor[index]
        else:
            tensor = source.read(tied_away.get(name, name), index)
        return _with_token_rows(adapter, name, tensor, tensors[name], index) if name in adapter.token_rows else tensor

    shape = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_word_embeddings}
    result = dataclasses.replace(
        source,
        config=config,
        hf_config={**source.hf_config, **shape},
        tensors=in_model_order(config, tensors),
        files=[*source.files, *adapter.files],
        reader=read,
        load_tokenizer=lambda: _tokenizer(source, adapter, config.vocab_size),
    )
    check_tensors(result)
    return result


def _with_token_rows(adapter: Adapter, name: str, tensor: Tensor, info: TensorInfo, index: Index | None) -> Tensor:
    """`tensor`, which is `whole[index]` of the matrix `name`, with the rows that the adapter trained in their place."""
    tensor = tensor.to(info.dtype, copy=True)
    rows = range(info.shape[0])[index[0] if index else slice(None)]
    columns = index[1] if index and len(index) > 1 else slice(None)
    trained = adapter.read(rows_name(name)).to(info.dtype)
    for position, token in enumerate(adapter.token_rows[name]):
        if token in rows:
            tensor[rows.index(token)] = trained[position, columns]
    return tensor


def merge(source: Checkpoint, adapter: Adapter) -> Checkpoint:
    """`source` with the adapter merged into it. Merged tensors are float32, or float64 like the base."""
    base = replaced(source, adapter)
    if base.config.tie_word_embeddings and "lm_head" in adapter.modules:
        base = _untied(base)
    tensors = dict(base.tensors)
    for module in adapter.modules:
        name = f"{module}.weight"
        tensors[name] = dataclasses.replace(
            tensors[name], dtype=torch.promote_types(tensors[name].dtype, torch.float32)
        )

    def read(name: str, index: Index | None) -> Tensor:
        module = name.removesuffix(".weight")
        if module not in adapter.modules:
            return base.read(name, index)
        return _sum(base, adapter, module, tensors[name], index)

    return dataclasses.replace(base, tensors=tensors, reader=read)


def _sum(base: Checkpoint, adapter: Adapter, module: str, info: TensorInfo, index: Index | None) -> Tensor:
    """(W + scale * B A)[index]. In fixed blocks of whole rows, so that a number is the same bits in any slice of it."""
    a, b = (adapter.read(f"{module}.adapter.{side}").to(info.dtype) for side in "ab")
    scale = adapter.options.scale_of(module)
    start, stop, step = (index[0] if index else slice(None)).indices(info.shape[0])
    across = index[1] if index and len(index) > 1 else slice(None)
    if step != 1:
        raise ValueError(f"{module} is read in steps of {step}")
    parts = []
    for first in range(start // BLOCK * BLOCK, stop, BLOCK):
        last = min(first + BLOCK, info.shape[0])
        update = (b[first:last].clone() @ a).mul_(scale)  # the clone is aligned as any other, where a view is not
        keep = slice(max(start, first), min(stop, last))
        weight = base.read(f"{module}.weight", (keep, across)).to(info.dtype)
        parts.append(weight + update[keep.start - first : keep.stop - first, across])
    return torch.cat(parts) if parts else base.read(f"{module}.weight", index).to(info.dtype)


def _config(source: Checkpoint, adapter: Adapter) -> ModelConfig:
    """The base's shape with the adapter's vocabulary, and untied where the adapter makes the two ends differ."""
    config, whole = source.config, adapter.whole
    sizes = [info.shape[0] for name, info in whole.items() if name in (EMBEDDING, OUTPUT)]
    if len(set(sizes)) > 1:
        raise UserError(f"{adapter.path}: its embedding and output layer are of vocabularies of different size")
    vocab_size = sizes[0] if sizes else config.vocab_size
    tied = config.tie_word_embeddings
    if vocab_size != config.vocab_size and not tied and len(sizes) == 1:
        raise UserError(
            f"{adapter.path} changes the vocabulary from {config.vocab_size} to {vocab_size} tokens in only one of"
            " embed_tokens and lm_head, or was trained on another model"
        )
    if tied and sizes and (vocab_size == config.vocab_size or len(sizes) == 2):
        ends = [adapter.read(name) if name in whole else source.read(EMBEDDING) for name in (EMBEDDING, OUTPUT)]
        tied = bool(adapter.raw.get("ensure_weight_tying")) or torch.equal(*ends)
    return dataclasses.replace(config, vocab_size=vocab_size, tie_word_embeddings=tied)


def _untied(base: Checkpoint) -> Checkpoint:
    config = dataclasses.replace(base.config, tie_word_embeddings=False)
    return dataclasses.replace(
        base,
        config=config,
        hf_config={**base.hf_config, "tie_word_embeddings": False},
        tensors=in_model_order(config, {**base.tensors, OUTPUT: base.tensors[EMBEDDING]}),
        reader=lambda name, index: base.read(EMBEDDING if name == OUTPUT else name, index),
    )


def _tokenizer(source: Checkpoint, adapter: Adapter, vocab_size: int) -> Tokenizer | None:
    """The one saved with the adapter, whose template it was trained with; the base's when that has too many tokens."""
    own = adapter.tokenizer()
    if own is not None and own.vocab_size <= vocab_size:
        return own
    if own is not None:
        print(
            f"note: {adapter.path} carries a tokenizer of {own.vocab_size} tokens for a model of {vocab_size};"
            " the base's is used.",
            file=sys.stderr,
        )
    return source.tokenizer()
