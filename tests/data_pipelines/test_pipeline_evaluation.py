"""Batches for evaluation, the names of rows, and the iterator itself."""

from collections import Counter

import numpy as np
import pytest

from data_pipelines.ahead import Batches
from data_pipelines.batch import HOP, NO_UNIT, NO_UTTERANCE, Batch, num_frames
from data_pipelines.crops import CropError
from data_pipelines.manifest import Split
from data_pipelines.pipeline import (
    PipelineError,
    describe_rows,
    eval_batches,
    train_batches,
)
from tests.data_pipelines.ramps import CLEAN, LENGTHS, MIXED, assert_same, first, ramp

# --- evaluation ---


def evaluated(corpus, units, rows, lengths=LENGTHS, rows_per_batch=4, **keywords) -> list[Batch]:
    with eval_batches(corpus, units, rows, lengths=lengths, rows_per_batch=rows_per_batch, **keywords) as batches:
        return list(batches)


@pytest.mark.parametrize("lengths", [LENGTHS, (16_000,), (20_001, 30_000), (200_000,)])
def test_every_frame_of_every_clip_once(corpus, units, lengths):
    rows = corpus.rows(Split.DEV)
    seen = {int(i): [] for i in rows}
    whole = Counter()
    for batch in evaluated(corpus, units, rows, lengths):
        samples = batch.waveform.shape[1]
        assert samples in lengths and batch.waveform.shape[0] == 4
        for row, (i, start) in enumerate(zip(batch.utterance.tolist(), batch.start.tolist(), strict=True)):
            if i == NO_UTTERANCE:
                assert not batch.valid[row].any() and not batch.waveform[row].any()
                assert (batch.units[row] == NO_UNIT).all()
                continue
            real = int(batch.valid[row].sum())
            assert batch.valid[row, :real].all()  # padding comes last
            assert (batch.units[row, real:] == NO_UNIT).all()
            assert batch.units[row, :real, 0].tolist() == [500 * i + start // HOP + t for t in range(real)]
            seen[i] += batch.units[row, :real, 0].tolist()
            held = min(samples, int(corpus.samples[i]) - start)
            assert num_frames(held) == real
            expected = ramp(int(corpus.id(i)), start, held) / np.float32(32768)
            np.testing.assert_array_equal(batch.waveform[row, :held], expected)
            assert not batch.waveform[row, held:].any()
            assert not any(held <= shorter < samples for shorter in lengths)
            assert batch.language[row] == corpus.language[i] and batch.partner[row] == NO_UTTERANCE
            whole[i] += corpus.samples[i] <= max(lengths)
    for i, labels in seen.items():
        assert sorted(labels) == [500 * i + t for t in range(num_frames(int(corpus.samples[i])))]
        assert whole[i] == (corpus.samples[i] <= max(lengths))  # one row for each clip that fits


def test_fillers_only_at_the_end_of_a_length(corpus):
    batches = evaluated(corpus, (), corpus.rows(Split.DEV), rows_per_batch=8)
    lengths = [batch.waveform.shape[1] for batch in batches]
    assert lengths == sorted(lengths)
    for batch, following in zip(batches, [*lengths[1:], None], strict=True):
        real = batch.utterance != NO_UTTERANCE
        assert real.any()
        assert (np.diff(real.astype(int)) <= 0).all()
        assert real.all() or following != batch.waveform.shape[1]


def test_evaluation_draws_nothing(corpus, units):
    rows = corpus.rows(Split.TEST)
    for one, other in zip(evaluated(corpus, units, rows), evaluated(corpus, units, rows), strict=True):
        assert_same(one, other)

    def seeds(batches):
        return {
            (i, start): seed
            for batch in batches
            for i, start, seed in zip(batch.utterance.tolist(), batch.start.tolist(), batch.seed.tolist(), strict=True)
            if i != NO_UTTERANCE
        }

    # A clip's seed does not depend on what lies beside it, and differs from window to window.
    alone, beside = seeds(evaluated(corpus, units, rows[-1:])), seeds(evaluated(corpus, units, rows, rows_per_batch=3))
    assert alone.items() <= beside.items()
    assert len(set(beside.values())) == len(beside)


def test_hosts_share_evaluation_batches(corpus, units):
    rows = corpus.rows(Split.DEV)
    shares = [evaluated(corpus, units, rows, host=host, hosts=2) for host in range(2)]
    for batch, *parts in zip(evaluated(corpus, units, rows), *shares, strict=True):
        assert_same(batch, Batch(*(np.concatenate(fields) for fields in zip(*parts, strict=True))))


def test_a_language_that_was_never_trained_on_can_be_evaluated(corpus):
    (clip,) = (i for i in corpus.rows(Split.TEST) if corpus.languages[corpus.language[i]] == "ukr")
    batches = evaluated(corpus, (), [clip])
    assert {int(i) for batch in batches for i in batch.utterance} <= {int(clip), NO_UTTERANCE}
    assert corpus.languages[batches[0].language[0]] == "ukr"


def test_what_cannot_be_evaluated(corpus):
    with pytest.raises(PipelineError, match="no utterances to evaluate"):
        eval_batches(corpus, (), [], lengths=LENGTHS, rows_per_batch=4)
    with pytest.raises(PipelineError, match=r"utterances 0\.\.66 asked of a corpus of 66"):
        eval_batches(corpus, (), [0, 66], lengths=LENGTHS, rows_per_batch=4)
    with pytest.raises(PipelineError, match="positive multiple of the 2 hosts"):
        eval_batches(corpus, (), [0], lengths=LENGTHS, rows_per_batch=3, hosts=2)
    with pytest.raises(CropError, match="ascend"):
        eval_batches(corpus, (), [0], lengths=(32_000, 16_000), rows_per_batch=4)


# --- naming ---


def test_every_row_names_its_clips(corpus, units):
    for batch in first(MIXED, corpus, units, 3):
        lines = describe_rows(batch, corpus)
        assert len(lines) == len(batch.utterance)
        for row, line in enumerate(lines):
            i, partner = batch.utterance[row], batch.partner[row]
            begin = batch.start[row] / 16_000
            assert line.startswith(f"row {row}: {corpus.describe(i)}, {begin:.2f}-")
            assert line.endswith(f"mixed with {corpus.describe(partner)}")
    (clip,) = corpus.rows(Split.DEV)[:1]
    batch = evaluated(corpus, (), [clip], lengths=(200_000,))[0]
    total = corpus.samples[clip] / 16_000
    assert describe_rows(batch, corpus) == [
        f"row 0: {corpus.describe(clip)}, 0.00-{total:.2f} of {total:.2f} s",
        "row 1: filler",
        "row 2: filler",
        "row 3: filler",
    ]


def test_batches_is_an_iterator(corpus):
    with train_batches(CLEAN, corpus, ()) as batches:
        assert isinstance(batches, Batches) and iter(batches) is batches
