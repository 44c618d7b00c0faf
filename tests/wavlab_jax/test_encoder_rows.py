"""What a row of a batch is to the encoder: padding, fillers, masks, and dropout that depends on its seed alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.batch import num_frames
from tests.wavlab_jax.encoded import CHEAP, HERE, LARGE, SAMPLES, TINY, assert_close, largest_difference, run
from tests.wavlab_jax.tiny import randomised
from wavlab_jax.encoder import Formulation, encode
from wavlab_jax.encoder.layers import dropout

# --------------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("cfg", [dataclasses.replace(TINY, relative_bias=True), LARGE], ids=["group", "layer"])
def test_padding_changes_nothing(cfg, waveform):
    encoder = randomised(cfg)
    real = np.array([5007, 5007, SAMPLES])
    valid = np.arange(SAMPLES) < real[:, None]
    garbage = np.where(valid, waveform, 100.0).astype(np.float32)
    padded = run(encoder, garbage, valid)
    frames = num_frames(5007)
    np.testing.assert_array_equal(padded.valid.sum(1), [frames, frames, num_frames(SAMPLES)])
    assert padded.valid[:2, :frames].all()
    for rows, samples in ((slice(0, 2), 5007), (slice(2, 3), SAMPLES)):
        alone = run(encoder, waveform[rows, :samples])
        frames = num_frames(samples)
        assert largest_difference([h[rows, :frames] for h in padded.hidden], alone.hidden) < 3e-5
        assert largest_difference([padded.features[rows, :frames]], [alone.features]) < 3e-5


def test_filler_rows_are_finite_and_harmless(waveform):
    encoder = randomised(dataclasses.replace(LARGE, extractor_norm="group"))
    frames = num_frames(SAMPLES)
    weight = np.stack([np.ones(frames), np.zeros(frames)])[..., None]

    def loss(encoder, waveform, valid):
        encoded = encode(encoder, waveform, valid, formulation=HERE)
        return sum(jnp.sum(jnp.sin(h) * weight) for h in (*encoded.hidden, encoded.features)), encoded

    gradient = jax.jit(jax.grad(loss, has_aux=True), compiler_options=CHEAP)
    without_filler, _ = gradient(encoder, waveform[[0, 0]], np.ones((2, SAMPLES), bool))
    for real in (0, 5, 80):  # no sample, no output of the first convolution, no frame
        valid = np.ones((2, SAMPLES), bool)
        valid[1, real:] = False
        with_filler, encoded = gradient(encoder, waveform[:2], valid)
        assert not np.asarray(encoded.valid)[1].any()
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((encoded.hidden, encoded.features)))
        assert_close(with_filler, without_filler)


# ------------------------------------------------------------------------------------------------- mask and dropout


def test_masked_frames_are_the_embedding(waveform):
    encoder = randomised(dataclasses.replace(TINY, position_kernel=1))
    frames = num_frames(SAMPLES)
    everywhere = run(encoder, waveform, mask=np.ones((3, frames), bool))
    assert largest_difference([everywhere.hidden[-1][0]], [everywhere.hidden[-1][2]]) < 1e-6  # nothing else is heard
    some = np.zeros((3, frames), bool)
    some[1, 4:9] = True
    masked, clean = run(encoder, waveform, mask=some), run(encoder, waveform, mask=np.zeros_like(some))
    changed = np.abs(masked.hidden[0] - clean.hidden[0]).max(-1) > 1e-6
    np.testing.assert_array_equal(changed, some)  # a position kernel of one frame spreads nothing
    np.testing.assert_array_equal(masked.features, clean.features)
    np.testing.assert_allclose(masked.hidden[0][1, 4:9], everywhere.hidden[0][1, 4:9], atol=1e-6)


def test_dropout_zeroes_and_rescales():
    x = jnp.ones((2, 100, 100))
    keys = jax.random.split(jax.random.key(0), 2)
    out = np.asarray(dropout(x, rate=0.3, keys=keys))
    kept = out != 0
    assert float(kept.mean()) == pytest.approx(0.7, abs=0.01)
    np.testing.assert_allclose(out[kept], 1 / 0.7, rtol=1e-6)
    assert not np.array_equal(kept[0], kept[1])
    assert dropout(x, rate=0.0, keys=keys) is x and dropout(x, rate=0.3, keys=None) is x


def test_a_rows_dropout_depends_on_its_seed_alone(waveform):
    encoder = randomised(dataclasses.replace(LARGE, layerdrop=0.0, activation_dropout=0.1))
    key, seeds = jax.random.key(5), np.array([11, 4_000_000_000, 13], np.uint32)
    whole = run(encoder, waveform, key=key, seeds=seeds).hidden[-1]
    order = [2, 0, 1]
    shuffled = run(encoder, waveform[order], key=key, seeds=seeds[order]).hidden[-1]
    np.testing.assert_allclose(shuffled, whole[order], atol=1e-5)
    for row in range(3):
        alone = run(encoder, waveform[row : row + 1], key=key, seeds=seeds[row : row + 1]).hidden[-1]
        np.testing.assert_allclose(alone[0], whole[row], atol=1e-5)
    assert largest_difference([whole], [run(encoder, waveform, key=key, seeds=seeds + np.uint32(1)).hidden[-1]]) > 0.1
    assert largest_difference([whole], [run(encoder, waveform, key=jax.random.key(6), seeds=seeds).hidden[-1]]) > 0.1


def test_every_dropout_acts_only_with_a_key(waveform):
    places = ("dropout", "attention_dropout", "activation_dropout", "projection_dropout")
    silent = {"layers": 1} | dict.fromkeys((*places, "layerdrop"), 0.0)
    draws = {"key": jax.random.key(0), "seeds": np.arange(1, dtype=np.uint32)}
    short = waveform[:1, :2000]
    without = run(randomised(dataclasses.replace(TINY, layers=1)), short)
    unchanged = run(randomised(dataclasses.replace(TINY, **silent)), short, **draws)
    assert largest_difference(unchanged.hidden, without.hidden) < 1e-6
    for place in places:
        encoder = randomised(dataclasses.replace(TINY, **(silent | {place: 0.5})))
        assert largest_difference(run(encoder, short, **draws).hidden, without.hidden) > 1e-2, place


def test_layers_are_dropped_for_all_rows_at_once(waveform):
    silent = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "projection_dropout"), 0.0)
    encoder = randomised(dataclasses.replace(TINY, layers=6, layerdrop=0.4, **silent))
    spelling = Formulation(True, position="dft", attention_by_head=True, extractor_by_row=True)
    short = waveform[:, :1000]
    complete = run(encoder, short, formulation=spelling).hidden
    dropped = []
    for step in range(40):
        seeds = np.array([step, 7 * step, 2**20], np.uint32)
        hidden = np.stack(run(encoder, short, formulation=spelling, key=jax.random.key(step), seeds=seeds).hidden)
        same = (hidden[1:] == hidden[:-1]).all((2, 3))  # [layers, rows]
        assert (same == same[:, :1]).all()
        dropped.append(same[:, 0])
        if not same.any():
            assert largest_difference(hidden, complete) < 1e-5  # a kept layer is not rescaled
    assert np.mean(dropped) == pytest.approx(0.4, abs=0.1)
    assert np.any(dropped, axis=0).all() and not np.all(dropped, axis=0).any()
