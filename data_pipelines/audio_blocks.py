"""A file's waveform block by block, so that its length does not matter: the same samples as `audio.decode` gives.

Nothing is kept between blocks. Who needs the waveform twice reads the file twice: decoding is thousands of times faster
than listening.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr

from data_pipelines.audio import AudioError, ForwardSoundFile, check_file, mono, words_of
from data_pipelines.batch import SAMPLE_RATE

_VALUES = 1 << 18  # decoded at once, all channels together: 16 s of 16 kHz mono
_UNKNOWN_FRAMES = 1 << 62  # libsndfile announces at least so many where the header does not say


def read_blocks(path: Path, *, name: str | None = None) -> Iterator[np.ndarray]:
    """Blocks [samples] of a file, float32 mono 16 kHz; joined, they are `decode(path).waveform` to the bit.

    Unlike there, silence is passed on, and no length is too long. Memory does not depend on the length.

    Raises AudioError naming the file and the reason, perhaps after some blocks: missing or unreadable, truncated,
    damaged (all as in `decode`), empty, not finite.
    """
    path = Path(path)
    name = str(path) if name is None else name
    opened = check_file(path, name)
    frames, resample = 0, None
    try:
        with ForwardSoundFile(opened) as sound:
            announced, rate = sound.frames, sound.samplerate
            if rate != SAMPLE_RATE:
                resample = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ").resample_chunk
            while len(block := sound.read(max(_VALUES // sound.channels, 1), dtype="float32", always_2d=True)):
                block = mono(block)
                if not (finite := np.isfinite(block)).all():
                    seconds = (frames + int(np.argmin(finite))) / rate
                    raise AudioError(name, f"not finite: the first NaN or infinite sample is at {seconds:.3f} s")
                frames += len(block)
                block = block if resample is None else resample(block)
                if len(block):
                    yield block
            if resample is not None and len(rest := resample(np.zeros(0, np.float32), last=True)):
                yield rest
    except AudioError:
        raise
    except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
        raise AudioError(name, f"unreadable ({words_of(error)})") from error
    if frames < announced < _UNKNOWN_FRAMES:
        raise AudioError(name, f"truncated: {frames} of {announced} samples decode")
    if frames == 0:
        raise AudioError(name, "zero length")


def announced_seconds(path: Path) -> float:
    """Length by the file's header; 0 where it does not say, or where there is no such file."""
    try:
        header = soundfile.info(str(path))
    except (soundfile.SoundFileError, RuntimeError, OSError):
        return 0.0
    return header.frames / header.samplerate if header.frames < _UNKNOWN_FRAMES else 0.0
