"""Mixed bits, and pseudo-random orders without memory."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.permutations import hash64, mix64, permute


def test_hash64_is_splitmix64():
    # First output of Vigna's splitmix64.c from state 0, and of state 0 advanced twice by the golden ratio.
    assert hash64(0) == 0xE220A8397B1DCDAF
    assert hash64(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5), st.integers(0, 2**64 - 1))
def test_arrays_are_mixed_as_numbers_are(values, seed):
    assert mix64(np.uint64(hash64(seed)), np.array(values)).tolist() == [hash64(seed, value) for value in values]


@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, seed):
    assert sorted(permute(np.arange(size), size=size, seed=seed).tolist()) == list(range(size))


@given(st.lists(st.tuples(st.integers(1, 2**40), st.integers(0, 2**64 - 1), st.integers(0, 2**40)), min_size=1))
def test_each_number_may_have_its_own_size_and_seed(asked):
    sizes, seeds, numbers = (np.array(each, np.uint64) for each in zip(*asked, strict=True))
    found = permute(numbers % sizes, size=sizes, seed=seeds)
    assert (found >= 0).all() and (found < sizes.astype(np.int64)).all()
    alone = [permute(n % size, size=size, seed=seed)[0] for n, size, seed in zip(numbers, sizes, seeds, strict=True)]
    assert found.tolist() == alone


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_of_few_things_are_equally_likely(size):
    seeds = np.array([hash64(seed) for seed in range(6000)], np.uint64)
    places = np.stack([permute(np.full(6000, i), size=size, seed=seeds) for i in range(size)], 1)
    orders = Counter(map(tuple, places.tolist()))
    assert len(orders) == math.factorial(size)
    expected = 6000 / len(orders)
    chi_square = sum((count - expected) ** 2 / expected for count in orders.values())
    degrees = len(orders) - 1
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


def test_neighbours_are_scattered():
    size, seeds = 97, np.array([hash64(k) for k in range(9600)], np.uint64)
    first, second = (permute(np.full(9600, i), size=size, seed=seeds) for i in (0, 1))
    steps = np.bincount((second - first) % size, minlength=size)
    assert steps[0] == 0
    assert ((steps[1:] - 100) ** 2 / 100).sum() < 96 + 5 * math.sqrt(2 * 96)
