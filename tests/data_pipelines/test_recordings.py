"""Noise and room responses from folders: any rate, any length, and what is wrong is named."""

import pickle

import numpy as np
import pytest
import soundfile

from data_pipelines.recordings import NoiseFolder, ResponseFolder
from data_pipelines.sources import SourceError


@pytest.fixture
def noises(tmp_path):
    folder = tmp_path / "noise"
    (folder / "deep").mkdir(parents=True)
    ramp = (np.arange(32000) / 64000).astype(np.float32)
    soundfile.write(folder / "long.wav", ramp, 16000, subtype="FLOAT")
    soundfile.write(folder / "deep" / "short.flac", np.linspace(-0.9, -0.1, 1000), 16000)
    time = np.arange(48000 * 2) / 48000
    soundfile.write(folder / "fast.wav", np.stack([np.sin(2 * np.pi * 440 * time)] * 2, 1), 48000, subtype="FLOAT")
    (folder / "README.txt").write_text("not audio")
    return folder


def test_noise_is_cut_repeated_and_resampled(noises):
    folder = NoiseFolder(noises)
    assert len(folder) == 3
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(60):
        noise = folder.read(rng, 4000)
        assert noise.shape == (4000,) and noise.dtype == np.float32 and np.isfinite(noise).all()
        if noise.max() < 0:
            kinds.add("short")
            np.testing.assert_array_equal(noise[:1000], noise[1000:2000])
        elif noise.min() < -0.9:
            kinds.add("fast")
            spectrum = np.abs(np.fft.rfft(noise * np.hanning(4000)))
            assert abs(np.argmax(spectrum) * 4 - 440) <= 4
        else:
            kinds.add("long")
            np.testing.assert_allclose(np.diff(noise), 1 / 64000, atol=1e-6)
    assert kinds == {"short", "fast", "long"}


def test_noise_is_a_function_of_the_rng_and_survives_pickling(noises):
    folder = NoiseFolder(noises)
    again = pickle.loads(pickle.dumps(folder))
    for seed in range(5):
        first = folder.read(np.random.default_rng(seed), 5000)
        np.testing.assert_array_equal(first, again.read(np.random.default_rng(seed), 5000))


def test_every_start_of_a_noise_is_reached(tmp_path):
    soundfile.write(tmp_path / "n.wav", np.arange(12) / 64, 16000, subtype="FLOAT")
    folder = NoiseFolder(tmp_path)
    rng = np.random.default_rng(0)
    starts = {round(float(folder.read(rng, 8)[0]) * 64) for _ in range(200)}
    assert starts == set(range(5))


def test_bad_noise_folders_are_refused(tmp_path, noises):
    with pytest.raises(SourceError, match="does not exist"):
        NoiseFolder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="has no audio files"):
        NoiseFolder(tmp_path / "empty")
    (noises / "bad.wav").write_bytes(b"garbage" * 50)
    soundfile.write(noises / "void.wav", np.zeros(0), 16000)
    with pytest.raises(SourceError, match="2 of 5 noise files cannot be read.*bad.wav.*void.wav"):
        NoiseFolder(noises)


def test_a_noise_file_that_goes_away_is_named(noises):
    folder = NoiseFolder(noises)
    for path in noises.rglob("*.*"):
        path.unlink()
    with pytest.raises(SourceError, match=r"(wav|flac) cannot be read"):
        folder.read(np.random.default_rng(0), 100)


def test_a_clip_is_the_whole_file_or_a_minute_of_it(tmp_path):
    soundfile.write(tmp_path / "n.wav", np.arange(9000) / 9000, 8000, subtype="FLOAT")
    assert NoiseFolder(tmp_path).clip(np.random.default_rng(0)).shape == (18_000,)
    (tmp_path / "n.wav").unlink()
    long = (np.arange(61 * 16_000) / (61 * 16_000)).astype(np.float32)
    soundfile.write(tmp_path / "long.wav", long, 16_000, subtype="FLOAT")
    clips = [NoiseFolder(tmp_path).clip(np.random.default_rng(seed)) for seed in range(4)]
    assert {clip.shape for clip in clips} == {(960_000,)}
    assert len({float(clip[0]) for clip in clips}) == 4


def test_not_a_number_is_named(tmp_path):
    soundfile.write(tmp_path / "n.wav", np.array([0.1, np.nan, 0.2]), 16_000, subtype="FLOAT")
    with pytest.raises(SourceError, match=r"n\.wav has no usable samples"):
        NoiseFolder(tmp_path).read(np.random.default_rng(0), 3)


def test_a_damaged_middle_is_named(tmp_path):
    soundfile.write(tmp_path / "n.flac", np.random.default_rng(0).normal(size=160_000) * 0.1, 16_000)
    data = bytearray((tmp_path / "n.flac").read_bytes())
    data[len(data) // 3 : len(data) // 3 + 40_000] = bytes(40_000)
    (tmp_path / "n.flac").write_bytes(data)
    folder = NoiseFolder(tmp_path)
    with pytest.raises(SourceError, match=r"n\.flac"):
        folder.read(np.random.default_rng(0), 160_000)


# --- room responses ---


def test_a_response_is_one_channel_at_16_khz(tmp_path):
    channels = np.zeros((4800, 2))
    channels[480, 0], channels[960, 1] = 1.0, -1.0
    soundfile.write(tmp_path / "room.wav", channels, 48_000, subtype="FLOAT")
    folder = ResponseFolder(tmp_path)
    assert len(folder) == 1
    peaks = set()
    for seed in range(12):
        response = folder.read(np.random.default_rng(seed))
        assert response.shape == (1600,) and response.dtype == np.float32
        at = int(np.argmax(np.abs(response)))
        peaks.add((at, bool(response[at] > 0)))
    assert peaks == {(160, True), (320, False)}


def test_bad_response_folders_are_refused(tmp_path):
    with pytest.raises(SourceError, match="room response folder .* does not exist"):
        ResponseFolder(tmp_path / "nowhere")
    soundfile.write(tmp_path / "song.wav", np.ones(31 * 8000) * 0.1, 8000)
    with pytest.raises(SourceError, match=r"1 of 1 files are over 30 s long.*song\.wav"):
        ResponseFolder(tmp_path)
    soundfile.write(tmp_path / "song.wav", np.zeros(100), 8000)
    with pytest.raises(SourceError, match=r"song\.wav: channel 0 is silent"):
        ResponseFolder(tmp_path).read(np.random.default_rng(0))
