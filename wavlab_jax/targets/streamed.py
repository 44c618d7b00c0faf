"""Frames of features that stay on disk, brought to the devices of a mesh chunk by chunk: what k-means asks of them."""

import functools
import heapq
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from wavlab_jax.sharding import BATCH_AXES
from wavlab_jax.targets.nearest import nearest, squared_distances


class KMeansError(ValueError):
    """Features, centroids or counts that k-means cannot work with."""


class Frames(Protocol):
    """Features on disk or in memory: [frames, width], read by slices and by ascending int64 indices."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray: ...


class Sums(NamedTuple):
    """What some frames add: per unit their sum [units, width] and number [units]; and the inertia."""

    sums: Any
    counts: Any
    inertia: Any


@functools.cache
def _summing(mesh: Mesh) -> Callable[..., Sums]:
    """centers [units, width] around shift [width], block [frames, width] split over `mesh`, of which the first `count`
    are real, to `Sums` everywhere."""
    rows = P(BATCH_AXES)

    def part(centers, shift, block, count):
        units, frames = centers.shape[0], block.shape[0]
        found = nearest(centers, shift, block)
        distances = squared_distances(found, shift, block)
        real = jax.lax.axis_index(BATCH_AXES) * frames + jnp.arange(frames) < count
        labels = jnp.where(real, found.units, units)  # a label out of range is added nowhere
        # A CPU scatters twice as fast as it multiplies. Accelerators multiply: their scatter-add is slow, and on a GPU
        # its order, hence its rounding, changes from run to run.
        sums = jax.lax.platform_dependent(block - shift[None], labels, cpu=_scatter(units), default=_multiply(units))
        counts = jax.ops.segment_sum(jnp.ones(frames, jnp.int32), labels, num_segments=units)  # of integers: exact
        return jax.lax.psum(Sums(sums, counts, jnp.sum(jnp.where(real, distances, 0.0))), BATCH_AXES)

    return jax.jit(jax.shard_map(part, mesh=mesh, in_specs=(P(), P(), rows, P()), out_specs=P(), check_vma=False))


def _scatter(units: int):
    """frames [frames, width], labels [frames] to sums [units, width], by addition in place."""
    return functools.partial(jax.ops.segment_sum, num_segments=units)


def _multiply(units: int):
    """The same as `_scatter`, by a product with the labels' indicator matrix."""

    def sums(frames, labels):
        return jnp.matmul(jax.nn.one_hot(labels, units).T, frames, precision=jax.lax.Precision.HIGHEST)

    return sums


class Chunk(NamedTuple):
    """`result` for the frames `start` to `start + real`."""

    start: int
    real: int
    result: Any


