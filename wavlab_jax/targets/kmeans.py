"""k-means on the device: centroids from frames of features, a unit for every frame, and how evenly units are used.

What scikit-learn's `KMeans` does, for features that live on disk: `features` may be a memory-mapped array, is read in
chunks, is never copied whole, and every chunk is one jitted call of one shape. Seeding is greedy k-means++ on a
subsample; then come Lloyd's full-batch iterations: a chunk gives sums and counts, the host adds them in float64, so the
centroids depend on the size of a chunk by no more than rounding. Full-batch, because it needs no schedule and ends
lower than the mini-batches of HuBERT's recipe (fairseq, examples/hubert/simple_kmeans/learn_kmeans.py), which were a
concession to memory.

Features are taken as they are, neither scaled nor whitened, as HuBERT does: the spread of a dimension is its say.
Fit on training utterances only and assign everything with the same centroids: centroids fitted per split are different
alphabets (fairseq issue 5453).
"""

import functools
import heapq
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FRAMES_PER_UNIT = 256  # frames that seeding looks at, for each unit; faiss trains on no more than this either
CHUNK = 8192  # frames of one device call; [8192, 500] float32 scores are 16 MB


class KMeansError(ValueError):
    """Features, centroids or counts that k-means cannot work with."""


class Centroids(NamedTuple):
    """A fitted k-means: `centers` float32 [units, width], and a report of the fit.

    Attributes:
        centers: centroids in the space of the features: what to store, and what `assign` takes.
        counts: int64 [units], frames of the fitted features nearest to each center.
        inertia: sum over frames of the squared distance to the nearest of `centers`.
        history: inertia before each update; never rises, except where empty clusters were reseeded.
        iterations: updates made.
        converged: whether the centers stopped moving before the iterations ran out.
        reseeded: how often a cluster had become empty and was moved to a far-away frame.
    """

    centers: np.ndarray
    counts: np.ndarray
    inertia: float
    history: tuple[float, ...]
    iterations: int
    converged: bool
    reseeded: int


class Usage(NamedTuple):
    """How evenly units are used.

    Attributes:
        entropy_bits: of the distribution over units; log2(units) when all are used alike.
        perplexity: 2 ** entropy_bits, the number of units that even use would need.
        dead: units never used.
    """

    entropy_bits: float
    perplexity: float
    dead: int


class _Sums(NamedTuple):
    """What one chunk adds: per unit the sum of its frames [units, width] and their number [units]; and the inertia."""

    sums: jax.Array
    counts: jax.Array
    inertia: jax.Array


def fit(
    features: np.ndarray,
    *,
    units: int,
    seed: int,
    iterations: int = 100,
    tolerance: float = 1e-4,
    chunk: int = CHUNK,
) -> Centroids:
    """Fits `units` centroids to `features` [frames, width] (any real dtype, computed in float32).

    Seeding: k-means++ with 2 + ln(units) candidates a step (scikit-learn's greedy form) on `FRAMES_PER_UNIT` frames a
    unit, drawn without replacement. Then Lloyd until the squared movement of all centers together is at most
    `tolerance` times the features' mean variance per dimension (scikit-learn's definition), or `iterations` updates.
    Clusters that are empty after an iteration move to the frames farthest from their centers. The same seed gives the
    same centroids on the same kind of device.

    Raises KMeansError if features are not [frames, width], hold NaN or infinity (the first such frame is named), or
    have fewer frames, or fewer distinct ones, than units.
    """
    features = _checked_features(features)
    if units < 1 or iterations < 1 or chunk < 1 or seed < 0 or not tolerance >= 0:
        raise KMeansError(
            f"units={units}, iterations={iterations} and chunk={chunk} must be at least 1, "
            f"seed={seed} and tolerance={tolerance} at least 0"
        )
    if len(features) < units:
        raise KMeansError(f"{len(features)} frames cannot make {units} units: give more frames or fewer units")
    mean, variance = _moments(features, chunk)
    # Distances come from |x|^2 - 2 x.c + |c|^2, which cancels badly far from the origin: work around the mean.
    shift = mean.astype(np.float32)
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(features), min(len(features), FRAMES_PER_UNIT * units), replace=False, shuffle=False)
    sample = np.asarray(features[np.sort(rows)], np.float32) - shift
    centers = np.asarray(_plus_plus(jax.random.key(seed), sample, units=units), np.float64)

    history, reseeded, converged = [], 0, False
    while not converged and len(history) < iterations:
        total = _sweep(features, centers, shift, chunk)
        history.append(total.inertia)
        moved = total.sums / np.maximum(total.counts, 1)[:, None]
        empty = np.flatnonzero(total.counts == 0)
        if empty.size:
            if not reseeded:
                _require_distinct(features, units, chunk)
            moved[empty] = _farthest(features, centers, shift, chunk, count=empty.size)
            reseeded += int(empty.size)
        converged = bool(np.sum((moved - centers) ** 2) <= tolerance * variance) and not empty.size
        centers = moved
    last = _sweep(features, centers, shift, chunk)
    return Centroids(
        centers=(centers + shift).astype(np.float32),
        counts=last.counts,
        inertia=last.inertia,
        history=tuple(history),
        iterations=len(history),
        converged=converged,
        reseeded=reseeded,
    )


