"""llama2.c's .bin files: a header of numbers, then float32 tensors in a fixed order, each kind for all layers.

Version 0 ("legacy") has no magic number; version 1 has the magic "ak42". Both keep q and k in interleaved RoPE order.
The context's rotary tables that version 0 stores follow from the config and are skipped. The tokenizer is the file
tokNNN.bin (NNN its size) or tokenizer.bin beside the model. Format: export.py of https://github.com/karpathy/llama2.c
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from puna.errors import UserError
from puna.files import map_file, open_file
from puna.model.config import ModelConfig
from puna.weights.checkpoint import Checkpoint, Index, TensorInfo, in_model_order
from puna.weights.formats.format import Format
from puna.weights.rope_permute import is_rotated, read_unpermuted

if TYPE_CHECKING:
    from torch import Tensor

    from puna.tokenizer import Tokenizer

MAGIC = 0x616B3432  # "ak42"
HEADER = "<7i"  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len
HEADER_V1_BYTES = 256
LIMIT = 1 << 30  # no real header has a larger number


def detect(path: Path) -> bool:
    """Whether `path` is a .bin file whose header could be one of llama2.c."""
    if not path.is_file() or path.suffix != ".bin":
        return False
    with open_file(path) as file:
        head = file.read(struct.calcsize(HEADER))
    if len(head) < struct.calcsize(HEADER):
        return False
    dim, ffn, layers, heads, kv, vocab, length = struct.unpack(HEADER, head)
    plausible = all(0 < number < LIMIT for number in (dim, ffn, layers, heads, kv, abs(vocab), length))
    return dim == MAGIC or (plausible and dim % heads == 0 and heads % kv == 0)


def open_llama2c(path: Path) -> Checkpoint:
    """Maps the file. Raises `UserError` when its size isn't what its header says, and for quantised versions."""
    import torch

    size = path.stat().st_size
    with open_file(path) as file:
        head = file.read(HEADER_V1_BYTES)
    if struct.unpack_from("<I", head)[0] == MAGIC:
        version = struct.unpack_from("<i", head, 4)[0]
        if version != 1 or len(head) < HEADER_V1_BYTES:
            raise UserError(f"{path} is version {version} of llama2.c's format, puna reads 0 and 1; export it as 1")
        numbers, tied, start = struct.unpack_from(HEADER, head, 8), head[36] != 0, HEADER_V1_BYTES
    else:
        version, numbers, start = 0, struct.unpack_from(HEADER, head), struct.calcsize(HEADER)
        tied = numbers[5] > 0
    dim, ffn, layers, heads, kv, vocab, length = numbers
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": abs(vocab),
            "hidden_size": dim,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "max_position_embeddings": length,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": tied,
        }
    )
    skipped = length * config.head_dim if version == 0 else 0  # cos and sin of [length, head_dim / 2] each
    starts, end = _starts(config, version, start, skipped)
    if end != size:
        raise UserError(f"{path} is cut off or no llama2.c file: it has {size:,} bytes where its header means {end:,}")
    data = map_file(path)
    shapes = config.tensors()

    def stored(name: str, index: Index | None) -> Tensor:
        shape = shapes[name]
        raw = data[starts[name] : starts[name] + 4 * math.prod(shape)]
        tensor = raw.view(torch.float32).view(shape)
        return tensor if index is None else tensor[index]

    def read(name: str, index: Index | None) -> Tensor:
        if is_rotated(name):
            return read_unpermuted(lambda rows: stored(name, rows), config.head_dim, index)
        return stored(name, index)

    tokenizer = next((file for file in _tokenizer_files(path, config.vocab_size) if file.exists()), None)
    return Checkpoint(
        path=path,
        format="llama2c",
        config=config,
        hf_config={**config.to_hf(), "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"},
        generation={},
        tensors=in_model_order(config, {name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()}),
        files=[path, *([tokenizer] if tokenizer else [])],
        details={"version": version},
        reader=read,
        load_tokenizer=lambda: _load_tokenizer(tokenizer) if tokenizer else None,
    )


def _starts(config: ModelConfig, version: int, start: int, skipped: int) -> tuple[dict[str, int], int]:
    """Where each tensor starts, in bytes, and where the file ends. `skipped` floats precede the output layer."""
    norms = ["input_layernorm", "post_attention_layernorm"]
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    mlp = [f"mlp.{name}_proj" for name in ("gate", "down", "up")]
    embedding, norm, output = ["model.embed_tokens.weight"], ["model.norm.weight"], ["lm_head.weight"]

    def layers(kinds: list[str]) -> list[str]:
        return [f"model.layers.{layer}.{kind}.weight" for kind in kinds for layer in range(config.num_hidden_layers)]

    if version == 0:
        order = embedding + layers([norms[0], *attention, norms[1], *mlp]) + norm
    else:
        order = layers(norms) + norm + embedding + layers([*attention, *mlp])
    shapes, starts = config.tensors(), {}
    for name in order:
        starts[name] = start
        start += 4 * math.prod(shapes[name])
    start += 4 * skipped
    if not config.tie_word_embeddings:
        starts[output[0]] = start
        start += 4 * math.prod(shapes[output[0]])
    return starts, start


def _load_tokenizer(path: Path) -> Tokenizer:
    from puna.tokenizer import Tokenizer

    return Tokenizer.from_llama2c(path)


def _tokenizer_files(path: Path, vocab_size: int) -> list[Path]:
    return [path.with_name(f"tok{vocab_size}.bin"), path.with_name("tokenizer.bin")]


FORMAT = Format(
    name="llama2c",
    summary="a llama2.c .bin file of version 0 or 1, with tokNNN.bin or tokenizer.bin beside it",
    rope_order="interleaved",
    detect=detect,
    open=open_llama2c,
)
