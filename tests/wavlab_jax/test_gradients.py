"""The gradients written by hand against JAX's of the plain spellings, in float64, and what they store."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from tests.wavlab_jax.encoded import CHEAP, HERE, LARGE, SAMPLES, TINY, assert_close
from tests.wavlab_jax.tiny import randomised
from wavlab_jax.encoder import encode, formulation_for, gradients, lean_convolution, lean_extractor, make_encoder
from wavlab_jax.encoder.gradients import Pairs
from wavlab_jax.encoder.lean_convolution import BlockParameters
from wavlab_jax.encoder.lean_extractor import extract

PLAIN = HERE._replace(lean_gradients=False)
LEAN = HERE._replace(lean_gradients=True)


def agree(lean, plain, *arguments, rtol=1e-9):
    """Value and gradient of a weighted sum of the outputs, in float64: to rtol of each array's largest value."""
    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda x: x if np.asarray(x).dtype == bool else np.float64(x), arguments)
        rng = np.random.default_rng(9)
        weights = jax.tree.map(lambda x: rng.standard_normal(x.shape), jax.eval_shape(plain, *arguments))

        def differentiate(function):
            of = jax.jit(lambda *a: jax.vjp(function, *a)[1](weights), compiler_options=CHEAP)
            return jax.jit(function, compiler_options=CHEAP)(*arguments), of(*arguments)

        found, expected = differentiate(lean), differentiate(plain)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            if other.dtype == np.float64:
                np.testing.assert_allclose(one, other, rtol=0, atol=rtol * max(np.abs(other).max(), 1e-3))


def plain_gelu(x):
    return 0.5 * x * (1 + lax.erf(x / math.sqrt(2)))


def plain_norm(x, scale, shift, *, axis, where=None):
    mean = jnp.mean(x, axis, keepdims=True, where=where)
    variance = jnp.mean(jnp.square(x - mean), axis, keepdims=True, where=where)
    return (x - mean) / jnp.sqrt(variance + 1e-5) * scale[None, None] + shift[None, None]


def draw(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape)


