"""What a training step costs on devices that are not at hand: the very program is compiled for them, and read.

    libtpu ── topology ▶ devices that can be compiled for ─┐
    virtual CPU devices (an estimate) ─────────────────────┴▶ mesh ▶ make_train_step.lower ▶ compile ▶ `Compiled`

TPU programs are compiled by the TPU's own compiler, which refuses what does not fit. Elsewhere the accelerator's
formulation is compiled for the CPU: operations and exchanges are the same before XLA's last passes, memory is an
estimate (XLA:CPU keeps arrays in float32 that accelerators keep in bfloat16, and fuses less).
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data_pipelines.batch import num_frames
from wavlab_jax.chips import Chip, chip_named
from wavlab_jax.compiled_program import Collective, Program, read_program
from wavlab_jax.encoder import EncoderConfig, formulation_for
from wavlab_jax.flops import recomputed_flops, row_flops
from wavlab_jax.sharding import abstract_batch, parameter_shardings
from wavlab_jax.step import LearnerConfig, abstract_state, make_train_step
from wavlab_jax.targets.online import Targets


class PlanError(ValueError):
    """Devices that cannot be planned for; the message says what to give."""


class DoesNotFit(RuntimeError):
    """The compiler refused a program because it needs more memory than a chip has; the message is the compiler's."""


class Pod(NamedTuple):
    """Devices that a program can be compiled for.

    Attributes:
        devices: of JAX, real or described.
        chip: that each of them stands for; None: a CPU.
        own_compiler: whether the program is the chip's own, or a CPU's that stands for it.
    """

    devices: Sequence
    chip: Chip | None
    own_compiler: bool


class Step(NamedTuple):
    """The shape of one step: `rows` of `samples`, over all devices, in `passes`; and of its labels."""

    rows: int
    samples: int
    passes: int
    sets: int
    clean: bool = False


class Memory(NamedTuple):
    """Bytes on one chip. `temporaries`: gradients, activations and everything else that lives during a step."""

    parameters: int
    optimizer: int
    batch: int
    temporaries: int
    program: int

    @property
    def total(self) -> int:
        """All of them at once."""
        return sum(self)


class Compiled(NamedTuple):
    """`memory` of one chip; `program`: what one chip does in a step, all passes."""

    memory: Memory
    program: Program


