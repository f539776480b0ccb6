"""The native layout: a Hugging Face directory of config.json, weights, tokenizer and generation_config.json.

Read with safetensors or .bin weights, in one file or in shards with an index; written as safetensors, in the keys of
transformers 4, which version 5 reads too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from puna.errors import UserError
from puna.files import read_json, write_json
from puna.model.config import ModelConfig, end_ids
from puna.tokenizer import Tokenizer
from puna.weights.checkpoint import (
    Checkpoint,
    Index,
    Reader,
    TensorInfo,
    cast,
    in_model_order,
    main_dtype,
)
from puna.weights.formats import safetensors_file, torch_pickle

KINDS = ("model.safetensors", "pytorch_model.bin")  # preferred first
MAX_SHARD = 5_000_000_000  # bytes, as transformers
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# What config.json says beside the shape, and is carried over as it is.
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout", "use_cache")
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
TOKENIZER_FILES = (*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja")  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """The weight files of a directory as one state dict."""

    tensors: dict[str, TensorInfo]
    read: Reader
    files: list[Path]


def detect(path: Path) -> bool:
    """A directory with config.json and weights of one of the two kinds."""
    return path.is_dir() and (path / "config.json").exists() and bool(_weight_files(path))


def open_hf(path: Path) -> Checkpoint:
    """Opens a Hugging Face directory. Raises `UserError` for a damaged or incomplete one, or another architecture."""
    said = read_json(path / "config.json")
    config = ModelConfig.from_hf(said)
    generation = read_json(file) if (file := path / "generation_config.json").exists() else {}
    for settings, name in ((said, "config.json"), (generation, "generation_config.json")):
        end_ids(settings, config.vocab_size, f"{path / name}")
    weights = open_weights(path)
    tensors, read, ignored = _without_legacy(path, config, weights)
    tensors = in_model_order(config, tensors)
    others = [path / name for name in ("config.json", "generation_config.json", *TOKENIZER_FILES)]
    return Checkpoint(
        path=path,
        format="hf",
        config=config,
        hf_config=native_config(config, said, tensors),
        generation=generation,
        tensors=tensors,
        files=[*weights.files, *(file for file in others if file.exists())],
        details={"weight_files": [file.name for file in weights.files], "ignored": ignored},
        reader=read,
        load_tokenizer=lambda: load_tokenizer(path),
    )


def open_weights(directory: Path) -> Weights:
    """Opens the weight files of a directory, safetensors before .bin. Nothing is read before it is asked for."""
    index_of, files = _weight_files(directory) or ({}, [])
    if not files:
        raise UserError(f"{directory} has no weights: neither {KINDS[0]} nor {KINDS[1]}, nor shards of them")
    torch_files = lru_cache(maxsize=1)(torch_pickle.load_file)
    places: dict[str, Path] = {}
    tensors: dict[str, TensorInfo] = {}
    mapped: dict[Path, safetensors_file.Mapped] = {}
    for file in files:
        if file.suffix == ".bin":
            found = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in torch_files(file).items()}
        else:
            mapped[file] = safetensors_file.open_file(file)
            found = mapped[file].tensors
        for name, info in found.items():
            if name in places and name not in index_of:
                raise UserError(f"{file} and {places[name].name} both hold {name}; remove the one that doesn't belong")
            if index_of.get(name, file.name) == file.name:
                places[name], tensors[name] = file, info
    if lost := [name for name in index_of if name not in tensors]:
        raise UserError(f"{directory / index_of[lost[0]]} lacks {lost[0]}, which the index puts there; fetch it again")

    def read(name: str, index: Index | None) -> torch.Tensor:
        file = places[name]
        tensor = mapped[file].read(name) if file in mapped else torch_files(file)[name]
        return tensor if index is None else tensor[index]

    return Weights(tensors, read, files)


def native_config(config: ModelConfig, said: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """config.json in the native layout: the shape, what of `said` is carried over, the dtype of the tensors."""
    kept = {key: said[key] for key in KEPT if said.get(key) is not None}
    return {**config.to_hf(), **kept, "torch_dtype": main_dtype(tensors)}


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).exists() for name in TOKENIZERS)


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer in a Hugging Face directory, None when there is none."""
    return Tokenizer.load(directory) if has_tokenizer(directory) else None