class StreamedFrames:
    """Features, the mesh that their chunks are split over, and the point that centers are given around."""

    def __init__(self, features: Frames, shift: np.ndarray, mesh: Mesh, chunk: int):
        self.features, self.shift, self.mesh, self.chunk = features, shift, mesh, chunk

    def sweep(self, centers: np.ndarray) -> Sums:
        """Sums over all frames, float64, int64 and float, each frame given to the nearest of `centers`."""
        total = Sums(np.zeros(centers.shape, np.float64), np.zeros(len(centers), np.int64), 0.0)
        call = functools.partial(_summing(self.mesh), *self._everywhere(centers))
        for _, _, part in self.on_device(call):
            total = Sums(*(before + np.asarray(more) for before, more in zip(total, part, strict=True)))
        return total._replace(inertia=float(total.inertia))

    def sums_of(self, centers: np.ndarray, rows: np.ndarray, *, size: int) -> Sums:
        """The same over the frames `rows`, ascending, in one call of `size` frames."""
        placed = self._placed(lambda first, last: self.features[rows[first:last]], len(rows), size)
        part = _summing(self.mesh)(centers.astype(np.float32), self.shift, placed, len(rows))
        return Sums(np.asarray(part.sums, np.float64), np.asarray(part.counts, np.int64), float(part.inertia))

    def farthest(self, centers: np.ndarray, *, count: int) -> np.ndarray:
        """The `count` frames farthest from their nearest center, [count, width] around `shift`, the farthest first."""
        farthest: list[tuple[float, int]] = []
        call = functools.partial(_distances(self.mesh), *self._everywhere(centers))
        for start, real, found in self.on_device(lambda block, _: call(block)):
            found = np.asarray(found)[:real]
            rows = np.argsort(-found, kind="stable")[:count]
            # Ties go to the earlier frame, whatever the chunks.
            farthest = heapq.nlargest(count, [*farthest, *((float(found[row]), -(start + int(row))) for row in rows)])
        found = [np.asarray(self.features[-row : 1 - row], np.float32) for _, row in farthest]
        return np.concatenate(found) - self.shift

    def on_device(self, function: Callable) -> Iterator[Chunk]:
        """Calls the jitted `function(block, real)` on every chunk; yields a result when the next chunk is on its way.

        Blocks have one shape, [frames, width] float32, so that one program serves all: the last is filled with zeros,
        and `real` says how many of its frames count.
        """
        size, waiting = min(self.chunk * self.mesh.size, len(self.features)), None
        for start in range(0, len(self.features), max(size, 1)):
            real = min(size, len(self.features) - start)

            def take(first, last, start=start):
                return self.features[start + first : start + last]

            result = function(self._placed(take, real, size), real)
            if waiting is not None:
                yield waiting
            waiting = Chunk(start, real, result)
        if waiting is not None:
            yield waiting

    def _everywhere(self, centers: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """`centers` as float32, and the shift, on every device: once for all chunks of a pass."""
        sharding = NamedSharding(self.mesh, P())
        return tuple(
            jax.make_array_from_callback(values.shape, sharding, lambda index, values=values: values[index])
            for values in (centers.astype(np.float32), self.shift)
        )

    def _placed(self, take: Callable[[int, int], np.ndarray], real: int, size: int) -> jax.Array:
        """`take(first, last)` of the first `real` rows, zeros after them, [size or more, width], split over the mesh.

        The rows are rounded up to what the devices can share. A process reads those of its own devices only.
        """
        size = -(-size // self.mesh.size) * self.mesh.size

        def read(index):
            first, last, _ = index[0].indices(size)
            if last <= real:
                return np.ascontiguousarray(take(first, last), np.float32)
            block = np.zeros((last - first, self.features.shape[1]), np.float32)
            if first < real:
                block[: real - first] = take(first, real)
            return block

        sharding = NamedSharding(self.mesh, P(BATCH_AXES))
        return jax.make_array_from_callback((size, self.features.shape[1]), sharding, read)


@functools.cache
def _distances(mesh: Mesh) -> Callable[..., jax.Array]:
    """centers, shift, block split over `mesh` to the squared distances [frames], everywhere."""
    rows = NamedSharding(mesh, P(BATCH_AXES))
    everywhere = NamedSharding(mesh, P())

    def distances(centers, shift, block):
        return squared_distances(nearest(centers, shift, block), shift, block)

    return jax.jit(distances, in_shardings=(everywhere, everywhere, rows), out_shardings=everywhere)


def checked_features(features: Frames) -> Frames:
    """[frames, width], left where it is (a memory map stays one)."""
    features = features if hasattr(features, "dtype") else np.asarray(features)
    if len(features.shape) != 2 or not features.shape[1]:
        raise KMeansError(f"features have shape {list(features.shape)}, expected [frames, width]")
    if not (np.issubdtype(features.dtype, np.floating) or np.issubdtype(features.dtype, np.integer)):
        raise KMeansError(f"features are {features.dtype}, expected real numbers")
    return features


def require_finite(block: np.ndarray, start: int) -> None:
    """Raises KMeansError naming the first frame of block [frames, width] that holds NaN or infinity."""
    if not np.isfinite(block.sum()):  # cheap; a sum of finite numbers may still overflow, so look before blaming
        rows = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if rows.size:
            raise KMeansError(f"frame {start + int(rows[0])} of the features is not finite (as float32)")


class Moments(NamedTuple):
    """Mean [width], and the variance averaged over dimensions."""

    mean: np.ndarray
    variance: float


def moments(features: Frames, chunk: int) -> Moments:
    """Moments of features [frames, width], in float64. Raises KMeansError at the first frame that is not finite."""
    total = np.zeros(features.shape[1])
    for start in range(0, len(features), chunk):
        block = np.asarray(features[start : start + chunk], np.float32)
        require_finite(block, start)
        total += block.sum(axis=0, dtype=np.float64)
    mean = total / len(features)
    squares = 0.0
    for start in range(0, len(features), chunk):  # a second pass: E[x^2] - E[x]^2 cancels far from the origin
        squares += float(np.square(features[start : start + chunk] - mean).sum())
    return Moments(mean, squares / (len(features) * features.shape[1]))


def require_distinct(features: Frames, units: int, chunk: int) -> None:
    """Raises KMeansError if fewer than `units` frames differ: clusters would then be empty for ever."""
    distinct: set[bytes] = set()
    for start in range(0, len(features), chunk):
        distinct.update(row.tobytes() for row in np.asarray(features[start : start + chunk], np.float32) + 0.0)
        if len(distinct) >= units:
            return
    raise KMeansError(
        f"only {len(distinct)} of {len(features)} frames differ: they cannot make {units} units (is the audio silent?)"
    )
