import dataclasses
import math

import numpy as np
import pytest
import scipy.signal
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.mixing import (
    UNMIXED,
    Interference,
    MixingConfig,
    MixingError,
    babble,
    energy,
    interference_scale,
    mix,
    plan_mixture,
    shaped_noise,
)

SAMPLES = 16_000


def noise(seed, samples=SAMPLES, level=0.1):
    return (np.random.default_rng(seed).standard_normal(samples) * level).astype(np.float32)


def decibels(ratio):
    return 10 * math.log10(ratio)


@given(st.floats(-30, 30), st.floats(1e-3, 1), st.floats(1e-3, 1), st.integers(0, 1000))
def test_the_ratio_achieved_is_the_one_asked_for(snr_db, loud, quiet, seed):
    primary, secondary = noise(seed, level=loud), noise(seed + 1, level=quiet)
    mixed = mix(primary, secondary, snr_db=snr_db, length=SAMPLES, primary_start=0, secondary_start=0)
    added = mixed.astype(np.float64) - primary
    measured = decibels(np.mean(primary.astype(np.float64) ** 2) / np.mean(added**2))
    assert measured == pytest.approx(snr_db, abs=0.02)


@given(st.data())
def test_only_the_stretch_changes_and_only_by_the_stretch(data):
    length = data.draw(st.integers(1, 500))
    primary_start, secondary_start = (data.draw(st.integers(0, 1000 - length)) for _ in range(2))
    primary, secondary = noise(1, 1000), noise(2, 1000)
    mixed = mix(
        primary, secondary, snr_db=3.0, length=length, primary_start=primary_start, secondary_start=secondary_start
    )
    expected = primary.astype(np.float64)
    scale = np.sqrt(np.mean(primary.astype(float) ** 2) / (10**0.3 * np.mean(secondary.astype(float) ** 2)))
    for k in range(length):
        expected[primary_start + k] += scale * secondary[secondary_start + k]
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    untouched = np.ones(1000, bool)
    untouched[primary_start : primary_start + length] = False
    assert np.array_equal(mixed[untouched], primary[untouched])
    assert mixed.dtype == np.float32


def test_energies_are_those_of_the_whole_waveforms():
    """A pause where the stretch is taken from must not be blown up to the level of speech."""
    primary, secondary = noise(1), noise(2)
    secondary[:8000] *= 1e-4
    mixed = mix(primary, secondary, snr_db=0.0, length=4000, primary_start=0, secondary_start=0)
    assert np.abs(mixed - primary).max() < 1e-3


def test_nothing_is_changed_in_place():
    primary, secondary = noise(1), noise(2)
    before = primary.copy(), secondary.copy()
    mixed = mix(primary, secondary, snr_db=-5.0, length=8000, primary_start=10, secondary_start=20)
    assert np.array_equal(primary, before[0]) and np.array_equal(secondary, before[1])
    assert not np.shares_memory(mixed, primary)
    assert not np.array_equal(mixed, primary)


@pytest.mark.parametrize("silent", ["primary", "secondary", "both"])
def test_silence_stays_unmixed(silent):
    primary = np.zeros(SAMPLES, np.float32) if silent != "secondary" else noise(1)
    secondary = np.zeros(SAMPLES, np.float32) if silent != "primary" else noise(2)
    assert interference_scale(primary, secondary, snr_db=0.0) == 0.0
    mixed = mix(primary, secondary, snr_db=0.0, length=8000, primary_start=0, secondary_start=0)
    assert np.array_equal(mixed, primary) and not np.shares_memory(mixed, primary)


def test_the_faintest_that_int16_can_hold_is_not_silence():
    faint = np.zeros(SAMPLES, np.float32)
    faint[::2] = 1 / 32768
    assert interference_scale(faint, noise(1), snr_db=0.0) > 0


@pytest.mark.parametrize("stretch", [(0, 0, 0), (9, 92, 0), (9, 0, 92), (9, -1, 0)])
def test_a_stretch_that_does_not_fit_is_refused(stretch):
    length, primary_start, secondary_start = stretch
    with pytest.raises(MixingError, match="do not lie in the"):
        mix(
            noise(1, 100),
            noise(2, 100),
            snr_db=0.0,
            length=length,
            primary_start=primary_start,
            secondary_start=secondary_start,
        )


# --- what is planned ---


def plans(cfg, count, samples=SAMPLES):
    return [plan_mixture(np.random.default_rng([7, n]), cfg=cfg, samples=samples) for n in range(count)]


def assert_share(count, total, share):
    assert abs(count - share * total) < 4 * math.sqrt(total * share * (1 - share)), (count / total, share)


