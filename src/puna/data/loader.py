"""From stores to batches: packed rows, shuffled, mixed by weight, dealt over the data-parallel ranks.

Rows are numbered 0, 1, 2 ... without end. What a row holds follows from the stores, the row length and the seed; a
global batch is the next so many rows, whoever computes which of them. So the place in the data is one number, and a run
may go on with other ranks and another batch size without seeing a sample twice or leaving one out.
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
    """One row of `seq_len` tokens; everything int [seq_len].

    `labels[t]` is the token that follows `ids[t]` in the same document, -100 at its end, for prompts and for padding.
    `positions` restart with each document; `documents` numbers the documents of the row, padding has its own number.
    `samples` names what the row holds: (store, sample) in the order of their documents.
    """

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    documents: np.ndarray
    samples: list[tuple[int, int]]


class PackedLoader:
    """Rows of packed samples from one or more datasets.

    datasets: (dataset, weight) pairs. All weights None: an epoch is every sample once. Else weights are shares of the
      rows, the epoch has as many rows as all datasets together, and small datasets come round more than once.
    packing: "best_fit" fills rows with whole documents that don't see one another; "concat" strings all documents
      together as Megatron-LM does, so that they do; "none" gives each document a row, padded.
    long: what becomes of instruction samples longer than a row: "error" (UserError with their number), "cut" to its
      length (dropped when no trained token is left), or "drop". Text is split into pieces, and each piece but the last
      also predicts the token that follows it; "concat" splits everything.
    rank, size: this data-parallel rank and how many there are.

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
        self._shares = _shares([len(plan) for plan in self._plans], [weight for _, weight in datasets])
        self.epoch_rows = sum(self._shares)
        self._order = _interleave(self._shares)
        facts = [[dataset.fingerprint() for dataset in self.datasets], self._shares, seq_len, seed, packing, long]
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
        """Every row of the first epoch once, for validation; the last batch is filled with rows of padding.

        All ranks get equally many batches. The cursor stays where it is.
        """
        for start in range(0, self.epoch_rows, n_rows * self.size):
            first = start + self.rank * n_rows
            yield [
                self.row(index) if index < self.epoch_rows else self._build(0, [])
                for index in range(first, first + n_rows)
            ]

    def row(self, index: int) -> PackedRow:
        """The row with this global number."""
        epoch, place = divmod(index, self.epoch_rows)
        store, rank = (int(column[place]) for column in self._order)
        turn, own = divmod(epoch * self._shares[store] + rank, len(self._plans[store]))
        return self._build(store, self._plans[store].row(int(self._permutation(store, turn)[own])))

    def state_dict(self) -> dict[str, Any]:
        """The place in the data: rows consumed by all ranks together, and what they were taken from."""
        return {"cursor": self.cursor, "epoch": self.epoch, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved place; UserError when the data, their mixture, row length or seed is another one."""
        if state["fingerprint"] != self._fingerprint:
            raise UserError(
                "the data are not those that the checkpoint was trained on: stores, tokenizer, weights, row length, "
                "packing or seed differ; give the same to resume, or start a new run from the checkpoint's weights"
            )
        self.cursor = int(state["cursor"])

    def _plan(self, number: int, dataset: Dataset, long: str) -> Plan:
        lengths = np.asarray(dataset.lengths)
        if dataset.labels is not None:
            if not _any_trained(dataset):
                raise UserError(f"{dataset.prefix}: all labels are masked, so there is nothing to train on")
            over = lengths > (self.seq_len if self.packing != "concat" else lengths)
            count = int(over.sum())
            if count and long == "error":
                raise UserError(
                    f"{count:,} of {len(lengths):,} samples of {dataset.prefix} do not fit a row of {self.seq_len} "
                    f"tokens (the longest has {int(lengths.max()):,}): raise the sequence length, or cut or drop them"
                )
            if count:
                self.too_long[dataset.prefix] = count
                lengths = np.where(over, 0 if long == "drop" else self.seq_len, lengths)
                empty = (
                    []
                    if long == "drop"
                    else [i for i in np.flatnonzero(over).tolist() if not _trains(dataset, i, lengths)]
                )
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
            raise UserError(f"{dataset.prefix} has no sample that fits into {self.seq_len:,} tokens")
        return plan

    def _permute(self, store: int, turn: int) -> np.ndarray:
        """The order of a store's rows when it comes round for the `turn`-th time."""
        return np.random.default_rng(_seed(self.seed, store, turn)).permutation(len(self._plans[store]))

    def _build(self, store: int, pieces: list[tuple[int, int, int]]) -> PackedRow:
        ids = np.zeros(self.seq_len, np.int64)
        labels = np.full(self.seq_len, IGNORED, np.int64)
        positions, documents = np.arange(self.seq_len), np.zeros(self.seq_len, np.int32)
        at = 0
        for number, (sample, start, size) in enumerate(pieces):
            tokens, targets = self.datasets[store].sample(sample)
            end = at + size
            ids[at:end] = tokens[start : start + size]
            following = targets[start + 1 : start + size + 1]
            labels[at : at + len(following)] = following
            if self.packing == "concat":
                if at:
                    labels[at - 1] = targets[start]
            else:
                positions[at:end] = np.arange(size)
                documents[at:end] = number
            at = end
        if at < self.seq_len:
            positions[at:] = np.arange(self.seq_len - at)
            documents[at:] = documents[at - 1] + 1 if at else 0
        return PackedRow(ids, labels, positions, documents, [(store, sample) for sample, _, _ in pieces])


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


def _seed(*parts: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def _shares(rows: list[int], weights: list[float | None]) -> list[int]:
    """How many rows of an epoch come from each dataset."""
    given = [weight for weight in weights if weight is not None]
    if not given:
        return rows
    if len(given) < len(weights) or min(given) <= 0:
        raise UserError("give every dataset of a mixture a weight above 0, or none of them one")
    exact = np.array(given) / sum(given) * sum(rows)
    shares = np.floor(exact).astype(int)
    short = sum(rows) - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:short]] += 1  # largest remainders
    if not shares.all():
        raise UserError(
            "a dataset's weight is so small that no row of an epoch comes from it: raise it, or leave it out"
        )
    return shares.tolist()


def _interleave(shares: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(dataset, its how-manieth row) of each row of an epoch: each dataset's rows at even distances."""
    store = np.repeat(np.arange(len(shares), dtype=np.int32), shares)
    rank = np.concatenate([np.arange(share) for share in shares])
    order = np.argsort((rank + 0.5) / np.array(shares)[store], kind="stable")
    return store[order], rank[order]
