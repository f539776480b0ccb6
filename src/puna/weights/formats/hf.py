"""The native layout: a Hugging Face directory of config.json, weights, tokenizer and generation_config.json.

Read with safetensors or .bin weights, in one file or in shards with an index, chosen as transformers chooses; written
as safetensors, in the keys of transformers 4, which version 5 reads too.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.errors import UserError
from puna.files import read_json, write_json
from puna.model.config import ModelConfig, check_token_ids
from puna.options import option
from puna.progress import note
from puna.weights.checkpoint import (
    Checkpoint,
    Index,
    Reader,
    TensorInfo,
    cast,
    in_model_order,
    main_dtype,
)
from puna.weights.formats.format import Format

if TYPE_CHECKING:
    import torch

    from puna.tokenizer import Tokenizer

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")  # preferred first
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# Keys of config.json beside the shape that are carried over unchanged.
CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout", "use_cache")
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
TOKENIZER_FILES = (*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja")  # fmt: skip
# Modules that wrap a model while it is trained, and leave their names in a state dict that was saved in them.
WRAPPERS = re.compile(
    r"^base_model\.model\.|(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


@dataclass(frozen=True)
class Weights:
    """The weight files of a directory as one state dict."""

    tensors: dict[str, TensorInfo]
    read: Reader
    files: list[Path]


def detect(path: Path) -> bool:
    """Whether `path` is a directory with config.json and safetensors or .bin weights."""
    return path.is_dir() and (path / "config.json").exists() and bool(_weight_files(path, quiet=True))


def open_hf(path: Path) -> Checkpoint:
    """Opens a Hugging Face directory. Raises `UserError` for a damaged or incomplete one, or another architecture."""
    raw = read_json(path / "config.json")
    config = ModelConfig.from_hf(raw)
    generation = read_generation(path, config)
    check_token_ids(raw, config.vocab_size, f"{path / 'config.json'}")
    weights = open_weights(path)
    tensors, read, ignored = _without_legacy(path, config, weights)
    _check_quantization(path, raw, config, tensors)
    tensors = in_model_order(config, tensors)
    others = [path / name for name in ("config.json", "generation_config.json", *TOKENIZER_FILES)]
    return Checkpoint(
        path=path,
        format="hf",
        config=config,
        hf_config=native_config(config, raw, tensors),
        generation=generation,
        tensors=tensors,
        files=[*weights.files, *(file for file in others if file.exists())],
        details={"weight_files": [file.name for file in weights.files], "ignored": ignored},
        reader=read,
        load_tokenizer=lambda: load_tokenizer(path),
    )


def open_weights(directory: Path) -> Weights:
    """Opens the weight files of a directory, safetensors before .bin. Tensors are read lazily."""
    from puna.weights.formats import safetensors_file, torch_pickle

    index_of, files = _weight_files(directory) or ({}, [])
    if not files:
        raise UserError(f"{directory} has no weights: neither {' nor '.join(SINGLE_FILES)}, nor shards of them.")
    torch_files = lru_cache(maxsize=1)(torch_pickle.load_file)
    places: dict[str, Path] = {}
    tensors: dict[str, TensorInfo] = {}
    mapped: dict[Path, safetensors_file.Mapped] = {}
    for file in files:
        if file.suffix == ".bin":
            infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in torch_files(file).items()}
        else:
            mapped[file] = safetensors_file.open_file(file)
            infos = mapped[file].tensors
        for name, info in infos.items():
            if name in places and name not in index_of:
                raise UserError(f"{file} and {places[name].name} both hold {name}; remove the one that doesn't belong.")
            if index_of.get(name, file.name) == file.name:
                places[name], tensors[name] = file, info
    if lost := [name for name in index_of if name not in tensors]:
        raise UserError(f"{directory / index_of[lost[0]]} lacks {lost[0]}, which the index puts there; fetch it again.")
    stored = _stored_names(directory, tensors)

    def read(name: str, index: Index | None) -> torch.Tensor:
        name = stored[name]
        file = places[name]
        tensor = mapped[file].read(name) if file in mapped else torch_files(file)[name]
        return tensor if index is None else tensor[index]

    return Weights({name: tensors[original] for name, original in stored.items()}, read, files)


def unwrapped(name: str) -> str:
    """A tensor's name without the wrappers, perhaps several, that its model was saved in."""
    while (shorter := WRAPPERS.sub("", name)) != name:
        name = shorter
    return name


