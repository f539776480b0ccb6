"""Batches of packed rows: shuffled, mixed by weight, distributed over the data-parallel ranks.

Rows are numbered 0, 1, 2 ... without end. The content of a row follows from the stores, the row length and the seed; a
global batch is the next rows, however they are distributed over ranks. So the position in the data is one number, and
training may resume on another number of ranks and batch size without repeating or missing a sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch

from puna.data.indexed_dataset import IGNORED, Dataset
from puna.data.packing import PACKINGS, Plan
from puna.errors import UserError

Packing = Literal["best_fit", "concat", "none"]


@dataclass(frozen=True)
class PackedRow:
    """One row of `seq_len` tokens; all arrays are int [seq_len].

    `labels[t]` is the token that follows `ids[t]` in the same document, -100 at its end, for prompts and for padding.
    `positions` restart with each document; `documents` numbers the documents of the row, padding has its own number.
    `samples` are the (dataset, sample) numbers of the documents, in their order.
    """

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    documents: np.ndarray
    samples: list[tuple[int, int]]


class PackedLoader:
    """Rows of packed samples from one or more datasets.

    datasets: (dataset, weight) pairs. All weights None: an epoch is every sample once. Otherwise weights are fractions
      of the rows, the epoch has as many rows as all datasets together, and small datasets are repeated.
    packing: "best_fit" fills rows with whole documents that don't attend to one another; "concat" concatenates all
      documents as Megatron-LM does, so that they do; "none" gives each document a row, padded.
    long: for instruction samples longer than a row: "error" raises a UserError with their number, "cut" truncates them
      (and drops those without a trained token left), "drop" drops them. Text is split, and each piece but the last
      also predicts the first token of the next; "concat" splits everything.
    rank, size: this data-parallel rank and the number of ranks.

    Raises UserError for unusable weights, samples that don't fit, and a dataset in which no label is trained.
    """

    def __init__(
        self,
        datasets: Sequence[tuple[Dataset, float | None]],
        seq_len: int,
        seed: int,
        *,
        packing: Packing = "best_fit",
        long: Literal["error", "cut", "drop"] = "error",
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self.datasets = [dataset for dataset, _ in datasets]
        self.seq_len, self.seed, self.packing, self.rank, self.size = seq_len, seed, packing, rank, size
        self.too_long: dict[str, int] = {}  # prefix -> samples longer than a row, cut or dropped
        self.cut_empty: dict[str, int] = {}  # prefix -> those of them that have no trained token left, dropped too
        self.cursor = 0
        self._plans = [self._plan(number, dataset, long) for number, dataset in enumerate(self.datasets)]
        self._rows = _epoch_rows([len(plan) for plan in self._plans], [weight for _, weight in datasets])
        self.epoch_rows = sum(self._rows)
        self._order = _interleave(self._rows)
        facts = [[dataset.fingerprint() for dataset in self.datasets], self._rows, seq_len, seed, packing, long]
        self._fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self._permutation = lru_cache(maxsize=2 * len(self._plans))(self._permute)

    @property
    def epoch(self) -> int:
        return self.cursor // self.epoch_rows

    def next_batch(self, n_rows: int) -> list[PackedRow]:
        """This rank's `n_rows` rows of the next `n_rows * size`; moves the cursor past all of them."""
        first = self.cursor + self.rank * n_rows
        self.cursor += n_rows * self.size
        return [self.row(index) for index in range(first, first + n_rows)]

    def validation_batches(self, n_rows: int) -> Iterator[list[PackedRow]]:
        """Every row of the first epoch once; the last batch is filled with rows of padding.

        All ranks get the same number of batches. The cursor doesn't move.
        """
        for start in range(0, self.epoch_rows, n_rows * self.size):
            first = start + self.rank * n_rows
            yield [
                self.row(index) if index < self.epoch_rows else self._build(0, [])
                for index in range(first, first + n_rows)
            ]

    def row(self, index: int) -> PackedRow:
        """The row with this global number."""
        epoch, in_epoch = divmod(index, self.epoch_rows)
        number, nth = (int(column[in_epoch]) for column in self._order)
        repetition, row = divmod(epoch * self._rows[number] + nth, len(self._plans[number]))
        return self._build(number, self._plans[number].row(int(self._permutation(number, repetition)[row])))

    def state_dict(self) -> dict[str, Any]:
        """The position in the data: rows consumed by all ranks together, and a fingerprint of the data."""
        return {"cursor": self.cursor, "epoch": self.epoch, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved position; UserError when the data, their mixture, row length or seed differ."""
        if state["fingerprint"] != self._fingerprint:
            raise UserError(
                "The data are not those that the checkpoint was trained on: stores, tokenizer, weights, row length, "
                "packing or seed differ; give the same to resume, or start a new run from the checkpoint's weights."
            )
        self.cursor = int(state["cursor"])

    def _plan(self, number: int, dataset: Dataset, long: str) -> Plan:
        lengths = np.asarray(dataset.lengths)
        if dataset.labels is not None:
            if not _any_trained(dataset):
                raise UserError(f"{dataset.prefix}: all labels are masked, so there is nothing to train on.")
            over = lengths > (self.seq_len if self.packing != "concat" else lengths)
            count = int(over.sum())
            if count and long == "error":
                raise UserError(
                    f"{count:,} of {len(lengths):,} samples of {dataset.prefix} do not fit a row of {self.seq_len} "
                    f"tokens (the longest has {int(lengths.max()):,}): raise the sequence length, or cut or drop them."
                )
            if count:
                self.too_long[dataset.prefix] = count
                lengths = np.where(over, 0 if long == "drop" else self.seq_len, lengths)
                cut = np.flatnonzero(over & (lengths > 0)).tolist()
                empty = [i for i in cut if not _trains(dataset, i, lengths)]
                lengths[empty] = 0
                if empty:
                    self.cut_empty[dataset.prefix] = len(empty)
                remaining = np.flatnonzero(lengths).tolist()
                if (empty or remaining) and not any(_trains(dataset, i, lengths) for i in remaining):
                    raise UserError(
                        f"{dataset.prefix} has nothing left to train on: {count:,} of {len(lengths):,} samples are"
                        f" longer than a row of {self.seq_len:,} tokens, and all trained tokens are in what is left"
                        " out; raise the sequence length."
                    )
        plan = PACKINGS[self.packing](lengths, self.seq_len, _seed(self.seed, number))
        if not len(plan):
            raise UserError(f"{dataset.prefix} has no sample that fits into {self.seq_len:,} tokens.")
        return plan

    def _permute(self, number: int, repetition: int) -> np.ndarray:
        """The order of a dataset's rows when they are used for the `repetition`-th time."""
        return np.random.default_rng(_seed(self.seed, number, repetition)).permutation(len(self._plans[number]))

    def _build(self, number: int, pieces: list[tuple[int, int, int]]) -> PackedRow:
        ids = np.zeros(self.seq_len, np.int64)
        labels = np.full(self.seq_len, IGNORED, np.int64)
        positions, documents = np.arange(self.seq_len), np.zeros(self.seq_len, np.int32)
        begin = 0
        for document, (sample, start, size) in enumerate(pieces):
            tokens, targets = self.datasets[number].sample(sample)
            end = begin + size
            ids[begin:end] = tokens[start : start + size]
            following = targets[start + 1 : start + size + 1]
            labels[begin : begin + len(following)] = following
            if self.packing == "concat":
                if begin:
                    labels[begin - 1] = targets[start]
            else:
                positions[begin:end] = np.arange(size)
                documents[begin:end] = document
            begin = end
        if begin < self.seq_len:
            positions[begin:] = np.arange(self.seq_len - begin)
            documents[begin:] = documents[begin - 1] + 1 if begin else 0
        return PackedRow(ids, labels, positions, documents, [(number, sample) for sample, _, _ in pieces])


def collate(rows: Sequence[PackedRow]) -> dict[str, torch.Tensor]:
    """ids, labels, positions (int64) and documents (int32) of rows as tensors [rows, seq_len]."""
    names = ("ids", "labels", "positions", "documents")
    return {name: torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in names}


def _any_trained(dataset: Dataset) -> bool:
    labels = dataset.labels.tokens if dataset.labels is not None else dataset.ids.tokens
    return any((labels[first : first + (1 << 20)] != IGNORED).any() for first in range(0, len(labels), 1 << 20))


def _trains(dataset: Dataset, sample: int, lengths: np.ndarray) -> bool:
    """Whether any of the first `lengths[sample]` tokens of an instruction sample predicts a trained one."""
    _, targets = dataset.sample(sample)
    return bool((targets[1 : lengths[sample] + 1] != IGNORED).any())


def _seed(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _epoch_rows(rows: list[int], weights: list[float | None]) -> list[int]:
    """The number of rows of an epoch that come from each dataset."""
    given = [weight for weight in weights if weight is not None]
    if not given:
        return rows
    if len(given) < len(weights) or min(given) <= 0:
        raise UserError("Give every dataset of a mixture a weight above 0, or none of them one.")
    exact = np.array(given) / sum(given) * sum(rows)
    counts = np.floor(exact).astype(int)
    missing = sum(rows) - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1  # largest remainders
    if not counts.all():
        raise UserError(
            "A dataset's weight is so small that no row of an epoch comes from it: raise it, or leave it out."
        )
    return counts.tolist()


def _interleave(rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(dataset, number of the row in it) of each row of an epoch: each dataset's rows at even distances."""
    dataset = np.repeat(np.arange(len(rows), dtype=np.int32), rows)
    nth = np.concatenate([np.arange(count) for count in rows])
    order = np.argsort((nth + 0.5) / np.array(rows)[dataset], kind="stable")
    return dataset[order], nth[order]
