"""The audio of a clip wherever it lies: a file, a member of a tar, a Parquet row, a TFDS example, a stretch of any.

A container's suffix says its kind, and `Clip.member` says which part of it:

    *.tar               name@offset+size: bytes of the tar, as its index had them when it was listed
    *.parquet           column/row group/row: a struct {bytes, path} as Hugging Face has it, or plain bytes
    dataset_info.json   of TFDS, split/example/feature@Hz: decoded integers at int16's scale, or floats
"""

import io
import mmap
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import soundfile

from data_pipelines.audio import MAX_SECONDS, AudioError, Decoded, check_whole, checked, decode, mono, words_of
from data_pipelines.audio_blocks import announced_seconds, read_blocks
from data_pipelines.batch import SAMPLE_RATE
from data_pipelines.corpora import Clip

TFDS_INFO = "dataset_info.json"
OVERSHOOT = 0.5  # seconds a stretch may reach past its recording's end: Kaldi's extract-segments --max-overshoot
# Where libsndfile seeks to the sample. In Ogg and MP3 it lands beside it, so these are decoded from the front.
SEEKS = frozenset({"WAV", "WAVEX", "RF64", "W64", "FLAC", "AIFF", "AU", "CAF", "NIST"})
ROW_GROUPS = 4  # of Parquet, kept in memory: clips of one speaker may lie in several


def tar_member(name: str, *, offset: int, size: int) -> str:
    """`Clip.member` of a tar's file, in bytes from the tar's beginning."""
    return f"{name}@{offset}+{size}"


def parquet_member(column: str, *, group: int, row: int) -> str:
    """`Clip.member` of a Parquet file's row, counted within its row group."""
    return f"{column}/{group}/{row}"


def tfds_member(split: str, *, example: int, feature: str, rate: int) -> str:
    """`Clip.member` of a TFDS example's audio feature ("speech", or "outer/inner"), at `rate` Hz."""
    return f"{split}/{example}/{feature}@{rate}"


class _Recording(NamedTuple):
    """A recording whose stretches are read one after another: open to seek in, decoded whole, read from front to back
    because it is too long for that, or unusable."""

    key: tuple[str, str, str]
    sound: soundfile.SoundFile | None = None
    whole: Decoded | None = None
    forward: "_Forward | None" = None
    error: AudioError | None = None


class _Forward:
    """A file of any length that cannot be seeked in: read block by block, and from its front again for a stretch that
    begins before the one before it did."""

    def __init__(self, path: Path):
        self._path = path
        header = soundfile.info(str(path))
        self._rate, self._channels = header.samplerate, header.channels
        self._restart()

    def stretch(self, clip: Clip) -> Decoded:
        """The clip's audio. Raises AudioError as `decode` does; also for what is wrong with the file before its end."""
        first, last = round(clip.start * SAMPLE_RATE), None if clip.end is None else round(clip.end * SAMPLE_RATE)
        if first < self._begin:
            self._restart()
        limit = first + round(MAX_SECONDS * SAMPLE_RATE)
        if last is not None and last > limit:
            raise AudioError(clip.where, f"longer than {MAX_SECONDS:.0f} s: segment it first")
        while self._end < (limit + 1 if last is None else last):
            try:
                block = next(self._blocks, None)
            except AudioError as error:
                self._failed = error
            if self._failed is not None:
                raise AudioError(clip.where, self._failed.reason) from self._failed.__cause__
            if block is None:
                first, last = _bounds(clip, SAMPLE_RATE, self._end)
                break
            self._held.append(block)
            self._end += len(block)
            while self._held and self._begin + len(self._held[0]) <= first:
                self._begin += len(self._held.pop(0))
        if last is None:
            raise AudioError(clip.where, f"longer than {MAX_SECONDS:.0f} s: segment it first")
        part = np.concatenate(self._held)[first - self._begin : last - self._begin]
        return _checked_part(part, clip, self._rate, self._channels)

    def _restart(self) -> None:
        self._blocks = read_blocks(self._path)
        self._begin = self._end = 0  # samples at 16 kHz
        self._held: list[np.ndarray] = []
        self._failed: AudioError | None = None


