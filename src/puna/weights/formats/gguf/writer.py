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
from puna.weights.checkpoint import Checkpoint, TensorInfo, cast
from puna.weights.formats.gguf.container import write_file
from puna.weights.formats.gguf.names import gguf_name, hf_name, llama3_divisors, metadata_from, padded
from puna.weights.rope_permute import is_rotated, permute

KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # general.file_type: what most matrices are
CHUNK = 4 << 20  # elements encoded at a time; the quantiser needs several float32 copies of them
ROPE = "rope_freqs.weight"


def write_gguf(source: Checkpoint, dst: Path, dtype: torch.dtype | Literal["q8_0"] | None = None) -> None:
    """Writes the file `dst`; matrices in `dtype` (None: each one's own).

    Under q8_0, a matrix whose rows are no multiple of 32 is float16, as llama.cpp does it. Raises `UserError` for what
    GGUF can't carry: some rope scalings, float64, an unknown pre-tokenizer, no tokenizer, values beyond float16.
    """
    tokenizer, config = source.tokenizer(), source.config
    if tokenizer is None:
        raise UserError(
            f"{source.path} has no tokenizer, and a GGUF file needs one: put tokenizer.json beside the weights"
        )
    tokenizer.check_fits(config.vocab_size)
    tensors = {gguf_name(name): (info.shape, _kind(name, info, dtype)) for name, info in source.tensors.items()}
    main = tensors["token_embd.weight"][1]
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": source.details.get("metadata", {}).get("general.name", source.path.resolve().stem),
        "general.file_type": FILE_TYPES[main],
        **({"general.quantization_version": 2} if main == "Q8_0" else {}),
        **metadata_from(config),
        **padded(tokenizer.to_gguf(), config.vocab_size),
    }
    divisors = np.zeros(0, np.float32)
    if (scaling := config.rope_scaling or {}).get("rope_type") == "llama3":
        divisors = llama3_divisors(config.rope_theta, config.head_dim, scaling)
        tensors = {ROPE: (divisors.shape, "F32"), **tensors}

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


def _kind(name: str, info: TensorInfo, dtype: torch.dtype | str | None) -> str:
    if len(info.shape) == 1:
        return "F32"
    if dtype == "q8_0":
        return "F16" if info.shape[-1] % 32 else "Q8_0"
    try:
        return KINDS[dtype or info.dtype]  # type: ignore[index]  # no other string comes here
    except KeyError:
        raise UserError(
            f"GGUF can't carry {name} in {dtype or info.dtype}: give float32, float16, bfloat16 or q8_0"
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
