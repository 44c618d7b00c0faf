"""Batches of a track: sorted as published, complete in every pass, and the same again from any number on."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.batch import NO_UNIT, NO_UTTERANCE, num_frames
from data_pipelines.mlsuperb.batches import (
    LoadTrackBatch,
    TrackBatchesConfig,
    sorted_batches,
    track_batches,
)
from data_pipelines.mlsuperb.layout import Utterance
from data_pipelines.mlsuperb.tracks import Example, Track

CFG = TrackBatchesConfig(size=3, step=0.5, threads=0, fillers=True)


@pytest.fixture(scope="module")
def track(tmp_path_factory):
    folder, examples = tmp_path_factory.mktemp("track"), []
    for number in range(11):
        path = folder / f"mls_eng_{number:06d}.wav"
        samples = np.random.default_rng(number).normal(0, 0.1, 4_000 + 1_500 * (number * 7 % 11))
        soundfile.write(path, samples, 16_000)
        language = "eng" if number % 2 else "deu"
        utterance = Utterance(path.stem, "mls", language, language, path, len(samples) / 16_000, "AB")
        tokens = ["A", "B", "?"] if number else ["A", "B"] * 250
        examples.append(Example(utterance, "AB", tokens))
    parts = {"train": examples, "dev": examples, "test": examples}
    return Track("t", "multilingual", "10min", parts, {}, ["<blank>", "<unk>", "A", "B", "<sos/eos>"], [], "character")


def taken(track, count, *, start=0, training=True):
    with track_batches(track, "train", CFG, start=start, training=training) as batches:
        return [next(batches) for _ in range(count)]


@pytest.mark.parametrize(
    ("samples", "even", "doubled"),
    [(0, 400, 8_000), (8_000, 8_000, 8_000), (8_001, 16_000, 16_000), (33_000, 40_000, 64_000)],
)
def test_static_lengths(track, samples, even, doubled):
    for doubling, wanted in ((False, even), (True, doubled)):
        load = LoadTrackBatch(track, "train", dataclasses.replace(CFG, doubling=doubling), training=True)
        assert load.static_length(samples) == wanted


@given(st.lists(st.floats(0.1, 20), min_size=1, max_size=60), st.integers(1, 9))
def test_sorted_batches(seconds, size):
    batches = sorted_batches(seconds, size=size)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(seconds)))
    lengths = [seconds[index] for batch in batches for index in batch]
    assert lengths == sorted(lengths, reverse=True)
    sizes = [len(batch) for batch in batches]
    assert min(sizes) >= min(size, len(seconds)) and max(sizes) - min(sizes) <= 1


def test_rows_hold_their_utterance_and_its_tokens(track):
    for batch in taken(track, 3):
        for row, index in enumerate(batch.utterance):
            if index == NO_UTTERANCE:
                assert not batch.valid[row].any() and (batch.units[row] == NO_UNIT).all()
                continue
            example = track.parts["train"][index]
            wanted, _ = soundfile.read(example.utterance.path, dtype="float32")
            np.testing.assert_array_equal(batch.waveform[row, : batch.samples[row]], wanted)
            assert not batch.waveform[row, batch.samples[row] :].any() and batch.samples[row] == len(wanted)
            assert batch.valid[row].sum() == num_frames(len(wanted))
            labels = batch.units[row, :, 0]
            expected = [2, 3, 1] if index else [2] * len(labels)  # of too many tokens, what takes a blank between each
            assert labels[labels >= 0].tolist() == expected
            assert ["deu", "eng"][batch.language[row]] == example.utterance.language
        assert batch.waveform.shape[1] % 8_000 == 0


def test_fillers_are_rows_more_and_nothing_else(track):
    """Eleven utterances by three make batches of 3, 4 and 4."""
    filled = LoadTrackBatch(track, "train", CFG, training=True)
    bare = LoadTrackBatch(track, "train", dataclasses.replace(CFG, fillers=False), training=True)
    rows = []
    for number in range(6):
        one, other = filled.map(number), bare.map(number)
        rows.append(len(other.samples))
        assert len(one.samples) == 4 and rows[-1] == (one.utterance != NO_UTTERANCE).sum() == bare.rows_of(
            one.utterance[: rows[-1]]
        )
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a[: rows[-1]], b)
    assert sorted(rows) == [3, 3, 4, 4, 4, 4]


def test_every_pass_hears_everything_once_in_another_order(track):
    batches = taken(track, 9)
    turns = [[tuple(b.utterance) for b in batches[i : i + 3]] for i in (0, 3, 6)]
    for turn in turns:
        heard = Counter(int(u) for rows in turn for u in rows if u != NO_UTTERANCE)
        assert heard == Counter(range(11))
    assert len({tuple(turn) for turn in turns}) > 1


def test_batches_are_the_same_from_any_number_on(track):
    whole, rest = taken(track, 8), taken(track, 3, start=5)
    for one, other in zip(whole[5:], rest, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
    assert len({int(seed) for b in whole for seed in b.seed[b.utterance >= 0]}) > 20


def test_judging_goes_through_once_and_ends(track):
    with track_batches(track, "test", CFG) as batches:
        lengths = [batch.samples.max() for batch in batches]
    assert len(lengths) == 3 and lengths == sorted(lengths, reverse=True)
