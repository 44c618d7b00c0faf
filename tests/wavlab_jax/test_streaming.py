import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.batch import num_frames
from tests.wavlab_jax import tiny
from wavlab_jax.encoder import EncoderConfig, encode, make_encoder
from wavlab_jax.streaming import (
    MEAN,
    Extractor,
    StreamError,
    WindowConfig,
    cut,
    parse_layers,
    plan_windows,
)

KINDS = {
    "group norm": dict(extractor_norm="group"),
    "group norm, normalised waveform": dict(extractor_norm="group", normalize_waveform=True, relative_bias=True),
    "layer norm": dict(
        extractor_norm="layer",
        normalize_waveform=True,
        pre_norm=True,
        extractor_bias=True,
        valid_frames="fairseq_bins",  # which padding would show in
    ),
}
EVERY = (0, 1, 2, MEAN)
LONG = 11.37  # seconds; one length for most tests, because each is compiled
SMALL = WindowConfig(window=4.0, context=1.0)


@pytest.fixture(scope="module", params=KINDS)
def encoder(request):
    return make_encoder(jax.random.key(0), tiny.encoder(**KINDS[request.param]))


def recording(seconds, *, seed=0):
    """Noise that grows louder, with an offset: the moments of a part are not those of the whole."""
    samples = round(seconds * 16_000)
    noise = np.random.default_rng(seed).normal(scale=0.05, size=samples) * np.linspace(0.1, 2.0, samples)
    return (noise + 0.02).astype(np.float32)


def in_blocks(waveform, size=7_001):
    return lambda: (waveform[i : i + size] for i in range(0, len(waveform), size))


@jax.jit
def encoded(encoder, waveform):
    found = encode(encoder, waveform[None])
    return found.hidden, found.features


def one_shot(encoder, waveform):
    """[layers + 1 and their mean, frames, width], and the convolutions' output."""
    hidden, features = encoded(encoder, waveform)
    hidden = np.stack(hidden)[:, 0]
    return np.concatenate([hidden, hidden.mean(axis=0, keepdims=True)]), np.asarray(features[0])


def test_short_recordings_are_one_shot_whatever_they_are_padded_to(encoder):
    extractor = Extractor(encoder, layers=EVERY)
    waveforms = [recording(seconds, seed=i) for i, seconds in enumerate((2.9, 3.99, 3.1))]
    expected, _ = one_shot(encoder, waveforms[0])
    found = extractor.in_one_piece(waveforms, rows=4)
    assert [len(hidden[0]) for hidden in found] == [num_frames(len(waveform)) for waveform in waveforms]
    assert found[0].dtype == np.float32 and found[0].shape == expected.shape
    np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_before_the_transformer_a_long_recording_is_one_shot(encoder):
    """Through the chunks' borders and to the last frame, whatever blocks it comes in."""
    waveform = recording(LONG)
    _, expected = one_shot(encoder, waveform)
    extractor = Extractor(encoder, layers=EVERY, cfg=SMALL)
    for blocks in (in_blocks(waveform), in_blocks(waveform, 163), in_blocks(waveform, 10**9)):
        samples, whole = extractor.whole_moments(blocks)
        chunks = list(extractor.chunks(blocks, whole))
        assert samples == len(waveform) and len(chunks) > 4
        np.testing.assert_allclose(np.concatenate(chunks), expected, atol=3e-6)


def test_parts_alone_would_not_do(encoder):
    """The test above can fail: with the moments of its first part a recording comes out otherwise."""
    waveform = recording(LONG)
    _, expected = one_shot(encoder, waveform)
    extractor = Extractor(encoder, layers=EVERY, cfg=SMALL)
    _, of_a_part = extractor.whole_moments(in_blocks(waveform[:64_000]))
    wrong = np.concatenate(list(extractor.chunks(in_blocks(waveform), of_a_part)))
    assert np.abs(wrong - expected).max() > 0.1


def test_a_long_recording_is_near_one_shot_and_nearer_with_more_context(encoder):
    waveform = recording(LONG)
    expected, _ = one_shot(encoder, waveform)
    differences = []
    for context in (0.0, 0.2, 1.5):
        extractor = Extractor(encoder, layers=EVERY, cfg=WindowConfig(window=4.0, context=context))
        streamed = extractor.stream(in_blocks(waveform))
        pieces = list(streamed.pieces)
        found = np.concatenate(pieces, axis=1)
        assert found.shape == expected.shape and streamed.frames == num_frames(len(waveform)) and len(pieces) > 2
        differences.append(np.abs(found - expected).max(axis=(1, 2)))
    # the positional convolution of 8 frames ends inside the context: layer 0 is exact with any
    assert differences[0][0] > 1e-3 and max(differences[1][0], differences[2][0]) < 1e-5
    assert differences[2][3] < differences[0][3]
    assert differences[2].max() < 0.1 * np.abs(expected).max()


def test_without_a_limit_any_length_is_one_shot(encoder):
    waveform = recording(LONG)
    extractor = Extractor(encoder, layers=EVERY, cfg=WindowConfig(window=0))
    np.testing.assert_allclose(extractor.in_one_piece([waveform])[0], one_shot(encoder, waveform)[0], atol=1e-5)


@pytest.mark.parametrize("extra", [1, 320])
def test_just_over_a_window(extra):
    encoder = make_encoder(jax.random.key(0), tiny.encoder(**KINDS["group norm"]))
    waveform = recording(4.0 + extra / 16_000)
    streamed = Extractor(encoder, layers=(0,), cfg=SMALL).stream(in_blocks(waveform))
    found = np.concatenate(list(streamed.pieces), axis=1)
    np.testing.assert_allclose(found[0], one_shot(encoder, waveform)[0][0], atol=1e-5)


