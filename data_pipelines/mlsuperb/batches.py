"""Batches of a track, in the benchmark's way: neighbours in length together, batches in a new order each time round.

Utterances are sorted by length, the longest first, and cut into len // size batches as evenly as can be, so that none
has fewer rows than asked (ESPnet `espnet2/samplers/sorted_batch_sampler.py`). Batches are shuffled anew in each pass
over them (`espnet2/iterators/sequence_iter_factory.py`); the order is ours, a function of (seed, pass). Batch k is a
function of (track, configuration, k): there is no state, and training resumes with one integer.

Rows are padded to one of a few static lengths. Nothing depends on how far (`wavlab_jax.downstream`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import grain
import numpy as np

from data_pipelines.ahead import Batches
from data_pipelines.batch import NO_UNIT, NO_UTTERANCE, RECEPTIVE_FIELD, SAMPLE_RATE, Batch, check_batch, num_frames
from data_pipelines.mlsuperb.layout import MlSuperbError, Part
from data_pipelines.mlsuperb.recordings import read_recording
from data_pipelines.mlsuperb.tracks import Example, Track
from data_pipelines.permutations import hash64, permute

LABELS = 0  # of the sets of `Batch.units`, the one that holds a row's tokens, from its first frame on


@dataclass(frozen=True)
class TrackBatchesConfig:
    """Attributes:
    size: utterances of a batch (ESPnet's batch_size 8).
    step: seconds; static lengths are its multiples, up to the longest utterance.
    doubling: but only those by 1, 2, 4, ...: fewer programs to compile, and more padding.
    fillers: whether batches with a row less than the widest are filled up: one program a length, where there are two.
    seed: of the order.
    threads, prefetch: batches that are made ahead.
    """

    size: int = 8
    step: float = 2.0
    doubling: bool = False
    fillers: bool = False
    seed: int = 0
    threads: int = 2
    prefetch: int = 8

    def __post_init__(self):
        if self.size < 1 or not self.step > 0:
            raise MlSuperbError(f"a batch has at least one utterance, and lengths a positive step: got {self}")


def sorted_batches(seconds: Sequence[float], *, size: int) -> list[np.ndarray]:
    """Indices of the utterances of each batch, the longest first; every batch has `size` of them or more, if there are.

    Equal lengths keep their order.
    """
    order = np.argsort(-np.asarray(seconds), kind="stable")
    count = max(len(order) // size, 1)
    return [order[i * len(order) // count : (i + 1) * len(order) // count] for i in range(count)]


class LoadTrackBatch(grain.transforms.Map):
    """Batch number k to Batch k of a part of a track: rows padded to one static length.

    `Batch.units` [rows, frames, 1] holds a row's tokens from its first frame on, `NO_UNIT` after them. Of more tokens
    than these frames, the first one fills all of them: no head can spell that either, so that such a row has no loss.
    `utterance` is the index of the example in the part, `language` that of its language among `languages`. Rows that a
    batch lacks to the widest one are fillers without a frame, if they are asked for.
    """

    def __init__(self, track: Track, part: Part, cfg: TrackBatchesConfig, *, training: bool):
        self.examples: list[Example] = track.parts[part]
        self.cfg, self.training = cfg, training
        self.labels = [np.asarray(track.encode(each.tokens), np.int32) for each in self.examples]
        self.languages = sorted({each.utterance.language for each in self.examples})
        self.batches = sorted_batches([each.utterance.seconds for each in self.examples], size=cfg.size)
        self.widest = max(map(len, self.batches))

    def __len__(self) -> int:
        return len(self.batches)

    def rows_of(self, chosen: np.ndarray) -> int:
        """Rows of the batch of these utterances."""
        return self.widest if self.cfg.fillers else len(chosen)

    def map(self, element: int) -> Batch:
        """Batch `element`; in training, of endless passes over the batches in new orders; else of one, in order."""
        number = int(element)
        if self.training:
            turn, place = divmod(number, len(self.batches))
            seed = hash64(self.cfg.seed, turn)
            number = int(permute(np.array([place]), size=len(self.batches), seed=seed)[0])
        chosen = self.batches[number]
        waveforms = [read_recording(self.examples[index].utterance.path) for index in chosen]
        samples = self.static_length(max(map(len, waveforms)))
        frames, rows = num_frames(samples), self.rows_of(chosen)
        batch = Batch(
            waveform=np.zeros((rows, samples), np.float32),
            clean=np.zeros((rows, 0), np.float32),
            units=np.full((rows, frames, 1), NO_UNIT, np.int32),
            valid=np.zeros((rows, frames), np.bool_),
            samples=np.zeros(rows, np.int32),
            language=np.zeros(rows, np.int32),
            utterance=np.full(rows, NO_UTTERANCE, np.int32),
            partner=np.full(rows, NO_UTTERANCE, np.int32),
            start=np.zeros(rows, np.int32),
            seed=np.zeros(rows, np.uint32),
        )
        for row, (index, waveform) in enumerate(zip(chosen, waveforms, strict=True)):
            labels = self.labels[index]
            if len(labels) > frames:  # cut, they could be spelled; one token over and over takes a blank between
                labels = np.full(frames, labels[0])
            batch.waveform[row, : len(waveform)] = waveform
            batch.samples[row] = len(waveform)
            batch.valid[row, : num_frames(len(waveform))] = True
            batch.units[row, : len(labels), LABELS] = labels
            batch.utterance[row] = index
            batch.language[row] = self.languages.index(self.examples[index].utterance.language)
            batch.seed[row] = hash64(self.cfg.seed, int(element), row) & 0xFFFFFFFF
        return check_batch(batch)

    def static_length(self, samples: int) -> int:
        """The smallest multiple of the step (by a power of two if `doubling`) that holds `samples`, and a frame."""
        step = round(self.cfg.step * SAMPLE_RATE)
        times = -(-samples // step)
        if self.cfg.doubling:
            times = 1 << max(times - 1, 0).bit_length()
        return max(times * step, RECEPTIVE_FIELD)


def track_batches(
    track: Track, part: Part, cfg: TrackBatchesConfig, *, start: int = 0, training: bool = False
) -> Batches:
    """Batches from number `start` on, read ahead: without end in `training`, else once through the part.

    Use it in a `with`. Raises AudioError naming a recording that cannot be read.
    """
    load = LoadTrackBatch(track, part, cfg, training=training)
    dataset = grain.MapDataset.range(1 << 62 if training else len(load)).map(load)[start:]
    return Batches(dataset, threads=cfg.threads, prefetch=cfg.prefetch, first=start)
