"""Files: read with bounds, mapped, hashed, and replaced as a whole or not at all. Imports no torch.

This is the only module that replaces files and directories. The new one is written under a hidden name beside its
destination (`.NAME.xxxx.part`), synced to disk, and renamed. Ctrl-C, an error or a full disk removes it; a
killed process or a power cut leaves it behind (`leftovers`), and the destination as it was.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import io
import json
import mmap
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.errors import UserError

if TYPE_CHECKING:
    import torch

MANIFEST = "puna.json"
MAX_JSON = 256 << 20  # bytes; the index of the largest published model has some megabytes
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
FULL = (errno.ENOSPC, errno.EDQUOT)


# Reading


def open_file(path: Path) -> io.BufferedReader:
    """Opens a regular file for reading. `UserError` for a pipe or a device, on which reading might hang,
    and for a Git LFS pointer."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UserError(f"{path} is not a regular file; puna reads no pipes or devices.")
        file = os.fdopen(descriptor, "rb")
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from None
    if file.peek(len(LFS_POINTER)).startswith(LFS_POINTER):
        file.close()
        raise UserError(
            f"{path} is a Git LFS pointer in the place of the file itself: run git lfs pull in its repository, or"
            " download the file again."
        )
    return file


def read_bytes(path: Path, limit: int = MAX_JSON) -> bytes:
    """The content of a regular file of at most `limit` bytes; `UserError` for anything else."""
    with open_file(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{path} is larger than the {limit:,} bytes that such a file can have; fetch it again.")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `UserError` when it can't be read or is damaged."""
    try:
        content = json.loads(read_bytes(path))
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it isn't JSON; fetch it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; fetch it again.")
    return content


def map_file(path: Path) -> torch.Tensor:
    """The bytes of a file that isn't empty, uint8 [size], read when they are touched.

    The mapping is private, so that a write into it never reaches the file, and reserves no memory: a file may be larger
    than the machine's memory, which `torch.from_file` refuses on Linux.
    """
    import torch

    with open_file(path) as file:
        if sys.platform == "linux":
            flags, prot = mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            mapped = mmap.mmap(file.fileno(), 0, flags=flags, prot=prot)
        else:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(mapped, dtype=torch.uint8)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open_file(Path(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Replacing a file


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write a file to; it replaces `path` when the body succeeds, else it is removed."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".part", dir=path.absolute().parent) as folder:
        part = Path(folder) / path.name
        yield part
        sync(part)
        part.replace(path)
        sync(path.absolute().parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the file by one of this content."""
    with replacing(path) as part:
        part.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Replaces the file by one of this text, in UTF-8 with the line ends that the text has."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces the file by this object as indented JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Makes sure that a file or directory is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no directories
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Publishing a checkpoint


def manifest_path(checkpoint: Path) -> Path:
    """Where the manifest of a checkpoint is: in its directory, or beside its file."""
    return checkpoint / MANIFEST if checkpoint.is_dir() else checkpoint.with_name(f"{checkpoint.name}.{MANIFEST}")


def leftovers(dst: Path) -> list[Path]:
    """The hidden folders that killed processes left of `dst`, without those of running processes."""
    parent = dst.absolute().parent
    return [
        path for path in sorted(parent.glob(f".{glob.escape(dst.name)}.*.part")) if path.is_dir() and _abandoned(path)
    ]


def leftovers_note(dst: Path) -> str:
    """A sentence about the `leftovers` of `dst`, "" when there are none."""
    if not (found := leftovers(dst)):
        return ""
    names = " ".join(map(str, found))
    return f"an interrupted run left {names} behind; if it holds nothing you miss, remove it with rm -r {names}"


@contextmanager
def staged(dst: Path, overwrite: bool = False) -> Iterator[Path]:
    """A path to write a file or directory to; it becomes `dst` when the body succeeds, and disappears when it doesn't.

    Files that the body writes beside that path, such as a manifest, move along. Raises `UserError` when `dst` exists,
    unless `overwrite` is given and a manifest says that puna wrote it, and when the disk is full.
    """
    final = Path(os.path.abspath(dst))
    if os.path.lexists(final) and not (final.is_dir() and not any(final.iterdir())):
        if not overwrite:
            raise UserError(f"{dst} exists already: choose another name, or add --overwrite.")
        if not manifest_path(final).exists():
            raise UserError(f"{dst} has no {MANIFEST}, so puna didn't write it: to replace it, remove it yourself.")
    if note := leftovers_note(final):
        print(f"note: {note}.", file=sys.stderr)
    made = [folder for folder in final.parents if not folder.exists()]  # the innermost first
    final.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent))
    lock = _lock(stage)
    try:
        yield stage / final.name
        for folder, _, files in os.walk(stage, topdown=False):
            for name in (*files, "."):
                sync(Path(folder, name))
        _publish(stage, final)
    except OSError as error:
        if error.errno in FULL:
            raise UserError(f"The disk of {final.parent} is full, nothing was written: free space first.") from None
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        with suppress(OSError):  # the result is in it, or what someone else has put there
            for parent in made:
                parent.rmdir()


def _publish(stage: Path, final: Path) -> None:
    """Moves everything in `stage` into place and the former files out of the way; restores them on failure."""
    fresh = sorted(stage.iterdir(), key=lambda path: path.name == final.name)  # the checkpoint after its manifest
    aside = stage / "replaced"
    aside.mkdir()
    old = [path for path in (final, final.with_name(f"{final.name}.{MANIFEST}")) if os.path.lexists(path)]
    moves = [(path, aside / path.name) for path in old] + [(path, final.with_name(path.name)) for path in fresh]
    for done, (source, target) in enumerate(moves):
        try:
            source.rename(target)
        except BaseException:
            for source_before, target_before in reversed(moves[:done]):
                target_before.rename(source_before)
            raise
    sync(final.parent)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds an exclusive lock on a directory until it is closed or the process ends; None where
    there are no such locks (Windows, some network file systems)."""
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _abandoned(folder: Path) -> bool:
    descriptor = _lock(folder)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is not None
