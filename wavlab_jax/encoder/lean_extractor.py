"""The extractor's convolutions with a gradient written by hand, for CPU: what a chunk needs stays in the cache.

Two facts make it lean. The first convolution is so cheap (one input channel) that its output, the largest array of all,
is computed again wherever it is needed, a chunk of frames at a time, and is never stored. And of every other
convolution only the output before norm and GELU is kept: the input of the next one follows from it, in the chunk where
the gradient needs both.

All elementwise arithmetic is float32 (or wider, if the input is), products are of the input's type with a float32
accumulator. Numbers are those of the plain spelling in `frontend.py`, to rounding.
"""

from collections.abc import Sequence
from functools import partial

import jax

from wavlab_jax.encoder.lean_convolution import (
    BlockParameters,
    ConvolutionGradient,
    activation,
    activation_gradient,
    convolve,
    shapes_of,
)
from wavlab_jax.encoder.lean_first import First, first_gradient, second


def extract(
    waveform: jax.Array,
    blocks: Sequence[BlockParameters],
    valid: jax.Array | None,
    *,
    strides: Sequence[int],
    norm: str,
    epsilon: float,
) -> jax.Array:
    """[batch, samples] -> [batch, frames, channels]: every convolution with its norm and GELU; at least two of them.

    Args:
        waveform: in the type of the products.
        blocks: one a convolution.
        valid: [batch, frames of the first convolution] bool, which of them the group norm's statistics are of; None:
            all. Read with norm "group" only.
        strides: one a convolution.
        norm: "group": over time, after the first convolution only; "layer": over channels, after each.
        epsilon: of the norms.
    """
    blocks = tuple(
        BlockParameters(*(None if p is None else p.astype(waveform.dtype) for p in block[:2]), *block[2:])
        for block in blocks
    )
    return _extract(waveform, blocks, valid, tuple(strides), norm, epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _extract(waveform, blocks, valid, strides, norm, epsilon):
    return _forward(waveform, blocks, valid, strides, norm, epsilon)[0]


def _forward(waveform, blocks, valid, strides, norm, epsilon):
    shapes = shapes_of(*waveform.shape, [block.kernel.shape[0] for block in blocks], strides)
    first = First.of(waveform, blocks[0], valid, shapes, norm, epsilon)
    kept = [second(first, blocks[1], shapes)]
    for block, shape, before in zip(blocks[2:], shapes[2:], blocks[1:], strict=False):
        x = activation(kept[-1], before, norm, epsilon)
        missing = shape.stride * (shape.length - 1) + shape.taps - x.shape[1]
        kept.append(convolve(x, block, shape.stride, missing))
    out = activation(kept[-1][:, : shapes[-1].frames], blocks[-1], norm, epsilon)
    return out, (waveform, blocks, valid, first.moments, tuple(kept))


def _backward(strides, norm, epsilon, residuals, gradient):
    waveform, blocks, valid, moments, kept = residuals
    shapes = shapes_of(*waveform.shape, [block.kernel.shape[0] for block in blocks], strides)
    found = [None] * len(blocks)

    last = kept[-1][:, : shapes[-1].frames]
    gradient, norms = activation_gradient(last, gradient, blocks[-1], norm, epsilon)
    for index in range(len(blocks) - 1, 1, -1):
        convolution = ConvolutionGradient.of(blocks[index], shapes[index], shapes[index - 1], gradient)
        x, before = kept[index - 2], blocks[index - 1]
        found[index], gradient, norms = convolution.through(x, before, norms, norm, epsilon)
    first = First.of(waveform, blocks[0], valid, shapes, norm, epsilon, moments)
    convolution = ConvolutionGradient.of(blocks[1], shapes[1], shapes[0], gradient)
    found[1], found[0], before = first_gradient(first, convolution, norms, waveform, shapes)
    found = tuple(
        BlockParameters(*(None if p is None else d.astype(p.dtype) for p, d in zip(block, own, strict=True)))
        for block, own in zip(blocks, found, strict=True)
    )
    return before, found, None


_extract.defvjp(_forward, _backward)
