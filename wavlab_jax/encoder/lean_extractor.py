"""The extractor's convolutions with a gradient written by hand, for CPU: what a chunk needs stays in the cache.

Two facts make it lean. The first convolution is so cheap (one input channel) that its output, the largest array of all,
is computed again wherever it is needed, a chunk of frames at a time, and is never stored. And of every other
convolution only the output before norm and GELU is kept: the input of the next one follows from it, in the chunk where
the gradient needs both. A convolution's two gradients are matrix products: of `stride` phases of its input with the
output's gradient, shifted by whole strides.

All elementwise arithmetic is float32 (or wider, if the input is), products are of the input's type with a float32
accumulator. Numbers are those of the plain spelling in `frontend.py`, to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from wavlab_jax.encoder.gradients import gelu_and_slope, normalized

CHUNK_FRAMES = 1000  # of all rows together: 2 MB of 512 channels


class BlockParameters(NamedTuple):
    """Of one convolution. kernel [taps, inputs, outputs]; bias and the norm's scale and shift [outputs], or None."""

    kernel: jax.Array
    bias: jax.Array | None
    scale: jax.Array | None
    shift: jax.Array | None


@dataclass(frozen=True)
class _Shape:
    """Of one convolution in the chain: its taps and stride, and how its output is cut.

    Attributes:
        frames: that it really makes.
        chunk, chunks: the output has `chunk * chunks` frames, at least `frames`, of which those beyond mean nothing and
            reach nothing; it is made, and read by the next convolution's gradient, `chunk` at a time.
    """

    taps: int
    stride: int
    frames: int
    chunk: int
    chunks: int

    @property
    def length(self) -> int:
        return self.chunk * self.chunks

    @property
    def shifts(self) -> int:
        """By how many strides its taps reach over."""
        return -(-self.taps // self.stride)


def _shapes(batch: int, samples: int, taps: Sequence[int], strides: Sequence[int]) -> tuple[_Shape, ...]:
    shapes, frames = [], samples
    for index, (tap, stride) in enumerate(zip(taps, strides, strict=True)):
        frames = (frames - tap) // stride + 1
        group = strides[index + 1] if index + 1 < len(taps) else 1  # chunks hold whole strides of the next one
        chunks = max(batch * frames // CHUNK_FRAMES, 1)
        chunk = -(-frames // (group * chunks)) * group
        shapes.append(_Shape(tap, stride, frames, chunk, -(-frames // chunk)))
    return tuple(shapes)


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
    shapes = _shapes(*waveform.shape, [block.kernel.shape[0] for block in blocks], strides)
    first = _First.of(waveform, blocks[0], valid, shapes, norm, epsilon)
    kept = [_second(first, blocks[1], shapes)]
    for block, shape, before in zip(blocks[2:], shapes[2:], blocks[1:], strict=False):
        x = _activation(kept[-1], before, norm, epsilon)
        missing = shape.stride * (shape.length - 1) + shape.taps - x.shape[1]
        kept.append(_convolve(x, block, shape.stride, missing))
    out = _activation(kept[-1][:, : shapes[-1].frames], blocks[-1], norm, epsilon)
    return out, (waveform, blocks, valid, first.moments, tuple(kept))


def _convolve(x, block: BlockParameters, stride: int, missing: int = 0):
    """`missing` frames of zeros are appended; where negative, so many are cut off."""
    x = lax.conv_general_dilated(x, block.kernel, (stride,), [(0, missing)], dimension_numbers=("NWC", "WIO", "NWC"))
    return x if block.bias is None else x + block.bias[None, None]


def _activation(x, block: BlockParameters, norm: str, epsilon: float):
    """x before norm and GELU -> after both; of all convolutions but the first."""
    y = _wide(x)
    if norm == "layer":
        y = normalized(y, epsilon=epsilon).unit * block.scale[None, None] + block.shift[None, None]
    return gelu_and_slope(y)[0].astype(x.dtype)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class _Moments(NamedTuple):
    """Of the first convolution's output over each row's real frames, [batch, channels]; and how many, [batch, 1]."""

    mean: jax.Array
    scale: jax.Array  # 1 / sqrt(variance + epsilon)
    count: jax.Array


class _First(NamedTuple):
    """The first convolution, of which any stretch of frames can be had; `patches` [batch, frames, taps]."""

    patches: jax.Array
    block: BlockParameters
    real: jax.Array
    moments: _Moments | None
    norm: str
    epsilon: float

    @classmethod
    def of(cls, waveform, block, valid, shapes, norm, epsilon, moments=None) -> "_First":
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
        out = jnp.einsum("btk,kc->btc", patches, kernel, preferred_element_type=_wide_type(kernel))
        out = out if self.block.bias is None else out + _wide(self.block.bias)[None, None]
        return _wide(out.astype(patches.dtype))

    def normed(self, patches):
        """After the norm, before GELU."""
        x = self.convolved(patches)
        if self.norm == "layer":
            unit = normalized(x, epsilon=self.epsilon).unit
        else:
            unit = (x - self.moments.mean[:, None]) * self.moments.scale[:, None]
        return unit * self.block.scale[None, None] + self.block.shift[None, None]

    def _measure(self, shape: _Shape) -> _Moments:
        """A guess of the mean from the patches' own, then the moments about it: no bits are lost to large sums."""
        patches = _wide(self.patches)
        count = jnp.maximum(jnp.sum(self.real, axis=1, keepdims=True), 1).astype(patches.dtype)
        guess = self.convolved(jnp.sum(patches * self.real[..., None], axis=1, keepdims=True) / count[..., None])

        def add(index, sums):
            piece, real = (_cut(x, index, shape.chunk) for x in (self.patches, self.real))
            off = jnp.where(real[..., None], self.convolved(piece) - guess, 0.0)
            return sums[0] + jnp.sum(off, axis=1), sums[1] + jnp.sum(jnp.square(off), axis=1)

        zero = jnp.zeros(guess[:, 0].shape, guess.dtype)
        off, squares = (x / count for x in lax.fori_loop(0, shape.chunks, add, (zero, zero)))
        variance = jnp.maximum(squares - jnp.square(off), 0.0)
        return _Moments(guess[:, 0] + off, lax.rsqrt(variance + self.epsilon), count)


def _wide_type(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _patches(waveform, shape: _Shape, frames: int):
    """[batch, samples] -> [batch, frames, taps]: what each frame of the first convolution hears; zeros at the end."""
    reach = shape.stride * (frames - 1) + 1
    padded = jnp.pad(waveform, ((0, 0), (0, max(reach + shape.taps - 1 - waveform.shape[1], 0))))
    return jnp.stack([padded[:, tap : tap + reach : shape.stride] for tap in range(shape.taps)], axis=-1)


def _cut(x, index, size: int, extra: int = 0):
    """Chunk `index` of `size` frames, and `extra` ones after it."""
    return lax.dynamic_slice_in_dim(x, index * size, size + extra, axis=1)


def _put(whole, piece, index):
    # kept apart from what made the piece: XLA:CPU runs what it writes in place on one thread
    piece = lax.optimization_barrier(piece.astype(whole.dtype))
    return lax.dynamic_update_slice_in_dim(whole, piece, index * piece.shape[1], axis=1)


def _second(first: _First, block: BlockParameters, shapes) -> jax.Array:
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
        return _put(out, _convolve(x, block, shape.stride), index)

    empty = jnp.zeros((first.patches.shape[0], shape.length, block.kernel.shape[2]), first.patches.dtype)
    return lax.fori_loop(0, shape.chunks, make, empty)


# ------------------------------------------------------------------------------------------------------ the gradient


def _backward(strides, norm, epsilon, residuals, gradient):
    waveform, blocks, valid, moments, kept = residuals
    shapes = _shapes(*waveform.shape, [block.kernel.shape[0] for block in blocks], strides)
    found = [None] * len(blocks)

    last = kept[-1][:, : shapes[-1].frames]
    gradient, norms = _activation_gradient(last, gradient, blocks[-1], norm, epsilon)
    for index in range(len(blocks) - 1, 1, -1):
        convolution = _ConvolutionGradient.of(blocks[index], shapes[index], shapes[index - 1], gradient)
        x, before = kept[index - 2 + 0], blocks[index - 1]
        found[index], gradient, norms = convolution.through(x, before, norms, norm, epsilon)
    first = _First.of(waveform, blocks[0], valid, shapes, norm, epsilon, moments)
    convolution = _ConvolutionGradient.of(blocks[1], shapes[1], shapes[0], gradient)
    found[1], found[0], before = _first_gradient(first, convolution, norms, waveform, shapes)
    found = tuple(
        BlockParameters(*(None if p is None else d.astype(p.dtype) for p, d in zip(block, own, strict=True)))
        for block, own in zip(blocks, found, strict=True)
    )
    return before, found, None


_extract.defvjp(_forward, _backward)


def _activation_gradient(x, gradient, block: BlockParameters, norm: str, epsilon: float):
    """Gradients of x before norm and GELU, and of the norm's (scale, shift), or None for both."""
    gradient = _wide(gradient)
    if norm != "layer":
        return (gradient * gelu_and_slope(_wide(x))[1]).astype(x.dtype), (None, None)
    of = normalized(_wide(x), epsilon=epsilon)
    gradient = gradient * gelu_and_slope(of.unit * block.scale[None, None] + block.shift[None, None])[1]
    return of.gradient(gradient * block.scale[None, None]).astype(x.dtype), (
        jnp.sum(gradient * of.unit, axis=(0, 1)),
        jnp.sum(gradient, axis=(0, 1)),
    )


class _ConvolutionGradient(NamedTuple):
    """What one convolution's gradients are made of.

    Attributes:
        block: its parameters.
        shape: of its output.
        before: of its input.
        padded: [batch, shifts - 1 + input length / stride, outputs]: the gradient of its output, zeros around.
    """

    block: BlockParameters
    shape: _Shape
    before: _Shape
    padded: jax.Array

    @classmethod
    def of(cls, block, shape: _Shape, before: _Shape, gradient) -> "_ConvolutionGradient":
        ahead = shape.shifts - 1
        after = before.length // shape.stride - gradient.shape[1]
        return cls(block, shape, before, jnp.pad(gradient, ((0, 0), (ahead, max(after, 0)), (0, 0))))

    @property
    def groups(self) -> int:
        """Strides in a chunk of the input."""
        return self.before.chunk // self.shape.stride

    def taps_of(self, phase: int) -> list[int]:
        """Which taps meet the input's frames of this phase of a stride, from the latest output on."""
        return list(range(phase, self.shape.taps, self.shape.stride))

    def outputs(self, index) -> jax.Array:
        """[batch, groups, shifts * outputs]: of each stride in the chunk the gradients that its frames went into."""
        cut = lax.dynamic_slice_in_dim(self.padded, index * self.groups, self.groups + self.shape.shifts - 1, axis=1)
        shifted = [cut[:, self.shape.shifts - 1 - by :][:, : self.groups] for by in range(self.shape.shifts)]
        return jnp.concatenate(shifted, axis=-1)

    def of_input(self, outputs) -> jax.Array:
        """[batch, chunk, inputs], wide."""
        width = self.block.kernel.shape[2]
        phases = []
        for phase in range(self.shape.stride):
            taps = self.taps_of(phase)
            if not taps:  # a stride longer than the kernel leaves frames out
                phases.append(jnp.zeros((*outputs.shape[:2], self.block.kernel.shape[1]), _wide_type(outputs)))
                continue
            kernel = jnp.concatenate([self.block.kernel[tap].T for tap in taps])
            phases.append(_product(outputs[..., : width * len(taps)], kernel))
        return jnp.stack(phases, axis=2).reshape(outputs.shape[0], self.before.chunk, -1)

    def of_kernel(self, x, outputs) -> jax.Array:
        """[taps, inputs, outputs] of the chunk x [batch, chunk, inputs] of the input; wide."""
        width = self.block.kernel.shape[2]
        x = x.reshape(x.shape[0], self.groups, self.shape.stride, -1)
        found = {}
        for phase in range(self.shape.stride):
            taps = self.taps_of(phase)
            if taps:
                rows = outputs[..., : width * len(taps)].reshape(-1, width * len(taps))
                own = x[:, :, phase].reshape(rows.shape[0], -1)
                both = lax.dot_general(own, rows, (((0,), (0,)), ((), ())), preferred_element_type=_wide_type(x))
                found |= dict(zip(taps, jnp.split(both, len(taps), axis=1), strict=True))
        return jnp.stack([found[tap] for tap in range(self.shape.taps)])

    def own_bias(self) -> jax.Array | None:
        return None if self.block.bias is None else jnp.sum(_wide(self.padded), axis=(0, 1))

    def through(self, x, before: BlockParameters, norms, norm: str, epsilon: float):
        """Gradients of this block, of x (the block before's output before norm and GELU), of that one's norm.

        `norms`: of this block's norm, already found.
        """

        def chunk(index, sums):
            whole, kernel, before_norms = sums
            piece, outputs = _cut(x, index, self.before.chunk), self.outputs(index)
            kernel += self.of_kernel(_activation(piece, before, norm, epsilon), outputs)
            piece, more = _activation_gradient(piece, self.of_input(outputs), before, norm, epsilon)
            return _put(whole, piece, index), kernel, jax.tree.map(jnp.add, before_norms, more)

        wide = _wide_type(x)
        nothing = (None, None) if norm != "layer" else tuple(jnp.zeros(x.shape[-1], wide) for _ in range(2))
        start = (jnp.zeros_like(x), jnp.zeros(self.block.kernel.shape, wide), nothing)
        gradient, kernel, before_norms = lax.fori_loop(0, self.before.chunks, chunk, start)
        return BlockParameters(kernel, self.own_bias(), *norms), gradient, before_norms


def _product(x, kernel) -> jax.Array:
    """[batch, frames, inputs] x [inputs, outputs] as one product of two dimensions; wide."""
    out = jnp.dot(x.reshape(-1, x.shape[-1]), kernel, preferred_element_type=_wide_type(x))
    return out.reshape(*x.shape[:2], -1)


def _first_gradient(first: _First, convolution: _ConvolutionGradient, norms, waveform, shapes):
    """Gradients of the second block, of the first, and of the waveform."""
    batch, chunk = waveform.shape[0], shapes[0].chunk
    taps, _, channels = first.block.kernel.shape
    wide = _wide_type(waveform)
    patches = _wide(first.patches)
    if first.norm == "group":
        moments = first.moments
        own = jnp.where(first.real[..., None], patches, 0.0)
        patches = patches - (jnp.sum(own, axis=1) / moments.count)[:, None]  # about their mean over the real frames

    def gradient_of(index, outputs, normed_slope):
        """Of the chunk after the norm: [batch, chunk, channels]."""
        return convolution.of_input(outputs) * normed_slope

    def add(index, sums):
        piece, outputs = _cut(first.patches, index, chunk), convolution.outputs(index)
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
        more["kernel"] = sums["kernel"] + jnp.einsum(axes, _cut(patches, index, chunk), normed)
        more["total"] = sums["total"] + jnp.sum(normed, axis=1)
        return {"second": kernel, **more}

    start = {
        "second": jnp.zeros(convolution.block.kernel.shape, wide),
        "kernel": jnp.zeros((taps, channels) if first.norm == "layer" else (batch, taps, channels), wide),
        "total": jnp.zeros((batch, channels), wide),
    }
    if first.norm == "layer":
        start |= {name: jnp.zeros(channels, wide) for name in ("scale", "shift")}
    sums = lax.fori_loop(0, shapes[0].chunks, add, start)
    second = BlockParameters(sums["second"], convolution.own_bias(), *norms)
    bias = None if first.block.bias is None else jnp.sum(sums["total"], axis=0)
    if first.norm == "layer":
        own = BlockParameters(sums["kernel"][:, None], bias, sums["scale"], sums["shift"])
        spread = None
    else:
        # y = unit * scale + shift with unit = (x - mean) / sqrt(variance + epsilon), x = patches @ kernel
        kernel = _wide(first.block.kernel[:, 0])
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


def _waveform_gradient(first: _First, convolution: _ConvolutionGradient, spread, waveform, shapes):
    """Of the samples: a second pass over the chunks, which training never asks for and the compiler drops."""
    chunk = shapes[0].chunk
    kernel = _wide(first.block.kernel[:, 0])

    def one(index, out):
        piece = _cut(first.patches, index, chunk)
        gradient = convolution.of_input(convolution.outputs(index)) * gelu_and_slope(first.normed(piece))[1]
        if first.norm == "layer":
            of = normalized(first.convolved(piece), epsilon=first.epsilon)
            gradient = of.gradient(gradient * first.block.scale[None, None])
        else:
            scale, total, weighted = (x[:, None] for x in spread)
            unit = (first.convolved(piece) - first.moments.mean[:, None]) * first.moments.scale[:, None]
            real = _cut(first.real, index, chunk)[..., None]
            gradient = scale * (gradient - jnp.where(real, total + unit * weighted, 0.0))
        return _put(out, jnp.einsum("btc,kc->btk", gradient, kernel), index)

    length = shapes[0].length
    start = jnp.zeros((waveform.shape[0], first.patches.shape[1], kernel.shape[0]), _wide_type(waveform))
    of_patches = lax.fori_loop(0, length // chunk, one, start)
    gather = partial(_patches, shape=shapes[0], frames=first.patches.shape[1])
    return jax.linear_transpose(gather, _wide(waveform))(of_patches)[0].astype(waveform.dtype)