def test_gelu_and_layer_norm():
    agree(gradients.gelu, plain_gelu, 3 * draw(4, 5, 6))
    agree(gradients.gelu_dot, lambda x, kernel: plain_gelu(x) @ kernel, 3 * draw(5, 6), draw(6, 4))
    lean = partial(gradients.layer_norm, epsilon=1e-5)
    agree(
        lambda *a: gradients.layer_norm(*a, 1e-5), partial(plain_norm, axis=-1), draw(3, 5, 8), draw(8), draw(8, seed=1)
    )
    assert lean(jnp.ones((1, 2, 4), jnp.bfloat16), jnp.ones(4), jnp.ones(4)).dtype == jnp.bfloat16


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(biased, masked):
    """With WavLM's gated bias; with padded keys (one row has no real frame at all) and dropout."""
    batch, frames, heads = 3, 7, 2
    query, key, value = (draw(batch, frames, heads, 4, seed=seed) for seed in range(3))
    bias = (1 + draw(batch, heads, frames), draw(heads, frames, frames)) if biased else (None, None)
    valid = jnp.asarray(np.arange(frames) < np.array([7, 4, 0])[:, None]) if masked else None
    keep = jnp.asarray(draw(batch, heads, frames, frames) > -0.5) if masked else None

    def plain(query, key, value, gate, position_bias):
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        if gate is not None:
            logits += gate[..., None] * position_bias[None]
        if valid is not None:
            logits = jnp.where(valid[:, None, None], logits, jnp.finfo(jnp.float64).min)
        weights = jax.nn.softmax(logits)
        weights = weights if keep is None else jnp.where(keep, weights / 0.7, 0.0)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value), position_bias

    def lean(query, key, value, *bias):
        return gradients.attention(query, key, value, Pairs(*bias, valid, keep), 0.3)

    agree(lean, plain, query, key, value, *bias)


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize(
    ("taps", "strides"),
    [((10, 3, 2), (5, 2, 2)), ((4, 5), (2, 2)), ((3, 1, 4), (1, 2, 3))],
    ids=["usual", "two", "odd"],
)
def test_extractor(norm, taps, strides, monkeypatch):
    """Cut in many chunks; in the last one frames that do not exist; a stride that leaves frames out; padded rows."""
    monkeypatch.setattr(lean_convolution, "CHUNK_FRAMES", 11)
    channels = (1, 6, 5, 4)
    with_norm = [norm == "layer" or index == 0 for index in range(len(taps))]
    blocks = tuple(
        BlockParameters(
            draw(tap, channels[index], channels[index + 1], seed=index),
            draw(channels[index + 1], seed=index + 10) if norm == "layer" else None,
            *(
                (1 + draw(channels[index + 1], seed=20), draw(channels[index + 1], seed=30))
                if with_norm[index]
                else (None,) * 2
            ),
        )
        for index, tap in enumerate(taps)
    )
    waveform = draw(2, 203) + 3.0
    first = (203 - taps[0]) // strides[0] + 1
    valid = np.arange(first) < np.array([first, first // 3])[:, None]

    def plain(waveform, blocks):
        x = waveform[..., None]
        for block, stride in zip(blocks, strides, strict=True):
            x = lax.conv_general_dilated(x, block.kernel, (stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))
            x = x if block.bias is None else x + block.bias[None, None]
            if norm == "layer":
                x = plain_norm(x, block.scale, block.shift, axis=-1)
            elif block.scale is not None:
                x = plain_norm(x, block.scale, block.shift, axis=1, where=valid[..., None])
            x = plain_gelu(x)
        return x

    lean = partial(extract, valid=valid if norm == "group" else None, strides=strides, norm=norm, epsilon=1e-5)
    agree(lean, plain, waveform, blocks)
    kept = jax.eval_shape(lambda *a: lean_extractor._forward(*a, None, strides, norm, 1e-5)[1], waveform, blocks)[-1]
    assert len(kept) == len(taps) - 1  # one array a convolution, none of the first


def test_unstacked_layers_have_the_gradient_of_the_stack():
    stack = {"kernel": draw(3, 2, 4), "bias": draw(3, 4)}
    agree(
        lambda stack: sum(jnp.sin((i + 1) * p["kernel"] @ p["bias"]) for i, p in enumerate(gradients.unstack(stack))),
        lambda stack: sum(jnp.sin((i + 1) * stack["kernel"][i] @ stack["bias"][i]) for i in range(3)),
        stack,
    )


def test_bfloat16_loses_no_more_than_its_own_bits(waveform):
    """Each function with its arguments rounded: value and gradients to 5 % of their norm, in bfloat16 where asked."""
    blocks = [BlockParameters(draw(4, 1, 6), None, 1 + draw(6), draw(6)), BlockParameters(draw(3, 6, 5), *[None] * 3)]
    query, key, value = (draw(2, 20, 2, 8, seed=seed) for seed in range(3))
    pairs = Pairs(jnp.float32(draw(2, 2, 20)), jnp.float32(draw(2, 20, 20)), None, None)
    cases = {
        "gelu": (gradients.gelu, draw(2, 20, 8)),
        "gelu and product": (lambda x, k: gradients.gelu_dot(x, k).astype(x.dtype), draw(20, 8), draw(8, 6)),
        "layer norm": (lambda *a: gradients.layer_norm(*a, 1e-5), draw(2, 20, 8), np.ones(8), np.zeros(8)),
        "attention": (lambda *a: gradients.attention(*a, pairs, 0.0)[0], query, key, value),
        "extractor": (
            lambda x: extract(x, blocks, None, strides=(2, 2), norm="group", epsilon=1e-5),
            waveform[:, :2000],
        ),
    }
    all_rounded = ("gelu and product", "attention")
    for name, (function, first, *rest) in cases.items():

        @partial(jax.jit, compiler_options=CHEAP)
        def run(*arguments, function=function):
            out, gradient = jax.vjp(function, *arguments)
            return out, gradient(jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype))

        rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (first, *(rest if name in all_rounded else ())))
        others = () if name in all_rounded else tuple(np.float32(x) for x in rest)
        found = run(*rounded, *others)
        exact = run(*(jnp.float32(x) for x in rounded), *others)
        assert found[0].dtype == jnp.bfloat16 and found[1][0].dtype == jnp.bfloat16
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
            assert np.linalg.norm(np.float32(one) - other) < 0.05 * np.linalg.norm(other), name


