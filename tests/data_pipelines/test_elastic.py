"""Batch k on any number of hosts and processes, from any step; labels at 50 and 100 Hz; what changed is told."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.balance import DrawConfig
from data_pipelines.batch import Batch, num_frames
from data_pipelines.identity import data_digest, data_identity, what_changed
from data_pipelines.manifest import Manifest, Split, write_manifest
from data_pipelines.mixing import MixingConfig
from data_pipelines.pipeline import DataConfig, LoadBatch, train_dataset
from data_pipelines.reverberation import ReverbConfig
from data_pipelines.units import UnitsError, UnitStore, UnitWriter, frames_at
from tests.data_pipelines.ramps import CLEAN, LENGTHS, MIXED, assert_same, first

HOST = """
import sys
import numpy as np
from data_pipelines.manifest import Manifest
from data_pipelines.pipeline import LoadBatch
from data_pipelines.units import UnitStore
from tests.data_pipelines.ramps import MIXED

root, units, host, hosts, start, stop, out = sys.argv[1:]
manifest = Manifest.load(root)
load = LoadBatch(MIXED, manifest, [UnitStore.load(units, manifest)], host=int(host), hosts=int(hosts))
named = {f"{k}/{name}": value for k in range(int(start), int(stop)) for name, value in load.map(k)._asdict().items()}
np.savez(out, **named)
"""


def on_hosts(corpus, units, tmp_path, *, hosts, start, stop) -> list[Batch]:
    """Batches `start` .. `stop` - 1, made by one process for each host, put together."""
    outs = [tmp_path / f"{hosts}-{host}.npz" for host in range(hosts)]
    arguments = [str(corpus.root), str(units[0].directory)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, *arguments, str(host), str(hosts), str(start), str(stop), str(out)]
        )
        for host, out in enumerate(outs)
    ]
    assert [each.wait() for each in running] == [0] * hosts
    shares = [np.load(out) for out in outs]
    return [
        Batch(*(np.concatenate([share[f"{k}/{name}"] for share in shares]) for name in Batch._fields))
        for k in range(start, stop)
    ]


def test_two_processes_make_the_batches_of_one_and_take_over_from_its_step(corpus, units, tmp_path):
    alone = first(MIXED, corpus, units, 6)
    together = on_hosts(corpus, units, tmp_path, hosts=2, start=3, stop=6)
    for one, other in zip(alone[3:], together, strict=True):
        assert_same(one, other)


@pytest.mark.soak
@pytest.mark.parametrize("workers", [1, 3, 4])
def test_any_number_of_workers(corpus, units, workers):
    here = first(MIXED, corpus, units, 9, start=2)
    there = first(dataclasses.replace(MIXED, workers=workers, threads=1), corpus, units, 9, start=2)
    for one, other in zip(here, there, strict=True):
        assert_same(one, other)


def test_a_step_far_away_is_there_at_once_and_on_any_number_of_hosts(corpus, units):
    k = 10**9 + 7
    cfg = dataclasses.replace(MIXED, lengths=(16_000, 48_000))
    alone = LoadBatch(cfg, corpus, units).map(k)
    for hosts in (2, 4):
        parts = [LoadBatch(cfg, corpus, units, host=host, hosts=hosts).map(k) for host in range(hosts)]
        assert_same(alone, Batch(*(np.concatenate(fields) for fields in zip(*parts, strict=True))))


# --- labels ---


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_labels_are_those_of_the_samples_a_frame_hears(tmp_path_factory, data):
    """Oracle: at each sample a value that rises; a label is the value where its 25 ms begin, at 50 and at 100 Hz."""
    samples = data.draw(st.lists(st.integers(400, 6000), min_size=1, max_size=5))
    root = tmp_path_factory.mktemp("labels")
    write_manifest(root, samples=samples, language=["aaa"] * len(samples), corpus=["x"] * len(samples))
    manifest = Manifest.load(root, check_shards=False)
    before = np.concatenate([[0], np.cumsum(samples)])  # each utterance may be clips that were joined: values go on
    stores = []
    for rate, hop in ((50, 320), (100, 160)):
        with UnitWriter(root / str(rate), manifest, units=1 << 16, source="values", rate_hz=rate) as writer:
            for i, n in enumerate(samples):
                writer.add(i, np.array([before[i] + at for at in range(0, n - 400 + 1, hop)]))
        stores.append(UnitStore.load(root / str(rate), manifest))
        assert stores[-1].rate_hz == rate and len(stores[-1].read(0)) == frames_at(samples[0], rate_hz=rate)
    i = data.draw(st.integers(0, len(samples) - 1))
    start = data.draw(st.integers(0, (samples[i] - 400) // 320)) * 320
    length = data.draw(st.integers(400, samples[i] - start))
    frames = num_frames(length)
    expected = [before[i] + start + 320 * t for t in range(frames)]
    for store in stores:
        assert store.crop(i, start=start, frames=frames).tolist() == expected
        assert len(store.crop(i, start=start, frames=0)) == 0
        with pytest.raises(UnitsError, match="not a multiple of 320"):
            store.crop(i, start=start + 160, frames=1)


def test_batches_have_labels_of_both_rates(corpus, units, tmp_path):
    """The unit of frame t is 500 i + t in one store; at 100 Hz, 1000 i + t in another: every second is taken."""
    with UnitWriter(tmp_path / "fast", corpus, units=1 << 16, source="positions", rate_hz=100) as writer:
        for i in range(len(corpus)):
            writer.add(i, (1000 * i + np.arange(frames_at(int(corpus.samples[i]), rate_hz=100))) % (1 << 16))
    both = (*units, UnitStore.load(tmp_path / "fast", corpus))
    dataset = train_dataset(CLEAN, corpus, both)
    for k in range(8):
        slow, fast = np.moveaxis(dataset[k].units, -1, 0)
        np.testing.assert_array_equal(fast, 2 * slow % (1 << 16))


def test_another_rate_is_refused(corpus, tmp_path):
    with pytest.raises(UnitsError, match="75 labels a second; a store has 50 or 100"):
        UnitWriter(tmp_path / "odd", corpus, units=5, source="", rate_hz=75)


# --- what changed ---


def test_what_changed_is_told_in_words(corpus, tmp_path):
    cfg = DataConfig(lengths=LENGTHS, seconds_per_step=12.0)
    same = dataclasses.replace(cfg, workers=4, threads=0, prefetch=1)
    assert what_changed(data_identity(corpus, cfg), data_identity(corpus, same)) == []
    assert data_digest(corpus, cfg) == data_digest(corpus, same)
    other = dataclasses.replace(cfg, seed=1, draw=DrawConfig(cap_hours=20.0))
    assert what_changed(data_identity(corpus, cfg), data_identity(corpus, other)) == [
        "data.draw.cap_hours: None then, 20.0 now",
        "data.seed: 0 then, 1 now",
    ]
    assert data_digest(corpus, cfg) != data_digest(corpus, other)
    train = corpus.rows(Split.TRAIN)[:-1]
    write_manifest(
        tmp_path,
        samples=corpus.samples[train],
        language=[corpus.languages[code] for code in corpus.language[train]],
        corpus=[corpus.corpora[code] for code in corpus.corpus[train]],
    )
    told = what_changed(data_identity(corpus, cfg), data_identity(Manifest.load(tmp_path, check_shards=False), cfg))
    assert [line.split(":")[0] for line in told] == ["corpus", "hours of fra", "training utterances"]
    assert "training utterances: 48 then, 47 now" in told


def test_another_file_of_noise_is_another_run(corpus, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.ones(16_000, np.float32) / 2, 16_000)
    noisy = dataclasses.replace(MIXED, mixing=MixingConfig(noise_folder=str(tmp_path)))
    rooms = dataclasses.replace(MIXED, reverb=ReverbConfig(folder=str(tmp_path)))
    before = [data_identity(corpus, cfg) for cfg in (noisy, rooms)]
    soundfile.write(tmp_path / "b.wav", np.ones(8_000, np.float32) / 2, 16_000)
    changed = [what_changed(then, data_identity(corpus, cfg)) for then, cfg in zip(before, (noisy, rooms), strict=True)]
    assert [[line.split(":")[0] for line in lines] for lines in changed] == [["files of noise"], ["files of rooms"]]
