import errno
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines.atomic import TEMPORARY_PREFIX, CannotWrite
from data_pipelines.batch import num_frames
from data_pipelines.manifest import Manifest, write_manifest
from data_pipelines.units import META_NAME, OFFSETS_NAME, UNITS_NAME, UnitsError, UnitStore, UnitWriter

SAMPLES = [16_000, 400, 719, 720, 48_123, 32_000]
K = 50


@pytest.fixture
def manifest(tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    write_manifest(root, samples=SAMPLES, language=["fra"] * 6, corpus=["x"] * 6, id=[f"clip{n}" for n in range(6)])
    return Manifest.load(root, check_shards=False)


def labels_of(i: int, units: int = K) -> np.ndarray:
    return (np.arange(num_frames(SAMPLES[i])) * 7 + i).astype(np.uint16) % units


def write(directory, manifest, units=K):
    with UnitWriter(directory, manifest, units=units, source="k-means of MFCC") as writer:
        for i in range(len(SAMPLES)):
            writer.add(i, labels_of(i, units))
    return directory


@pytest.fixture
def store(tmp_path, manifest):
    return write(tmp_path / "units", manifest)


def change_meta(directory, **changes):
    path = directory / META_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(TEMPORARY_PREFIX)]


# --- what is written is read ---


def test_labels_come_back(store, manifest, tmp_path):
    loaded = UnitStore.load(store, manifest)
    assert (len(loaded), loaded.units, loaded.source) == (6, K, "k-means of MFCC")
    for i in range(6):
        read = loaded.read(i)
        assert read.dtype == np.uint16
        assert np.array_equal(read, labels_of(i))
    assert np.array_equal(loaded.read(4, start_frame=17, frames=90), labels_of(4)[17:107])
    assert np.array_equal(loaded.read(4, start_frame=17), labels_of(4)[17:])
    assert loaded.read(1, start_frame=1, frames=0).shape == (0,)
    assert leftovers(tmp_path) == []


def test_the_files_are_what_the_documentation_says(store, manifest):
    assert sorted(path.name for path in store.iterdir()) == [META_NAME, OFFSETS_NAME, UNITS_NAME]
    frames = [num_frames(n) for n in SAMPLES]
    assert np.load(store / OFFSETS_NAME).tolist() == [sum(frames[:i]) for i in range(7)]
    flat = np.concatenate([labels_of(i) for i in range(6)])
    assert np.array_equal(np.fromfile(store / UNITS_NAME, "<u2"), flat)
    meta = json.loads((store / META_NAME).read_text())
    assert meta["corpus_fingerprint"] == manifest.fingerprint
    assert (meta["units"], meta["rate_hz"], meta["hop"]) == (K, 50, 320)
    assert (meta["utterances"], meta["frames"]) == (6, len(flat))


def test_what_is_read_may_be_written_to(store, manifest):
    loaded = UnitStore.load(store, manifest)
    loaded.read(0)[:] = 9
    assert np.array_equal(loaded.read(0), labels_of(0))


def test_a_store_pickles_as_its_path(store, manifest):
    loaded = UnitStore.load(store, manifest)
    packed = pickle.dumps(loaded)
    assert len(packed) < 1000
    again = pickle.loads(packed)
    assert np.array_equal(again.read(4), labels_of(4)) and again.units == K


def test_counts(store, manifest):
    loaded = UnitStore.load(store, manifest)
    for rows in (None, [], [4], [0, 1, 2], [5, 0, 1, 3], [2, 2]):
        chosen = range(6) if rows is None else rows
        flat = np.concatenate([np.zeros(0, np.int64), *(labels_of(i) for i in chosen)]).astype(np.int64)
        counts = loaded.counts(rows if rows is None else np.array(rows, np.int64))
        assert counts.dtype == np.int64
        assert np.array_equal(counts, np.bincount(flat, minlength=K))


