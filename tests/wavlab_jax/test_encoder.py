"""The encoder against numpy oracles and against itself: padding, spellings, row keys, gradients, precision."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.batch import num_frames
from wavlab_jax.encoder import EncoderConfig, Formulation, encode, make_encoder
from wavlab_jax.encoder.config import EncoderError, formulation_for
from wavlab_jax.encoder.frontend import convolved_length
from wavlab_jax.encoder.layers import Gate, PositionConvolution, dropout, relative_buckets, standardize

# Two convolutions that make the same frames as the usual seven, and cheap code: compiling is what these tests cost.
TINY = EncoderConfig(
    extractor_channels=(6, 6),
    extractor_kernels=(10, 79),
    extractor_strides=(5, 64),
    width=16,
    layers=2,
    heads=2,
    feed_forward=24,
    position_kernel=8,
    position_groups=4,
    bias_buckets=16,
    bias_max_distance=12,
)
LARGE = dataclasses.replace(
    TINY, extractor_norm="layer", pre_norm=True, normalize_waveform=True, relative_bias=True, feature_gradient_scale=1.0
)
SAMPLES = 400 + 29 * 320  # 30 frames
HERE = formulation_for("cpu")
CHEAP = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def randomised(cfg: EncoderConfig, *, seed: int = 0):
    """An encoder of `cfg` whose every parameter is far from its initial value (nothing is compiled for it)."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(lambda: make_encoder(jax.random.key(0), cfg)))

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        values = rng.standard_normal(leaf.shape) * (0.3 if "bias" in name or leaf.ndim == 1 else 0.25)
        return jnp.asarray(values + ("scale" in name or "gain" in name or "constant" in name), jnp.float32)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


@pytest.fixture(scope="module")
def waveform() -> np.ndarray:
    """[3, samples] float32: noise of three levels with an offset."""
    rng = np.random.default_rng(1)
    scale = np.array([0.1, 0.02, 0.3])[:, None]
    return (scale * rng.standard_normal((3, SAMPLES)) + 0.05).astype(np.float32)


_encode = jax.jit(encode, static_argnames="formulation", compiler_options=CHEAP)


def run(encoder, waveform, valid=None, *, formulation=HERE, **arguments):
    """`encode`, compiled, as numpy arrays."""
    return jax.tree.map(np.asarray, _encode(encoder, waveform, valid, formulation=formulation, **arguments))


def largest_difference(left, right) -> float:
    return max(float(np.max(np.abs(a - b))) for a, b in zip(left, right, strict=True))


def assert_close(left, right):
    """Every leaf of one tree is that of the other, to rounding of the leaf's largest value."""
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * np.abs(other).max() + 1e-6)


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
    assert out.features.shape == (2, num_frames(samples), 6)
    assert out.valid is None


# ------------------------------------------------------------------------------------------- parts against numpy


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
@pytest.mark.parametrize("by_fft", [True, False])
def test_position_convolution_is_the_sum_it_says(taps, by_fft):
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
    np.testing.assert_allclose(convolution(x, by_fft=by_fft), expected, atol=2e-6)


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


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_spellings_agree(training, waveform):
    cfg = dataclasses.replace(LARGE, layerdrop=0.3)
    draws = {"key": jax.random.key(2), "seeds": np.arange(3, dtype=np.uint32)} if training else {}
    grouped = Formulation(scan_layers=False, position_by_fft=False)
    unrolled = run(randomised(cfg), waveform, formulation=grouped, **draws)
    remade = randomised(dataclasses.replace(cfg, rematerialize=True))
    scanned = run(remade, waveform, formulation=Formulation(scan_layers=True, position_by_fft=True), **draws)
    assert largest_difference(unrolled.hidden, scanned.hidden) < 2e-5


def test_spellings_agree_in_gradients(waveform):
    @partial(jax.jit, static_argnames="formulation", compiler_options=CHEAP)
    def gradient(encoder, formulation):
        def loss(encoder):
            encoded = encode(encoder, waveform[:1, :4000], formulation=formulation)
            return sum(jnp.sum(jnp.sin(h)) for h in encoded.hidden)

        return jax.grad(loss)(encoder)

    unrolled = gradient(randomised(LARGE), Formulation(scan_layers=False, position_by_fft=False))
    remade = randomised(dataclasses.replace(LARGE, rematerialize=True))
    scanned = gradient(remade, Formulation(scan_layers=True, position_by_fft=True))
    assert_close(scanned, unrolled)


def test_platforms_choose_their_spelling():
    assert formulation_for("cpu") == Formulation(scan_layers=False, position_by_fft=True)
    assert formulation_for("tpu") == formulation_for("gpu") == Formulation(scan_layers=True, position_by_fft=False)


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
    spelling = Formulation(scan_layers=True, position_by_fft=True)
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
    exactly = partial(jax.tree.map, np.testing.assert_array_equal)
    exactly(jax.tree.map(lambda leaf: np.float32(0.5) * leaf, full["extractor"]), half["extractor"])
    assert_close(jax.tree.map(lambda leaf: np.float32(0.1) * leaf, full["extractor"]), tenth["extractor"])
    for scaled in (half, tenth):
        exactly(full["rest"], scaled["rest"])


def test_bfloat16_is_close(waveform):
    exact = run(randomised(LARGE), waveform)
    encoder = randomised(dataclasses.replace(LARGE, compute_dtype="bfloat16"))
    rounded = run(encoder, waveform)
    assert rounded.features.dtype == jnp.bfloat16
    for one, other in zip(exact.hidden, rounded.hidden, strict=True):
        assert other.dtype == jnp.bfloat16
        error = np.linalg.norm(one - np.float32(other)) / np.linalg.norm(one)
        assert 1e-4 < error < 0.06  # bfloat16 keeps 8 bits; no difference at all would mean it was not used
    spelling = Formulation(scan_layers=True, position_by_fft=False)
    draws = {"key": jax.random.key(0), "seeds": np.arange(3, dtype=np.uint32)}
    scanned = jax.eval_shape(lambda e: encode(e, waveform, formulation=spelling, **draws), encoder)
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
        ({"relative_bias": True, "bias_buckets": 18}, "bias_buckets"),
        ({"relative_bias": True, "bias_max_distance": 4}, "bias_max_distance"),
        ({"extractor_kernels": (10, 80)}, "405 samples every 320"),
        ({"extractor_strides": (5, 32)}, "400 samples every 160"),
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
