"""The probe finds language, is not fooled by rooms and voices, and says how sure it is."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from wavlab_jax.evaluation import intervals
from wavlab_jax.evaluation.intervals import IntervalError
from wavlab_jax.evaluation.language_probe import (
    ProbeConfig,
    ProbeError,
    compare,
    evaluate,
    pooled,
    taking_part,
)

WIDTH = 40


def corpus(
    *, seed: int, language_gain: float, voice_gain: float, languages: int = 6, sources: int = 4, clips: int = 20
):
    """Arguments of `evaluate`: clip = language_gain * language + voice_gain * (its language in its source) + noise.

    The second term is what "one language is one speaker in one room" means: it names the language inside a source and
    says nothing of it outside.
    """
    rng = np.random.default_rng(seed)
    language = np.repeat(np.arange(languages), sources * clips)
    source = np.tile(np.repeat(np.arange(sources), clips), languages)
    features = rng.standard_normal((language.size, WIDTH))
    features += language_gain * rng.standard_normal((languages, WIDTH))[language]
    features += voice_gain * rng.standard_normal((languages, sources, WIDTH))[language, source]
    return {
        "features": features.astype(np.float32),
        "languages": np.array([f"l{index}" for index in language]),
        "sources": np.array([f"s{index}" for index in source]),
        "train": rng.random(language.size) < 0.7,
    }


def test_language_that_carries_over_is_found():
    found = evaluate(**corpus(seed=0, language_gain=1.0, voice_gain=0.5))
    assert found.accuracy > 0.9
    assert found.chance == pytest.approx(1 / 6)
    assert found.against_chance.verdict == "better" and found.against_chance.interval.low > 0.5
    assert found.interval.resampled == "cells" and found.interval.count == 24
    assert found.interval.low <= found.accuracy <= found.interval.high


@pytest.fixture(scope="module")
def nothing_to_find():
    """Results on thirty corpora in which rooms and voices name the language, and nothing carries over."""
    return [evaluate(**corpus(seed=seed, language_gain=0.0, voice_gain=1.5)) for seed in range(30)]


def test_rooms_and_voices_are_not_language(nothing_to_find):
    """A random split of the same clips looks like language identification; across sources there is none."""
    for seed in range(2):
        data = corpus(seed=seed, language_gain=0.0, voice_gain=1.5)
        train = data["train"]
        random_split = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        random_split.fit(data["features"][train], data["languages"][train])
        assert random_split.score(data["features"][~train], data["languages"][~train]) > 0.9
    assert np.mean([found.accuracy for found in nothing_to_find]) == pytest.approx(1 / 6, abs=0.04)
    verdicts = [found.against_chance.verdict for found in nothing_to_find]
    assert verdicts.count("better") <= 3


def test_clips_alone_would_claim_what_is_not_there(nothing_to_find):
    """Intervals over clips exclude chance far more often than one time in twenty; those over cells much less so."""
    claims = {"clips": 0, "cells": 0}
    for found in nothing_to_find:
        for interval in (found.against_chance.over_clips, found.against_chance.interval):
            claims[interval.resampled] += interval.low > 0 or interval.high < 0
    assert claims["clips"] >= 8
    assert claims["cells"] <= claims["clips"] / 2


def test_folds_classes_and_chance_by_hand():
    """Three sources that share languages unevenly; every number below was counted on paper."""
    cells = {  # (language, source): training clips, held-out clips
        ("a", "x"): (4, 2),
        ("a", "y"): (4, 4),
        ("b", "x"): (4, 2),
        ("b", "y"): (4, 0),  # nothing held out: not a class when y is
        ("c", "y"): (4, 2),
        ("c", "z"): (0, 3),  # no training clips: nothing trains c when y is held out
        ("d", "x"): (4, 4),  # one source: never takes part
    }
    rng = np.random.default_rng(0)
    languages, sources, train = [], [], []
    for (language, source), (training, held_out) in cells.items():
        languages += [language] * (training + held_out)
        sources += [source] * (training + held_out)
        train += [True] * training + [False] * held_out
    features = rng.standard_normal((len(train), 5))
    found = evaluate(features, languages=languages, sources=sources, train=np.array(train))
    # x: a, b trained in y -> 2 classes. y: only a is both held out and trained elsewhere. z: only c.
    assert found.skipped == ("y", "z")
    (fold,) = found.folds
    assert fold[:4] == ("x", ("a", "b"), 8, 4)
    assert found.clips == 4 and found.chance == 0.5
    assert [(line.language, line.source, line.clips) for line in found.cells] == [("a", "x", 2), ("b", "x", 2)]
    assert [(line.language, line.source, line.clips) for line in found.languages] == [("a", None, 2), ("b", None, 2)]
    assert found.interval.resampled == "clips"  # two cells are too few to redraw
    assert found.rows.tolist() == [4, 5, 18, 19]
    labels = {"languages": languages, "sources": sources, "train": np.array(train)}
    asked = taking_part(**labels)
    assert np.flatnonzero(asked).tolist() == [4, 5, *range(6, 10), 18, 19, *range(20, 24)]
    features[~asked] = np.nan  # what takes no part is not looked at
    assert evaluate(features, **labels).to_json() == found.to_json()


def test_macro_accuracy_and_chance_are_means_over_languages():
    data = corpus(seed=3, language_gain=0.5, voice_gain=0.5)
    few = (data["languages"] == "l0") & (data["sources"] != "s0") & (data["sources"] != "s1")  # l0: two sources only
    kept = ~few | (np.arange(few.size) % 7 == 0)
    data = {name: values[kept] for name, values in data.items()}
    found = evaluate(**data)
    right = found.predicted == found.language
    by_language = [right[found.language == f"l{index}"].mean() for index in range(6)]
    assert found.accuracy == pytest.approx(np.mean(by_language))
    assert [line.accuracy for line in found.languages] == pytest.approx(by_language)
    classes = {fold.source: len(fold.languages) for fold in found.folds}
    assert set(found.guess) == {1 / count for count in classes.values()}
    expected = [np.mean([1 / classes[s] for s in found.source[found.language == f"l{i}"]]) for i in range(6)]
    assert found.chance == pytest.approx(np.mean(expected))
    assert found.clips == sum(fold.test_clips for fold in found.folds) == sum(line.clips for line in found.cells)


def test_nothing_leaks_into_a_fold():
    """Predictions of a held-out source hang on the other sources' training clips and on nothing else."""
    data = corpus(seed=1, language_gain=0.7, voice_gain=0.5)
    before = evaluate(**data)
    held_out = data["sources"] == "s2"
    unused = (held_out & data["train"]) | (~held_out & ~data["train"])
    data["features"] = np.where(unused[:, None], 100 * data["features"][::-1], data["features"])
    after = evaluate(**data)
    fold = before.source == "s2"
    np.testing.assert_array_equal(before.predicted[fold], after.predicted[fold])
    assert not np.array_equal(before.predicted[~fold], after.predicted[~fold])


