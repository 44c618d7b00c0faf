"""What units are made of, for any utterances of a corpus: MFCC or a layer of an encoder, or straight away its units.

    utterances ─ windows by length ─ read ahead, in threads ─ rows over the devices ─▶ features, or nearest centroids

An utterance of up to the largest window is computed in one piece, padded. A longer one is cut into windows that
overlap, and of each the frames are kept that have their context, or all that there is, so that no frame is lost or
doubled at a border. MFCC need two frames of context (deltas of deltas): theirs are those of one piece. An encoder's
convolutions are exact, too, because they are given the moments of the whole recording; its Transformer attends to the
window alone, with `ENCODER_CONTEXT` on each side of what is kept, as in `wavlab_jax.streaming`.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data_pipelines.batch import HOP, SAMPLE_RATE, num_frames
from wavlab_jax.encoder import Encoder, encode, formulation_for
from wavlab_jax.encoder.encoder import encode_features
from wavlab_jax.encoder.frontend import WholeMoments
from wavlab_jax.features import MFCC_WIDTH, mfcc
from wavlab_jax.sharding import BATCH_AXES, local_mesh
from wavlab_jax.streaming import Extractor, WindowConfig, plan_windows
from wavlab_jax.targets.kmeans import nearest_unit

# Utterances are padded to the smallest of these; longer ones are cut into windows of the last. Samples.
WINDOWS = tuple(seconds * SAMPLE_RATE for seconds in (2, 4, 8, 16, 32))
PASS_SECONDS = 64.0  # audio that a device computes at once
MFCC_CONTEXT = 2 * HOP / SAMPLE_RATE  # s: each of the two deltas looks 2 frames of 10 ms to either side
ENCODER_CONTEXT = 5.0  # s, as `WindowConfig.context`
READ_AHEAD = 2  # batches that threads read while the devices work on another
_BLOCK = 60 * SAMPLE_RATE  # samples of a long utterance that its moments are taken of at once

T, R = TypeVar("T"), TypeVar("R")
Read = Callable[..., np.ndarray]  # (utterance, start=, samples=) to float32 [samples]: `ShardSource.read`


class UnitWindow(NamedTuple):
    """A stretch of an utterance: `samples` from sample `start` on, of whose frames `skip` are dropped, `keep` kept.

    The first one kept is frame `frame` of the utterance. `length`: samples it is padded to. `whole`: of the utterance
    it is all there is.
    """

    utterance: int
    start: int
    samples: int
    skip: int
    keep: int
    frame: int
    length: int
    whole: bool


class FrameExtractor:
    """Features of 50 frames a second, computed on this process' own devices of a mesh.

    Args:
        encoder: whose layer is wanted; None: MFCC, every second frame of 100 Hz. layer: 0 is the input of its first
            layer, n the output of layer n. mesh: rows are split over its local devices.
        windows, context: samples and seconds, see the module; by default `WINDOWS` and what the features need.
        pass_seconds: audio that a device computes at once; by default `PASS_SECONDS`.

    Attributes:
        width: of the features.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        *,
        layer: int = 0,
        mesh: Mesh,
        windows: Sequence[int] = WINDOWS,
        context: float | None = None,
        pass_seconds: float | None = None,
    ):
        self.pass_seconds = PASS_SECONDS if pass_seconds is None else pass_seconds
        self.mesh, self.layer, self.windows = local_mesh(mesh), layer, tuple(windows)
        self.encoder = None if encoder is None else _for_labelling(encoder)
        self.width = MFCC_WIDTH if encoder is None else encoder.config.width
        if context is None:
            context = MFCC_CONTEXT if encoder is None else ENCODER_CONTEXT
        # Shorter by what the last frame of a recording may leave over: MFCC hear that as well.
        self.cut = WindowConfig(window=(self.windows[-1] - HOP + 1) / SAMPLE_RATE, context=context)
        self._measure = None if encoder is None else Extractor(encoder, layers=(layer,), cfg=self.cut)
        rows, everywhere = NamedSharding(self.mesh, P(BATCH_AXES)), NamedSharding(self.mesh, P())
        self._rows = rows
        formulation = formulation_for(self.mesh.devices.flat[0].platform)
        # Unrolled on every platform: layers above the wanted one are then never computed.
        of = partial(_hidden, layer=layer, frames=self.cut.frames, formulation=formulation._replace(scan_layers=False))
        self._compute = jax.jit(
            lambda encoder, centers, waveform, samples, whole: _labelled(
                centers, mfcc_frames(waveform, samples) if encoder is None else of(encoder, waveform, samples, whole)
            ),
            in_shardings=(None, everywhere, rows, rows, rows),
            out_shardings=rows,
        )

    def features(
        self,
        rows: Sequence[int],
        samples: np.ndarray,
        read: Read,
        *,
        chosen: np.ndarray | None = None,
        dtype: str = "float32",
        progress: Callable[[int], None] = lambda samples: None,
    ) -> np.ndarray:
        """[frames, width] of the utterances `rows`, one after another; with `chosen`, only these of them.

        Args:
            rows: utterances. samples: of every utterance of the corpus. read: gives their audio.
            chosen: ascending indices into the frames of all `rows` together.
            progress: called with the number of samples that were done, now and then.
        """
        return self._extract(rows, samples, read, None, chosen, (self.width,), dtype, progress)

    def units(
        self,
        rows: Sequence[int],
        samples: np.ndarray,
        read: Read,
        *,
        centers: np.ndarray,
        progress: Callable[[int], None] = lambda samples: None,
    ) -> np.ndarray:
        """int32 [frames]: of the same frames, the nearest of `centers` [units, width], found on the devices."""
        return self._extract(rows, samples, read, np.asarray(centers, np.float32), None, (), "int32", progress)

    def plan(self, utterance: int, samples: int) -> Iterator[UnitWindow]:
        """The windows whose kept frames are all frames of an utterance, each once, in order."""
        frames = num_frames(samples)
        if samples <= self.windows[-1]:
            length = next(length for length in self.windows if samples <= length)
            yield UnitWindow(utterance, 0, samples, 0, frames, 0, length, True)
            return
        for window in plan_windows(frames, cfg=self.cut):
            start, kept = window.start * HOP, window.keep_to - window.keep_from
            heard, skipped = min(samples - start, self.windows[-1]), window.keep_from - window.start
            yield UnitWindow(utterance, start, heard, skipped, kept, window.keep_from, self.windows[-1], False)

    def _extract(self, rows, samples, read, centers, chosen, shape, dtype, progress) -> np.ndarray:
        ends = np.cumsum([num_frames(int(samples[i])) for i in rows], dtype=np.int64)
        first = dict(zip((int(i) for i in rows), (ends - np.diff(ends, prepend=0)).tolist(), strict=True))
        count = int(ends[-1]) if len(ends) else 0
        out = np.empty((count if chosen is None else len(chosen), *shape), dtype)
        for batch, found in self._batches(rows, samples, read, centers):
            found = np.asarray(found)
            for window, values in zip(batch, found, strict=False):  # the last rows of a batch may be fillers
                start = first[window.utterance] + window.frame
                values = values[window.skip : window.skip + window.keep]
                if chosen is None:
                    out[start : start + window.keep] = values
                    continue
                begin, end = np.searchsorted(chosen, (start, start + window.keep))
                out[begin:end] = values[chosen[begin:end] - start]
            progress(sum(window.keep for window in batch) * HOP)
        return out

    def _batches(self, rows, samples, read, centers) -> Iterator[tuple[list[UnitWindow], jax.Array]]:
        """Windows and what was computed of them, [rows, frames, ...]; the devices are one batch ahead."""
        groups: dict[tuple[int, bool], list[UnitWindow]] = {}
        for i in rows:
            for window in self.plan(int(i), int(samples[i])):
                groups.setdefault((window.length, window.whole), []).append(window)
        batches = []
        for (length, _), windows in sorted(groups.items()):
            size = self._rows_at_once(length)
            batches += [windows[at : at + size] for at in range(0, len(windows), size)]
        moments = _Remembered(lambda i: self._whole_moments(i, int(samples[i]), read))
        waiting = None
        for batch, waveform in _ahead(batches, partial(self._read, read=read)):
            heard = np.zeros(len(waveform), np.int32)
            heard[: len(batch)] = [window.samples for window in batch]
            whole = None
            if self.encoder is not None and not batch[0].whole:
                found = [moments(window.utterance) for window in batch]
                found += [found[-1]] * (len(waveform) - len(batch))
                whole = jax.tree.map(lambda *values: np.stack(values), *found)
            placed = jax.device_put((waveform, heard, whole), self._rows)
            result = self._compute(self.encoder, centers, *placed)
            if waiting is not None:
                yield waiting
            waiting = batch, result
        if waiting is not None:
            yield waiting

    def _rows_at_once(self, length: int) -> int:
        return max(int(self.pass_seconds * SAMPLE_RATE) // length, 1) * self.mesh.size

    def _read(self, batch: list[UnitWindow], *, read: Read) -> np.ndarray:
        """float32 [rows, length]: zeros after each window, and in rows that make a batch full."""
        length = batch[0].length
        waveform = np.zeros((self._rows_at_once(length), length), np.float32)
        for row, window in enumerate(batch):
            waveform[row, : window.samples] = read(window.utterance, start=window.start, samples=window.samples)
        return waveform

    def _whole_moments(self, utterance: int, samples: int, read: Read) -> WholeMoments:
        def blocks():
            for start in range(0, samples, _BLOCK):
                yield read(utterance, start=start, samples=min(_BLOCK, samples - start))

        _, whole = self._measure.whole_moments(blocks)
        return jax.tree.map(np.asarray, whole)


def mfcc_frames(waveform: jax.Array, samples: jax.Array) -> jax.Array:
    """[rows, samples], [rows] to float32 [rows, frames at 50 Hz, 39]: every second frame of Kaldi's MFCC."""
    return mfcc(waveform, samples)[:, ::2]


def _hidden(encoder: Encoder, waveform, samples, whole: WholeMoments | None, *, layer, frames, formulation):
    """[rows, samples], [rows] to float32 [rows, frames, width]; with `whole` [rows, ...], of parts of recordings."""
    if whole is None:
        valid = jnp.arange(waveform.shape[1])[None] < samples[:, None]
        return encode(encoder, waveform, valid, formulation=formulation).hidden[layer].astype(jnp.float32)

    def convolved(row):
        part, moments = row
        return encoder.frontend.features(part[None], samples=None, cfg=encoder.config, whole=moments)[0, :frames]

    over_rows = partial(lax.map, convolved) if formulation.extractor_by_row else jax.vmap(convolved)
    features = over_rows((waveform, whole))  # frames after the window's own are cut, so that nothing hears padding
    return encode_features(encoder, features, formulation=formulation)[layer].astype(jnp.float32)


def _labelled(centers: jax.Array | None, features: jax.Array) -> jax.Array:
    return features if centers is None else nearest_unit(centers, features)


def _for_labelling(encoder: Encoder) -> Encoder:
    """The same parameters and dtypes, with nothing kept for gradients, and with padding that nobody hears."""
    copy = nnx.merge(*nnx.split(encoder))
    copy.config = replace(encoder.config, rematerialize="nothing", valid_frames="convolution")
    return copy


class _Remembered:
    """A function of an utterance that keeps its last few results: windows of one utterance come together."""

    def __init__(self, function: Callable[[int], WholeMoments]):
        self.function, self.results = function, {}

    def __call__(self, i: int) -> WholeMoments:
        if i not in self.results:
            if len(self.results) > 8:
                self.results.clear()
            self.results[i] = self.function(i)
        return self.results[i]


def _ahead(items: Sequence[T], function: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """(item, its result) in order; threads work on the next `READ_AHEAD` meanwhile."""
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) > READ_AHEAD:
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        finally:
            for _, result in waiting:
                result.cancel()
