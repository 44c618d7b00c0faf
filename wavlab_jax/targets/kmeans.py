"""k-means on the device: centroids from frames of features, a unit for every frame, and how evenly units are used.

What scikit-learn's `KMeans` does, for features that live on disk. They may be a memory-mapped array, or anything else
that gives rows by slices; they are read in chunks and never copied whole, and a chunk is one jitted call of one shape,
its rows split over all devices of a mesh, the centroids on each of them, the partial sums added up by the devices.
Seeding is greedy k-means++ on a subsample. Then come either

- Lloyd's full-batch iterations, the default: no schedule, and the lowest inertia; or
- mini-batches (Sculley 2010, as in scikit-learn's `MiniBatchKMeans`): a center is the running mean of all frames that
  it was ever given. HuBERT's recipe (fairseq, examples/hubert/simple_kmeans/learn_kmeans.py) has these.

The host adds chunks in float64, so the centroids depend on the size of a chunk and on the number of devices by no more
than the rounding of float32 sums inside a chunk; seeding runs on one device whatever the mesh. Two runs on the same
devices agree to the bit, also where one of them was killed and went on.

Features are taken as they are, neither scaled nor whitened, as HuBERT does: the spread of a dimension is its say.
Fit on training utterances only and assign everything with the same centroids: centroids fitted per split are different
alphabets (fairseq issue 5453).
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from wavlab_jax.sharding import MeshConfig, make_mesh
from wavlab_jax.targets.fit_state import FitState, read_state, write_state
from wavlab_jax.targets.nearest import HOST_BLOCK, HostSearch, nearest, nearest_unit
from wavlab_jax.targets.seeding import plus_plus
from wavlab_jax.targets.streamed import (
    Chunk,
    Frames,
    KMeansError,
    StreamedFrames,
    checked_features,
    moments,
    require_distinct,
    require_finite,
)

__all__ = ["Centroids", "Frames", "KMeansError", "Usage", "assign", "fit", "nearest_unit", "usage"]

FRAMES_PER_UNIT = 256  # frames that seeding looks at, for each unit; faiss trains on no more than this either
CHUNK = 8192  # frames that a device takes at once; [8192, 768] float32 are 25 MB
BATCH = 10_000  # frames of a mini-batch (fairseq's learn_kmeans.py)
STALLED = 1e-3  # mini-batches stop after a pass that lowers the inertia by less than this share of it
SAVE_SECONDS = 10.0  # between two savings of a fit that can be continued

Algorithm = Literal["lloyd", "minibatch"]


class Centroids(NamedTuple):
    """A fitted k-means: `centers` float32 [units, width], and a report of the fit.

    Attributes:
        centers: centroids in the space of the features: what to store, and what `assign` takes.
        counts: int64 [units], frames of the fitted features nearest to each center.
        inertia: sum over frames of the squared distance to the nearest of `centers`.
        history: of each iteration, the inertia before its update (with mini-batches: to the centers as they were when
            each frame's turn came). Lloyd's never rises, except where empty clusters were reseeded.
        iterations: passes over the features.
        converged: whether the centers (mini-batches: the inertia) stopped moving before the iterations ran out.
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


def fit(
    features: Frames,
    *,
    units: int,
    seed: int,
    algorithm: Algorithm = "lloyd",
    iterations: int = 100,
    tolerance: float = 1e-4,
    chunk: int = CHUNK,
    batch: int = BATCH,
    mesh: Mesh | None = None,
    kept: Path | None = None,
    source: str = "",
    title: str | None = None,
) -> Centroids:
    """Fits `units` centroids to `features` [frames, width] (any real dtype, computed in float32).

    Seeding: k-means++ with 2 + ln(units) candidates a step (scikit-learn's greedy form) on `FRAMES_PER_UNIT` frames a
    unit, drawn evenly without replacement. Then, for at most `iterations` passes over the features, either

    - "lloyd", until the squared movement of all centers together is at most `tolerance` times the features' mean
      variance per dimension (scikit-learn's definition); or
    - "minibatch", over `batch` frames at a time in an order drawn anew each pass, until a pass lowers the inertia by
      less than `STALLED` of it.

    Clusters that are empty after a pass move to the frames farthest from their centers. The same seed gives the same
    centroids on the same devices.

    Args:
        mesh: devices that share each chunk of `chunk` frames a device; None: one device. With several processes all
            call this with the same features, and each reads the rows of its own devices.
        kept: a file that finished passes are saved to, at most every `SAVE_SECONDS`; a fit that finds one of the same
            `source`, frames and settings there goes on from it. Whoever stores the result deletes it.
        title: of a progress bar; None: no bar.

    Raises KMeansError if features are not [frames, width], hold NaN or infinity (the first such frame is named), or
    have fewer frames, or fewer distinct ones, than units.
    """
    features = checked_features(features)
    if units < 1 or iterations < 1 or chunk < 1 or batch < 1 or seed < 0 or not tolerance >= 0:
        raise KMeansError(
            f"units={units}, iterations={iterations}, chunk={chunk} and batch={batch} must be at least 1, "
            f"seed={seed} and tolerance={tolerance} at least 0"
        )
    if len(features) < units:
        raise KMeansError(f"{len(features)} frames cannot make {units} units: give more frames or fewer units")
    mesh = mesh or make_mesh(MeshConfig(), devices=jax.local_devices()[:1])
    source = f"{source} {tuple(features.shape)} {features.dtype} {algorithm} {units} {seed} {tolerance} {batch}"
    state = None if kept is None else read_state(kept, source)
    if state is None:
        state = _seeded(features, units=units, seed=seed, chunk=chunk, mesh=mesh)
    data = StreamedFrames(features, state.shift, mesh, chunk)
    saved = time.monotonic()
    with tqdm(total=iterations, desc=title, unit="pass", dynamic_ncols=True, disable=title is None) as bar:
        bar.update(len(state.history))
        while not state.converged and len(state.history) < iterations:
            if algorithm == "lloyd":
                state = _lloyd(state, data, tolerance=tolerance)
            else:
                state = _mini_batches(state, data, batch=batch, seed=seed)
            if kept is not None and time.monotonic() - saved >= SAVE_SECONDS:
                write_state(kept, state, source)
                saved = time.monotonic()
            bar.set_postfix(inertia=f"{state.history[-1] / len(features):.6g}", refresh=False)
            bar.update()
    last = data.sweep(state.centers)
    return Centroids(
        centers=(state.centers + state.shift).astype(np.float32),
        counts=last.counts,
        inertia=last.inertia,
        history=state.history,
        iterations=len(state.history),
        converged=state.converged,
        reseeded=state.reseeded,
    )


def assign(centers: np.ndarray, features: Frames, *, chunk: int | None = None) -> np.ndarray:
    """The nearest of `centers` [units, width] to each of `features` [frames, width]: int32 [frames].

    Ties go to the lowest unit. Takes any centroids, for instance those of another project's scikit-learn model. Frames
    are read in chunks, by default of `CHUNK`, on a CPU of `HOST_BLOCK`, where numpy does the work. (`nearest_unit` is
    the same inside a jitted function, but for ties to within the rounding of float32.)

    Raises KMeansError if shapes do not fit, or if centers or features hold NaN or infinity (the first row is named).
    """
    features = checked_features(features)
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
    if jax.default_backend() == "cpu":
        results = _assigned_on_host(centers, shift, features, chunk or HOST_BLOCK)
    else:
        results = _assigned_on_device(centers, shift, features, chunk or CHUNK)
    labels = np.empty(len(features), np.int32)
    for start, real, found in results:
        labels[start : start + real] = np.asarray(found.units)[:real]
        if not found.finite:  # or too large to be squared: look before blaming
            require_finite(np.asarray(features[start : start + real], np.float32), start)
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


def _seeded(features: Frames, *, units: int, seed: int, chunk: int, mesh: Mesh) -> FitState:
    """The state before the first pass. Every process computes all of it, on one device."""
    mean, variance = moments(features, chunk)
    # Distances come from |x|^2 - 2 x.c + |c|^2, which cancels badly far from the origin: work around the mean.
    shift = mean.astype(np.float32)
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(features), min(len(features), FRAMES_PER_UNIT * units), replace=False, shuffle=False)
    sample = jax.device_put(np.asarray(features[np.sort(rows)], np.float32) - shift, mesh.local_devices[0])
    centers = np.asarray(plus_plus(jax.random.key(seed), sample, units=units), np.float64)
    return FitState(centers, np.zeros(units, np.int64), shift, variance, (), 0, False)


