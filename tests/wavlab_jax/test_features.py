"""MFCC and log-mel against librosa, scipy, transformers and a window-by-window numpy Kaldi."""

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.batch import num_frames
from wavlab_jax.features import FeatureError, centred_log_mel, log_mel, mfcc


@pytest.fixture(scope="module")
def speechlike() -> np.ndarray:
    """[4, 16273] float32: gliding voices in noise with a DC offset; row 1 has a silent stretch, row 2 is quiet."""
    rng = np.random.default_rng(0)
    time = np.arange(16273) / 16000
    rows = []
    for pitch in (95.0, 180.0, 240.0, 310.0):
        phase = 2 * np.pi * np.cumsum(pitch * (1 + 0.2 * np.sin(2 * np.pi * 3 * time))) / 16000
        voiced = sum(np.sin(k * phase) / k for k in range(1, 20))
        rows.append(0.05 * voiced + 0.01 * rng.standard_normal(time.size) + 0.02)
    waveform = np.stack(rows)
    waveform[1, 6000:9000] = 0.0
    waveform[2] *= 1e-4
    return waveform.astype(np.float32)


def brute_force_cepstra(waveform: np.ndarray) -> np.ndarray:
    """[samples] to float64 [frames, 13]: Kaldi's compute-mfcc, one window and one filter at a time."""
    frames = []
    for start in range(0, len(waveform) - 400 + 1, 160):
        window = waveform[start : start + 400].astype(np.float64)
        window = window - window.mean()
        emphasised = window.copy()
        for n in range(400):
            emphasised[n] = window[n] - 0.97 * window[max(n - 1, 0)]
        emphasised *= np.hanning(400) ** 0.85
        power = np.abs(np.fft.fft(emphasised, 512)[:257]) ** 2
        low, high = 1127 * np.log(1 + 20 / 700), 1127 * np.log(1 + 8000 / 700)
        step = (high - low) / 24
        energies = np.zeros(23)
        for b in range(23):
            for k in range(256):
                mel = 1127 * np.log(1 + k * 31.25 / 700)
                left, centre, right = low + b * step, low + (b + 1) * step, low + (b + 2) * step
                if left < mel <= centre:
                    energies[b] += power[k] * (mel - left) / (centre - left)
                elif centre < mel < right:
                    energies[b] += power[k] * (right - mel) / (right - centre)
        cepstra = scipy.fft.dct(np.log(np.maximum(energies, 1.1920928955078125e-07)), type=2, norm="ortho")[:13]
        frames.append(cepstra * (1 + 11 * np.sin(np.pi * np.arange(13) / 22)))
    return np.array(frames)


def brute_force_deltas(values: np.ndarray) -> np.ndarray:
    """[frames, width] to the same: torchaudio.functional.compute_deltas, win_length 5, one frame at a time."""
    last = len(values) - 1
    slopes = np.zeros_like(values)
    for t in range(len(values)):
        for n in (1, 2):
            slopes[t] += n * (values[min(t + n, last)] - values[max(t - n, 0)]) / 10
    return slopes


def test_mfcc_is_kaldis(speechlike):
    ours = np.asarray(mfcc(speechlike[:, :6000]))
    assert ours.shape == (4, 36, 39) and ours.dtype == np.float32
    for row, waveform in zip(ours, speechlike[:, :6000], strict=True):
        cepstra = brute_force_cepstra(waveform)
        first = brute_force_deltas(cepstra)
        np.testing.assert_allclose(row[:, :13], cepstra, atol=5e-4)
        np.testing.assert_allclose(row[:, 13:26], first, atol=2e-4)
        np.testing.assert_allclose(row[:, 26:], brute_force_deltas(first), atol=2e-4)


def test_deltas_are_librosas(speechlike):
    """A Savitzky-Golay slope of order one over five frames with the edges repeated is the same formula."""
    ours = np.asarray(mfcc(speechlike))
    for row in ours:
        first = librosa.feature.delta(row[:, :13], width=5, order=1, axis=0, mode="nearest")
        second = librosa.feature.delta(first, width=5, order=1, axis=0, mode="nearest")
        np.testing.assert_allclose(row[:, 13:], np.concatenate([first, second], axis=1), atol=2e-4)


@pytest.mark.torch
def test_mfcc_is_the_cosine_transform_of_the_filter_bank_of_transformers(speechlike):
    """How transformers' AST and Seamless feature extractors rebuild Kaldi's filter bank without torchaudio."""
    from transformers import audio_utils

    filters = audio_utils.mel_filter_bank(
        num_frequency_bins=257,
        num_mel_filters=23,
        min_frequency=20,
        max_frequency=8000,
        sampling_rate=16000,
        norm=None,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )
    window = audio_utils.window_function(400, "povey", periodic=False)
    lifter = 1 + 11 * np.sin(np.pi * np.arange(13) / 22)
    for waveform, ours in zip(speechlike, np.asarray(mfcc(speechlike)), strict=True):
        energies = audio_utils.spectrogram(
            waveform,
            window,
            frame_length=400,
            hop_length=160,
            fft_length=512,
            power=2.0,
            center=False,
            preemphasis=0.97,
            mel_filters=filters,
            log_mel="log",
            mel_floor=1.192092955078125e-07,
            remove_dc_offset=True,
        )
        expected = scipy.fft.dct(energies.T, type=2, norm="ortho")[:, :13] * lifter
        np.testing.assert_allclose(ours[:, :13], expected, atol=5e-4)


