"""Training batches: what a row is, that batch k is a function of k, mixing, and what cannot be run."""

import dataclasses
import itertools
import multiprocessing
import pickle
import shutil
import threading
import time
from collections import Counter

import numpy as np
import pytest
import soundfile

from data_pipelines import shared_batches
from data_pipelines.balance import DrawConfig, SamplingError
from data_pipelines.batch import HOP, NO_UTTERANCE, Batch, check_batch, num_frames
from data_pipelines.crops import CropError
from data_pipelines.manifest import Manifest, Split
from data_pipelines.mixing import MixingConfig
from data_pipelines.pipeline import (
    PipelineError,
    rows_per_step,
    train_batches,
    train_dataset,
)
from data_pipelines.sampling import Draw
from data_pipelines.sources import SourceError
from data_pipelines.units import UnitStore, UnitWriter
from tests.data_pipelines.ramps import CLEAN, LENGTHS, MIXED, STRIDE, assert_same, first, ramp

# --- training: what a row is ---


def test_rows_are_crops_on_the_grid_with_their_units(corpus, units):
    lengths = Counter()
    for batch in first(CLEAN, corpus, units, 40):
        rows, samples = batch.waveform.shape
        lengths[samples] += 1
        assert rows * samples == 12 * 16_000
        assert batch.valid.all() and (batch.partner == NO_UTTERANCE).all()
        check_batch(batch)
        for row in range(rows):
            i, start = int(batch.utterance[row]), int(batch.start[row])
            assert corpus.split[i] == Split.TRAIN
            assert batch.language[row] == corpus.language[i]
            assert start % HOP == 0 and start + samples <= corpus.samples[i]
            # Largest static length that the utterance fills.
            assert samples == max(length for length in LENGTHS if length <= corpus.samples[i])
            expected = ramp(int(corpus.id(i)), start, samples) / np.float32(32768)
            np.testing.assert_array_equal(batch.waveform[row], expected)
            frames = 500 * i + start // HOP + np.arange(num_frames(samples))
            np.testing.assert_array_equal(batch.units[row, :, 0], frames)
    assert set(lengths) == set(LENGTHS)


def test_rows_are_those_of_the_draw_and_balanced(corpus):
    """A step's rows are consecutive rows of the draw, and so every language has its share of the seconds."""
    cfg = dataclasses.replace(CLEAN, draw=DrawConfig(language_exponent=0.0, corpus_exponent=0.0))
    rows = [rows_per_step(length, cfg=cfg) for length in LENGTHS]
    draw = Draw(corpus, lengths=LENGTHS, rows=rows, cfg=cfg.draw, seed=cfg.seed)
    seconds = Counter()
    for k, batch in enumerate(first(cfg, corpus, (), 60)):
        step = draw.step(k)
        expected = [draw.draw(step.length, step.first_row + row).utterance for row in range(rows[step.length])]
        assert batch.utterance.tolist() == expected
        for language in batch.language.tolist():
            seconds[corpus.languages[language]] += LENGTHS[step.length] / 16_000
    assert seconds.total() == 60 * 12
    assert {name: amount / 720 for name, amount in seconds.items()} == pytest.approx(
        {"deu": 1 / 3, "eng": 1 / 3, "fra": 1 / 3}, abs=0.1
    )


def test_crops_move_from_epoch_to_epoch_and_reach_both_ends(corpus):
    starts = {}
    for batch in first(dataclasses.replace(CLEAN, lengths=(16_000,)), corpus, (), 60):
        for i, start in zip(batch.utterance.tolist(), batch.start.tolist(), strict=True):
            starts.setdefault(i, []).append(start)
    room = {i: int(corpus.samples[i]) - 16_000 for i in starts if corpus.samples[i] > 40_000}
    relative = [start / room[i] for i in room for start in starts[i]]
    assert min(relative) < 0.02 and max(relative) > 0.98
    assert np.mean(relative) == pytest.approx(0.5, abs=0.05)


def test_seeds_of_rows_are_all_different(corpus):
    seeds = np.concatenate([batch.seed for batch in first(CLEAN, corpus, (), 30)])
    assert len(set(seeds.tolist())) == len(seeds)
    bits = (seeds[:, None] >> np.arange(32, dtype=np.uint32) & 1).mean(0)
    assert np.abs(bits - 0.5).max() < 0.2