def _lloyd(state: FitState, data: StreamedFrames, *, tolerance: float) -> FitState:
    """One full-batch iteration."""
    total = data.sweep(state.centers)
    centers = total.sums / np.maximum(total.counts, 1)[:, None]
    empty = np.flatnonzero(total.counts == 0)
    if empty.size:
        centers[empty] = _reseeds(state, data, count=empty.size)
    moved = np.sum((centers - state.centers) ** 2)
    return state._replace(
        centers=centers,
        history=(*state.history, total.inertia),
        reseeded=state.reseeded + int(empty.size),
        converged=bool(moved <= tolerance * state.variance) and not empty.size,
    )


def _mini_batches(state: FitState, data: StreamedFrames, *, batch: int, seed: int) -> FitState:
    """One pass in mini-batches, each of frames from all over the features.

    After a batch that gives n frames of sum s to a center c which had N frames before: c <- c + (s - n c) / (N + n),
    scikit-learn's `_minibatch_update_dense`; Sculley's step, 1 / (frames so far) for each frame in turn, adds up to it.
    """
    centers, seen, before, inertia = state.centers.copy(), state.seen.copy(), state.seen, 0.0
    order = np.random.default_rng([seed, 1, len(state.history)]).permutation(len(data.features))
    for first in range(0, len(order), batch):
        part = data.sums_of(centers, np.sort(order[first : first + batch]), size=min(batch, len(order)))
        seen += part.counts
        centers += (part.sums - part.counts[:, None] * centers) / np.maximum(seen, 1)[:, None]
        inertia += part.inertia
    empty = np.flatnonzero(seen == before)
    if empty.size:
        centers[empty] = _reseeds(state._replace(centers=centers), data, count=empty.size)
        seen[empty] = 0
    stalled = bool(state.history) and state.history[-1] - inertia < STALLED * state.history[-1]
    return state._replace(
        centers=centers,
        seen=seen,
        history=(*state.history, inertia),
        reseeded=state.reseeded + int(empty.size),
        converged=stalled and not empty.size,
    )


