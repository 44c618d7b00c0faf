"""Gradients written by hand for what XLA:CPU differentiates slowly; chosen by `Formulation.lean_gradients`.

The automatic gradient stores what each elementwise operation made: of a GELU four arrays, of attention several of all
pairs of frames. On a CPU these arrays are what the time goes into. Each function here keeps its arguments and little
else, and computes the rest again: the logits of one head and row at a time, in the cache. Values are those of the plain
spellings in `layers.py`, to rounding. On accelerators the plain spellings are right: their compilers fuse.

Elementwise arithmetic and accumulators are float32, or wider if the arguments are.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def wide_type(x) -> jnp.dtype:
    """What x is computed with element by element, and added up in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def wide(x: jax.Array) -> jax.Array:
    """x in that type."""
    return x.astype(wide_type(x))


def _again(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """`x`, to compute with once more when its `gradient` has come, if that is finite.

    XLA:CPU, which drops barriers, would find that the forward pass made the same of x, and keep that; or make it then.
    """
    return x + 0.0 * gradient[(0,) * gradient.ndim].astype(x.dtype)


# -------------------------------------------------------------------------------------------------------------- GELU


def gelu_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x Phi(x), the exact GELU, and its derivative Phi(x) + x phi(x); of float32 or wider."""
    # minus erf of -x: XLA:CPU, which heeds no barrier, would find that the forward pass made erf of x, and keep it
    below = 0.5 * (1.0 - lax.erf(x * -math.sqrt(0.5)))
    return x * below, below + x * jnp.exp(-0.5 * jnp.square(x)) * (1.0 / math.sqrt(2.0 * math.pi))


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """GELU of any shape; keeps x alone."""
    if x.dtype == jnp.bfloat16:
        return jax.nn.gelu(x, approximate=False)  # as in `layers.gelu`
    return 0.5 * x * (1.0 + lax.erf(x * math.sqrt(0.5)))


def _gelu_gradient(x, gradient):
    return ((gradient * gelu_and_slope(wide(x))[1]).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_gradient)


@jax.custom_vjp
def gelu_dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """GELU of x [rows, channels] times kernel [channels, outputs], wide; keeps x, and not what is multiplied."""
    return jnp.dot(gelu(x), kernel, preferred_element_type=wide_type(x))


def _gelu_dot_gradient(kept, gradient):
    x, kernel = kept
    gradient = gradient.astype(x.dtype)
    again, slope = gelu_and_slope(wide(_again(x, gradient)))
    of_gelu = jnp.dot(gradient, kernel.T, preferred_element_type=wide_type(x))
    of_kernel = jnp.dot(again.astype(x.dtype).T, gradient, preferred_element_type=wide_type(x))
    return (of_gelu * slope).astype(x.dtype), of_kernel.astype(kernel.dtype)


gelu_dot.defvjp(lambda x, kernel: (gelu_dot(x, kernel), (x, kernel)), _gelu_dot_gradient)


# --------------------------------------------------------------------------------------------------------- LayerNorm


class Normalized(NamedTuple):
    """Rows of zero mean and unit variance, `unit` [..., channels], and what they were multiplied by, [..., 1]."""

    unit: jax.Array
    scale: jax.Array

    def gradient(self, of_unit: jax.Array) -> jax.Array:
        """Of what was normalised, given that of `unit`."""
        mean = jnp.mean(of_unit, axis=-1, keepdims=True)
        along = jnp.mean(of_unit * self.unit, axis=-1, keepdims=True)
        return self.scale * (of_unit - mean - self.unit * along)


def normalized(x: jax.Array, *, epsilon: float) -> Normalized:
    """`layers.standardize` over the last axis."""
    mean = jnp.mean(x, axis=-1, keepdims=True)
    scale = lax.rsqrt(jnp.mean(jnp.square(mean - x), axis=-1, keepdims=True) + epsilon)
    return Normalized((x - mean) * scale, scale)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, shift: jax.Array, epsilon: float) -> jax.Array:
    """LayerNorm of x [batch, frames, channels] with scale and shift [channels]; keeps x."""
    unit = normalized(wide(x), epsilon=epsilon).unit
    return (unit * scale[None, None] + shift[None, None]).astype(x.dtype)


def _layer_norm_gradient(epsilon, kept, gradient):
    x, scale = kept
    of, gradient = normalized(wide(_again(x, gradient)), epsilon=epsilon), wide(gradient)
    return (
        of.gradient(gradient * scale[None, None]).astype(x.dtype),
        jnp.sum(gradient * of.unit, axis=(0, 1)).astype(scale.dtype),
        jnp.sum(gradient, axis=(0, 1)).astype(scale.dtype),
    )


layer_norm.defvjp(
    lambda x, scale, shift, epsilon: (layer_norm(x, scale, shift, epsilon), (x, scale)), _layer_norm_gradient
)


# --------------------------------------------------------------------------------------------------------- attention


class Pairs(NamedTuple):
    """What attention knows of pairs of frames beside queries and keys; each may be None.

    Attributes:
        gate: [batch, heads, frames] float32, of `position_bias`, by query.
        position_bias: [heads, frames, frames] float32, ungated.
        valid: [batch, frames] bool: keys that are real.
        keep: [batch, heads, frames, frames] bool: weights that dropout leaves.
    """

    gate: jax.Array | None
    position_bias: jax.Array | None
    valid: jax.Array | None
    keep: jax.Array | None


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, pairs: Pairs, rate: float
) -> tuple[jax.Array, jax.Array | None]:
    """softmax(query key^T + gate * bias) value, all [batch, frames, heads, head width], a head of a row at a time.

    Softmax is of float32. Dropout at `rate` where `pairs.keep` is given. Keeps the arguments, the output, and two
    numbers a query and head. Returns the position bias, too, to be given to the next layer: each layer adds its own
    gradient of all pairs to that of the layers after it, in place, and no other is stored.
    """
    return _attend(query, key, value, pairs, rate)[0]


class _One(NamedTuple):
    """Of one head of one row: its number among them all, [frames, head width], and of the pairs what belongs to it."""

    number: jax.Array
    query: jax.Array
    key: jax.Array
    value: jax.Array
    gate: jax.Array | None
    keep: jax.Array | None
    head: jax.Array
    row: jax.Array


def _flat(x: jax.Array) -> jax.Array:
    """[batch, frames, heads, width] -> [heads * batch, frames, width]: the rows of a batch find the position bias of
    their head in the cache."""
    return x.transpose(2, 0, 1, 3).reshape(-1, x.shape[1], x.shape[3])


def _unflat(x: jax.Array, batch: int) -> jax.Array:
    return x.reshape(-1, batch, *x.shape[1:]).transpose(1, 2, 0, 3)


def _wide_rows(x: jax.Array) -> jax.Array:
    """[batch, frames, heads, width] -> [batch * frames, heads * width]."""
    return wide(x.reshape(x.shape[0] * x.shape[1], -1))


def _ones(batch: int, heads: int, frames: int, pairs: Pairs) -> _One:
    """One after the other, without their queries, keys and values."""
    head, row = np.divmod(np.arange(heads * batch), batch)
    gate = None if pairs.gate is None else pairs.gate.swapaxes(0, 1).reshape(-1, frames)
    keep = None if pairs.keep is None else pairs.keep.swapaxes(0, 1).reshape(-1, frames, frames)
    return _One(jnp.arange(heads * batch), None, None, None, gate, keep, jnp.asarray(head), jnp.asarray(row))


def _with(three, one: _One) -> _One:
    """`one`, with its parts of queries, keys and values."""
    query, key, value = (lax.dynamic_index_in_dim(x, one.number, keepdims=False) for x in three)
    return one._replace(query=query, key=key, value=value)


def _put(x: jax.Array, one: _One, own: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, own.astype(x.dtype), one.number, axis=0)


def _logits(one: _One, pairs: Pairs) -> jax.Array:
    logits = jnp.dot(one.query, one.key.T, preferred_element_type=wide_type(one.query))
    if pairs.gate is not None:
        logits = logits + one.gate[:, None] * pairs.position_bias[one.head]
    if pairs.valid is not None:
        # finite, so that a filler row without any real frame stays free of NaN
        logits = jnp.where(pairs.valid[one.row][None], logits, jnp.finfo(logits.dtype).min)
    return logits


def _dropped(x: jax.Array, one: _One, rate: float) -> jax.Array:
    return x if one.keep is None else jnp.where(one.keep, x / (1.0 - rate), jnp.zeros((), x.dtype))


def _attend(query, key, value, pairs: Pairs, rate: float):
    three = tuple(map(_flat, (query, key, value)))

    def attend(mixed, one: _One):
        one = _with(three, one)
        logits = _logits(one, pairs)
        top = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        if one.keep is None and value.dtype == logits.dtype:  # divided where there is less to divide
            own = jnp.dot(weights, one.value) / total
        else:
            own = jnp.dot(_dropped((weights / total).astype(value.dtype), one, rate), one.value)
        return _put(mixed, one, own), (top[:, 0], 1.0 / total[:, 0])

    batch, frames, heads, _ = query.shape
    # All of `mixed` is overwritten. Zeros to begin with would be laid out for every layer before the first one runs.
    mixed, softmax = lax.scan(attend, three[2], _ones(batch, heads, frames, pairs))
    out = _unflat(mixed, batch)
    return (out, pairs.position_bias), (query, key, value, pairs, out, softmax)


def _attention_gradient(rate, kept, gradients):
    query, key, value, pairs, out, softmax = kept
    gradient, of_later = gradients
    batch, frames, heads, _ = query.shape
    dtype = wide_type(query)

    def one_gradient(carry, each):
        of_bias, three = carry
        one, (top, scale), along, gradient = each
        one = _with(three, one)
        weights = jnp.exp(_logits(one, pairs) - top[:, None]) * scale[:, None]
        of_value = jnp.dot(_dropped(weights.astype(value.dtype), one, rate).T, gradient, preferred_element_type=dtype)
        of_weights = jnp.dot(gradient, one.value.T, preferred_element_type=dtype)
        of_logits = weights * (_dropped(of_weights, one, rate) - along[:, None])
        if pairs.valid is not None:
            of_logits = jnp.where(pairs.valid[one.row][None], of_logits, 0.0)
        of_gate = None
        if pairs.gate is not None:
            of_gate = jnp.sum(of_logits * pairs.position_bias[one.head], axis=-1)
            own = of_bias[one.head] + of_logits * one.gate[:, None]
            of_bias = lax.dynamic_update_slice_in_dim(of_bias, own[None], one.head, axis=0)
        of_logits = of_logits.astype(query.dtype)
        of_three = jnp.dot(of_logits, one.key), jnp.dot(of_logits.T, one.query), of_value
        # each gradient takes the place of what it is the gradient of
        return (of_bias, tuple(_put(x, one, own) for x, own in zip(three, of_three, strict=True))), of_gate

    # multiplied as the output's matrix product has it, so that no second copy of it is kept
    along = (_wide_rows(gradient) * _wide_rows(out)).reshape(out.shape).sum(-1).transpose(2, 0, 1).reshape(-1, frames)
    every = (_ones(batch, heads, frames, pairs), softmax, along, _flat(gradient))
    three = tuple(map(_flat, (query, key, value)))
    (of_bias, of_three), of_gate = lax.scan(one_gradient, (of_later, three), every)
    if of_gate is not None:
        of_gate = of_gate.reshape(heads, batch, frames).swapaxes(0, 1)
    return *(_unflat(x, batch) for x in of_three), Pairs(of_gate, of_bias, None, None)


attention.defvjp(_attend, _attention_gradient)


# ------------------------------------------------------------------------------------------------------------- layers


@jax.custom_vjp
def unstack(stacked):
    """A tree of arrays [layers, ...] -> a tuple of trees without that axis; the gradient is stacked once.

    The automatic gradient adds up as many whole stacks as there are layers, each zero but for one layer.
    """
    layers = jax.tree.leaves(stacked)[0].shape[0]
    return tuple(jax.tree.map(lambda p, i=index: p[i], stacked) for index in range(layers))


unstack.defvjp(
    lambda stacked: (unstack(stacked), None),
    lambda _, gradients: (jax.tree.map(lambda *each: jnp.stack(each), *gradients),),
)
