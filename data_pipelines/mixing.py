"""Utterance and noise mixing: what WavLM adds to a row before the encoder hears it (2110.13900, section III-B).

Pure functions of waveforms, of an rng and of a configuration. The targets stay those of the primary; nothing is changed
in place. Which utterance is mixed in, and reading it, is the pipeline's affair.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SILENCE = 1e-10  # mean square under which a waveform is silent: one eighth of what noise of one int16 step has


class MixingError(ValueError):
    """A mixing configuration that cannot be meant."""


class Interference(enum.Enum):
    """What is mixed into a row."""

    NONE = "none"
    SPEECH = "speech"  # one other utterance
    BABBLE = "babble"  # several other utterances at once
    SHAPED = "shaped"  # Gaussian noise with a power-law spectrum
    RECORDED = "recorded"  # a stretch of a file of the noise folder


@dataclass(frozen=True)
class MixingConfig:
    """How often, what, and how loud; WavLM's values.

    Attributes:
        probability: of a row being mixed. noise_share: part of the mixed rows that get noise, not another utterance.
        speech_snr_db, noise_snr_db: (least, most) ratio of the energies of primary and interference, in dB, uniform.
        max_fraction: the mixed stretch is at most this part of the row.
        babble_voices: (fewest, most) utterances in a babble.
        noise_folder: audio files to take noise from. Without one, half of the noises are babble, half shaped noise.
    """

    probability: float = 0.2
    noise_share: float = 0.1
    speech_snr_db: tuple[float, float] = (-5.0, 5.0)
    noise_snr_db: tuple[float, float] = (-5.0, 20.0)
    max_fraction: float = 0.5
    babble_voices: tuple[int, int] = (4, 8)
    noise_folder: str | None = None

    def __post_init__(self):
        for name in ("probability", "noise_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise MixingError(f"{name} is {getattr(self, name)}; a probability lies in 0..1")
        if not 0 < self.max_fraction <= 1:
            raise MixingError(f"max_fraction is {self.max_fraction}; it must lie in 0..1 and not be 0")
        for name in ("speech_snr_db", "noise_snr_db"):
            least, most = getattr(self, name)
            if not (math.isfinite(least) and math.isfinite(most) and least <= most):
                raise MixingError(f"{name} is {getattr(self, name)}; give (least, most) in dB")
        fewest, most = self.babble_voices
        if not 1 <= fewest <= most:
            raise MixingError(f"babble_voices is {self.babble_voices}; give (fewest, most), at least 1")


class MixturePlan(NamedTuple):
    """What happens to one row: `length` samples of the interference, from its sample `secondary_start` on, are added to
    the row from its sample `primary_start` on, at `snr_db` dB. `voices`: utterances in the interference (0 for noise).
    """

    kind: Interference
    snr_db: float = 0.0
    length: int = 0
    primary_start: int = 0
    secondary_start: int = 0
    voices: int = 0


UNMIXED = MixturePlan(Interference.NONE)


def plan_mixture(rng: np.random.Generator, *, cfg: MixingConfig, samples: int) -> MixturePlan:
    """Draws what happens to a row of `samples` samples; the interference is as long as the row.

    WavLM, algorithm 1: the stretch is uniform over 1 .. samples * max_fraction samples, both starts are uniform.
    """
    if rng.random() >= cfg.probability:
        return UNMIXED
    kind, voices = Interference.SPEECH, 1
    if rng.random() < cfg.noise_share:
        if cfg.noise_folder is not None:
            kind, voices = Interference.RECORDED, 0
        elif rng.random() < 0.5:
            kind, voices = Interference.BABBLE, int(rng.integers(cfg.babble_voices[0], cfg.babble_voices[1] + 1))
        else:
            kind, voices = Interference.SHAPED, 0
    snr_db = float(rng.uniform(*(cfg.speech_snr_db if kind is Interference.SPEECH else cfg.noise_snr_db)))
    length = int(rng.integers(1, max(1, int(samples * cfg.max_fraction)) + 1))
    starts = rng.integers(samples - length + 1, size=2)
    return MixturePlan(kind, snr_db, length, int(starts[0]), int(starts[1]), voices)


def energy(waveform: np.ndarray) -> float:
    """Mean square of `waveform` [samples], float32."""
    return float(np.dot(waveform, waveform)) / len(waveform)


def interference_scale(primary: np.ndarray, secondary: np.ndarray, *, snr_db: float) -> float:
    """sqrt(E_primary / (10^(snr/10) E_secondary)) of two waveforms [samples]: the factor that gives the asked ratio of
    their mean squares, in dB. 0 if either is silent: there is then no such factor, and the row stays as it is.
    """
    loud, quiet = energy(primary), energy(secondary)
    if loud < SILENCE or quiet < SILENCE:
        return 0.0
    return math.sqrt(loud / (10 ** (snr_db / 10) * quiet))


def mix(
    primary: np.ndarray, secondary: np.ndarray, *, snr_db: float, length: int, primary_start: int, secondary_start: int
) -> np.ndarray:
    """float32 [samples]: a copy of `primary` [samples] with `length` samples of `secondary` added at `primary_start`.

    Energies are those of the whole waveforms, not of the stretch (as in WavLM), so that a pause in either does not
    blow up the other. Equal to `primary` if either is silent. Raises MixingError if the stretch does not fit.
    """
    for name, waveform, start in (("primary", primary, primary_start), ("secondary", secondary, secondary_start)):
        if not (start >= 0 and length >= 1 and start + length <= len(waveform)):
            raise MixingError(f"samples {start}..{start + length} do not lie in the {name}, which has {len(waveform)}")
    mixed = np.array(primary, np.float32)
    scale = interference_scale(primary, secondary, snr_db=snr_db)
    if scale:
        stretch = secondary[secondary_start : secondary_start + length]
        mixed[primary_start : primary_start + length] += np.float32(scale) * stretch
    return mixed


def babble(voices: Sequence[np.ndarray]) -> np.ndarray:
    """float32 [samples]: the sum of `voices` [samples] each, all equally loud; silent ones are left out."""
    total = np.zeros(len(voices[0]), np.float32)
    for voice in voices:
        power = energy(voice)
        if power >= SILENCE:
            total += voice * np.float32(1 / math.sqrt(power))
    return total


def shaped_noise(rng: np.random.Generator, *, samples: int) -> np.ndarray:
    """float32 [samples]: Gaussian noise whose power falls as 1 / f^g, g ~ U(0, 2), with a mean square of 1.

    g = 0 is white, 1 pink, 2 brown: between them lie the long-term spectra of wind, traffic, fans and rooms.
    """
    exponent = rng.uniform(0.0, 2.0)
    spectrum = np.fft.rfft(rng.standard_normal(samples, dtype=np.float32))
    bins = np.arange(len(spectrum), dtype=np.float32)
    bins[0] = 1.0
    spectrum *= bins ** np.float32(-exponent / 2)
    if len(spectrum) > 1:
        spectrum[0] = 0.0  # no offset
    noise = np.fft.irfft(spectrum, n=samples).astype(np.float32)
    return noise / np.float32(math.sqrt(max(energy(noise), SILENCE)))
