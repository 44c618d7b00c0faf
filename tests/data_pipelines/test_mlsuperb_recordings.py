"""ML-SUPERB's recordings: heard as they are, and every one that cannot be is found before anything is trained."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_pipelines.audio import AudioError
from data_pipelines.mlsuperb.layout import read_split
from data_pipelines.mlsuperb.recordings import examine, read_recording

NOISE = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)


def test_channels_are_averaged_and_rates_resampled(tmp_path):
    tone = np.sin(2 * np.pi * 440 * np.arange(8_000) / 8_000)
    soundfile.write(tmp_path / "a.wav", np.stack([tone, np.zeros(8_000)], axis=1), 8_000)
    read = read_recording(tmp_path / "a.wav")
    assert read.shape == (16_000,) and np.abs(read[1_000:-1_000]).max() == pytest.approx(0.5, abs=0.01)
    with pytest.raises(AudioError, match=r"nothing\.wav"):
        read_recording(tmp_path / "nothing.wav")
    (tmp_path / "b.wav").write_bytes(b"no audio")
    with pytest.raises(AudioError, match=r"b\.wav"):
        read_recording(Path(tmp_path / "b.wav"))


def test_silence_and_overdriven_floats_are_heard_as_they_are(tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(8_000), 8_000)
    assert not read_recording(tmp_path / "silence.wav").any()
    soundfile.write(tmp_path / "loud.wav", 1e3 * NOISE, 16_000, "FLOAT")
    np.testing.assert_array_equal(read_recording(tmp_path / "loud.wav"), np.float32(1e3) * NOISE)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2_000] = bytes(2_000)
    path.write_bytes(bytes(data))


def infinite(path: Path) -> None:
    soundfile.write(path, np.where(np.arange(16_000) == 8_000, np.nan, NOISE), 16_000, "FLOAT")


@pytest.mark.parametrize(
    ("spoil", "reason", "raised"),
    [
        (Path.unlink, "recording missing", "does not exist"),
        (lambda path: path.write_bytes(b""), "recording empty", "empty file"),
        (lambda path: soundfile.write(path, NOISE[:0], 16_000), "recording empty", "zero length"),
        (lambda path: path.write_bytes(b"no audio"), "recording cannot be read", "unreadable"),
        (lambda path: cut(path, 20_000), "recording truncated", "truncated"),
        (infinite, "recording has NaN or infinite samples", "not finite"),
        (lambda path: (soundfile.write(path, NOISE, 16_000, format="FLAC"), damaged(path)), "", ""),
        (lambda path: (soundfile.write(path, NOISE, 16_000, format="FLAC"), cut(path, 9_000)), "", ""),
    ],
)
def test_what_cannot_be_read_is_left_out_of_every_part(tmp_path, spoil, reason, raised):
    folder = tmp_path / "mls" / "eng"
    (folder / "wav").mkdir(parents=True)
    for part in ("train", "dev", "test"):
        (folder / f"transcript_10min_{part}.txt").write_text("mls_eng_000001 x a\nmls_eng_000002 x b\n")
    paths = [folder / "wav" / f"mls_eng_00000{number}.wav" for number in (1, 2)]
    for path in paths:
        soundfile.write(path, NOISE, 16_000)
    assert not read_split(tmp_path, "test", duration="10min").left_out
    spoil(paths[0])
    with pytest.raises(AudioError, match=rf"mls_eng_000001\.wav: .*{raised}"):
        read_recording(paths[0])
    for part in ("train", "dev", "test"):
        split = read_split(tmp_path, part, duration="10min")
        assert [each.path for each in split.utterances] == paths[1:]
        assert [each.place for each in split.left_out] == [f"{folder / f'transcript_10min_{part}.txt'}:1"]
        assert reason in split.left_out[0].reason


def test_a_wav_that_was_written_into_a_pipe_is_whole(tmp_path):
    """SoX writes 0x7ffff000 where it cannot know the length."""
    soundfile.write(tmp_path / "a.wav", NOISE, 16_000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    place = data.index(b"data") + 4
    data[place : place + 4] = (0x7FFFF000).to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(bytes(data))
    assert examine(tmp_path / "a.wav") == (1.0, None) and len(read_recording(tmp_path / "a.wav")) == 16_000
