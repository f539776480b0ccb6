"""The facts about a checkpoint from its headers; no weight is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from puna.errors import UserError
from puna.files import manifest_path, read_json
from puna.model.config import ModelConfig
from puna.model.presets import PRESETS
from puna.tokenizer import Tokenizer
from puna.weights.checkpoint import Checkpoint

HALF = 2  # bytes of a number in bfloat16 and float16
KINDS = {"llama": "SentencePiece", "gpt2": "byte-level BPE"}  # tokenizer.ggml.model


def describe(source: Checkpoint) -> dict[str, Any]:
    """The facts about an open checkpoint, fit for JSON. Sizes are in bytes."""
    config = source.config
    stored: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    for info in source.tensors.values():
        stored[str(info.dtype).removeprefix("torch.")] += info.nbytes
        tensors[str(info.dtype).removeprefix("torch.")] += 1
    parameters = config.num_parameters()
    cache = config.kv_bytes_per_token(HALF)
    manifest = manifest_path(source.path)
    return {
        "path": str(source.path),
        "format": source.format,
        "files": {_file_name(file, source.path): file.stat().st_size for file in source.files},
        "preset": preset(config),
        "parameters": parameters,
        "config": asdict(config),
        "dtypes": dict(tensors),
        "quantised": bool(source.details.get("quantised")),
        "memory": {"float32": 4 * parameters, "bfloat16": HALF * parameters, "float16": HALF * parameters},
        "kv_cache": {"per_token": cache, "full_context": cache * config.max_position_embeddings},
        "tokenizer": _tokenizer(source),
        "generation": source.generation,
        "details": source.details,
        "manifest": read_json(manifest) if manifest.exists() else None,
    }


def _file_name(file: Path, root: Path) -> str:
    """The path relative to the checkpoint: Megatron's files have the same name in each rank's folder."""
    return str(file.relative_to(root)) if file != root and file.is_relative_to(root) else file.name


def preset(config: ModelConfig) -> str | None:
    """The published model of this shape; context length and the norms' epsilon may differ."""
    for name, known in PRESETS.items():
        context, epsilon = known.max_position_embeddings, known.rms_norm_eps
        if replace(config, max_position_embeddings=context, rms_norm_eps=epsilon) == known:
            return name
    return None


def _tokenizer(source: Checkpoint) -> dict[str, Any] | None:
    try:
        tokenizer = source.tokenizer()
        if tokenizer is None:
            return None
        tokenizer.check_fits(source.config.vocab_size)
    except UserError as error:
        return {"problem": str(error)}
    return {
        "kind": _kind(tokenizer),
        "tokens": tokenizer.vocab_size,
        "bos": None if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id),
        "add_bos": tokenizer.add_bos,
        "stops": {tokenizer.token(index): index for index in tokenizer.stop_ids},
        "template": tokenizer.template_name,
        "chat_template": tokenizer.chat_template,
        "fingerprint": tokenizer.fingerprint(),
    }


def _kind(tokenizer: Tokenizer) -> str:
    try:
        fields = tokenizer.to_gguf()
    except UserError:
        return "one that GGUF has no name for"
    pre = fields.get("tokenizer.ggml.pre", "default")
    return KINDS[fields["tokenizer.ggml.model"]] + ("" if pre == "default" else f" ({pre})")
