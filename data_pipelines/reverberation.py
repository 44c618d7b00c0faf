"""Rooms: a row convolved with a room's response and moved back onto the grid of its labels (XEUS, 2407.00837).

ESPnet `espnet2/train/collate_fn.py` _get_aligned_reverb_signal is what XEUS was trained with. Pure functions; which row
is reverberated in which room is the affair of `interference`.
"""

import math
from dataclasses import dataclass

import numpy as np

from data_pipelines.batch import SAMPLE_RATE
from data_pipelines.levels import SILENCE, non_silent_energy

TAIL_GAP_SECONDS = 0.0025  # between the direct path and the diffuse tail of a simulated response


class ReverbError(ValueError):
    """A reverberation that cannot be meant."""


@dataclass(frozen=True)
class ReverbConfig:
    """How often, and in which rooms.

    Attributes:
        probability: of a row being reverberated; 0.3 as in ESPnet (`rir_apply_prob`) and so in XEUS.
        folder: audio files with room responses. Without one, responses are simulated (see `simulated_response`) with
            reverberation times and ratios uniform in:
        rt60_seconds: (least, most) time in which the tail decays by 60 dB. The default spans a furnished bedroom to a
            lecture hall; the REVERB challenge's rooms have 0.25, 0.5 and 0.7 s.
        direct_to_reverberant_db: (least, most) energy of the direct path over that of the tail: from across the room to
            half a metre away. Both ranges are ours, no paper's.
    """

    probability: float = 0.3
    folder: str | None = None
    rt60_seconds: tuple[float, float] = (0.2, 1.0)
    direct_to_reverberant_db: tuple[float, float] = (-6.0, 12.0)

    def __post_init__(self):
        if not 0 <= self.probability <= 1:
            raise ReverbError(f"probability is {self.probability}; it must lie in 0..1")
        least, most = self.rt60_seconds
        if not (0 < least <= most <= 10):
            raise ReverbError(f"rt60_seconds is {self.rt60_seconds}; give (least, most), over 0 and up to 10 s")
        least, most = self.direct_to_reverberant_db
        if not (math.isfinite(least) and math.isfinite(most) and least <= most):
            raise ReverbError(f"direct_to_reverberant_db is {self.direct_to_reverberant_db}; give (least, most) in dB")


def reverberate(waveform: np.ndarray, response: np.ndarray) -> np.ndarray:
    """float32 [samples]: `waveform` [samples] in the room of `response` [response samples], both at 16 kHz.

    The largest peak of the response, taken for the direct path, is moved to lag 0 and made positive, so that the sound
    stays where its labels are; the little that a response holds before it (a lead-in, a resampler's ripple) is heard
    early. (ESPnet takes the largest value, which is a reflection where the direct path is negative.) The mean
    square of what is not silent is restored to that of `waveform`, as in ESPnet. The room is silent when the row
    begins: what was said before the crop does not ring in it. A copy of `waveform` if it, or the outcome, is silent.

    Raises ReverbError if the response is empty, silent or not finite.
    """
    if not (len(response) and np.isfinite(response).all() and response.any()):
        raise ReverbError("the room response is empty, silent or not finite")
    power = non_silent_energy(waveform)
    direct = int(np.argmax(np.abs(response)))
    samples = len(waveform)
    size = _fast_length(samples + len(response) - 1)
    response = (response / response[direct]).astype(np.float32)
    heard = np.fft.irfft(np.fft.rfft(waveform, n=size) * np.fft.rfft(response, n=size), n=size)  # all in float32
    heard = heard[direct : direct + samples]
    after = non_silent_energy(heard)
    if power < SILENCE or after < SILENCE:
        return np.array(waveform, np.float32)
    return heard * np.float32(math.sqrt(power / after))


def simulated_response(rng: np.random.Generator, *, cfg: ReverbConfig) -> np.ndarray:
    """float32 [samples] at 16 kHz: a room response by Polack's statistical model, its direct path of 1 at sample 0.

    The tail is Gaussian noise under an exponential that falls by 60 dB in RT60 seconds: exp(-3 ln(10) t / RT60)
    (J.-D. Polack, La transmission de l'energie sonore dans les salles, thesis, Le Mans 1988). It begins 2.5 ms after
    the direct path and ends after RT60 seconds. That is what users without recordings have: no early reflections, no
    colour, no walls that swallow high frequencies sooner; pyroomacoustics' shoebox rooms, written to a folder
    beforehand, have all three.
    """
    rt60 = rng.uniform(*cfg.rt60_seconds)
    ratio_db = rng.uniform(*cfg.direct_to_reverberant_db)
    gap = round(TAIL_GAP_SECONDS * SAMPLE_RATE)
    samples = max(round(rt60 * SAMPLE_RATE), gap + 1)
    seconds = np.arange(samples) / SAMPLE_RATE
    response = rng.standard_normal(samples) * np.exp(-3 * math.log(10) * seconds / rt60)
    response[:gap] = 0.0
    response *= math.sqrt(10 ** (-ratio_db / 10) / np.sum(response**2))
    # A tail louder than the direct path in a single sample would take its place as the peak that is aligned.
    np.clip(response, -0.99, 0.99, out=response)
    response[0] = 1.0
    return response.astype(np.float32)


def _fast_length(least: int) -> int:
    """The smallest 2^a 3^b 5^c from `least` on: lengths at which an FFT is fast."""
    best, fives = 1 << (least - 1).bit_length(), 1
    while fives < best:
        threes = fives
        while threes < best:
            rest = -(-least // threes)
            best = min(best, threes << (rest - 1).bit_length())
            threes *= 3
        fives *= 5
    return best
