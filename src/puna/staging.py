"""Writing a checkpoint so that it appears whole or not at all.

It is written into a hidden directory beside its destination, brought to the disk, and renamed. Ctrl-C, an error or a
full disk removes that directory and the parents made for it; a killed process or a power cut leaves it
(`.NAME.xxxx.part`), never half a result.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from puna.errors import UserError

MANIFEST = "puna.json"


def manifest_path(checkpoint: Path) -> Path:
    """Where the manifest of a checkpoint is: in its directory, or beside its file."""
    return checkpoint / MANIFEST if checkpoint.is_dir() else checkpoint.with_name(f"{checkpoint.name}.{MANIFEST}")


@contextmanager
def staged(dst: Path, overwrite: bool = False) -> Iterator[Path]:
    """A path to write a file or directory to; it becomes `dst` when the body succeeds, and disappears when it doesn't.

    What the body writes beside that path, a manifest, moves along. Raises `UserError` when `dst` exists, unless
    `overwrite` is given and a manifest says that puna wrote it, and when the disk is full.
    """
    final = Path(os.path.abspath(dst))
    if os.path.lexists(final) and not (final.is_dir() and not any(final.iterdir())):
        if not overwrite:
            raise UserError(f"{dst} exists already: choose another name, or add --overwrite")
        if not manifest_path(final).exists():
            raise UserError(f"{dst} has no {MANIFEST}, so puna didn't write it: to replace it, remove it yourself")
    made = [folder for folder in final.parents if not folder.exists()]  # the innermost first
    final.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent))
    try:
        yield stage / final.name
        for folder, _, files in os.walk(stage, topdown=False):
            for name in (*files, "."):
                sync(Path(folder, name))
        _publish(stage, final)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk of {final.parent} is full, nothing was written: make room first") from None
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        with suppress(OSError):  # the result is in it, or what someone else has put there
            for parent in made:
                parent.rmdir()


def _publish(stage: Path, final: Path) -> None:
    """Moves everything in `stage` to its place, and what is there out of the way; puts it back when that fails."""
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


def sync(path: Path) -> None:
    """Makes sure that a file or directory is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no directories
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
