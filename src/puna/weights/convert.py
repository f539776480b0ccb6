"""Converting a checkpoint of any format into another, tensor by tensor, verified against its source.

The result is written beside its destination and moved there when it is complete, on disk and verified: an
interruption by Ctrl-C, a full disk or a power cut leaves nothing that looks like a checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
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
from puna.files import manifest_path, sha256, staged, write_json
from puna.progress import meter, track
from puna.weights import verification
from puna.weights.checkpoint import Checkpoint, Index
from puna.weights.formats import registry
from puna.weights.formats.format import Format
from puna.weights.formats.megatron.checkpoint import without_padding
from puna.weights.open import open_checkpoint

DETAILS = ("shards", "ranks", "types", "tp", "pp", "padded_vocab_size")  # those that the manifest holds


@dataclass(frozen=True)
class Conversion:
    """A finished conversion. `bytes` are those of the files written, `manifest` is the content of puna.json."""

    path: Path
    bytes: int
    seconds: float
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Target:
    """What to write: a format, the name of a data type that it holds, its write options."""

    format: Format
    dtype: str
    options: Any

    @classmethod
    def of(cls, to: str = "hf", dtype: str = "auto", **options: Any) -> Target:
        """`to`: name of a format; `dtype`: one of its `dtypes`; `options`: of any formats' write options those that
        differ from their defaults must be this format's. Raises `UserError` for what doesn't fit together."""
        fmt, writable = registry.find(to), registry.writable()
        if fmt.write is None:
            raise UserError(f"puna reads {fmt.name} and doesn't write it; it writes {registry.names(writable)}.")
        dtypes = registry.dtypes()
        if dtype not in dtypes:
            raise UserError(f"There is no data type {dtype!r}, only {', '.join(dtypes)}{nearest(dtype, dtypes)}.")
        if dtype not in fmt.dtypes:
            holders = registry.names(dtypes[dtype])
            raise UserError(f"{dtype} is a data type of {holders}, not of {fmt.name}: choose another --to or --dtype.")
        known = {field.name: (field, formats) for field, formats in registry.write_options()}
        for name, value in options.items():
            if name not in known:
                raise TypeError(f"there is no write option {name}{nearest(name, known)}")
            field, formats = known[name]
            if fmt not in formats and value != field.default:
                flag, holders = f"--{name.replace('_', '-')}", registry.names(formats)
                raise UserError(
                    f"{flag} is an option of {holders}, not of {fmt.name}: leave it out or choose another --to."
                )
        own = {field.name for field in dataclasses.fields(fmt.options)}
        return cls(fmt, dtype, fmt.options(**{name: value for name, value in options.items() if name in own}))

    @property
    def type(self) -> torch.dtype | str | None:
        """The dtype for the writer: None for each tensor's own, a torch dtype, or the name of a type of the format."""
        return None if self.dtype == "auto" else getattr(torch, self.dtype, self.dtype)


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = "hf",
    dtype: str = "auto",
    *,
    revision: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    vocab_size: int | None = None,
    **options: Any,
) -> Conversion:
    """Writes the checkpoint `src` (path, Hub id or alias) to `dst`; `to`, `dtype` and `options` as for `Target.of`.

    `vocab_size`: tokens of the source's vocabulary; rows beyond, a Megatron checkpoint's padding, are left out.
    An existing `dst` is replaced only under `overwrite`, and only if an earlier conversion wrote it. Raises `UserError`
    for what can't be converted, `VerificationError` when the result, read back, isn't its source.
    """
    target = Target.of(to, dtype, **options)
    with open_checkpoint(src, revision=revision) as source:
        name = source_name(source, src)
        if vocab_size is not None:
            source = without_padding(source, vocab_size)
        return write(source, dst, target, name, overwrite=overwrite, verify=verify)


def source_name(source: Checkpoint, ref: str | Path) -> str:
    """A checkpoint's name in a manifest: its Hub id or alias, or the last part of its path (the rest is private)."""
    return source.path.resolve().name if Path(ref).expanduser().exists() else str(ref)


def write(
    source: Checkpoint,
    dst: str | Path,
    target: Target,
    name: str,
    *,
    overwrite: bool = False,
    verify: bool = True,
    facts: Mapping[str, Any] | None = None,
) -> Conversion:
    """Converts an open checkpoint. The manifest calls it `name`, and holds `facts` beside its own."""
    start = time.perf_counter()
    dst, fmt = Path(dst), target.format
    assert fmt.write is not None
    _check(source, target, dst)
    with staged(dst, overwrite) as path:
        total = sum(info.nbytes for info in source.tensors.values())
        with meter(f"Converting to {fmt.name}", total, "B") as advance:
            fmt.write(_metered(source, advance), path, target.type, target.options)
        with open_checkpoint(path) as result:
            verified = _verify(source, result, target) if verify else "not asked for"
            manifest = {**_manifest(name, source, result, target.dtype, verified), **(facts or {})}
            size = sum(file.stat().st_size for file in result.files)
        write_json(manifest_path(path), manifest)
    return Conversion(dst, size, time.perf_counter() - start, manifest)


