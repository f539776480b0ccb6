"""GGUF out: a file that llama.cpp, Ollama and puna read, written tensor by tensor.

Vectors are float32 whatever the matrices are (llama.cpp aborts on bfloat16 norms). The tokenizer goes along with its
pre-tokenizer named: a file without that name loads, answers, and splits text otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from puna.errors import UserError
from puna.model.config import ModelConfig
from puna.tokenizer import Tokenizer
from puna.weights.checkpoint import Checkpoint, TensorInfo, cast
from puna.weights.formats.gguf.container import write_file
from puna.weights.formats.gguf.names import (
    config_from,
    gguf_name,
    hf_name,
    llama3_divisors,
    metadata_from,
    padded,
    unpadded,
)
from puna.weights.rope_permute import is_rotated, permute
from puna.weights.verification import config_difference, tokenizer_difference

Q8_0_BLOCK = 32  # numbers of a row that share a scale
KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # general.file_type: what most matrices are
CHUNK = 4 << 20  # elements encoded at a time; the quantiser needs several float32 copies of them
ROPE = "rope_freqs.weight"


def write_gguf(source: Checkpoint, dst: Path, dtype: torch.dtype | Literal["q8_0"] | None = None) -> None:
    """Writes the file `dst`; matrices in `dtype` (None: each one's own).

    Under q8_0, a matrix whose rows are not a multiple of 32 is float16, as llama.cpp does it. Raises `UserError` as
    `check_gguf`, and for values beyond float16.
    """
    config = source.config
    metadata, tensors, divisors = _plan(source, dtype)

    def chunks(name: str) -> Iterator[np.ndarray]:
        if name == ROPE:
            yield divisors
            return
        full_name = hf_name(name)
        tensor = source.read(full_name)
        if is_rotated(full_name):
            tensor = permute(tensor, config.head_dim)
        yield from _encode(full_name, tensor, tensors[name][1])

    write_file(dst, metadata, tensors, chunks)


def check_gguf(source: Checkpoint, dtype: torch.dtype | Literal["q8_0"] | None) -> None:
    """Raises `UserError`, by name, for what GGUF can't carry: some RoPE scalings, float64, no tokenizer, or one that
    llama.cpp would not reproduce."""
    _plan(source, dtype)


def stored(tensor: torch.Tensor, dtype: torch.dtype | Literal["q8_0"] | None) -> torch.Tensor:
    """The numbers that remain of a tensor, or of rows of it, in a GGUF file."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    if tensor.dim() == 1:
        return tensor.float()
    if dtype != "q8_0":
        return tensor if dtype is None else tensor.to(dtype)
    if tensor.shape[-1] % Q8_0_BLOCK:
        return tensor.to(torch.float16)
    kind = GGMLQuantizationType.Q8_0
    return torch.from_numpy(dequantize(quantize(tensor.float().contiguous().numpy(), kind), kind))


def _plan(
    source: Checkpoint, dtype: torch.dtype | str | None
) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], str]], np.ndarray]:
    """Metadata, shape and type of each tensor, and the content of `rope_freqs.weight` (empty where there is none)."""
    config = source.config
    tensors = {gguf_name(name): (info.shape, _kind(name, info, dtype)) for name, info in source.tensors.items()}
    main = tensors["token_embd.weight"][1]
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": source.details.get("metadata", {}).get("general.name", source.path.resolve().stem),
        "general.file_type": FILE_TYPES[main],
        **({"general.quantization_version": 2} if main == "Q8_0" else {}),
        **metadata_from(config),
        **_tokenizer_fields(source),
    }
    divisors = np.zeros(0, np.float32)
    if (scaling := config.rope_scaling or {}).get("rope_type") == "llama3":
        divisors = llama3_divisors(config.rope_theta, config.head_dim, scaling)
        tensors = {ROPE: (divisors.shape, "F32"), **tensors}
    shapes = {name: shape for name, (shape, _) in tensors.items() if name != ROPE}
    back = ModelConfig.from_hf(config_from(source.path, metadata, shapes, divisors if divisors.size else None))
    if difference := config_difference(config, back):
        raise UserError(f"GGUF can't carry this model's config, {difference} as read from GGUF: keep it as hf.")
    return metadata, tensors, divisors


def _tokenizer_fields(source: Checkpoint) -> dict[str, Any]:
    """The `tokenizer.*` metadata, padded to the embedding, after checking that a reader gets the same tokenizer."""
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise UserError(
            f"{source.path} has no tokenizer, and a GGUF file needs one: put tokenizer.json beside the weights."
        )
    fields = padded(tokenizer.to_gguf(), source.config.vocab_size)
    back = Tokenizer.from_gguf(unpadded(fields))
    # Readers stop at the ids of eos, eot and eom, and at tokens with the spelling of known end tokens, such as those
    # that `to_gguf` gives for the latter two.
    slots = sorted(("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"), key=fields.__contains__)
    if missing := [index for index in tokenizer.stop_ids if index not in back.stop_ids]:
        if len(missing) > len(slots):
            names = ", ".join(repr(tokenizer.token(index)) for index in tokenizer.stop_ids)
            raise UserError(
                f"GGUF can't carry all end tokens of this model ({names}): it has keys for three, eos, eot and eom;"
                " shorten eos_token_id in config.json and generation_config.json."
            )
        fields |= dict(zip(slots, missing, strict=False))
        back = Tokenizer.from_gguf(unpadded(fields))
    if difference := tokenizer_difference(tokenizer, back, source.config.vocab_size):
        raise UserError(f"A GGUF of this tokenizer would be another one: {difference}; keep the checkpoint as hf.")
    return fields


def _kind(name: str, info: TensorInfo, dtype: torch.dtype | str | None) -> str:
    if len(info.shape) == 1:
        return "F32"
    if dtype == "q8_0":
        return "F16" if info.shape[-1] % Q8_0_BLOCK else "Q8_0"
    try:
        return KINDS[dtype or info.dtype]  # type: ignore[index]  # no other string comes here
    except KeyError:
        raise UserError(
            f"GGUF can't carry {name} in {dtype or info.dtype}: give float32, float16, bfloat16 or q8_0."
        ) from None


def _encode(name: str, tensor: torch.Tensor, kind: str) -> Iterator[np.ndarray]:
    """The bytes of a tensor, some rows at a time."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    dtypes = {kind: dtype for dtype, kind in KINDS.items()}
    rows = max(1, CHUNK // max(1, tensor[0].numel()))
    for some in tensor.split(rows):
        if kind == "Q8_0":
            yield quantize(some.float().contiguous().numpy(), GGMLQuantizationType.Q8_0)
        else:
            yield cast(name, some, dtypes[kind]).contiguous().flatten().view(torch.uint8).numpy()
