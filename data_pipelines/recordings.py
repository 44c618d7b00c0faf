"""Audio from folders that are no corpus: background noise, and responses of rooms."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from data_pipelines.audio import AUDIO_SUFFIXES, AudioError, check_file
from data_pipelines.batch import SAMPLE_RATE
from data_pipelines.folders import files_below
from data_pipelines.sources import SourceError

CLIP_SECONDS = 60.0  # what `NoiseFolder.clip` reads of a longer file
RESPONSE_SECONDS = 30.0  # a longer file is no room response: the slowest cathedrals decay in about 10 s


class Recording(NamedTuple):
    """A file as its header has it: its samples at its own rate, and how many channels."""

    path: Path
    samples: int
    rate: int
    channels: int

    def read(self, *, start: int = 0, samples: int | None = None) -> np.ndarray:
        """float32 [samples, channels] from sample `start` on, at the file's rate; to its end if `samples` is None.

        Raises SourceError naming the file: it is gone or damaged, there is nothing, or something is not finite.
        """
        try:
            with soundfile.SoundFile(str(self.path)) as sound:
                sound.seek(start)
                audio = sound.read(-1 if samples is None else samples, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, OSError) as error:
            raise SourceError(f"{self.path} cannot be read: {error}") from error
        if not len(audio) or not np.isfinite(audio).all():
            raise SourceError(f"{self.path} has no usable samples from {start} on")
        return audio


class NoiseFolder:
    """Background noise from any folder of audio files (MUSAN, the DNS challenge's noises, one's own recordings).

    Every file is as likely as every other, whatever its length. Headers are read once, here, so
    that a bad file is found at the start. Raises SourceError: no such folder, no audio in it, unreadable files (named).
    """

    def __init__(self, folder: str | Path):
        self._files = _scan(Path(folder), what="noise")

    def __len__(self) -> int:
        return len(self._files)

    def read(self, rng: np.random.Generator, samples: int) -> np.ndarray:
        """float32 [samples] at 16 kHz: a random stretch of a random file; a file that is too short is repeated.

        Only the stretch is decoded; channels are averaged, other rates resampled. Raises SourceError naming the file.
        """
        return np.resize(self._stretch(rng, samples), samples)  # numpy's resize repeats

    def clip(self, rng: np.random.Generator) -> np.ndarray:
        """float32 [samples] at 16 kHz: the whole of a random file, or a random minute of a longer one."""
        return self._stretch(rng, round(CLIP_SECONDS * SAMPLE_RATE))

    def _stretch(self, rng: np.random.Generator, samples: int) -> np.ndarray:
        """At most `samples` of a random file, from a random start that has so many, or all of a shorter file."""
        file = self._files[int(rng.integers(len(self._files)))]
        wanted = -(-samples * file.rate // SAMPLE_RATE)
        start = int(rng.integers(max(file.samples - wanted, 0) + 1))
        noise = file.read(start=start, samples=min(wanted, file.samples)).mean(axis=1, dtype=np.float32)
        return _resampled(noise, file)[:samples]


class ResponseFolder:
    """Room responses from any folder of audio files (OpenSLR 26 and 28, BUT ReverbDB, pyroomacoustics' output).

    Every file is as likely as every other. Headers are read once, here. Raises SourceError: no such folder, no audio in
    it, unreadable files, files of more than 30 s (all named).
    """

    def __init__(self, folder: str | Path):
        self._files = _scan(Path(folder), what="room response")
        long = [str(file.path) for file in self._files if file.samples > RESPONSE_SECONDS * file.rate]
        if long:
            raise SourceError(
                f"{len(long)} of {len(self._files)} files are over {RESPONSE_SECONDS:g} s long, no room responses; "
                f"remove or cut: {'; '.join(long[:5])}"
            )

    def __len__(self) -> int:
        return len(self._files)

    def read(self, rng: np.random.Generator) -> np.ndarray:
        """float32 [samples] at 16 kHz: one random channel of a random file.

        One, because the mean of a microphone array's channels (ESPnet takes it) has a direct path for each microphone.
        Raises SourceError naming the file, also if the channel is silent.
        """
        file = self._files[int(rng.integers(len(self._files)))]
        channel = int(rng.integers(file.channels))
        response = _resampled(np.ascontiguousarray(file.read()[:, channel]), file)
        if not response.any():
            raise SourceError(f"{file.path}: channel {channel} is silent; no room answers so")
        return response


def files_digest(folder: str | Path, *, what: str) -> str:
    """Hex sha256 of the paths and sizes of a folder's audio files, wherever it lies: with others, other rows are heard.

    Raises SourceError: no such folder, no audio in it.
    """
    folder = Path(folder)
    files = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in _audio_in(folder, what=what)]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _audio_in(folder: Path, *, what: str) -> list[Path]:
    if not folder.is_dir():
        raise SourceError(f"{what} folder {folder} does not exist")
    paths = sorted(path for path in files_below(folder) if path.suffix.lower() in AUDIO_SUFFIXES)
    if not paths:
        raise SourceError(f"{what} folder {folder} has no audio files ({', '.join(sorted(AUDIO_SUFFIXES))})")
    return paths


def _scan(folder: Path, *, what: str) -> list[Recording]:
    """The audio files under a folder, in the order of their paths. Raises SourceError, naming what cannot be read."""
    paths, files, bad = _audio_in(folder, what=what), [], []
    for path in tqdm(paths, desc=f"{what} files", unit="file", delay=5, disable=None):
        try:
            if path.suffix.lower() == ".mp3" and check_file(path, str(path)) is not path:
                bad.append(f"{path}: an MP3 that does not say how long it is: convert it to WAV")
                continue
            header = soundfile.info(str(path))
        except AudioError as error:
            bad.append(str(error))
            continue
        except (soundfile.LibsndfileError, OSError) as error:
            bad.append(f"{path}: {error}")
            continue
        if header.frames < 1:
            bad.append(f"{path}: zero length")
        files.append(Recording(path, header.frames, header.samplerate, header.channels))
    if bad:
        raise SourceError(
            f"{len(bad)} of {len(paths)} {what} files cannot be read; remove or repair: " + "; ".join(bad[:5])
        )
    return files


def _resampled(audio: np.ndarray, file: Recording) -> np.ndarray:
    """`audio` [samples] at 16 kHz. Raises SourceError if nothing is left of it."""
    if file.rate == SAMPLE_RATE:
        return audio
    audio = soxr.resample(audio, file.rate, SAMPLE_RATE, quality="HQ")
    if not len(audio):
        raise SourceError(f"{file.path} is too short to be resampled from {file.rate} Hz")
    return audio
