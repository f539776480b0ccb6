"""A checkpoint of any format into another, tensor by tensor, proven against its source.

The result is written beside its destination and moved there when it is whole, on disk and proven: what is stopped, by
Ctrl-C, a full disk or a power cut, leaves nothing that looks like a checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.errors import UserError, nearest
from puna.files import manifest_path, staged, write_json
from puna.progress import meter, track
from puna.weights import verification
from puna.weights.checkpoint import Checkpoint, Index, open_checkpoint
from puna.weights.formats.gguf.writer import write_gguf
from puna.weights.formats.hf import MAX_SHARD, write_hf
from puna.weights.formats.megatron.checkpoint import without_padding, write_megatron
from puna.weights.formats.meta import write_meta
from puna.weights.formats.presharded import write_ranks

FORMATS = ("hf", "gguf", "meta", "ranks", "megatron")
DTYPES: dict[str, Any] = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "q8_0": "q8_0",
}
PARTS = ("shards", "ranks", "types", "tp", "pp", "padded_vocab_size")  # details that the manifest tells
Q8_0_BLOCK = 32  # numbers of a row that share a scale


@dataclass(frozen=True)
class Conversion:
    """What `convert` has done. `bytes` are those of the files written, `manifest` is what stands in puna.json."""

    path: Path
    bytes: int
    seconds: float
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Target:
    """What is to be written. Raises `UserError` for what doesn't go together.

    `to`: hf, gguf, meta, ranks or megatron. `dtype`: auto (each tensor's own), float32, bfloat16, float16, or for gguf
    q8_0. `ranks`: parts of a meta or ranks result. `max_shard`: bytes of an hf weight file. Of a megatron result: `tp`
    tensor-parallel ranks, `pp` stages, `names` (ascendspeed, legacy or core), `merge_mlp` (gate and up in one matrix),
    `vocab_multiple` x tp that the vocabulary is padded to a multiple of.
    """

    to: str = "hf"
    dtype: str = "auto"
    ranks: int = 1
    max_shard: int = MAX_SHARD
    tp: int = 1
    pp: int = 1
    names: str = "ascendspeed"
    merge_mlp: bool = False
    vocab_multiple: int = 128

    def __post_init__(self) -> None:
        if self.to not in FORMATS:
            raise UserError(f"puna doesn't write {self.to!r}, only {', '.join(FORMATS)}{nearest(self.to, FORMATS)}")
        if self.dtype not in DTYPES:
            raise UserError(f"there is no dtype {self.dtype!r}, only {', '.join(DTYPES)}{nearest(self.dtype, DTYPES)}")
        if self.dtype == "q8_0" and self.to != "gguf":
            raise UserError(f"q8_0 is a type of GGUF, {self.to} can't hold it: choose --to gguf or another --dtype")
        if self.ranks != 1 and self.to not in ("meta", "ranks"):
            raise UserError(f"{self.to} isn't split over ranks: choose --to meta or --to ranks, or leave --ranks out")
        if (self.tp, self.pp, self.merge_mlp) != (1, 1, False) and self.to != "megatron":
            raise UserError(f"--tp, --pp and --merge-mlp cut a megatron result, not {self.to}: choose --to megatron")
        if self.max_shard < 1:
            raise UserError("the largest weight file must have room for something: choose --max-shard-gb above 0")

    def write(self, source: Checkpoint, path: Path) -> None:
        dtype = DTYPES[self.dtype]
        if self.to == "hf":
            write_hf(source, path, dtype, max_shard=self.max_shard)
        elif self.to == "gguf":
            write_gguf(source, path, dtype)
        elif self.to == "meta":
            write_meta(source, path, dtype, shards=self.ranks)
        elif self.to == "megatron":
            write_megatron(
                source,
                path,
                dtype,
                tp=self.tp,
                pp=self.pp,
                naming=self.names,
                merge_mlp=self.merge_mlp,
                multiple=self.vocab_multiple,
            )
        else:
            write_ranks(source, path, dtype, ranks=self.ranks)


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = "hf",
    dtype: str = "auto",
    *,
    revision: str | None = None,
    overwrite: bool = False,
    prove: bool = True,
    vocab_size: int | None = None,
    **layout: Any,
) -> Conversion:
    """Writes the checkpoint `src` (path, Hub id or alias) to `dst`; `to`, `dtype` and `layout` are those of `Target`.

    `vocab_size`: tokens of the source's vocabulary; rows beyond, a Megatron checkpoint's padding, are left out.
    An existing `dst` is replaced only under `overwrite`, and only if an earlier conversion wrote it. Raises `UserError`
    for what can't be converted, `VerificationError` when the result, read back, isn't its source.
    """
    target = Target(to, dtype, **layout)
    with open_checkpoint(src, revision=revision) as source:
        # Where it was on this machine is no one else's business; a Hub id or an alias is.
        name = source.path.resolve().name if Path(src).expanduser().exists() else str(src)
        if vocab_size is not None:
            source = without_padding(source, vocab_size)
        return write(source, dst, target, name, overwrite=overwrite, prove=prove)


def write(
    source: Checkpoint,
    dst: str | Path,
    target: Target,
    name: str,
    *,
    overwrite: bool = False,
    prove: bool = True,
    said: Mapping[str, Any] | None = None,
) -> Conversion:
    """The same from an open source; the manifest calls it `name`, and holds what else is to be `said` of it."""
    start = time.perf_counter()
    dst, dtype = Path(dst), DTYPES[target.dtype]
    _check(source, dtype, dst)
    with staged(dst, overwrite) as path:
        total = sum(info.nbytes for info in source.tensors.values())
        with meter(f"Converting to {target.to}", total, "B") as advance:
            target.write(_metered(source, advance), path)
        with open_checkpoint(path) as result:
            proven = _prove(source, result, target.to, dtype) if prove else "not asked for"
            manifest = {**_manifest(name, source, result, target.dtype, proven), **(said or {})}
            size = sum(file.stat().st_size for file in result.files)
        write_json(manifest_path(path), manifest)
    return Conversion(dst, size, time.perf_counter() - start, manifest)


def summary(done: Conversion) -> str:
    """What was done and proven, in two lines."""
    result, proven = done.manifest["result"], done.manifest["proof"]
    written = f"{result['format']}, {result['dtype']}, {result['tensors']} tensors, {done.bytes / 1e6:,.1f} MB"
    if not isinstance(proven, dict):
        return f"{done.path}: {written} in {done.seconds:.1f} s, not proven"
    logits = proven["logits"]
    drift = f"differ by at most {logits['max_difference']:.2g} (mean KL {logits['mean_kl']:.1g})"
    what = "config, tokenizer and every tensor" if "tokenizer_probes" in proven else "config and every tensor"
    rounded = f", rounded to {result['dtype']}," if logits["max_difference"] else ""
    return (
        f"{done.path}: {written} in {done.seconds:.1f} s\n"
        f"proof: {what}{rounded} equal the source's bit for bit; logits of {logits['tokens']} tokens"
        f" {drift if logits['max_difference'] else 'are equal'}"
    )


def _check(source: Checkpoint, dtype: torch.dtype | str | None, dst: Path) -> None:
    """What can be known before hours of writing: a misfit tokenizer, a destination over the source, a full disk."""
    if (tokenizer := source.tokenizer()) is not None:
        tokenizer.check_fits(source.config.vocab_size)
    final = dst.resolve()
    for file in (path.resolve() for path in [source.path, *source.files]):
        if final == file or final in file.parents:
            raise UserError(f"{dst} holds the checkpoint that is to be converted: choose another destination")
    need = 0.0
    for info in source.tensors.values():
        size = dtype.itemsize if isinstance(dtype, torch.dtype) else 34 / 32 if dtype else info.dtype.itemsize
        need += torch.Size(info.shape).numel() * size
    disk = next(parent for parent in final.parents if parent.exists())
    free = shutil.disk_usage(disk).free
    if need > free:
        raise UserError(
            f"the result takes {need / 1e9:,.1f} GB and {disk} has {free / 1e9:,.1f} GB free: make room first"
        )


def _metered(source: Checkpoint, advance: Callable[[int], None]) -> Checkpoint:
    def read(name: str, index: Index | None) -> Tensor:
        tensor = source.read(name, index)
        advance(tensor.nbytes)
        return tensor

    return dataclasses.replace(source, reader=read)


def _prove(source: Checkpoint, result: Checkpoint, to: str, dtype: torch.dtype | str | None) -> dict[str, Any]:
    """The proof that `result` is `source` in the numbers that its format stores."""

    def store(name: str, rows: Tensor) -> Tensor:
        if to == "gguf" and rows.dim() == 1:
            return rows.float()  # llama.cpp wants vectors so, whatever the matrices are
        if dtype == "q8_0":
            return _q8_0(rows)
        return rows if dtype is None else rows.to(dtype)

    unchanged = all(dtype in (None, info.dtype) for info in source.tensors.values())
    expected = source if unchanged else verification.as_stored(source, store)
    return verification.prove(source, expected, result)


def _q8_0(rows: Tensor) -> Tensor:
    """What is left of a matrix after GGUF's 8-bit quantisation; its rows keep float16 where blocks don't fit them."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    if rows.shape[-1] % Q8_0_BLOCK:
        return rows.to(torch.float16)
    kind = GGMLQuantizationType.Q8_0
    return torch.from_numpy(dequantize(quantize(rows.float().contiguous().numpy(), kind), kind))


def _manifest(
    name: str, source: Checkpoint, result: Checkpoint, dtype: str, proven: dict[str, Any] | str
) -> dict[str, Any]:
    """What puna.json says of a conversion."""
    total = sum(file.stat().st_size for file in source.files)
    files = track(source.files, "Hashing the source", total=total, unit="B", size=lambda file: file.stat().st_size)
    base = source.path if source.path.is_dir() else source.path.parent
    tokenizer = result.tokenizer()
    vocabulary: dict[str, Any] = {"size": source.config.vocab_size}
    said: dict[str, Any] = {}
    if tokenizer is not None:
        vocabulary |= {"tokens": tokenizer.vocab_size, "padding": source.config.vocab_size - tokenizer.vocab_size}
        template = tokenizer.chat_template
        said = {
            "fingerprint": tokenizer.fingerprint(),
            "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest() if template is not None else None,
        }
    return {
        "puna": _version(),
        "source": {
            "name": name,
            "format": source.format,
            "dtype": source.hf_config["torch_dtype"],
            "rope_order": _rope_order(source.format),
            "files": {_place(file, base): _sha256(file) for file in files},
        },
        "result": {
            "format": result.format,
            "dtype": dtype if dtype == "q8_0" else result.hf_config["torch_dtype"],
            "rope_order": _rope_order(result.format),
            "tensors": len(result.tensors),
            "details": {key: result.details[key] for key in PARTS if key in result.details},
        },
        "vocabulary": vocabulary,
        "tokenizer": said or None,
        "proof": proven,
    }


def _rope_order(name: str) -> str:
    return "halves" if name in ("hf", "ranks", "megatron") else "neighbours"


def _place(file: Path, base: Path) -> str:
    """The name of a source's file in the manifest: from its directory on, or, of a file far from it, its own."""
    place = Path(os.path.relpath(file, base))
    return str(Path(file.parent.name, file.name) if place.parts[:2] == ("..", "..") else place)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _version() -> str:
    try:
        return metadata.version("puna")
    except metadata.PackageNotFoundError:  # run from its source
        return "unknown"
