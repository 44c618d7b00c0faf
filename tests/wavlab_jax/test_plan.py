"""The compiled step: as many operations as the formula says, no exchange too many, each where it belongs."""

import dataclasses

import jax
import pytest

from tests.wavlab_jax import tiny
from wavlab_jax import plan
from wavlab_jax.chips import ChipError, chip_named, chip_of
from wavlab_jax.encoder import EncoderConfig
from wavlab_jax.heads import HeadConfig
from wavlab_jax.plan import PlanError, Pod, Step, largest_rows
from wavlab_jax.sharding import MeshConfig, make_mesh

LAYERS, PASSES = 5, 3  # told apart by how often a loop turns

# Wide where it must be for elementwise operations not to matter, and no two sizes alike that should be told apart.
LEARNER = dataclasses.replace(
    tiny.learner(),
    encoder=EncoderConfig(
        extractor_channels=(24, 48),
        extractor_kernels=(16, 25),
        extractor_strides=(16, 20),
        extractor_norm="layer",
        pre_norm=True,
        width=64,
        layers=LAYERS,
        heads=4,
        feed_forward=192,
        relative_bias=True,
        position_kernel=16,
        position_groups=4,
        dropout=0.0,
        attention_dropout=0.0,
        projection_dropout=0.0,
        layerdrop=0.0,
    ),
    head=HeadConfig(units=40, dim=32),
)
STEP = Step(rows=16 * PASSES, samples=8_000, passes=PASSES, sets=1)


def compiled(mesh, *, learner=LEARNER, step=STEP, chip="a100-80"):
    pod = Pod(mesh.devices, None if chip is None else chip_named(chip), False)
    return plan.compile_step(learner, mesh, step, pod=pod)


def named(found, kind, axes, mesh):
    return [each for each in found.program.collectives if each.kind == kind and plan.axes_of(each, mesh) == axes]


@pytest.fixture(scope="module")
def accumulated():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    return mesh, compiled(mesh)


def test_compiled_operations_are_those_of_the_formula(accumulated):
    """Both spellings, layers in a loop and unrolled; without rematerialisation, 0.97 to 1.05.

    On one CPU device, whose gradients are written by hand, the logits and the first convolution are made again: in a
    model so small 1.1.
    """
    mesh, found = accumulated
    ratio = found.program.flops * mesh.size / plan.training_flops(LEARNER, STEP, mesh)
    assert 0.97 < ratio < 1.05
    one = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    # on the CPU the positional convolution goes through the Fourier transform, whose products are other ones
    no_position = dataclasses.replace(LEARNER.encoder, position_kernel=1, position_groups=1)
    learner, step = dataclasses.replace(LEARNER, encoder=no_position), Step(2, 8_000, 1, sets=1)
    unrolled = compiled(one, learner=learner, step=step, chip=None)
    assert 0.97 < unrolled.program.flops / plan.training_flops(learner, step, one) < 1.1


def test_no_exchange_that_neither_fsdp_nor_the_gradient_needs(accumulated):
    """Not even the relative position bias' gradient by pairs of frames, which is folded into its table before."""
    mesh, found = accumulated
    assert plan.strangers(found.program, LEARNER, mesh) == []
    one = found.program.collectives[0]._replace(kind="all-gather")
    # the feed-forward's parts of a layer as they were gathered: stacked and transposed; and hidden states
    parts, activations = one._replace(shapes=((192, 2, 32),)), one._replace(shapes=((3, 24, 64),))
    moved = activations._replace(kind="all-to-all")
    sent = parts._replace(kind="collective-permute")
    halves = one._replace(shapes=((2, 2, 5),))  # of the units' embeddings [5, 4], which lie whole on every device
    more = found.program._replace(collectives=(parts, activations, moved, sent, halves))
    assert plan.strangers(more, LEARNER, mesh) == [activations, moved, sent]


@pytest.mark.soak
@pytest.mark.parametrize("passes", [1, PASSES])
@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_no_such_exchange_on_any_mesh(data, fsdp, passes):
    mesh, step = make_mesh(MeshConfig(data=data, fsdp=fsdp)), STEP._replace(rows=16 * passes, passes=passes)
    found = compiled(mesh, step=step)
    assert plan.strangers(found.program, LEARNER, mesh) == []
    assert 0.97 < found.program.flops * mesh.size / plan.training_flops(LEARNER, step, mesh) < 1.05


