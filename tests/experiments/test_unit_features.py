"""Features in windows are those of one piece, whatever the devices; those chosen are the ones asked for."""

import jax
import numpy as np
import pytest

from data_pipelines.batch import num_frames
from experiments.unit_features import MFCC_CONTEXT, FrameExtractor
from tests.wavlab_jax import tiny
from wavlab_jax.encoder import make_encoder
from wavlab_jax.features import mfcc
from wavlab_jax.sharding import MeshConfig, make_mesh
from wavlab_jax.streaming import Extractor
from wavlab_jax.targets import kmeans

pytestmark = pytest.mark.once

WINDOW = 16_000
# around the window's own length, with and without samples that no frame of 50 Hz uses but one of 100 Hz does
SAMPLES = np.array([400, 16_000, 16_001, 15_999, 16_400, 16_719, 31_000, 48_123, 700, 40_560, 40_559])


def mesh(devices: int):
    return make_mesh(MeshConfig(), devices=jax.devices()[:devices])


@pytest.fixture(scope="module")
def audio():
    """Noise whose colour and level change, so that frames differ."""
    rng = np.random.default_rng(0)
    made = []
    for samples in SAMPLES:
        level = np.exp(np.sin(np.arange(samples) / 1500.0))
        made.append(0.1 * level * np.convolve(rng.standard_normal(samples + 8), np.ones(9) / 3, "valid") + 0.02)
    return [waveform.astype(np.float32) for waveform in made]


def reader(audio):
    return lambda i, start, samples: audio[i][start : start + samples]


@pytest.mark.parametrize("devices", [1, 8])
def test_mfcc_of_windows_are_those_of_one_piece(audio, devices):
    extractor = FrameExtractor(None, mesh=mesh(devices), windows=(2_000, WINDOW), pass_seconds=1)
    whole = np.concatenate([np.asarray(mfcc(waveform[None]))[0, ::2] for waveform in audio])
    rows = np.arange(len(audio))
    found = extractor.features(rows, SAMPLES, reader(audio))
    assert found.shape == (num_frames(SAMPLES).sum(), 39)
    np.testing.assert_allclose(found, whole, atol=2e-3)  # of cepstra up to 100
    centers = whole[::29]
    labels = extractor.units(rows, SAMPLES, reader(audio), centers=centers)
    np.testing.assert_array_equal(labels, kmeans.assign(centers, whole))


def test_less_context_would_not_do(audio):
    """The border is where it hurts: with one frame of context instead of two, some cepstra are others."""
    extractor = FrameExtractor(None, mesh=mesh(1), pass_seconds=2, windows=(WINDOW,), context=MFCC_CONTEXT / 2)
    found = extractor.features([7], SAMPLES, reader(audio))
    assert np.abs(found - np.asarray(mfcc(audio[7][None]))[0, ::2]).max() > 0.01


@pytest.mark.parametrize(("norm", "layer"), [("group", 0), ("layer", 2)])
def test_an_encoder_hears_windows_as_streaming_does_and_its_convolutions_as_one_piece(audio, norm, layer):
    encoder = make_encoder(jax.random.key(0), tiny.encoder(extractor_norm=norm, normalize_waveform=True))
    rows = [7, 0, 1]
    extractor = FrameExtractor(encoder, layer=layer, mesh=mesh(2), windows=(WINDOW,), context=0.2, pass_seconds=1)
    found = np.split(extractor.features(rows, SAMPLES, reader(audio)), np.cumsum(num_frames(SAMPLES[rows]))[:-1])
    peer = Extractor(encoder, layers=(layer,), cfg=extractor.cut)
    for i, ours in zip(rows, found, strict=True):
        if len(audio[i]) <= WINDOW or layer == 0:
            # Layer 0 is a convolution, narrower than the context, of the convolutions' output: one piece's.
            whole = peer.in_one_piece([audio[i]])[0][0]
        else:
            whole = np.concatenate(list(peer.stream(lambda i=i: [audio[i]]).pieces), axis=1)[0]
        np.testing.assert_allclose(ours, whole, atol=2e-4)


def test_chosen_frames_are_those_of_all(audio):
    extractor = FrameExtractor(None, mesh=mesh(1), pass_seconds=2, windows=(WINDOW,))
    rows = [7, 0, 6]
    every = extractor.features(rows, SAMPLES, reader(audio))
    chosen = np.flatnonzero(np.random.default_rng(0).random(len(every)) < 0.2)
    found = extractor.features(rows, SAMPLES, reader(audio), chosen=chosen, dtype="float16")
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, every[chosen].astype(np.float16))
