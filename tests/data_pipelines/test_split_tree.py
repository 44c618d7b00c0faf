"""What the draw is made of: permutations, the tree that deals rows out to leaves, and the shares of leaves."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.sampling import (
    DrawConfig,
    SamplingError,
    SplitTree,
    hash64,
    leaf_shares,
    permute,
    permute_blocks,
)
from tests.data_pipelines.dealing import had_by

# --- the numbers underneath ---


def test_hash64_is_splitmix64():
    # First output of Vigna's splitmix64.c from state 0, and of state 0 advanced twice by the golden ratio.
    assert hash64(0) == 0xE220A8397B1DCDAF
    assert hash64(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4


@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, seed):
    assert sorted(permute(i, size=size, seed=seed) for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_orders_of_few_things_are_equally_likely(size):
    orders = Counter(tuple(permute(i, size=size, seed=hash64(seed)) for i in range(size)) for seed in range(6000))
    assert len(orders) == math.factorial(size)
    expected = 6000 / len(orders)
    chi_square = sum((count - expected) ** 2 / expected for count in orders.values())
    degrees = len(orders) - 1
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


def test_neighbours_are_scattered():
    size = 97
    steps = np.bincount(
        [(permute(1, size=size, seed=hash64(k)) - permute(0, size=size, seed=hash64(k))) % size for k in range(9600)],
        minlength=size,
    )
    assert steps[0] == 0
    assert ((steps[1:] - 100) ** 2 / 100).sum() < 96 + 5 * math.sqrt(2 * 96)


@given(st.integers(1, 60), st.integers(0, 5), st.integers(0, 2**64 - 1))
def test_blocks_stay_together(block, number, seed):
    moved = [permute_blocks(k, block=block, seed=seed) for k in range(number * block, (number + 1) * block)]
    assert sorted(moved) == list(range(number * block, (number + 1) * block))


# --- the tree ---

weight_lists = st.lists(st.integers(1, 1000), min_size=1, max_size=12)


def deal(tree: SplitTree, count: int) -> dict[int, list[int]]:
    dealt = defaultdict(list)
    for k in range(count):
        located = tree.locate(k)
        dealt[located.leaf].append(located.index)
    return dealt


@settings(deadline=None)
@given(weight_lists, st.integers(1, 400))
def test_leaves_receive_0_1_2_without_gap(weights, count):
    for indices in deal(SplitTree(weights), count).values():
        assert indices == list(range(len(indices)))


@settings(deadline=None)
@given(weight_lists, st.integers(1, 400))
def test_every_prefix_is_within_depth_of_expectation(weights, count):
    tree = SplitTree(weights)
    counts = np.zeros(len(weights))
    share = np.array(weights) / sum(weights)
    for k in range(count):
        counts[tree.locate(k).leaf] += 1
        assert np.abs(counts - share * (k + 1)).max() <= tree.depth()


@settings(deadline=None)
@given(weight_lists)
def test_one_period_is_exact(weights):
    """After as many numbers as the weights sum to, every leaf has had exactly its weight, and so again afterwards."""
    tree = SplitTree(weights)
    total = sum(weights)
    for leaf, indices in deal(tree, min(total, 3000)).items():
        if total <= 3000:
            assert len(indices) == weights[leaf]
    far = 10**15 * total
    assert [tree.locate(far + k).leaf for k in range(50)] == [tree.locate(k).leaf for k in range(50)]


def test_the_rule_by_hand():
    """Two leaves: number k goes to the heavier one iff floor((k+1) l / w) > floor(k l / w)."""
    tree = SplitTree([3, 7])
    for k in range(100):
        left = (k + 1) * 7 // 10 > k * 7 // 10
        assert tree.locate(k) == ((1, k * 7 // 10) if left else (0, k - k * 7 // 10))


def test_float_weights_are_kept_to_float_precision():
    weights = [0.1, 0.2, 0.3, 0.4, 1e-4]
    counts = had_by(SplitTree(weights), 10**12)
    assert sum(counts) == 10**12
    assert counts == pytest.approx(np.array(weights) / sum(weights) * 10**12, abs=10)


def test_depth_is_logarithmic():
    assert SplitTree([1] * 4096).depth() == 12
    assert SplitTree([5]).depth() == 0


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1.0, math.nan], [1.0, math.inf]])
def test_weights_that_cannot_be_dealt(weights):
    with pytest.raises(SamplingError):
        SplitTree(weights)


# --- shares ---


def test_leaf_shares_by_hand():
    seconds = {("a", "x"): 90.0, ("a", "y"): 10.0, ("b", "x"): 25.0, ("c", "x"): 0.0}
    shares = leaf_shares(seconds, cfg=DrawConfig(language_exponent=0.5, corpus_exponent=0.5))
    # sqrt(100) : sqrt(25) = 2 : 1, and inside a sqrt(90) : sqrt(10) = 3 : 1
    assert shares == pytest.approx({("a", "x"): 0.5, ("a", "y"): 1 / 6, ("b", "x"): 1 / 3})


def test_exponents_one_are_as_found_and_zero_are_equal():
    seconds = {("a", "x"): 90.0, ("a", "y"): 10.0, ("b", "x"): 25.0}
    assert leaf_shares(seconds, cfg=DrawConfig(1, 1)) == pytest.approx({k: s / 125 for k, s in seconds.items()})
    assert leaf_shares(seconds, cfg=DrawConfig(0, 0)) == pytest.approx(
        {("a", "x"): 0.25, ("a", "y"): 0.25, ("b", "x"): 0.5}
    )


def test_large_exponents_do_not_overflow():
    shares = leaf_shares({("a", "x"): 1e8, ("b", "x"): 1e7}, cfg=DrawConfig(500.0, 500.0))
    assert shares[("a", "x")] == 1.0 and sum(shares.values()) == 1.0


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["language_exponent", "corpus_exponent"])
def test_exponents_that_cannot_be_meant(name, value):
    with pytest.raises(SamplingError, match=name):
        DrawConfig(**{name: value})


@pytest.mark.parametrize("seconds", [{}, {("a", "x"): 0.0}, {("a", "x"): -1.0}, {("a", "x"): math.nan}])
def test_seconds_that_cannot_be_shared(seconds):
    with pytest.raises(SamplingError):
        leaf_shares(seconds, cfg=DrawConfig())
