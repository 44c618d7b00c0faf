"""Reading compiled programs: products of known size, loops, and exchanges whose groups are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from wavlab_jax.compiled_program import ProgramError, _groups, read_program


def flops_of(function, *shapes) -> float:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return read_program(jax.jit(function).lower(*arguments).compile().as_text()).flops


def test_loops_multiply_what_they_hold():
    """A product in a loop of 5 inside a loop of 3, and one beside them."""

    def inner(x, w):
        return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0]

    def outer(x, w):
        return lax.scan(lambda x, _: (inner(x, w), None), x, None, length=3)[0] @ w

    assert flops_of(outer, (7, 11), (11, 11)) == (3 * 5 + 1) * 2 * 7 * 11 * 11


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(window_strides=(2,), padding="VALID"), 10 * 3),
        (dict(window_strides=(1,), padding=[(2, 0)]), 21 * 3 - 3),  # three of the pairs meet the padding
        (dict(window_strides=(1,), padding=[(0, 0)], lhs_dilation=(2,)), 20 * 2 + 19),
        (dict(window_strides=(1,), padding="VALID", rhs_dilation=(3,)), 15 * 3),
    ],
    ids=["strided", "padded", "holes", "spread"],
)
def test_convolutions_count_where_kernel_meets_data(options, expected):
    """Against pairs counted by hand; with holes, even outputs meet two elements and odd ones one."""

    def convolve(x, kernel):
        return lax.conv_general_dilated(x, kernel, dimension_numbers=("NWC", "WIO", "NWC"), **options)

    assert flops_of(convolve, (4, 21, 6), (3, 6, 8)) == 2 * 4 * 6 * 8 * expected


def test_exchanges_their_loops_and_their_groups():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:8])

    def step(w, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jnp.sum(lax.scan(layer, x, w)[0])

    w = jax.ShapeDtypeStruct((3, 16, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    found = read_program(jax.jit(step).lower(w, x).compile().as_text()).collectives
    gathers = [each for each in found if each.kind == "all-gather"]
    assert [(each.shapes[0][-2:], each.trips, each.bytes) for each in gathers] == [((16, 16), (3,), 1024)]
    assert gathers[0].groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    (total,) = [each for each in found if each.kind == "all-reduce"]
    assert total.trips == () and total.times == 1 and total.bytes == 4


@pytest.mark.parametrize(
    ("spelling", "groups"),
    [
        ("{{0,4},{1,5}}", ((0, 4), (1, 5))),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("{}", ()),
    ],
)
def test_spellings_of_groups(spelling, groups):
    assert _groups(f", replica_groups={spelling}, use_global_device_ids=true") == groups


def test_what_the_tpu_compiler_writes():
    """A reduce-scatter is a fusion there; one gather may be spread over two fusions and is one; a product is a
    convolution; the loop says its turns."""
    text = """HloModule jit_step
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}
%all-reduce-scatter (input: f32[64,32]) -> f32[16,32] {
  %input = f32[64,32]{1,0:T(8,128)} parameter(0)
  ROOT %all-reduce.1 = f32[64,32] all-reduce(%input), channel_id=3, replica_groups=[1,4]<=[4], to_apply=%add
}
%body (p: (s32[], f32[64,32])) -> (s32[], f32[64,32]) {
  %p = (s32[], f32[64,32]{1,0:T(8,128)(2,1)}) parameter(0)
  %part = bf16[8,32]{1,0} custom-call(), custom_call_target="x"
  %all-gather.1 = bf16[32,32]{1,0:T(8,128)(2,1)S(1)} all-gather(%part), channel_id=7, replica_groups=[1,4]<=[4]
  %all-gather.2 = bf16[32,32]{1,0:T(8,128)(2,1)} all-gather(%part), channel_id=7, replica_groups=[1,4]<=[4]
  %x = bf16[64,32]{1,0} custom-call(), custom_call_target="x"
  %c = f32[64,32]{1,0} convolution(%x, %all-gather.1), dim_labels=bf_io->bf
  %f = f32[16,32]{1,0} fusion(%c), kind=kCustom, calls=%all-reduce-scatter
  ROOT %t = (s32[], f32[64,32]) tuple(%c)
}
ENTRY %main (a: f32[64,32]) -> f32[64,32] {
  %a = (s32[], f32[64,32]) parameter(0)
  ROOT %w = (s32[], f32[64,32]) while(%a), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"24"}}
}
"""
    found = read_program(text)
    assert found.flops == 24 * 2 * 64 * 32 * 32
    assert sorted((each.kind, each.times, each.bytes) for each in found.collectives) == [
        ("all-gather", 24, 32 * 32 * 2),
        ("reduce-scatter", 24, 64 * 32 * 4),
    ]
    with pytest.raises(ProgramError, match="loop w does not say"):
        read_program(text.replace("known_trip_count", "unknown"))


def test_the_count_is_xlas_own_where_there_is_no_loop():
    """XLA's `cost_analysis` of a product alone."""
    compiled = jax.jit(jnp.dot).lower(*[jax.ShapeDtypeStruct((64, 64), np.float32)] * 2).compile()
    assert read_program(compiled.as_text()).flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.01)
