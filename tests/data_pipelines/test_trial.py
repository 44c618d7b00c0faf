"""Batches made for a trial are those of training, and what is said of them is a plain count."""

from collections import Counter

import pytest

from data_pipelines.balance import DrawConfig
from data_pipelines.manifest import Manifest
from data_pipelines.pipeline import DataConfig, train_batches
from data_pipelines.prepare import prepare
from data_pipelines.trial import try_steps
from tests.experiments.small_corpus import write_corpus

CFG = DataConfig(lengths=(16_000, 32_000), seconds_per_step=8.0, threads=0, draw=DrawConfig(language_exponent=0.5))


def test_shares_are_counted_from_the_batches_of_training(tmp_path):
    made = prepare(write_corpus(tmp_path / "audio", clips=8), out=tmp_path / "out", workers=1, progress=False)
    found, counted = try_steps(CFG, made.manifest, steps=9, progress=False), Counter()
    with train_batches(CFG, Manifest.load(tmp_path / "out"), ()) as batches:
        for _ in range(9):
            batch = next(batches)
            for language, samples in zip(batch.language.tolist(), batch.samples.tolist(), strict=True):
                counted[made.manifest.languages[language]] += samples
    total = sum(counted.values())
    assert found.audio_hours == pytest.approx(9 * 8 / 3600)
    assert {row.language: row.drawn for row in found.languages} == {n: s / total for n, s in counted.items()}
    assert sum(row.declared for row in found.languages) == pytest.approx(1.0)
    for row in found.languages:
        assert row.epochs == pytest.approx(counted[row.language] / 16_000 / 3600 / row.hours)
