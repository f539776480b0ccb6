"""Megatron checkpoints: DIR/release/mp_rank_TT[_PPP]/model_optim_rng.pt, cut for tensor and pipeline parallelism.

Read in the names of AscendSpeed (ModelLink), of Megatron-LM's former GPT model and of Megatron-core, from releases and
from training runs in the `torch` format; written in any of the three. What the files can't express (end tokens, chat
template, in AscendSpeed's the architecture too) is written beside them as config.json and tokenizer files.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.errors import UserError, nearest
from puna.files import read_bytes, read_json, write_json
from puna.model.config import ModelConfig, check_token_ids
from puna.weights import sharded
from puna.weights.checkpoint import Checkpoint, Index, TensorInfo, cast, in_model_order, main_dtype
from puna.weights.formats import hf, torch_pickle
from puna.weights.formats.hf import EMBEDDING, OUTPUT
from puna.weights.formats.megatron.args import args_from, config_from
from puna.weights.formats.megatron.names import (
    NAMINGS,
    MegatronLayout,
    RankTensor,
    Slice,
    flattened,
    key_of,
    padded_vocab,
    role_of,
)
from puna.weights.formats.megatron.write_options import TRACKER, MegatronOptions

FILES = ("model_optim_rng.pt", "model_rng.pt")
MAX_PADDING = 1 << 16  # tokens by which any vocabulary may be padded; a larger one may double
# Modules whose classes Megatron's checkpoints hold beside tensors: enums, random states.
HARMLESS = re.compile(
    r"(megatron|ascendspeed|modellink|mindspeed\w*|numpy|signal|pathlib)\..+|_codecs\.encode|_io\.BytesIO"
)
RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
Roles = dict[tuple[int | None, str], Tensor]  # (layer of the stage, role) -> tensor


def open_megatron(path: Path) -> Checkpoint:
    """Opens all ranks' files as one checkpoint.

    The architecture is read from config.json beside them, or else from the arguments in them; the number of rows
    without padding from the same, or else from the tokenizer beside them. Raises `UserError` for missing or misfitting
    ranks, by name.
    """
    files = _rank_files(path)
    tp, pp = len(files), len(files[0])
    states = [[_load(file) for file in stages] for stages in files]
    arguments = _arguments(states[0][0])
    _check_sizes(path, arguments, tp, pp)
    # A stage with virtual ones holds model0, model1 ...; the model goes through all stages' first ones, then the second
    virtual = [name for name in ("model", *(f"model{n}" for n in range(64))) if name in states[0][0]]
    stages = [[_roles(files[rank][stage], states[rank][stage], name) for rank in range(tp)]
              for name in virtual for stage in range(pp)]  # fmt: skip
    homes = [path] if (path / TRACKER).exists() else [path, path.parent]
    home = next((folder for folder in homes if (folder / "config.json").exists()), None)
    tokens = next((folder for folder in homes if hf.has_tokenizer(folder)), None)
    tokenizer = functools.cache(lambda: hf.load_tokenizer(tokens) if tokens else None)
    vocab = sum(rank[None, "embedding.weight"].shape[0] for rank in stages[0] if (None, "embedding.weight") in rank)
    if home is not None:
        hf_config = read_json(home / "config.json")
    else:
        own = tokenizer()
        hf_config = config_from(path, arguments, rows=vocab, tokens=own.vocab_size if own else None)
        if pp == 1 and (None, "output.weight") in stages[-1][0]:
            hf_config["tie_word_embeddings"] = False
    config = ModelConfig.from_hf(hf_config)
    check_token_ids(hf_config, config.vocab_size, f"{(home or path) / 'config.json'}")
    fused = (0, "gate_up.weight") in stages[0][0]
    cut = MegatronLayout(config, tp, max(vocab, config.vocab_size), fused)
    tensors, pieces = _assembled(path, cut, stages)

    def read(name: str, index: Index | None) -> Tensor:
        return sharded.assemble(tensors[name].shape, tensors[name].dtype, pieces[name], index)

    tensors = in_model_order(config, tensors)
    others = [home / name for name in ("config.json", "generation_config.json")] if home else []
    others += [tokens / name for name in hf.TOKENIZER_FILES] if tokens else []
    return Checkpoint(
        path=path,
        format="megatron",
        config=config,
        hf_config=hf.native_config(config, hf_config, tensors),
        generation=hf.read_generation(home, config) if home else {},
        tensors=tensors,
        files=[file for rank in files for file in rank] + [file for file in others if file.exists()],
        details={"tp": tp, "pp": pp, "padded_vocab_size": vocab, "mlp": "one matrix" if fused else "gate and up"},
        reader=read,
        load_tokenizer=tokenizer,
    )


def check_megatron(source: Checkpoint, dtype: torch.dtype | None, options: MegatronOptions) -> None:
    """Raises `UserError` for sizes that don't divide, and for what the arguments in the files can't express."""
    _plan(source, dtype, options)
    hf.check_hf(source, dtype, None)


def _plan(
    source: Checkpoint, dtype: torch.dtype | None, options: MegatronOptions
) -> tuple[MegatronLayout, dict[str, TensorInfo], dict[str, Any]]:
    """The layout, the tensors as they are written, and what every file holds beside the model."""
    config, names = source.config, options.names
    if names not in NAMINGS:
        raise UserError(f"Megatron has no names {names!r}, only {', '.join(NAMINGS)}{nearest(names, NAMINGS)}.")
    if config.num_hidden_layers % options.pp:
        works = [n for n in range(1, config.num_hidden_layers + 1) if config.num_hidden_layers % n == 0]
        raise UserError(
            f"{config.num_hidden_layers} layers can't be split into {options.pp} pipeline stages: choose one of"
            f" {', '.join(map(str, works))}."
        )
    multiple = options.make_vocab_size_divisible_by
    vocab = padded_vocab(config.vocab_size, multiple, options.tp)
    if vocab - config.vocab_size > max(config.vocab_size, MAX_PADDING):
        raise UserError(
            f"--make-vocab-size-divisible-by {multiple} and --tp {options.tp} pad the vocabulary of"
            f" {config.vocab_size} tokens to {vocab}; choose smaller ones, such as 128 and 1."
        )
    layout = MegatronLayout(config, options.tp, vocab, options.merge_mlp or names != "ascendspeed")
    tensors = {name: TensorInfo(info.shape, dtype or info.dtype) for name, info in source.tensors.items()}
    top: dict[str, Any] = {"checkpoint_version": 3.0}
    if names != "ascendspeed":
        main = getattr(torch, main_dtype(tensors))
        args = args_from(config, tp=options.tp, pp=options.pp, multiple=multiple, vocab=vocab, dtype=main)
        top |= {"iteration": 0, "args": args}
    return layout, tensors, top


def write_megatron(
    source: Checkpoint, dst: Path, dtype: torch.dtype | None = None, options: MegatronOptions | None = None
) -> None:
    """Writes the directory `dst`, which must not exist yet; one rank's file is in memory at a time.

    The vocabulary is padded by copies of its last rows.
    """
    config, options = source.config, options or MegatronOptions()
    layout, tensors, top = _plan(source, dtype, options)
    tp, pp = options.tp, options.pp
    dst.mkdir()
    (dst / "release").mkdir()
    for rank in range(tp):
        for stage in range(pp):
            folder = dst / "release" / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else ""))
            folder.mkdir()
            model: dict[str, Any] = {}
            for (layer, role), part in _stage(layout, rank, stage, pp).items():
                *outer, last = key_of(options.names, layer, role, tied=config.tie_word_embeddings)
                place = model
                for key in outer:
                    place = place.setdefault(key, {})
                place[last] = _filled(source, part, dtype)
            torch_pickle.save_file({**top, "model": model}, folder / FILES[0])
    (dst / TRACKER).write_text("release\n", encoding="ascii")
    write_json(dst / "config.json", {**source.hf_config, "torch_dtype": main_dtype(tensors)})
    if source.generation:
        write_json(dst / "generation_config.json", source.generation)
    if tokenizer := source.tokenizer():
        tokenizer.save(dst)


def _stage(cut: MegatronLayout, rank: int, stage: int, pp: int) -> dict[tuple[int | None, str], RankTensor]:
    """The tensors of a rank in an evenly split stage."""
    here = cut.config.num_hidden_layers // pp
    found: dict[tuple[int | None, str], RankTensor] = {}
    for layer in range(here):
        found |= {(layer, role): part for role, part in cut.layer(stage * here + layer, rank).items()}
    ends = cut.ends(rank, first=stage == 0, last=stage == pp - 1)
    return found | {(None, role): part for role, part in ends.items()}


def _filled(source: Checkpoint, part: RankTensor, dtype: torch.dtype | None) -> Tensor:
    pieces = [(piece, source.read(piece.name, piece.there)) for piece in part.pieces]
    tensor = torch.empty(part.shape, dtype=dtype or pieces[0][1].dtype)
    for piece, content in pieces:
        tensor[piece.here] = cast(piece.name, content, tensor.dtype)
    return tensor


def _rank_files(path: Path) -> list[list[Path]]:
    """Files by tensor-parallel rank and stage. Raises `UserError`, naming it, for a rank that isn't there."""
    folder = path
    if (path / TRACKER).exists():
        word = read_bytes(path / TRACKER).decode(errors="replace").strip()[:20]
        if word != "release" and not word.isdecimal():
            raise UserError(f"{path / TRACKER} says {word!r}, neither 'release' nor the number of an iteration")
        folder = path / (word if word == "release" else f"iter_{int(word):07d}")
        if not folder.is_dir():
            raise UserError(f"{path} lacks {folder.name}, which {TRACKER} names; fetch it again")
    found: dict[tuple[int, int], Path] = {}
    for entry in folder.iterdir():
        if match := RANK.fullmatch(entry.name):
            found[int(match[1]), int(match[2] or 0)] = entry
        elif entry.name.startswith("mp_rank_"):
            raise UserError(f"{entry} is of a model of experts, or none of Megatron's ranks; puna reads neither")
    if not found:
        distributed = [*folder.glob("*.distcp"), *folder.glob("metadata.json")]
        if distributed:
            metadata = folder / "metadata.json"
            name = (read_json(metadata) if metadata.exists() else {}).get("sharded_backend", "torch_dist")
            raise UserError(
                f"{folder} is a Megatron checkpoint in the {name} format, which puna does not read: save it with"
                " --ckpt-format torch, or convert it with Megatron-LM's tools/checkpoint/convert.py."
            )
        raise UserError(f"{folder} has no mp_rank_00: it is not a Megatron checkpoint in the torch format.")
    tp, pp = (max(place[axis] for place in found) + 1 for axis in (0, 1))
    if lost := sorted({(rank, stage) for rank in range(tp) for stage in range(pp)} - found.keys()):
        names = [f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "") for rank, stage in lost]
        raise UserError(f"{folder} has ranks for {tp} x {pp} (tensor x pipeline) and lacks {', '.join(names[:5])}")
    return [[_file(found[rank, stage]) for stage in range(pp)] for rank in range(tp)]


