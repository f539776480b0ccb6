"""The output of a preparation: token stores and metadata that are published as a whole, and a state to resume from.

Everything unfinished is in a hidden folder beside the output, `.NAME.prepare`, which is locked by the process that
writes it. When all is complete there, a publication record is saved and the files are moved into place; a process that
is killed meanwhile leaves the record, and the next preparation of that name completes the move.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from puna.data.handlers.registry import get_handler
from puna.data.indexed_dataset import IndexedDatasetBuilder, token_dtype
from puna.data.options import PrepareOptions
from puna.data.worker import STORES, Counts, Encoded, Job
from puna.errors import UserError
from puna.files import write_json

SAVE_SECONDS = 20.0
MAX_REASONS = 100  # reasons of rejection that are counted one by one; they may quote the data
OTHER = "other reasons"
STATE, PUBLICATION = "state.json", "publication.json"


@dataclass
class Stats:
    """Progress: chunks of all sources, and in `marks` the (documents, bytes) of each store."""

    chunks: int = 0
    marks: dict[str, tuple[int, int]] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)  # by source
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # reason -> the first row with it
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, source: str, result: Encoded) -> None:
        """Count the result of the next chunk."""
        before = self.rows.get(source, 0)
        for given, count in result.rejected.items():
            reason = given if given in self.rejected or len(self.rejected) < MAX_REASONS else OTHER
            self.rejected[reason] += count
            self.examples.setdefault(reason, f"{source}, row {before + result.examples[given] + 1}")
        for note, count in result.notes.items():
            if note in self.notes or len(self.notes) < MAX_REASONS:
                self.notes[note] += count
        self.chunks += 1
        self.rows[source] = before + result.rows
        for split, counts in result.counts.items():
            self.counts.setdefault(split, Counts()).add(counts)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON data. `dataclasses.asdict` would rebuild a Counter from pairs."""
        counts = {split: asdict(counts) for split, counts in self.counts.items()}
        return vars(self) | {"counts": counts, "rejected": dict(self.rejected), "notes": dict(self.notes)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Stats:
        counts = {split: Counts(**values) for split, values in state["counts"].items()}
        counters = {name: Counter(state[name]) for name in ("rejected", "notes")}
        return cls(**{**state, "counts": counts, **counters})


def prefix_of(options: PrepareOptions, split: str) -> str:
    """The prefix of a split's stores."""
    return f"{options.out}_{split}" if options.validation else str(options.out)


def metadata_path(out: Path) -> Path:
    """The file that describes the data under a prefix."""
    return out.with_name(f"{out.name}.json")


def outputs(out: Path) -> list[Path]:
    """Every file that a preparation of any kind can write under a prefix and that exists, the metadata first."""
    stores = {store for kind in STORES.values() for group in kind for store in group}
    prefixes = [f"{out}{split}{store}" for split in ("", "_train", "_validation") for store in sorted(stores)]
    paths = [metadata_path(out), *(Path(prefix + end) for prefix in prefixes for end in (".bin", ".idx"))]
    return [path for path in paths if path.exists()]


def identity_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """The folder for the unfinished output under a prefix, locked. Disappears unless a state is saved in it.

    The operating system releases the lock when the process ends, however it ends. Raises UserError when another process
    is preparing data under the prefix, or the folder can't be made.
    """
    folder = out.absolute().with_name(f".{out.name}.prepare")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"No file can be written under --out {out}: {error.strerror}.") from None
    try:
        if not _lock(descriptor) or not _same(descriptor, folder):
            raise UserError(f"Another process is preparing data under {out}: wait for it, or choose another --out.")
        try:
            yield folder
        finally:
            if not any((folder / name).exists() for name in (STATE, PUBLICATION)):
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open folder; False when another process holds it. Without file locks, True."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        pass
    except OSError as error:  # some network file systems have no locks
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _same(descriptor: int, folder: Path) -> bool:
    """Whether the open folder is still the one of that name: the process that held it may just have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False


def complete_publication(folder: Path, out: Path) -> dict[str, Any] | None:
    """Move a complete output from its staging folder over older data. Returns its record, None without one.

    Can be repeated after a kill at any point: the record is removed last.
    """
    try:
        record = json.loads((folder / PUBLICATION).read_bytes())
        names = set(record["files"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    metadata = metadata_path(out)
    metadata.unlink(missing_ok=True)  # it no longer describes all files
    for path in sorted(folder.iterdir()):  # .bin before .idx
        if path.name in names:
            if path.suffix == ".bin":  # never beside the index of other tokens
                out.with_name(path.stem + ".idx").unlink(missing_ok=True)
            os.replace(path, out.with_name(path.name))
    for path in outputs(out):
        if path.name not in names:
            path.unlink()
    write_json(metadata, record["metadata"])
    for name in (STATE, PUBLICATION):
        (folder / name).unlink(missing_ok=True)
    return record


class Output:
    """The stores under construction in a staging folder, as a context manager.

    `stats`: the progress of an earlier run of the same job, to resume from.
    """

    def __init__(self, options: PrepareOptions, job: Job, facts: dict[str, Any], folder: Path) -> None:
        self.options, self.folder = options, folder
        self.identity = identity_of(facts)
        self.stats = self._resume()
        kind = get_handler(job.handler).kind
        dtype = token_dtype(job.encoder.tokenizer.vocab_size) if kind == "text" else np.dtype(np.int32)
        splits = ("train", "validation") if options.validation else ("train",)
        self._stores = {(split, store): dtype for split in splits for group in STORES[kind] for store in group}
        self._writers: dict[tuple[str, str], IndexedDatasetBuilder] = {}
        self._saved, self._kept = time.monotonic(), bool(self.stats.chunks)

    def __enter__(self) -> Output:
        try:
            self._open()
        except (FileNotFoundError, UserError):  # the files of the saved state are missing or too short
            self.stats, self._kept = Stats(), False
            self._open()
        return self

    def _open(self) -> None:
        if not self.stats.chunks:  # existing files belong to another job
            for path in self.folder.iterdir():
                path.unlink()
        for (split, store), dtype in self._stores.items():
            prefix = self.folder / (Path(prefix_of(self.options, split)).name + store)
            at = self.stats.marks.get(split + store)
            self._writers[split, store] = IndexedDatasetBuilder(prefix, dtype, at=at)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an error the saved state is kept."""
        for writer in self._writers.values():
            writer.close()
        if kind is not None and self._kept:
            print("what was saved is kept: the same command resumes from it", file=sys.stderr)

    def add(self, source: str, result: Encoded) -> None:
        """Write the result of the next chunk."""
        for key, (ids, lengths) in result.stores.items():
            self._writers[key].extend(ids, lengths)
        self.stats.add(source, result)
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.stats.marks = {split + store: writer.mark() for (split, store), writer in self._writers.items()}
            write_json(self.folder / STATE, {"identity": self.identity, "stats": self.stats.state_dict()})
            self._saved, self._kept = time.monotonic(), True

    def publish(self, metadata: dict[str, Any]) -> None:
        """Complete the stores and move them and the metadata into place. A split without samples has no files.

        Raises UserError when data of that name appeared meanwhile and are not to be overwritten.
        """
        if not self.options.overwrite and (there := outputs(self.options.out)):
            raise UserError(f"{there[0]} appeared during the preparation: choose another --out, or add --overwrite.")
        files = []
        for writer in self._writers.values():
            if writer.sequences:
                writer.finalize()
                files += [writer.bin.name, writer.idx.name]
            else:
                writer.discard()
        record = {"identity": self.identity, "files": files, "metadata": metadata}
        write_json(self.folder / PUBLICATION, record)
        complete_publication(self.folder, self.options.out)

    def _resume(self) -> Stats:
        path = self.folder / STATE
        try:
            content = json.loads(path.read_bytes())
            if content["identity"] == self.identity:
                stats = Stats.from_state_dict(content["stats"])
                done = sum(counts.tokens for counts in stats.counts.values())
                print(f"resuming after {done:,} tokens", file=sys.stderr)
                return stats
            print("starting over: the unfinished preparation had other sources or options", file=sys.stderr)
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, AttributeError):
            print(f"{path} is damaged: starting over", file=sys.stderr)
        return Stats()
