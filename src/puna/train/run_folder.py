"""The output folder of a run: locked by one training at a time; foreign files in it are never replaced.

Checked before anything slow begins: an unusable folder must not be discovered after days of training.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from puna.errors import UserError
from puna.files import MANIFEST, read_json

CONFIG, LOCK, METRICS = "config.yaml", ".lock", "metrics.jsonl"
MARK = "# Written by puna train: the options of this run.\n"  # first line of config.yaml, and so of every run's folder
OWN = (METRICS, "loss.png", "report.html")  # files that a run replaces beside its configuration
RESULTS = ("model", "adapter")


def check_folder(folder: Path) -> None:
    """Raises UserError for a folder that can't be created, or with files of others that a run would replace.

    What puna train wrote is recognised by the first line of config.yaml, a result by the step in its puna.json.
    """
    for path in (folder, *folder.parents):
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path} is a symbolic link to nothing: make its target, or choose another --out.")
        if path.exists():
            if not path.is_dir():
                raise UserError(f"{path} is a file, not a folder: choose another --out.")
            break
    config = folder / CONFIG
    if config.exists():
        with config.open("rb") as file:
            foreign = [] if file.read(len(MARK)) == MARK.encode() else [config]
    else:
        foreign = [folder / name for name in OWN if (folder / name).exists()]
    for name in RESULTS:
        if not _replaceable(folder / name):
            foreign.append(folder / name)
    if foreign:
        raise UserError(
            f"{foreign[0]} was not written by puna train, which would replace it: move it, or choose another --out."
        )


def _replaceable(result: Path) -> bool:
    """Whether a result may be written here: the path is free, an empty folder, or the result of a training."""
    if not result.exists() and not result.is_symlink():
        return True
    if not result.is_dir():
        return False
    if not any(result.iterdir()):
        return True
    try:
        return "step" in read_json(result / MANIFEST)
    except UserError:
        return False


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Create and lock a folder for this process. Raises UserError while another process trains there.

    The operating system releases the lock when the process ends, however it ends. Where a file system has no locks
    (some network mounts), a line on stderr says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"Another process is training in {folder}: wait for it to end, or choose another --out."
                ) from None
            print(f"{folder} is on a file system without locks: start one training there at a time", file=sys.stderr)
        yield