def test_all_65536_units_fit(tmp_path, manifest):
    directory = tmp_path / "many"
    with UnitWriter(directory, manifest, units=65_536, source="") as writer:
        for i, samples in enumerate(SAMPLES):
            writer.add(i, np.full(num_frames(samples), 65_535))
    loaded = UnitStore.load(directory, manifest)
    assert loaded.read(0).max() == 65_535 and loaded.counts()[-1] == loaded.offsets[-1]


@pytest.mark.parametrize("asked", [(6, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 0, 50), (0, 49, 1), (1, 0, 2), (0, 3, -1)])
def test_reading_past_an_utterance_is_refused(store, manifest, asked):
    i, start_frame, frames = asked
    with pytest.raises(UnitsError, match=f"asked of .*{store.name}"):
        UnitStore.load(store, manifest).read(i, start_frame=start_frame, frames=frames)


# --- what the writer refuses ---


@pytest.mark.parametrize(
    ("i", "labels", "message"),
    [
        (1, labels_of(1), r"units of utterance 1 were added, but 0 is next"),
        (0, labels_of(0)[:-1], r"uint16\[48\] for fra/x utterance clip0, whose 16000 samples make 49 frames"),
        (0, np.append(labels_of(0), 0), r"\[50\] for fra/x utterance clip0"),
        (0, labels_of(0).astype(np.float32), r"float32\[49\] for fra/x utterance clip0"),
        (0, labels_of(0)[None], r"uint16\[1, 49\]"),
        (0, np.full(49, K), r"labels 50\.\.50 for fra/x utterance clip0; with 50 units they must lie in 0\.\.49"),
        (0, np.full(49, -1), r"labels -1\.\.-1"),
    ],
)
def test_wrong_labels_are_named_and_nothing_stays(tmp_path, manifest, i, labels, message):
    directory = tmp_path / "units"
    with (
        pytest.raises(UnitsError, match=message) as raised,
        UnitWriter(directory, manifest, units=K, source="") as writer,
    ):
        writer.add(i, labels)
    assert str(directory) in str(raised.value)
    assert not directory.exists() and leftovers(tmp_path) == []


def test_too_few_and_too_many_utterances(tmp_path, manifest):
    directory = tmp_path / "units"
    with (
        pytest.raises(UnitsError, match=r"only 5 of 6 utterances"),
        UnitWriter(directory, manifest, units=K, source="") as writer,
    ):
        for i in range(5):
            writer.add(i, labels_of(i))
    assert not directory.exists() and leftovers(tmp_path) == []
    with (
        pytest.raises(UnitsError, match=r"utterance 6 were added, but all are there"),
        UnitWriter(directory, manifest, units=K, source="") as writer,
    ):
        for i in range(6):
            writer.add(i, labels_of(i))
        writer.add(6, labels_of(0))
    assert not directory.exists() and leftovers(tmp_path) == []


def test_an_existing_folder_is_not_touched(store, manifest):
    before = (store / META_NAME).read_text()
    with pytest.raises(UnitsError, match=r"units exists already: delete it"):
        write(store, manifest)
    assert (store / META_NAME).read_text() == before


def test_a_folder_that_appears_meanwhile_is_not_touched(tmp_path, manifest):
    directory = tmp_path / "units"
    with (
        pytest.raises(UnitsError, match="exists by now, and is left as it is"),
        UnitWriter(directory, manifest, units=K, source="") as writer,
    ):
        for i in range(6):
            writer.add(i, labels_of(i))
        directory.mkdir()
        (directory / "mine").write_text("")
    assert [path.name for path in directory.iterdir()] == ["mine"] and leftovers(tmp_path) == []


def test_adding_outside_of_the_block(tmp_path, manifest):
    with pytest.raises(UnitsError, match="inside the writer's `with` block"):
        UnitWriter(tmp_path / "units", manifest, units=K, source="").add(0, labels_of(0))