class Containers:
    """Decodes clips; keeps the container and the recording that it read last, so that neighbours cost little.

    `folders` gives the folder of every `Clip.root`. One process and one thread; close it, or use it in `with`.
    """

    def __init__(self, folders: Mapping[str, str]):
        self._folders = folders
        self._recording: _Recording | None = None
        self._tar: tuple[Path, int] | None = None  # its path and file descriptor
        self._parquet = None  # (path, pyarrow.parquet.ParquetFile)
        self._groups: dict[tuple[str, int], object] = {}  # (column, row group) of that file -> pyarrow.ChunkedArray
        self._tfds: tuple[tuple[Path, str, str], object] | None = None

    def __enter__(self) -> "Containers":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Closes what is open."""
        if self._tar:
            os.close(self._tar[1])
        if self._parquet:
            self._parquet[1].close()
        self._forget_recording()
        self._tar = self._parquet = self._tfds = None
        self._groups.clear()

    def decode(self, clip: Clip) -> Decoded:
        """The clip's audio at 16 kHz. The hour to which `audio.decode` limits a file is one of a stretch here.

        Raises AudioError as `audio.decode` does, and where the member or the stretch is not there.
        """
        if clip.start == 0 and clip.end is None:
            return self._whole(clip)
        key = (clip.root, clip.path, clip.member)
        if self._recording is None or self._recording.key != key:
            self._forget_recording()
            self._recording = self._open(clip, key)
        recording = self._recording
        if recording.error is not None:
            raise AudioError(clip.where, recording.error.reason) from recording.error.__cause__
        if recording.forward is not None:
            return recording.forward.stretch(clip)
        if recording.whole is not None:
            whole = recording.whole
            first, last = _bounds(clip, SAMPLE_RATE, len(whole.waveform))
            return _checked_part(whole.waveform[first:last].copy(), clip, whole.source_rate, whole.source_channels)
        return _stretch(recording.sound, clip)

    def _forget_recording(self) -> None:
        if self._recording is not None and self._recording.sound is not None:
            self._recording.sound.close()
        self._recording = None

    def _open(self, clip: Clip, key: tuple[str, str, str]) -> _Recording:
        if PurePosixPath(clip.path).name != TFDS_INFO:
            try:
                sound = _seekable(self._bytes(clip), clip)
            except AudioError as error:
                return _Recording(key, error=error)
            if sound is not None:
                return _Recording(key, sound=sound)
            if not clip.member and announced_seconds(self._path(clip)) > MAX_SECONDS:
                return _Recording(key, forward=_Forward(self._path(clip)))
        try:
            return _Recording(key, whole=self._whole(clip))
        except AudioError as error:
            if not clip.member and error.reason.startswith("longer than"):  # than its header says
                return _Recording(key, forward=_Forward(self._path(clip)))
            return _Recording(key, error=error)

    def _whole(self, clip: Clip) -> Decoded:
        if PurePosixPath(clip.path).name == TFDS_INFO and clip.member:
            return self._tfds_example(clip)
        return decode(self._bytes(clip), name=clip.where)

    def _path(self, clip: Clip) -> Path:
        return Path(self._folders[clip.root]) / clip.path

    def _bytes(self, clip: Clip) -> bytes | Path:
        path = self._path(clip)
        if not clip.member:
            return path
        try:
            if path.suffix == ".tar":
                return self._tar_bytes(path, clip)
            if path.suffix == ".parquet":
                return self._parquet_bytes(path, clip)
        except OSError as error:
            raise AudioError(clip.where, f"cannot be read ({error.strerror or error})") from error
        raise AudioError(clip.where, f"{path.suffix or path.name} is no container that is known: .tar, .parquet, TFDS")

    def _tar_bytes(self, path: Path, clip: Clip) -> bytes:
        if self._tar is None or self._tar[0] != path:
            if self._tar:
                os.close(self._tar[1])
                self._tar = None
            self._tar = (path, os.open(path, os.O_RDONLY))
        offset, _, size = clip.member.rpartition("@")[2].partition("+")
        data = os.pread(self._tar[1], int(size), int(offset))
        if len(data) != int(size):
            raise AudioError(clip.where, f"truncated: the tar ends after {len(data)} of {size} bytes")
        return data

    def _parquet_bytes(self, path: Path, clip: Clip) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        column, group, row = clip.member.rsplit("/", 2)
        try:
            if self._parquet is None or self._parquet[0] != path:
                if self._parquet:
                    self._parquet[1].close()
                    self._parquet = None
                self._groups.clear()
                self._parquet = (path, pq.ParquetFile(path))
            key = (column, int(group))
            if key not in self._groups:
                if len(self._groups) >= ROW_GROUPS:
                    self._groups.pop(next(iter(self._groups)))
                self._groups[key] = self._parquet[1].read_row_group(int(group), columns=[column]).column(column)
            value = self._groups[key][int(row)].as_py()
        except (pa.ArrowException, KeyError, IndexError) as error:
            raise AudioError(clip.where, f"cannot be read ({' '.join(str(error).split())})") from error
        if isinstance(value, dict):
            value = value.get("bytes")
        if not value:
            raise AudioError(clip.where, "the row holds no bytes: embed the audio (Hugging Face: embed_table_storage)")
        return value

    def _tfds_example(self, clip: Clip) -> Decoded:
        from data_pipelines.tfds_examples import open_examples

        split, example, named = clip.member.split("/", 2)
        feature, _, rate = named.rpartition("@")
        key = (self._path(clip).parent, split, feature)
        try:
            if self._tfds is None or self._tfds[0] != key:
                self._tfds = (key, open_examples(key[0], split, features=(feature,)))
            values = self._tfds[1][int(example)]
            for name in feature.split("/"):
                values = values[name]
        except (OSError, RuntimeError, KeyError, IndexError, ValueError) as error:
            raise AudioError(clip.where, f"cannot be read ({' '.join(str(error).split())})") from error
        values = np.asarray(values)
        floats = values.dtype.kind == "f"
        if not floats and len(values) and max(-int(values.min()), int(values.max())) > 32768:
            raise AudioError(clip.where, "overdriven: integers beyond 16 bits")
        source = values.astype(np.float32) / np.float32(1 if floats else 32768)
        source = source.reshape(len(source), -1)
        return checked(mono(source), rate=int(rate), channels=source.shape[1], floats=floats, name=clip.where)


def _checked_part(waveform: np.ndarray, clip: Clip, rate: int, channels: int) -> Decoded:
    """A part at 16 kHz of a recording that had `rate` Hz and `channels`."""
    part = checked(waveform, rate=SAMPLE_RATE, channels=channels, floats=False, name=clip.where)
    return part._replace(source_rate=rate, source_frames=len(waveform) * rate // SAMPLE_RATE)


def _seekable(data: bytes | Path, clip: Clip) -> soundfile.SoundFile | None:
    """The recording, open; None where it must be decoded from its beginning. Raises AudioError: damaged, not there."""
    try:
        if isinstance(data, Path):
            with open(data, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                if view[:4] == b"OggS":
                    return None
                check_whole(view, clip.where)
            sound = soundfile.SoundFile(str(data))
        else:
            if data[:4] == b"OggS":
                return None
            check_whole(data, clip.where)
            sound = soundfile.SoundFile(io.BytesIO(data))
    except (OSError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        why = getattr(error, "strerror", None) or ("empty file" if isinstance(error, ValueError) else error)
        raise AudioError(clip.where, f"cannot be read ({why})") from error
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise AudioError(clip.where, f"unreadable ({words_of(error)})") from error
    if sound.format in SEEKS and sound.seekable() and sound.frames < 1 << 62:
        return sound
    sound.close()
    return None


def _bounds(clip: Clip, rate: int, frames: int) -> tuple[int, int]:
    """First and last frame of the stretch. Raises AudioError if it reaches `OVERSHOOT` past the end, or is none."""
    first = round(clip.start * rate)
    last = frames if clip.end is None else round(clip.end * rate)
    if last > frames + OVERSHOOT * rate or first >= frames:
        raise AudioError(clip.where, f"the recording ends after {frames / rate:.3f} s")
    return first, min(last, frames)


def _stretch(sound: soundfile.SoundFile, clip: Clip) -> Decoded:
    rate = sound.samplerate
    first, last = _bounds(clip, rate, sound.frames)
    if last - first > MAX_SECONDS * rate:
        samples = (last - first) * SAMPLE_RATE // rate
        raise AudioError(clip.where, f"longer than {MAX_SECONDS:.0f} s: segment it first", samples)
    try:
        sound.seek(first)
        block = sound.read(last - first, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise AudioError(clip.where, f"unreadable ({words_of(error)})") from error
    if len(block) != last - first:
        raise AudioError(clip.where, f"truncated: {len(block)} of {last - first} samples decode")
    floats = sound.subtype in ("FLOAT", "DOUBLE")
    return checked(mono(block), rate=rate, channels=sound.channels, floats=floats, name=clip.where)