@pytest.mark.parametrize("level", [0.0, 1e-4])
def test_silence_is_finite_and_quiet_audio_exact(encoder, level):
    waveform = (level * recording(LONG)).astype(np.float32)
    found = np.concatenate(list(Extractor(encoder, layers=(0,), cfg=SMALL).stream(in_blocks(waveform)).pieces), axis=1)
    np.testing.assert_allclose(found[0], one_shot(encoder, waveform)[0][0], atol=1e-4)


def test_the_real_convolutions_too():
    """Seven of them, through chunks that end anywhere."""
    cfg = EncoderConfig(
        extractor_channels=(8,) * 7, width=16, layers=1, heads=2, feed_forward=16, position_kernel=8, position_groups=2
    )
    encoder = make_encoder(jax.random.key(1), cfg)
    waveform = recording(5.4321)
    extractor = Extractor(encoder, layers=(0,), cfg=WindowConfig(window=2.0, context=0.4))
    _, whole = extractor.whole_moments(in_blocks(waveform))
    found = np.concatenate(list(extractor.chunks(in_blocks(waveform), whole)))
    np.testing.assert_allclose(found, one_shot(encoder, waveform)[1], atol=1e-5)


def test_features_are_float32_whatever_the_model_trained_in():
    cfg = tiny.encoder(extractor_norm="layer")
    full = make_encoder(jax.random.key(0), cfg)
    half = make_encoder(jax.random.key(0), dataclasses.replace(cfg, compute_dtype="bfloat16", rematerialize="layers"))
    waveform = recording(1.0)
    first, second = (Extractor(e, layers=EVERY).in_one_piece([waveform])[0] for e in (full, half))
    np.testing.assert_array_equal(first, second)
    assert half.config.compute_dtype == "bfloat16"


def test_few_static_lengths(encoder):
    extractor = Extractor(encoder, layers=(0,))
    lengths = {extractor.static_length(samples) for samples in range(400, 480_001, 317)}
    assert len(lengths) == 9 and max(lengths) == 480_000
    unlimited = Extractor(encoder, layers=(0,), cfg=WindowConfig(window=0))
    for samples in range(32_000, 480_000, 1_001):
        assert samples <= extractor.static_length(samples) <= 1.4143 * samples
        assert samples <= unlimited.static_length(samples) <= 1.4143 * samples
    assert unlimited.static_length(16_000 * 600 + 1) == 16_000 * 615
    assert [extractor.rows_at_once(seconds * 16_000) for seconds in (2, 30, 61)] == [30, 2, 1]


def test_what_cannot_be_encoded_is_refused(encoder):
    extractor = Extractor(encoder, layers=(0,), cfg=SMALL)
    with pytest.raises(StreamError, match="399 samples.*needs 400"):
        extractor.in_one_piece([recording(1.0), recording(399 / 16_000)])
    with pytest.raises(StreamError, match="one piece"):
        extractor.stream(in_blocks(recording(3.0)))
    readings = iter((recording(LONG), recording(LONG), recording(6.0)))
    shrinking = Extractor(encoder, layers=(0,), cfg=SMALL).stream(lambda: [next(readings)])
    if encoder.config.extractor_norm == "group":
        with pytest.raises(StreamError, match="became shorter"):
            list(shrinking.pieces)
    for window, context in ((4.0, 2.0), (-1.0, 0.0), (4.0, -1.0), (0.05, 0.0)):
        with pytest.raises(StreamError, match="longer than twice the context"):
            WindowConfig(window=window, context=context)


@given(frames=st.integers(199, 5_000), window=st.floats(1.0, 4.0), context=st.floats(0.0, 0.45))
def test_windows_keep_every_frame_once_with_context_around_it(frames, window, context):
    cfg = WindowConfig(window=window, context=context)
    windows, kept = list(plan_windows(frames, cfg=cfg)), 0
    for start, keep_from, keep_to in windows:
        assert keep_from == kept < keep_to and 0 <= start <= keep_from
        assert keep_to <= start + cfg.frames <= frames
        assert keep_from - start >= cfg.context_frames or start == 0
        assert start + cfg.frames - keep_to >= cfg.context_frames or keep_to == frames
        kept = keep_to
    assert kept == frames
    assert len(windows) <= (frames - cfg.frames) / cfg.step_frames + 2


@given(
    samples=st.integers(0, 3_000),
    block=st.integers(1, 700),
    field=st.integers(1, 60),
    hop=st.integers(1, 60),
    outputs=st.integers(1, 50),
)
def test_cutting_loses_and_repeats_nothing(samples, block, field, hop, outputs):
    hop = min(hop, field)
    waveform = np.arange(samples, dtype=np.float32)
    found = []
    for chunk, real in cut(in_blocks(waveform, block)(), field=field, hop=hop, outputs=outputs):
        assert len(chunk) == field + (outputs - 1) * hop and 0 < real <= outputs
        found += [chunk[i * hop : i * hop + field] for i in range(real)]
    expected = [waveform[i : i + field] for i in range(0, samples - field + 1, hop)]
    np.testing.assert_array_equal(found, expected)


def test_layers_by_name():
    assert parse_layers("6, 9,mean", layers=12) == (6, 9, MEAN)
    assert parse_layers("all", layers=2) == (0, 1, 2)
    assert parse_layers("mean,all", layers=1) == (MEAN, 0, 1)
    for text in ("13", "-1", "", "6,", "last", "1.5", "²"):
        with pytest.raises(StreamError, match="0 to 12"):
            parse_layers(text, layers=12)