@pytest.mark.parametrize("units", [0, -1, 65_537])
def test_numbers_of_units_that_cannot_be(tmp_path, manifest, units):
    with pytest.raises(UnitsError, match="a store holds 1 to 65536"):
        UnitWriter(tmp_path / "units", manifest, units=units, source="")


def test_an_exception_in_the_block_leaves_nothing(tmp_path, manifest):
    directory = tmp_path / "units"
    with pytest.raises(KeyboardInterrupt), UnitWriter(directory, manifest, units=K, source="") as writer:
        writer.add(0, labels_of(0))
        raise KeyboardInterrupt
    assert not directory.exists() and leftovers(tmp_path) == []


_CHILD = """
import os, resource, signal, sys
import numpy as np
from data_pipelines.batch import num_frames
from data_pipelines.manifest import Manifest
from data_pipelines.units import UnitWriter

manifest, directory, how = Manifest.load(sys.argv[1], check_shards=False), sys.argv[2], sys.argv[3]
if how == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
with UnitWriter(directory, manifest, units=50, source="") as writer:
    for i in range(len(manifest)):
        writer.add(i, np.zeros(num_frames(int(manifest.samples[i])), np.uint16))
    if how == "killed":
        writer._labels.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""


def run_child(manifest, directory, how):
    command = [sys.executable, "-c", _CHILD, str(manifest.root), str(directory), how]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_killed_writer_leaves_nothing_readable_and_does_not_stand_in_the_way(tmp_path, manifest):
    directory = tmp_path / "units"
    assert run_child(manifest, directory, "killed").returncode == -9
    with pytest.raises(UnitsError, match="does not exist"):
        UnitStore.load(directory, manifest)
    (partial,) = leftovers(tmp_path)
    with pytest.raises(UnitsError, match="not a whole one"):
        UnitStore.load(tmp_path / partial, manifest)
    assert len(UnitStore.load(write(directory, manifest), manifest)) == 6
    assert leftovers(tmp_path) == []


def test_a_full_disk_is_told_with_the_folder_and_leaves_nothing(tmp_path, manifest):
    directory = tmp_path / "units"
    child = run_child(manifest, directory, "full")
    assert child.returncode == 1
    told = f"data_pipelines.atomic.CannotWrite: {directory} cannot be written ({os.strerror(errno.EFBIG)}): mend that"
    assert child.stderr.strip().splitlines()[-1].startswith(told)
    assert not directory.exists() and leftovers(tmp_path) == []


@pytest.mark.parametrize("full", [UNITS_NAME, OFFSETS_NAME, META_NAME])
def test_each_file_of_a_store_may_be_the_one_that_does_not_fit(tmp_path, manifest, full):
    """/dev/full takes nothing, and says so in the kernel's own words."""
    directory = tmp_path / "units"
    writer = UnitWriter(directory, manifest, units=K, source="")
    with pytest.raises(CannotWrite, match="No space left on device.: free some space") as raised, writer:
        if full == UNITS_NAME:
            os.dup2(os.open("/dev/full", os.O_WRONLY), writer._labels.fileno())
        else:
            (writer._temporary / full).symlink_to("/dev/full")
        for i in range(6):
            writer.add(i, labels_of(i))
    assert str(raised.value).startswith(f"{directory} cannot be written") and raised.value.errno == errno.ENOSPC
    assert not directory.exists() and leftovers(tmp_path) == []
    assert len(UnitStore.load(write(directory, manifest), manifest)) == 6


# --- what the reader refuses ---


def refused(directory, manifest, message):
    with pytest.raises(UnitsError, match=message) as raised:
        UnitStore.load(directory, manifest)
    assert str(directory) in str(raised.value)


def test_no_such_folder(tmp_path, manifest):
    refused(tmp_path / "nothing", manifest, "does not exist; make units of this corpus first")