def _stored_names(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """The Hugging Face name of each tensor -> the name that it is stored under.

    They differ where a model was saved inside a wrapper (DataParallel, torch.compile, FSDP, peft), or without its
    output layer, as a `LlamaModel`.
    """
    stored: dict[str, str] = {}
    for name in names:
        plain = unwrapped(name)
        if plain in stored:
            raise UserError(f"{directory} holds {plain} twice, as {stored[plain]} and as {name}; remove one of them.")
        stored[plain] = name
    if "embed_tokens.weight" in stored and EMBEDDING not in stored:
        stored = {name if name == OUTPUT else f"model.{name}": original for name, original in stored.items()}
    return stored


def read_generation(directory: Path, config: ModelConfig) -> dict[str, Any]:
    """generation_config.json of a directory, {} when it has none. `UserError` for token ids beyond the vocabulary."""
    path = directory / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    check_token_ids(generation, config.vocab_size, f"{path}")
    return generation


def native_config(config: ModelConfig, raw: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """config.json in the native layout: the shape, the `CARRIED` keys of `raw`, the dtype of the tensors."""
    carried = {key: raw[key] for key in CARRIED if raw.get(key) is not None}
    return {**config.to_hf(), **carried, "torch_dtype": main_dtype(tensors)}


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).exists() for name in TOKENIZERS)


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer in a Hugging Face directory, None when there is none."""
    from puna.tokenizer import Tokenizer

    return Tokenizer.load(directory) if has_tokenizer(directory) else None


@dataclass(frozen=True)
class HFOptions:
    """Write options of a Hugging Face directory."""

    max_shard_gb: float = option(5.0, "size of the largest weight file, in GB, unless one tensor is larger")

    def __post_init__(self) -> None:
        if self.max_shard_gb <= 0:
            raise UserError("--max-shard-gb must be above 0.")


def check_hf(source: Checkpoint, dtype: torch.dtype | None, options: Any) -> None:
    """Raises `UserError` when the tokenizer, written to files and read again, would be another one."""
    from puna.weights.verification import tokenizer_difference

    if tokenizer := source.tokenizer():
        with tempfile.TemporaryDirectory() as folder:
            _write_texts(source, Path(folder), source.hf_config)
            if difference := tokenizer_difference(tokenizer, load_tokenizer(Path(folder)), source.config.vocab_size):
                raise UserError(f"Hugging Face files can't hold this checkpoint's tokenizer: {difference}.")


def write_hf(source: Checkpoint, dst: Path, dtype: torch.dtype | None = None, options: HFOptions | None = None) -> None:
    """Writes the directory `dst`, which must not exist yet: weights in `dtype` (None: each tensor's own), config,
    generation settings and tokenizer."""
    options = options or HFOptions()
    dst.mkdir()
    tensors = {name: TensorInfo(info.shape, dtype or info.dtype) for name, info in source.tensors.items()}
    write_weights(source.read, tensors, dst, int(options.max_shard_gb * 1e9))
    _write_texts(source, dst, {**source.hf_config, "torch_dtype": main_dtype(tensors)})


def _write_texts(source: Checkpoint, dst: Path, config: dict[str, Any]) -> None:
    write_json(dst / "config.json", config)
    if source.generation:
        write_json(dst / "generation_config.json", source.generation)
    if tokenizer := source.tokenizer():
        tokenizer.save(dst)


def write_weights(
    read: Callable[[str], torch.Tensor], tensors: Mapping[str, TensorInfo], dst: Path, max_shard: int | None = None
) -> None:
    """Writes `read(name)`, cast to its dtype in `tensors`, as model.safetensors, or as shards of at most `max_shard`
    bytes with an index."""
    from puna.weights.formats import safetensors_file

    shards: list[dict[str, TensorInfo]] = [{}]
    for name, info in tensors.items():
        if shards[-1] and sum(each.nbytes for each in shards[-1].values()) + info.nbytes > (max_shard or math.inf):
            shards.append({})
        shards[-1][name] = info
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE_FILES[0] if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        safetensors_file.write_file(dst / file, shard, lambda name: cast(name, read(name), tensors[name].dtype))
        index |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(info.nbytes for info in tensors.values())
        write_json(dst / f"{SINGLE_FILES[0]}.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _weight_files(directory: Path, *, quiet: bool = False) -> tuple[dict[str, str], list[Path]] | None:
    """(tensor -> file name, by the index, and the files), or None when there are none.

    As transformers: safetensors before .bin, and of each a single file before shards. An index without any of its
    shards is ignored when there is a single file of the other kind.
    """
    for single in SINGLE_FILES:
        index = directory / f"{single}.index.json"
        if (directory / single).exists():
            if not quiet and index.exists() and _indexed(directory, index, strict=False):
                note(
                    f"{directory} holds {single} and the shards of {index.name}; {single} is read, as by transformers."
                )
            return {}, [directory / single]
        if index.exists():
            others = [name for name in SINGLE_FILES if name != single and (directory / name).exists()]
            places = _indexed(directory, index, strict=not others)
            if places:
                return places, [directory / name for name in sorted(set(places.values()))]
            if not quiet:
                note(f"{index} is ignored: the files that it names are missing; {others[0]} is read.")
            continue
        stem, suffix = single.split(".")
        if shards := sorted(directory.glob(f"{stem}-*-of-*.{suffix}")):
            return {}, shards
    return None


def _indexed(directory: Path, index: Path, *, strict: bool) -> dict[str, str]:
    """The places that an index gives to tensors. Unless `strict`, {} for a damaged one and when files are missing."""
    try:
        places = read_json(index).get("weight_map")
    except UserError:
        if not strict:
            return {}
        raise
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index} is damaged: it has no weight_map; fetch it again.")
    for name in sorted(set(map(str, places.values()))):
        if Path(name).name != name or Path(name).suffix != Path(index.stem.removesuffix(".index")).suffix:
            raise UserError(f"{index} points to {name!r}, which is not a weight file of this directory.")
        if not (directory / name).exists():
            if not strict:
                return {}
            raise UserError(f"{directory} lacks {name}, which {index.name} names; fetch it again.")
    return places


def _check_quantization(
    path: Path, raw: Mapping[str, Any], config: ModelConfig, tensors: Mapping[str, TensorInfo]
) -> None:
    """Raises `UserError` for quantised weights; a setting left over beside full floats is noted."""
    settings = raw.get("quantization_config")
    if not settings:
        return
    expected = config.tensors()
    floats = all(info.dtype.is_floating_point and info.dtype.itemsize > 1 for info in tensors.values())
    if floats and {name: info.shape for name, info in tensors.items()} == expected:
        note(f"quantization_config of {path / 'config.json'} is ignored: all weights are plain floats.")
        return
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    raise UserError(
        f"{path} is quantised (quantization_config{f', {method}' if method else ''}), which puna does not read; get the"
        " checkpoint it was made from, or a GGUF."
    )


def _without_legacy(
    path: Path, config: ModelConfig, weights: Weights
) -> tuple[dict[str, TensorInfo], Reader, list[str]]:
    """The tensors and their reader less what old versions of transformers stored beside them, and the names of that.

    Rotary frequencies follow from the config. A tied output layer may be stored twice, or only as lm_head.
    """
    import torch

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


FORMAT = Format(
    name="hf",
    summary="a Hugging Face directory of config.json and safetensors or .bin weights",
    rope_order="rotate-half",
    detect=detect,
    open=open_hf,
    write=write_hf,
    check=check_hf,
    options=HFOptions,
    weight_files=(r"model.*\.safetensors", r"pytorch_model.*\.bin"),
)