def test_same_answer_twice_and_in_another_order():
    data = corpus(seed=2, language_gain=0.5, voice_gain=0.5)
    first, again = evaluate(**data), evaluate(**data)
    assert first.to_json() == again.to_json()
    order = np.random.default_rng(0).permutation(len(data["train"]))
    shuffled = evaluate(**{name: values[order] for name, values in data.items()})
    assert shuffled.accuracy == pytest.approx(first.accuracy, abs=0.02)
    assert shuffled.chance == first.chance


def test_useless_dimensions_do_no_harm():
    """Constant and repeated dimensions have no variance of their own to be scaled to one."""
    data = corpus(seed=0, language_gain=1.0, voice_gain=0.5)
    plain = evaluate(**data)
    features = data.pop("features")
    padded = np.concatenate([features, features[:, :5], np.full((len(features), 7), 3.0)], axis=1)
    assert evaluate(padded, **data).accuracy == pytest.approx(plain.accuracy, abs=0.03)
    narrow = evaluate(features, **data, config=ProbeConfig(components=2))
    assert narrow.accuracy < plain.accuracy - 0.1


def test_comparison_is_paired():
    data = corpus(seed=5, language_gain=0.4, voice_gain=0.4)
    better = evaluate(**data)
    blurred = dict(
        data, features=data["features"] + 2 * np.random.default_rng(0).standard_normal(data["features"].shape)
    )
    worse = evaluate(**blurred)
    forth, back = compare(better, worse), compare(worse, better)
    assert forth.verdict == "better" and back.verdict == "worse"
    assert forth.difference == pytest.approx(better.accuracy - worse.accuracy) == -back.difference
    assert forth.interval.low <= forth.difference <= forth.interval.high
    slightly = dict(data, features=data["features"] + 0.05 * np.random.default_rng(1).standard_normal((480, WIDTH)))
    close = compare(better, evaluate(**slightly))
    assert close.verdict == "not distinguishable"
    assert close.interval.high - close.interval.low < (better.interval.high - better.interval.low) / 2
    same = compare(better, better)
    assert same.verdict == "not distinguishable" and same.interval[:2] == (0.0, 0.0)


def test_results_of_different_clips_are_not_compared():
    data = corpus(seed=5, language_gain=0.4, voice_gain=0.4)
    other = dict(data, train=~data["train"])
    with pytest.raises(ProbeError, match="different clips"):
        compare(evaluate(**data), evaluate(**other))


def test_json_is_plain_and_complete():
    found = evaluate(**corpus(seed=0, language_gain=1.0, voice_gain=0.5))
    told = json.loads(json.dumps(found.to_json()))
    assert told["accuracy"] == found.accuracy and told["chance"] == found.chance
    assert told["interval"] == {
        "low": found.interval.low,
        "high": found.interval.high,
        "resampled": "cells",
        "count": 24,
    }
    assert told["against_chance"]["verdict"] == "better"
    assert told["against_chance"]["clips"] == told["clips"] == found.clips == compare(found, found).clips
    assert len(told["languages"]) == 6 and len(told["cells"]) == 24 and len(told["folds"]) == 4
    assert "not independent" in told["caveat"]
    json.dumps(compare(found, found).to_json())


