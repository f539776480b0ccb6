"""Meta's own layout: consolidated.NN.pth, one file per model-parallel rank, with params.json.

Its q and k rows are in interleaved RoPE order. fairscale splits the output of wq, wk, wv, w1, w3 and output, the input
of wo and w2; Llama 1 and 2 split the embedding along the hidden size, Llama 3 along the vocabulary.

What params.json has no key for (context length, end tokens, chat template) is written beside it as config.json and
Hugging Face tokenizer files, which Meta's code ignores; without them the published models' values are taken.
"""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.errors import UserError
from puna.files import read_json, write_json
from puna.model.config import ModelConfig, check_token_ids
from puna.model.tp_plan import TP_PLAN, chunk
from puna.weights.checkpoint import Checkpoint, Index, TensorInfo, cast, in_model_order, main_dtype
from puna.weights.formats import hf
from puna.weights.formats.format import Format
from puna.weights.formats.meta_params import LLAMA3_VOCAB, config_from, params_from
from puna.weights.formats.presharded import ShardOptions
from puna.weights.rope_permute import is_rotated, permute, read_unpermuted
from puna.weights.sharded import Shape, TensorShard, assemble, side_by_side

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OUTER = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
LAYER_META = {hf_name: meta_name for meta_name, hf_name in LAYER.items()}
OUTER_META = {hf_name: meta_name for meta_name, hf_name in OUTER.items()}
DIM = {"col": 0, "row": 1, "vocab": 0}


def detect(path: Path) -> bool:
    """Whether `path` is a directory with params.json and consolidated.NN.pth."""
    return path.is_dir() and (path / "params.json").exists() and any(path.glob("consolidated.*.pth"))


def open_meta(path: Path) -> Checkpoint:
    """Opens Meta's shards as one checkpoint. Raises `UserError` for missing, damaged or differing ones."""
    import torch

    from puna.weights.formats import torch_pickle

    params = read_json(path / "params.json")
    files = _shard_files(path)
    shards = [_renamed(torch_pickle.load_file(file)) for file in files]
    for file, shard in zip(files, shards, strict=True):
        if differing := sorted(shard.keys() ^ shards[0].keys()):
            raise UserError(
                f"{file} and {files[0].name} don't hold the same tensors: {differing[0]} is in one of them."
            )
    places = {name: _places(name, [tuple(shard[name].shape) for shard in shards], params) for name in shards[0]}
    tensors = {name: TensorInfo(shape, shards[0][name].dtype) for name, (shape, _) in places.items()}
    for name, tensor in shards[0].items():
        parts = [shard[name] for shard in shards]
        whole = _module(name) not in TP_PLAN
        if any(part.dtype != tensor.dtype or whole and not torch.equal(part, tensor) for part in parts):
            raise UserError(f"{path}: its files aren't shards of one model, {name} differs among them.")
    if hf.EMBEDDING not in tensors:
        raise UserError(f"{path} is missing tok_embeddings.weight.")

    def stored(name: str, index: Index | None) -> Tensor:
        shape, where = places[name]
        parts = [
            TensorShard(place, partial(shard.__getitem__, name)) for place, shard in zip(where, shards, strict=True)
        ]
        return assemble(shape, tensors[name].dtype, parts, index)

    raw = read_json(path / "config.json") if (path / "config.json").exists() else {}
    tied = _tied(tensors, stored) if raw.get("tie_word_embeddings") in (None, True) else False
    hf_config = config_from(params, vocab_size=tensors[hf.EMBEDDING].shape[0], tied=tied)
    config = ModelConfig.from_hf(hf_config)
    if raw:
        hf_config, config = raw, _agreed(path, config, ModelConfig.from_hf(raw))
        check_token_ids(raw, config.vocab_size, f"{path / 'config.json'}")
    if config.tie_word_embeddings:
        tensors.pop(hf.OUTPUT, None)

    def read(name: str, index: Index | None) -> Tensor:
        if is_rotated(name):
            return read_unpermuted(lambda rows: stored(name, rows), config.head_dim, index)
        return stored(name, index)

    tensors = in_model_order(config, tensors)
    others = ("params.json", "config.json", "generation_config.json", *hf.TOKENIZER_FILES)
    return Checkpoint(
        path=path,
        format="meta",
        config=config,
        hf_config=hf.native_config(config, hf_config, tensors),
        generation=hf.read_generation(path, config),
        tensors=tensors,
        files=[*files, *(path / name for name in others if (path / name).exists())],
        details={"shards": len(files), "params": params},
        reader=read,
        load_tokenizer=lambda: hf.load_tokenizer(path),
    )


def check_meta(source: Checkpoint, dtype: torch.dtype | None, options: ShardOptions) -> None:
    """Raises `UserError` for what the layout can't hold: biases, heads of another size than hidden / heads, RoPE
    scaling other than Llama 3's, a number of ranks that doesn't divide the model."""
    config, shards = source.config, options.ranks
    params_from(config)
    for what, size in (
        ("attention heads", config.num_attention_heads),
        ("key/value heads", config.num_key_value_heads),
        ("rows of the MLP", config.intermediate_size),
        ("tokens of the vocabulary", config.vocab_size),
    ):
        if size % shards:
            raise UserError(f"{size} {what} can't be split over {shards} ranks; choose another number.")
    hf.check_hf(source, dtype, None)


