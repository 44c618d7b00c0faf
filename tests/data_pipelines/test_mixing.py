import dataclasses
import math

import numpy as np
import pytest
import scipy.signal
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.levels import energy, non_silent
from data_pipelines.mixing import (
    ESPNET_MIXING,
    NEST_MIXING,
    UNISPEECH_MIXING,
    UNMIXED,
    Interference,
    MixingConfig,
    MixingError,
    Segment,
    babble,
    interference_scale,
    mix,
    plan_mixture,
    shaped_noise,
)

RULES = ("wavlm", "unispeech", "espnet")
SAMPLES = 16_000


def noise(seed, samples=SAMPLES, level=0.1):
    return (np.random.default_rng(seed).standard_normal(samples) * level).astype(np.float32)


def decibels(ratio):
    return 10 * math.log10(ratio)


def mixed_once(primary, secondary, *, snr_db, length, start=0, at=0.0, rule="wavlm"):
    return mix(primary, [secondary], snr_db=snr_db, segments=[Segment(length, start, at)], rule=rule)


def sounding(waveform):
    """ESPnet's detect_non_silence for one channel, written with a loop: [samples] bool."""
    if len(waveform) < 1024:
        return np.ones(len(waveform), bool)
    padded = np.pad(np.asarray(waveform, np.float64), (0, (-(len(waveform) - 1024) % 512) % 1024))
    power = np.array([np.mean(padded[t : t + 1024] ** 2) for t in range(0, len(padded) - 1023, 512)])
    if not power.mean():
        return np.ones(len(waveform), bool)
    sound = np.concatenate([np.full(512, p / power.mean() > 0.01) for p in power])
    return np.concatenate([sound, np.full(len(waveform) - len(sound), sound[-1])])


def expected_energies(rule, primary, secondary):
    """(primary, secondary) in float64, as each peer's code has them."""
    primary, secondary = primary.astype(np.float64), secondary.astype(np.float64)
    if rule == "espnet":
        return np.mean(primary[sounding(primary)] ** 2), max(np.mean(secondary**2), 1e-10)
    return np.mean(primary**2), np.mean(secondary**2)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=40)
@given(st.floats(-10, 20), st.floats(1e-2, 1), st.floats(1e-2, 1), st.integers(0, 1000), st.booleans())
def test_the_ratio_achieved_is_the_one_asked_for(rule, snr_db, loud, quiet, seed, pauses):
    primary, secondary = noise(seed, level=loud), noise(seed + 1, level=quiet)
    if pauses:
        primary[2000:9000] *= 1e-3
        secondary[5000:] *= 1e-2
    mixed = mixed_once(primary, secondary, snr_db=snr_db, length=SAMPLES, rule=rule)
    # What was added is the secondary times a number; least squares reads the number off.
    added = mixed.astype(np.float64) - primary
    scale = np.dot(added, secondary) / np.dot(secondary.astype(np.float64), secondary)
    loudness, interference = expected_energies(rule, primary, secondary)
    assert decibels(loudness / (scale**2 * interference)) == pytest.approx(snr_db, abs=1e-3)


def test_the_rules_differ_where_there_are_pauses():
    primary, secondary = noise(1), noise(2)
    primary[:12_000] = 0
    scale = {rule: interference_scale(primary, secondary, snr_db=0.0, rule=rule) for rule in RULES}
    assert scale["wavlm"] == scale["unispeech"] == pytest.approx(0.5, rel=0.02)
    # The first frame with sound in it is the 22nd from 0, and begins at sample 11,264.
    assert scale["espnet"] == pytest.approx(math.sqrt(4000 / (16_000 - 11_264)), rel=0.02)


@settings(max_examples=30)
@given(st.integers(1, 9000), st.integers(0, 1000))
def test_sound_is_where_espnet_hears_it(samples, seed):
    waveform = noise(seed, samples)
    for begin in np.random.default_rng(seed).integers(0, samples, 3):
        waveform[begin : begin + 2000] *= 1e-3
    np.testing.assert_array_equal(non_silent(waveform), sounding(waveform))