def _load(file: Path) -> dict[str, Any]:
    """The content of a rank's file, with placeholders for Megatron's own enums and random states."""
    state = torch_pickle.load_objects(
        file,
        classes=(argparse.Namespace,),
        placeholders=HARMLESS,
        instead="puna reads tensors, the run's arguments and Megatron's own classes alone",
    )
    if not any(name in state for name in ("model", "model0")):
        raise UserError(f"{file} is not a Megatron checkpoint: it holds no 'model'.")
    return state


def _arguments(state: dict[str, Any]) -> dict[str, Any]:
    """The run's arguments that the file carries, {} when it carries none."""
    args = state.get("args")
    return vars(args) if isinstance(args, argparse.Namespace) else {}


def _file(folder: Path) -> Path:
    for name in FILES:
        if (folder / name).exists():
            return folder / name
    raise UserError(f"{folder} lacks {FILES[0]}; fetch it again")


def _check_sizes(path: Path, arguments: dict[str, Any], tp: int, pp: int) -> None:
    for what, name, there in (
        ("tensor", "tensor_model_parallel_size", tp),
        ("pipeline", "pipeline_model_parallel_size", pp),
    ):
        if arguments.get(name) not in (None, there):
            raise UserError(
                f"{path} was saved by {arguments[name]} {what}-parallel ranks, as its files say, and has {there}:"
                " it isn't whole, or ranks of several checkpoints lie in it"
            )


