"""Masks against transformers: how much its `_compute_mask_indices` hides, and where masked channels are zero."""

import inspect

import jax
import numpy as np
import pytest
from transformers.models.wav2vec2 import modeling_wav2vec2

from data_pipelines.batch import num_frames
from tests.wavlab_jax.transformers_peer import copied, random_model, run, states
from wavlab_jax.encoder import EncoderConfig
from wavlab_jax.masking import MaskConfig, span_masks

pytestmark = pytest.mark.torch

SMALL = EncoderConfig(extractor_channels=(8,) * 7, width=32, layers=2, heads=4, feed_forward=48)
SAMPLES = 400 + 149 * 320


@pytest.mark.parametrize(("probability", "frames"), [(0.8, 781), (0.65, 150)])
def test_as_much_is_hidden_as_in_transformers(probability, frames):
    """It shares the random rounding of the count among rows, and offers one start more at the end of the row."""
    np.random.seed(0)
    peer = modeling_wav2vec2._compute_mask_indices
    theirs = np.mean([peer((4, frames), probability, 10, min_masks=2).mean() for _ in range(200)])
    keys = jax.random.split(jax.random.key(0), 800)
    ours = np.asarray(span_masks(keys, frames=frames, cfg=MaskConfig(probability=probability))).mean()
    assert ours == pytest.approx(theirs, abs=0.006)


def test_masked_channels_are_zero_in_hidden_frames_too(monkeypatch):
    """As transformers does in training; its draw is replaced, and only the masking is in training mode."""
    model = random_model("hubert", SMALL)
    channels = np.zeros((1, SMALL.width), bool)
    channels[0, 2:9] = True
    monkeypatch.setattr(inspect.getmodule(type(model)), "_compute_mask_indices", lambda shape, **_: channels)
    hide = model._mask_hidden_states

    def hide_in_training(*args, **kwargs):
        model.training = True
        hidden = hide(*args, **kwargs)
        model.training = False
        return hidden

    spans = np.zeros((1, num_frames(SAMPLES)), bool)
    spans[0, 5:25] = True
    waveform = (0.1 * np.random.default_rng(1).standard_normal((1, SAMPLES)) + 0.05).astype(np.float32)
    ours = run(copied(model, SMALL), waveform, mask=spans, channel_mask=channels)
    unmasked = states(model, waveform, mask=spans)
    monkeypatch.setattr(model, "_mask_hidden_states", hide_in_training)
    model.config.mask_feature_prob = 0.5
    theirs = states(model, waveform, mask=spans)
    for one, other in zip(ours.hidden, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert np.abs(unmasked[-1] - theirs[-1]).max() > 0.1
