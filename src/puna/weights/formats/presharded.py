"""Checkpoints that are already split over tensor-parallel ranks: DIR/part_model/0, 1, ... and DIR/tokenizer.

Each rank's directory is of Hugging Face's kind; its config.json is the whole model's with `world_size`. Two cuts are
read: ours, by TP_PLAN with key/value heads repeated where there are fewer than ranks, and the older one, `torch.chunk`
of q, k, v, gate, up along the output and of o, down along the input, with all else on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from puna.errors import UserError
from puna.files import read_json, write_json
from puna.model.config import ModelConfig, check_token_ids
from puna.model.tp_plan import TP_PLAN, check_tp, tp_slice
from puna.options import option
from puna.weights.checkpoint import Checkpoint, Index, TensorInfo, in_model_order, main_dtype
from puna.weights.formats import hf
from puna.weights.formats.format import Format
from puna.weights.sharded import Shape, TensorShard, assemble, side_by_side

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PARTS, TOKENIZER = "part_model", "tokenizer"


def detect(path: Path) -> bool:
    """Whether `path` is a directory with part_model/0, or that part_model itself."""
    return path.is_dir() and (_parts_folder(path) / "0" / "config.json").exists()


def open_presharded(path: Path) -> Checkpoint:
    """Opens the ranks' directories as one checkpoint. Raises `UserError` for missing ranks and for differing copies."""
    folder = _parts_folder(path)
    raw = read_json(folder / "0" / "config.json")
    config = ModelConfig.from_hf(raw)
    check_token_ids(raw, config.vocab_size, f"{folder / '0' / 'config.json'}")
    directories = _rank_directories(folder, raw.get("world_size"))
    ranks = [hf.open_weights(directory) for directory in directories]
    for directory, rank in zip(directories, ranks, strict=True):
        if differing := sorted(rank.tensors.keys() ^ ranks[0].tensors.keys()):
            raise UserError(f"{directory} and rank 0 don't hold the same tensors: {differing[0]} is in one of them.")
    whole = config.tensors()
    tensors: dict[str, TensorInfo] = {}
    parts: dict[str, list[TensorShard]] = {}
    for name, info in ranks[0].tensors.items():
        if name.endswith(".rotary_emb.inv_freq") or (name == hf.OUTPUT and config.tie_word_embeddings):
            continue
        shapes = [rank.tensors[name].shape for rank in ranks]
        shape, places = _places(name, shapes, whole.get(name), config)
        tensors[name] = TensorInfo(shape, info.dtype)
        readers = [partial(rank.read, name, None) for rank in ranks]
        parts[name] = _distinct(path, name, [TensorShard(*each) for each in zip(places, readers, strict=True)])

    def read(name: str, index: Index | None) -> Tensor:
        return assemble(tensors[name].shape, tensors[name].dtype, parts[name], index)

    tensors = in_model_order(config, tensors)
    homes = (folder.parent / TOKENIZER, folder.parent, directories[0])
    tokenizer = next((home for home in homes if hf.has_tokenizer(home)), None)
    return Checkpoint(
        path=path,
        format="presharded",
        config=config,
        hf_config=hf.native_config(config, raw, tensors),
        generation=hf.read_generation(directories[0], config),
        tensors=tensors,
        files=[file for rank in ranks for file in rank.files]
        + [directory / "config.json" for directory in directories]
        + ([tokenizer / name for name in hf.TOKENIZER_FILES if (tokenizer / name).exists()] if tokenizer else []),
        details={"ranks": len(ranks)},
        reader=read,
        load_tokenizer=lambda: hf.load_tokenizer(tokenizer) if tokenizer else None,
    )


@dataclass(frozen=True)
class ShardOptions:
    """Write options of the formats that are split over ranks."""

    ranks: int = option(1, "number of ranks to split over")

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise UserError(f"--ranks must be at least 1, not {self.ranks}.")


