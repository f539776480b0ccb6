"""What a preparation writes: stores that appear whole, and a manifest from which a killed one goes on."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from puna.data import handlers
from puna.data.indexed_dataset import IndexedDatasetBuilder, token_dtype
from puna.data.options import PrepareOptions
from puna.data.worker import NAMED, STORES, Counts, Encoded, Job
from puna.files import write_json

SAVE_SECONDS = 20.0


@dataclass
class Stats:
    """What was done so far: chunks of all sources, and by `marks` how long each store is, (documents, bytes)."""

    chunks: int = 0
    marks: dict[str, tuple[int, int]] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)  # by source
    rejected: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)

    def add(self, source: str, result: Encoded) -> None:
        """Count what came of the next chunk."""
        before = self.rows.get(source, 0)
        named = [f"{source}, row {before + row + 1}: {why}" for row, why in result.named]
        self.named += named[: NAMED - len(self.named)]
        self.chunks += 1
        self.rows[source] = before + result.rows
        self.rejected.update(result.rejected)
        for split, counts in result.counts.items():
            self.counts.setdefault(split, Counts()).add(counts)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON data. `dataclasses.asdict` would rebuild the Counter from pairs."""
        counts = {split: asdict(counts) for split, counts in self.counts.items()}
        return vars(self) | {"counts": counts, "rejected": dict(self.rejected)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Stats:
        counts = {split: Counts(**values) for split, values in state["counts"].items()}
        return cls(**{**state, "counts": counts, "rejected": Counter(state["rejected"])})


def prefix_of(options: PrepareOptions, split: str) -> str:
    """The prefix of a split's stores."""
    return f"{options.out}_{split}" if options.validation else str(options.out)


def all_stores(out: Path) -> list[Path]:
    """Every file that a preparation of any kind can have written under a prefix."""
    stores = {store for kind in STORES.values() for group in kind for store in group}
    places = [f"{out}{split}{store}" for split in ("", "_train", "_validation") for store in sorted(stores)]
    return [Path(place + end) for place in places for end in (".bin", ".idx")]


class Output:
    """The stores that are being written, and the manifest that says how far. A context manager around the writing."""

    def __init__(self, options: PrepareOptions, job: Job, facts: dict[str, Any], manifest: Path) -> None:
        self.options, self.manifest = options, manifest
        self.identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.stats = self._resume()
        kind = handlers.choose(job.handler).kind
        text = token_dtype(job.encoder.tokenizer.vocab_size)
        splits = ("train", "validation") if options.validation else ("train",)
        self._stores = {(split, store): text if kind == "text" else np.dtype(np.int32)
                        for split in splits for group in STORES[kind] for store in group}  # fmt: skip
        self._writers: dict[tuple[str, str], IndexedDatasetBuilder] = {}
        self._saved, self._kept = time.monotonic(), bool(self.stats.chunks)

    def __enter__(self) -> Output:
        try:
            self._open()
        except FileNotFoundError:  # killed while the stores were put in place
            self.stats = Stats()
            self._open()
        return self

    def _open(self) -> None:
        for (split, store), dtype in self._stores.items():
            at = self.stats.marks.get(split + store)
            self._writers[split, store] = IndexedDatasetBuilder(prefix_of(self.options, split) + store, dtype, at=at)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """When something went wrong, what was saved stays; before the first save there is nothing worth keeping."""
        if kind is None:
            return
        for writer in self._writers.values():
            if self._kept:
                writer.close()
            else:
                writer.discard()
        if self._kept:
            print("what was saved is kept: the same command goes on from there", file=sys.stderr)

    def add(self, source: str, result: Encoded) -> None:
        """Write what came of the next chunk."""
        for key, (ids, lengths) in result.stores.items():
            self._writers[key].extend(ids, lengths)
        self.stats.add(source, result)
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.stats.marks = {split + store: writer.mark() for (split, store), writer in self._writers.items()}
            write_json(self.manifest, {"identity": self.identity, "stats": self.stats.state_dict()})
            self._saved, self._kept = time.monotonic(), True

    def publish(self, card_path: Path, card: dict[str, Any]) -> None:
        """Put stores and card in place of older ones. A split without samples has no files."""
        for path in (card_path, *all_stores(self.options.out)):
            path.unlink(missing_ok=True)
        for writer in self._writers.values():
            if writer.sequences:
                writer.finalize()
            else:
                writer.discard()
        write_json(card_path, card)
        self.manifest.unlink(missing_ok=True)

    def _resume(self) -> Stats:
        try:
            content = json.loads(self.manifest.read_bytes())
            if content["identity"] == self.identity:
                stats = Stats.from_state_dict(content["stats"])
                done = sum(counts.tokens for counts in stats.counts.values())
                print(f"going on after {done:,} tokens that are done", file=sys.stderr)
                return stats
            print("starting over: the unfinished preparation had other sources or options", file=sys.stderr)
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError):
            print(f"{self.manifest} is damaged: starting over", file=sys.stderr)
        return Stats()
