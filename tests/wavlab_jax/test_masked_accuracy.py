"""Clip scores and trivial predictors against brute force, and honest comparisons."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.batch import Batch
from wavlab_jax.evaluation.masked_accuracy import (
    ClipScores,
    against_trivial,
    by_language,
    compare,
    macro,
    macro_interval,
    nearest_visible,
    score_clips,
    summary,
    times_trivial,
)
from wavlab_jax.objectives import Judged


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 1000))
def test_the_nearest_visible_unit_against_brute_force(mask, seed):
    mask = np.array(mask)
    units = np.random.default_rng(seed).integers(0, 9, mask.size)
    hidden, visible = np.flatnonzero(mask), np.flatnonzero(~mask)
    found = nearest_visible(units, hidden, visible, default=7)
    for frame, unit in zip(hidden, found, strict=True):
        # the earlier one of two equally near
        best = min(visible, key=lambda v: (abs(v - frame), v), default=None)
        assert unit == (7 if best is None else units[best])


def batch_of(units, valid, utterance, language):
    rows, frames = units.shape
    return Batch(
        waveform=np.zeros((rows, 400 + 320 * (frames - 1)), np.float32),
        clean=np.zeros((rows, 0), np.float32),
        units=units.astype(np.int32)[..., None],
        valid=valid,
        samples=np.zeros(rows, np.int32),
        language=np.array(language, np.int32),
        utterance=np.array(utterance, np.int32),
        partner=np.full(rows, -1, np.int32),
        start=np.zeros(rows, np.int32),
        seed=np.zeros(rows, np.uint32),
    )


def test_scores_add_windows_leave_padding_and_fillers_out():
    rng = np.random.default_rng(0)
    units = rng.integers(0, 5, (4, 20))
    valid = np.ones((4, 20), bool)
    valid[1, 12:] = False
    mask, predicted = rng.random((4, 20)) < 0.5, rng.integers(0, 5, (4, 20))
    loss = rng.random((4, 20))
    batch = batch_of(units, valid, [3, 9, 3, -1], [1, 0, 1, 0])  # rows 0 and 2 are windows of one clip, 3 is a filler
    scores = score_clips(lambda _: Judged(mask, batch.units[..., 0], predicted, loss), [batch], majority=2)
    assert scores.utterance.tolist() == [3, 9] and scores.language.tolist() == [1, 0]
    for clip, rows in ((0, (0, 2)), (1, (1,))):
        asked = [(r, f) for r in rows for f in range(20) if valid[r, f] and mask[r, f]]
        assert scores.frames[clip] == len(asked)
        assert scores.correct[clip] == sum(predicted[r, f] == units[r, f] for r, f in asked)
        assert scores.majority[clip] == sum(units[r, f] == 2 for r, f in asked)
        assert scores.loss[clip] == pytest.approx(sum(loss[r, f] for r, f in asked))
    languages = by_language(scores, ["aaa", "bbb", "ccc"])
    assert languages["ccc"] == {"clips": 0, "frames": 0, "accuracy": None, "majority": None, "copy": None, "loss": None}
    assert macro(languages)["languages"] == 2
    total = summary(scores)
    assert total["accuracy"] == pytest.approx(scores.correct.sum() / scores.frames.sum())
    assert times_trivial(languages["ccc"]) is None
    assert times_trivial({"accuracy": 0.3, "majority": 0.1, "copy": 0.2}) == pytest.approx(1.5)


def scores_of(correct, language):
    clips = len(correct)
    zero = np.zeros(clips)
    return ClipScores(
        np.arange(clips, dtype=np.int32),
        np.asarray(language, np.int32),
        np.full(clips, 50.0),
        correct,
        zero,
        zero,
        zero,
    )


def test_a_difference_is_called_one_only_where_the_clips_say_so():
    rng = np.random.default_rng(1)
    language = np.repeat([0, 1, 2], 40)
    base = rng.binomial(50, 0.3, 120).astype(float)
    better = compare(scores_of(base + 3, language), scores_of(base, language))
    assert (
        better.clips == 120 and compare(scores_of(base, language), scores_of(base, language), languages=[1]).clips == 40
    )
    assert better.verdict == "better" and better.difference == pytest.approx(3 / 50)
    worse = compare(scores_of(base, language), scores_of(base + 3, language))
    assert worse.verdict == "worse"
    noise = base + rng.normal(scale=6, size=120) - 0.0
    noise = base + (noise - base) - (noise - base).mean()
    assert compare(scores_of(noise, language), scores_of(base, language)).verdict == "not distinguishable"
    assert compare(scores_of(base, language), scores_of(base, language), languages=[7]) is None
    with pytest.raises(ValueError, match="same clips"):
        compare(scores_of(base, language), scores_of(base, language)._replace(utterance=np.arange(120) + 1))


def test_an_accuracy_has_an_interval_and_is_held_against_the_better_trivial_predictor():
    rng = np.random.default_rng(2)
    language = np.repeat([0, 2], [30, 90])
    scores = scores_of(rng.binomial(50, 0.3, 120).astype(float), language)._replace(
        majority=np.full(120, 5.0), copy=rng.binomial(50, 0.27, 120).astype(float)
    )
    found = macro_interval(scores)
    shares = [scores.correct[language == code].mean() / 50 for code in (0, 2)]
    assert found.difference == pytest.approx(np.mean(shares)) and found.low < found.difference < found.high
    # the error of a mean of two means, of independent clips
    each = [scores.correct[language == code] / 50 for code in (0, 2)]
    error = np.sqrt(sum(np.var(values) / len(values) for values in each)) / 2
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    copied = macro_interval(scores._replace(correct=scores.copy)).difference
    assert against_trivial(scores).difference == pytest.approx(found.difference - copied)
    assert against_trivial(scores._replace(majority=scores.copy + 1)).difference < against_trivial(scores).difference
    assert against_trivial(scores._replace(majority=np.full(120, np.nan), copy=np.full(120, np.nan))) is None
