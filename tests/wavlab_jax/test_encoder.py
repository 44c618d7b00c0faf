"""The encoder against numpy oracles and against itself: shapes, parts, spellings, gradients, precision, errors."""

import dataclasses
import math
from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.batch import num_frames
from tests.wavlab_jax.encoded import CHEAP, HERE, LARGE, SAMPLES, TINY, assert_close, largest_difference, run
from tests.wavlab_jax.tiny import randomised
from wavlab_jax.encoder import EncoderConfig, Formulation, encode, make_encoder, unstack_layers
from wavlab_jax.encoder.config import EncoderError, PositionSpelling, formulation_for
from wavlab_jax.encoder.encoder import _real_frames
from wavlab_jax.encoder.frontend import convolved_length
from wavlab_jax.encoder.layers import Gate, PositionConvolution, relative_buckets, standardize

# ---------------------------------------------------------------------------------------------- shapes and frames


@given(st.integers(400, 700_000))
@settings(max_examples=200)
def test_one_formula_knows_the_number_of_frames(samples):
    for cfg in (EncoderConfig(), TINY):
        length = samples
        for kernel, stride in zip(cfg.extractor_kernels, cfg.extractor_strides, strict=True):
            length = convolved_length(length, kernel=kernel, stride=stride)
        assert length == num_frames(samples)


@pytest.mark.parametrize("samples", [400, 719, 720, 16_000])
def test_shapes(samples):
    encoder = randomised(TINY)
    out = jax.eval_shape(lambda x: encode(encoder, x), jax.ShapeDtypeStruct((2, samples), jnp.float32))
    assert [h.shape for h in out.hidden] == [(2, num_frames(samples), 16)] * 3
    assert out.features.shape == (2, num_frames(samples), 8)
    assert out.valid is None


# ------------------------------------------------------------------------------------------- parts against numpy


@pytest.mark.parametrize("level", [0.0, 1e-4])
@pytest.mark.parametrize("masked", [False, True])
def test_the_norm_over_time_keeps_its_bits_where_audio_is_all_but_constant(level, masked):
    """What the mean of 100,000 summands loses is multiplied by 1 / sqrt(epsilon); float64 says what is right."""
    noise = np.random.default_rng(0).standard_normal((1, 100_000, 4))
    x = (np.array([0.3, -1.7, 2.9, 0.011]) + level * noise).astype(np.float32)
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(axis=1, keepdims=True)) / np.sqrt(exact.var(axis=1, keepdims=True) + 1e-5)
    where = np.ones((1, 100_000, 1), bool) if masked else None
    found = jax.jit(partial(standardize, axis=1, epsilon=1e-5))(x, where=where)
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-5)


def test_buckets_are_those_of_unilm_for_thirty_seconds():
    def bucket(relative, buckets, max_distance):  # unilm wavlm/modules.py _relative_positions_bucket, one number
        half = buckets // 2
        offset = half if relative > 0 else 0
        distance, exact = abs(relative), half // 2
        if distance < exact:
            return offset + distance
        return offset + min(
            int(exact + math.log(distance / exact) / math.log(max_distance / exact) * (half - exact)), half - 1
        )

    for buckets, max_distance in ((320, 800), (320, 1280), (32, 64), (32, 128)):
        table = relative_buckets(1500, buckets=buckets, max_distance=max_distance)
        assert table.dtype == np.int32 and table.shape == (1500, 1500)
        row = [bucket(relative, buckets, max_distance) for relative in range(-1499, 1500)]
        for query in (0, 1, 77, 750, 1499):
            np.testing.assert_array_equal(table[query], row[1499 - query : 2999 - query])
    released = relative_buckets(1500, buckets=320, max_distance=800)[0]
    assert released[777] < 319 and set(released[778:]) == {319}
    unilm_default = relative_buckets(1500, buckets=320, max_distance=1280)[0]
    assert np.flatnonzero(released != unilm_default)[0] == 85


