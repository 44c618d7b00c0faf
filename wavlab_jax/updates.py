"""An update, made where it is wanted: parameters and the optimizer's state after it, or as they were."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from wavlab_jax.health import by_module, squares
from wavlab_jax.metrics import Sum, Sums
from wavlab_jax.model import Parameters


class Updated(NamedTuple):
    """Parameters, optimizer state, and squares of updates and weights by group of modules (`health.by_module`)."""

    params: Parameters
    optimizer: Any
    squares: Sums


def updated(optimizer: optax.GradientTransformation, gradient: Parameters, params, state, *, wanted) -> Updated:
    """`params` and optimizer `state` after an update by `gradient`, or as they were unless it is `wanted`, [] bool."""
    new = _update(optimizer, gradient, params, state, ordered=False)
    kept = jax.tree.map(lambda x, y: jnp.where(wanted, x, y), (new.params, new.optimizer), (params, state))
    return Updated(*kept, new.squares)


def updated_in_place(
    optimizer: optax.GradientTransformationExtraArgs, gradient: Parameters, params, state, *, wanted, norm=None
) -> Updated:
    """`updated` for XLA:CPU, which otherwise stores all that is new beside all that is old, to choose from.

    What a loop carries it overwrites, here in one turn or none. Where not `wanted`, the squares are not a number.
    `norm`, [] of the gradient: given to an optimizer that treats all arrays alike but for it (`optim.treats_alike`).
    One array after the other is then updated, so that what lies between gradient and update is stored for one alone.
    """

    def update(params, state) -> Updated:
        if norm is None:
            return _update(optimizer, gradient, params, state, ordered=True)
        return _update_in_turn(optimizer, gradient, params, state, norm)

    unknown = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(update, params, state).squares)
    return lax.while_loop(
        lambda turn: turn[0] < 1,
        lambda turn: (turn[0] + 1, update(turn[1].params, turn[1].optimizer)),
        (jnp.where(wanted, 0, 1), Updated(params, state, unknown)),
    )[1]


def _update(optimizer, gradient, params, state, *, ordered: bool) -> Updated:
    updates, state = optimizer.update(gradient, state, params)
    found = jax.tree_util.tree_map_with_path(squares, updates, params)
    if ordered:
        updates = jax.tree.map(lambda update, found: _after(found, update), updates, found)
    return Updated(optax.apply_updates(params, updates), state, by_module(found))


def _update_in_turn(optimizer, gradient, params, state, norm) -> Updated:
    """One array of the parameters after the other, with what the optimizer's state holds for it."""
    arrays, structure = jax.tree_util.tree_flatten_with_path(params)

    def is_moment(part) -> bool:
        return jax.tree.structure(part) == structure

    moved, states, found = [], [], []
    for index, ((path, array), own_gradient) in enumerate(zip(arrays, jax.tree.leaves(gradient), strict=True)):
        own_state = jax.tree.map(
            lambda part, i=index: jax.tree.leaves(part)[i] if is_moment(part) else part, state, is_leaf=is_moment
        )
        update, own_state = optimizer.update(own_gradient, own_state, array, norm=norm)
        found.append(squares(path, update, array))
        update, norm = _after(found[-1], update), _after(found[-1], norm)
        moved.append(optax.apply_updates(array, update))
        states.append(own_state)
    state = jax.tree.map(
        lambda old, *new: jax.tree.unflatten(structure, new) if is_moment(old) else new[0],
        state,
        *states,
        is_leaf=is_moment,
    )
    return Updated(jax.tree.unflatten(structure, moved), state, by_module(jax.tree.unflatten(structure, found)))


def _after(found: Sum, x: jax.Array) -> jax.Array:
    """`x`, but not before `found` is there: so what reads an array comes before what overwrites it with `x`.

    XLA:CPU drops barriers; that squares are never negative it does not know.
    """
    return jnp.where(jnp.minimum(jnp.min(found.total), jnp.min(found.weight)) < 0.0, jnp.zeros((), x.dtype), x)