def write_hf(source: Checkpoint, dst: Path, dtype: torch.dtype | None = None, *, max_shard: int = MAX_SHARD) -> None:
    """Writes the directory `dst`, which must not exist yet: weights in `dtype` (None: each tensor's own) in files of at
    most `max_shard` bytes, unless one tensor is larger; config, generation settings and tokenizer."""
    dst.mkdir()
    tensors = {name: TensorInfo(info.shape, dtype or info.dtype) for name, info in source.tensors.items()}
    write_weights(source.read, tensors, dst, max_shard)
    write_json(dst / "config.json", {**source.hf_config, "torch_dtype": main_dtype(tensors)})
    if source.generation:
        write_json(dst / "generation_config.json", source.generation)
    if tokenizer := source.tokenizer():
        tokenizer.save(dst)


def write_weights(
    read: Callable[[str], torch.Tensor], tensors: Mapping[str, TensorInfo], dst: Path, max_shard: int = MAX_SHARD
) -> None:
    """Writes `read(name)`, cast to its dtype in `tensors`, as model.safetensors or as shards with an index."""
    shards: list[dict[str, TensorInfo]] = [{}]
    for name, info in tensors.items():
        if shards[-1] and sum(each.nbytes for each in shards[-1].values()) + info.nbytes > max_shard:
            shards.append({})
        shards[-1][name] = info
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = KINDS[0] if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        safetensors_file.write_file(dst / file, shard, lambda name: cast(name, read(name), tensors[name].dtype))
        index |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(info.nbytes for info in tensors.values())
        write_json(dst / f"{KINDS[0]}.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _weight_files(directory: Path) -> tuple[dict[str, str], list[Path]] | None:
    """(tensor -> file name, as the index says it, and the files), or None when there are none."""
    for kind in KINDS:
        index = directory / f"{kind}.index.json"
        if index.exists():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not places:
                raise UserError(f"{index} is damaged: it has no weight_map; fetch it again")
            for name in sorted(set(map(str, places.values()))):
                if Path(name).name != name or Path(name).suffix != Path(kind).suffix:
                    raise UserError(f"{index} points to {name!r}, which is no weight file of this directory")
                if not (directory / name).exists():
                    raise UserError(f"{directory} lacks {name}, which {index.name} names; fetch it again")
            return places, [directory / name for name in sorted(set(places.values()))]
        stem, suffix = kind.split(".")
        if (directory / kind).exists():
            return {}, [directory / kind]
        if shards := sorted(directory.glob(f"{stem}-*-of-*.{suffix}")):
            return {}, shards
    return None


def _without_legacy(
    path: Path, config: ModelConfig, weights: Weights
) -> tuple[dict[str, TensorInfo], Reader, list[str]]:
    """The tensors and their reader less what old versions of transformers stored beside them, and the names of that.

    Rotary frequencies follow from the config. A tied output layer may be stored twice, or only as lm_head.
    """
    ignored = [name for name in weights.tensors if name.endswith(".rotary_emb.inv_freq")]
    alias: dict[str, str] = {}
    if config.tie_word_embeddings and OUTPUT in weights.tensors:
        if EMBEDDING not in weights.tensors:
            alias[EMBEDDING] = OUTPUT
        elif not torch.equal(weights.read(OUTPUT, None), weights.read(EMBEDDING, None)):
            raise UserError(
                f"{path} says tie_word_embeddings, yet lm_head.weight isn't the embedding; say false in its config.json"
            )
        ignored.append(OUTPUT)
    tensors = {name: info for name, info in weights.tensors.items() if name not in ignored}
    tensors |= {name: weights.tensors[stored] for name, stored in alias.items()}
    return tensors, lambda name, index: weights.read(alias.get(name, name), index), ignored