def assign(centers: np.ndarray, features: np.ndarray, *, chunk: int = CHUNK) -> np.ndarray:
    """The nearest of `centers` [units, width] to each of `features` [frames, width]: int32 [frames].

    Ties go to the lowest unit. Takes any centroids, for instance those of another project's scikit-learn model. Frames
    are read in chunks.

    Raises KMeansError if shapes do not fit, or if centers or features hold NaN or infinity (the first row is named).
    """
    features = _checked_features(features)
    centers = np.asarray(centers)
    if centers.ndim != 2 or not len(centers) or centers.shape[1] != features.shape[1]:
        raise KMeansError(
            f"centers have shape {list(centers.shape)}, features {list(features.shape)}: "
            "expected [units, width] and [frames, width]"
        )
    if not np.isfinite(centers).all():
        row = int(np.flatnonzero(~np.isfinite(centers).all(axis=1))[0])
        raise KMeansError(f"center {row} is not finite")
    shift = centers.mean(axis=0, dtype=np.float64).astype(np.float32)
    centers = (centers - shift).astype(np.float32)
    labels = np.empty(len(features), np.int32)

    def nearest(block, _):
        return _nearest_of(centers, shift, block).labels

    for start, real, found in _on_device(nearest, features, chunk, check=True):
        labels[start : start + real] = np.asarray(found)[:real]
    return labels


def usage(counts: np.ndarray) -> Usage:
    """Entropy, perplexity and dead units of `counts` [units]: how many frames each unit was given.

    Raises KMeansError if counts are not one-dimensional, negative, not finite, or all zero.
    """
    counts = np.asarray(counts, np.float64)
    if counts.ndim != 1 or not np.isfinite(counts).all() or (counts < 0).any() or not counts.sum() > 0:
        raise KMeansError(f"counts {list(counts.shape)} must be [units], not negative, and not all zero")
    shares = counts[counts > 0] / counts.sum()
    entropy = float(max(0.0, -np.sum(shares * np.log2(shares))))
    return Usage(entropy_bits=entropy, perplexity=2.0**entropy, dead=int(np.sum(counts == 0)))


class _Nearest(NamedTuple):
    """Of each frame: its nearest unit, int32 [frames], and the squared distance to it, float32 [frames]."""

    labels: jax.Array
    distances: jax.Array


@jax.jit
def _nearest_of(centers: jax.Array, shift: jax.Array, block: jax.Array) -> _Nearest:
    """centers [units, width] around `shift` [width]; block [frames, width]."""
    frames = block - shift[None]
    # Full float32: with the 8 or 11 bits that accelerators multiply by default, near ties would go either way.
    products = jnp.matmul(frames, centers.T, precision=jax.lax.Precision.HIGHEST)
    scores = jnp.sum(jnp.square(centers), axis=1)[None] - 2.0 * products
    labels = jnp.argmin(scores, axis=1).astype(jnp.int32)
    least = jnp.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
    return _Nearest(labels, jnp.maximum(least + jnp.sum(jnp.square(frames), axis=1), 0.0))


