"""GGUF checkpoints of architecture `llama`, read tensor by tensor, dequantised exactly."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from puna.errors import UserError
from puna.model.config import ModelConfig
from puna.weights.checkpoint import Checkpoint, Index, TensorInfo, in_model_order
from puna.weights.formats.gguf.container import GGUFTensor, read_gguf
from puna.weights.formats.gguf.names import config_from, hf_name, unpadded
from puna.weights.rope_permute import is_rotated, unpermute

if TYPE_CHECKING:
    from puna.tokenizer import Tokenizer

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK_BYTES = 16 << 20  # of float32, dequantised at a time; numpy needs several times this on the way
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file, a split one by any of its parts, or the only one in a directory.

    Raises `UserError` for a damaged file, another architecture, or a type that the gguf package can't dequantise.
    """
    parts = [read_gguf(part) for part in _parts(path)]
    metadata = parts[0].metadata
    stored = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    if len(stored) != (expected := metadata.get("split.tensors.count", len(stored))):
        raise UserError(f"{path} has {len(stored)} tensors of {expected}: fetch all its parts again")
    _check_types(path, stored)

    frequencies = stored.pop("rope_freqs.weight", None)
    divisors = None if frequencies is None else _vector(frequencies)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    config = ModelConfig.from_hf(config_from(path, metadata, shapes, divisors))

    tensors = {hf_name(name): tensor for name, tensor in stored.items()}
    types = Counter(tensor.type for tensor in tensors.values())
    matrices = Counter(tensor.type for tensor in tensors.values() if len(tensor.shape) > 1)
    quantised = not types.keys() <= PLAIN.keys()
    main = torch.float32 if quantised else PLAIN[matrices.most_common(1)[0][0]]
    infos = {name: TensorInfo(tensor.shape, _dtype(tensor, main)) for name, tensor in tensors.items()}

    def read(name: str, index: Index | None) -> torch.Tensor:
        return _read(tensors[name], index, config.head_dim if is_rotated(name) else None).to(infos[name].dtype)

    tokens = _special_tokens(metadata)
    return Checkpoint(
        path=path,
        format="gguf",
        config=config,
        hf_config={**config.to_hf(), **tokens, "torch_dtype": str(main).removeprefix("torch.")},
        generation=tokens,
        tensors=in_model_order(config, infos),
        files=[part.path for part in parts],
        details={
            "quantised": quantised,
            "types": dict(types),
            "version": parts[0].version,
            "metadata": {key: value for key, value in metadata.items() if not isinstance(value, list)},
        },
        reader=read,
        load_tokenizer=lambda: _tokenizer(metadata),
    )


def _read(tensor: GGUFTensor, index: Index | None, head_dim: int | None) -> torch.Tensor:
    """`tensor[index]`, touching only its rows and, within them, the blocks that hold its columns.

    With `head_dim`, the rows are brought from the interleaved into the rotate-half RoPE order.
    """
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    stored = tensor.rows()
    row_slice, column_slice = ((index or ()) + (slice(None), slice(None)))[:2]
    order = torch.arange(len(stored))
    rows = (order if head_dim is None else unpermute(order, head_dim)).numpy()[row_slice]
    columns = range(tensor.shape[1] if len(tensor.shape) > 1 else 1)[column_slice]
    # Whole blocks are read, `skip` columns of the first one are not asked for.
    first, last = columns.start // tensor.block, -(-columns.stop // tensor.block)
    taken = slice(first * tensor.block_bytes, last * tensor.block_bytes)
    skip = slice(columns.start - first * tensor.block, columns.stop - first * tensor.block, columns.step)

    dtype = PLAIN.get(tensor.type, torch.float32)
    result = torch.empty(len(rows), len(columns), dtype=dtype)
    step = max(1, CHUNK_BYTES // (4 * tensor.block * max(1, last - first)))
    for at in range(0, len(rows) if columns else 0, step):
        raw = stored[rows[at : at + step], taken]
        if tensor.type in PLAIN:
            values = torch.from_numpy(raw).view(dtype)
        else:
            values = torch.from_numpy(dequantize(raw, GGMLQuantizationType[tensor.type]))
        result[at : at + step] = values[:, skip]
    return result if len(tensor.shape) > 1 else result.reshape(-1)


def _vector(tensor: GGUFTensor) -> np.ndarray:
    return tensor.rows().copy().view(np.float32).reshape(-1)


def _dtype(tensor: GGUFTensor, main: torch.dtype) -> torch.dtype:
    """The dtype that a tensor is read as.

    llama.cpp wants vectors in float32 whatever the matrices are; one that loses nothing by it is read back in the type
    of the matrices, where it came from.
    """
    if len(tensor.shape) > 1 or tensor.type != "F32":
        return PLAIN.get(tensor.type, torch.float32)
    values = torch.from_numpy(_vector(tensor))
    return main if torch.equal(values.to(main).float(), values) else torch.float32


def _check_types(path: Path, tensors: dict[str, GGUFTensor]) -> None:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    for name, tensor in {tensor.type: (name, tensor) for name, tensor in tensors.items()}.values():
        try:
            if tensor.type not in PLAIN:
                dequantize(np.zeros((1, tensor.block_bytes), np.uint8), GGMLQuantizationType[tensor.type])
        except NotImplementedError:
            raise UserError(
                f"{path}: tensor {name} is stored as {tensor.type}, which the gguf package can't dequantise;"
                " take a file of another type"
            ) from None
    for name, tensor in tensors.items():
        allowed = {"F32"} if name == "rope_freqs.weight" else PLAIN.keys()
        if len(tensor.shape) == 1 and tensor.type not in allowed:
            raise UserError(f"{path}: vector {name} is stored as {tensor.type}, which llama.cpp doesn't do")


def _special_tokens(metadata: dict[str, Any]) -> dict[str, Any]:
    """bos_token_id and eos_token_id as config.json has them; several tokens that end a turn are a list."""
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom")}
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None))
    tokens = {} if ids["bos"] is None else {"bos_token_id": ids["bos"]}
    return tokens | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})


def _tokenizer(metadata: dict[str, Any]) -> Tokenizer | None:
    from puna.tokenizer import Tokenizer

    return Tokenizer.from_gguf(unpadded(metadata)) if "tokenizer.ggml.tokens" in metadata else None


def _parts(path: Path) -> list[Path]:
    """The files that make up a checkpoint: itself, or all parts of a split one."""
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        whole = [file for file in files if not SPLIT_NAME.fullmatch(file.name) or "-00001-of-" in file.name]
        if len(whole) != 1:
            names = ", ".join(file.name for file in whole or files)
            raise UserError(f"{path} doesn't hold one GGUF model, give the file that you mean: {names}")
        path = whole[0]
    match = SPLIT_NAME.fullmatch(path.name)
    if not match:
        return [path]
    parts = [path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, int(match[3]) + 1)]
    if missing := [part.name for part in parts if not part.exists()]:
        raise UserError(f"{path} is one of {len(parts)} parts and {missing[0]} is not beside it: fetch all parts")
    return parts
