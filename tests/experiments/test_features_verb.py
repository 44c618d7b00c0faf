"""Features of audio files: the function, and the verb as it is shipped."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile

from data_pipelines.audio import AudioError, decode
from experiments.features import FeatureModel, FeaturesError, load_model, name_files, write_features
from tests.wavlab_jax import tiny
from wavlab_jax.convert import ConvertError, export_huggingface, from_encoder
from wavlab_jax.convert.layouts import write_checkpoint
from wavlab_jax.encoder import encode, make_encoder
from wavlab_jax.streaming import StreamError, WindowConfig

pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parents[2]
SMALL = WindowConfig(window=2.0, context=0.5)


def voice(seconds, *, rate=16_000, channels=1, seed=0):
    rng = np.random.default_rng(seed)
    tone = 0.2 * np.sin(2 * np.pi * 200 * np.arange(round(seconds * rate)) / rate)[:, None]
    return tone + 0.05 * rng.normal(size=(len(tone), channels))


@pytest.fixture(scope="module")
def model():
    return FeatureModel(make_encoder(jax.random.key(0), tiny.encoder(relative_bias=True)))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The same model, exported."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    export_huggingface(model.encoder, folder)
    return folder


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """Files of one name, rates, channels and lengths, and some that no features come of."""
    audio = tmp_path_factory.mktemp("audio")
    for name, seconds, rate, channels in (
        ("a/clip.wav", 1.3, 16_000, 1),
        ("b/clip.wav", 1.3, 44_100, 2),
        ("b/long.flac", 5.01, 22_050, 2),
        ("b/short.ogg", 1.3, 8_000, 1),
        ("long.mp3", 5.01, 48_000, 1),
    ):
        path = audio / name
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, voice(seconds, rate=rate, channels=channels, seed=len(name)), rate)
    return audio


@pytest.fixture
def damaged(audio, tmp_path):
    """The same, and what is wrong with three more of them by name."""
    copied = tmp_path / "damaged"
    shutil.copytree(audio, copied)
    soundfile.write(copied / "blip.wav", voice(399 / 16_000), 16_000)
    (copied / "empty.wav").touch()
    (copied / "a" / "noise.wav").write_bytes(b"nothing of the kind")
    return copied, {"blip.wav": "too short: 399 samples", "empty.wav": "empty file", "a/noise.wav": "unreadable"}


@jax.jit
def hidden_states(encoder, waveform):
    return encode(encoder, waveform[None]).hidden


def expected(model, path):
    """[layers + 1, frames, width] of the file in one piece, by `encode` alone."""
    return np.stack(hidden_states(model.encoder, decode(path, name="x").waveform))[:, 0]


def test_every_file_has_its_array(model, audio, tmp_path):
    out = tmp_path / "made" / "x.npz"
    assert write_features(model, [audio], out, windows=WindowConfig(window=0)) == 5
    names = ["a/clip.wav", "b/clip.wav", "b/long.flac", "b/short.ogg", "long.mp3"]
    with np.load(out) as found:
        assert sorted(found.files) == names
        for name in names:
            assert found[name].dtype == np.float32
            np.testing.assert_allclose(found[name], expected(model, audio / name), atol=1e-5)


def test_layers_precision_and_windows(model, audio, tmp_path):
    files = [audio / "b" / "long.flac", audio / "b" / "clip.wav"]
    write_features(model, files, tmp_path / "x.npz", layers="2,mean,0", dtype="float16", windows=SMALL)
    with np.load(tmp_path / "x.npz") as found:
        for path in files:
            hidden = expected(model, path)
            wanted = np.stack([hidden[2], hidden.mean(axis=0), hidden[0]])
            assert found[path.name].shape == wanted.shape and found[path.name].dtype == np.float16
            np.testing.assert_allclose(found[path.name][2], wanted[2], atol=4e-3)
            np.testing.assert_allclose(found[path.name], wanted, atol=0.1 if path.suffix == ".flac" else 4e-3)


def test_many_short_files_share_passes(model, tmp_path):
    for i in range(33):
        soundfile.write(tmp_path / f"{i}.wav", voice(0.5 + 0.04 * i, seed=i), 16_000)
    assert write_features(model, [tmp_path], tmp_path / "x.npz", layers="2") == 33
    with np.load(tmp_path / "x.npz") as found:
        for i in (0, 32):
            path = tmp_path / f"{i}.wav"
            np.testing.assert_allclose(found[path.name][0], expected(model, path)[2], atol=1e-5)


def test_in_memory_it_is_the_same(model, folder, audio):
    """From a file or a waveform, in one piece or in windows; the model itself or as it was exported."""
    path = audio / "b" / "long.flac"
    waveform = decode(path, name="x").waveform
    one = model.features(path, layers="all")
    np.testing.assert_allclose(one, expected(model, path), atol=1e-5)
    np.testing.assert_array_equal(model.features(waveform.astype(np.float64)), one)
    windows = model.features(str(path), windows=SMALL)
    assert windows.shape == one.shape
    np.testing.assert_allclose(windows[0], one[0], atol=1e-5)
    np.testing.assert_allclose(load_model(folder).features(waveform, windows=SMALL), windows, atol=1e-5)


def test_files_that_cannot_be_used_do_not_stop_the_others(model, damaged, tmp_path):
    folder, reasons = damaged
    out = tmp_path / "x.npz"
    with pytest.raises(FeaturesError, match="lacks 3 of 8 files") as error:
        write_features(model, [folder], out, windows=SMALL, layers="1")
    for name, reason in reasons.items():
        assert f"{folder / name}: {reason}" in str(error.value)
    with np.load(out) as found:
        assert len(found.files) == 5 and not {*found.files} & {*reasons}


def test_nothing_is_written_where_nothing_can_be(model, damaged, tmp_path):
    folder, reasons = damaged
    out = tmp_path / "x.npz"
    with pytest.raises(FeaturesError, match="nothing written"):
        write_features(model, [folder / name for name in reasons], out)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FeaturesError, match="holds no audio"):
        write_features(model, [folder, tmp_path / "nothing"], out)
    with pytest.raises(StreamError, match="0 to 2"):
        write_features(model, [folder], out, layers="3")
    assert not out.exists()
    out.write_text("precious")
    with pytest.raises(FeaturesError, match="exists already"):
        write_features(model, [folder], out)
    assert out.read_text() == "precious" and not list(tmp_path.glob(".partial*"))


def test_hidden_states_that_float16_cannot_hold(model, audio, tmp_path):
    loud = make_encoder(jax.random.key(0), tiny.encoder(pre_norm=True))
    loud.layers.contract.bias[...] = loud.layers.contract.bias[...] + 1e5
    with pytest.raises(FeaturesError, match="float16 cannot hold"):
        write_features(FeatureModel(loud), [audio / "a"], tmp_path / "x.npz", layers="1", dtype="float16")
    assert write_features(FeatureModel(loud), [audio / "a"], tmp_path / "x.npz", layers="1") == 1


def test_names_do_not_collide(audio):
    a, b, long = audio / "a" / "clip.wav", audio / "b" / "clip.wav", audio / "long.mp3"
    assert name_files([a]) == {"clip.wav": a}
    assert name_files([a, b, a]) == {"a/clip.wav": a, "b/clip.wav": b}
    assert name_files([b.parent, long, a]) == {
        f"{path.relative_to(audio)}": path for path in (*sorted(b.parent.iterdir()), long, a)
    }
    assert list(name_files([audio / "b" / ".." / "a" / "clip.wav", b])) == ["a/clip.wav", "b/clip.wav"]
    with pytest.raises(FeaturesError, match="no audio files"):
        name_files([])


def test_waveforms_that_are_none(model):
    for waveform in (np.zeros((2, 16_000)), np.zeros(16_000, np.int16), np.full(16_000, np.nan)):
        with pytest.raises(StreamError, match="waveform"):
            model.features(waveform)
    with pytest.raises(StreamError, match="too short: 0 samples"):
        model.features(np.zeros(0, np.float32))
    with pytest.raises(AudioError, match="does not exist"):
        model.features("nothing.wav")


def test_models_that_are_none(tmp_path):
    with pytest.raises(FeaturesError, match="wavlab_mk"):
        load_model("wavlab_km")
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_model(tmp_path)
    with pytest.raises(RuntimeError, match="experiments train wavlab_mk"):
        load_model("wavlab_mk", workdir=tmp_path)


def test_a_file_that_does_not_say_its_architecture_is_given_one(model, audio, tmp_path):
    write_checkpoint(from_encoder(model.encoder), tmp_path / "bare", layout="torchaudio")
    (tmp_path / "bare" / "torchaudio.json").unlink()
    file = tmp_path / "bare" / "model.pt"
    with pytest.raises(ConvertError, match="pass architecture="):
        load_model(file)
    found = load_model(file, architecture=model.encoder.config).features(audio / "a" / "clip.wav")
    np.testing.assert_allclose(found, expected(model, audio / "a" / "clip.wav"), atol=1e-5)
    asked = load_model(file, architecture=model.encoder.config, normalize_waveform=True)
    assert asked.encoder.config.normalize_waveform and "that was asked for" in asked.notes[-1]
    with pytest.raises(FeaturesError, match="wavlab_mk is a stage, which knows its architecture"):
        load_model("wavlab_mk", architecture=model.encoder.config)


def launch(*arguments):
    command = [sys.executable, "-m", "experiments", "features", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)


def test_the_verb(folder, damaged, model, tmp_path):
    files, reasons = damaged
    windows = ("--layers", "0,mean", "--window", "2", "--context", "0.5")
    found = launch(folder, files / "a" / "clip.wav", files / "b", "--out", tmp_path / "x.npz", *windows)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == f"{tmp_path / 'x.npz'}: 4 files" and "audio-h" in found.stderr
    with np.load(tmp_path / "x.npz") as arrays:
        wanted = expected(model, files / "b" / "clip.wav")
        np.testing.assert_allclose(arrays["b/clip.wav"], np.stack([wanted[0], wanted.mean(axis=0)]), atol=1e-5)

    found = launch(folder, files, "--out", tmp_path / "y.npz", *windows)
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert all(f"{files / name}: {reason}" in found.stderr for name, reason in reasons.items())
    assert len(np.load(tmp_path / "y.npz").files) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing", "x.wav", "--out", "{out}"), "neither a file or folder nor a stage"),
        (("{model}", "{audio}", "--out", "{out}", "--layers", "7"), "no layer is called '7': this model has 0 to 2"),
    ],
)
def test_mistakes_are_answered_without_a_traceback(answer, arguments, message, folder, audio, tmp_path):
    places = {"model": folder, "audio": audio / "a", "out": tmp_path / "x.npz"}
    found = answer("features", *(argument.format(**places) for argument in arguments))
    assert found.returncode == 1 and message in found.stderr and "Traceback" not in found.stderr
    assert not list(tmp_path.iterdir())


MEASURE = """
import sys, threading
from pathlib import Path
from experiments.__main__ import main

