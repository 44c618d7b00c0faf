"""Units of a random projection and a random codebook: no clustering, no teacher, no label files.

BEST-RQ (2202.01855, section 3.1): the unit of a frame is the entry of a random codebook that is nearest to a random
projection of its normalised features, both brought to unit length; neither is ever trained. Several codebooks are
several sets of units with other seeds (USM, 2303.01037, has 16).

Differs from the papers in the features: log-mel on the encoder's 20 ms grid, a unit a frame, where BEST-RQ stacks four
10 ms frames for a unit every 40 ms; and normalised over each row (NeMo's "per_feature"), not over the data set.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.batch import HOP, RECEPTIVE_FIELD
from wavlab_jax.features import log_mel
from wavlab_jax.targets.online import OnlineSet


class RandomProjectionError(ValueError):
    """A random projection that cannot be made."""


@dataclass(frozen=True)
class RandomProjectionConfig:
    """One codebook.

    Attributes:
        name: for people; of the set of units in results.
        units: entries of the codebook (8192 in BEST-RQ, NeMo and SpeechBrain).
        dim: of the projection and of the entries (16 there).
        mels: bands of the log-mel features (80 there).
        stack: neighbouring frames that are projected together, 20 ms apart, centred; odd. The outer ones of a row are
            repeated beyond it.
        seed: of projection and codebook.
    """

    name: str = "random_projection"
    units: int = 8192
    dim: int = 16
    mels: int = 80
    stack: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.units < 1 or self.dim < 1 or self.mels < 1 or self.stack < 1 or self.stack % 2 == 0:
            raise RandomProjectionError(f"units, dim and mels must be at least 1, and stack odd: got {self}")


class Projection(NamedTuple):
    """`matrix` [mels * stack, dim] and `codebook` [units, dim], whose rows have unit length; float32."""

    matrix: np.ndarray
    codebook: np.ndarray


def make_projection(cfg: RandomProjectionConfig) -> Projection:
    """The arrays of this seed: U(-b, b) with b = sqrt(6 / (inputs + outputs)) (Xavier), and normalised N(0, 1)."""
    rng = np.random.default_rng(cfg.seed)
    inputs = cfg.mels * cfg.stack
    bound = math.sqrt(6.0 / (inputs + cfg.dim))
    matrix = rng.uniform(-bound, bound, (inputs, cfg.dim))
    codebook = rng.standard_normal((cfg.units, cfg.dim))
    codebook /= np.linalg.norm(codebook, axis=1, keepdims=True)
    return Projection(matrix.astype(np.float32), codebook.astype(np.float32))


def random_projection(cfg: RandomProjectionConfig) -> OnlineSet:
    """The set of units of this configuration."""

    def units_of(frozen: Projection, waveform: jax.Array, samples: jax.Array) -> jax.Array:
        features = stacked(normalised_log_mel(waveform, samples, mels=cfg.mels), samples, stack=cfg.stack)
        return nearest_entry(frozen, features)

    return OnlineSet(make_projection(cfg), units_of)


def normalised_log_mel(waveform: jax.Array, samples: jax.Array, *, mels: int) -> jax.Array:
    """[rows, frames, mels] float32 with zero mean and unit variance of each band over the row's real frames."""
    features = log_mel(waveform, mels=mels)
    real = (jnp.arange(features.shape[1])[None] < _frames(samples)[:, None])[..., None]
    count = jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1)
    mean = jnp.sum(features, axis=1, keepdims=True, where=real) / count
    variance = jnp.sum(jnp.square(features - mean), axis=1, keepdims=True, where=real) / count
    return (features - mean) * jax.lax.rsqrt(variance + 1e-5)


def stacked(features: jax.Array, samples: jax.Array, *, stack: int) -> jax.Array:
    """[rows, frames, width] -> [rows, frames, stack * width]: each real frame among its neighbours, earliest first."""
    last = jnp.maximum(_frames(samples) - 1, 0)[:, None]
    frame = jnp.arange(features.shape[1])[None]
    around = range(-(stack // 2), stack // 2 + 1)
    parts = [jnp.take_along_axis(features, jnp.clip(frame + o, 0, last)[..., None], axis=1) for o in around]
    return jnp.concatenate(parts, axis=-1)


def nearest_entry(projection: Projection, features: jax.Array) -> jax.Array:
    """int32 [rows, frames]: of features [rows, frames, inputs]; the largest cosine is the smallest distance of unit
    vectors, whatever the length of the projected one."""
    highest = jax.lax.Precision.HIGHEST
    projected = jnp.matmul(features, projection.matrix, precision=highest)
    return jnp.argmax(jnp.matmul(projected, projection.codebook.T, precision=highest), axis=-1).astype(jnp.int32)


def _frames(samples: jax.Array) -> jax.Array:
    """`num_frames` of a traced array."""
    return jnp.maximum((samples - RECEPTIVE_FIELD) // HOP + 1, 0)