def _roles(file: Path, state: dict[str, Any], name: str) -> Roles:
    """The tensors of a file's model by role. Raises `UserError` for one that no LLaMA has."""
    found: Roles = {}
    for key, tensor in flattened(state.get(name, {})):
        try:
            place = role_of(key)
        except KeyError:
            raise UserError(f"{file} holds {key}, which a LLaMA doesn't have") from None
        if place is None or tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise UserError(f"{file} holds {key}, which is not a tensor")
        found[place] = tensor
    if (0, "up.weight") in found and (0, "gate.weight") not in found:  # Megatron-LM's name for gate and up in one
        found = {(layer, role.replace("up.", "gate_up.") if role.startswith("up.") else role): tensor
                 for (layer, role), tensor in found.items()}  # fmt: skip
    return found


def _assembled(
    path: Path, cut: MegatronLayout, stages: Sequence[Sequence[Roles]]
) -> tuple[dict[str, TensorInfo], dict[str, list[sharded.TensorShard]]]:
    """Every tensor in Hugging Face's names, and the parts of it in the ranks' files."""
    shapes = cut.config.tensors()
    tensors: dict[str, TensorInfo] = {}
    pieces: dict[str, list[sharded.TensorShard]] = {}
    start = 0
    for number, ranks in enumerate(stages):
        count = 1 + max((layer for layer, _ in ranks[0] if layer is not None), default=-1)
        if start + count > cut.config.num_hidden_layers:
            raise UserError(f"{path} has more layers than the {cut.config.num_hidden_layers} that its config says")
        for rank, found in enumerate(ranks):
            ends = cut.ends(rank, first=number == 0, last=number == len(stages) - 1)
            wanted: dict[tuple[int | None, str], RankTensor] = {(None, role): part for role, part in ends.items()}
            if cut.config.tie_word_embeddings and (None, "output.weight") in found:
                wanted[None, "output.weight"] = cut.vocabulary(EMBEDDING, rank)
            for layer in range(count):
                wanted |= {(layer, role): part for role, part in cut.layer(start + layer, rank).items()}
            _check_stage(path, rank, number, found, wanted, cut)
            for place, part in wanted.items():
                for piece in part.pieces:
                    if not piece.padding:
                        info = TensorInfo(shapes[piece.name], found[place].dtype)
                        if tensors.setdefault(piece.name, info) != info:
                            raise UserError(f"{path}: the ranks hold {piece.name} in different types")
                        _add(path, pieces.setdefault(piece.name, []), piece, found[place], place[1])
        start += count
    return tensors, pieces


