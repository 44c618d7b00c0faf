"""Rooms: what is heard stays on the grid of the labels, as long and as loud as it was."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.levels import non_silent_energy
from data_pipelines.reverberation import ReverbConfig, ReverbError, _fast_length, reverberate, simulated_response


def speech(seed, samples=16_000):
    """Noise in bursts, float32 [samples]."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(samples) * 0.1 * (np.sin(np.arange(samples) / 900 + seed) > 0)).astype(np.float32)


def room(seed, samples=3000, direct=700, sign=1.0):
    """A response whose direct path is `direct` samples in."""
    rng = np.random.default_rng(seed)
    response = rng.standard_normal(samples) * 0.1 * np.exp(-np.arange(samples) / 400)
    response[:direct] *= 0.01
    response[direct] = sign
    return response.astype(np.float32)


@settings(max_examples=40)
@given(st.integers(0, 99), st.integers(1, 20_000), st.integers(1, 4000), st.floats(0, 1), st.sampled_from([1.0, -1.0]))
def test_it_is_the_convolution_moved_by_the_direct_path(seed, samples, length, place, sign):
    waveform = speech(seed, samples) + np.float32(0.01)
    direct = int(place * (length - 1))
    response = room(seed, length, direct, sign)
    heard = reverberate(waveform, response)
    assert heard.shape == waveform.shape and heard.dtype == np.float32
    expected = scipy.signal.convolve(waveform.astype(np.float64), response, mode="full")[direct : direct + samples]
    expected *= sign * math.sqrt(non_silent_energy(waveform) / non_silent_energy(expected))
    np.testing.assert_allclose(heard, expected, atol=2e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("direct", [0, 700, 2999])
def test_the_sound_stays_where_its_labels_are(direct, sign):
    waveform = speech(1)
    heard = reverberate(waveform, room(2, direct=direct, sign=sign))
    lags = np.arange(-len(waveform) + 1, len(waveform))
    correlation = scipy.signal.correlate(heard.astype(np.float64), waveform.astype(np.float64))
    assert lags[np.argmax(correlation)] == 0
    assert np.abs(heard - waveform).max() > 1e-3


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_it_stays_as_loud(seed):
    waveform = speech(seed)
    heard = reverberate(waveform, simulated_response(np.random.default_rng(seed), cfg=ReverbConfig()))
    assert 10 * math.log10(non_silent_energy(heard) / non_silent_energy(waveform)) == pytest.approx(0, abs=0.05)


def test_nothing_is_changed_in_place_and_silence_stays_silent():
    waveform, response = speech(1), room(2)
    before = waveform.copy(), response.copy()
    reverberate(waveform, response)
    np.testing.assert_array_equal(waveform, before[0])
    np.testing.assert_array_equal(response, before[1])
    silent = np.zeros(4000, np.float32)
    heard = reverberate(silent, response)
    assert not heard.any() and not np.shares_memory(heard, silent)


@pytest.mark.parametrize(
    "response", [np.zeros(0), np.zeros(10), np.array([1.0, np.nan])], ids=["empty", "silent", "nan"]
)
def test_responses_that_cannot_be_meant(response):
    with pytest.raises(ReverbError, match="empty, silent or not finite"):
        reverberate(speech(1), response.astype(np.float32))


@pytest.mark.parametrize("rt60", [0.3, 0.9])
def test_a_simulated_tail_decays_as_its_reverberation_time_says(rt60):
    """By Schroeder's backward integration, from -5 to -25 dB (ISO 3382's T20), the mean of several rooms."""
    cfg = ReverbConfig(rt60_seconds=(rt60, rt60), direct_to_reverberant_db=(3.0, 3.0))
    measured = []
    for seed in range(12):
        response = simulated_response(np.random.default_rng(seed), cfg=cfg).astype(np.float64)
        assert response[0] == 1.0 and np.abs(response[1:]).max() < 1.0 and not response[1:40].any()
        assert len(response) == round(rt60 * 16_000)
        assert -10 * math.log10(np.sum(response[1:] ** 2)) == pytest.approx(3.0, abs=0.01)
        left = np.cumsum(response[:0:-1] ** 2)[::-1]
        decay = 10 * np.log10(left / left[0])
        where = np.flatnonzero((decay < -5) & (decay > -25))
        slope = np.polyfit(where / 16_000, decay[where], 1)[0]
        measured.append(-60 / slope)
    assert np.mean(measured) == pytest.approx(rt60, rel=0.05)


def test_rooms_differ_within_the_ranges():
    cfg = ReverbConfig()
    responses = [simulated_response(np.random.default_rng(seed), cfg=cfg) for seed in range(300)]
    seconds = np.array([len(response) for response in responses]) / 16_000
    ratios = np.array([-10 * math.log10(float(np.sum(response[1:].astype(float) ** 2))) for response in responses])
    for drawn, (least, most) in ((seconds, cfg.rt60_seconds), (ratios, cfg.direct_to_reverberant_db)):
        assert least - 0.01 <= drawn.min() < least + 0.05 * (most - least)
        assert most - 0.05 * (most - least) < drawn.max() <= most + 0.01


@pytest.mark.parametrize(
    "changes",
    [
        {"probability": 1.5},
        {"rt60_seconds": (0.0, 1.0)},
        {"rt60_seconds": (1.0, 0.5)},
        {"rt60_seconds": (0.5, math.nan)},
        {"direct_to_reverberant_db": (3.0, 0.0)},
        {"direct_to_reverberant_db": (math.nan, 0.0)},
    ],
)
def test_configurations_that_cannot_be_meant(changes):
    with pytest.raises(ReverbError, match=next(iter(changes))):
        dataclasses.replace(ReverbConfig(), **changes)


def test_fast_lengths_are_the_next_with_small_factors():
    def smooth(n):
        for factor in (2, 3, 5):
            while n % factor == 0:
                n //= factor
        return n == 1

    smooths = [n for n in range(1, 5000) if smooth(n)]
    for least in range(1, 4001):
        assert _fast_length(least) == next(n for n in smooths if n >= least)
