"""Static lengths for a corpus: the best there are, by trying all; and what the usual ways waste, by doing it."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.lengths import LengthsError, candidates, propose, waste
from data_pipelines.pipeline import DataConfig, rows_per_step


def cropped(samples, lengths, longest) -> int:
    return sum(min(n, longest) - max(length for length in lengths if length <= n) for n in samples)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(9_000, 90_000), min_size=1, max_size=30), st.integers(1, 4))
def test_no_other_choice_leaves_less_off(samples, count):
    found = propose(np.array(samples), count=count, seconds_per_step=4.0, longest=32_000)
    choice = candidates(seconds_per_step=4.0, shortest=min(*samples, 32_000) // 2, longest=32_000).tolist()
    least = min(
        cropped(samples, lengths, 32_000)
        for n in range(1, count + 1)
        for lengths in itertools.combinations(choice, n)
        if lengths[0] <= min(samples)
    )
    assert cropped(samples, found.lengths, 32_000) == least
    assert found.cropped == pytest.approx(least / sum(min(n, 32_000) for n in samples))


@pytest.mark.parametrize("seconds", [16.0, 64.0, 2880.0])
def test_what_is_proposed_can_be_declared(seconds):
    samples = np.random.default_rng(0).gamma(4, 20_000, 500).astype(int) + 30_000
    found = propose(samples, count=4, seconds_per_step=seconds, longest=128_000)
    cfg = DataConfig(lengths=found.lengths, seconds_per_step=seconds)
    assert tuple(rows_per_step(length, cfg=cfg) for length in found.lengths) == found.rows
    more = propose(samples, count=6, seconds_per_step=seconds, longest=128_000)
    one = propose(samples, count=1, seconds_per_step=seconds, longest=128_000)
    assert more.cropped < found.cropped < one.cropped


def test_too_short_an_utterance():
    with pytest.raises(LengthsError, match=r"shortest utterance has 300 samples.*min-seconds"):
        propose(np.array([300, 64_000]), count=2, seconds_per_step=4.0, longest=64_000)


def test_waste_by_hand():
    """Batches of 40,000 samples: (10, 20), (20, 10) as they lie, or (10, 10), (20, 20); in thousands."""
    samples = 1000 * np.array([10, 20, 20, 10])
    found = waste(samples, lengths=(8000, 16_000), tokens=40_000)
    assert found.unheard == pytest.approx((2 + 4 + 4 + 2) / 60)
    # sorted: 10, 10 (with a row of 20 it would be 60 in all), then 20, 20: nothing is padded or cropped off
    assert found.padded_sorted == found.cropped_sorted == 0
    assert found.padded in (0, pytest.approx(1 / 4)) and found.cropped in (0, pytest.approx(1 / 3))  # 2 orders
    same = waste(np.full(7, 16_000), lengths=(16_000,))
    assert same == pytest.approx((0, 0, 0, 0, 0))
    long = waste(np.full(5, 500_000), lengths=(250_000,))
    assert long.unheard == 0 and long.cropped == pytest.approx(0.5)  # fairseq keeps 250,000 of them


def test_the_command_says_what_to_declare(corpus):
    run = subprocess.run(
        [sys.executable, "-m", "data_pipelines", "lengths", str(corpus.root), "--count", "2",
         "--seconds-per-step", "12", "--longest-seconds", "3"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    train = corpus.samples[corpus.rows(0)]
    found = propose(train, count=2, seconds_per_step=12.0, longest=48_000)
    lengths = " ".join(map(str, found.lengths))
    assert f"--data.lengths {lengths} --data.seconds-per-step 12" in run.stdout
    assert all(f"\n{name} " in run.stdout for name in ("deu", "eng", "fra"))
