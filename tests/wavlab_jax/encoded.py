"""Tiny encoders for the tests of the encoder, compiled cheaply: compiling is what these tests cost."""

import dataclasses

import jax
import numpy as np

from tests.wavlab_jax import tiny
from wavlab_jax.encoder import encode
from wavlab_jax.encoder.config import formulation_for

TINY = tiny.encoder(
    position_groups=4,
    bias_buckets=16,
    bias_max_distance=12,
    dropout=0.1,
    attention_dropout=0.1,
    projection_dropout=0.1,
    layerdrop=0.05,
    feature_gradient_scale=0.1,
)
LARGE = dataclasses.replace(
    TINY, extractor_norm="layer", pre_norm=True, normalize_waveform=True, relative_bias=True, feature_gradient_scale=1.0
)
SAMPLES = 400 + 29 * 320  # 30 frames
HERE = formulation_for("cpu")
CHEAP = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

_encode = jax.jit(encode, static_argnames="formulation", compiler_options=CHEAP)


def run(encoder, waveform, valid=None, *, formulation=HERE, **arguments):
    """`encode`, compiled, as numpy arrays."""
    return jax.tree.map(np.asarray, _encode(encoder, waveform, valid, formulation=formulation, **arguments))


def largest_difference(left, right) -> float:
    return max(float(np.max(np.abs(a - b))) for a, b in zip(left, right, strict=True))


def assert_close(left, right):
    """Every leaf of one tree is that of the other, to rounding of the leaf's largest value.

    Or to 5e-6: the gradient of the keys' bias is zero, so that its values are rounding alone.
    """
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(other).max() + 5e-6)
