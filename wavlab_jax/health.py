"""What a step measures of itself beside its loss: by language, by unit, by layer, and how far the weights moved.

All of it is computed where the numbers already are, and all but the largest values are sums that are divided once, when
a line of metrics is written; so they are the same on any devices and in any number of passes. What crosses devices for
it is a few small vectors. docs/health.md says what each number means.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from data_pipelines.batch import Batch
from wavlab_jax.metrics import Sum, Sums
from wavlab_jax.model import Parameters
from wavlab_jax.objectives import Measured


class Observed(NamedTuple):
    """What was measured of the rows of one or more passes.

    Attributes:
        sums: scalars, of the loss and what else a line of metrics tells.
        languages: each [languages]: some of those terms, told apart by language.
        counts: each [units]: `Measured.counts`.
        layers: "nonfinite" [layers + 1]: values that are infinite or not a number, and the number of all values.
        extremes: "largest" [layers + 1]: largest absolute finite value. The only ones that do not add up.
    """

    sums: Sums
    languages: Sums
    counts: dict[str, jax.Array]
    layers: Sums
    extremes: dict[str, jax.Array]


def observe(measured: Measured, batch: Batch, *, languages: int, width: int) -> Observed:
    """The measurements of a pass, over its real rows. `languages` of the manifest; `width` of the layers.

    `layers` and `extremes` are empty where there is no encoder.
    """
    layers, extremes = {}, {}
    if measured.layers is not None:
        real = jnp.any(batch.valid, axis=1)[None]
        frames = jnp.sum(batch.valid, dtype=jnp.float32)
        nonfinite = jnp.sum(jnp.where(real, measured.layers.nonfinite, 0.0), axis=1)
        layers = {"nonfinite": Sum(nonfinite, jnp.full(nonfinite.shape, frames * width))}
        extremes = {"largest": jnp.max(jnp.where(real, measured.layers.largest, 0.0), axis=1)}
    return Observed(
        sums=measured.sums,
        languages={name: by_language(term, batch.language, languages) for name, term in measured.rows.items()},
        counts=measured.counts,
        layers=layers,
        extremes=extremes,
    )


def combine(one: Observed, other: Observed) -> Observed:
    """Both passes together: everything is added, of extremes the larger one stays."""
    added = jax.tree.map(jnp.add, one._replace(extremes={}), other._replace(extremes={}))
    return added._replace(extremes=jax.tree.map(jnp.maximum, one.extremes, other.extremes))


def combine_copies(own: Observed, axis: str) -> Observed:
    """What each copy of the parameters along a mesh axis has measured, together: for `jax.shard_map`."""
    added = jax.tree.map(lambda x: jax.lax.psum(x, axis), own._replace(extremes={}))
    return added._replace(extremes=jax.tree.map(lambda x: jax.lax.pmax(x, axis), own.extremes))


def by_language(rows: Sum, language: jax.Array, languages: int) -> Sum:
    """A term [rows] as [languages], by each row's `language` [rows]."""
    # compared and added up, not scattered or multiplied: exact on a TPU, in the same order each time on a GPU, and a
    # row that is not finite spoils its own language alone
    own = language[:, None] == jnp.arange(languages)[None]
    return Sum(*(jnp.sum(jnp.where(own, part[:, None], 0.0), axis=0) for part in rows))


def mask_coverage(batch: Batch, mask: jax.Array) -> Sum:
    """Hidden frames of all real frames; `mask` and `batch.valid` [..., frames]."""
    return Sum(jnp.sum(batch.valid & mask, dtype=jnp.float32), jnp.sum(batch.valid, dtype=jnp.float32))


def squares(path, update: jax.Array, weight: jax.Array) -> Sum:
    """Of what is added to an array of the parameters at `path`, and of the array before; of stacked layers [layers]."""
    stacked = [key.key for key in path[:2]] == ["encoder", "layers"]
    axis = tuple(range(1, weight.ndim)) if stacked else None
    return Sum(*(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axis) for x in (update, weight)))


def by_module(found: Parameters) -> Sums:
    """`squares` of all parameters, added up by group of modules.

    "layers" is [layers], the others are scalars: "frontend", "position", "encoder" (its other parameters), "head"; of a
    frozen encoder "head", and "adapter" where there is one. The root of a group's ratio is its update-to-weight ratio.
    """
    groups = dict(found)
    if "encoder" in found:
        rest = dict(found["encoder"])
        groups = {name: rest.pop(name) for name in ("frontend", "position", "layers")} | {
            "encoder": rest,
            "head": found["head"],
        }
    return {name: _total(group) for name, group in groups.items()}


def _total(tree) -> Sum:
    found = jax.tree.leaves(tree, is_leaf=lambda part: isinstance(part, Sum))
    return Sum(sum(one.total for one in found), sum(one.weight for one in found))