def test_the_same_is_dropped(waveform):
    """Dropout of every kind and layers left out, with padded rows: output and gradient as in the plain spelling."""
    cfg = dataclasses.replace(LARGE, layers=1, layerdrop=0.3, activation_dropout=0.1, extractor_norm="group")
    valid = np.arange(SAMPLES) < np.array([SAMPLES, 5007, 700])[:, None]

    @partial(jax.jit, static_argnums=1, compiler_options=CHEAP)
    def gradient(encoder, formulation):
        def loss(encoder):
            draws = dict(key=jax.random.key(5), seeds=np.arange(3, dtype=np.uint32))
            encoded = encode(encoder, waveform, valid, formulation=formulation, **draws)
            return sum(jnp.sum(jnp.where(encoded.valid[..., None], jnp.sin(h), 0.0)) for h in encoded.hidden)

        return jax.grad(loss)(encoder)

    assert_close(gradient(randomised(cfg), LEAN), gradient(randomised(cfg), PLAIN))


@pytest.mark.once
def test_less_is_stored_and_layers_that_are_made_again_store_less_still():
    """Temporaries of the gradient of the compiled encoder, in bytes. "dots" has little left to save here."""
    waveform, seeds = (jax.ShapeDtypeStruct(*each) for each in (((2, 64_000), jnp.float32), ((2,), jnp.uint32)))
    key = jax.random.key(0)

    def temporaries(formulation, policy):
        cfg = dataclasses.replace(TINY, width=64, heads=4, feed_forward=512, layers=3, rematerialize=policy)
        encoder = nnx.eval_shape(lambda: make_encoder(key, cfg))

        def loss(encoder, waveform, seeds):
            return jnp.sum(encode(encoder, waveform, key=key, seeds=seeds, formulation=formulation).hidden[-1])

        compiled = jax.jit(jax.grad(loss), compiler_options=CHEAP).lower(encoder, waveform, seeds).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    said = [temporaries(LEAN, policy) for policy in ("nothing", "dots", "layers")]
    assert max(said) < 0.7 * temporaries(PLAIN, "nothing") and said[2] < 0.8 * min(said[:2]), said


@pytest.mark.once
def test_a_layer_stores_nine_arrays_and_its_inner_one():
    """Bytes that one layer more takes, in arrays [frames, width]: the residual stream twice, both norms' outputs (the
    first one for the gate, too), queries, keys, values and the output of attention; what GELU is of (8 of them); its
    parameters (6.4). No output of GELU (8), no gradient of all pairs of frames (12.4), no normalised array (2)."""
    frames, width, inner = 199, 64, 512
    own = dict(width=width, heads=4, feed_forward=inner, layerdrop=0.0, relative_bias=True, bias_buckets=8)
    key = jax.random.key(0)

    def temporaries(layers):
        cfg = dataclasses.replace(TINY, **own, bias_max_distance=16, layers=layers)
        encoder = nnx.eval_shape(lambda: make_encoder(key, cfg))
        waveform = jax.ShapeDtypeStruct((1, 64_000), jnp.float32)
        gradient = jax.grad(lambda *a: jnp.sum(encode(*a, formulation=LEAN).hidden[-1]))
        compiled = jax.jit(gradient, compiler_options=CHEAP).lower(encoder, waveform).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    parameters = 4 * width**2 + 2 * width * inner
    found = (temporaries(16) - temporaries(8)) / 8 / 4 - parameters - frames * inner
    assert found / (frames * width) < 10.5


def test_they_are_for_one_processor_alone():
    assert formulation_for("cpu").lean_gradients and not formulation_for("cpu", devices=8).lean_gradients
    assert not any(formulation_for(platform).lean_gradients for platform in ("tpu", "gpu"))
