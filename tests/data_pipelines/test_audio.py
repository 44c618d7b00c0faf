import io
import pickle
import struct

import librosa
import numpy as np
import pytest
import scipy.signal
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from data_pipelines.audio import AudioError, decode, decode_crop, encode_flac

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "opus": ("OGG", "OPUS"),
    "vorbis": ("OGG", "VORBIS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_16"),
    "au": ("AU", "PCM_16"),
    "w64": ("W64", "PCM_16"),
    "sph": ("NIST", "PCM_16"),
}


def voice(samples, rate=16000, seed=0):
    time = np.arange(samples) / rate
    noise = np.random.default_rng(seed).normal(size=samples) * 0.02
    return (0.3 * np.sin(2 * np.pi * 220 * time) + 0.1 * np.sin(2 * np.pi * 1760 * time) + noise).astype(np.float32)


def encoded(waveform, kind="wav", rate=16000, subtype=None):
    with io.BytesIO() as sink:
        container, usual = FORMATS[kind]
        soundfile.write(sink, waveform, rate, format=container, subtype=subtype or usual)
        return sink.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_decodes_to_its_length(kind):
    sound = decode(encoded(voice(24000), kind), name="x")
    assert sound.waveform.dtype == np.float32 and sound.waveform.shape == (24000,)
    assert (sound.source_rate, sound.source_frames, sound.source_channels) == (16000, 24000, 1)


