"""A chunk of rows to arrays of tokens: the part of the preparation that runs in many processes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections import Counter
from dataclasses import asdict, dataclass, field

import numpy as np

from puna.data.encoder import Ids, LabelEncoder, MaskError
from puna.data.handlers import RowError, Sample, Text, choose
from puna.data.indexed_dataset import IDS, IGNORED, LABELS, TEXT
from puna.data.sources import Bad, Chunk, rows

NAMED = 5  # rejected rows of a source that are named
# What a kind of sample is stored as: for each sequence that it is encoded to, the stores of its ids and labels
STORES: dict[str, list[tuple[str, ...]]] = {
    "text": [(TEXT,)],
    "instruction": [(IDS, LABELS)],
    "preference": [(f"_chosen{IDS}", f"_chosen{LABELS}"), (f"_rejected{IDS}", f"_rejected{LABELS}")],
}


@dataclass(frozen=True)
class Job:
    """What every worker needs to know."""

    encoder: LabelEncoder
    handler: str
    text_field: str = "text"
    validation: float = 0.0  # share of the samples that goes there


@dataclass
class Counts:
    """What is counted of a split."""

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
    """The samples of a chunk. `stores`: (split, store) -> tokens end to end, and lengths."""

    rows: int = 0
    stores: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)
    rejected: Counter[str] = field(default_factory=Counter)
    named: list[tuple[int, str]] = field(default_factory=list)  # (row in the chunk, reason) of the first few

    @property
    def tokens(self) -> int:
        return sum(counts.tokens for counts in self.counts.values())


def encode_chunk(job: Job, chunk: Chunk) -> Encoded:
    """Read, interpret, tokenise and label the rows of a chunk. MaskError, with the source, when no row can succeed."""
    convert = choose(job.handler, job.text_field).convert
    result = Encoded()
    samples: list[tuple[str, Sample, list[tuple[Ids, Ids]]]] = []
    for row in rows(chunk):
        try:
            if isinstance(row, Bad):
                raise RowError(row.reason)
            for sample in convert(row):
                if isinstance(sample, Bad):
                    _reject(result, sample.reason)
                else:
                    encoded = [] if isinstance(sample.content, Text) else job.encoder.encode(sample.content)
                    samples.append((split_of(sample, job.validation), sample, encoded))
        except RowError as error:
            _reject(result, str(error))
        except MaskError as error:
            raise MaskError(f"{chunk.source}: {error}") from error
        result.rows += 1
    documents = job.encoder.texts([sample.content for _, sample, _ in samples if isinstance(sample.content, Text)])
    for (_, _, encoded), ids in zip([entry for entry in samples if not entry[2]], documents, strict=True):
        encoded.append((ids, ids))
    kind = STORES[choose(job.handler).kind]
    for split in sorted({split for split, _, _ in samples}):
        chosen = [encoded for place, _, encoded in samples if place == split]
        for number, stores in enumerate(kind):
            for part, store in enumerate(stores):
                result.stores[split, store] = _join([encoded[number][part] for encoded in chosen])
        result.counts[split] = _count(chosen)
    return result


def split_of(sample: Sample, validation: float) -> str:
    """ "train" or "validation", by a hash of the sample: the same for equal samples, whatever else is prepared."""
    if not validation:
        return "train"
    key = sample.key or json.dumps(asdict(sample.content), sort_keys=True)
    number = int.from_bytes(hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest(), "big")
    return "validation" if number < validation * 2**64 else "train"


def _reject(result: Encoded, reason: str) -> None:
    result.rejected[reason] += 1
    if len(result.named) < NAMED:
        result.named.append((result.rows, reason))


def _join(parts: list[Ids]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(part) for part in parts], np.int32)
    return np.concatenate([np.asarray(part, np.int32) for part in parts]), lengths


def _count(samples: list[list[tuple[Ids, Ids]]]) -> Counts:
    both = [pair for sample in samples for pair in sample]
    return Counts(
        samples=len(samples),
        tokens=sum(len(ids) for ids, _ in both),
        trained=sum(len(labels) - labels.count(IGNORED) for _, labels in both),
        longest=max(len(ids) for ids, _ in both),
    )


# In a worker process

_job: Job


def start_worker(job: Job) -> None:
    """Called once in each process: the job is large, its chunks are small."""
    global _job
    _job = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for every core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one


def work(chunk: Chunk) -> Encoded:
    return encode_chunk(_job, chunk)