def _reseeds(state: FitState, data: StreamedFrames, *, count: int) -> np.ndarray:
    """Where `count` empty clusters go, [count, width]."""
    if not state.reseeded:
        require_distinct(data.features, len(state.centers), data.chunk)
    return data.farthest(state.centers, count=count)


class _Assigned(NamedTuple):
    units: jax.Array | np.ndarray
    finite: jax.Array | np.ndarray


def _assigned_on_host(centers: np.ndarray, shift: np.ndarray, features: Frames, chunk: int) -> Iterator[Chunk]:
    search = HostSearch(centers, shift, block=min(chunk, len(features)))
    for start in range(0, len(features), chunk):
        found = search(np.asarray(features[start : start + chunk], np.float32))
        yield Chunk(start, len(found.units), _Assigned(found.units, np.isfinite(found.scores).all()))


def _assigned_on_device(centers: np.ndarray, shift: np.ndarray, features: Frames, chunk: int) -> Iterator[Chunk]:
    mesh = make_mesh(MeshConfig(), devices=jax.local_devices()[:1])
    centers, shift = jax.device_put((centers, shift), jax.local_devices()[0])
    data = StreamedFrames(features, shift, mesh, chunk)
    return data.on_device(lambda block, _: _nearest(centers, shift, block))


@jax.jit
def _nearest(centers: jax.Array, shift: jax.Array, block: jax.Array) -> _Assigned:
    found = nearest(centers, shift, block)
    return _Assigned(found.units, jnp.isfinite(found.scores).all())
