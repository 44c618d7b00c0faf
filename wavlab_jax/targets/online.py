"""Units that are computed in the step, of the clean waveform: no label files.

stored sets: Batch.units [rows, frames, stored] ─┐
clean waveform ─ one `OnlineSet` a set ▶ units   ┴▶ Batch.units [rows, frames, sets], in the stage's order
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data_pipelines.batch import NO_UNIT, Batch

UnitsOf = Callable[[Any, jax.Array, jax.Array], jax.Array]


class OnlineSet(NamedTuple):
    """One set of units.

    Attributes:
        frozen: a pytree of arrays that training does not change.
        units_of: (frozen, clean waveform [rows, samples], real samples [rows]) -> int32 [rows, frames]; pure. Frames
            that are not real may have any value.
    """

    frozen: Any
    units_of: UnitsOf


class Targets(NamedTuple):
    """What a step needs to label its batch.

    Attributes:
        frozen: a pytree of arrays, on every device; an argument of the compiled step, never closed over, and never part
            of the training state or of a checkpoint: they are made again from the stage's configuration.
        label: (frozen, batch of one pass) -> the batch with all sets in `units`; pure.
    """

    frozen: Any
    label: Callable[[Any, Batch], Batch]


def make_targets(sets: Sequence[OnlineSet | None], mesh: Mesh) -> Targets | None:
    """Targets of a stage's sets of units in order, None for those that the batch brings; None if it brings all."""
    if all(each is None for each in sets):
        return None
    units_of = tuple(None if each is None else each.units_of for each in sets)

    def label(frozen, batch: Batch) -> Batch:
        clean = clean_waveform(batch)
        stored = iter(range(batch.units.shape[-1]))
        columns = []
        for place, function in enumerate(units_of):
            if function is None:
                columns.append(batch.units[..., next(stored)])
            else:
                units = function(frozen[place], clean, batch.samples)
                columns.append(jnp.where(batch.valid, units, NO_UNIT).astype(jnp.int32))
        return batch._replace(units=jnp.stack(columns, axis=-1))

    frozen = tuple(None if each is None else each.frozen for each in sets)
    return Targets(jax.device_put(frozen, NamedSharding(mesh, P())), label)


def clean_waveform(batch: Batch) -> jax.Array:
    """[rows, samples]: the clean waveform if the batch carries one, else what is heard, into which nothing was mixed
    then: a stage that mixes must set `DataConfig.keep_clean`, which `StageConfig` checks."""
    return batch.clean if batch.clean.shape[-1] else batch.waveform
