"""Packing of documents into rows of one length, decided by the lengths and a seed alone.

Everything here works on arrays of lengths, so that a plan for millions of documents takes seconds.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Rows of pieces. A piece is `size` tokens of document `doc`, from token `start`.

    Row r holds the pieces `bounds[r]` to `bounds[r + 1]`, in this order.
    """

    doc: np.ndarray  # int64 [pieces]
    start: np.ndarray  # int64 [pieces]
    size: np.ndarray  # int32 [pieces]
    bounds: np.ndarray  # int64 [rows + 1]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def row(self, index: int) -> list[tuple[int, int, int]]:
        """(doc, start, size) of each piece in a row."""
        pieces = slice(int(self.bounds[index]), int(self.bounds[index + 1]))
        return list(
            zip(self.doc[pieces].tolist(), self.start[pieces].tolist(), self.size[pieces].tolist(), strict=True)
        )


def split(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents cut into pieces of at most `capacity` tokens: (doc, start, size), in order. Empty ones give none."""
    lengths = np.asarray(lengths, np.int64)
    pieces = -(-lengths // capacity)
    doc = np.repeat(np.arange(len(lengths)), pieces)
    first = np.repeat(pieces.cumsum() - pieces, pieces)
    start = (np.arange(len(doc)) - first) * capacity
    return doc, start, np.minimum(lengths[doc] - start, capacity).astype(np.int32)


def best_fit(lengths: np.ndarray, capacity: int, seed: int) -> Plan:
    """Best-fit decreasing: longest piece first, into the fullest row that it still fits.

    `lengths` int [documents]. Pieces of one length are alike, so whole groups of them go to whole groups of rows, and
    `seed` decides which comes where.
    """
    doc, start, size = split(lengths, capacity)
    shuffled = np.random.default_rng(seed).permutation(len(doc))
    order = shuffled[np.argsort(-size[shuffled], kind="stable")]
    row = np.empty(len(doc), np.int64)  # of each piece
    rows = 0
    rows_by_free: dict[int, list[np.ndarray]] = {}  # free tokens -> the rows with that many
    free: list[int] = []  # the keys of `rows_by_free`, ascending
    edges = np.flatnonzero(np.diff(size[order], prepend=-1, append=-1))
    for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        todo, length = order[first:last], int(size[order[first]])
        while len(todo):
            index = bisect_left(free, length)
            if index < len(free):
                space = free.pop(index)
                groups = rows_by_free.pop(space)
                targets = groups[0] if len(groups) == 1 else np.concatenate(groups)
            else:
                space = capacity
                targets = np.arange(rows, rows + -(-len(todo) // (capacity // length)))
                rows += len(targets)
            # Best fit keeps filling the row that received the last piece of this length.
            each = space // length
            used = min(len(targets), -(-len(todo) // each))
            taken = todo[: used * each]
            row[taken] = np.repeat(targets[:used], each)[: len(taken)]
            whole = len(taken) // each
            left = space - (len(taken) - whole * each) * length
            for rest, part in (
                (space - each * length, targets[:whole]),
                (left, targets[whole:used]),
                (space, targets[used:]),
            ):
                if len(part) and rest:
                    if rest not in rows_by_free:
                        insort(free, rest)
                    rows_by_free.setdefault(rest, []).append(part)
            todo = todo[len(taken) :]
    return _gather(doc, start, size, row, rows, shuffled)


def concatenate(lengths: np.ndarray, capacity: int, seed: int) -> Plan:
    """The shuffled documents end to end, cut every `capacity` tokens; only the last row is shorter."""
    lengths = np.asarray(lengths, np.int64)
    order = np.random.default_rng(seed).permutation(len(lengths))
    ends = lengths[order].cumsum()
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(ends, np.arange(capacity, total, capacity))
    begins = np.concatenate([[0], cuts[:-1]]) if len(cuts) else cuts
    keep = cuts > begins
    begins, cuts = begins[keep], cuts[keep]
    document = np.searchsorted(ends, begins, side="right")
    start = begins - (ends[document] - lengths[order[document]])
    row = begins // capacity
    bounds = np.searchsorted(row, np.arange(-(-total // capacity) + 1))
    return Plan(order[document], start, (cuts - begins).astype(np.int32), bounds)


def one_each(lengths: np.ndarray, capacity: int, seed: int) -> Plan:
    """A row for every piece. The loader shuffles rows, so `seed` decides nothing here."""
    doc, start, size = split(lengths, capacity)
    return Plan(doc, start, size, np.arange(len(doc) + 1))


PACKINGS = {"best_fit": best_fit, "concat": concatenate, "none": one_each}


def _gather(
    doc: np.ndarray, start: np.ndarray, size: np.ndarray, row: np.ndarray, rows: int, shuffled: np.ndarray
) -> Plan:
    """The plan in which piece i is in `row[i]`; pieces within a row in shuffled order."""
    order = shuffled[np.argsort(row[shuffled], kind="stable")]
    bounds = np.concatenate([[0], np.bincount(row, minlength=rows).cumsum()])
    return Plan(doc[order], start[order], size[order], bounds)