def peak(folder, path, out):
    found, stop = [], threading.Event()
    def watch():
        while not stop.wait(0.005):
            found.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4 / 1024)
    watcher = threading.Thread(target=watch)
    watcher.start()
    sys.argv = ["features", "features", folder, path, "--out", out, "--layers", "2", "--window", "10", "--context", "1"]
    status = main()
    stop.set()
    watcher.join()
    assert status == 0
    return max(found)

folder, short, long = sys.argv[1:]
peak(folder, short, short + ".first.npz")  # compiles, which needs more memory than all the rest
print(*(peak(folder, path, path + ".npz") for path in (short, long)))
"""


def grown(folder, tmp_path, *, minutes, rate):
    """MiB more for a recording of so many minutes than for one of two, at the peak."""
    for length in (2, minutes):
        with soundfile.SoundFile(tmp_path / f"{length}.wav", "w", rate, 2, "PCM_16") as sound:
            for part in range(length):
                sound.write(voice(60, rate=rate, channels=2, seed=part))
    command = [sys.executable, "-c", MEASURE, folder, tmp_path / "2.wav", tmp_path / f"{minutes}.wav"]
    # every array of a megabyte is then mapped on its own, and shows: none hides in what the compiler has freed
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    found = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment
    )
    assert found.returncode == 0, found.stderr
    with np.load(tmp_path / f"{minutes}.wav.npz") as arrays:
        assert arrays[f"{minutes}.wav"].shape == (1, minutes * 60 * 50 - 1, tiny.encoder().width)
    short, long = map(float, found.stdout.splitlines()[-1].split())
    return long - short


def test_memory_does_not_grow_with_the_length(folder, tmp_path):
    """Eight minutes more are 31 MB as a waveform at 16 kHz."""
    assert grown(folder, tmp_path, minutes=10, rate=16_000) < 8


@pytest.mark.soak
def test_memory_of_half_an_hour(folder, tmp_path):
    """28 minutes more are 108 MB as a waveform at 16 kHz, 296 MB as it lies in the file."""
    assert grown(folder, tmp_path, minutes=30, rate=44_100) < 12


@pytest.mark.torch
def test_transformers_agree(folder, audio):
    """The features of a file are the hidden states that transformers computes from its samples."""
    import torch
    from transformers import AutoModel

    waveform = decode(audio / "b" / "long.flac", name="x").waveform
    with torch.no_grad():
        peer = AutoModel.from_pretrained(folder).eval()(torch.from_numpy(waveform)[None], output_hidden_states=True)
    found = load_model(folder).features(audio / "b" / "long.flac")
    np.testing.assert_allclose(found, np.stack([h[0].numpy() for h in peer.hidden_states]), atol=1e-4)