def check_presharded(source: Checkpoint, dtype: torch.dtype | None, options: ShardOptions) -> None:
    """Raises `UserError` when the model can't be split over so many ranks."""
    check_tp(source.config, options.ranks)
    hf.check_hf(source, dtype, None)


def write_presharded(
    source: Checkpoint, dst: Path, dtype: torch.dtype | None = None, options: ShardOptions | None = None
) -> None:
    """Writes the directory `dst`, which must not exist yet, split by TP_PLAN."""
    ranks = (options or ShardOptions()).ranks
    check_tp(source.config, ranks)
    dst.mkdir()
    (dst / PARTS).mkdir()
    for rank in range(ranks):
        _write_rank(source, dst / PARTS / str(rank), dtype, rank, ranks)
    if tokenizer := source.tokenizer():
        (dst / TOKENIZER).mkdir()
        tokenizer.save(dst / TOKENIZER)
        write_json(dst / TOKENIZER / "generation_config.json", {"eos_token_id": list(tokenizer.stop_ids)})


def _write_rank(source: Checkpoint, dst: Path, dtype: torch.dtype | None, rank: int, ranks: int) -> None:
    dst.mkdir()
    places, tensors = {}, {}
    for name, info in source.tensors.items():
        places[name] = tp_slice(name, info.shape, source.config, rank, ranks)
        tensors[name] = TensorInfo(tuple(s.stop - s.start for s in places[name]), dtype or info.dtype)
    hf.write_weights(lambda name: source.read(name, places[name]), tensors, dst)
    write_json(dst / "config.json", {**source.hf_config, "torch_dtype": main_dtype(tensors), "world_size": ranks})
    if source.generation:
        write_json(dst / "generation_config.json", source.generation)


def _parts_folder(path: Path) -> Path:
    return path / PARTS if (path / PARTS).is_dir() else path


def _rank_directories(folder: Path, world_size: int | None) -> list[Path]:
    names = sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal())
    count = world_size if isinstance(world_size, int) else len(names)
    if names != list(range(count)):
        have = ", ".join(map(str, names))
        raise UserError(f"{folder} has the parts {have} of {count} ranks; every rank's is needed, and no other.")
    return [folder / str(name) for name in names]


def _places(name: str, shapes: list[Shape], whole: Shape | None, config: ModelConfig) -> tuple[Shape, list[Index]]:
    """The shape of the merged tensor and the position of each part in it, determined from the parts' shapes."""
    everywhere = [tuple(slice(0, n) for n in shape) for shape in shapes]
    if whole is None or "." not in name:
        return shapes[0], everywhere
    planned = [tp_slice(name, whole, config, rank, len(shapes)) for rank in range(len(shapes))]
    if all(shape == tuple(s.stop - s.start for s in place) for shape, place in zip(shapes, planned, strict=True)):
        return whole, planned
    how = TP_PLAN.get(name.split(".")[-2])
    if how is None or all(shape == whole for shape in shapes):
        return shapes[0], everywhere
    return side_by_side(name, shapes, 1 if how == "row" and len(shapes[0]) > 1 else 0)


def _distinct(path: Path, name: str, parts: list[TensorShard]) -> list[TensorShard]:
    """One part for each position, after checking that its copies are equal."""
    import torch

    first: dict[tuple, TensorShard] = {}
    for rank, part in enumerate(parts):
        key = tuple((s.start, s.stop) for s in part.place)
        if key in first and not torch.equal(first[key].read(), part.read()):
            raise UserError(f"{path}: the copies of {name} differ, rank {rank}'s isn't that of the ranks before it.")
        first.setdefault(key, part)
    return list(first.values())


FORMAT = Format(
    name="presharded",
    aliases=("ranks",),
    summary="a directory split for tensor-parallel ranks: part_model/0, part_model/1 ..., tokenizer",
    rope_order="rotate-half",
    detect=detect,
    open=open_presharded,
    write=write_presharded,
    check=check_presharded,
    options=ShardOptions,
)
