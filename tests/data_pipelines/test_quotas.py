"""Numbers dealt to leaves: within one draw of the quota in every period, without gaps, from any period on."""

import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.quotas import CYCLE, QUOTA_LAG, QuotaError, Quotas

weight_lists = st.lists(st.one_of(st.integers(1, 1000), st.floats(1e-6, 1.0)), min_size=1, max_size=12)


@settings(deadline=None)
@given(weight_lists, st.integers(1, 60), st.integers(0, 2**64 - 1), st.integers(1, 20))
def test_every_period_is_within_one_draw_of_every_quota(weights, period, seed, periods):
    """Counted; and what each leaf got is numbered without a gap, and is what `given` says without counting."""
    quotas = Quotas(weights, period=period, seed=seed)
    quota = np.array(weights) / sum(weights) * period
    indices, total = defaultdict(list), np.zeros(len(weights), np.int64)
    for t in range(periods):
        np.testing.assert_array_equal(quotas.given(t), total)
        dealt = quotas.dealt(t)
        counts = np.bincount(dealt.leaf, minlength=len(weights))
        assert counts.sum() == period and (np.abs(counts - quota) < 1 + 1e-6).all()
        total += counts
        for leaf in range(len(weights)):
            indices[leaf] += sorted(dealt.index[dealt.leaf == leaf].tolist())
    for had in indices.values():
        assert had == list(range(len(had)))


@settings(deadline=None, max_examples=30)
@given(weight_lists, st.integers(1, 4096), st.integers(0, 10**12))
def test_what_was_given_since_the_start_stays_with_the_shares(weights, period, t):
    """Within 6 draws, however far: the golden ratio spreads the rounding evenly."""
    quotas = Quotas(weights, period=period, seed=t)
    exact = [t * int(part) / CYCLE for part in np.diff(quotas.upper, prepend=0)]
    np.testing.assert_allclose(quotas.given(t), exact, rtol=1e-13, atol=QUOTA_LAG)
    counts = np.bincount(quotas.dealt(t).leaf, minlength=len(weights))
    np.testing.assert_array_equal(quotas.given(t + 1) - quotas.given(t), counts)


def test_a_whole_cycle_is_exact():
    quotas = Quotas([0.1, 0.2, 0.3, 0.4, 1e-4], period=10, seed=1)
    np.testing.assert_array_equal(quotas.given(CYCLE), np.diff(quotas.upper, prepend=0))
    np.testing.assert_array_equal(quotas.given(CYCLE + 5), quotas.given(CYCLE) + quotas.given(5))
    expected = np.array([0.1, 0.2, 0.3, 0.4, 1e-4]) / 1.0001 * 10 * CYCLE
    np.testing.assert_allclose(quotas.given(CYCLE), expected, atol=3)


def test_a_leaf_of_a_thousandth_of_a_draw_comes_evenly():
    quotas = Quotas([0.001, 9.999], period=10, seed=7)
    periods = np.arange(0, 40_000, 100)
    had = np.array([quotas.given(t)[0] for t in periods])
    assert np.abs(had - periods / 1000).max() < 3
    assert had[-1] > 30 and np.diff(np.flatnonzero(np.diff(had))).max() < 30  # never 3,000 periods without one


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1.0, math.nan], [1.0, math.inf]])
def test_weights_that_cannot_be_dealt(weights):
    with pytest.raises(QuotaError):
        Quotas(weights, period=4)


def test_periods_that_cannot_be():
    with pytest.raises(QuotaError, match="period of 0"):
        Quotas([1], period=0)
