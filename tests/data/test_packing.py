"""A plan holds every token once, no row is too long, and best fit is the best-fit-decreasing of the textbook."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.data.packing import PACKINGS, Plan, best_fit, concatenate, one_each

LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=60)
CAPACITY = st.integers(1, 40)


def pieces(plan: Plan) -> list[list[tuple[int, int, int]]]:
    return [plan.row(index) for index in range(len(plan))]


def textbook(lengths: list[int], capacity: int) -> list[int]:
    """Free tokens of each row, by best-fit decreasing one piece after another."""
    parts = [min(capacity, n - start) for n in lengths for start in range(0, n, capacity)]
    free: list[int] = []
    for part in sorted(parts, reverse=True):
        fitting = [row for row in range(len(free)) if free[row] >= part]
        if fitting:
            free[min(fitting, key=lambda row: free[row])] -= part
        else:
            free.append(capacity - part)
    return sorted(free)


@pytest.mark.parametrize("name", PACKINGS)
@given(lengths=LENGTHS, capacity=CAPACITY, seed=st.integers(0, 3))
def test_every_token_is_in_one_row(name, lengths, capacity, seed):
    rows = pieces(PACKINGS[name](np.array(lengths), capacity, seed))
    assert all(0 < sum(size for _, _, size in row) <= capacity for row in rows)
    tokens = sorted((doc, start + i) for row in rows for doc, start, size in row for i in range(size))
    assert tokens == [(doc, i) for doc, length in enumerate(lengths) for i in range(length)]


@given(lengths=LENGTHS, capacity=CAPACITY, seed=st.integers(0, 3))
def test_best_fit_is_the_textbooks(lengths, capacity, seed):
    rows = pieces(best_fit(np.array(lengths), capacity, seed))
    assert sorted(capacity - sum(size for _, _, size in row) for row in rows) == textbook(lengths, capacity)
    assert all(start % capacity == 0 for row in rows for _, start, _ in row)  # only what is too long is split


@given(lengths=LENGTHS, capacity=CAPACITY, seed=st.integers(0, 3))
def test_concatenation_leaves_no_gap(lengths, capacity, seed):
    rows = pieces(concatenate(np.array(lengths), capacity, seed))
    assert all(sum(size for _, _, size in row) == capacity for row in rows[:-1])
    tokens = [(doc, start + i) for row in rows for doc, start, size in row for i in range(size)]
    order = list(dict.fromkeys(doc for doc, _ in tokens))
    assert tokens == [(doc, i) for doc in order for i in range(lengths[doc])]  # documents are whole, one after another


def test_the_seed_decides_who_shares_a_row():
    lengths = np.random.default_rng(0).integers(1, 30, 400)
    for pack in (best_fit, concatenate):
        assert pieces(pack(lengths, 64, 1)) == pieces(pack(lengths, 64, 1)) != pieces(pack(lengths, 64, 2))
    assert pieces(one_each(np.array([3, 0, 9]), 4, 0)) == [[(0, 0, 3)], [(2, 0, 4)], [(2, 4, 4)], [(2, 8, 1)]]


def test_packing_wastes_next_to_nothing():
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1, 50_000).astype(int) + 1, 4096)
    plan = best_fit(lengths, 4096, 0)
    assert lengths.sum() / (len(plan) * 4096) > 0.999
