"""Bytes to mono float32 at 16 kHz, and the FLAC that shards hold.

libsndfile decodes a file that was cut short without a word, and hands over what is left. Joined with a transcript or a
length that was meant for the whole, that is a silent error, so what the container says of itself is checked here.
"""

import io
import math
import mmap
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from data_pipelines.batch import SAMPLE_RATE
from data_pipelines.mpeg import MpegError, to_decode

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".oga", ".mp3", ".aif", ".aiff", ".au", ".w64", ".sph"})
# Of sound too, but not decoded here: a listing says so instead of passing over them.
UNDECODED_SUFFIXES = frozenset(
    {".m4a", ".m4b", ".mp4", ".aac", ".webm", ".mka", ".mkv", ".mov", ".wma", ".amr", ".3gp", ".ape", ".ac3"}
    | {".aifc", ".caf", ".mp2", ".mpc", ".ra", ".snd", ".spx", ".tta", ".wv"}
)
SILENCE = 1e-4  # peak of -80 dB re full scale: three steps of int16
# Files of floats may go beyond full scale, 1. Filters and limiters overshoot by a few dB now and then: that is clipped.
# A peak of +12 dB is no overshoot, but another scale (int16 kept as floats has peaks of 1e4); and with more than one
# sample in a thousand beyond full scale, clipping would make another sound of the speech, harmonics and all.
OVERDRIVEN_PEAK = 4.0
OVERDRIVEN_SHARE = 1e-3
MAX_SECONDS = 3600.0  # longer files need segmenting first; also bounds the memory that a hostile header can ask for
_UNKNOWN_SIZE = 0xFFFFFFFF  # what streaming writers put into a RIFF header
_SOX_UNKNOWN = range(0x7FFFF000 - 64, 0x7FFFF000 + 1)  # SoX's wav.c, into a pipe: this, less what is no whole sample
_INT16 = 32768.0
_UNDECODED = ((4, b"ftyp", "MP4 or M4A"), (0, b"\x1aE\xdf\xa3", "WebM or Matroska"))  # first bytes of each
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class AudioError(ValueError):
    """A clip that cannot be used: `name` says which, `reason` why, `samples` its length at 16 kHz (0: unknown)."""

    def __init__(self, name: str, reason: str, samples: int = 0):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason, self.samples = name, reason, samples

    def __reduce__(self):  # exceptions are rebuilt from their message otherwise, which loses the parts
        return type(self), (self.name, self.reason, self.samples)


class ForwardSoundFile(soundfile.SoundFile):
    """A file that is read from front to back only: `read(frames)` gives fewer at the end, then none.

    A SoundFile seeks to where it is after each block. In Ogg that is not always harmless: libsndfile decodes the last
    page of an Opus file wrongly after a seek to its very beginning.
    """

    def seekable(self) -> bool:
        """Never, so that nothing seeks."""
        return False


class Decoded(NamedTuple):
    """One clip: `waveform` [samples] float32 at 16 kHz, mono, and what its source was.

    Attributes:
        waveform: float32 [samples]; channels averaged, other rates resampled with soxr's HQ setting.
        source_rate: Hz. source_frames: samples per channel at that rate. source_channels: how many there were.
        source_format: of the whole file, as libsndfile calls it ("WAV", "MP3"); "" for samples and parts of files.
    """

    waveform: np.ndarray
    source_rate: int
    source_frames: int
    source_channels: int
    source_format: str = ""


