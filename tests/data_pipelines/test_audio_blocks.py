import numpy as np
import pytest
import soundfile

from data_pipelines import audio_blocks
from data_pipelines.audio import AudioError, decode
from data_pipelines.audio_blocks import announced_seconds, read_blocks

FORMATS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "opus": ("OGG", "OPUS"), "ogg": ("OGG", "VORBIS")}
FORMATS |= {
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_16"),
    "au": ("AU", "PCM_16"),
    "w64": ("W64", "PCM_16"),
}


def write(folder, *, seconds=3.0, kind="wav", rate=16_000, channels=1, subtype=None, name="clip"):
    samples = round(seconds * rate)
    rng = np.random.default_rng(0)
    waveform = 0.2 * np.sin(2 * np.pi * 330 * np.arange(samples) / rate)[:, None] + 0.05 * rng.normal(
        size=(samples, channels)
    )
    path = folder / f"{name}.{kind}"
    container, usual = FORMATS[kind]
    soundfile.write(path, waveform, rate, format=container, subtype=subtype or usual)
    return path


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_joined_are_the_decoded_file_to_the_bit(kind, rate, channels, tmp_path, monkeypatch):
    rate = 24_000 if (kind, rate) == ("opus", 44_100) else rate
    path = write(tmp_path, kind=kind, rate=rate, channels=channels)
    whole = decode(path, name="x").waveform
    for values in (5_001, audio_blocks._VALUES):
        monkeypatch.setattr(audio_blocks, "_VALUES", values)
        blocks = list(read_blocks(path))
        assert all(block.dtype == np.float32 and block.ndim == 1 and len(block) for block in blocks)
        np.testing.assert_array_equal(np.concatenate(blocks), whole)
        assert (len(blocks) > 3) == (values == 5_001)


def test_opus_is_right_at_its_last_page(tmp_path, monkeypatch):
    """Where seeking to the place that one is at, as soundfile does after each block, decodes other samples."""
    path = tmp_path / "a.opus"
    rng = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", 48_000, 1, format="OGG", subtype="OPUS") as sound:
        sound.write(0.1 * rng.normal(size=48_000 * 4 + 77))
    expected, _ = soundfile.read(path, dtype="float32")
    for frames in (960, 4_096, 48_000):
        monkeypatch.setattr(audio_blocks, "_VALUES", frames)
        monkeypatch.setattr(audio_blocks, "SAMPLE_RATE", 48_000)
        np.testing.assert_array_equal(np.concatenate(list(read_blocks(path))), expected)


def test_silence_is_passed_on(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(5_000), 16_000)
    assert np.concatenate(list(read_blocks(tmp_path / "a.wav"))).tolist() == [0.0] * 5_000


def _absent(path):
    path.unlink()


def _folder(path):
    path.unlink()
    path.mkdir()


def _nan(path):
    soundfile.write(path, np.array([0.1] * 800 + [np.nan]), 16_000, subtype="FLOAT")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_absent, "does not exist"),
        (_folder, "is not a file"),
        (lambda path: path.write_bytes(b""), "empty file"),
        (lambda path: path.write_bytes(b"hello" * 100), "unreadable"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "truncated"),
        (lambda path: path.write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100)), "MP4 or M4A"),
        (lambda path: soundfile.write(path, np.zeros(0), 16_000), "zero length"),
        (_nan, "not finite"),
    ],
)
def test_what_cannot_be_used_is_named(damage, reason, tmp_path):
    path = write(tmp_path)
    damage(path)
    with pytest.raises(AudioError, match=reason) as error:
        list(read_blocks(path))
    assert str(path) in str(error.value) and error.value.reason.startswith(reason.split()[0])
    assert announced_seconds(path) < 3.1


def test_the_place_of_the_first_bad_sample_is_named(tmp_path):
    """In the second of two blocks (a block of stereo has 131,072 frames: 16.384 s at 8 kHz)."""
    waveform = np.zeros((150_000, 2))
    waveform[140_000, 1] = waveform[149_000, 0] = np.inf
    soundfile.write(tmp_path / "a.wav", waveform, 8_000, subtype="FLOAT")
    with pytest.raises(AudioError, match="not finite: the first NaN or infinite sample is at 17.500 s"):
        list(read_blocks(tmp_path / "a.wav"))


def test_a_cut_flac_is_found_at_its_end(tmp_path):
    path = write(tmp_path, kind="flac")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match="truncated|unreadable"):
        list(read_blocks(path))


def test_length_by_the_header(tmp_path):
    assert announced_seconds(write(tmp_path, kind="mp3", seconds=2.0, rate=44_100)) == pytest.approx(2.0, abs=0.1)
    assert announced_seconds(tmp_path / "nothing.wav") == 0.0