def test_every_set_of_units_has_its_place(corpus, units, tmp_path):
    """Labels of a second store stand beside those of the first, of the same frames; without a store there are none."""
    with UnitWriter(tmp_path / "parity", corpus, units=2, source="parity") as writer:
        for i in range(len(corpus)):
            writer.add(i, np.arange(num_frames(int(corpus.samples[i]))) % 2)
    both = (*units, UnitStore.load(tmp_path / "parity", corpus))
    (batch,), (alone,), (bare,) = (first(CLEAN, corpus, stores, 1) for stores in (both, units, ()))
    np.testing.assert_array_equal(batch.units[..., :1], alone.units)
    np.testing.assert_array_equal(batch.units[..., 1], (alone.units[..., 0] - 500 * batch.utterance[:, None]) % 2)
    assert bare.units.shape == (*bare.valid.shape, 0) and bare.valid.all()


def test_clean_waveforms_come_along_where_asked_for(corpus, units):
    kept = first(dataclasses.replace(MIXED, keep_clean=True), corpus, units, 4)
    for batch, mixed, clean in zip(kept, first(MIXED, corpus, units, 4), first(CLEAN, corpus, units, 4), strict=True):
        np.testing.assert_array_equal(batch.waveform, mixed.waveform)
        np.testing.assert_array_equal(batch.clean, clean.waveform)
        assert mixed.clean.shape == (len(mixed.waveform), 0)


# --- training: batch k is a pure function of k ---


def test_start_is_all_there_is_to_resuming(corpus, units):
    from_zero = first(MIXED, corpus, units, 9)
    for batch, again in zip(from_zero[4:], first(MIXED, corpus, units, 5, start=4), strict=True):
        assert_same(batch, again)
    dataset = train_dataset(MIXED, corpus, units)
    for k in (8, 0, 5):  # in any order
        assert_same(dataset[k], from_zero[k])
    assert not np.array_equal(from_zero[0].seed[:4], from_zero[1].seed[:4])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_load_their_rows_of_the_same_batch(corpus, units, hosts):
    cfg = dataclasses.replace(MIXED, lengths=(16_000, 48_000))
    alone = first(cfg, corpus, units, 8)
    shares = [first(cfg, corpus, units, 8, host=host, hosts=hosts) for host in range(hosts)]
    for k, batch in enumerate(alone):
        parts = [share[k] for share in shares]
        assert all(len(part.waveform) == len(batch.waveform) // hosts for part in parts)
        assert_same(batch, Batch(*(np.concatenate(fields) for fields in zip(*parts, strict=True))))


def test_threads_do_not_change_anything(corpus, units):
    alone = first(dataclasses.replace(MIXED, threads=0), corpus, units, 6)
    for threads, prefetch in ((1, 1), (4, 8)):
        cfg = dataclasses.replace(MIXED, threads=threads, prefetch=prefetch)
        for batch, again in zip(alone, first(cfg, corpus, units, 6), strict=True):
            assert_same(batch, again)


def test_worker_processes_do_not_change_anything(corpus, units, monkeypatch):
    through_grain = []
    monkeypatch.setattr(shared_batches, "own_copy", lambda batch: through_grain.append(batch) or batch)
    here = first(MIXED, corpus, units, 7, start=3, host=1, hosts=2)
    cfg = dataclasses.replace(MIXED, workers=2, threads=1)
    with train_batches(cfg, corpus, units, start=3, host=1, hosts=2) as batches:
        there = list(itertools.islice(batches, 7))
        assert len(multiprocessing.active_children()) == 2
    # After the end, so that memory which a worker took back would show.
    assert multiprocessing.active_children() == []
    assert not through_grain  # every batch came through a slot
    for batch, again in zip(here, there, strict=True):
        assert_same(batch, again)
        assert all(array.flags.owndata and array.flags.writeable for array in again)


def test_closing_ends_the_threads(corpus):
    def grain_threads():
        return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch") and t.is_alive()]

    before = len(grain_threads())
    batches = train_batches(CLEAN, corpus, ())
    next(batches)
    assert len(grain_threads()) > before
    batches.close()
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)
    deadline = time.monotonic() + 10
    while len(grain_threads()) > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_another_seed_is_other_data(corpus):
    (one,), (other,) = (first(dataclasses.replace(CLEAN, seed=seed), corpus, (), 1) for seed in (0, 1))
    assert one.waveform.shape != other.waveform.shape or not np.array_equal(one.utterance, other.utterance)
    assert one.seed[0] != other.seed[0]