@pytest.mark.parametrize(
    "change, said",
    [
        ({"sources": np.full(480, "s0")}, "0 of 6 languages occur in two or more of the sources (s0)"),
        ({"train": np.ones(480, bool)}, "has clips outside the training split"),
        ({"train": np.zeros(480, bool)}, "has clips outside the training split"),
        ({"train": np.ones(479, bool)}, "train [479]"),
        ({"train": np.zeros(480, np.int8)}, "train is int8, expected bool"),
        ({"languages": np.full(480, "l0")}, "1 of 1 languages"),
        ({"features": np.zeros(480)}, "expected [clips, width]"),
    ],
)
def test_mistakes_are_named(change, said):
    with pytest.raises(ProbeError) as raised:
        evaluate(**{**corpus(seed=0, language_gain=1.0, voice_gain=0.5), **change})
    assert said in str(raised.value)


def test_the_clip_that_is_not_finite_is_named():
    data = corpus(seed=0, language_gain=1.0, voice_gain=0.5)
    data["features"][321, 3] = np.nan
    with pytest.raises(ProbeError, match="clip 321 \\(l4, s0\\)"):
        evaluate(**data)


def test_pooled_is_numpys_mean_and_deviation_of_real_frames():
    rng = np.random.default_rng(0)
    hidden = (5 + rng.standard_normal((3, 11, 4))).astype(np.float32)
    lengths = [11, 4, 0]
    valid = np.arange(11)[None] < np.array(lengths)[:, None]
    hidden[~valid] = np.nan
    ours = np.asarray(pooled(jnp.asarray(hidden), jnp.asarray(valid)))
    for row, values, length in zip(ours, hidden, lengths, strict=True):
        real = values[:length] if length else np.zeros((1, 4))
        np.testing.assert_allclose(row, np.concatenate([real.mean(axis=0), real.std(axis=0)]), atol=1e-5)


def test_clip_interval_is_scipys_percentile_bootstrap():
    """Of one language the macro mean is the mean."""
    values = (np.random.default_rng(0).random(150) < 0.3).astype(float)
    ours = intervals.over_clips(values, languages=np.full(150, "a"))
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20000, method="percentile", rng=0
    ).confidence_interval
    assert ours[:2] == pytest.approx((theirs.low, theirs.high), abs=0.012)
    assert ours[2:] == ("clips", 150)


def test_clip_interval_redraws_within_languages():
    """Two languages, each always right or always wrong: no redraw of their clips changes the average."""
    languages = np.array(["a"] * 30 + ["b"] * 3)
    assert intervals.over_clips((languages == "a").astype(float), languages=languages)[:2] == (0.5, 0.5)


def test_cell_interval_redraws_whole_cells():
    """Against the same thing spelled out clip by clip."""
    rng = np.random.default_rng(0)
    languages = rng.choice(["a", "b", "c"], 120, p=[0.6, 0.3, 0.1])
    sources = rng.choice(["x", "y", "z"], 120)
    values = rng.random(120) < 0.2 + 0.6 * (sources == "x")
    ours = intervals.over_cells(values, languages=languages, sources=sources)
    cells = sorted(set(zip(languages, sources, strict=True)))
    statistics = []
    for _ in range(4000):
        drawn = {}
        for index in rng.integers(0, len(cells), len(cells)):
            language, source = cells[index]
            drawn.setdefault(language, []).append(values[(languages == language) & (sources == source)])
        statistics.append(np.mean([np.concatenate(parts).mean() for parts in drawn.values()]))
    assert ours[:2] == pytest.approx(np.quantile(statistics, [0.025, 0.975]), abs=0.03)
    assert ours[2:] == ("cells", len(cells))


@pytest.mark.parametrize(
    "values, languages, said",
    [
        ([], [], "no clips"),
        ([1.0, np.nan], ["a", "b"], "value 1 is not finite"),
        ([1.0], ["a", "b"], "must both be"),
    ],
)
def test_nothing_to_average_is_an_error(values, languages, said):
    with pytest.raises(IntervalError, match=said):
        intervals.over_clips(values, languages=languages)


def test_the_jackknife_of_a_mean_is_students_interval_of_the_groups_means():
    groups = np.random.default_rng(0).normal(size=20)
    without = (groups.sum() - groups) / 19
    found = intervals.jackknife(groups.mean(), without)
    expected = scipy.stats.t.interval(0.95, 19, loc=groups.mean(), scale=scipy.stats.sem(groups))
    np.testing.assert_allclose((found.low, found.high), expected, rtol=1e-3)
    with pytest.raises(intervals.IntervalError, match="20 finite values are needed"):
        intervals.jackknife(0.0, without[:19])
