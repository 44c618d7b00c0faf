"""The nearest centroid of every frame: the product and the search that fitting, labelling and teachers share."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

CPU_BLOCK = 1024  # frames of one block on a CPU: its scores against 500 units are 2 MB and stay in the cache


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
