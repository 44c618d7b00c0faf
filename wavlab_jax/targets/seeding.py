"""Where k-means starts: greedy k-means++."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.jit, static_argnames="units")
def plus_plus(key: jax.Array, frames: jax.Array, *, units: int) -> jax.Array:
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
