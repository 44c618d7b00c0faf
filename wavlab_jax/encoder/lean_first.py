"""The extractor's first convolution, of which any stretch of frames is made where it is needed, and its gradient."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from wavlab_jax.encoder.gradients import gelu_and_slope, normalized, wide, wide_type
from wavlab_jax.encoder.lean_convolution import BlockParameters, ConvolutionGradient, Shape, convolve, cut, put


class _Moments(NamedTuple):
    """Of the first convolution's output over each row's real frames, [batch, channels]; and how many, [batch, 1]."""

    mean: jax.Array
    scale: jax.Array  # 1 / sqrt(variance + epsilon)
    count: jax.Array


class First(NamedTuple):
    """The first convolution, of which any stretch of frames can be had; `patches` [batch, frames, taps]."""

    patches: jax.Array
    block: BlockParameters
    real: jax.Array
    moments: _Moments | None
    norm: str
    epsilon: float

    @classmethod
    def of(cls, waveform, block, valid, shapes, norm, epsilon, moments=None) -> "First":
        """Measures the group norm's moments, unless they are given."""
        shape, following = shapes[0], shapes[1]
        frames = max(shape.length, following.stride * (following.length - 1) + following.taps)
        real = jnp.arange(frames)[None] < shape.frames
        if valid is not None:
            real &= jnp.pad(valid, ((0, 0), (0, frames - shape.frames)))
        first = cls(_patches(waveform, shape, frames), block, real, None, norm, epsilon)
        if norm != "group":
            return first
        return first._replace(moments=first._measure(shape) if moments is None else moments)

    def convolved(self, patches):
        """Before norm and GELU; wide."""
        kernel = self.block.kernel[:, 0]
        out = jnp.einsum("btk,kc->btc", patches, kernel, preferred_element_type=wide_type(kernel))
        out = out if self.block.bias is None else out + wide(self.block.bias)[None, None]
        return wide(out.astype(patches.dtype))

    def normed(self, patches):
        """After the norm, before GELU."""
        x = self.convolved(patches)
        if self.norm == "layer":
            unit = normalized(x, epsilon=self.epsilon).unit
        else:
            unit = (x - self.moments.mean[:, None]) * self.moments.scale[:, None]
        return unit * self.block.scale[None, None] + self.block.shift[None, None]

    def _measure(self, shape: Shape) -> _Moments:
        """A guess of the mean from the patches' own, then the moments about it: no bits are lost to large sums."""
        patches = wide(self.patches)
        count = jnp.maximum(jnp.sum(self.real, axis=1, keepdims=True), 1).astype(patches.dtype)
        guess = self.convolved(jnp.sum(patches * self.real[..., None], axis=1, keepdims=True) / count[..., None])

        def add(index, sums):
            piece, real = (cut(x, index, shape.chunk) for x in (self.patches, self.real))
            off = jnp.where(real[..., None], self.convolved(piece) - guess, 0.0)
            return sums[0] + jnp.sum(off, axis=1), sums[1] + jnp.sum(jnp.square(off), axis=1)

        zero = jnp.zeros(guess[:, 0].shape, guess.dtype)
        off, squares = (x / count for x in lax.fori_loop(0, shape.chunks, add, (zero, zero)))
        variance = jnp.maximum(squares - jnp.square(off), 0.0)
        return _Moments(guess[:, 0] + off, lax.rsqrt(variance + self.epsilon), count)


def _patches(waveform, shape: Shape, frames: int):
    """[batch, samples] -> [batch, frames, taps]: what each frame of the first convolution hears; zeros at the end."""
    reach = shape.stride * (frames - 1) + 1
    padded = jnp.pad(waveform, ((0, 0), (0, max(reach + shape.taps - 1 - waveform.shape[1], 0))))
    return jnp.stack([padded[:, tap : tap + reach : shape.stride] for tap in range(shape.taps)], axis=-1)


def second(first: First, block: BlockParameters, shapes) -> jax.Array:
    """The second convolution's output before norm and GELU, a chunk after the other."""
    shape = shapes[1]

    def make(index, out):
        heard = lax.dynamic_slice_in_dim(
            first.patches,
            index * (shape.chunk * shape.stride),
            shape.stride * (shape.chunk - 1) + shape.taps,
            axis=1,
        )
        x = gelu_and_slope(first.normed(heard))[0].astype(heard.dtype)
        return put(out, convolve(x, block, shape.stride), index)

    empty = jnp.zeros((first.patches.shape[0], shape.length, block.kernel.shape[2]), first.patches.dtype)
    return lax.fori_loop(0, shape.chunks, make, empty)