def test_pcm_is_exact_and_paths_are_as_good_as_bytes(tmp_path):
    int16 = (voice(16000) * 20000).astype(np.int16)
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(int16))
    np.testing.assert_array_equal(decode(path, name="a").waveform, int16 / np.float32(32768))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampling_agrees_with_scipy_and_librosa(rate):
    source = voice(rate, rate)
    ours = decode(encoded(source, subtype="FLOAT", rate=rate), name="x").waveform
    assert abs(len(ours) - 16000) <= 1
    theirs = librosa.resample(source, orig_sr=rate, target_sr=16000, res_type="soxr_hq")
    np.testing.assert_allclose(ours[:15990], theirs[:15990], atol=1e-5)
    common = np.gcd(rate, 16000)
    scipys = scipy.signal.resample_poly(source.astype(np.float64), 16000 // common, rate // common)
    middle = slice(2000, 14000)
    # Below the lower of the two band edges both filters pass everything; noise above it differs by filter.
    low = scipy.signal.butter(8, 2500, fs=16000, output="sos")
    difference = (
        scipy.signal.sosfiltfilt(low, ours[:16000])[middle] - scipy.signal.sosfiltfilt(low, scipys[:16000])[middle]
    )
    assert np.abs(difference).max() < 2e-3


def test_channels_are_averaged():
    left, right = voice(8000, seed=1), voice(8000, seed=2)
    sound = decode(encoded(np.stack([left, right], 1), subtype="FLOAT"), name="x")
    assert sound.source_channels == 2
    np.testing.assert_allclose(sound.waveform, (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_truncated_files_are_refused(kind, share):
    whole = encoded(voice(48000), kind)
    with pytest.raises(AudioError, match="^clip/a: (truncated|unreadable)"):
        decode(whole[: int(len(whole) * share)], name="clip/a")


def test_ogg_cut_between_pages_is_refused():
    whole = encoded(voice(16000 * 8), "opus")
    last = whole.rindex(b"OggS")
    with pytest.raises(AudioError, match="without an end-of-stream page"):
        decode(whole[:last], name="x")


@pytest.mark.parametrize("kind", ["opus", "vorbis"])
def test_ogg_with_a_second_stream_after_the_first_is_refused(kind):
    first = encoded(voice(16000), kind)
    with pytest.raises(AudioError, match=f"a second Ogg stream at byte {len(first)}, which would not be decoded"):
        decode(first + encoded(voice(32000), kind), name="x")


def test_ogg_with_a_page_missing_or_altered_is_refused():
    whole = encoded(voice(16000 * 8), "opus")
    starts = [k for k in range(len(whole)) if whole[k : k + 4] == b"OggS"]
    with pytest.raises(AudioError, match="Ogg page 4 follows page 2"):
        decode(whole[: starts[3]] + whole[starts[4] :], name="x")
    altered = bytearray(whole)
    altered[starts[3] + 100] ^= 1
    with pytest.raises(AudioError, match="checksum of Ogg page 3"):
        decode(bytes(altered), name="x")


def test_flac_with_a_flipped_bit_is_refused():
    altered = bytearray(encoded(voice(48000), "flac"))
    altered[len(altered) // 2] ^= 0x55
    with pytest.raises(AudioError, match="^x: "):
        decode(bytes(altered), name="x")


def test_flac_that_announces_more_samples_than_it_has_is_refused():
    whole = bytearray(encoded(voice(16000), "flac"))
    struct.pack_into(">I", whole, 22, 999_999)  # the low 32 bits of STREAMINFO's total samples
    with pytest.raises(AudioError, match="truncated: 16000 of 999999|unreadable"):
        decode(bytes(whole), name="x")


def test_streamed_wav_of_unknown_length_is_read():
    whole = bytearray(encoded(voice(16000)))
    place = whole.index(b"data")
    whole[4:8] = whole[place + 4 : place + 8] = b"\xff" * 4
    assert len(decode(bytes(whole), name="x").waveform) == 16000


def test_wav_chunks_before_and_after_the_data_do_not_confuse():
    whole = encoded(voice(16000))
    place = whole.index(b"data")
    more = (
        whole[:place]
        + b"junk"
        + struct.pack("<I", 3)
        + b"abc\0"
        + whole[place:]
        + b"LIST"
        + struct.pack("<I", 4)
        + b"INFO"
    )
    more = more[:4] + struct.pack("<I", len(more) - 8) + more[8:]
    assert len(decode(more, name="x").waveform) == 16000


def test_rf64_is_read_and_its_truncation_seen():
    with io.BytesIO() as sink:
        soundfile.write(sink, voice(16000), 16000, format="RF64", subtype="PCM_16")
        whole = sink.getvalue()
    assert len(decode(whole, name="x").waveform) == 16000
    with pytest.raises(AudioError, match="truncated"):
        decode(whole[:20000], name="x")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"garbage " * 200, "unreadable"),
        (b"RIFF\xff\xff\xff\xffWAVE", "truncated"),
        (b"OggS", "truncated"),
        (b"fLaC" + bytes(100), "unreadable"),
        (encoded(np.zeros(0, np.float32)), "zero length"),
        (encoded(np.zeros(16000, np.float32)), "silent or constant"),
        (encoded(np.full(16000, 0.25, np.float32)), "silent or constant"),
    ],
)
def test_bad_files_are_refused_by_name_and_reason(data, reason):
    with pytest.raises(AudioError, match=f"^the/clip.wav: {reason}") as caught:
        decode(data, name="the/clip.wav")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.name, again.reason, again.samples) == ("the/clip.wav", caught.value.reason, caught.value.samples)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_sample_that_is_not_finite_is_refused(bad):
    waveform = voice(16000)
    waveform[777] = bad
    with pytest.raises(AudioError, match="not finite") as caught:
        decode(encoded(waveform, subtype="FLOAT"), name="x")
    assert caught.value.samples == 16000


def test_silence_is_judged_at_minus_80_db():
    assert decode(encoded(voice(16000) * 1e-3, subtype="FLOAT"), name="x").waveform.any()
    with pytest.raises(AudioError, match="silent") as caught:
        decode(encoded(voice(16000) * 1e-4, subtype="FLOAT"), name="x")
    assert caught.value.samples == 16000


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_floats_of_another_scale_are_refused_and_small_overshoots_are_not(subtype):
    waveform = voice(16000)
    assert np.abs(waveform).max() < 0.6
    with pytest.raises(AudioError, match=r"overdriven: peak 1\.\d+e\+04, floats must lie in \[-1, 1\]") as caught:
        decode(encoded(waveform * 32768, subtype=subtype), name="x")
    assert caught.value.samples == 16000
    for beyond, factor, fits in ((16, 2.0, True), (17, 2.0, False), (1, 3.99, True), (1, 4.01, False)):
        spoilt = waveform.copy()
        spoilt[100 : 100 + beyond] = -factor
        if fits:
            assert decode(encoded(spoilt, subtype=subtype), name="x").waveform.min() < -1
        else:
            with pytest.raises(AudioError, match="overdriven"):
                decode(encoded(spoilt, subtype=subtype), name="x")


