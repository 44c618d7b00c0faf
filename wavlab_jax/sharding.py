"""Where every array lives: the mesh, and the two tables that lead from a parameter's path to mesh axes."""

import math
import re
from dataclasses import dataclass
from functools import lru_cache

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data_pipelines.batch import NO_UNIT, NO_UTTERANCE, Batch, num_frames
from wavlab_jax.state import TrainState


class ShardingError(ValueError):
    """A mesh that does not fit the devices, or a parameter that the tables do not place exactly once."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis. `data`: copies of the parameters; -1: all that are left. `fsdp`: pieces of them."""

    data: int = -1
    fsdp: int = 1


BATCH_AXES = ("data", "fsdp")  # rows of a batch are split over both

# Parameter path (below the model) -> logical name of each axis. Stacked layers lead with "layers". Exactly one row
# matches; there is no catch-all.
PARAMETER_AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"encoder/frontend/convolutions/\d+/kernel", ("taps", "channels_in", "channels")),
    (r"encoder/frontend/convolutions/\d+/bias", ("channels",)),
    (r"encoder/frontend/convolutions/\d+/norm/(scale|bias)", ("channels",)),
    (r"encoder/frontend/norm/(scale|bias)", ("channels",)),
    (r"encoder/frontend/projection/kernel", ("channels_in", "width")),
    (r"encoder/frontend/projection/bias", ("width",)),
    (r"encoder/mask_embedding", ("width",)),
    (r"encoder/position/direction", ("taps", "group_in", "width")),
    (r"encoder/position/gain", ("taps",)),
    (r"encoder/position/bias", ("width",)),
    (r"encoder/norm/(scale|bias)", ("width",)),
    (r"encoder/relative_bias", ("buckets", "heads")),
    (r"encoder/layers/attention/(query|key|value)/kernel", ("layers", "width_in", "heads_width")),
    (r"encoder/layers/attention/(query|key|value)/bias", ("layers", "heads_width")),
    (r"encoder/layers/attention/output/kernel", ("layers", "heads_width_in", "width")),
    (r"encoder/layers/attention/output/bias", ("layers", "width")),
    (r"encoder/layers/attention/gate/dense/kernel", ("layers", "head_width", "gates")),
    (r"encoder/layers/attention/gate/dense/bias", ("layers", "gates")),
    (r"encoder/layers/attention/gate/constant", ("layers", "heads")),
    (r"encoder/layers/expand/kernel", ("layers", "width_in", "feed_forward")),
    (r"encoder/layers/expand/bias", ("layers", "feed_forward")),
    (r"encoder/layers/contract/kernel", ("layers", "feed_forward_in", "width")),
    (r"encoder/layers/contract/bias", ("layers", "width")),
    (r"encoder/layers/(attention_norm|final_norm)/(scale|bias)", ("layers", "width")),
    (r"head/projection/kernel", ("width_in", "dim")),
    (r"head/projection/bias", ("dim",)),
    (r"head/embeddings", ("units", "dim")),
    (r"head/bias", ("units",)),
    (r"head/quantizer/scores/kernel", ("channels_in", "codes")),
    (r"head/quantizer/scores/bias", ("codes",)),
    (r"head/quantizer/codevectors", ("groups", "codes", "dim")),
    (r"head/target_projection/kernel", ("dim_in", "dim")),
    (r"head/context_projection/kernel", ("width_in", "dim")),
    (r"head/(target|context)_projection/bias", ("dim",)),
    (r"adapter/(query|key|value|output)/down", ("layers", "adapter_in", "adapter")),
    (r"adapter/(query|key|value|output)/up", ("layers", "adapter", "adapter_out")),
    (r"adapter/(down|up)/kernel", ("layers", "adapter_in", "adapter_out")),
    (r"adapter/(down|up)/bias", ("layers", "adapter_out")),
    (r"adapter/norm/(scale|bias)", ("layers", "width")),
    (r"head/output/kernel", ("width_in", "tokens")),
    (r"head/output/bias", ("tokens",)),
    (r"head/layer_weights", ("hidden",)),
    (r"head/convolutions/\d+/kernel", ("taps", "taps", "channels_in", "channels")),
    (r"head/convolutions/\d+/bias", ("channels",)),
    (r"head/embed/kernel", ("features_in", "width")),
    (r"head/embed/bias", ("width",)),
    (r"head/blocks/(query|key|value|output)/kernel", ("layers", "heads_width_in", "heads_width")),
    (r"head/blocks/(query|key|value|output)/bias", ("layers", "heads_width")),
    (r"head/blocks/expand/kernel", ("layers", "width_in", "feed_forward")),
    (r"head/blocks/expand/bias", ("layers", "feed_forward")),
    (r"head/blocks/contract/kernel", ("layers", "feed_forward_in", "width")),
    (r"head/blocks/contract/bias", ("layers", "width")),
    (r"head/blocks/(attention_norm|feed_forward_norm)/(scale|bias)", ("layers", "width")),
    (r"head/norm/(scale|bias)", ("width",)),
)

