"""Recordings of the benchmark, as they are: silence and overdriven ones too, which ESPnet's recipe does not leave out.

Before anything is trained each is looked at (`examine`), so that no run ends at a recording that is cut short or cannot
be decoded. Headers are compared with sizes of files. That is all that can be wrong with a WAV of integers, as the
benchmark has them; of anything else (floats, FLAC, compressed WAV) every sample is decoded, in threads.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from tqdm import tqdm

from data_pipelines.audio import MAX_SECONDS, AudioError, at_16_khz, check_file, mono, words_of

THREADS = 8  # mostly they wait for the disk
BAR_AFTER = 3.0  # seconds
_INTEGERS = frozenset({"PCM_U8", "PCM_16", "PCM_24", "PCM_32"})
_REASONS = {
    "truncated": "recording truncated",
    "not finite": "recording has NaN or infinite samples",
    "empty file": "recording empty",
    "zero length": "recording empty",
}


class Recording(NamedTuple):
    """Its length in seconds; or why it cannot be used, in words that many recordings share."""

    seconds: float
    reason: str | None


def read_recording(path: Path) -> np.ndarray:
    """float32 [samples] at 16 kHz, channels averaged.

    Raises AudioError naming the file: missing, unreadable, truncated, empty, not finite, longer than `MAX_SECONDS`.
    """
    opened = check_file(path, str(path))
    try:
        with soundfile.SoundFile(opened) as sound:
            rate, announced = sound.samplerate, sound.frames
            if announced > MAX_SECONDS * rate:
                raise AudioError(str(path), f"longer than {MAX_SECONDS:.0f} s, or it does not say how long")
            source = mono(sound.read(dtype="float32", always_2d=True))
    except (soundfile.SoundFileError, OSError, RuntimeError) as error:
        raise AudioError(str(path), f"unreadable ({words_of(error)})") from error
    if len(source) < announced:
        raise AudioError(str(path), f"truncated: {len(source)} of {announced} samples decode")
    if not len(source):
        raise AudioError(str(path), "zero length")
    if not np.isfinite(source).all():
        raise AudioError(str(path), "not finite: has NaN or infinite samples")
    return at_16_khz(source, rate=rate)


def examine(path: Path) -> Recording:
    """Whether `read_recording` will read a file. Remembered as long as its size and time stay the same."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return Recording(0.0, "recording missing")
    except (OSError, ValueError):  # no permission; a name that no file can have
        return Recording(0.0, "recording cannot be read")
    return _examined(path, status.st_size, status.st_mtime_ns)


def examine_all(paths: Sequence[Path], *, title: str) -> list[Recording]:
    """`examine` of each, in order; a bar with that title on a terminal, if it takes some seconds."""
    with (
        ThreadPoolExecutor(THREADS) as threads,
        tqdm(total=len(paths), desc=title, unit="clip", disable=None, delay=BAR_AFTER, mininterval=1.0) as bar,
    ):
        found = []
        for recording in threads.map(examine, paths):
            found.append(recording)
            bar.update()
    return found


@lru_cache(maxsize=1 << 20)
def _examined(path: Path, size: int, modified: int) -> Recording:
    try:
        header = soundfile.info(check_file(path, str(path)))
        whole_by_header = header.format in ("WAV", "WAVEX") and header.subtype in _INTEGERS
        if not (whole_by_header and 0 < header.frames <= MAX_SECONDS * header.samplerate):
            read_recording(path)
    except AudioError as error:
        return Recording(0.0, _REASONS.get(error.reason.split(":")[0], "recording cannot be read"))
    except (soundfile.SoundFileError, OSError, RuntimeError):
        return Recording(0.0, "recording cannot be read")
    return Recording(header.duration, None)