def test_the_loader_pickles_small(corpus, units):
    dataset = train_dataset(MIXED, corpus, units)
    assert len(pickle.dumps(dataset[0])) > 100_000
    load = dataset._transform if hasattr(dataset, "_transform") else None
    load = load or next(value for value in vars(dataset).values() if type(value).__name__ == "LoadBatch")
    packed = pickle.dumps(load)
    assert len(packed) < 5000
    assert_same(pickle.loads(packed).map(3), dataset[3])


# --- training: mixing ---


def test_mixing_changes_the_waveform_and_nothing_else(corpus, units):
    clean, mixed = first(CLEAN, corpus, units, 10), first(MIXED, corpus, units, 10)
    for one, other in zip(clean, mixed, strict=True):
        for name in set(Batch._fields) - {"waveform", "partner"}:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        changed = (one.waveform != other.waveform).any(1)
        assert changed.all()
        # At most half of the row.
        for row in range(len(changed)):
            where = np.flatnonzero(one.waveform[row] != other.waveform[row])
            assert where[-1] - where[0] < one.waveform.shape[1] // 2


def test_partners_are_other_training_utterances_of_that_length_mixed_in_clean(corpus, units):
    checked = 0
    for clean, mixed in zip(first(CLEAN, corpus, units, 12), first(MIXED, corpus, units, 12), strict=True):
        samples = clean.waveform.shape[1]
        for row, partner in enumerate(mixed.partner.tolist()):
            assert partner not in (NO_UTTERANCE, mixed.utterance[row])
            assert corpus.split[partner] == Split.TRAIN
            assert samples == max(length for length in LENGTHS if length <= corpus.samples[partner])
            added = mixed.waveform[row].astype(np.float64) - clean.waveform[row]
            where = np.flatnonzero(added)
            added = added[where[0] : where[-1] + 1]
            if len(added) < 4000:
                continue
            # What was added is a stretch of the partner's own ramp, scaled: it rises by the same amount every sample.
            rise = np.diff(added)
            step = np.median(rise)
            smooth = np.abs(rise - step) < 1e-6
            assert smooth.mean() > 0.999  # but where the ramp falls back
            # Full scale in steps gives the value, and with it the clip, up to the wrap of the ramp.
            value = np.rint(added / step).astype(np.int64) + 32_768
            begins = (value - np.arange(len(value))) % 65_536
            offset = Counter(begins.tolist()).most_common(1)[0][0]
            into = (offset - STRIDE * int(corpus.id(partner))) % 65_536
            assert into + len(added) <= corpus.samples[partner]
            checked += 1
    assert checked > 40


def test_mixed_rows_have_the_asked_ratio(corpus):
    cfg = dataclasses.replace(MIXED, mixing=MixingConfig(probability=1.0, noise_share=1.0, noise_snr_db=(7.0, 7.0)))
    clean, noisy = first(CLEAN, corpus, (), 10), first(cfg, corpus, (), 10)
    ratios = []
    for one, other in zip(clean, noisy, strict=True):
        assert (other.partner == NO_UTTERANCE).all()
        for row in range(len(one.waveform)):
            added = other.waveform[row].astype(np.float64) - one.waveform[row]
            stretch = added[added != 0]
            if len(stretch) > 6000:
                primary = np.mean(one.waveform[row].astype(np.float64) ** 2)
                ratios.append(10 * np.log10(primary / np.mean(stretch**2)))
    # A stretch of a noise has about, not exactly, the energy of the whole of it.
    assert len(ratios) > 20 and np.median(ratios) == pytest.approx(7.0, abs=1.0)