def write_meta(
    source: Checkpoint, dst: Path, dtype: torch.dtype | None = None, options: ShardOptions | None = None
) -> None:
    """Writes the directory `dst`, which must not exist yet: a file per rank, one of them in memory at a time."""
    import torch

    from puna.weights.formats import torch_pickle

    config, options = source.config, options or ShardOptions()
    shards, params = options.ranks, params_from(config)
    dst.mkdir()
    for rank in range(shards):
        state: dict[str, Tensor] = {}
        for name, info in source.tensors.items():
            part = source.read(name, _index(name, info.shape, rank, shards))
            if is_rotated(name):
                part = permute(part, config.head_dim)
            # A fresh tensor: torch.save writes the whole storage behind a view, which is a file.
            part = cast(name, part, dtype or info.dtype)
            state[_meta_name(name)] = part.clone(memory_format=torch.contiguous_format)
        if config.tie_word_embeddings:
            rows = source.read(hf.EMBEDDING, (chunk(config.vocab_size, rank, shards),))
            state["output.weight"] = rows.to(state["tok_embeddings.weight"].dtype, copy=True)
        torch_pickle.save_file(state, dst / f"consolidated.{rank:02d}.pth")
    tensors = {name: TensorInfo(info.shape, dtype or info.dtype) for name, info in source.tensors.items()}
    write_json(dst / "params.json", params)
    write_json(dst / "config.json", {**source.hf_config, "torch_dtype": main_dtype(tensors)})
    if source.generation:
        write_json(dst / "generation_config.json", source.generation)
    if tokenizer := source.tokenizer():
        tokenizer.save(dst)  # with the tokenizer.model that Meta's code reads, where the checkpoint has one


def _shard_files(path: Path) -> list[Path]:
    files = sorted(path.glob("consolidated.*.pth"))
    for number, file in enumerate(files):
        if file.name != f"consolidated.{number:02d}.pth":
            raise UserError(f"{path} lacks consolidated.{number:02d}.pth; fetch it again.")
    return files


def _renamed(shard: dict[str, Tensor]) -> dict[str, Tensor]:
    """The shard in Hugging Face names, without the rotary frequencies, which follow from the config."""
    return {_hf_name(name): tensor for name, tensor in shard.items() if not name.endswith("rope.freqs")}


def _hf_name(name: str) -> str:
    """The Hugging Face name; a name that no LLaMA has stays as it is."""
    stem, _, kind = name.rpartition(".")
    if stem in OUTER:
        return f"{OUTER[stem]}.{kind}"
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", stem)
    if match and match[2] in LAYER:
        return f"model.layers.{match[1]}.{LAYER[match[2]]}.{kind}"
    return name


def _meta_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in OUTER_META:
        return f"{OUTER_META[stem]}.{kind}"
    _, _, layer, module = stem.split(".", 3)
    return f"layers.{layer}.{LAYER_META[module]}.{kind}"


def _module(name: str) -> str:
    return name.split(".")[-2] if "." in name else name


def _places(name: str, shapes: list[Shape], params: dict[str, Any]) -> tuple[Shape, list[Index]]:
    """The shape of the merged tensor and where each shard's part lies in it."""
    how = TP_PLAN.get(_module(name))
    if how is None or any(len(shape) != 2 for shape in shapes):
        return shapes[0], [_all(shape) for shape in shapes]
    dim = DIM[how]
    if name == hf.EMBEDDING and shapes[0][1] != params.get("dim"):
        dim = 1  # Llama 1 and 2
    return side_by_side(name, shapes, dim)


def _all(shape: Shape) -> Index:
    return tuple(slice(0, n) for n in shape)


def _index(name: str, shape: Shape, rank: int, shards: int) -> Index:
    """The part of a whole tensor that a shard holds."""
    how = TP_PLAN.get(_module(name))
    if how is None:
        return _all(shape)
    dim = DIM[how]
    if name == hf.EMBEDDING and shape[0] < LLAMA3_VOCAB:
        dim = 1
    return tuple(chunk(n, rank, shards) if d == dim else slice(0, n) for d, n in enumerate(shape))


def _tied(tensors: dict[str, TensorInfo], read: Any, rows: int = 4096) -> bool:
    """Whether the output layer is the embedding: Llama 3.2's files hold it twice, and don't say so."""
    import torch

    if hf.OUTPUT not in tensors or hf.EMBEDDING not in tensors:
        return hf.OUTPUT not in tensors
    if tensors[hf.OUTPUT] != tensors[hf.EMBEDDING]:
        return False
    starts = range(0, tensors[hf.OUTPUT].shape[0], rows)
    return all(
        torch.equal(read(hf.OUTPUT, (slice(start, start + rows),)), read(hf.EMBEDDING, (slice(start, start + rows),)))
        for start in starts
    )


def _agreed(path: Path, ours: ModelConfig, declared: ModelConfig) -> ModelConfig:
    """`declared` (config.json), checked against params.json and the tensors (`ours`)."""
    ours = dataclasses.replace(ours, max_position_embeddings=declared.max_position_embeddings)
    for field in dataclasses.fields(ModelConfig):
        if getattr(ours, field.name) != getattr(declared, field.name):
            raise UserError(f"{path}: params.json and config.json disagree on {field.name}; remove the wrong one.")
    return declared


FORMAT = Format(
    name="meta",
    summary="a directory of Meta's params.json and consolidated.NN.pth, one per model-parallel rank",
    rope_order="interleaved",
    detect=detect,
    open=open_meta,
    write=write_meta,
    check=check_meta,
    options=ShardOptions,
    weight_files=(r"consolidated\.\d+\.pth",),
)
