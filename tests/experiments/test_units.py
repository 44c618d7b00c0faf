"""Making units: what they are fitted on, what is kept when a process is killed, and several processes at once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats
import soundfile

from data_pipelines.manifest import Manifest, write_manifest
from data_pipelines.units import UnitStore
from experiments.fit_spool import FitSpool, SpoolError
from experiments.unit_quality import measure_units, table
from experiments.units import UnitFiles, UnitMakingError, UnitsConfig, fit_sample, fitted_centroids
from tests.experiments import small_units
from wavlab_jax.evaluation.unit_quality import UnitQualityError
from wavlab_jax.sharding import MeshConfig, make_mesh
from wavlab_jax.targets import kmeans

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A workdir in which units were made without a stop; and what was saved on the way."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, small_units.make(corpus, workdir)


def labels(workdir):
    return np.fromfile(UnitFiles(workdir, "mfcc").store / "units.uint16", "<u2")


def start(corpus, workdir, *arguments, devices=8):
    command = [sys.executable, "-m", "tests.experiments.small_units", str(corpus), str(workdir), *arguments]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "TQDM_DISABLE": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# --- what is fitted ---


def test_the_spool_holds_one_frame_of_each_stretch_within_its_budget(tmp_path):
    frames = np.array([7, 0, 50, 3, 200, 40])
    rows = np.arange(300, dtype=np.float32)[:, None] * np.ones(4, np.float32)
    spool = FitSpool(tmp_path / "s", frames=frames, width=4, dtype="float16", most_bytes=801, seed=3, source="x")
    assert spool.shape == (100, 4)
    for number in spool.missing():
        piece = spool.piece(number)
        assert piece.frames == frames[piece.first : piece.last].sum()
        spool.write(number, rows[frames[: piece.first].sum() + piece.chosen])
    files = [path for path in (tmp_path / "s").iterdir() if path.suffix == ".float16"]
    assert sum(path.stat().st_size for path in files) == 800
    kept = spool[:][:, 0]
    assert (kept // 3 == np.arange(100)).all() and len(set(kept % 3)) == 3  # one of each three, not always the same


def test_the_spool_reads_as_an_array(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.fit_spool.PIECE_FRAMES", 40)
    frames, rng = np.full(30, 9), np.random.default_rng(0)
    features = rng.standard_normal((270, 5)).astype(np.float32)
    setting = dict(frames=frames, width=5, dtype="float32", most_bytes=10**6, seed=0, source="x")
    spool = FitSpool(tmp_path / "s", **setting)
    assert len(spool.missing()) > 5
    for number in spool.missing():
        piece = spool.piece(number)
        spool.write(number, features[9 * piece.first : 9 * piece.last][piece.chosen])
    again = FitSpool(tmp_path / "s", **setting)
    assert again.missing() == [] and again.shape == features.shape
    for rows in (slice(0, 0), slice(None), slice(35, 36), slice(35, 37), slice(100, 1000), np.array([0, 35, 36, 269])):
        np.testing.assert_array_equal(again[rows], features[rows])
    picked = np.flatnonzero(rng.random(270) < 0.1)
    np.testing.assert_array_equal(again[picked], features[picked])
    assert FitSpool(tmp_path / "s", **{**setting, "source": "y"}).missing()  # of something else: anew


def test_features_that_cannot_be_kept_are_told(tmp_path):
    spool = FitSpool(tmp_path / "s", frames=np.array([2]), width=2, dtype="float16", most_bytes=99, seed=0, source="x")
    with pytest.raises(SpoolError, match="7e[+]04 do not fit into float16: set units.fit-dtype float32"):
        spool.write(0, np.full((2, 2), 7e4, np.float32))
    with pytest.raises(SpoolError, match="not finite"):
        spool.write(0, np.full((2, 2), np.nan, np.float32))
    assert spool.missing() == [0]


def test_the_sample_has_the_languages_that_were_named_and_their_balance(tmp_path):
    count = np.array([400, 40, 40])
    write_manifest(
        tmp_path,
        samples=np.full(480, 160_000),
        language=np.repeat(["eng", "deu", "swa"], count).tolist(),
        corpus=["x"] * 480,
        split=([0] * 9 + [1]) * 48,
    )
    manifest = Manifest.load(tmp_path, check_shards=False)

    def drawn(**setting):
        rows = fit_sample(manifest, **{"hours": 0.25, "exponent": 1.0, "seed": 0, **setting})
        assert (manifest.split[rows] == 0).all()
        by = np.bincount(manifest.language[rows], minlength=3)
        return dict(zip(manifest.languages, by.tolist(), strict=True))

    assert drawn() == {"deu": 8, "eng": 75, "swa": 8}
    assert drawn(exponent=0.0) == {"deu": 30, "eng": 30, "swa": 30}
    assert drawn(languages=("eng",)) == {"deu": 0, "eng": 90, "swa": 0}
    assert drawn(languages=("swa", "deu"), exponent=0.0) == {"deu": 36, "eng": 0, "swa": 36}  # all they have
    with pytest.raises(UnitMakingError, match="no training audio in 'en'.*: eng"):
        drawn(languages=("swa", "en"))


def test_centroids_without_labels_are_those_of_the_store(corpus, whole, tmp_path):
    manifest, mesh = Manifest.load(corpus), make_mesh(MeshConfig())
    with small_units.small_pieces():
        centers = fitted_centroids(small_units.settings(), tmp_path, manifest, mesh)
    assert centers.shape == (12, 39)
    assert [path.name for path in (tmp_path / "units").iterdir()] == ["mfcc.centroids.npz"]
    with np.load(UnitFiles(whole[0], "mfcc").centroids) as kept:
        np.testing.assert_array_equal(kept["centers"], centers)
        assert kept["frames"] == 1500
    kept = fitted_centroids(small_units.settings(), whole[0], manifest, mesh)  # loaded: no pieces are small here
    np.testing.assert_array_equal(kept, centers)


def test_labels_are_the_nearest_centroids_in_every_piece(corpus, whole):
    from data_pipelines.sources import ShardSource
    from wavlab_jax.features import mfcc

    manifest = Manifest.load(corpus)
    store = UnitStore.load(UnitFiles(whole[0], "mfcc").store, manifest)
    with np.load(UnitFiles(whole[0], "mfcc").centroids) as kept:
        centers = kept["centers"]
    for i in range(0, len(manifest), 7):
        features = np.asarray(mfcc(ShardSource(manifest).read(i)[None]))[0, ::2]
        np.testing.assert_array_equal(store.read(i), kmeans.assign(centers, features))


def test_quality_by_language_and_by_phone(corpus, whole, tmp_path):
    """Phones that are two levels of the units themselves: unit // 6 of each frame; alignments of half the clips."""
    manifest = Manifest.load(corpus)
    store = UnitStore.load(UnitFiles(whole[0], "mfcc").store, manifest)
    expected = np.zeros((2, 12), np.int64)
    for i in range(0, len(manifest), 2):
        names, units, start = manifest.clip_names(i), store.read(i), 0.0
        for name in names:
            seconds = soundfile.info(corpus.parent / "audio" / name).duration
            centres = np.arange(len(units)) * 0.02 + 0.0125
            mine = np.flatnonzero((centres >= start) & (centres < start + seconds))
            lines, last = [], 0.0
            for t in mine:
                first, last = max(0.02 * t + 0.0025 - start, last), min(round(0.02 * t + 0.0225 - start, 6), seconds)
                lines.append(f"{first:.6f}\t{last:.6f}\t{'ab'[units[t] // 6]}")
                expected[units[t] // 6, units[t]] += 1
            end = float(lines[-1].split("\t")[1])
            lines += [f"{end:.6f}\t{seconds:.6f}\trest"] if end < seconds else []
            path = tmp_path / Path(name).with_suffix(".phn")
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(lines) + "\n")
            start += seconds
    result = measure_units("mfcc", workdir=whole[0], corpus=corpus, alignments=tmp_path)
    assert result == json.loads(UnitFiles(whole[0], "mfcc").quality.read_text())
    phones = result["phones"]
    assert phones["aligned"] + phones["left_out"] == len(manifest) and phones["left_out"] == len(manifest) // 2
    assert phones["all"]["phone_purity"] > 0.99 and phones["all"]["information"]["normalized"] > 0.97
    assert phones["all"]["cluster_purity"] == pytest.approx(expected.max(axis=1).sum() / expected.sum(), abs=0.01)
    german = store.counts(np.flatnonzero(manifest.language == manifest.languages.index("deu")))
    assert result["languages"]["deu"]["frames"] == german.sum()
    assert result["languages"]["deu"]["perplexity"] == pytest.approx(2 ** scipy.stats.entropy(german, base=2))
    assert result["train"]["frames"] + result["held_out"]["frames"] == result["all"]["frames"]
    assert result["language_information"]["bits"] > 0.1  # the languages of this corpus differ in pitch
    shown = table(result).splitlines()
    assert [line.split()[0] for line in shown[1:7]] == ["deu", "eng", "swa", "train", "held", "all"]