def decode(data: bytes | Path, *, name: str) -> Decoded:
    """Decodes a whole file, given as bytes or as a path, to `waveform` [samples] float32 mono 16 kHz.

    Raises AudioError naming the clip and the reason: missing or unreadable, truncated (fewer bytes or samples than the
    header of a WAV, AIFF, AU, W64, SPHERE, FLAC or MP3 with a Xing header says; Ogg without its last page; an MP3 cut
    inside a frame), damaged (an Ogg page whose checksum is wrong, something else between MP3 frames), several Ogg
    streams one after another, a SPHERE file compressed with shorten, longer than `MAX_SECONDS`, zero length, not
    finite, silent or constant (nothing further than `SILENCE` from the mean), overdriven (floats beyond
    `OVERDRIVEN_PEAK`, or more than `OVERDRIVEN_SHARE` of them beyond full scale). An MP3 without a Xing header cannot
    tell that it was cut between two frames.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        try:
            data = Path(data).read_bytes()
        except OSError as error:
            raise AudioError(name, f"cannot be read ({error.strerror})") from error
    if not data:
        raise AudioError(name, "empty file")
    data = bytes(data)
    data = check_whole(data, name) or data
    try:
        with ForwardSoundFile(io.BytesIO(data)) as sound:
            rate, announced, channels, kind = sound.samplerate, sound.frames, sound.channels, sound.format
            floats = sound.subtype in ("FLOAT", "DOUBLE")
            limit = int(MAX_SECONDS * rate)
            # Unknown lengths are announced as absurdly long ones: read up to the limit, then see whether more follows.
            blocks, left = [], limit + 1
            while left and len(block := sound.read(min(left, 1 << 20), dtype="float32", always_2d=True)):
                blocks.append(mono(block))
                left -= len(block)
    except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
        raise AudioError(name, f"unreadable ({words_of(error)})") from error
    source = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    frames = len(source)
    if frames > limit:
        raise AudioError(name, f"longer than {MAX_SECONDS:.0f} s: segment it first", int(MAX_SECONDS * SAMPLE_RATE))
    if frames < announced < 1 << 62:
        raise AudioError(name, f"truncated: {frames} of {announced} samples decode")
    return checked(source, rate=rate, channels=channels, floats=floats, name=name)._replace(source_format=kind)


def checked(source: np.ndarray, *, rate: int, channels: int, floats: bool, name: str) -> Decoded:
    """`source` [frames] float32, mono, at `rate` Hz, resampled to 16 kHz; `floats`: it was stored as such.

    Raises AudioError: zero length, not finite, silent or constant, overdriven; see `decode`.
    """
    frames = len(source)
    if frames == 0:
        raise AudioError(name, "zero length")
    if not np.isfinite(source).all():
        raise AudioError(name, "not finite: has NaN or infinite samples", round(frames * SAMPLE_RATE / rate))
    waveform = at_16_khz(source, rate=rate)
    if not len(waveform):
        raise AudioError(name, "zero length at 16 kHz")
    if float(np.abs(source - source.mean(dtype=np.float64)).max()) < SILENCE:
        reason = f"silent or constant: within {20 * np.log10(SILENCE):.0f} dB re full scale of its mean throughout"
        raise AudioError(name, reason, len(waveform))
    if floats and (beyond := np.abs(source) > 1.0).any():
        peak = float(np.abs(source).max())
        if peak > OVERDRIVEN_PEAK or beyond.mean() > OVERDRIVEN_SHARE:
            raise AudioError(name, f"overdriven: peak {peak:.3g}, floats must lie in [-1, 1]", len(waveform))
    return Decoded(np.ascontiguousarray(waveform, np.float32), rate, frames, channels)


def at_16_khz(source: np.ndarray, *, rate: int) -> np.ndarray:
    """float32 [samples]: `source` [frames] at `rate` Hz, resampled with soxr's HQ setting; 16 kHz as they are."""
    return source if rate == SAMPLE_RATE else soxr.resample(source, rate, SAMPLE_RATE, quality="HQ")


