"""MP3s whose headers do not say how long they are: all of them is decoded, or the file is refused."""

import io
import struct

import numpy as np
import pytest
import soundfile
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipelines.audio import AudioError, decode
from data_pipelines.audio_blocks import read_blocks
from data_pipelines.mpeg import MpegError, _frame, to_decode
from data_pipelines.recordings import NoiseFolder
from data_pipelines.sources import SourceError

RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
DELAY = 576  # samples that LAME puts before the sound, beyond the 529 that decoders leave out
ID3 = b"ID3\x04\0\0\0\0\x08\0" + bytes(1024)


def mp3(rate=16000, *, channels=1, mode="VARIABLE", seconds=4):
    """Bytes with a Xing header; loud, then nearly silent, so that frames of variable bitrate differ in size."""
    time = np.arange(rate * seconds) / rate
    sound = 0.3 * np.sin(2 * np.pi * 220 * time) + np.random.default_rng(0).normal(size=len(time)) * 0.05
    sound[len(time) // 3 : len(time) // 2] *= 1e-3
    with io.BytesIO() as sink:
        with soundfile.SoundFile(
            sink, "w", rate, channels, format="MP3", bitrate_mode=mode, compression_level=0.5
        ) as file:
            file.write(np.stack([sound] * channels, 1))
        return sink.getvalue()


def streamed(data):
    """The same without the frame that holds the header: what an encoder writes to a pipe."""
    return data[_frame(data, 0).size :]


@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", RATES)
def test_all_of_a_streamed_mp3_is_decoded(rate, channels, mode):
    whole = mp3(rate, channels=channels, mode=mode)
    assert to_decode(whole) is None  # libsndfile knows how long it is
    expected, _ = soundfile.read(io.BytesIO(whole), dtype="float32", always_2d=True)
    for data in (streamed(whole), ID3 + streamed(whole), streamed(whole) + b"TAG" + bytes(125)):
        found, _ = soundfile.read(io.BytesIO(to_decode(data)), dtype="float32", always_2d=True)
        assert DELAY <= len(found) - len(expected) < DELAY + 2 * 1152
        np.testing.assert_allclose(found[DELAY : DELAY + len(expected)], expected, atol=1e-5)


def test_blocks_are_the_decoded_file_where_the_header_counts_nothing(tmp_path):
    (tmp_path / "a.mp3").write_bytes(streamed(mp3(44_100)))
    whole = decode(tmp_path / "a.mp3", name="x")
    assert whole.source_format == "MP3" and 4.0 < len(whole.waveform) / 16_000 < 4.06
    np.testing.assert_array_equal(np.concatenate(list(read_blocks(tmp_path / "a.mp3"))), whole.waveform)
    with pytest.raises(SourceError, match="a.mp3: an MP3 that does not say how long it is: convert it to WAV"):
        NoiseFolder(tmp_path)


def test_two_mp3s_in_one_are_both_decoded():
    one = mp3()
    assert 8.0 < len(decode(one + one, name="x").waveform) / 16_000 < 8.25


def test_a_header_that_counts_its_own_frame_too_costs_nothing():
    whole = bytearray(mp3())
    place = whole.find(b"Xing") + 8
    struct.pack_into(">I", whole, place, struct.unpack_from(">I", whole, place)[0] + 1)
    assert 4.0 < len(decode(bytes(whole), name="x").waveform) / 16_000 < 4.1


def test_what_was_cut_or_damaged_is_refused():
    whole = mp3()
    frames = streamed(whole)
    with pytest.raises(AudioError, match=r"x: truncated: cut inside MP3 frame \d+"):
        decode(frames[:-10], name="x")
    place = 0
    for _ in range(20):
        place += _frame(frames, place).size
    with pytest.raises(AudioError, match=f"x: damaged: no MP3 frame at byte {place}, but more of them after it"):
        decode(frames[:place] + b"not a frame" + frames[place:], name="x")
    cut = whole[: -len(whole) // 3]
    with pytest.raises(AudioError, match=r"x: truncated: \d+ of \d+ MP3 frames"):
        decode(cut, name="x")


@given(st.binary(max_size=2000))
@example(b"\xff\xfb")
@example(b"ID3")
@example(ID3 + b"fLaC" + bytes(10))
@example(b"\xff\xfb\x90\x00" + bytes(413))
def test_other_bytes_are_left_alone_or_refused(data):
    try:
        instead = to_decode(data)
    except MpegError:
        return
    assert instead is None or len(instead) > 0