def tpu_pod(topology: str) -> Pod:
    """The pod of a topology like "v5e:16x16", from libtpu's compile-only client.

    Raises PlanError where libtpu is not installed or does not know the topology.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nobody answers outside of Google's cloud
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is run: a training beside it is not disturbed
    from jax.experimental import topologies

    chip = chip_of_topology(topology)
    # a v4 chip's two cores work as one device, which its compile-only client must be told
    more = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    try:
        name = f"{chip.name}:{topology.partition(':')[2]}"
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
    except Exception as error:  # a plain RuntimeError of JAX or of libtpu, whatever went wrong
        raise PlanError(f"{topology}: {str(error).splitlines()[0]}") from error
    return Pod(described.devices, chip, True)


def chip_of_topology(topology: str) -> Chip:
    """Of "v5e:16x16". Raises PlanError, also for a chip that is no TPU, or ChipError."""
    name, _, sides = topology.partition(":")
    if not sides or not all(side.isdecimal() and int(side) for side in sides.split("x")):
        raise PlanError(
            f"{topology!r} is not a topology: give a chip and its sides, for instance v5e:16x16 or v4:4x4x2"
        )
    chip = chip_named(name)
    if chip.platform != "tpu":
        number = math.prod(int(side) for side in sides.split("x"))
        raise PlanError(f"{topology}: topologies are of TPUs; give --chips {number} --chip {chip.name}")
    return chip


def chips_of_topology(topology: str) -> int:
    """Number of chips of "v5e:16x16"."""
    return math.prod(int(side) for side in topology.partition(":")[2].split("x"))


def compile_step(
    learner: LearnerConfig, mesh: Mesh, step: Step, *, pod: Pod, targets: Targets | None = None, languages: int = 0
) -> Compiled:
    """Compiles the update for `mesh` (over the pod's devices). Raises DoesNotFit.

    `languages` are told apart in the step's measurements, as in a run on a corpus of so many.
    """
    state = abstract_state(learner, mesh)
    batch = abstract_batch(mesh, **step._asdict())
    platform = "cpu" if pod.chip is None else pod.chip.platform
    formulation = formulation_for(platform, devices=mesh.size)
    if not pod.own_compiler and formulation.position == "grouped":  # which XLA's own partitioner cannot split well
        formulation = formulation._replace(position="by_group")
    train_step = make_train_step(learner, mesh, targets, formulation=formulation, languages=languages)
    lowered = train_step.lower(state, batch)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(_refusal(str(error))) from error
    said = compiled.memory_analysis()
    parameters, optimizer = _bytes_on_a_chip(state.params), _bytes_on_a_chip(state.optimizer)
    left_over = max(said.output_size_in_bytes - said.alias_size_in_bytes, 0)
    memory = Memory(
        parameters=parameters,
        optimizer=optimizer,
        batch=max(said.argument_size_in_bytes - parameters - optimizer, 0),
        temporaries=said.temp_size_in_bytes + left_over,
        program=said.generated_code_size_in_bytes,
    )
    return Compiled(memory, read_program(compiled.as_text()))


def _refusal(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if "Used" in line or "Exceeded" in line or "Ran out" in line]
    return " ".join(lines[:1]) or message.splitlines()[0]


def _bytes_on_a_chip(tree) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def memory_by_formula(learner: LearnerConfig, mesh: Mesh, step: Step) -> Memory:
    """What must be held, by arithmetic: state, gradients, and what the backward pass reads again.

    A lower bound: activations are counted once each, in the dtype that they are made in, and nothing that a compiler
    keeps beside them.
    """
    state = abstract_state(learner, mesh)
    parameters, optimizer = _bytes_on_a_chip(state.params), _bytes_on_a_chip(state.optimizer)
    rows = -(-step.rows // (step.passes * mesh.size))
    gradients = parameters * (2 if step.passes > 1 else 1)
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        batch=_bytes_on_a_chip(abstract_batch(mesh, **step._asdict())),
        temporaries=gradients + rows * row_activations(learner.encoder, samples=step.samples),
        program=0,
    )


def row_activations(cfg: EncoderConfig, *, samples: int) -> int:
    """Bytes that the backward pass of one row of `samples` reads again, by `cfg.rematerialize`.

    Of each convolution its input and its output before the norm. Of a layer, a frame: input, both norms' outputs,
    query, key, value, mixed values, both halves' outputs (9 width), feed-forward before and after GELU; and of every
    pair of frames and head the softmax in float32 and in the compute dtype.
    """
    size, frames, length, extractor = np.dtype(cfg.compute_dtype).itemsize, num_frames(samples), samples, samples
    for channels, kernel, stride in zip(
        cfg.extractor_channels, cfg.extractor_kernels, cfg.extractor_strides, strict=True
    ):
        length = (length - kernel) // stride + 1
        extractor += 2 * length * channels
    dense = frames * (5 * cfg.width + cfg.feed_forward)
    whole = frames * (9 * cfg.width + 2 * cfg.feed_forward) * size + cfg.heads * frames**2 * (4 + size)
    kept = {"nothing": whole, "dots": (dense + frames * cfg.width) * size, "layers": frames * cfg.width * size}
    one = 0 if cfg.rematerialize == "nothing" else whole  # the layer that is being computed again
    return extractor * size + cfg.layers * kept[cfg.rematerialize] + one


def training_flops(learner: LearnerConfig, step: Step, mesh: Mesh) -> float:
    """Of one step by formula, over all devices; filler rows are computed as well."""
    rows = _rows_computed(step, mesh)
    negatives = getattr(learner.objective, "negatives", 0)
    return rows * row_flops(learner.encoder, learner.head, samples=step.samples, negatives=negatives).training


def recomputed(learner: LearnerConfig, step: Step, mesh: Mesh) -> float:
    """Operations of one step that `rematerialize` adds to `training_flops`."""
    return _rows_computed(step, mesh) * recomputed_flops(learner.encoder, samples=step.samples)


def _rows_computed(step: Step, mesh: Mesh) -> int:
    multiple = step.passes * mesh.size
    return -(-step.rows // multiple) * multiple


class Exchange(NamedTuple):
    """Collectives of one `kind` along the mesh axes `axes`: how many a step, and bytes of their arrays on one chip."""

    kind: str
    axes: str
    count: int
    bytes: int


def exchanges(program: Program, mesh: Mesh) -> list[Exchange]:
    """All collectives of a step, added up."""
    table: dict[tuple[str, str], tuple[int, int]] = {}
    for each in program.collectives:
        count, size = table.get((each.kind, axes_of(each, mesh)), (0, 0))
        table[each.kind, axes_of(each, mesh)] = (count + each.times, size + each.times * each.bytes)
    return [Exchange(*key, *value) for key, value in sorted(table.items(), key=lambda item: -item[1][1])]


def axes_of(collective: Collective, mesh: Mesh) -> str:
    """Mesh axes along which its devices differ: "data", "fsdp" or "data+fsdp"."""
    groups = collective.groups or (tuple(range(mesh.size)),)
    places = np.array(np.unravel_index(np.array(max(groups, key=len)), mesh.devices.shape))
    differing = [axis for axis, place in zip(mesh.axis_names, places, strict=True) if len(set(place.tolist())) > 1]
    return "+".join(differing) or "none"


def strangers(program: Program, learner: LearnerConfig, mesh: Mesh) -> list[Collective]:
    """Collectives that neither fsdp nor the gradient accounts for.

    Accounted for are gathers of parameters, or of a layer's slice of them; sums of gradients, which have those shapes
    or are a device's part of them, perhaps padded; and sums of statistics, which are no larger than a bias. Compilers
    transpose arrays, and stack the parts that they gather, an axis of `fsdp` before the axis that is split; of a small
    array that lies whole on every device, the TPU's may have each of them update a part.
    """
    params = abstract_state(learner, mesh).params
    shapes: set[tuple[int, ...]] = set()
    small, fsdp = 4096, mesh.shape["fsdp"]
    for (path, leaf), place in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(parameter_shardings(params, mesh)), strict=True
    ):
        whole, part = leaf.shape, place.shard_shape(leaf.shape)
        below = 1 if any(step.key == "layers" for step in path) else 0  # a layer's slice
        for shape in (whole, part, whole[below:], part[below:]):
            shapes |= {_bare(shape), *([_bare((fsdp, *shape))] if part != whole else _in_parts(shape, fsdp))}
        small = max(small, whole[-1])

    def known(shape: tuple[int, ...], kind: str) -> bool:
        bare = _bare(shape)
        if bare in shapes or (kind == "all-reduce" and math.prod(shape) <= small):
            return True
        return kind == "reduce-scatter" and any(_padded(bare, one) for one in shapes)

    return [
        each
        for each in program.collectives
        if each.kind not in ("all-gather", "all-reduce", "reduce-scatter")
        or not all(known(shape, each.kind) for shape in each.shapes)
    ]


def _in_parts(shape: tuple[int, ...], parts: int) -> list[tuple[int, ...]]:
    """`_bare` shapes with one axis, whichever it can be, as so many parts."""
    split = [axis for axis, size in enumerate(shape) if size % parts == 0]
    return [_bare((parts, *shape[:axis], shape[axis] // parts, *shape[axis + 1 :])) for axis in split]


def _bare(shape: Sequence[int]) -> tuple[int, ...]:
    """Its sizes above 1, in order of size: the same for transposed arrays."""
    return tuple(sorted(size for size in shape if size != 1))


def _padded(shape: tuple[int, ...], of: tuple[int, ...]) -> bool:
    """Whether `shape` is `of` with axes made longer by an eighth at most (1,920 of XLS-R become 16 x 128 on TPUs)."""
    return len(shape) == len(of) and all(b <= a <= b + max(b // 8, 8) for a, b in zip(shape, of, strict=True))


MOST_ROWS = 64  # a device and pass, beyond which no search goes


class Tried(NamedTuple):
    """A size that was compiled: `rows` a device and pass, the memory it takes, or None if it does not fit."""

    rows: int
    memory: int | None


def largest_rows(
    memory_of: Callable[[int], int | None], *, limit: int, first: int = 1, fixed: int = 0, most: int = MOST_ROWS
) -> Iterator[Tried]:
    """Tries rows a device until two neighbours are known of which one fits `limit` bytes and the next does not.

    `memory_of(rows)`: bytes, or None where the compiler refused. It is asked of `first` first; `fixed` bytes of the
    answer do not grow with rows. The rest grows about linearly, so that the third try is mostly the last but one. The
    answer is the largest that fitted.
    """
    known: dict[int, int | None] = {}

    def attempt(rows: int) -> Tried:
        known[rows] = memory_of(rows)
        if known[rows] is not None and known[rows] > limit:
            known[rows] = None
        return Tried(rows, known[rows])

    yield attempt(min(first, most))
    while True:
        fitting = sorted(rows for rows, memory in known.items() if memory is not None)
        refused = min((rows for rows, memory in known.items() if memory is None), default=most + 1)
        best = fitting[-1] if fitting else 0
        if refused == best + 1 or best == most:
            return
        if not fitting:
            guess = refused // 2
        else:
            before = fitting[-2] if len(fitting) > 1 else 0
            slope = max((known[best] - (known[before] if before else fixed)) / (best - before), 1.0)
            guess = best + int((limit - known[best]) / slope)
        yield attempt(min(max(guess, best + 1), refused - 1, 4 * best if fitting else refused))


def with_rows(step: Step, rows: int, mesh: Mesh) -> Step:
    """The same step with `rows` a device and pass, in as many passes as that takes."""
    passes = -(-step.rows // (rows * mesh.size))
    return step._replace(rows=rows * mesh.size * passes, passes=passes)


def abstract_targets(targets: Targets, mesh: Mesh) -> Targets:
    """The same with shapes on `mesh` in place of arrays: all that a step needs which is only compiled."""
    everywhere = NamedSharding(mesh, P())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), targets.frozen)
    return targets._replace(frozen=shapes)
