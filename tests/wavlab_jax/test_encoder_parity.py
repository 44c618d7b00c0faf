"""Every hidden state against transformers, in float32 and within 1e-4: random HuBERT, WavLM and wav2vec 2.0 models.

The positional convolution, heads and buckets are those of the released models; widths are small.
"""

import dataclasses
import logging

import numpy as np
import pytest
import torch
import transformers

from data_pipelines.batch import num_frames
from tests.wavlab_jax.transformers_peer import copied, random_model, run, states
from wavlab_jax.encoder import EncoderConfig

pytestmark = pytest.mark.torch

TOLERANCE = 1e-4
SAMPLES = 400 + 149 * 320 + 111  # 150 frames: more than the positional kernel, and some samples left over

SMALL = EncoderConfig(extractor_channels=(8,) * 7, width=32, layers=2, heads=4, feed_forward=48)
LARGE = {"extractor_norm": "layer", "pre_norm": True, "normalize_waveform": True}
WAVLM = {"relative_bias": True}
VARIANTS = {
    "hubert-base": ("hubert", SMALL),
    "hubert-large": ("hubert", dataclasses.replace(SMALL, **LARGE)),
    "mhubert-147": ("hubert", dataclasses.replace(SMALL, normalize_waveform=True)),
    "hubert-odd-kernel": ("hubert", dataclasses.replace(SMALL, pre_norm=True, position_kernel=127)),
    "wavlm-base": ("wavlm", dataclasses.replace(SMALL, **WAVLM)),
    "wavlm-large": ("wavlm", dataclasses.replace(SMALL, **WAVLM, **LARGE, layers=3)),
    "wav2vec2-base-biased": ("wav2vec2", dataclasses.replace(SMALL, extractor_bias=True, position_kernel=31)),
    "xls-r": ("wav2vec2", dataclasses.replace(SMALL, extractor_bias=True, **LARGE)),
}


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """Advice of transformers stays out of the test log; torch keeps to one thread."""
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def noise(rows: int, samples: int = SAMPLES, *, rms: float = 0.1, seed: int = 1) -> np.ndarray:
    """[rows, samples] float32 with an offset of half its level."""
    return (rms * (np.random.default_rng(seed).standard_normal((rows, samples)) + 0.5)).astype(np.float32)


def normalised(waveform, cfg: EncoderConfig, *, lengths=None) -> np.ndarray:
    """[rows, samples] as the model hears it: each row's first `lengths` by torch's layer_norm, zeros behind them."""
    heard = np.zeros_like(waveform)
    for row, length in enumerate(lengths if lengths is not None else [waveform.shape[1]] * len(waveform)):
        real = torch.tensor(waveform[row, :length])
        if cfg.normalize_waveform:
            real = torch.nn.functional.layer_norm(real, real.shape, eps=cfg.waveform_epsilon)
        heard[row, :length] = real.numpy()
    return heard


def largest_difference(ours, theirs, *, valid=None, least: float = 0.05) -> float:
    """Over all states, at valid frames; each of them must say something."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape and other.std() > least
    where = slice(None) if valid is None else valid
    return max(float(np.abs(one - other)[where].max()) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_hidden_state(variant):
    """With and without hidden spans; loud, so quiet that epsilons count, and silent."""
    kind, cfg = VARIANTS[variant]
    model = random_model(kind, cfg)
    encoder = copied(model, cfg)
    spans = np.zeros((1, num_frames(SAMPLES)), bool)
    spans[0, 5:15] = spans[0, 140:] = True
    heard = [(noise(1), np.zeros_like(spans)), (noise(1), spans), (noise(1, rms=1e-4), np.zeros_like(spans))]
    # a group norm over a constant bias amplifies rounding 300 times, on both sides; no released model has that
    if not (cfg.extractor_bias and cfg.extractor_norm == "group"):
        heard.append((np.zeros((1, SAMPLES), np.float32), spans))
    for waveform, mask in heard:
        ours = run(encoder, waveform, mask=mask)
        theirs = states(model, normalised(waveform, cfg), mask=mask)
        assert len(theirs) == cfg.layers + 1
        assert largest_difference(ours.hidden, theirs) < TOLERANCE


@pytest.mark.parametrize("rms", [0.1, 1e-3, 1e-4])
def test_waveforms_are_normalised_as_by_each_peer(rms):
    """fairseq's, torchaudio's and s3prl's layer_norm, and the preprocessor of transformers: other epsilons."""
    kind, cfg = VARIANTS["hubert-large"]
    model = random_model(kind, cfg)
    waveform = noise(1, rms=rms)
    fairseq = torch.nn.functional.layer_norm(torch.tensor(waveform), waveform.shape[1:]).numpy()  # its default, 1e-5
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    preprocessor = extractor(waveform[0], sampling_rate=16_000, return_tensors="np").input_values
    if rms < 0.1:
        assert np.abs(fairseq - preprocessor).max() > 0.5
    for epsilon, heard in ((1e-5, fairseq), (1e-7, preprocessor)):
        encoder = copied(model, dataclasses.replace(cfg, waveform_epsilon=epsilon))
        no_mask = np.zeros((1, num_frames(SAMPLES)), bool)
        assert largest_difference(run(encoder, waveform, mask=no_mask).hidden, states(model, heard)) < TOLERANCE


