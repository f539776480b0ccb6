"""Encoding of a chunk of rows to token arrays, the work of the preparation's processes."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait

import numpy as np

from puna.data.encoder import Ids, LabelEncoder, MaskError
from puna.data.handlers.registry import get_handler
from puna.data.indexed_dataset import IDS, IGNORED, LABELS, TEXT
from puna.data.samples import RowError, Sample, Text
from puna.data.sources import BadRow, Chunk, rows

MAX_REASON = 300  # characters; a reason may quote what a template says
# How each kind of sample is stored: for each sequence that it is encoded to, the stores of its ids and labels
STORES: dict[str, list[tuple[str, ...]]] = {
    "text": [(TEXT,)],
    "instruction": [(IDS, LABELS)],
    "preference": [(f"_chosen{IDS}", f"_chosen{LABELS}"), (f"_rejected{IDS}", f"_rejected{LABELS}")],
}


@dataclass(frozen=True)
class Job:
    """The settings that every worker gets."""

    encoder: LabelEncoder
    handler: str
    text_field: str = "text"
    validation: float = 0.0  # fraction of the samples


@dataclass
class Counts:
    """Totals of a split."""

    samples: int = 0
    tokens: int = 0
    trained: int = 0
    longest: int = 0

    def add(self, other: Counts) -> None:
        self.samples += other.samples
        self.tokens += other.tokens
        self.trained += other.trained
        self.longest = max(self.longest, other.longest)


@dataclass
class Encoded:
    """The samples of a chunk.

    stores: (split, store) -> tokens end to end (int32), and lengths. rejected: counts by reason. examples: reason ->
    the first row with it, counted from 0 in the chunk. notes: counts of requests in the data that are ignored.
    """

    rows: int = 0
    stores: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, int] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def tokens(self) -> int:
        return sum(counts.tokens for counts in self.counts.values())

    def reject(self, reason: str) -> None:
        """Count the current row, or a sample of it, as rejected."""
        reason = reason[:MAX_REASON]
        self.rejected[reason] += 1
        self.examples.setdefault(reason, self.rows)


def encode_chunk(job: Job, chunk: Chunk) -> Encoded:
    """Read, interpret, tokenise and label the rows of a chunk. MaskError, with the source, when no row can succeed."""
    handler = get_handler(job.handler, job.text_field)
    result = Encoded()
    samples: list[tuple[str, Sample, list[tuple[Ids, Ids]]]] = []
    for row in rows(chunk):
        try:
            if isinstance(row, BadRow):
                raise RowError(row.reason)
            for sample in handler.convert(row):
                if isinstance(sample, BadRow):
                    result.reject(sample.reason)
                else:
                    encoded = [] if isinstance(sample.content, Text) else job.encoder.encode(sample.content)
                    samples.append((split_of(sample, job.validation), sample, encoded))
                    result.notes.update(job.encoder.notes(sample.content))
        except RowError as error:
            result.reject(str(error))
        except MaskError as error:
            raise MaskError(f"{chunk.source}: {error}") from error
        result.rows += 1
    documents = job.encoder.texts([sample.content for _, sample, _ in samples if isinstance(sample.content, Text)])
    for (_, _, encoded), ids in zip([entry for entry in samples if not entry[2]], documents, strict=True):
        encoded.append((ids, ids))
    for split in sorted({split for split, _, _ in samples}):
        chosen = [encoded for name, _, encoded in samples if name == split]
        for sequence, stores in enumerate(STORES[handler.kind]):
            for column, store in enumerate(stores):
                result.stores[split, store] = _join([encoded[sequence][column] for encoded in chosen])
        result.counts[split] = _count(chosen)
    return result


def split_of(sample: Sample, validation: float) -> str:
    """ "train" or "validation", by a hash of the sample: the same for equal samples, whatever else is prepared."""
    if not validation:
        return "train"
    key = sample.key or json.dumps(asdict(sample.content), sort_keys=True)
    hashed = int.from_bytes(hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest(), "big")
    return "validation" if hashed < validation * 2**64 else "train"


def _join(sequences: list[Ids]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(ids) for ids in sequences], np.int32)
    return np.concatenate([np.asarray(ids, np.int32) for ids in sequences]), lengths


def _count(samples: list[list[tuple[Ids, Ids]]]) -> Counts:
    sequences = [sequence for sample in samples for sequence in sample]
    return Counts(
        samples=len(samples),
        tokens=sum(len(ids) for ids, _ in sequences),
        trained=sum(len(labels) - labels.count(IGNORED) for _, labels in sequences),
        longest=max(len(ids) for ids, _ in sequences),
    )


# In a worker process

_job: Job


def start_worker(job: Job) -> None:
    """Initialise a worker process. The job is sent once, since it is large and chunks are small."""
    global _job
    _job = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for every core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent ends, which may be killed without a chance to stop its workers."""
    if parent := multiprocessing.parent_process():
        wait([parent.sentinel])
        os._exit(1)


def work(chunk: Chunk) -> Encoded:
    return encode_chunk(_job, chunk)