def _add(path: Path, known: list[sharded.TensorShard], piece: Slice, tensor: Tensor, role: str) -> None:
    """Records the position of a slice of a tensor; of copies, which must be equal, the first."""
    same = next((part for part in known if part.place == piece.there), None)
    if same is None:
        known.append(sharded.TensorShard(piece.there, partial(tensor.__getitem__, piece.here)))
    elif not torch.equal(same.read(), tensor[piece.here]):
        raise UserError(f"{path}: the copies of {piece.name} differ, its {role} is another; is it of one checkpoint?")


def _check_stage(
    path: Path,
    rank: int,
    stage: int,
    found: Roles,
    wanted: dict[tuple[int | None, str], RankTensor],
    cut: MegatronLayout,
) -> None:
    where = f"{path}: tensor-parallel rank {rank} of stage {stage}"
    for place in found.keys() - wanted.keys():
        raise UserError(f"{where} holds {_called(place)}, which the config doesn't have")
    for place, part in wanted.items():
        if place not in found:
            raise UserError(f"{where} lacks {_called(place)}")
        if tuple(found[place].shape) != part.shape:
            raise UserError(
                f"{where}: {_called(place)} has shape {list(found[place].shape)}, which for {cut.tp} tensor-parallel"
                f" ranks of this model must be {list(part.shape)}: ranks are missing, or it is another model"
            )


def _called(place: tuple[int | None, str]) -> str:
    layer, role = place
    return role if layer is None else f"layer {layer}'s {role}"


def without_padding(source: Checkpoint, size: int) -> Checkpoint:
    """`source` with the first `size` rows of its vocabulary alone."""
    full = source.config.vocab_size
    if not 0 < size <= full:
        raise UserError(f"{source.path} has {full} rows in its vocabulary, of which {size} can't be taken")
    config = dataclasses.replace(source.config, vocab_size=size)
    ends = (EMBEDDING, OUTPUT)

    def read(name: str, index: Index | None) -> Tensor:
        return source.read(name)[:size][index or ()] if name in ends else source.read(name, index)

    tensors = {name: TensorInfo((size, *info.shape[1:]), info.dtype) if name in ends else info
               for name, info in source.tensors.items()}  # fmt: skip
    return dataclasses.replace(
        source, config=config, hf_config={**source.hf_config, "vocab_size": size}, tensors=tensors, reader=read
    )