def test_alignments_of_another_corpus_are_told(corpus, whole, tmp_path):
    (tmp_path / "phones.phn").write_text("0.0\t1.0\ta\n")
    expected = tmp_path / Path(Manifest.load(corpus).clip_names(0)[0]).with_suffix(".phn")
    with pytest.raises(UnitQualityError, match=f"{tmp_path} has no alignment that fits.* would be {expected};"):
        measure_units("mfcc", workdir=whole[0], corpus=corpus, alignments=tmp_path)


@pytest.mark.parametrize("stage", ["best_rq_base", "xlsr_300m"])
def test_a_stage_without_a_store_has_nothing_to_measure(answer, tmp_path, stage):
    told = answer("quality", stage, "--size", "demo", "--workdir", str(tmp_path))
    assert told.returncode == 1 and f"error: {stage} has no label store" in told.stderr


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", "../x"), ("units", 0), ("units", 65_537), ("layer", -1), ("fit_hours", float("nan")), ("iterations", 0)],
)
def test_units_that_cannot_be_made_are_refused_before_any_work(field, value):
    with pytest.raises(UnitMakingError, match=f"{field} is {value!r}; "):
        UnitsConfig(**{"name": "mfcc", "units": 12, field: value})


# --- killed, and shared ---


@pytest.mark.soak
def test_kill_9_at_each_stage_and_the_same_command_again(corpus, whole, tmp_path):
    """Killed while features are kept, while the fit goes on, and while labels are written; nothing is done twice."""
    needed, done = dict(whole[1]), []
    assert min(needed.values()) >= 5
    for where in ("features", "passes", "labels"):
        child = start(corpus, tmp_path, "--stop", where, "3")
        assert child.wait(300) == -9, child.stdout.read()
        needed = {name: 0 if name in done else count for name, count in needed.items()}
        needed[where] -= 3
        done.append(where)
    saved = small_units.make(corpus, tmp_path)
    assert saved == needed
    np.testing.assert_array_equal(labels(tmp_path), labels(whole[0]))
    assert sorted(path.name for path in (tmp_path / "units").iterdir()) == ["mfcc", "mfcc.centroids.npz"]


@pytest.mark.soak
def test_two_processes_make_the_store_of_one(corpus, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = [start(corpus, tmp_path / "two", "--of", str(host), "2", port, devices=2) for host in range(2)]
    said = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    one = tmp_path / "one"
    saved = small_units.make(corpus, one, make_mesh(MeshConfig(), devices=jax.devices()[:4]))
    np.testing.assert_array_equal(labels(tmp_path / "two"), labels(one))
    shares = [json.loads(text.splitlines()[-1]) for text in said]
    for what in ("features", "labels"):
        assert sum(share[what] for share in shares) == saved[what] and min(share[what] for share in shares) > 0
