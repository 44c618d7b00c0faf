"""The chain from a step number to a batch, spelled in one place.

    step k ─ sampling ▶ length, utterances, crops ─ sources ▶ clean ─ mixing ▶ noisy ─ units ▶ labels ▶ Batch k

Batch k is a pure function of (corpus, configuration, k). Grain reads ahead, in threads and processes; it holds no state
that matters, so a run is resumed with one integer, at any number of hosts, workers and threads.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import grain
import numpy as np

from data_pipelines.ahead import Batches
from data_pipelines.balance import DrawConfig
from data_pipelines.batch import (
    NO_UNIT,
    NO_UTTERANCE,
    SAMPLE_RATE,
    Batch,
    check_batch,
    num_frames,
)
from data_pipelines.crops import CropError, check_lengths, windows
from data_pipelines.interference import Interferer
from data_pipelines.manifest import Manifest, Split
from data_pipelines.mixing import MixingConfig
from data_pipelines.reverberation import ReverbConfig
from data_pipelines.sampling import Draw
from data_pipelines.shared_batches import Wanted, batch_arrays, bytes_of
from data_pipelines.sources import ShardSource
from data_pipelines.stalls import STALL_SECONDS
from data_pipelines.units import UnitStore

STEPS = 1 << 62  # as good as infinite
SECONDS_TOLERANCE = 0.01  # steps of different lengths may differ this much in audio


class PipelineError(ValueError):
    """A data configuration that cannot be run; the message names the field and what to change."""


@dataclass(frozen=True)
class DataConfig:
    """How training batches are made.

    Attributes:
        lengths: static lengths in samples, ascending. Every row of a step has the same one.
        seconds_per_step: audio in one step, over all hosts; constant, whatever the length.
        draw: balance of languages and corpora. mixing: what is mixed in; None mixes nothing.
        reverb: how many rows are in rooms, and in which; by default none.
        keep_clean: whether batches carry the clean waveform too, for targets that are computed in the step.
        seed: of everything random here.
        workers: processes that make batches; 0 makes them in this one. threads: in each of them; 0 reads nothing ahead.
        prefetch: batches made ahead.
    """

    lengths: tuple[int, ...] = (64_000, 128_000, 256_000)
    seconds_per_step: float = 64.0
    draw: DrawConfig = field(default_factory=DrawConfig)
    mixing: MixingConfig | None = field(default_factory=MixingConfig)
    reverb: ReverbConfig = field(default_factory=lambda: ReverbConfig(probability=0.0))
    keep_clean: bool = False
    seed: int = 0
    workers: int = 0
    threads: int = 2
    prefetch: int = 4

    def __post_init__(self):
        check_lengths(self.lengths)
        if not (math.isfinite(self.seconds_per_step) and self.seconds_per_step > 0):
            raise PipelineError(f"seconds_per_step is {self.seconds_per_step}; it must be positive")
        for name, least in (("seed", 0), ("workers", 0), ("threads", 0), ("prefetch", 1)):
            if getattr(self, name) < least:
                raise PipelineError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for length in self.lengths:
            rows_per_step(length, cfg=self)


def rows_per_step(length: int, *, cfg: DataConfig) -> int:
    """Rows of a step of static length `length` samples, over all hosts.

    Raises PipelineError if whole rows cannot keep `seconds_per_step` to within a percent.
    """
    wanted = cfg.seconds_per_step * SAMPLE_RATE / length
    rows = round(wanted)
    if rows < 1 or abs(rows / wanted - 1) > SECONDS_TOLERANCE:
        raise PipelineError(
            f"a step of {cfg.seconds_per_step:g} s would take {wanted:.3f} rows of length {length} "
            f"({length / SAMPLE_RATE:g} s): choose lengths that divide seconds_per_step to within "
            f"{SECONDS_TOLERANCE:.0%}, for instance seconds_per_step = {max(1, rows) * length / SAMPLE_RATE:g}"
        )
    return rows


class LoadBatch(grain.transforms.Map):
    """Step number k to Batch k, or to one host's rows of it.

    Pickles as its arguments; each process opens the corpus and builds the draw for itself.
    """

    def __init__(
        self, cfg: DataConfig, manifest: Manifest, units: Sequence[UnitStore], *, host: int = 0, hosts: int = 1
    ):
        self.cfg, self.manifest, self.units, self.host, self.hosts = cfg, manifest, units, host, hosts
        self.rows = tuple(rows_per_step(length, cfg=cfg) for length in cfg.lengths)
        _check_hosts(host, hosts)
        for length, rows in zip(cfg.lengths, self.rows, strict=True):
            if rows % hosts:
                raise PipelineError(
                    f"a step of length {length} has {rows} rows, which {hosts} hosts cannot share evenly: a "
                    f"number that divides {math.gcd(*self.rows)} can; a new run may have another seconds_per_step or "
                    "lengths"
                )
        self.draw = Draw(manifest, lengths=cfg.lengths, rows=self.rows, cfg=cfg.draw, split=Split.TRAIN, seed=cfg.seed)
        self.source = ShardSource(manifest)
        self.interferer = Interferer(self.draw, self.source, mixing=cfg.mixing, reverb=cfg.reverb)

    def __deepcopy__(self, memo) -> "LoadBatch":  # Grain copies the chain for each worker; nothing in here changes
        return self

    def __reduce__(self):
        return _load_batch, (self.cfg, self.manifest, self.units, self.host, self.hosts)

    @property
    def batch_bytes(self) -> int:
        """What the largest batch takes."""
        return max(bytes_of(self._empty(place)) for place in range(len(self.rows)))

    def _empty(self, place: int) -> Batch:
        rows, samples = self.rows[place] // self.hosts, self.cfg.lengths[place]
        return _empty_batch(rows, samples, sets=len(self.units), clean=self.cfg.keep_clean, silent=False)

    def map(self, element: int) -> Batch:
        """Batch `element`: waveform [rows of this host, samples], the rest to match."""
        step = int(element)
        place, first_row = self.draw.step(step)
        rows, samples = self.rows[place], self.cfg.lengths[place]
        own = range(rows * self.host // self.hosts, rows * (self.host + 1) // self.hosts)
        batch = self._empty(place)
        drawn = self.draw.take(place, first_row + own.start, len(own))
        batch.utterance[:], batch.start[:] = drawn.utterance, drawn.start
        batch.language[:] = self.manifest.language[drawn.utterance]
        batch.valid[:], batch.samples[:] = True, samples
        drawn_rows = zip(own, drawn.utterance.tolist(), drawn.start.tolist(), strict=True)
        for at, (row, utterance, start) in enumerate(drawn_rows):
            # Everything else that is random about a row comes from this one generator.
            rng = np.random.default_rng([self.cfg.seed, step, row])
            batch.seed[at] = rng.integers(1 << 32, dtype=np.uint32)
            # Decoded where it belongs: nothing is copied that stays as it was.
            clean = (batch.clean if self.cfg.keep_clean else batch.waveform)[at]
            self.source.read(utterance, start=start, samples=samples, out=clean)
            heard = self.interferer.disturb(clean, place=place, row=first_row + row, rng=rng)
            if heard.waveform is not clean or self.cfg.keep_clean:
                batch.waveform[at] = heard.waveform
            batch.partner[at] = heard.partner
            for at_set, store in enumerate(self.units):
                batch.units[at, :, at_set] = store.crop(utterance, start=start, frames=num_frames(samples))
        return check_batch(batch)


def train_dataset(
    cfg: DataConfig, manifest: Manifest, units: Sequence[UnitStore], *, host: int = 0, hosts: int = 1
) -> grain.MapDataset:
    """The training batches as a random-access dataset: element k is Batch k, or this host's rows of it.

    Rows of host h of H are h*rows/H .. (h+1)*rows/H of the batch that one host alone would load. `units`: a store for
    each set of labels, perhaps none. Raises PipelineError, SamplingError, CropError, SourceError for what cannot run.
    """
    return grain.MapDataset.range(STEPS).map(LoadBatch(cfg, manifest, units, host=host, hosts=hosts))


def train_batches(
    cfg: DataConfig,
    manifest: Manifest,
    units: Sequence[UnitStore],
    *,
    start: int = 0,
    host: int = 0,
    hosts: int = 1,
    stall_seconds: float = STALL_SECONDS,
) -> Batches:
    """Batches `start`, `start` + 1, ... without end, read ahead; see `train_dataset`. Close it, or use it in a `with`.

    `start` is all there is to resuming. Raises what `train_dataset` raises, before anything is read, and StorageError
    where shards at an address cannot be fetched.
    """
    if start < 0:
        raise PipelineError(f"start is {start}; the first batch is 0")
    load = LoadBatch(cfg, manifest, units, host=host, hosts=hosts)
    load.source.fetch()
    return Batches(
        grain.MapDataset.range(STEPS).map(load)[start:],
        workers=cfg.workers,
        threads=cfg.threads,
        prefetch=cfg.prefetch,
        first=start,
        batch_bytes=load.batch_bytes,
        stall_seconds=stall_seconds,
    )


class _HeldOut(NamedTuple):
    """A planned batch: its static length, and (utterance, start, samples) of each row; missing rows become fillers."""

    length: int
    rows: list[tuple[int, int, int]]


class LoadHeldOut(grain.transforms.Map):
    """Batch number to a batch of held-out windows, padded to their static length. Draws nothing."""

    def __init__(
        self,
        manifest: Manifest,
        units: Sequence[UnitStore],
        plan: Sequence[_HeldOut],
        *,
        rows_per_batch: int,
        host: int = 0,
        hosts: int = 1,
    ):
        self.manifest, self.units, self.plan = manifest, units, plan
        self.rows_per_batch, self.host, self.hosts = rows_per_batch, host, hosts
        self.source = ShardSource(manifest)

    def map(self, element: int) -> Batch:
        """Batch `element`: waveform [rows of this host, samples], zero where padded, and the rest to match."""
        length, planned = self.plan[int(element)]
        own = range(self.rows_per_batch * self.host // self.hosts, self.rows_per_batch * (self.host + 1) // self.hosts)
        batch = _empty_batch(len(own), length, sets=len(self.units))
        for at, row in enumerate(own):
            if row >= len(planned):
                continue
            utterance, start, samples = planned[row]
            frames = num_frames(samples)
            self.source.read(utterance, start=start, samples=samples, out=batch.waveform[at, :samples])
            batch.valid[at, :frames], batch.samples[at] = True, samples
            for at_set, store in enumerate(self.units):
                batch.units[at, :frames, at_set] = store.crop(utterance, start=start, frames=frames)
            batch.utterance[at], batch.start[at] = utterance, start
            batch.language[at] = self.manifest.language[utterance]
            # The same clip is masked in the same way wherever it lies and whatever is evaluated beside it.
            batch.seed[at] = zlib.crc32(f"{self.manifest.id(utterance)}:{start}".encode())
        return check_batch(batch)


def eval_batches(
    manifest: Manifest,
    units: Sequence[UnitStore],
    rows: Sequence[int],
    *,
    lengths: Sequence[int],
    rows_per_batch: int,
    host: int = 0,
    hosts: int = 1,
    threads: int = 2,
    prefetch: int = 4,
) -> Batches:
    """Each of the utterances `rows` (rows of the manifest) once, in batches of `rows_per_batch` rows over all hosts.

    A clip is padded to the smallest static length that holds it, and `valid` marks its real frames; a longer one is cut
    into windows whose frames tile its frames. Batches come by ascending length, clips in the order of `rows`; what is
    left of a length is filled up with rows of `NO_UTTERANCE` without valid frames. Nothing is random, nothing is mixed;
    `seed` depends on clip and window only.

    Raises PipelineError: no rows, rows that the manifest does not have, rows that hosts cannot share. Raises CropError
    naming a clip without a single frame.
    """
    lengths = check_lengths(lengths)
    rows = np.asarray(rows, np.int64)
    if rows.ndim != 1 or not len(rows):
        raise PipelineError("no utterances to evaluate: is the split empty? (see the manifest's seconds by split)")
    if not (0 <= rows.min() and rows.max() < len(manifest.samples)):
        raise PipelineError(f"utterances {rows.min()}..{rows.max()} asked of a corpus of {len(manifest.samples)}")
    _check_hosts(host, hosts)
    if rows_per_batch < 1 or rows_per_batch % hosts:
        raise PipelineError(f"rows_per_batch is {rows_per_batch}; it must be a positive multiple of the {hosts} hosts")
    by_length: dict[int, list[tuple[int, int, int]]] = {length: [] for length in lengths}
    for utterance in rows.tolist():
        try:
            for window in windows(int(manifest.samples[utterance]), lengths=lengths):
                by_length[window.length].append((utterance, window.start, window.samples))
        except CropError as error:
            raise CropError(f"{manifest.describe(utterance)}: {error}") from None
    plan = [
        _HeldOut(length, planned[first : first + rows_per_batch])
        for length, planned in by_length.items()
        for first in range(0, len(planned), rows_per_batch)
    ]
    load = LoadHeldOut(manifest, units, plan, rows_per_batch=rows_per_batch, host=host, hosts=hosts)
    load.source.fetch()
    return Batches(grain.MapDataset.range(len(plan)).map(load), threads=threads, prefetch=prefetch)


def describe_rows(batch: Batch, manifest: Manifest) -> list[str]:
    """One line for each row of a batch [rows]: which utterance, which seconds of it, and what was mixed in."""
    seconds = batch.waveform.shape[1] / SAMPLE_RATE
    lines = []
    for row, (utterance, partner, start) in enumerate(zip(batch.utterance, batch.partner, batch.start, strict=True)):
        if utterance == NO_UTTERANCE:
            lines.append(f"row {row}: filler")
            continue
        total = manifest.samples[utterance] / SAMPLE_RATE
        begin = start / SAMPLE_RATE
        end = min(begin + seconds, total)
        line = f"row {row}: {manifest.describe(utterance)}, {begin:.2f}-{end:.2f} of {total:.2f} s"
        lines.append(line if partner == NO_UTTERANCE else f"{line}, mixed with {manifest.describe(partner)}")
    return lines


def _empty_batch(rows: int, samples: int, *, sets: int, clean: bool = False, silent: bool = True) -> Batch:
    """A batch of filler rows: silence (or, not `silent`, whatever the memory holds), no units, nothing valid."""
    frames = num_frames(samples)
    wanted = Batch(
        waveform=Wanted(np.float32, (rows, samples)),
        clean=Wanted(np.float32, (rows, samples if clean else 0)),
        units=Wanted(np.int32, (rows, frames, sets)),
        valid=Wanted(np.bool_, (rows, frames)),
        samples=Wanted(np.int32, (rows,)),
        language=Wanted(np.int32, (rows,)),  # a filler's is 0, so that it can index; nothing of it is valid
        utterance=Wanted(np.int32, (rows,)),
        partner=Wanted(np.int32, (rows,)),
        start=Wanted(np.int32, (rows,)),
        seed=Wanted(np.uint32, (rows,)),
    )
    batch = Batch(*batch_arrays(wanted))
    fillers = {"units": NO_UNIT, "utterance": NO_UTTERANCE, "partner": NO_UTTERANCE}
    for name, array in zip(Batch._fields, batch, strict=True):
        if silent or name not in ("waveform", "clean"):
            array[...] = fillers.get(name, 0)
    return batch


def _check_hosts(host: int, hosts: int) -> None:
    if hosts < 1 or not 0 <= host < hosts:
        raise PipelineError(f"host {host} of {hosts}; hosts are numbered from 0")


def _load_batch(cfg: DataConfig, manifest: Manifest, units: Sequence[UnitStore], host: int, hosts: int) -> LoadBatch:
    return LoadBatch(cfg, manifest, units, host=host, hosts=hosts)
