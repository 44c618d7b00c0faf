"""A learner small enough to compile in seconds, and random batches for it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data_pipelines.batch import Batch, num_frames
from wavlab_jax.encoder import EncoderConfig, make_encoder
from wavlab_jax.heads import HeadConfig
from wavlab_jax.objectives import PredictionConfig
from wavlab_jax.optim import OptimizerConfig
from wavlab_jax.step import LearnerConfig

UNITS = 12
SAMPLES = 8_000


def encoder(**changes) -> EncoderConfig:
    """The smallest configuration that has two of everything, with `changes`."""
    fields = dict(
        # two convolutions on the same grid as the real seven (400 samples a frame, one every 320): compiled much sooner
        extractor_channels=(8, 8),
        extractor_kernels=(16, 25),
        extractor_strides=(16, 20),
        width=16,
        layers=2,
        heads=2,
        feed_forward=32,
        position_kernel=8,
        position_groups=2,
        dropout=0.0,
        attention_dropout=0.0,
        projection_dropout=0.0,
        layerdrop=0.0,
        feature_gradient_scale=1.0,
    )
    return EncoderConfig(**{**fields, **changes})


def randomised(cfg: EncoderConfig, *, seed: int = 0):
    """An encoder of `cfg` whose every parameter is far from its initial value (nothing is compiled for it)."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(lambda: make_encoder(jax.random.key(0), cfg)))

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        values = rng.standard_normal(leaf.shape) * (0.3 if "bias" in name or leaf.ndim == 1 else 0.25)
        return jnp.asarray(values + ("scale" in name or "gain" in name or "constant" in name), jnp.float32)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


def learner(*, steps: int = 20, objective: PredictionConfig | None = None, seed: int = 0, **changes) -> LearnerConfig:
    return LearnerConfig(
        encoder=encoder(**changes),
        head=HeadConfig(units=UNITS, dim=8),
        objective=objective or PredictionConfig(),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=2, total_steps=steps, clip_norm=1.0),
        seed=seed,
    )


def batch(rows: int = 8, samples: int = SAMPLES, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    frames = num_frames(samples)
    return Batch(
        waveform=rng.normal(scale=0.1, size=(rows, samples)).astype(np.float32),
        clean=np.zeros((rows, 0), np.float32),
        units=rng.integers(0, UNITS, (rows, frames, 1)).astype(np.int32),
        valid=np.ones((rows, frames), bool),
        samples=np.full(rows, samples, np.int32),
        language=np.zeros(rows, np.int32),
        utterance=np.arange(rows, dtype=np.int32),
        partner=np.full(rows, -1, np.int32),
        start=np.zeros(rows, np.int32),
        seed=rng.integers(0, 2**32, rows, dtype=np.uint32),
    )