@given(st.data())
def test_only_the_stretch_changes_and_only_by_the_stretch(data):
    length = data.draw(st.integers(0, 500))
    start = data.draw(st.integers(0, 1000 - length))
    at = data.draw(st.floats(0, 1, exclude_max=True))
    size = data.draw(st.sampled_from([100, 1000, 3000]))
    primary, secondary = noise(1, 1000), noise(2, size)
    mixed = mixed_once(primary, secondary, snr_db=3.0, length=length, start=start, at=at)
    length = min(length, size)  # a short clip shortens the stretch
    expected = primary.astype(np.float64)
    scale = np.sqrt(np.mean(primary.astype(float) ** 2) / (10**0.3 * np.mean(secondary.astype(float) ** 2)))
    begin = math.floor(at * (size - length + 1))
    for k in range(length):
        expected[start + k] += scale * secondary[begin + k]
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    untouched = np.ones(1000, bool)
    untouched[start : start + length] = False
    assert np.array_equal(mixed[untouched], primary[untouched])
    assert mixed.dtype == np.float32


def test_each_speaker_is_as_loud_as_asked():
    primary, speakers = noise(1), [noise(2, level=0.3), noise(3, level=0.01)]
    segments = [Segment(2000, 0, 0.0, 0), Segment(2000, 4000, 0.0, 1), Segment(1000, 9000, 0.0, 0)]
    added = mix(primary, speakers, snr_db=5.0, segments=segments).astype(np.float64) - primary
    for segment in segments:
        speaker = speakers[segment.speaker].astype(np.float64)
        scale = added[segment.start] / speaker[0]
        np.testing.assert_allclose(
            added[segment.start :][: segment.length], scale * speaker[: segment.length], atol=1e-6
        )
        assert decibels(np.mean(primary.astype(np.float64) ** 2) / np.mean((scale * speaker) ** 2)) == pytest.approx(
            5.0, abs=1e-2
        )
    assert not added[2000:4000].any() and not added[6000:9000].any() and not added[10_000:].any()


def test_energies_are_those_of_the_whole_waveforms():
    """A pause where the stretch is taken from must not be blown up to the level of speech."""
    primary, secondary = noise(1), noise(2)
    secondary[:8000] *= 1e-4
    mixed = mixed_once(primary, secondary, snr_db=0.0, length=4000)
    assert np.abs(mixed - primary).max() < 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_changed_in_place(rule):
    primary, secondary = noise(1), noise(2)
    before = primary.copy(), secondary.copy()
    mixed = mixed_once(primary, secondary, snr_db=-5.0, length=8000, start=10, at=0.1, rule=rule)
    assert np.array_equal(primary, before[0]) and np.array_equal(secondary, before[1])
    assert not np.shares_memory(mixed, primary)
    assert not np.array_equal(mixed, primary)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("silent", ["primary", "secondary", "both"])
def test_silence_stays_unmixed(silent, rule):
    primary = np.zeros(SAMPLES, np.float32) if silent != "secondary" else noise(1)
    secondary = np.zeros(SAMPLES, np.float32) if silent != "primary" else noise(2)
    mixed = mixed_once(primary, secondary, snr_db=0.0, length=8000, rule=rule)
    assert np.array_equal(mixed, primary) and not np.shares_memory(mixed, primary)
    assert np.isfinite(interference_scale(primary, secondary, snr_db=0.0, rule=rule))
    if rule != "espnet" or silent != "secondary":
        assert interference_scale(primary, secondary, snr_db=0.0, rule=rule) == 0.0


def test_espnets_floor_bounds_what_a_silent_secondary_is_scaled_by():
    faint = np.full(SAMPLES, 1e-6, np.float32)
    scale = interference_scale(noise(1, level=0.1), faint, snr_db=0.0, rule="espnet")
    assert scale == pytest.approx(0.1 / 1e-5, rel=0.02)


def test_the_faintest_that_int16_can_hold_is_not_silence():
    faint = np.zeros(SAMPLES, np.float32)
    faint[::2] = 1 / 32768
    assert interference_scale(faint, noise(1), snr_db=0.0) > 0