def summary(done: Conversion) -> str:
    """A summary of the result and its verification, in two lines."""
    result, verified = done.manifest["result"], done.manifest["verification"]
    written = f"{result['format']}, {result['dtype']}, {result['tensors']} tensors, {done.bytes / 1e6:,.1f} MB"
    if not isinstance(verified, dict):
        return f"{done.path}: {written} in {done.seconds:.1f} s, not verified"
    logits = verified["logits"]
    drift = f"differ by at most {logits['max_difference']:.2g} (mean KL {logits['mean_kl']:.1g})"
    compared = "config, tokenizer and every tensor" if "tokenizer_probes" in verified else "config and every tensor"
    rounded = f", rounded to {result['dtype']}," if logits["max_difference"] else ""
    return (
        f"{done.path}: {written} in {done.seconds:.1f} s\n"
        f"verified: {compared}{rounded} equal the source's bit for bit; logits of {logits['tokens']} tokens"
        f" {drift if logits['max_difference'] else 'are equal'}"
    )


def _check(source: Checkpoint, target: Target, dst: Path) -> None:
    """Raises `UserError`, before hours of writing, for a model that the format can't hold, a destination over the
    source, and a full disk."""
    final = dst.resolve()
    for file in (path.resolve() for path in [source.path, *source.files]):
        if final == file or final in file.parents:
            raise UserError(f"{dst} holds the checkpoint that is to be converted: choose another destination.")
    if (tokenizer := source.tokenizer()) is not None:
        tokenizer.check_fits(source.config.vocab_size)
    target.format.check(source, target.type, target.options)
    need = 0.0
    width = target.format.dtypes[target.dtype]
    for info in source.tensors.values():
        need += math.prod(info.shape) * (width or info.dtype.itemsize)
    disk = next(parent for parent in final.parents if parent.exists())
    free = shutil.disk_usage(disk).free
    if need > free:
        raise UserError(
            f"The result takes {need / 1e9:,.1f} GB and {disk} has {free / 1e9:,.1f} GB free: free space first."
        )


def _metered(source: Checkpoint, advance: Callable[[int], None]) -> Checkpoint:
    def read(name: str, index: Index | None) -> Tensor:
        tensor = source.read(name, index)
        advance(tensor.nbytes)
        return tensor

    return dataclasses.replace(source, reader=read)


def _verify(source: Checkpoint, result: Checkpoint, target: Target) -> dict[str, Any]:
    """Verifies that `result` is `source` in the numbers that its format stores."""
    fmt, dtype = target.format, target.type
    unchanged = all(dtype in (None, info.dtype) for info in source.tensors.values())
    expected = source if unchanged else verification.as_stored(source, lambda name, rows: fmt.stored(rows, dtype))
    return verification.verify(source, expected, result)


def _manifest(
    name: str, source: Checkpoint, result: Checkpoint, dtype: str, verified: dict[str, Any] | str
) -> dict[str, Any]:
    """The content of puna.json."""
    total = sum(file.stat().st_size for file in source.files)
    files = track(source.files, "Hashing the source", total=total, unit="B", size=lambda file: file.stat().st_size)
    base = source.path if source.path.is_dir() else source.path.parent
    tokenizer = result.tokenizer()
    vocabulary: dict[str, Any] = {"size": source.config.vocab_size}
    facts: dict[str, Any] = {}
    if tokenizer is not None:
        vocabulary |= {"tokens": tokenizer.vocab_size, "padding": source.config.vocab_size - tokenizer.vocab_size}
        template = tokenizer.chat_template
        facts = {
            "fingerprint": tokenizer.fingerprint(),
            "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest() if template is not None else None,
        }
    return {
        "puna": _version(),
        "source": {
            "name": name,
            "format": source.format,
            "dtype": source.hf_config["torch_dtype"],
            "rope_order": registry.find(source.format).rope_order,
            "files": {_place(file, base): sha256(file) for file in files},
        },
        "result": {
            "format": result.format,
            "dtype": result.hf_config["torch_dtype"] if hasattr(torch, dtype) or dtype == "auto" else dtype,
            "rope_order": registry.find(result.format).rope_order,
            "tensors": len(result.tensors),
            "details": {key: result.details[key] for key in DETAILS if key in result.details},
        },
        "vocabulary": vocabulary,
        "tokenizer": facts or None,
        "verification": verified,
    }


def _place(file: Path, base: Path) -> str:
    """The name of a source's file in the manifest: from its directory on, or, of a file far from it, its own."""
    relative = Path(os.path.relpath(file, base))
    return str(Path(file.parent.name, file.name) if relative.parts[:2] == ("..", "..") else relative)


def _version() -> str:
    try:
        return metadata.version("puna")
    except metadata.PackageNotFoundError:  # run from its source
        return "unknown"