def test_log_mel_is_librosas(speechlike):
    for mels in (40, 80, 128):
        ours = np.asarray(log_mel(speechlike, mels=mels))
        assert ours.shape == (4, num_frames(speechlike.shape[1]), mels) and ours.dtype == np.float32
        expected = librosa.feature.melspectrogram(
            y=speechlike, sr=16000, n_fft=400, hop_length=320, n_mels=mels, center=False, power=2.0
        )
        np.testing.assert_allclose(ours, np.log(np.maximum(expected, 1e-10)).transpose(0, 2, 1), atol=5e-4)


@settings(max_examples=40)
@given(st.integers(min_value=0, max_value=200_000))
def test_frame_counts_agree_with_the_encoder(samples):
    """Shapes only (nothing is computed): every second MFCC frame is one frame of the encoder."""
    waveform = jax.ShapeDtypeStruct((2, samples), jnp.float32)
    at_100_hz = jax.eval_shape(mfcc, waveform).shape
    assert at_100_hz == (2, max((samples - 400) // 160 + 1, 0), 39)
    assert len(range(0, at_100_hz[1], 2)) == num_frames(samples)
    assert jax.eval_shape(log_mel, waveform).shape == (2, num_frames(samples), 80)


@pytest.mark.parametrize("samples", [0, 399, 400, 559, 560, 719, 720])
def test_values_exist_at_the_shortest_lengths(samples):
    waveform = 0.1 * np.random.default_rng(samples).standard_normal((1, samples)).astype(np.float32)
    values = np.asarray(mfcc(waveform))
    assert values.shape[1] == (0 if samples < 400 else (samples - 400) // 160 + 1)
    assert np.isfinite(values).all()


def test_frame_of_the_encoder_is_every_second_frame(speechlike):
    """Frame t at 50 Hz depends on samples 320 t to 320 t + 400 alone, in both features."""
    t = 20
    part = speechlike[:, 320 * t : 320 * t + 400]
    np.testing.assert_allclose(mfcc(speechlike)[:, ::2][:, t, :13], mfcc(part)[:, 0, :13], atol=5e-4)
    np.testing.assert_allclose(log_mel(speechlike)[:, t], log_mel(part)[:, 0], atol=5e-4)


def test_gain_moves_only_the_first_cepstrum(speechlike):
    loud = speechlike[:1]  # far above the floor of the logarithm
    difference = np.asarray(mfcc(0.5 * loud) - mfcc(loud))
    np.testing.assert_allclose(difference[..., 0], 2 * np.log(0.5) * np.sqrt(23), atol=5e-3)
    np.testing.assert_allclose(difference[..., 1:], 0, atol=5e-3)


def test_silence_is_finite_and_at_the_floor():
    silence = np.zeros((1, 4000), np.float32)
    np.testing.assert_allclose(mfcc(silence)[..., 0], np.log(np.finfo(np.float32).eps) * np.sqrt(23), rtol=1e-5)
    np.testing.assert_allclose(mfcc(silence)[..., 1:], 0, atol=2e-4)
    np.testing.assert_allclose(log_mel(silence), np.log(1e-10), rtol=1e-5)


def test_a_row_does_not_depend_on_its_batch(speechlike):
    for feature in (mfcc, log_mel):
        one_by_one = np.concatenate([feature(row[None]) for row in speechlike])
        np.testing.assert_allclose(feature(speechlike), one_by_one, atol=5e-4)


@pytest.mark.parametrize(
    "waveform, said",
    [
        (np.zeros(4000, np.float32), "expected [batch, samples]"),
        (np.zeros((1, 1, 4000), np.float32), "expected [batch, samples]"),
        (np.zeros((1, 4000), np.int16), "divide 16-bit samples by 32768"),
    ],
)
def test_wrong_waveforms_are_refused(waveform, said):
    for feature in (mfcc, log_mel):
        with pytest.raises(FeatureError) as raised:
            feature(waveform)
        assert said in str(raised.value)


@pytest.mark.parametrize("mels", [0, -3, 200])
def test_wrong_numbers_of_filters_are_refused(mels):
    with pytest.raises(FeatureError, match=f"mels={mels}"):
        log_mel(np.zeros((1, 4000), np.float32), mels=mels)


@pytest.mark.torch
def test_centred_log_mel_is_espnets(speechlike):
    """ML-SUPERB's log-mel baseline, each row as it is alone (`espnet2/layers/{stft,log_mel}.py`)."""
    import torch

    samples = np.array([16273, 12000, 9000], np.int32)
    ours, frames = centred_log_mel(speechlike[:3], samples)
    filters = librosa.filters.mel(sr=16000, n_fft=1024, n_mels=80)
    for row, count in enumerate(samples):
        alone, window = torch.tensor(speechlike[row, :count]), torch.hann_window(1024)
        spectrum = torch.stft(alone, 1024, hop_length=320, window=window, return_complex=True).numpy()
        theirs = np.log(np.maximum((np.abs(spectrum) ** 2).T @ filters.T, 1e-10))
        assert int(frames[row]) == len(theirs)
        np.testing.assert_allclose(ours[row, : len(theirs)], theirs, atol=2e-3)