def test_how_often_and_what():
    cfg = MixingConfig()
    total = 20_000
    drawn = plans(cfg, total)
    mixed = [plan for plan in drawn if plan.kind is not Interference.NONE]
    noises = [plan for plan in mixed if plan.kind is not Interference.SPEECH]
    babbles = [plan for plan in noises if plan.kind is Interference.BABBLE]
    assert_share(len(mixed), total, 0.2)
    assert_share(len(noises), len(mixed), 0.1)
    assert_share(len(babbles), len(noises), 0.5)
    assert {plan.kind for plan in noises} == {Interference.BABBLE, Interference.SHAPED}
    assert {plan.voices for plan in babbles} == {4, 5, 6, 7, 8}
    assert {plan.voices for plan in mixed if plan.kind is Interference.SPEECH} == {1}
    assert all(plan == UNMIXED for plan in drawn if plan.kind is Interference.NONE)


def test_levels_lengths_and_starts_are_uniform():
    speech = plans(MixingConfig(probability=1.0, noise_share=0.0), 4000)
    noises = plans(MixingConfig(probability=1.0, noise_share=1.0), 4000)
    for drawn, least, most in ((speech, -5, 5), (noises, -5, 20)):
        levels = [plan.snr_db for plan in drawn]
        assert scipy.stats.kstest(levels, scipy.stats.uniform(least, most - least).cdf).pvalue > 1e-3
        lengths = np.array([plan.length for plan in drawn])
        assert lengths.min() >= 1 and lengths.max() <= SAMPLES // 2
        assert scipy.stats.kstest(lengths, scipy.stats.uniform(0, SAMPLES // 2).cdf).pvalue > 1e-3
        for name in ("primary_start", "secondary_start"):
            where = [getattr(plan, name) / (SAMPLES - plan.length + 1) for plan in drawn]
            assert min(where) >= 0 and max(where) < 1
            assert scipy.stats.kstest(where, "uniform").pvalue > 1e-3
        together = np.corrcoef([plan.primary_start for plan in drawn], [plan.secondary_start for plan in drawn])[0, 1]
        assert together < 0.5  # the length ties them a little; the same draw for both would give 1


def test_the_longest_stretch_is_half_of_the_row_and_the_shortest_one_sample():
    lengths = {plan.length for plan in plans(MixingConfig(probability=1.0), 400, samples=11)}
    assert lengths == {1, 2, 3, 4, 5}


def test_a_noise_folder_takes_the_place_of_made_noise():
    kinds = {plan.kind for plan in plans(MixingConfig(probability=1.0, noise_folder="somewhere"), 300)}
    assert kinds == {Interference.SPEECH, Interference.RECORDED}


def test_probability_zero_and_one():
    assert {plan.kind for plan in plans(MixingConfig(probability=0.0), 200)} == {Interference.NONE}
    assert Interference.NONE not in {plan.kind for plan in plans(MixingConfig(probability=1.0), 200)}


@pytest.mark.parametrize(
    "changes",
    [
        {"probability": 1.1},
        {"probability": math.nan},
        {"noise_share": -0.1},
        {"max_fraction": 0.0},
        {"max_fraction": 1.5},
        {"speech_snr_db": (5.0, -5.0)},
        {"noise_snr_db": (math.nan, 0.0)},
        {"noise_snr_db": (0.0, math.inf)},
        {"babble_voices": (0, 4)},
        {"babble_voices": (8, 4)},
    ],
)
def test_configurations_that_cannot_be_meant(changes):
    with pytest.raises(MixingError, match=next(iter(changes))):
        dataclasses.replace(MixingConfig(), **changes)


# --- noises ---


@pytest.mark.parametrize("seed", range(6))
def test_shaped_noise_falls_as_its_exponent_says(seed):
    exponent = np.random.default_rng(seed).uniform(0.0, 2.0)  # the first draw of the function
    waveform = shaped_noise(np.random.default_rng(seed), samples=1 << 17)
    frequency, power = scipy.signal.welch(waveform, fs=16_000, nperseg=4096)
    band = (frequency > 50) & (frequency < 7000)
    slope = np.polyfit(np.log(frequency[band]), np.log(power[band]), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.05)


@pytest.mark.parametrize("samples", [1, 2, 3, 400, 16_001])
def test_shaped_noise_has_a_mean_square_of_one_at_any_length(samples):
    waveform = shaped_noise(np.random.default_rng(0), samples=samples)
    assert waveform.shape == (samples,) and waveform.dtype == np.float32
    assert energy(waveform) == pytest.approx(1.0, rel=1e-4)


def test_babble_is_a_sum_of_equally_loud_voices():
    voices = [noise(k, level=10.0**-k) for k in range(4)]
    expected = sum(v.astype(np.float64) / np.sqrt(np.mean(v.astype(np.float64) ** 2)) for v in voices)
    np.testing.assert_allclose(babble(voices), expected, atol=1e-4)


def test_babble_leaves_silent_voices_out():
    voice, silence = noise(1), np.zeros(SAMPLES, np.float32)
    np.testing.assert_array_equal(babble([voice, silence]), babble([voice]))
    assert energy(babble([silence, silence])) == 0.0