# Logical axis -> mesh axis. Only the input axes of the big matrices are split: gathered before use, never a
# convolution's channels, whose splitting makes XLA reshuffle activations.
LOGICAL_TO_MESH: dict[str, str | None] = {
    "width_in": "fsdp",
    "heads_width_in": "fsdp",
    "feed_forward_in": "fsdp",
    **dict.fromkeys(
        ("taps", "channels_in", "channels", "width", "group_in", "buckets", "heads", "layers", "heads_width"), None
    ),
    **dict.fromkeys(("head_width", "gates", "feed_forward", "dim", "dim_in", "units", "groups", "codes"), None),
    **dict.fromkeys(("adapter", "adapter_in", "adapter_out"), None),  # small: copied
    **dict.fromkeys(("tokens", "hidden", "features_in"), None),
}


def make_mesh(cfg: MeshConfig, devices=None) -> Mesh:
    """A ("data", "fsdp") mesh over `devices` (all of them by default).

    On a TPU, neighbours on the mesh are neighbours on the torus where that is possible; pods that are connected by a
    network alone (several slices) are parts of the data axis. GPUs and CPUs are in the order of their hosts, so that
    `fsdp` stays within one where it divides its devices. (`jax.make_mesh` refuses several slices, which are what jax
    calls the hosts of GPUs, and on most TPUs a mesh that would split an axis of the torus.)

    Raises ShardingError: the axes do not cover the devices exactly, or the torus cannot be laid out so.
    """
    devices = jax.devices() if devices is None else devices
    data = len(devices) // max(cfg.fsdp, 1) if cfg.data == -1 else cfg.data
    if min(data, cfg.fsdp) < 1 or data * cfg.fsdp != len(devices):
        raise ShardingError(
            f"mesh data={cfg.data}, fsdp={cfg.fsdp} does not cover {len(devices)} devices exactly: give a mesh.fsdp, "
            "at least 1, that divides their number, and leave mesh.data at -1, all that are left"
        )
    return Mesh(_laid_out(devices, data, cfg.fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def _laid_out(devices, data: int, fsdp: int) -> np.ndarray:
    """[data, fsdp] devices."""
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if data % slices:
        raise ShardingError(f"{slices} slices of TPUs: they must divide mesh data={data}")
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
        within, across = (data // slices, fsdp), (slices, 1)
        return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    except (NotImplementedError, AssertionError, ValueError) as error:  # slices of several sizes are the last
        raise ShardingError(f"mesh data={data}, fsdp={fsdp} cannot be laid out on these devices: {error}") from error


def local_devices(mesh: Mesh) -> list:
    """This process' devices of `mesh`, in its order; they need not be neighbours there, as a TPU host's rarely are."""
    return [device for device in mesh.devices.flat if device.process_index == jax.process_index()]


def local_mesh(mesh: Mesh) -> Mesh:
    """A mesh over this process' devices of `mesh`, with as much of its fsdp axis as divides them."""
    own = local_devices(mesh)
    fsdp = math.gcd(mesh.shape["fsdp"], len(own))
    return Mesh(np.asarray(own).reshape(-1, fsdp), mesh.axis_names, axis_types=(AxisType.Auto,) * 2)


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Partition of one parameter, by the two tables. Raises ShardingError: no row, several rows, or does not divide."""
    rows = [axes for pattern, axes in PARAMETER_AXES if re.fullmatch(pattern, path)]
    if len(rows) != 1:
        raise ShardingError(f"parameter {path} matches {len(rows)} rows of PARAMETER_AXES; it must match exactly one")
    if len(rows[0]) != len(shape):
        raise ShardingError(f"parameter {path} has shape {shape}, but PARAMETER_AXES gives it the axes {rows[0]}")
    spec = tuple(LOGICAL_TO_MESH[axis] for axis in rows[0])
    for size, axis in zip(shape, spec, strict=True):
        if axis and size % mesh.shape[axis]:
            raise ShardingError(
                f"parameter {path} {shape}: {size} does not divide over {mesh.shape[axis]} ({axis}): choose a "
                f"mesh.{axis} that divides it"
            )
    return P(*spec)


def parameter_shardings(params, mesh: Mesh):
    """A tree like `params` (arrays or shapes) of NamedShardings."""

    def place(path, leaf):
        name = "/".join(str(part.key) for part in path)
        return NamedSharding(mesh, parameter_spec(name, tuple(leaf.shape), mesh))

    return jax.tree_util.tree_map_with_path(place, params)


def abstract_on(params, mesh: Mesh):
    """A tree of shapes (or arrays) as shapes that carry their place on `mesh`: what a restore is told."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        parameter_shardings(params, mesh),
    )


def state_shardings(state: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A tree like `state` (arrays or shapes): moments lie where their parameters lie, counters everywhere.

    Parameters that the optimizer leaves out have a `MaskedNode` in place of moments.
    """
    params = parameter_shardings(state.params, mesh)
    everywhere = NamedSharding(mesh, P())
    moments = optax.tree_map_params(
        optimizer,
        lambda moment, sharding: moment if isinstance(moment, optax.MaskedNode) else sharding,
        state.optimizer,
        params,
        transform_non_params=lambda _: everywhere,
        is_leaf=lambda moment: isinstance(moment, optax.MaskedNode),
    )
    return TrainState(step=everywhere, params=params, optimizer=moments)


def micro_batches(rows: int, samples: int, *, seconds_per_device: float, devices: int) -> int:
    """How many passes a step of `rows` rows takes, so that a device holds `seconds_per_device` at most.

    `samples` of a row at 16 kHz. At least one row a device and pass, even where that alone is over the limit.
    """
    rows_per_device = max(int(seconds_per_device * 16_000 / samples + 1e-6), 1)
    return -(-rows // (rows_per_device * devices))


def place_batch(batch: Batch, *, mesh: Mesh, passes: int) -> Batch:
    """This host's rows -> global arrays [passes, rows of a pass, ...], rows split over the mesh.

    Where the rows do not divide over passes and devices, filler rows without a valid frame are added; they weigh
    nothing in any sum.
    """
    rows = batch.waveform.shape[0]
    multiple = passes * len(local_devices(mesh))
    padded = -(-rows // multiple) * multiple
    if padded != rows:
        batch = Batch(*(_fill(name, field, padded - rows) for name, field in batch._asdict().items()))
    sharding = NamedSharding(mesh, P(None, BATCH_AXES))

    def place(field):
        local = field.reshape(passes, padded // passes, *field.shape[1:])
        return jax.make_array_from_process_local_data(sharding, local)

    return Batch(*(place(np.asarray(field)) for field in batch))


def place_whole_batch(batch: Batch, *, mesh: Mesh) -> Batch:
    """A batch that every process holds in full -> global arrays [1, rows, ...], rows split over the mesh, in order.

    The rows must divide over the devices.
    """
    sharding = NamedSharding(mesh, P(None, BATCH_AXES))

    def place(field):
        field = np.asarray(field)[None]
        return jax.make_array_from_callback(field.shape, sharding, lambda index: field[index])

    return Batch(*map(place, batch))


@lru_cache(maxsize=64)  # a handful of values, placed once each
def place_flag(value: int, *, mesh: Mesh) -> jax.Array:
    """This process' `value` on each of its devices: int32 [devices of all processes]."""
    local = np.full(len(local_devices(mesh)), value, np.int32)
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P(BATCH_AXES)), local)


def abstract_flag(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The shape of what `place_flag` makes."""
    return jax.ShapeDtypeStruct((mesh.size,), np.int32, sharding=NamedSharding(mesh, P(BATCH_AXES)))


def abstract_batch(mesh: Mesh, *, rows: int, samples: int, sets: int, passes: int, clean: bool = False) -> Batch:
    """Shapes of what `place_batch` makes of `rows` rows of `samples` with `sets` sets of units, of all hosts."""
    multiple = passes * mesh.size
    rows = -(-rows // multiple) * multiple // passes
    frames = num_frames(samples)
    fields = {
        "waveform": ((samples,), np.float32),
        "clean": ((samples if clean else 0,), np.float32),
        "units": ((frames, sets), np.int32),
        "valid": ((frames,), np.bool_),
        "seed": ((), np.uint32),
    }
    sharding = NamedSharding(mesh, P(None, BATCH_AXES))

    def shape(name):
        own, dtype = fields.get(name, ((), np.int32))
        return jax.ShapeDtypeStruct((passes, rows, *own), dtype, sharding=sharding)

    return Batch(*map(shape, Batch._fields))


def _fill(name: str, field: np.ndarray, rows: int) -> np.ndarray:
    value = {"units": NO_UNIT, "utterance": NO_UTTERANCE, "partner": NO_UTTERANCE}.get(name, 0)
    return np.concatenate([field, np.full((rows, *field.shape[1:]), value, field.dtype)])
