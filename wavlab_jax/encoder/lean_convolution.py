"""One convolution of the extractor, cut into chunks of frames, and its gradient as matrix products.

A convolution's two gradients are products of `stride` phases of its input with the gradient of its output, shifted by
whole strides. `lean_extractor.py` says what it is for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from wavlab_jax.encoder.gradients import gelu_and_slope, normalized, wide, wide_type

CHUNK_FRAMES = 4000  # of all rows together: 8 MB of 512 channels; shorter ones spend more on adding up gradients


class BlockParameters(NamedTuple):
    """Of one convolution. kernel [taps, inputs, outputs]; bias and the norm's scale and shift [outputs], or None."""

    kernel: jax.Array
    bias: jax.Array | None
    scale: jax.Array | None
    shift: jax.Array | None


@dataclass(frozen=True)
class Shape:
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
        """Frames of all chunks."""
        return self.chunk * self.chunks

    @property
    def shifts(self) -> int:
        """By how many strides its taps reach over."""
        return -(-self.taps // self.stride)


def shapes_of(batch: int, samples: int, taps: Sequence[int], strides: Sequence[int]) -> tuple[Shape, ...]:
    """Of each convolution in a chain over `samples`, `taps` and `strides` one each."""
    shapes, frames = [], samples
    for index, (tap, stride) in enumerate(zip(taps, strides, strict=True)):
        frames = (frames - tap) // stride + 1
        group = strides[index + 1] if index + 1 < len(taps) else 1  # chunks hold whole strides of the next one
        chunks = max(batch * frames // CHUNK_FRAMES, 1)
        chunk = -(-frames // (group * chunks)) * group
        shapes.append(Shape(tap, stride, frames, chunk, -(-frames // chunk)))
    return tuple(shapes)


def cut(x, index, size: int):
    """Chunk `index` of `size` frames."""
    return lax.dynamic_slice_in_dim(x, index * size, size, axis=1)


def put(whole, piece, index):
    """`whole` with `piece` as its chunk `index`."""
    return lax.dynamic_update_slice_in_dim(whole, piece.astype(whole.dtype), index * piece.shape[1], axis=1)


def convolve(x, block: BlockParameters, stride: int, missing: int = 0):
    """`missing` frames of zeros are appended; where negative, so many are cut off."""
    x = lax.conv_general_dilated(x, block.kernel, (stride,), [(0, missing)], dimension_numbers=("NWC", "WIO", "NWC"))
    return x if block.bias is None else x + block.bias[None, None]


def activation(x, block: BlockParameters, norm: str, epsilon: float):
    """x before norm and GELU -> after both; of all convolutions but the first."""
    y = wide(x)
    if norm == "layer":
        y = normalized(y, epsilon=epsilon).unit * block.scale[None, None] + block.shift[None, None]
    return gelu_and_slope(y)[0].astype(x.dtype)


def activation_gradient(x, gradient, block: BlockParameters, norm: str, epsilon: float):
    """Gradients of x before norm and GELU, and of the norm's (scale, shift), or None for both."""
    gradient = wide(gradient)
    if norm != "layer":
        return (gradient * gelu_and_slope(wide(x))[1]).astype(x.dtype), (None, None)
    of = normalized(wide(x), epsilon=epsilon)
    gradient = gradient * gelu_and_slope(of.unit * block.scale[None, None] + block.shift[None, None])[1]
    return of.gradient(gradient * block.scale[None, None]).astype(x.dtype), (
        jnp.sum(gradient * of.unit, axis=(0, 1)),
        jnp.sum(gradient, axis=(0, 1)),
    )


class ConvolutionGradient(NamedTuple):
    """What one convolution's gradients are made of.

    Attributes:
        block: its parameters.
        shape: of its output.
        before: of its input.
        padded: [batch, shifts - 1 + input length / stride, outputs]: the gradient of its output, zeros around.
    """

    block: BlockParameters
    shape: Shape
    before: Shape
    padded: jax.Array

    @classmethod
    def of(cls, block, shape: Shape, before: Shape, gradient) -> "ConvolutionGradient":
        """Given the gradient of the output, of at least its real frames; what is missing is zero."""
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
                phases.append(jnp.zeros((*outputs.shape[:2], self.block.kernel.shape[1]), wide_type(outputs)))
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
                both = lax.dot_general(own, rows, (((0,), (0,)), ((), ())), preferred_element_type=wide_type(x))
                found |= dict(zip(taps, jnp.split(both, len(taps), axis=1), strict=True))
        return jnp.stack([found[tap] for tap in range(self.shape.taps)])

    def own_bias(self) -> jax.Array | None:
        """The bias's gradient, where there is one."""
        return None if self.block.bias is None else jnp.sum(wide(self.padded), axis=(0, 1))

    def through(self, x, before: BlockParameters, norms, norm: str, epsilon: float):
        """Gradients of this block, of x (the block before's output before norm and GELU), of that one's norm.

        `norms`: of this block's norm, already found.
        """

        def chunk(index, sums):
            whole, kernel, before_norms = sums
            piece, outputs = cut(whole, index, self.before.chunk), self.outputs(index)
            kernel += self.of_kernel(activation(piece, before, norm, epsilon), outputs)
            piece, more = activation_gradient(piece, self.of_input(outputs), before, norm, epsilon)
            return put(whole, piece, index), kernel, jax.tree.map(jnp.add, before_norms, more)

        dtype = wide_type(x)
        nothing = (None, None) if norm != "layer" else tuple(jnp.zeros(x.shape[-1], dtype) for _ in range(2))
        # each chunk of x is read once, and its gradient takes its place
        start = (x, jnp.zeros(self.block.kernel.shape, dtype), nothing)
        gradient, kernel, before_norms = lax.fori_loop(0, self.before.chunks, chunk, start)
        return BlockParameters(kernel, self.own_bias(), *norms), gradient, before_norms


def _product(x, kernel) -> jax.Array:
    """[batch, frames, inputs] x [inputs, outputs] as one product of two dimensions; wide."""
    out = jnp.dot(x.reshape(-1, x.shape[-1]), kernel, preferred_element_type=wide_type(x))
    return out.reshape(*x.shape[:2], -1)
