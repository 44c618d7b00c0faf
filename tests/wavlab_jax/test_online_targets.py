"""Units that are computed in the step: random projections against NumPy, a teacher's against its own hidden states."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.batch import NO_UNIT
from tests.wavlab_jax import tiny
from wavlab_jax.encoder import encode, formulation_for, lower_layers
from wavlab_jax.features import log_mel, mfcc
from wavlab_jax.sharding import MeshConfig, make_mesh, place_batch
from wavlab_jax.step import initial_state, make_predict_step, make_train_step
from wavlab_jax.targets import kmeans
from wavlab_jax.targets.online import make_targets
from wavlab_jax.targets.random_projection import (
    RandomProjectionConfig,
    RandomProjectionError,
    make_projection,
    random_projection,
)
from wavlab_jax.targets.teacher import mfcc_units, teacher_units

CPU = formulation_for("cpu")


def one_device():
    return make_mesh(MeshConfig(), devices=jax.devices()[:1])


def padded_batch(rows=3):
    """Rows of 5,000, 8,000 and 6,500 real samples, and nothing in those after."""
    batch = tiny.batch(rows)
    samples = np.array([5_000, 8_000, 6_500][:rows], np.int32)
    real = np.arange(batch.waveform.shape[1])[None] < samples[:, None]
    valid = np.arange(batch.valid.shape[1])[None] < ((samples - 400) // 320 + 1)[:, None]
    return batch._replace(waveform=np.where(real, batch.waveform, 0), valid=valid, samples=samples)


def test_a_random_projection_against_its_definition():
    """Row by row without padding, in float64; and its arrays are those that the paper describes."""
    cfg = RandomProjectionConfig(units=40, dim=6, mels=12, stack=3, seed=5)
    made = make_projection(cfg)
    bound = np.sqrt(6 / (36 + 6))
    assert made.matrix.shape == (36, 6) and 0.9 * bound < np.abs(made.matrix).max() <= bound
    np.testing.assert_allclose(np.linalg.norm(made.codebook, axis=1), 1.0, rtol=1e-6)
    assert not np.array_equal(make_projection(dataclasses.replace(cfg, seed=6)).codebook, made.codebook)

    batch, targets = padded_batch(), make_targets([random_projection(cfg)], one_device())
    found = np.asarray(jax.jit(targets.label)(targets.frozen, batch).units)
    assert found.shape == (3, 24, 1)
    for row, samples in enumerate(batch.samples):
        mel = np.asarray(log_mel(batch.waveform[row : row + 1, :samples], mels=12), np.float64)[0]
        mel = (mel - mel.mean(0)) / np.sqrt(mel.var(0) + 1e-5)
        edges = np.concatenate([mel[:1], mel, mel[-1:]])
        projected = np.concatenate([edges[:-2], mel, edges[2:]], axis=1) @ made.matrix.astype(np.float64)
        projected /= np.linalg.norm(projected, axis=1, keepdims=True)
        distances = np.linalg.norm(projected[:, None] - made.codebook[None], axis=-1)
        np.testing.assert_array_equal(found[row, : len(mel), 0], distances.argmin(1))
        assert (found[row, len(mel) :] == NO_UNIT).all()
    with pytest.raises(RandomProjectionError, match="stack odd"):
        RandomProjectionConfig(stack=2)


def test_a_teachers_units_are_those_of_its_hidden_states():
    """With fewer layers kept, in padded rows as in rows of their own; the last layer of pre-norm has a norm more."""
    encoder = tiny.randomised(tiny.encoder(pre_norm=True, relative_bias=True, normalize_waveform=True))
    batch = padded_batch()
    whole = [
        jax.jit(encode, static_argnames="formulation")(encoder, batch.waveform[i : i + 1, :n], formulation=CPU).hidden
        for i, n in enumerate(batch.samples)
    ]
    for layer in (1, 2):
        short = lower_layers(encoder, layer)
        assert short.layers.expand.kernel[...].shape[0] == min(layer + 1, 2) and encoder.config.layers == 2
        hidden = [np.asarray(row[layer][0]) for row in whole]
        rng = np.random.default_rng(0)
        centers = np.concatenate(hidden)[rng.permutation(sum(map(len, hidden)))[:9]]
        targets = make_targets([teacher_units(encoder, centers, layer=layer, formulation=CPU)], one_device())
        found = np.asarray(jax.jit(targets.label)(targets.frozen, batch).units[..., 0])
        for row, features in enumerate(hidden):
            np.testing.assert_array_equal(found[row, : len(features)], kmeans.assign(centers, features))
            assert (found[row, len(features) :] == NO_UNIT).all()
    assert lower_layers(encoder, 0).layers.expand.kernel[...].shape[0] == 1


def test_sets_come_in_order_and_are_of_the_clean_waveform():
    batch = tiny.batch(2)
    rng = np.random.default_rng(1)
    centers = rng.normal(size=(7, 39)).astype(np.float32)
    noisy = batch._replace(clean=batch.waveform, waveform=rng.normal(size=batch.waveform.shape).astype(np.float32))
    stored, mel = mfcc_units(centers), RandomProjectionConfig(units=9, dim=4, mels=8)
    targets = make_targets([random_projection(mel), None, stored], one_device())
    label = jax.jit(targets.label)
    quiet, loud = (np.asarray(label(targets.frozen, b).units) for b in (batch, noisy))
    np.testing.assert_array_equal(quiet, loud)
    np.testing.assert_array_equal(quiet[..., 1], batch.units[..., 0])
    features = np.asarray(mfcc(batch.waveform))[:, ::2]
    np.testing.assert_array_equal(quiet[..., 2].ravel(), kmeans.assign(centers, features.reshape(-1, 39)))
    assert make_targets([None, None], one_device()) is None


@pytest.mark.once
def test_a_step_labels_its_own_batch():
    """The update is that of the same units in the batch, in any number of passes; so are evaluation's answers."""
    cfg = tiny.learner()
    projection = RandomProjectionConfig(units=tiny.UNITS, dim=4, mels=8)
    batch, mesh = tiny.batch(4), make_mesh(MeshConfig(), devices=jax.devices()[:2])
    targets = make_targets([random_projection(projection)], mesh)
    units = np.asarray(targets.label(targets.frozen, jax.tree.map(jnp.asarray, batch)).units)
    bare = batch._replace(units=np.zeros((*batch.valid.shape, 0), np.int32))
    given, _ = run_once(cfg, mesh, batch._replace(units=units), None, passes=1)
    found, params = run_once(cfg, mesh, bare, targets, passes=2)
    assert float(found.loss) == pytest.approx(float(given.loss), rel=1e-5)
    assert float(found.gradient_norm) == pytest.approx(float(given.gradient_norm), rel=1e-4)
    judged = make_predict_step(cfg, mesh, targets)(params, place_batch(bare, mesh=mesh, passes=1))
    np.testing.assert_array_equal(judged.units, units[..., 0])


def run_once(cfg, mesh, batch, targets, *, passes):
    step = make_train_step(cfg, mesh, targets)
    state, result = step(initial_state(cfg, mesh), place_batch(batch, mesh=mesh, passes=passes))
    return jax.device_get(result), state.params