@pytest.mark.parametrize("stretch", [(9, 92), (9, -1), (-1, 0)])
def test_a_stretch_that_does_not_fit_is_refused(stretch):
    length, start = stretch
    with pytest.raises(MixingError, match="do not lie in the primary"):
        mixed_once(noise(1, 100), noise(2, 100), snr_db=0.0, length=length, start=start)


# --- what is planned ---


def plans(cfg, count, samples=SAMPLES):
    return [plan_mixture(np.random.default_rng([7, n]), cfg=cfg, samples=samples) for n in range(count)]


def assert_share(count, total, share, sigmas=4):
    assert abs(count - share * total) <= sigmas * math.sqrt(total * share * (1 - share)), (count / total, share)


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
        only = [plan.segments[0] for plan in drawn]
        assert {len(plan.segments) for plan in drawn} == {1} and {segment.speaker for segment in only} == {0}
        lengths = np.array([segment.length for segment in only])
        assert lengths.min() >= 1 and lengths.max() <= SAMPLES // 2
        assert scipy.stats.kstest(lengths, scipy.stats.uniform(0, SAMPLES // 2).cdf).pvalue > 1e-3
        starts = np.array([segment.start / (SAMPLES - segment.length + 1) for segment in only])
        ats = np.array([segment.secondary_at for segment in only])
        for where in (starts, ats):
            assert min(where) >= 0 and max(where) < 1
            assert scipy.stats.kstest(where, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(starts, ats)[0, 1]) < 0.07


def test_the_longest_stretch_is_half_of_the_row_and_the_shortest_one_sample_or_none():
    for rule, least in (("wavlm", 1), ("espnet", 1), ("unispeech", 0)):
        drawn = plans(MixingConfig(probability=1.0, rule=rule), 400, samples=11)
        assert {plan.segments[0].length for plan in drawn} == {*range(least, 6)}
    half = plans(NEST_MIXING, 50, samples=11)
    assert {plan.segments[0].length for plan in half if plan.kind is not Interference.NONE} == {5}


def test_several_segments_and_speakers():
    cfg = MixingConfig(probability=1.0, noise_share=0.3, max_segments=5, max_speakers=3, max_fraction=1.0)
    drawn = plans(cfg, 4000, samples=2000)
    counts, speakers, totals = [], [], []
    for plan in drawn:
        ends = [segment.start + segment.length for segment in plan.segments]
        assert all(end <= later.start for end, later in zip(ends, plan.segments[1:], strict=False))
        assert ends[-1] <= 2000 and plan.segments[0].start >= 0
        used = {segment.speaker for segment in plan.segments}
        totals.append(sum(segment.length for segment in plan.segments))
        if plan.kind is Interference.SPEECH:
            assert plan.voices == max(used) + 1 <= len(plan.segments)
            counts.append(len(plan.segments))
            speakers.append(len(used))
        else:
            assert used == {0}
    for count in range(1, 6):
        assert_share(counts.count(count), len(counts), 0.2, sigmas=6)  # a short stretch may lose a segment
    assert speakers.count(3) < speakers.count(2) < speakers.count(1)  # no more speakers than segments
    assert scipy.stats.kstest(totals, scipy.stats.uniform(0, 2000).cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("cfg", "probability", "share"),
    [(UNISPEECH_MIXING, 0.5, 0.5), (ESPNET_MIXING, 1.0, 0.1), (NEST_MIXING, 0.5, 0.5)],
    ids=["unispeech", "espnet", "nest"],
)
def test_the_peers_shares(cfg, probability, share):
    drawn = plans(cfg, 5000)
    mixed = [plan for plan in drawn if plan.kind is not Interference.NONE]
    assert_share(len(mixed), len(drawn), probability)
    assert_share(sum(plan.kind is not Interference.SPEECH for plan in mixed), len(mixed), share)


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
        {"min_fraction": 0.6},
        {"rule": "nemo"},
        {"max_segments": 0},
        {"max_speakers": 2},
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