@pytest.mark.parametrize("taps", [1, 8, 9])
@pytest.mark.parametrize("spelling", get_args(PositionSpelling))
def test_position_convolution_is_the_sum_it_says(taps, spelling):
    cfg = dataclasses.replace(TINY, position_kernel=taps)
    rng = np.random.default_rng(taps)
    convolution = PositionConvolution(jax.random.key(taps), cfg)
    gain, bias = rng.standard_normal(taps), rng.standard_normal(cfg.width)
    convolution.gain[...], convolution.bias[...] = jnp.float32(gain), jnp.float32(bias)
    x = rng.standard_normal((2, 11, cfg.width)).astype(np.float32)

    direction = np.float64(convolution.direction[...])
    kernel = gain[:, None, None] * direction / np.sqrt((direction**2).sum((1, 2), keepdims=True))
    group = cfg.width // cfg.position_groups
    padded = np.pad(np.float64(x), ((0, 0), (taps // 2, taps // 2), (0, 0)))
    expected = np.zeros((2, 11, cfg.width))
    for frame in range(11):
        for channel in range(cfg.width):
            first = channel // group * group
            seen = padded[:, frame : frame + taps, first : first + group]
            expected[:, frame, channel] = (seen * kernel[:, :, channel]).sum((1, 2)) + bias[channel]
    erf = np.vectorize(math.erf)
    expected = expected * 0.5 * (1 + erf(expected / math.sqrt(2)))
    np.testing.assert_allclose(convolution(x, spelling=spelling), expected, atol=2e-6)


def test_gate_is_that_of_unilm():
    rng = np.random.default_rng(3)
    cfg = dataclasses.replace(TINY, width=12, heads=3, relative_bias=True)
    gate = Gate(jax.random.key(0), cfg)
    kernel, bias, constant = rng.standard_normal((4, 8)), rng.standard_normal(8), rng.standard_normal(3)
    gate.dense.kernel[...], gate.dense.bias[...] = jnp.float32(kernel), jnp.float32(bias)
    gate.constant[...] = jnp.float32(constant)
    x = rng.standard_normal((2, 5, 12)).astype(np.float32)
    expected = np.empty((2, 3, 5))
    for row, head, frame in np.ndindex(2, 3, 5):
        eight = np.float64(x)[row, frame, 4 * head : 4 * head + 4] @ kernel + bias
        a, b = (1 / (1 + math.exp(-four.sum())) for four in (eight[:4], eight[4:]))
        expected[row, head, frame] = a * (b * constant[head] - 1) + 2
    np.testing.assert_allclose(gate(x), expected, rtol=1e-5)


@pytest.mark.parametrize(("epsilon", "deviation"), [(1e-5, 0.302), (1e-7, 0.954)])
def test_quiet_waveforms_feel_the_epsilon(epsilon, deviation):
    quiet = np.random.default_rng(0).standard_normal((1, 100_000))
    quiet = 1e-3 * (quiet - quiet.mean()) / quiet.std()
    heard = standardize(jnp.float32(quiet), axis=1, epsilon=epsilon)
    assert np.std(heard) == pytest.approx(deviation, abs=1e-3)


def test_normalised_waveforms_have_no_level_and_no_offset(waveform):
    encoder = randomised(LARGE)
    assert largest_difference(run(encoder, 50 * waveform).hidden, run(encoder, 300 * waveform - 0.7).hidden) < 1e-3


def test_initial_values_follow_fairseq():
    cfg = dataclasses.replace(LARGE, extractor_channels=(64, 64), extractor_bias=True, width=64, feed_forward=128)
    make = jax.jit(lambda key: make_encoder(key, cfg), compiler_options=CHEAP)
    encoder, other = make(jax.random.key(0)), make(jax.random.key(1))
    assert not np.array_equal(encoder.layers.expand.kernel[...], other.layers.expand.kernel[...])

    def deviation(parameter):
        return float(np.std(parameter[...]))

    layers, frontend = encoder.layers, encoder.frontend
    first, second = np.asarray(layers.expand.kernel[...])
    assert not np.array_equal(first, second)  # every layer draws its own
    attention = layers.attention
    for layer in (layers.expand, layers.contract, attention.query, attention.output, attention.gate.dense):
        assert deviation(layer.kernel) == pytest.approx(0.02, rel=0.1)
        assert not np.any(layer.bias[...])
    assert deviation(encoder.relative_bias) == pytest.approx(0.02, rel=0.25)
    for convolution, taps, inputs in zip(
        frontend.convolutions, cfg.extractor_kernels, (1, *cfg.extractor_channels[:-1]), strict=True
    ):
        assert deviation(convolution.kernel) == pytest.approx(math.sqrt(2 / (taps * inputs)), rel=0.1)
        assert 0 < np.max(np.abs(convolution.bias[...])) <= 1 / math.sqrt(taps * inputs)
    # uniform on +-1/8, as torch.nn.Linear does for 64 inputs
    assert deviation(frontend.projection.kernel) == pytest.approx(1 / 8 / math.sqrt(3), rel=0.05)
    assert deviation(encoder.position.direction) == pytest.approx(math.sqrt(4 / (8 * 64)), rel=0.05)
    norm = np.sqrt(np.square(np.asarray(encoder.position.direction[...])).sum((1, 2)))
    np.testing.assert_allclose(encoder.position.gain[...], norm, rtol=1e-5)  # so the first kernel is the direction
    assert 0 <= np.min(encoder.mask_embedding[...]) and 0.3 < np.mean(encoder.mask_embedding[...]) < 0.7
    assert np.all(np.asarray(layers.attention.gate.constant[...]) == 1)


# ------------------------------------------------------------------------------------------------------- spellings

# between them every choice in both ways
UNROLLED = Formulation(
    False, position="by_group", attention_by_head=False, extractor_by_row=False, lean_gradients=False
)
SCANNED = Formulation(True, position="dft", attention_by_head=True, extractor_by_row=True, lean_gradients=True)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_spellings_agree(training, waveform):
    cfg = dataclasses.replace(LARGE, layerdrop=0.3)
    draws = {"key": jax.random.key(2), "seeds": np.arange(3, dtype=np.uint32)} if training else {}
    valid = np.arange(SAMPLES) < np.array([SAMPLES, 5007, 700])[:, None]
    unrolled = run(randomised(cfg), waveform, valid, formulation=UNROLLED, **draws)
    remade = randomised(dataclasses.replace(cfg, rematerialize="layers"))
    scanned = run(remade, waveform, valid, formulation=SCANNED, **draws)
    for one, other in zip(unrolled.hidden, scanned.hidden, strict=True):
        assert np.abs(one - other)[unrolled.valid].max() < 2e-5


def test_spellings_agree_in_gradients(waveform):
    @partial(jax.jit, static_argnames="formulation", compiler_options=CHEAP)
    def gradient(encoder, formulation):
        def loss(encoder):
            encoded = encode(encoder, waveform[:1, :4000], formulation=formulation)
            return sum(jnp.sum(jnp.sin(h)) for h in encoded.hidden)

        return jax.grad(loss)(encoder)

    unrolled = gradient(randomised(LARGE), UNROLLED)
    remade = randomised(dataclasses.replace(LARGE, rematerialize="dots"))
    scanned = gradient(remade, SCANNED)
    assert_close(scanned, unrolled)


def test_platforms_choose_their_spelling():
    on_cpu = SCANNED._replace(scan_layers=False, convolution_by_tap=True)
    assert formulation_for("cpu") == on_cpu
    plain = UNROLLED._replace(scan_layers=True, position="grouped")
    assert formulation_for("tpu") == plain
    assert formulation_for("gpu") == plain._replace(position="by_group")


def test_unstacked_layers_compute_the_same(waveform):
    encoder = randomised(LARGE)
    apart = unstack_layers(encoder)
    for formulation in (HERE, SCANNED):
        found = run(apart, waveform, formulation=formulation)
        assert largest_difference(found.hidden, run(encoder, waveform).hidden) < 2e-5
    assert len(apart.layers) == LARGE.layers and encoder.layers.expand.kernel.shape[0] == LARGE.layers


# ---------------------------------------------------------------------------------------------- frames of padded rows


@given(st.integers(400, 40_000), st.data())
@settings(max_examples=100)
def test_valid_frames_follow_the_rule(padded, data):
    samples = np.array(data.draw(st.lists(st.integers(0, padded), min_size=1, max_size=4)))
    frames = num_frames(padded)
    for rule in ("convolution", "fairseq_bins"):
        cfg = dataclasses.replace(TINY, valid_frames=rule)
        found = _real_frames(jnp.asarray(samples), padded, frames, cfg=cfg)
        if rule == "convolution":
            np.testing.assert_array_equal(found, num_frames(samples))
        else:  # fairseq `models/hubert/hubert.py` forward_padding_mask
            padding = np.arange(padded) >= samples[:, None]
            padding = padding[:, : padded - padded % frames].reshape(len(samples), frames, -1).all(-1)
            np.testing.assert_array_equal(np.arange(frames) < np.asarray(found)[:, None], ~padding)


def test_frames_in_fairseqs_bins_are_attended_to_and_hear_zeros(waveform):
    binned = randomised(dataclasses.replace(LARGE, valid_frames="fairseq_bins"))
    valid = np.arange(SAMPLES) < np.array([SAMPLES, 5007, 700])[:, None]
    found = run(binned, np.where(valid, waveform, 100.0).astype(np.float32), valid)
    same = run(binned, np.where(valid, waveform, -3.0).astype(np.float32), valid)
    strict = run(randomised(LARGE), waveform, valid)
    assert (found.valid.sum(1) >= strict.valid.sum(1)).all() and found.valid.sum() > strict.valid.sum()
    np.testing.assert_array_equal(found.hidden[-1], same.hidden[-1])  # whatever lies in the padding
    assert np.abs(found.hidden[-1] - strict.hidden[-1])[1][strict.valid[1]].max() > 1e-3


# ------------------------------------------------------------------------------------------ gradients and precision


def test_gradient_scale_multiplies_the_extractors_gradient_and_nothing_else(waveform):
    @partial(jax.jit, compiler_options=CHEAP)
    def gradient(encoder):
        def loss(encoder):
            encoded = encode(encoder, waveform[:1, :4000], formulation=HERE)
            return jnp.sum(jnp.sin(encoded.hidden[0])) + jnp.sum(jnp.sin(encoded.features)), encoded.features

        tree, features = jax.grad(loss, has_aux=True)(encoder)
        tree = nnx.to_pure_dict(nnx.state(tree))
        return {"extractor": tree["frontend"].pop("convolutions"), "rest": tree}, features

    full, features = gradient(randomised(dataclasses.replace(TINY, feature_gradient_scale=1.0)))
    half, half_features = gradient(randomised(dataclasses.replace(TINY, feature_gradient_scale=0.5)))
    tenth, tenth_features = gradient(randomised(dataclasses.replace(TINY, feature_gradient_scale=0.1)))
    np.testing.assert_array_equal(features, half_features)
    np.testing.assert_array_equal(features, tenth_features)

    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(full["extractor"]))
    for scale, scaled in ((0.5, half), (0.1, tenth)):  # to rounding: each scale is another program
        assert_close(jax.tree.map(lambda leaf, by=scale: np.float32(by) * leaf, full["extractor"]), scaled["extractor"])
        assert_close(full["rest"], scaled["rest"])


def test_bfloat16_is_close(waveform):
    exact = run(randomised(LARGE), waveform)
    encoder = randomised(dataclasses.replace(LARGE, compute_dtype="bfloat16"))
    rounded = run(encoder, waveform)
    assert rounded.features.dtype == jnp.bfloat16
    for one, other in zip(exact.hidden, rounded.hidden, strict=True):
        assert other.dtype == jnp.bfloat16
        error = np.linalg.norm(one - np.float32(other)) / np.linalg.norm(one)
        assert 1e-4 < error < 0.06  # bfloat16 keeps 8 bits; no difference at all would mean it was not used
    draws = {"key": jax.random.key(0), "seeds": np.arange(3, dtype=np.uint32)}
    scanned = jax.eval_shape(lambda e: encode(e, waveform, formulation=formulation_for("tpu"), **draws), encoder)
    assert all(h.dtype == jnp.bfloat16 for h in scanned.hidden)


def test_gradient_scale_costs_no_precision_in_bfloat16(waveform):
    half = dataclasses.replace(TINY, compute_dtype="bfloat16")
    scaled = run(randomised(half), waveform).features
    unscaled = run(randomised(dataclasses.replace(half, feature_gradient_scale=1.0)), waveform).features
    np.testing.assert_array_equal(scaled, unscaled)


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"extractor_channels": (6,) * 3}, "extractor_channels"),
        ({"heads": 3}, "heads 3"),
        ({"position_groups": 5}, "position_groups 5"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"layerdrop": 1.0}, "layerdrop is 1"),
        ({"feature_gradient_scale": -0.1}, "feature_gradient_scale is -0.1"),
        ({"relative_bias": True, "bias_buckets": 18}, "bias_buckets"),
        ({"relative_bias": True, "bias_max_distance": 4}, "bias_max_distance"),
        ({"extractor_kernels": (16, 26)}, "416 samples every 320"),
        ({"extractor_strides": (16, 10)}, "400 samples every 160"),
    ],
)
def test_impossible_configurations_name_the_field(change, named):
    with pytest.raises(EncoderError, match=named):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"waveform": np.zeros(SAMPLES, np.float32)}, "waveform"),
        ({"waveform": np.zeros((1, 399), np.float32)}, "at least 400 samples"),
        ({"valid": np.ones((2, 30), bool)}, r"`valid` must be \[2, 9680\]"),  # a batch's frames where samples are due
        ({"mask": np.ones((2, 29), bool)}, r"`mask` must be \[2, 30\]"),
        ({"key": jax.random.key(0), "seeds": np.zeros(3, np.uint32)}, r"`seeds` must be \[2\]"),
        ({"key": jax.random.key(0)}, "`key`"),
        ({"seeds": np.zeros(2, np.uint32)}, "`seeds`"),
    ],
)
def test_impossible_inputs_are_named(arguments, named):
    arguments = {"waveform": np.zeros((2, SAMPLES), np.float32)} | arguments
    waveform = arguments.pop("waveform")
    with pytest.raises(EncoderError, match=named):
        encode(randomised(TINY), waveform, **arguments)
