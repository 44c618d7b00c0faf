"""Audio that tells where it is from, and training batches of it."""

import dataclasses
import itertools

import numpy as np

from data_pipelines.batch import Batch
from data_pipelines.mixing import MixingConfig
from data_pipelines.pipeline import DataConfig, train_batches

LENGTHS = (16_000, 32_000, 48_000)
STRIDE = 7919  # between the ramps of two clips; prime, so that no two begin alike
CLEAN = DataConfig(lengths=LENGTHS, seconds_per_step=12.0, mixing=None, seed=5)
MIXED = dataclasses.replace(CLEAN, mixing=MixingConfig(probability=1.0, noise_share=0.0))


def ramp(clip: int, start: int, samples: int) -> np.ndarray:
    """int16: sample t of clip n has the value (7919 n + t) mod 65536 - 32768, so that audio tells where it is from."""
    return ((np.arange(start, start + samples) + STRIDE * clip) % 65_536 - 32_768).astype(np.int16)


def first(cfg, corpus, units, count, **keywords) -> list[Batch]:
    with train_batches(cfg, corpus, units, **keywords) as batches:
        return list(itertools.islice(batches, count))


def assert_same(one: Batch, other: Batch):
    for name in Batch._fields:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
