"""The nearest centroid of every frame: the product and the search that fitting, labelling and teachers share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

CPU_BLOCK = 1024  # frames of one block on a CPU: its scores against 500 units are 2 MB and stay in the cache
HOST_BLOCK = 2048  # the same for numpy's BLAS, which does not keep a block's scores in the innermost cache anyway


class Nearest(NamedTuple):
    """Of each frame: its nearest unit, int32 [frames], and the score |c|^2 - 2 x.c of it, float32 [frames].

    The score is not finite where the frame is not.
    """

    units: jax.Array
    scores: jax.Array


def nearest_unit(centers: jax.Array, features: jax.Array) -> jax.Array:
    """centers [units, width], features [..., width] (any float) to int32 [...]: the unit whose center is nearest.

    Pure, and may be called inside another jitted function; leading axes are free. Computed in full float32 around the
    mean of the centers. Ties go to the lowest unit. What is not finite gets some unit in range: check it elsewhere.
    """
    centers = centers.astype(jnp.float32)
    shift = jnp.mean(centers, axis=0)
    frames = features.reshape(-1, features.shape[-1]).astype(jnp.float32)
    return nearest(centers - shift[None], shift, frames).units.reshape(features.shape[:-1])


def nearest(centers: jax.Array, shift: jax.Array, frames: jax.Array) -> Nearest:
    """centers [units, width] around `shift` [width]; frames [frames, width], not shifted.

    |x - c|^2 = |x|^2 - 2 x.c + |c|^2 cancels badly far from the origin, hence `shift`, some point amid the frames.
    """
    return lax.platform_dependent(centers, shift, frames, cpu=_by_blocks, default=_at_once)


def squared_distances(found: Nearest, shift: jax.Array, frames: jax.Array) -> jax.Array:
    """float32 [frames]: from each frame to its nearest center, of what `nearest` found; never negative."""
    return jnp.maximum(found.scores + jnp.sum(jnp.square(frames - shift[None]), axis=1), 0.0)


def _at_once(centers: jax.Array, shift: jax.Array, frames: jax.Array) -> Nearest:
    """One product, one argmin: what accelerators like."""
    frames = frames - shift[None]
    # Full float32: with the 8 or 11 bits that accelerators multiply by default, near ties would go either way.
    products = jnp.matmul(frames, centers.T, precision=lax.Precision.HIGHEST)
    scores = jnp.sum(jnp.square(centers), axis=1)[None] - 2.0 * products
    units = jnp.argmin(scores, axis=1).astype(jnp.int32)
    return Nearest(units, jnp.take_along_axis(scores, units[:, None], axis=1)[:, 0])


def _by_blocks(centers: jax.Array, shift: jax.Array, frames: jax.Array) -> Nearest:
    """The same on a CPU, block by block with units as rows: scores stay in the cache, reductions run along vectors.

    XLA:CPU's argmin is a scalar loop over pairs. Two plain minima are not: of the scores, then of the units that
    have it.
    """
    total, units = frames.shape[0], jnp.arange(centers.shape[0], dtype=jnp.int32)[:, None]
    squares = jnp.sum(jnp.square(centers), axis=1)[:, None]

    def block(frames):
        frames = frames - shift[None]
        scores = squares - 2.0 * jnp.matmul(centers, frames.T, precision=lax.Precision.HIGHEST)
        least = jnp.min(scores, axis=0)
        found = jnp.min(jnp.where(scores == least[None], units, centers.shape[0] - 1), axis=0)
        return Nearest(found, least)

    if total <= CPU_BLOCK:
        return block(frames)
    whole = total // CPU_BLOCK
    blocks = frames[: whole * CPU_BLOCK].reshape(whole, CPU_BLOCK, -1)
    found = jax.tree.map(lambda values: values.reshape(-1), lax.map(block, blocks))
    if whole * CPU_BLOCK == total:
        return found
    rest = block(frames[whole * CPU_BLOCK :])
    return jax.tree.map(lambda first, last: jnp.concatenate([first, last]), found, rest)


class HostNearest(NamedTuple):
    """As `Nearest`, in numpy: int32 [frames] and float32 [frames]."""

    units: np.ndarray
    scores: np.ndarray


class HostSearch:
    """The search outside of any jitted function, on a CPU: numpy's BLAS multiplies faster than XLA:CPU's Eigen.

    centers float32 [units, width] around `shift` [width]. A call takes float32 frames [up to `block`, width], not
    shifted, and gives `HostNearest`. Its buffers are used again by the next call.
    """

    def __init__(self, centers: np.ndarray, shift: np.ndarray, *, block: int = HOST_BLOCK):
        self._shift = shift
        # |c|^2 is one more dimension, in which every frame is 1: no pass over the scores is needed to add it.
        squares = np.sum(np.square(centers), axis=1, keepdims=True)
        self._centers = np.ascontiguousarray(np.concatenate([-2.0 * centers, squares], axis=1).T)
        self._frames = np.ones((block, centers.shape[1] + 1), np.float32)
        self._scores = np.empty((block, len(centers)), np.float32)

    def __call__(self, frames: np.ndarray) -> HostNearest:
        shifted, scores = self._frames[: len(frames)], self._scores[: len(frames)]
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite shows in the scores
            np.subtract(frames, self._shift, out=shifted[:, :-1])
            np.matmul(shifted, self._centers, out=scores)
        units = scores.argmin(axis=1)  # the lowest of several; the first that is NaN, if any is
        return HostNearest(units.astype(np.int32), np.take_along_axis(scores, units[:, None], axis=1)[:, 0])