@jax.jit
def _chunk_sums(centers: jax.Array, shift: jax.Array, block: jax.Array, count: jax.Array) -> _Sums:
    """centers [units, width] around `shift` [width]; the first `count` frames of block [frames, width] are real."""
    units = centers.shape[0]
    labels, distances = _nearest_of(centers, shift, block)
    real = jnp.arange(block.shape[0]) < count
    labels = jnp.where(real, labels, units)  # a label out of range is added nowhere
    # A CPU scatters twice as fast as it multiplies. Accelerators multiply: their scatter-add is slow, and on a GPU its
    # order, hence its rounding, changes from run to run.
    sums = jax.lax.platform_dependent(block - shift[None], labels, cpu=_scatter(units), default=_multiply(units))
    counts = jnp.sum(labels[:, None] == jnp.arange(units)[None], axis=0)
    return _Sums(sums, counts, jnp.sum(jnp.where(real, distances, 0.0)))


def _scatter(units: int):
    """frames [frames, width], labels [frames] to sums [units, width], by addition in place."""
    return functools.partial(jax.ops.segment_sum, num_segments=units)


def _multiply(units: int):
    """The same as `_scatter`, by a product with the labels' indicator matrix."""

    def sums(frames, labels):
        return jnp.matmul(jax.nn.one_hot(labels, units).T, frames, precision=jax.lax.Precision.HIGHEST)

    return sums


@functools.partial(jax.jit, static_argnames="units")
def _plus_plus(key: jax.Array, frames: jax.Array, *, units: int) -> jax.Array:
    """Greedy k-means++: frames [frames, width] to centers [units, width], all of them frames.

    Arthur and Vassilvitskii (2007): the next center is drawn with probability proportional to the squared distance to
    the nearest center so far. Of 2 + ln(units) such candidates the one that leaves the smallest sum is kept, as
    scikit-learn does.
    """
    trials = 2 + int(np.log(units))
    norms = jnp.sum(jnp.square(frames), axis=1)

    def distances(candidates):  # [candidates, width] to [candidates, frames]
        products = jnp.matmul(candidates, frames.T, precision=jax.lax.Precision.HIGHEST)
        return jnp.maximum(norms[None] - 2.0 * products + jnp.sum(jnp.square(candidates), axis=1, keepdims=True), 0.0)

    def add(unit, state):
        centers, nearest = state
        cumulative = jnp.cumsum(nearest)
        drawn = jax.random.uniform(jax.random.fold_in(key, unit), (trials,)) * cumulative[-1]
        # side="right" never lands on a frame of distance zero, unless rounding has left nothing else.
        picks = jnp.minimum(jnp.searchsorted(cumulative, drawn, side="right"), len(frames) - 1)
        remaining = jnp.minimum(nearest[None], distances(frames[picks]))
        best = jnp.argmin(jnp.sum(remaining, axis=1))
        return centers.at[unit].set(frames[picks[best]]), remaining[best]

    first = frames[jax.random.randint(jax.random.fold_in(key, 0), (), 0, len(frames))]
    centers = jnp.zeros((units, frames.shape[1]), frames.dtype).at[0].set(first)
    return jax.lax.fori_loop(1, units, add, (centers, distances(first[None])[0]))[0]


class _Total(NamedTuple):
    """`_Sums` of all chunks: float64 [units, width], int64 [units], float."""

    sums: np.ndarray
    counts: np.ndarray
    inertia: float


def _sweep(features: np.ndarray, centers: np.ndarray, shift: np.ndarray, chunk: int) -> _Total:
    """Assigns every frame to the nearest of `centers` (around `shift`) and adds up what an update needs."""
    centers = centers.astype(np.float32)
    sums, counts, inertia = np.zeros(centers.shape, np.float64), np.zeros(len(centers), np.int64), 0.0
    for _, _, part in _on_device(functools.partial(_chunk_sums, centers, shift), features, chunk):
        sums += np.asarray(part.sums)
        counts += np.asarray(part.counts)
        inertia += float(part.inertia)
    return _Total(sums, counts, inertia)