LENGTHS = np.array([SAMPLES, 9_001, 16_000, 400 + 320 * 99])


def bins(lengths: np.ndarray, samples: int) -> np.ndarray:
    """[rows, frames] real frames by fairseq's rule (`models/hubert/hubert.py` forward_padding_mask), word by word."""
    padding_mask = np.arange(samples) >= lengths[:, None]
    frames = num_frames(samples)
    extra = padding_mask.shape[1] % frames
    if extra > 0:
        padding_mask = padding_mask[:, :-extra]
    return ~padding_mask.reshape(padding_mask.shape[0], frames, -1).all(-1)


@pytest.mark.parametrize("variant", ["hubert-large", "wavlm-large", "xls-r"])
@pytest.mark.parametrize("rule", ["convolution", "fairseq_bins"])
def test_padded_batches_at_real_frames(variant, rule):
    kind, cfg = VARIANTS[variant]
    cfg = dataclasses.replace(cfg, valid_frames=rule)
    model = random_model(kind, cfg)
    waveform, valid = noise(len(LENGTHS)), np.arange(SAMPLES) < LENGTHS[:, None]
    heard = normalised(waveform, cfg, lengths=LENGTHS)
    ours = run(copied(model, cfg), np.where(valid, waveform, 7.0), valid)
    if rule == "convolution":
        real = np.arange(num_frames(SAMPLES)) < num_frames(LENGTHS)[:, None]
        theirs = states(model, heard, valid)
    else:
        real = bins(LENGTHS, SAMPLES)
        theirs = states(model, heard, valid, real=real)
        assert real.sum() > num_frames(LENGTHS).sum()
    np.testing.assert_array_equal(ours.valid, real)
    assert largest_difference(ours.hidden, theirs, valid=real) < TOLERANCE


@pytest.mark.parametrize("variant", ["wavlm-base", "wavlm-large"])
def test_long_audio(variant):
    """17 s: distances from 778 frames on share WavLM's last bucket; the positional convolution has many segments."""
    kind, cfg = VARIANTS[variant]
    model = random_model(kind, cfg)
    waveform = noise(1, 400 + 850 * 320)
    ours = run(copied(model, cfg), waveform)
    assert ours.hidden[0].shape[1] == 851
    assert largest_difference(ours.hidden, states(model, normalised(waveform, cfg))) < TOLERANCE


@pytest.mark.parametrize("variant", ["hubert-base", "wavlm-large"])
def test_bfloat16_errs_no_more_than_torch_in_bfloat16(variant):
    """Relative error of each state, in the norm, against float32: below 3 %, and 1.5 times what the peer's own is."""
    kind, cfg = VARIANTS[variant]
    model, waveform = random_model(kind, cfg), noise(1)
    exact = states(model, normalised(waveform, cfg))
    ours = run(copied(model, dataclasses.replace(cfg, compute_dtype="bfloat16")), waveform)
    theirs = states(model.to(torch.bfloat16), normalised(waveform, cfg))
    for one, other, true in zip(ours.hidden, theirs, exact, strict=True):
        error, peer = (np.linalg.norm(state - true) / np.linalg.norm(true) for state in (one, other))
        assert 1e-4 < error < min(0.03, 1.5 * peer)