def test_a_file_beyond_the_longest_is_refused(monkeypatch):
    monkeypatch.setattr("data_pipelines.audio.MAX_SECONDS", 2.0)
    assert len(decode(encoded(voice(32000)), name="x").waveform) == 32000
    with pytest.raises(AudioError, match="longer than 2 s"):
        decode(encoded(voice(32001)), name="x")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "no.wav", tmp_path):
        with pytest.raises(AudioError, match="cannot be read"):
            decode(path, name="x")


@settings(max_examples=30, deadline=None)
@given(arrays.arrays(np.int16, st.integers(1, 3000), elements=st.integers(-32768, 32767)))
def test_flac_keeps_int16_exactly(int16):
    flac = encode_flac(int16)
    np.testing.assert_array_equal(decode_crop(flac) * 32768, int16)
    np.testing.assert_array_equal(soundfile.read(io.BytesIO(flac), dtype="int16")[0], int16)
    assert encode_flac(int16 / np.float32(32768)) == flac


def test_encoding_clips_rather_than_wraps():
    loud = np.array([2.0, -2.0, 1.0, -1.0, 0.0], np.float32)
    np.testing.assert_array_equal(decode_crop(encode_flac(loud)) * 32768, [32767, -32768, 32767, -32768, 0])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_crop_is_the_slice_of_the_whole(data):
    total = 50_000
    whole = (voice(total) * 32767).astype(np.int16)
    flac = encode_flac(whole)
    start = data.draw(st.integers(0, total))
    samples = data.draw(st.integers(0, total - start))
    np.testing.assert_array_equal(
        decode_crop(flac, start=start, samples=samples) * 32768, whole[start : start + samples]
    )


@pytest.mark.parametrize(("start", "samples"), [(-1, 10), (0, 16001), (16000, 1), (15999, 2), (20000, None), (0, -1)])
def test_a_crop_outside_of_the_utterance_is_refused(start, samples):
    with pytest.raises(AudioError, match="crop"):
        decode_crop(encode_flac(voice(16000)), start=start, samples=samples)


def test_cropping_refuses_what_is_not_16_khz_mono_flac():
    with pytest.raises(AudioError, match="8000 Hz"):
        decode_crop(encoded(voice(8000), "flac", rate=8000), start=0, samples=10)
    with pytest.raises(AudioError, match="2 channels"):
        decode_crop(encoded(np.stack([voice(8000)] * 2, 1), "flac"), start=0, samples=10)
    with pytest.raises(AudioError, match="unreadable"):
        decode_crop(b"nothing", start=0, samples=10)
    whole = encode_flac(voice(64000))
    with pytest.raises(AudioError, match="unreadable|truncated"):
        decode_crop(whole[: len(whole) // 2], start=0, samples=64000)


@pytest.mark.parametrize("subtype", ["ULAW", "ALAW", "PCM_16"])
def test_sphere_is_decoded_whole_or_refused(subtype):
    """libsndfile hands over what is left of a cut file; of one that shorten compressed it says only "unimplemented"."""
    data = encoded(voice(8000, 8000), "sph", rate=8000, subtype=subtype)
    assert decode(data, name="x").source_frames == 8000
    with pytest.raises(AudioError, match=f"truncated: {len(data) - 100} of {len(data)} bytes"):
        decode(data[:-100], name="x")
    shortened = data.replace(b"sample_coding -s", b"sample_coding -s26 pcm,embedded-shorten-v2.00\nx -s", 1)
    with pytest.raises(AudioError, match="sph2pipe -f wav"):
        decode(shortened, name="x")
