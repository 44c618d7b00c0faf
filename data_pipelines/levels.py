"""How loud a waveform is: the mean squares that mixing and reverberation compare."""

import numpy as np

SILENCE = 1e-10  # mean square under which a waveform is silent: one eighth of what noise of one int16 step has

# ESPnet `espnet2/train/preprocessor.py` detect_non_silence: frames of 1024 samples, one every 512, count as sound where
# their power is over a hundredth of the mean power of all frames.
FRAME, SHIFT, SOUND_SHARE = 1024, 512, 0.01


def energy(waveform: np.ndarray) -> float:
    """Mean square of `waveform` [samples], float32."""
    return float(np.dot(waveform, waveform)) / len(waveform)


def non_silent(waveform: np.ndarray) -> np.ndarray:
    """[samples] bool: where there is sound, by ESPnet's power rule.

    A frame decides on its first 512 samples, the last frame on all that is left. Everything is sound in a waveform of
    less than a frame, and in one of zeros.
    """
    samples = len(waveform)
    if samples < FRAME:
        return np.ones(samples, bool)
    padded = np.pad(waveform, (0, -(samples - FRAME) % SHIFT))
    halves = np.sum(padded.reshape(-1, SHIFT) ** 2, axis=1, dtype=np.float64)
    power = (halves[:-1] + halves[1:]) / FRAME
    if not power.any():
        return np.ones(samples, bool)
    sound = np.repeat(power / power.mean() > SOUND_SHARE, SHIFT)
    return np.pad(sound, (0, samples - len(sound)), mode="edge")


def non_silent_energy(waveform: np.ndarray) -> float:
    """Mean square of `waveform` [samples] where there is sound."""
    return energy(waveform[non_silent(waveform)])
