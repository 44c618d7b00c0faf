"""Hand-made features on the encoder's clock: the MFCC that the first k-means is fitted to, and a log-mel baseline.

Both are jitted, float32, and use strided slices, one real FFT and matrix products only, so that they run on the
accelerator beside the encoder. Constants are built in numpy float64 while tracing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.batch import HOP, RECEPTIVE_FIELD, SAMPLE_RATE

MFCC_HOP = 160  # samples: 10 ms; every second MFCC frame starts where a frame of the encoder starts
MFCC_WIDTH = 39  # 13 cepstra, their deltas, the deltas of those

# torchaudio.compliance.kaldi.mfcc's defaults, which are compute-mfcc-feats' defaults but for the dither (0 here).
_FFT = 512  # the 400 samples of a window, zero-padded to a power of two
_PREEMPHASIS = 0.97
_MEL_BINS = 23
_LOW_HZ = 20.0
_CEPSTRA = 13
_LIFTER = 22.0
_FLOOR = float(np.finfo(np.float32).eps)  # of a mel energy, before the logarithm

_CENTRED_FFT = 1024  # ML-SUPERB's baseline

_LOG_MEL_FLOOR = 1e-10  # of a mel energy, before the logarithm; openai/whisper, whisper/audio.py, log_mel_spectrogram


class FeatureError(ValueError):
    """A waveform or a setting that no feature can be computed from."""


@jax.jit
def mfcc(waveform: jax.Array, samples: jax.Array | None = None) -> jax.Array:
    """Kaldi's 13 cepstra with deltas and delta-deltas: [batch, samples] to float32 [batch, frames at 100 Hz, 39].

    The recipe of HuBERT's first iteration (fairseq, examples/hubert/simple_kmeans/dump_mfcc_feature.py):
    `torchaudio.compliance.kaldi.mfcc(use_energy=False)` of a waveform in [-1, 1] (not 16-bit integers: the floor of the
    logarithm is absolute), then `torchaudio.functional.compute_deltas` twice. Windows of 400 samples every 160, only
    whole windows (snip_edges): (samples - 400) // 160 + 1 frames, none under 400 samples. `mfcc(w)[:, ::2]` has exactly
    `num_frames(samples)` frames, frame t over the very samples that the encoder's frame t sees.

    `samples` [batch] says how many samples of each row are real, where rows end in padding: the frames over real
    samples are then those of the row alone (deltas repeat the last real frame); frames after them mean nothing.

    Raises FeatureError if the waveform is not [batch, samples] of a floating dtype.
    """
    waveform = _checked(waveform)
    windows = _windows(waveform, hop=MFCC_HOP)
    if windows.shape[1] == 0:
        return jnp.zeros((waveform.shape[0], 0, MFCC_WIDTH), jnp.float32)
    windows = windows - jnp.mean(windows, axis=-1, keepdims=True)
    # Kaldi emphasises inside each window; the first sample's predecessor is itself.
    previous = jnp.concatenate([windows[..., :1], windows[..., :-1]], axis=-1)
    windows = (windows - _PREEMPHASIS * previous) * jnp.asarray(_povey_window()[None, None], jnp.float32)
    energies = _matmul(_power(windows, fft=_FFT), _kaldi_mel_filters())
    log_energies = jnp.log(jnp.maximum(energies, _FLOOR))
    cepstra = _hold_last(_matmul(log_energies, _liftered_dct()), samples)
    first = _hold_last(_deltas(cepstra), samples)
    return jnp.concatenate([cepstra, first, _deltas(first)], axis=-1)


@functools.partial(jax.jit, static_argnames="mels")
def log_mel(waveform: jax.Array, *, mels: int = 80) -> jax.Array:
    """Log mel energies on the encoder's grid: [batch, samples] to float32 [batch, num_frames(samples), mels].

    Windows of 400 samples every 320 (no centring, no padding): frame t sees exactly the samples that the encoder's
    frame t sees, so a probe may compare the two frame by frame. Periodic Hann window, 400-point FFT, Slaney's mel
    filters with area normalisation from 0 to 8000 Hz, natural logarithm floored at 1e-10: the logarithm of
    `librosa.feature.melspectrogram(sr=16000, n_fft=400, hop_length=320, n_mels=mels, center=False)`, whose filters are
    Whisper's.

    Raises FeatureError if the waveform is not [batch, samples] of a floating dtype, or if `mels` is under 1 or so large
    that a filter falls between two FFT bins (40 Hz apart; 128 is safe).
    """
    waveform = _checked(waveform)
    filters = _slaney_mel_filters(mels)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(RECEPTIVE_FIELD) / RECEPTIVE_FIELD)
    windows = _windows(waveform, hop=HOP) * jnp.asarray(window[None, None], jnp.float32)
    energies = _matmul(_power(windows, fft=RECEPTIVE_FIELD), filters)
    return jnp.log(jnp.maximum(energies, _LOG_MEL_FLOOR))


def centred_log_mel(waveform: jax.Array, samples: jax.Array, *, mels: int = 80) -> tuple[jax.Array, jax.Array]:
    """ML-SUPERB's log-mel baseline: [batch, samples] to (float32 [batch, samples // 320 + 1, mels], real frames).

    ESPnet's `DefaultFrontend` with n_fft 1024 and hop_length 320 (`egs2/ml_superb/asr1/conf/tuning/train_asr_fbank_*`):
    periodic Hann windows of 1,024 samples centred at every 320th, rows continued by reflection at both ends, power,
    Slaney's mel filters from 0 to 8000 Hz, natural logarithm floored at 1e-10. `samples` [batch] are real: they make
    samples // 320 + 1 frames. Each row is reflected at its own end, as if it were alone, where ESPnet does this to rows
    that are as long as the batch. Raises FeatureError as `log_mel` does.
    """
    waveform = _checked(waveform)
    half, length = _CENTRED_FFT // 2, waveform.shape[1]
    place = jnp.abs(jnp.arange(-half, length + half))[None]
    last = samples[:, None] - 1
    place = jnp.clip(jnp.where(place > last, 2 * last - place, place), 0, length - 1)
    windows = _windows(jnp.take_along_axis(waveform, place, axis=1), hop=HOP, size=_CENTRED_FFT)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_CENTRED_FFT) / _CENTRED_FFT)
    power = _power(windows * jnp.asarray(window[None, None], jnp.float32), fft=_CENTRED_FFT)
    energies = _matmul(power, _slaney_mel_filters(mels, fft=_CENTRED_FFT))
    frames = jnp.where(samples > 0, samples // HOP + 1, 0).astype(jnp.int32)
    return jnp.log(jnp.maximum(energies, _LOG_MEL_FLOOR)), frames


def _checked(waveform: jax.Array) -> jax.Array:
    """[batch, samples] as float32."""
    waveform = jnp.asarray(waveform)
    if waveform.ndim != 2:
        raise FeatureError(f"waveform has shape {list(waveform.shape)}, expected [batch, samples]")
    if not jnp.issubdtype(waveform.dtype, jnp.floating):
        raise FeatureError(f"waveform is {waveform.dtype}, expected floats in [-1, 1]: divide 16-bit samples by 32768")
    return waveform.astype(jnp.float32)


def _windows(waveform: jax.Array, *, hop: int, size: int = RECEPTIVE_FIELD) -> jax.Array:
    """[batch, samples] to [batch, frames, size]: every whole window, `hop` samples apart.

    Cut from blocks of gcd(hop, size) samples by strided slices: a gather of single samples is slow on a TPU.
    """
    batch, samples = waveform.shape
    frames = max((samples - size) // hop + 1, 0)
    if frames == 0:
        return jnp.zeros((batch, 0, size), waveform.dtype)
    block = np.gcd(hop, size)
    stride, parts = hop // block, size // block
    blocks = waveform[:, : samples // block * block].reshape(batch, -1, block)
    reach = stride * (frames - 1) + 1
    return jnp.concatenate([blocks[:, part : part + reach : stride] for part in range(parts)], axis=-1)


def _power(windows: jax.Array, *, fft: int) -> jax.Array:
    """[..., 400] to [..., fft // 2 + 1]: squared magnitudes of the zero-padded FFT."""
    spectrum = jnp.fft.rfft(windows, n=fft, axis=-1)
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


def _matmul(values: jax.Array, matrix: np.ndarray) -> jax.Array:
    """[..., a] by [a, b] in full float32: by default an accelerator would round the operands to 8 or 11 bits."""
    return jnp.matmul(values, jnp.asarray(matrix, jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _deltas(values: jax.Array) -> jax.Array:
    """[batch, frames, width] to the same: least-squares slope over five frames, the edge frames repeated.

    torchaudio.functional.compute_deltas(win_length=5, mode="replicate"): sum of n * x[t + n] for n in -2..2, over 10.
    """
    frames = values.shape[1]
    padded = jnp.pad(values, ((0, 0), (2, 2), (0, 0)), mode="edge")
    return sum(n * padded[:, 2 + n : 2 + n + frames] for n in (-2, -1, 1, 2)) / 10.0


def _hold_last(values: jax.Array, samples: jax.Array | None) -> jax.Array:
    """[batch, frames, width] with every frame after the last one over real samples replaced by that one."""
    if samples is None:
        return values
    last = jnp.maximum((samples - RECEPTIVE_FIELD) // MFCC_HOP, 0)
    index = jnp.minimum(jnp.arange(values.shape[1])[None], last[:, None])
    return jnp.take_along_axis(values, index[..., None], axis=1)


def _povey_window() -> np.ndarray:
    """[400]: a symmetric Hann window to the power 0.85 (Kaldi's feature-window.cc, "povey")."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(RECEPTIVE_FIELD) / (RECEPTIVE_FIELD - 1))
    return hann**0.85


def _kaldi_mel_filters() -> np.ndarray:
    """[257, 23]: Kaldi's filters, triangles on the mel axis 1127 ln(1 + f/700), 20 Hz to 8 kHz (mel-computations.cc).

    Kaldi gives the bin at the Nyquist frequency no weight; the last triangle ends there, so nothing needs doing.
    """

    def mel(hertz):
        return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)

    edges = np.linspace(mel(_LOW_HZ), mel(SAMPLE_RATE / 2), _MEL_BINS + 2)
    return _triangles(mel(np.arange(_FFT // 2 + 1) * SAMPLE_RATE / _FFT), edges)


def _slaney_mel_filters(mels: int, *, fft: int = RECEPTIVE_FIELD) -> np.ndarray:
    """[fft // 2 + 1, mels]: triangles in Hz between points even on Slaney's mel scale, each of unit area.

    Slaney's Auditory Toolbox (1998): 200/3 Hz a mel below 1 kHz, then 27 mels for each factor of 6.4.
    """
    if mels < 1:
        raise FeatureError(f"mels={mels}: at least one filter is needed")
    knee = 1000.0 / (200.0 / 3.0)
    top = knee + 27.0 * np.log(SAMPLE_RATE / 2 / 1000.0) / np.log(6.4)
    points = np.linspace(0.0, top, mels + 2)
    edges = np.where(points < knee, points * 200.0 / 3.0, 1000.0 * 6.4 ** ((points - knee) / 27.0))
    filters = _triangles(np.arange(fft // 2 + 1) * SAMPLE_RATE / fft, edges)
    if not filters.any(axis=0).all():
        raise FeatureError(f"mels={mels}: some filters hold no bin of a {fft}-point FFT; use 128 or fewer")
    return filters * (2.0 / (edges[2:] - edges[:-2]))


def _triangles(bins: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """[bins], [filters + 2] to [bins, filters]: each rises from its left edge to 1 and falls to its right edge."""
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins[:, None] - left) / (centre - left)
    falling = (right - bins[:, None]) / (right - centre)
    return np.maximum(0.0, np.minimum(rising, falling))


def _liftered_dct() -> np.ndarray:
    """[23, 13]: the first rows of the orthonormal DCT-II, each scaled by Kaldi's lifter 1 + 11 sin(pi i / 22)."""
    order, position = np.arange(_CEPSTRA), np.arange(_MEL_BINS)[:, None]
    dct = np.cos(np.pi / _MEL_BINS * (position + 0.5) * order) * np.sqrt(2.0 / _MEL_BINS)
    dct[:, 0] = np.sqrt(1.0 / _MEL_BINS)
    return dct * (1.0 + 0.5 * _LIFTER * np.sin(np.pi * order / _LIFTER))