def first_gradient(first: First, convolution: ConvolutionGradient, norms, waveform, shapes):
    """Gradients of the second block, of the first, and of the waveform."""
    batch, chunk = waveform.shape[0], shapes[0].chunk
    taps, _, channels = first.block.kernel.shape
    dtype = wide_type(waveform)
    patches = wide(first.patches)
    if first.norm == "group":
        moments = first.moments
        own = jnp.where(first.real[..., None], patches, 0.0)
        patches = patches - (jnp.sum(own, axis=1) / moments.count)[:, None]  # about their mean over the real frames

    def gradient_of(index, outputs, normed_slope):
        """Of the chunk after the norm: [batch, chunk, channels]."""
        return convolution.of_input(outputs) * normed_slope

    def add(index, sums):
        piece, outputs = cut(first.patches, index, chunk), convolution.outputs(index)
        value, slope = gelu_and_slope(first.normed(piece))
        kernel = sums["second"] + convolution.of_kernel(value.astype(piece.dtype), outputs)
        normed = gradient_of(index, outputs, slope)
        more = {}
        if first.norm == "layer":
            of = normalized(first.convolved(piece), epsilon=first.epsilon)
            more["scale"] = sums["scale"] + jnp.sum(normed * of.unit, axis=(0, 1))
            more["shift"] = sums["shift"] + jnp.sum(normed, axis=(0, 1))
            normed = of.gradient(normed * first.block.scale[None, None])
            axes = "btk,btc->kc"
        else:
            axes = "btk,btc->bkc"
        more["kernel"] = sums["kernel"] + jnp.einsum(axes, cut(patches, index, chunk), normed)
        more["total"] = sums["total"] + jnp.sum(normed, axis=1)
        return {"second": kernel, **more}

    start = {
        "second": jnp.zeros(convolution.block.kernel.shape, dtype),
        "kernel": jnp.zeros((taps, channels) if first.norm == "layer" else (batch, taps, channels), dtype),
        "total": jnp.zeros((batch, channels), dtype),
    }
    if first.norm == "layer":
        start |= {name: jnp.zeros(channels, dtype) for name in ("scale", "shift")}
    sums = lax.fori_loop(0, shapes[0].chunks, add, start)
    second = BlockParameters(sums["second"], convolution.own_bias(), *norms)
    bias = None if first.block.bias is None else jnp.sum(sums["total"], axis=0)
    if first.norm == "layer":
        own = BlockParameters(sums["kernel"][:, None], bias, sums["scale"], sums["shift"])
        spread = None
    else:
        # y = unit * scale + shift with unit = (x - mean) / sqrt(variance + epsilon), x = patches @ kernel
        kernel = wide(first.block.kernel[:, 0])
        scale = moments.scale * first.block.scale[None]
        weighted = moments.scale * jnp.sum(kernel[None] * sums["kernel"], axis=1)  # of each row: sum of gradient * unit
        real = jnp.where(first.real[..., None], patches, 0.0)
        covariance = jnp.einsum("btk,btl->bkl", real, real)
        unit_sums = moments.scale[:, None] * jnp.einsum("bkl,lc->bkc", covariance, kernel)
        of_kernel = scale[:, None] * (sums["kernel"] - unit_sums * (weighted / moments.count)[:, None])
        # the norm takes the bias away again
        bias = None if bias is None else jnp.zeros_like(bias)
        own = BlockParameters(
            jnp.sum(of_kernel, axis=0)[:, None], bias, jnp.sum(weighted, axis=0), jnp.sum(sums["total"], axis=0)
        )
        spread = (scale, sums["total"] / moments.count, weighted / moments.count)
    return second, own, _waveform_gradient(first, convolution, spread, waveform, shapes)


def _waveform_gradient(first: First, convolution: ConvolutionGradient, spread, waveform, shapes):
    """Of the samples: a second pass over the chunks, which training never asks for and the compiler drops."""
    chunk = shapes[0].chunk
    kernel = wide(first.block.kernel[:, 0])

    def one(index, out):
        piece = cut(first.patches, index, chunk)
        gradient = convolution.of_input(convolution.outputs(index)) * gelu_and_slope(first.normed(piece))[1]
        if first.norm == "layer":
            of = normalized(first.convolved(piece), epsilon=first.epsilon)
            gradient = of.gradient(gradient * first.block.scale[None, None])
        else:
            scale, total, weighted = (x[:, None] for x in spread)
            unit = (first.convolved(piece) - first.moments.mean[:, None]) * first.moments.scale[:, None]
            real = cut(first.real, index, chunk)[..., None]
            gradient = scale * (gradient - jnp.where(real, total + unit * weighted, 0.0))
        return put(out, jnp.einsum("btc,kc->btk", gradient, kernel), index)

    length = shapes[0].length
    start = jnp.zeros((waveform.shape[0], first.patches.shape[1], kernel.shape[0]), wide_type(waveform))
    of_patches = lax.fori_loop(0, length // chunk, one, start)
    gather = partial(_patches, shape=shapes[0], frames=first.patches.shape[1])
    return jax.linear_transpose(gather, wide(waveform))(of_patches)[0].astype(waveform.dtype)
