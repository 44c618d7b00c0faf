"""Everything that training changes: parameters, optimizer state and the step number."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from wavlab_jax.model import Parameters


@partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "optimizer"], meta_fields=[])
@dataclass(frozen=True)
class TrainState:
    """A pytree. `step` [] int32 updates have been made, with batches 0 .. step - 1: it is also the data position."""

    step: jax.Array
    params: Parameters
    optimizer: Any


def fresh_state(params: Parameters, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0 with an untouched optimizer."""
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, optimizer=optimizer.init(params))
