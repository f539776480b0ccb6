"""Training checkpoints: complete or absent, verified before use, and loadable by any other parallel layout.

`step-00000100/` holds the files of torch.distributed.checkpoint (trained weights and optimizer state by name, written
as shards by each rank) and `manifest.json`, with the checksum of every file and the rest of the run's state. It is
written in the background under a hidden name and renamed once it is on disk.

A folder holds one timeline. Resuming from step S retires the checkpoints of later steps (`retired-00000105/`), so that
the next checkpoint is the newest; rotation deletes only complete checkpoints of this timeline.
"""

from __future__ import annotations

import errno
import json
import shutil
import sys
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from puna.errors import UserError
from puna.files import sha256, sync, write_text
from puna.train.safe_load import load_state

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant

FORMAT = "puna training checkpoint 1"
MANIFEST = "manifest.json"
MAX_MANIFEST = 64 << 20  # bytes
ERRORS = (Exception, CheckpointException)  # torch made the latter a BaseException


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete checkpoint. `facts`: the JSON values given to `CheckpointManager.save` with the tensors."""

    path: Path
    step: int
    facts: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @property
    def score(self) -> float | None:
        """Validation loss, None without a validation."""
        return self.facts.get("validation_loss")


@dataclass
class _Pending:
    step: int
    facts: dict[str, Any]
    work: Future


class CheckpointManager:
    """Saves, finds, loads and rotates the checkpoints in `folder`, which all ranks must share.

    Keeps the newest `keep` and the one with the lowest validation loss. Methods are collectives. One process
    group at a time may use a folder (`run_folder.lock`): opening it removes the remains of an interrupted save.
    """

    def __init__(self, folder: Path, *, keep: int = 2, asynchronous: bool = True) -> None:
        if keep < 1:
            raise UserError(f"checkpoint.keep must be at least 1, not {keep}.")
        self.folder, self.keep, self.asynchronous = folder, keep, asynchronous
        self.distributed = dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        # A separate group: a background save must not interleave with the collectives of training.
        self.group = dist.new_group(backend="gloo") if self.distributed else None
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: _Pending | None = None
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self._clean()
        self._barrier()

    def save(self, step: int, state: dict[str, Any], facts: dict[str, Any]) -> None:
        """Start to save `state` (from `parallel.state_dict.get_state`) and `facts` (JSON) as the checkpoint of `step`.

        Returns once the tensors are copied, or, when not asynchronous, once the checkpoint is complete. Raises
        UserError when the disk is full; earlier checkpoints stay.
        """
        self.wait()
        hidden = self._hidden(step)
        if self.rank == 0:
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)
        self._barrier()
        writer = FileSystemWriter(hidden, sync_files=True)
        storage: dict[str, Any] = {"storage_writer": writer, "process_group": self.group, "no_dist": self.group is None}
        written: Any = None
        if self.asynchronous:
            written = dcp.async_save(state, **storage)
        else:
            try:
                dcp.save(state, **storage)
            except ERRORS as error:
                self._failed(step, error)
        self.pending = _Pending(step, facts, self.thread.submit(self._hash, hidden, written))
        if not self.asynchronous:
            self.wait()

    def poll(self) -> bool:
        """Whether this rank has written its files of a pending save; call `wait` once all ranks have."""
        return self.pending is not None and self.pending.work.done()

    def wait(self) -> None:
        """Finish the pending save, if any: its checkpoint is complete afterwards."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        files: dict[str, dict[str, Any]] = {}
        failed: str | None = None
        try:
            files = pending.work.result()
        except ERRORS as error:
            failed = _reason(error)
        for written, problem in self._gather((files, failed)):
            files |= written
            failed = failed or problem
        if failed is None and self.rank == 0:
            try:
                self._publish(pending, files)
            except OSError as error:
                failed = _reason(error)
        failed = self._gather(failed)[0]
        if failed is not None:
            self._failed(pending.step, failed)

    def newest(self) -> SavedCheckpoint | None:
        """The newest complete checkpoint, None without one. Reports damaged ones on stderr, with the reason."""
        steps = sorted(self.steps(), reverse=True) if self.rank == 0 else []
        for step in self._gather(steps)[0]:
            path = self.folder / _name(step)
            try:
                return self.open(path)
            except UserError as error:
                if self.rank == 0:
                    print(f"skipping a checkpoint: {error}", file=sys.stderr)
        return None

    def retire(self, step: int) -> None:
        """Rename the checkpoints after `step`, so that resuming and rotation ignore them.

        The resumed run trains those steps again. Damaged checkpoints are renamed too; their files are not changed.
        Raises UserError for a checkpoint of another program or version, and renames nothing then.
        """
        for number in self.steps():
            if number > step and _is_foreign(self.folder / _name(number)):
                raise UserError(
                    f"{self.folder / _name(number)} was written by another version of puna or another program, and"
                    " this run would reach its step: move it away, or choose another --out."
                )
        self._barrier()
        if self.rank == 0:
            names = []
            for number in sorted(later for later in self.steps() if later > step):
                target = self.folder / f"retired-{number:08d}"
                copy = 1
                while target.exists():
                    target, copy = self.folder / f"retired-{number:08d}-{copy}", copy + 1
                (self.folder / _name(number)).rename(target)
                names.append(target.name)
            if names:
                sync(self.folder)
                print(
                    f"steps after {step} are trained again: their checkpoints are now"
                    f" {', '.join(names)} in {self.folder}",
                    file=sys.stderr,
                )
        self._barrier()

    def open(self, path: Path) -> SavedCheckpoint:
        """The checkpoint at `path`, its files verified by checksum. Raises UserError when it is incomplete."""
        problem: str | None = None
        saved: SavedCheckpoint | None = None
        try:
            saved = read_manifest(path)
        except UserError as error:
            problem = str(error)
        if saved is not None:
            size = dist.get_world_size() if self.distributed else 1
            for name in sorted(saved.files)[self.rank :: size]:
                problem = problem or _differs(path / name, saved.files[name])
        problem = next((found for found in self._gather(problem) if found), None)
        if problem or saved is None:
            raise UserError(problem or f"{path} is not a checkpoint.")
        return saved

    def load(self, saved: SavedCheckpoint, state: dict[str, Any]) -> None:
        """Load into `state` in place, resharded to this parallel layout."""
        load_state(saved.path, state, self.group)

    def best(self) -> SavedCheckpoint | None:
        """The checkpoint with the lowest validation loss."""
        scored = [saved for saved in self._complete() if saved.score is not None]
        return min(scored, key=lambda saved: saved.score or 0.0, default=None)

    def close(self) -> None:
        self.thread.shutdown()

    def _hash(self, hidden: Path, written: Any) -> dict[str, dict[str, Any]]:
        """This rank's files with their checksums, once they are on disk. Runs in the background."""
        if written is not None:
            written.result()
        mine = [*hidden.glob(f"__{self.rank}_*"), *([hidden / ".metadata"] if self.rank == 0 else [])]
        return {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in mine}

    def _publish(self, pending: _Pending, files: dict[str, dict[str, Any]]) -> None:
        hidden, path = self._hidden(pending.step), self.folder / _name(pending.step)
        content = {"format": FORMAT, "step": pending.step, "files": files, "facts": pending.facts}
        write_text(hidden / MANIFEST, json.dumps(content, indent=1))
        replaced = path.with_name(f".{path.name}.replaced")
        if path.exists():
            path.rename(replaced)
        hidden.rename(path)
        sync(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        newest = sorted(self._complete(), key=lambda saved: -saved.step)
        best = self.best()
        for saved in newest[self.keep :]:
            if best is None or saved.path != best.path:
                self._remove(saved.path)

    def _remove(self, path: Path) -> None:
        """Rename to a hidden name, then delete, so that no incomplete checkpoint is visible."""
        gone = path.with_name(f".{path.name}.gone")
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _clean(self) -> None:
        """Clean up after a killed process: put back a checkpoint being replaced, remove all other hidden folders."""
        for left in self.folder.glob(".step-*"):
            name, _, state = left.name[1:].rpartition(".")
            if state == "replaced" and not (self.folder / name).exists():
                left.rename(self.folder / name)
            else:
                shutil.rmtree(left, ignore_errors=True)

    def _complete(self) -> list[SavedCheckpoint]:
        """The checkpoints with a readable manifest and files of the listed sizes."""
        found = []
        for step in self.steps():
            path = self.folder / _name(step)
            try:
                saved = read_manifest(path)
                if all((path / name).stat().st_size == file["size"] for name, file in saved.files.items()):
                    found.append(saved)
            except (UserError, OSError, KeyError, TypeError):
                continue
        return found

    def steps(self) -> list[int]:
        """The steps of all checkpoints in the folder, damaged ones too; in no order, and not a collective."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return [int(name) for name in names if name.isdigit()]

    def _hidden(self, step: int) -> Path:
        return self.folder / f".{_name(step)}.part"

    def _failed(self, step: int, why: Any) -> None:
        if self.rank == 0:
            shutil.rmtree(self._hidden(step), ignore_errors=True)
        reason = why if isinstance(why, str) else _reason(why)
        raise UserError(
            f"The checkpoint of step {step} could not be saved: {reason}; earlier checkpoints in {self.folder} are"
            " complete, so put that right and start again."
        )

    def _gather(self, value: Any) -> list[Any]:
        if not self.distributed:
            return [value]
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def _barrier(self) -> None:
        if self.distributed:
            dist.barrier()


def read_manifest(path: Path) -> SavedCheckpoint:
    """The manifest of the checkpoint at `path`. Raises UserError when it is missing or damaged."""
    file = path / MANIFEST
    try:
        if file.stat().st_size > MAX_MANIFEST:
            raise ValueError
        content = json.loads(file.read_bytes())
        saved = SavedCheckpoint(path, int(content["step"]), dict(content["facts"]), dict(content["files"]))
        if content["format"] != FORMAT or any(Path(name).name != name for name in saved.files):
            raise ValueError
    except FileNotFoundError:
        raise UserError(f"{path} is not a checkpoint of puna train: it has no {MANIFEST}.") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is damaged, or a checkpoint of another version of puna: its {MANIFEST} can't be read."
        ) from None
    return saved


def _is_foreign(path: Path) -> bool:
    """Whether the manifest of a checkpoint is intact, and not one of this format."""
    file = path / MANIFEST
    try:
        content = json.loads(file.read_bytes()) if file.stat().st_size <= MAX_MANIFEST else None
    except (OSError, ValueError, RecursionError):
        return False
    return not (isinstance(content, dict) and content.get("format") == FORMAT)


def _differs(path: Path, wanted: dict[str, Any]) -> str | None:
    if not path.exists():
        return f"{path.parent} is incomplete: {path.name} is missing."
    if path.stat().st_size != wanted["size"]:
        return f"{path.parent} is incomplete: {path.name} has {path.stat().st_size:,} of {wanted['size']:,} bytes."
    if sha256(path) != wanted["sha256"]:
        return f"{path.parent} is damaged: {path.name} is not what was saved."
    return None


def _reason(error: BaseException) -> str:
    """The reason for a failed save, without torch.distributed.checkpoint's wrapping."""
    failures = getattr(error, "failures", None)
    if failures:
        return _reason(next(iter(failures.values()))[0])
    text = str(error).strip()
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text
    if full or "file write failed" in text or "PytorchStreamWriter failed" in text:
        return "the disk is full"
    return text.splitlines()[0] if text else type(error).__name__


def _name(step: int) -> str:
    return f"step-{step:08d}"