@pytest.mark.soak
@pytest.mark.parametrize(("fsdp", "passes"), [(4, 1), (2, PASSES)])
def test_the_same_of_a_pod_by_its_own_compiler(fsdp, passes):
    """Needs libtpu: `make venv ACCELERATOR=tpu`."""
    pod = plan.tpu_pod("v5e:2x4")
    mesh, step = make_mesh(MeshConfig(fsdp=fsdp), devices=pod.devices), STEP._replace(rows=16 * passes, passes=passes)
    found = plan.compile_step(LEARNER, mesh, step, pod=pod)
    assert plan.strangers(found.program, LEARNER, mesh) == []
    assert 0.97 < found.program.flops * mesh.size / plan.training_flops(LEARNER, step, mesh) < 1.05
    assert 0 < found.memory.total < pod.chip.memory_bytes


def test_fsdp_gathers_a_layer_at_a_time_and_keeps_only_its_part(accumulated):
    mesh, found = accumulated
    gathers = named(found, "all-gather", "fsdp", mesh)
    per_layer = [each for each in gathers if LAYERS in each.trips]
    assert len(per_layer) >= 6  # six matrices, at least once in each direction
    assert all(LAYERS not in shape for each in gathers for shape in each.shapes)  # never the stack
    # nothing but small vectors and convolutions is summed whole over all devices: matrices are summed in parts
    whole = [shape for each in named(found, "all-reduce", "data", mesh) for shape in each.shapes]
    assert (LAYERS, 64, 192) not in whole and (64, 192) not in whole
    copied = plan.memory_by_formula(LEARNER, make_mesh(MeshConfig()), STEP).parameters
    assert found.memory.optimizer == pytest.approx(2 * found.memory.parameters, abs=64)
    assert found.memory.parameters < 0.65 * copied


def test_the_gradient_is_summed_over_copies_once_a_step(accumulated):
    """Inside the loop over passes nothing but statistics goes over `data`."""
    mesh, found = accumulated
    for each in found.program.collectives:
        if "data" in plan.axes_of(each, mesh) and each.kind == "all-reduce" and PASSES in each.trips:
            assert sum(map(len, each.shapes)) == 0, each
    assert sum(each.bytes for each in named(found, "all-reduce", "data", mesh)) > 0


@pytest.mark.once
def test_the_memory_of_each_policy():
    """By formula and as compiled: recomputing more takes less."""
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    step, said = Step(2, 32_000, 1, sets=1), []
    for policy in ("nothing", "dots", "layers"):
        learner = dataclasses.replace(LEARNER, encoder=dataclasses.replace(LEARNER.encoder, rematerialize=policy))
        found = compiled(mesh, learner=learner, step=step).memory.temporaries
        said.append((found, plan.memory_by_formula(learner, mesh, step).temporaries))
    assert said == sorted(said, reverse=True)


def test_the_search_ends_between_what_fits_and_what_does_not():
    tried = list(largest_rows(lambda rows: 100 + 7 * rows if rows < 40 else None, limit=250))
    fitting = max(each.rows for each in tried if each.memory is not None)
    assert fitting == 21 and any(each.rows == 22 and each.memory is None for each in tried) and len(tried) <= 5
    assert list(largest_rows(lambda rows: None, limit=9)) == [plan.Tried(1, None)]
    assert max(each.rows for each in largest_rows(lambda rows: 1, limit=9)) == 64
    # from what is known beforehand: three tries
    for first in (6, 30):
        tried = list(largest_rows(lambda rows: 100 + 7 * rows, limit=250, first=first, fixed=90))
        assert {(21, 247), (22, None)} <= set(tried) and len(tried) <= 5
    assert [each.rows for each in largest_rows(lambda rows: None, limit=9, first=6)] == [6, 3, 1]


def test_chips_and_topologies():
    assert plan.chips_of_topology("v4:4x4x2") == 32 and plan.chip_of_topology("v4:4x4x2").memory_bytes == 32 * 2**30
    assert plan.chip_of_topology("V5E:4x4").name == "v5e"
    for wrong in ("v5e", "v5e:", "v5e:4x0", "v5e:-4x4", "v5e:4\u00b2"):
        with pytest.raises(PlanError, match="v5e:16x16"):
            plan.chip_of_topology(wrong)
    with pytest.raises(PlanError, match="of TPUs; give --chips 8 --chip h100"):
        plan.chip_of_topology("h100:2x4")
    with pytest.raises(ChipError, match="a100-80"):
        chip_named("a100")
    assert chip_of(jax.devices()[0]) is None