def test_share_of_mixed_rows(corpus):
    cfg = dataclasses.replace(CLEAN, mixing=MixingConfig(), lengths=(16_000,))
    partners = np.concatenate([batch.partner for batch in first(cfg, corpus, (), 60)])
    assert np.mean(partners != NO_UTTERANCE) == pytest.approx(0.2 * 0.9, abs=4 * np.sqrt(0.18 * 0.82 / len(partners)))


def test_noise_from_a_folder(corpus, tmp_path):
    tone = np.sin(np.arange(160_000) * 2 * np.pi * 3000 / 16_000).astype(np.float32)
    soundfile.write(tmp_path / "tone.wav", tone, 16_000)
    noisy = MixingConfig(probability=1.0, noise_share=1.0, noise_folder=str(tmp_path))
    clean, mixed = first(CLEAN, corpus, (), 3), first(dataclasses.replace(CLEAN, mixing=noisy), corpus, (), 3)
    for one, other in zip(clean, mixed, strict=True):
        added = (other.waveform - one.waveform).sum(0)
        spectrum = np.abs(np.fft.rfft(added))
        assert np.argmax(spectrum) * 16_000 / len(added) == pytest.approx(3000, abs=20)


def test_a_missing_noise_folder_is_named_at_once(corpus, tmp_path):
    cfg = dataclasses.replace(CLEAN, mixing=MixingConfig(noise_folder=str(tmp_path / "nothing")))
    with pytest.raises(SourceError, match="nothing"):
        train_batches(cfg, corpus, ())


# --- training: what cannot be run ---


def test_rows_per_step_keep_the_seconds(corpus):
    assert [rows_per_step(length, cfg=CLEAN) for length in LENGTHS] == [12, 6, 4]
    nearly = dataclasses.replace(CLEAN, lengths=(15_920,))
    assert rows_per_step(15_920, cfg=nearly) == 12
    with pytest.raises(PipelineError, match=r"would take 2\.400 rows of length 80000 \(5 s\).*seconds_per_step = 10"):
        dataclasses.replace(CLEAN, lengths=(80_000,))
    with pytest.raises(PipelineError, match=r"0\.500 rows"):
        dataclasses.replace(CLEAN, lengths=(384_000,))


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds_per_step": 0.0},
        {"seconds_per_step": float("nan")},
        {"seed": -1},
        {"workers": -1},
        {"threads": -1},
        {"prefetch": 0},
    ],
)
def test_configurations_that_cannot_be_meant(changes):
    with pytest.raises(PipelineError, match=next(iter(changes))):
        dataclasses.replace(CLEAN, **changes)


def test_hosts_that_cannot_share_a_step(corpus):
    with pytest.raises(
        PipelineError, match=r"length 16000 has 12 rows, which 5 hosts .* a number that divides \d+ can; a new run"
    ):
        train_batches(CLEAN, corpus, (), hosts=5)
    for host, hosts in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(PipelineError, match=f"host {host} of {hosts}"):
            train_batches(CLEAN, corpus, (), host=host, hosts=hosts)
    with pytest.raises(PipelineError, match="start is -1"):
        train_batches(CLEAN, corpus, (), start=-1)


def test_a_corpus_too_small_for_a_step(corpus):
    with pytest.raises(SamplingError, match="crops of that length are in the TRAIN split: lower seconds_per_step"):
        train_batches(dataclasses.replace(CLEAN, seconds_per_step=1200.0), corpus, ())


def test_an_utterance_too_short_for_every_length_is_named(corpus):
    cfg = dataclasses.replace(CLEAN, lengths=(48_000,))
    with pytest.raises(CropError, match=r"(deu|eng|fra)/[xy] utterance \d\d has .*--min-seconds 3 "):
        train_batches(cfg, corpus, ())


def test_a_damaged_shard_is_named_where_it_is_met(corpus, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(corpus.root, copy)
    for shard in corpus.shard_names:
        path = copy / shard
        path.write_bytes(bytes(path.stat().st_size))
    damaged = Manifest.load(copy)
    for workers in (0, 1):
        cfg = dataclasses.replace(CLEAN, workers=workers, threads=1)
        with train_batches(cfg, damaged, ()) as batches, pytest.raises(SourceError, match=str(copy / "shards")):
            next(batches)