def _farthest(features: np.ndarray, centers: np.ndarray, shift: np.ndarray, chunk: int, *, count: int) -> np.ndarray:
    """The `count` frames farthest from their nearest center, [count, width] around `shift`, the farthest first."""
    farthest: list[tuple[float, int]] = []

    def distances(block, _):
        return _nearest_of(centers.astype(np.float32), shift, block).distances

    for start, real, found in _on_device(distances, features, chunk):
        found = np.asarray(found)[:real]
        rows = np.argsort(-found, kind="stable")[:count]
        # Ties go to the earlier frame, whatever the chunks.
        farthest = heapq.nlargest(count, [*farthest, *((float(found[row]), -(start + int(row))) for row in rows)])
    return np.stack([np.asarray(features[-row], np.float32) - shift for _, row in farthest])


class _Chunk(NamedTuple):
    """`result` for the frames `start` to `start + real`."""

    start: int
    real: int
    result: Any


def _on_device(function: Callable, features: np.ndarray, chunk: int, *, check: bool = False) -> Iterator[_Chunk]:
    """Calls the jitted `function(block, real)` on every chunk; yields a result when the next chunk is on its way.

    Blocks have one shape, [chunk, width] float32, so that one program serves all: the last is filled with zeros, and
    `real` says how many of its frames count.
    """
    size = min(chunk, len(features))
    waiting = None
    for start in range(0, len(features), max(size, 1)):
        block = np.asarray(features[start : start + size], np.float32)
        real = len(block)
        if check:
            _require_finite(block, start)
        if real < size:
            block = np.concatenate([block, np.zeros((size - real, block.shape[1]), np.float32)])
        result = function(block, real)
        if waiting is not None:
            yield waiting
        waiting = _Chunk(start, real, result)
    if waiting is not None:
        yield waiting


def _checked_features(features: np.ndarray) -> np.ndarray:
    """[frames, width], left where it is (a memory map stays one)."""
    features = features if isinstance(features, np.ndarray) else np.asarray(features)
    if features.ndim != 2 or not features.shape[1]:
        raise KMeansError(f"features have shape {list(features.shape)}, expected [frames, width]")
    if not (np.issubdtype(features.dtype, np.floating) or np.issubdtype(features.dtype, np.integer)):
        raise KMeansError(f"features are {features.dtype}, expected real numbers")
    return features


def _require_finite(block: np.ndarray, start: int) -> None:
    """Raises KMeansError naming the first frame of block [frames, width] that holds NaN or infinity."""
    if not np.isfinite(block.sum()):  # cheap; a sum of finite numbers may still overflow, so look before blaming
        rows = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if rows.size:
            raise KMeansError(f"frame {start + int(rows[0])} of the features is not finite (as float32)")


class _Moments(NamedTuple):
    """Mean [width], and the variance averaged over dimensions."""

    mean: np.ndarray
    variance: float


def _moments(features: np.ndarray, chunk: int) -> _Moments:
    """Moments of features [frames, width], in float64. Raises KMeansError at the first frame that is not finite."""
    total = np.zeros(features.shape[1])
    for start in range(0, len(features), chunk):
        block = np.asarray(features[start : start + chunk], np.float32)
        _require_finite(block, start)
        total += block.sum(axis=0, dtype=np.float64)
    mean = total / len(features)
    squares = 0.0
    for start in range(0, len(features), chunk):  # a second pass: E[x^2] - E[x]^2 cancels far from the origin
        squares += float(np.square(features[start : start + chunk] - mean).sum())
    return _Moments(mean, squares / features.size)


def _require_distinct(features: np.ndarray, units: int, chunk: int) -> None:
    """Raises KMeansError if fewer than `units` frames differ: clusters would then be empty for ever."""
    distinct: set[bytes] = set()
    for start in range(0, len(features), chunk):
        distinct.update(row.tobytes() for row in np.asarray(features[start : start + chunk], np.float32) + 0.0)
        if len(distinct) >= units:
            return
    raise KMeansError(
        f"only {len(distinct)} of {len(features)} frames differ: they cannot make {units} units (is the audio silent?)"
    )
