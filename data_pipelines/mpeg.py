"""How much sound an MP3 holds, by its frames, and the MP3 that libsndfile decodes all of.

libsndfile takes the length from the Xing or Info header in the first frame, and reads no further. Without one, as
encoders that write to a pipe leave it, it goes by the size of the file and the bitrate of the first frame (libsndfile
issue 1001): of a variable bitrate half or more would be lost without a word; of a constant one with a tag before it,
less would be there than announced. With one that counts too few frames, as of two files that were joined, the rest
would be lost. So the frames are counted here. Where the header counts others, or there is none, one that counts right
is put before the same frames.

Only Layer III is looked at, and no free format. Frames: ISO 11172-3, 2.4.2.3, and ISO 13818-3; MPEG 2.5 halves the
rates once more. Xing's header: flags, then, for its lowest two bits, the number of frames after it and of bytes.
"""

import mmap
import struct
from typing import NamedTuple

_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # Hz, by version bits
_KBITS = {
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_LAYER_III = 1
_MONO = 3
_CHAIN = 3  # headers of one kind, each where the one before says, are no accident
_SEARCHED = 1 << 16  # bytes that may stand before the first frame, beside tags
_SHARE = 0.99  # of the frames that its header counts must be there: some encoders count wrong, none by so much


class MpegError(ValueError):
    """An MP3 that is cut or damaged; the message says where."""


class _Frame(NamedTuple):
    """A header's `kind`, which all frames of a stream share (version, rate, whether mono), and the frame's `size`."""

    kind: tuple[int, int, bool]
    size: int


class _Counted(NamedTuple):
    """What a stream's own header says: `frames` (None: not told), in a frame of `size` bytes; 0 where there is none."""

    size: int
    frames: int | None


def to_decode(data: bytes | mmap.mmap) -> bytes | None:
    """What libsndfile is to decode in place of `data`; None where that is no MP3, or one that it decodes all of.

    Raises MpegError: frames missing at the end, or something between frames that is none.
    """
    begin = _after_tags(data)
    if data[begin : begin + 4] == b"fLaC" or (begin == 0 and not _frame(data, 0)):
        return None
    begin = _chain(data, begin, begin + _SEARCHED)
    if begin is None:
        return None
    counted = _counted(data, begin)
    first = begin + counted.size
    frames, end = _walk(data, first, _frame(data, begin).kind)
    if frames == counted.frames:
        return None
    if counted.frames and frames < _SHARE * counted.frames:
        raise MpegError(f"truncated: {frames} of {counted.frames} MP3 frames")
    cut = _frame(data, end)
    if cut is not None and end + cut.size > len(data):
        raise MpegError(f"truncated: cut inside MP3 frame {frames + 1}")
    if _chain(data, end, len(data)) is not None:
        raise MpegError(f"damaged: no MP3 frame at byte {end}, but more of them after it")
    return _xing(data[begin : begin + 4], frames=frames, size=end - first) + data[first:end]


def _after_tags(data: bytes | mmap.mmap) -> int:
    """The first byte after ID3v2 tags: each has ten bytes of header, and its size as four times seven bits."""
    at = 0
    while data[at : at + 3] == b"ID3" and len(data) >= at + 10:
        footer = 10 if data[at + 5] & 0x10 else 0
        a, b, c, d = (byte & 127 for byte in data[at + 6 : at + 10])
        at += 10 + (a << 21 | b << 14 | c << 7 | d) + footer
    return at


def _frame(data: bytes | mmap.mmap, at: int) -> _Frame | None:
    """The frame of Layer III whose header stands at `at`; None where none does."""
    if len(data) < at + 4 or data[at] != 0xFF or data[at + 1] & 0xE0 != 0xE0:
        return None
    version, layer = data[at + 1] >> 3 & 3, data[at + 1] >> 1 & 3
    bitrate, rate, padding = data[at + 2] >> 4, data[at + 2] >> 2 & 3, data[at + 2] >> 1 & 1
    if version == 1 or layer != _LAYER_III or rate == 3 or not 1 <= bitrate <= 14:
        return None
    hertz = _RATES[version][rate]
    bits = _KBITS[3 if version == 3 else 2][bitrate] * 1000
    size = (144 if version == 3 else 72) * bits // hertz + padding
    return _Frame((version, rate, data[at + 3] >> 6 == _MONO), size)


def _chain(data: bytes | mmap.mmap, begin: int, end: int) -> int | None:
    """The first byte of begin .. end - 1 from which on `_CHAIN` frames of one kind follow one another, or fewer up to
    the very end."""
    at = data.find(b"\xff", begin, end)
    while at >= 0:
        place, kinds = at, []
        while len(kinds) < _CHAIN and (frame := _frame(data, place)) is not None:
            kinds.append(frame.kind)
            place += frame.size
        if kinds and len(set(kinds)) == 1 and (len(kinds) == _CHAIN or place == len(data)):
            return at
        at = data.find(b"\xff", at + 1, end)
    return None


def _walk(data: bytes | mmap.mmap, at: int, kind: tuple[int, int, bool]) -> tuple[int, int]:
    """How many whole frames of this kind follow one another from `at` on, and where they end."""
    sizes: dict[bytes, int] = {}  # headers are few
    frames, length = 0, len(data)
    while at + 4 <= length:
        head = data[at : at + 4]
        size = sizes.get(head)
        if size is None:
            frame = _frame(data, at)
            size = sizes[head] = frame.size if frame is not None and frame.kind == kind else 0
        if not size or at + size > length:
            break
        frames, at = frames + 1, at + size
    return frames, at


def _counted(data: bytes | mmap.mmap, begin: int) -> _Counted:
    """The header that the first frame holds instead of sound: Xing's, Info, which is the same, or VBRI."""
    size = _frame(data, begin).size
    head = data[begin : begin + size]
    place = max(head.find(name, 13, 46) for name in (b"Xing", b"Info"))  # 13 to 36 bytes in, two more after a checksum
    if place >= 0 and len(head) >= place + 12:
        flags, frames = struct.unpack(">II", head[place + 4 : place + 12])
        return _Counted(size, frames if flags & 1 else None)
    return _Counted(size if b"VBRI" in head[36:42] else 0, None)


def _xing(header: bytes, *, frames: int, size: int) -> bytes:
    """A frame of silence of 64 kbit/s that counts `frames` of `size` bytes after it; `header` is one of theirs."""
    version = header[1] >> 3 & 3
    bitrate = _KBITS[3 if version == 3 else 2].index(64)
    # without a checksum, without padding
    head = bytes([0xFF, header[1] | 1, bitrate << 4 | header[2] & 0x0C, header[3]])
    mono = header[3] >> 6 == _MONO
    side = (17 if mono else 32) if version == 3 else (9 if mono else 17)
    total = _frame(head, 0).size
    body = head + bytes(side) + b"Xing" + struct.pack(">III", 3, frames, size + total)
    return body + bytes(total - len(body))