def test_not_a_store(tmp_path, manifest):
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", manifest, "has no meta.json: not a unit store, or not a whole one")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', "null"])
def test_a_damaged_description(store, manifest, text):
    (store / META_NAME).write_text(text)
    refused(store, manifest, "damaged|make the units again")


@pytest.mark.parametrize(
    "changes", [{"units": "50"}, {"units": 0}, {"units": 70_000}, {"frames": -1}, {"source": None}]
)
def test_nonsense_in_the_description(store, manifest, changes):
    change_meta(store, **changes)
    refused(store, manifest, "damaged")


def test_another_format_or_version(store, manifest):
    change_meta(store, version=2)
    refused(store, manifest, r"speech-units 2, this code reads speech-units 1; make the units again")
    change_meta(store, version=1, format="something")
    refused(store, manifest, "is something 1")


def test_units_of_another_corpus(tmp_path, store, manifest):
    other = tmp_path / "other"
    other.mkdir()
    write_manifest(other, samples=SAMPLES, language=["deu"] * 6, corpus=["x"] * 6)
    other = Manifest.load(other, check_shards=False)
    told = f"another corpus: they were made for {manifest.fingerprint}.*is {other.fingerprint}; delete that folder"
    refused(store, other, told)


@pytest.mark.parametrize("changes", [{"hop": 640, "rate_hz": 25}, {"rate_hz": 100}, {"hop": 640}])
def test_another_rate(store, manifest, changes):
    change_meta(store, **changes)
    refused(store, manifest, r"the encoder has a frame every 320 \(50 Hz\); make the units again")


@pytest.mark.parametrize("changes", [{"utterances": 5}, {"frames": 300}])
def test_other_counts(store, manifest, changes):
    change_meta(store, **changes)
    refused(store, manifest, "the corpus has 6 and")


@pytest.mark.parametrize("change", [-2, -1, 2])
def test_a_cut_or_grown_file(store, manifest, change):
    data = (store / UNITS_NAME).read_bytes()
    (store / UNITS_NAME).write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    refused(store, manifest, f"has {len(data) + change} bytes, {len(data)} expected: it was cut or replaced")


@pytest.mark.parametrize("name", [UNITS_NAME, OFFSETS_NAME])
def test_a_missing_file(store, manifest, name):
    (store / name).unlink()
    refused(store, manifest, f"damaged .*{name}")


def test_offsets_that_are_not_the_corpus(store, manifest):
    offsets = np.load(store / OFFSETS_NAME)
    np.save(store / OFFSETS_NAME, offsets + (np.arange(7) == 3))
    refused(store, manifest, "offsets.npy is not that of this corpus")
    np.save(store / OFFSETS_NAME, offsets[:-1])
    refused(store, manifest, r"int64\[6\], int64\[7\] expected")
    np.save(store / OFFSETS_NAME, offsets.astype(np.float64))
    refused(store, manifest, r"float64\[7\]")
    (store / OFFSETS_NAME).write_bytes(b"not numpy")
    refused(store, manifest, "damaged")


def test_a_pickled_object_is_never_loaded(store, manifest):
    np.save(store / OFFSETS_NAME, np.array([print], object), allow_pickle=True)
    refused(store, manifest, "damaged")


def test_a_label_outside_of_the_units(store, manifest):
    labels = np.fromfile(store / UNITS_NAME, "<u2")
    place = int(np.load(store / OFFSETS_NAME)[4]) + 5
    labels[place] = K
    labels.tofile(store / UNITS_NAME)
    refused(store, manifest, r"label 50 in fra/x utterance clip4, but 50 units \(0\.\.49\)")


def test_a_worker_notices_a_store_that_was_cut_since(store, manifest):
    packed = pickle.dumps(UnitStore.load(store, manifest))
    shutil.copy(store / UNITS_NAME, store / "whole")
    (store / UNITS_NAME).write_bytes(b"")
    with pytest.raises(UnitsError, match="cut or replaced"):
        pickle.loads(packed)