def encode_flac(waveform: np.ndarray) -> bytes:
    """FLAC bytes (mono, 16 kHz, 16 bit) of `waveform` [samples]: float32 in [-1, 1], or int16, which is kept exactly.

    Full scale is 32768, as when reading; what lies outside is clipped. The same samples give the same bytes.
    """
    if waveform.dtype != np.int16:
        waveform = np.clip(np.rint(waveform * np.float32(_INT16)), -32768, 32767).astype(np.int16)
    with io.BytesIO() as sink:
        soundfile.write(sink, waveform, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        return sink.getvalue()


def decode_crop(
    flac: bytes, *, start: int = 0, samples: int | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """float32 [samples] from sample `start` on, of FLAC bytes at 16 kHz mono; to the end where `samples` is None.

    Decodes into `out` [samples], float32 and contiguous, where it is given, and returns it. Seeks, so that a short crop
    of a long utterance costs little. Exact: libsndfile divides by 32768, a power of two. Raises AudioError: unreadable,
    not 16 kHz mono, or the crop reaches past the end.
    """
    try:
        # Not a SoundFile: that seeks to where it is before and after every read, and so decodes a frame once more.
        with ForwardSoundFile(io.BytesIO(flac)) as sound:
            if (sound.samplerate, sound.channels) != (SAMPLE_RATE, 1):
                raise AudioError("FLAC", f"{sound.samplerate} Hz, {sound.channels} channels; expected 16000 Hz mono")
            total = sound.frames
            samples = total - start if samples is None else samples
            if start < 0 or samples < 0 or start + samples > total:
                raise AudioError("FLAC", f"crop {start}..{start + samples} of {total} samples")
            if start:
                sound.seek(start)
            crop = sound.read(samples, out=np.empty(samples, np.float32) if out is None else out)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise AudioError("FLAC", f"unreadable ({words_of(error)})") from error
    if len(crop) != samples:
        raise AudioError("FLAC", f"truncated: {len(crop)} of {samples} samples decode")
    return crop


def mono(block: np.ndarray) -> np.ndarray:
    """[frames, channels] to [frames]: the channels' mean, as an array of its own."""
    return block[:, 0].copy() if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)


def words_of(error: Exception) -> str:
    """What libsndfile says, without the address of the object it read from: the same file gives the same words."""
    return str(getattr(error, "error_string", error)).strip().rstrip(".")


def check_whole(data: bytes | mmap.mmap, name: str) -> bytes | None:
    """What is to be decoded in place of `data`, as of some MP3 (see `mpeg`); None where `data` is.

    Raises AudioError if the container says that more bytes should follow, or is one that cannot be decoded.
    """
    announced = None
    for place, mark, container in _UNDECODED:
        if data[place : place + len(mark)] == mark:
            raise AudioError(name, f"{container} is not decoded here: convert it first (ffmpeg -i FILE out.flac)")
    if data[:4] in (b"RIFF", b"RIFX", b"RF64") and data[8:12] == b"WAVE":
        _check_wav(data, name)
    elif data[:4] == b"OggS":
        _check_ogg(data, name)
    elif data[:4] == b"FORM" and len(data) >= 8:
        announced = struct.unpack(">I", data[4:8])[0] + 7  # not counting a last pad byte, which some leave out
    elif data[:4] == b".snd" and len(data) >= 12:
        offset, size = struct.unpack(">II", data[4:12])
        announced = offset + size if size != _UNKNOWN_SIZE else None
    elif data[:4] == b"riff" and len(data) >= 24:  # Sony's W64: GUIDs instead of four letters, 64-bit sizes
        announced = struct.unpack("<Q", data[16:24])[0]
    elif data[:8] == b"NIST_1A\n":
        announced = _sphere_bytes(data, name)
    elif data[:3] == b"ID3" or data[:1] == b"\xff":
        try:
            return to_decode(data)
        except MpegError as error:
            raise AudioError(name, str(error)) from error
    if announced is not None and announced > len(data):
        raise AudioError(name, f"truncated: {len(data)} of {announced} bytes")
    return None


def check_file(path: Path, name: str) -> Path | io.BytesIO:
    """`check_whole` of a file that is mapped, not read; gives what is to be opened in its place, or `path`.

    Raises AudioError for no file and an empty one too.
    """
    try:
        if not path.is_file():
            raise AudioError(name, "is not a file" if path.exists() else "does not exist")
        with open(path, "rb") as file:
            if path.stat().st_size == 0:
                raise AudioError(name, "empty file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                instead = check_whole(data, name)
    except OSError as error:
        raise AudioError(name, f"cannot be read ({error.strerror})") from error
    return path if instead is None else io.BytesIO(instead)


def _sphere_bytes(data: bytes | mmap.mmap, name: str) -> int | None:
    """The length by a NIST SPHERE header: its size in bytes on line 2, then "name -type value" lines up to end_head.

    Raises AudioError for shorten (LDC's older CDs), which libsndfile does not decode.
    """
    size = int(data[8:16]) if bytes(data[8:16]).strip().isdigit() else 1024
    lines = bytes(data[16:size]).decode("ascii", "replace").split("end_head")[0].splitlines()
    fields = {words[0]: words[2].strip() for words in (line.split(None, 2) for line in lines) if len(words) == 3}
    if "shorten" in fields.get("sample_coding", ""):
        raise AudioError(name, "SPHERE compressed with shorten is not decoded here: sph2pipe -f wav FILE.sph FILE.wav")
    numbers = [fields.get(key, "") for key in ("sample_count", "channel_count", "sample_n_bytes")]
    if not all(number.isdigit() for number in numbers):
        return None
    return size + math.prod(int(number) for number in numbers)


def _check_wav(data: bytes | mmap.mmap, name: str) -> None:
    order = ">" if data[:4] == b"RIFX" else "<"
    position, wide_size = 12, None
    while position + 8 <= len(data):
        kind, size = data[position : position + 4], struct.unpack(f"{order}I", data[position + 4 : position + 8])[0]
        if kind == b"ds64" and position + 24 <= len(data):
            wide_size = struct.unpack("<Q", data[position + 16 : position + 24])[0]
        if kind == b"data":
            if size in _SOX_UNKNOWN or (size == _UNKNOWN_SIZE and wide_size is None):
                return  # written to a pipe: the length was never known
            size = wide_size if size == _UNKNOWN_SIZE else size
            left = len(data) - position - 8
            if size > left:
                raise AudioError(name, f"truncated: WAV of {size} data bytes has {left}")
            return
        position += 8 + size + size % 2
    raise AudioError(name, "truncated: WAV without a data chunk")


def _check_ogg(data: bytes | mmap.mmap, name: str) -> None:
    """Walks the pages (RFC 3533, section 6): each whole and sound, none missing, the last one flagged as the last."""
    position, sequence, ended = 0, {}, False
    while position < len(data):
        if data[position : position + 4] != b"OggS":
            if ended and not data[position:].strip(b"\0"):
                return  # padding after the end
            raise AudioError(name, f"damaged: no Ogg page at byte {position}")
        if position + 27 > len(data):
            raise AudioError(name, "truncated: cut inside an Ogg page header")
        flags, serial, number, checksum, segments = struct.unpack("<5xB8xIIIB", data[position : position + 27])
        body = position + 27 + segments
        end = body + sum(data[position + 27 : body])
        if body > len(data) or end > len(data):
            raise AudioError(name, "truncated: cut inside an Ogg page")
        if _ogg_checksum(data[position : position + 22] + bytes(4) + data[position + 26 : end]) != checksum:
            raise AudioError(name, f"damaged: checksum of Ogg page {number}")
        if ended and flags & 2:
            raise AudioError(name, f"a second Ogg stream at byte {position}, which would not be decoded: split it")
        if serial in sequence and number != sequence[serial] + 1:
            raise AudioError(name, f"damaged: Ogg page {number} follows page {sequence[serial]}")
        sequence[serial], ended, position = number, bool(flags & 4), end
    if not ended:
        raise AudioError(name, "truncated: Ogg without an end-of-stream page")


def _ogg_checksum(page: bytes) -> int:
    """Ogg's CRC is zlib's with every bit order reversed, begun at 0 and not inverted (RFC 3533, section 6, field 7)."""
    crc = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{crc:032b}"[::-1], 2)
