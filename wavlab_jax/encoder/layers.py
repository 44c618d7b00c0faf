"""The encoder's building blocks: modules hold parameters and structure; calling one is a pure function.

Initial values follow fairseq: weights inside the Transformer are N(0, 0.02) with zero biases
(`fairseq/modules/transformer_sentence_encoder.py` init_bert_params), everything outside keeps PyTorch's defaults.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from wavlab_jax.encoder import gradients
from wavlab_jax.encoder.config import EncoderConfig, Formulation, PositionSpelling


def dropout(x: jax.Array, *, rate: float, keys: jax.Array | None) -> jax.Array:
    """x [batch, ...] with each element zeroed with probability `rate`; `keys` [batch], one a row; None: no dropout.

    A key a row makes the result independent of how rows are split over devices and micro-batches.
    """
    if keys is None or rate == 0.0:
        return x
    return jnp.where(kept(x.shape, rate=rate, keys=keys), x / (1.0 - rate), jnp.zeros((), x.dtype))


def kept(shape: tuple[int, ...], *, rate: float, keys: jax.Array) -> jax.Array:
    """bool [batch, ...] of this shape: which elements `dropout` leaves."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, shape[1:]))(keys)


def fold(keys: jax.Array | None, site: int) -> jax.Array | None:
    """Row keys [batch] of one of several places that draw; None stays None."""
    return None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, site))(keys)


def gelu(x: jax.Array, *, lean: bool = False) -> jax.Array:
    """The exact (erf) form, as all peers use it; `jax.nn.gelu` defaults to the tanh approximation.

    `lean`, here and below: with a gradient of `wavlab_jax.encoder.gradients`.
    """
    if lean:
        return gradients.gelu(x)
    if x.dtype != jnp.float32:
        return jax.nn.gelu(x, approximate=False)
    # PyTorch's spelling; JAX's goes through erfc, a quarter slower on CPU. In bfloat16 1 + erf loses its left tail.
    return 0.5 * x * (1.0 + lax.erf(x * math.sqrt(0.5)))


def torch_uniform(key: jax.Array, shape: tuple[int, ...], *, fan_in: int) -> jax.Array:
    """PyTorch's default for Linear weights and biases: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = 1.0 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


DENSE = "dense"  # what a policy of rematerialisation calls the outputs of `Dense`


class Dense(nnx.Module):
    """[..., inputs] -> [..., outputs]: x @ kernel + bias."""

    def __init__(self, key: jax.Array, inputs: int, outputs: int, *, bert: bool = True):
        if bert:
            self.kernel = nnx.Param(0.02 * jax.random.normal(key, (inputs, outputs)))
            self.bias = nnx.Param(jnp.zeros((outputs,)))
        else:
            kernel_key, bias_key = jax.random.split(key)
            self.kernel = nnx.Param(torch_uniform(kernel_key, (inputs, outputs), fan_in=inputs))
            self.bias = nnx.Param(torch_uniform(bias_key, (outputs,), fan_in=inputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        # Two dimensions and a float32 accumulator: XLA:CPU's bfloat16 product is several times slower otherwise.
        return self._of(x, partial(jnp.dot, preferred_element_type=jnp.float32))

    def of_gelu(self, x: jax.Array) -> jax.Array:
        """The output for the GELU of x, of which the lean gradient keeps x alone."""
        return self._of(x, gradients.gelu_dot)

    def _of(self, x: jax.Array, product) -> jax.Array:
        kernel = self.kernel[...]
        rows = product(x.reshape(-1, x.shape[-1]), kernel.astype(x.dtype))
        out = (rows + self.bias[...][None]).astype(x.dtype).reshape(*x.shape[:-1], kernel.shape[-1])
        return checkpoint_name(out, DENSE)


class Norm(nnx.Module):
    """Scale and shift after a normalisation over [..., channels]; statistics in float32."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def over_channels(self, x: jax.Array, *, epsilon: float, lean: bool = False) -> jax.Array:
        """LayerNorm of [batch, time, channels]."""
        if lean:
            return gradients.layer_norm(x, self.scale[...], self.bias[...], epsilon)
        return self._affine(standardize(x, axis=-1, epsilon=epsilon), x.dtype)

    def over_time(self, x: jax.Array, *, valid: jax.Array | None, epsilon: float) -> jax.Array:
        """GroupNorm with one group a channel: [batch, time, channels] normalised over time.

        With `valid` [batch, time] the statistics are those of the real part alone, so padding changes nothing. (Peers
        count the padding in, which is why their group-norm models depend on the batch.)
        """
        where = None if valid is None else valid[:, :, None]
        return self._affine(standardize(x, axis=1, epsilon=epsilon, where=where), x.dtype)

    def by_moments(self, x: jax.Array, moments: "Moments", *, epsilon: float) -> jax.Array:
        """`over_time` of a part [batch, time, channels] of something longer, whose moments are known, [channels]."""
        return self._affine(moments.standardize(x, epsilon=epsilon), x.dtype)

    def _affine(self, x: jax.Array, dtype) -> jax.Array:
        shape = (1,) * (x.ndim - 1) + (-1,)
        return (x * self.scale[...].reshape(shape) + self.bias[...].reshape(shape)).astype(dtype)


def standardize(x: jax.Array, *, axis: int, epsilon: float, where: jax.Array | None = None) -> jax.Array:
    """x with zero mean and unit variance over `axis`, in float32; epsilon is added to the variance."""
    x = x.astype(jnp.float32)
    # at least one: a filler row has no real element, and 0 / 0 would reach every gradient through it
    count = x.shape[axis] if where is None else jnp.maximum(jnp.sum(where, axis=axis, keepdims=True), 1)
    mean = jnp.sum(x, axis=axis, keepdims=True, where=where) / count
    # mean - x, where x - mean would do as well: XLA would keep an array that both uses share, and write and read it
    variance = jnp.sum(jnp.square(mean - x), axis=axis, keepdims=True, where=where) / count
    if axis != -1:
        # Over time there are 1e4 to 1e6 summands, of which float32 loses bits, and the norm multiplies what is lost by
        # up to 1 / sqrt(epsilon) where audio is constant: the mean of what is left is taken off again. It is zero but
        # for rounding, so that no gradient goes through it.
        mean -= lax.stop_gradient(jnp.sum(mean - x, axis=axis, keepdims=True, where=where) / count)
    return (x - mean) * lax.rsqrt(variance + epsilon)


class Moments(NamedTuple):
    """Mean and variance of something of which a part is at hand; float32, each a scalar or [channels]."""

    mean: jax.Array
    variance: jax.Array

    def standardize(self, x: jax.Array, *, epsilon: float) -> jax.Array:
        """x [..., channels] as `standardize` would leave it, had it seen the whole."""
        shape = (1,) * (x.ndim - 1) + (-1,)
        scale = lax.rsqrt(self.variance + epsilon)
        return (x.astype(jnp.float32) - self.mean.reshape(shape)) * scale.reshape(shape)


class PositionConvolution(nnx.Module):
    """Weight-normed grouped convolution over time whose output is added to its input.

    Kernel 128 and 16 groups in all released models; initial values N(0, sqrt(4 / (kernel * width))) (fairseq
    `wav2vec2.py` make_conv_pos). The weight is gain[tap] * direction[tap] / ||direction[tap]||, the norm taken over
    both channel axes of a tap (`weight_norm(dim=2)` there).
    """

    def __init__(self, key: jax.Array, cfg: EncoderConfig):
        shape = (cfg.position_kernel, cfg.width // cfg.position_groups, cfg.width)
        direction = math.sqrt(4.0 / (cfg.position_kernel * cfg.width)) * jax.random.normal(key, shape)
        self.direction = nnx.Param(direction)
        self.gain = nnx.Param(jnp.sqrt(jnp.sum(jnp.square(direction), axis=(1, 2))))
        self.bias = nnx.Param(jnp.zeros((cfg.width,)))

    def __call__(self, x: jax.Array, *, spelling: PositionSpelling, lean: bool = False) -> jax.Array:
        """[batch, frames, width] -> GELU of the convolution, same shape; even kernels lose their last output frame."""
        direction = self.direction[...]
        norm = jnp.sqrt(jnp.sum(jnp.square(direction), axis=(1, 2), keepdims=True))
        kernel = self.gain[...][:, None, None] * direction / norm
        taps = kernel.shape[0]
        # padding taps // 2 on both sides and dropping the last frame of an even kernel: one frame less on the right
        before, after = taps // 2, taps // 2 - (1 - taps % 2)
        y = _CONVOLVE[spelling](x, kernel.astype(x.dtype), before, after)
        return gelu(y + self.bias[...].astype(x.dtype)[None, None], lean=lean)


def _convolve_grouped(x: jax.Array, kernel: jax.Array, before: int, after: int) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1,),
        padding=[(before, after)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=x.shape[-1] // kernel.shape[1],
    )


def _convolve_by_group(x: jax.Array, kernel: jax.Array, before: int, after: int) -> jax.Array:
    """The same, a group after the other. (`vmap` over the groups would become a grouped convolution again.)"""
    groups = x.shape[-1] // kernel.shape[1]
    parts = zip(jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1), strict=True)
    return jnp.concatenate([_convolve_grouped(part, taps, before, after) for part, taps in parts], axis=-1)


def _convolve_by_dft(x: jax.Array, kernel: jax.Array, before: int, after: int) -> jax.Array:
    """Overlap-save: segments of twice the kernel's length, transformed by matrix products, in float32."""
    batch, frames, width = x.shape
    taps, inputs, _ = kernel.shape
    groups = width // inputs
    dtype, x, kernel = x.dtype, x.astype(jnp.float32), kernel.astype(jnp.float32)
    size = 2 * taps
    hop = size - taps + 1  # outputs of a segment that its circular convolution leaves whole
    segments = -(-frames // hop)
    x = jnp.pad(x, ((0, 0), (before, (segments - 1) * hop + size - frames - before), (0, 0)))
    x = jnp.stack([x[:, start : start + size] for start in range(0, segments * hop, hop)], axis=1)
    forward, inverse = _real_dft(size)
    bins, rows = size // 2 + 1, batch * segments
    x_hat = jnp.einsum("ctf,ntw->cfnw", forward, x.reshape(rows, size, width))
    x_hat = x_hat.reshape(2, bins, rows, groups, inputs).transpose(1, 3, 0, 2, 4)
    # The kernel's transform is the largest array: it is made with groups first, as the products below read it, and in
    # two halves, so that neither it nor its gradient is ever copied.
    kernel = kernel.reshape(taps, inputs, groups, width // groups).transpose(0, 2, 1, 3).reshape(taps, -1)
    halves = (jnp.dot(part[:taps].T, kernel).reshape(bins, groups, inputs, width // groups) for part in forward)
    by_real, by_imaginary = (jnp.einsum("fgcni,fgio->fgcno", x_hat, half) for half in halves)
    # (x_r + i x_i) (k_r - i k_i): conjugated, because a layer's convolution is a correlation
    y_hat = jnp.stack([by_real[:, :, 0] + by_imaginary[:, :, 1], by_real[:, :, 1] - by_imaginary[:, :, 0]])
    y = jnp.einsum("ctf,cfgno->tgno", inverse[:, :hop], y_hat).transpose(2, 0, 1, 3)
    return y.reshape(batch, segments * hop, width)[:, :frames].astype(dtype)


def _real_dft(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrices [2 (real, imaginary), size, size // 2 + 1] of the transform of `size` real numbers and its inverse."""
    turns = np.arange(size)[:, None] * np.arange(size // 2 + 1)[None] % size / size
    forward = np.stack([np.cos(2 * np.pi * turns), -np.sin(2 * np.pi * turns)])
    twice = np.full(size // 2 + 1, 2.0)  # a frequency stands for its mirror image too, the first and last do not
    twice[[0, -1]] = 1.0
    return forward.astype(np.float32), (forward * twice / size).astype(np.float32)


_CONVOLVE = {"grouped": _convolve_grouped, "by_group": _convolve_by_group, "dft": _convolve_by_dft}


def relative_buckets(frames: int, *, buckets: int, max_distance: int) -> np.ndarray:
    """[frames, frames] int32 bucket of each (query, key) pair: WavLM's T5-style bidirectional buckets.

    Half the buckets are for keys after the query; inside a half, distances under a quarter of all buckets have their
    own, then buckets widen logarithmically up to `max_distance` (unilm `wavlm/modules.py` _relative_positions_bucket).
    A static host table: peers that build it on the device each step pay for it.
    """
    relative = np.arange(frames)[None, :] - np.arange(frames)[:, None]
    side = buckets // 2
    exact = side // 2
    distance = np.abs(relative)
    with np.errstate(divide="ignore"):
        log_ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / math.log(max_distance / exact)
    far = np.minimum(exact + (log_ratio * (side - exact)).astype(np.int64), side - 1)
    bucket = np.where(distance < exact, distance, far) + np.where(relative > 0, side, 0)
    return bucket.astype(np.int32)


class Gate(nnx.Module):
    """WavLM's per-layer gate on the shared relative position bias (2110.13900 section 3.1; unilm's fast path).

    gate = a * (b * constant - 1) + 2 with (a, b) = sigmoid of two sums of four outputs of a Linear(head width -> 8)
    that all heads share. It reads the layer's input to attention split into heads, not the projected query.
    """

    def __init__(self, key: jax.Array, cfg: EncoderConfig):
        self.dense = Dense(key, cfg.width // cfg.heads, 8)
        self.constant = nnx.Param(jnp.ones((cfg.heads,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, frames, width] -> [batch, heads, frames]."""
        heads = self.constant[...].shape[0]
        split = x.reshape(*x.shape[:2], heads, -1)
        a, b = jnp.moveaxis(jax.nn.sigmoid(self.dense(split).reshape(*split.shape[:3], 2, 4).sum(-1)), -1, 0)
        gate = a * (b * self.constant[...].astype(x.dtype)[None, None] - 1.0) + 2.0
        return gate.transpose(0, 2, 1)


class Attention(nnx.Module):
    """Multi-head self-attention over [batch, frames, width]; softmax in float32."""

    def __init__(self, key: jax.Array, cfg: EncoderConfig):
        keys = jax.random.split(key, 5)
        self.query = Dense(keys[0], cfg.width, cfg.width)
        self.key = Dense(keys[1], cfg.width, cfg.width)
        self.value = Dense(keys[2], cfg.width, cfg.width)
        self.output = Dense(keys[3], cfg.width, cfg.width)
        self.gate = Gate(keys[4], cfg) if cfg.relative_bias else None

    def __call__(
        self, x, *, cfg: EncoderConfig, valid, position_bias, keys, formulation: Formulation
    ) -> tuple[jax.Array, jax.Array | None]:
        """`valid` [batch, frames] masks keys; `position_bias` [shards, heads, frames, frames] comes ungated.

        The shards are equal parts of the rows; their biases are the same (`Formulation.row_shards`). Returns the output
        and the position bias as it came, for the next layer: its lean gradient is added up on the way back.
        """

        def split(y):
            return y.reshape(*y.shape[:2], cfg.heads, -1)

        x = formulation.along_rows(x)
        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        query = query * (query.shape[-1] ** -0.5)
        gate = None if self.gate is None else self.gate(x).astype(jnp.float32)
        if formulation.lean_gradients or (formulation.attention_by_head and keys is None):
            rate, keep = cfg.attention_dropout, None
            if keys is not None and rate > 0.0:
                keep = kept((x.shape[0], cfg.heads, x.shape[1], x.shape[1]), rate=rate, keys=fold(keys, 0))
            pairs = gradients.Pairs(gate, None if gate is None else position_bias[0], valid, keep)
            mixed, passed_on = gradients.attention(query, key, value, pairs, rate)
            return self.output(mixed.reshape(x.shape)), None if gate is None else passed_on[None]
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        if gate is not None:
            parts = gate.reshape(position_bias.shape[0], -1, *gate.shape[1:], 1)
            logits = logits + (parts * position_bias[:, None]).reshape(logits.shape)
        if valid is not None:
            # finite, so that a filler row without any real frame stays free of NaN
            logits = jnp.where(valid[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(x.dtype)
        weights = dropout(weights, rate=cfg.attention_dropout, keys=fold(keys, 0))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return self.output(formulation.along_rows(mixed.reshape(x.shape))), position_bias


BOTTLENECK_KINDS = ("houlsby", "mms")


class Bottleneck(nnx.Module):
    """An adapter of a layer: [..., width] -> what is added, through `inner` channels.

    "houlsby": up(gelu(down(y))) of the feed-forward network's output y, before its dropout, is added to the residual
    stream beside it (ESPnet `espnet2/layers/houlsby_adapter_layer.py`, after 1902.00751). At first kernels are N(0,
    0.01), cut at two deviations, and biases zero, so that hardly anything is added (1902.00751, section 3.3).
    "mms": up(relu(down(LayerNorm(x)))) of the layer's output x is added to it (MMS, 2305.13516; transformers
    `HubertAttnAdapterLayer`). At first kernels are N(0, 0.02) and biases zero, as there.
    """

    def __init__(self, key: jax.Array, *, kind: str, width: int, inner: int):
        down_key, up_key = jax.random.split(key)
        self.kind = kind
        self.norm = Norm(width) if kind == "mms" else None
        self.down, self.up = Dense(down_key, width, inner), Dense(up_key, inner, width)
        if kind == "houlsby":
            for dense, own in ((self.down, down_key), (self.up, up_key)):
                values = jax.random.truncated_normal(own, -2.0, 2.0, dense.kernel[...].shape)
                dense.kernel = nnx.Param(0.01 * values)

    def __call__(self, x: jax.Array, *, epsilon: float) -> jax.Array:
        """What is added; `epsilon` of the norm."""
        if self.norm is None:
            return self.up(gelu(self.down(x)))
        return self.up(jax.nn.relu(self.down(self.norm.over_channels(x, epsilon=epsilon))))


class Layer(nnx.Module):
    """One Transformer block, LayerNorm before or after each half; with a `bottleneck` where one was put in."""

    def __init__(self, key: jax.Array, cfg: EncoderConfig):
        keys = jax.random.split(key, 3)
        self.attention = Attention(keys[0], cfg)
        self.attention_norm = Norm(cfg.width)
        self.expand = Dense(keys[1], cfg.width, cfg.feed_forward)
        self.contract = Dense(keys[2], cfg.feed_forward, cfg.width)
        self.final_norm = Norm(cfg.width)
        self.bottleneck = None  # `wavlab_jax.adapters` puts one in

    def __call__(
        self, x, *, cfg: EncoderConfig, valid, position_bias, keys, formulation: Formulation
    ) -> tuple[jax.Array, jax.Array | None]:
        """[batch, frames, width] -> same shape, and the position bias for the next layer (`Attention`).

        `keys` [batch] draw dropout, None draws none.
        """
        kind = None if self.bottleneck is None else self.bottleneck.kind
        lean = formulation.lean_gradients

        def attend(y):
            common = dict(cfg=cfg, valid=valid, position_bias=position_bias, keys=keys, formulation=formulation)
            y, passed_on = self.attention(y, **common)
            return dropout(y, rate=cfg.dropout, keys=fold(keys, 1)), passed_on

        def feed_forward(y):
            y = self.expand(formulation.along_rows(y))
            if lean and (keys is None or cfg.activation_dropout == 0.0):
                y = self.contract.of_gelu(y)
            else:
                y = dropout(gelu(y, lean=lean), rate=cfg.activation_dropout, keys=fold(keys, 2))
                y = self.contract(formulation.along_rows(y))
            beside = self.bottleneck(y, epsilon=cfg.norm_epsilon) if kind == "houlsby" else None
            y = dropout(y, rate=cfg.dropout, keys=fold(keys, 3))
            return y if beside is None else y + beside

        def attention_norm(y):
            return self.attention_norm.over_channels(y, epsilon=cfg.norm_epsilon, lean=lean)

        def final_norm(y):
            return self.final_norm.over_channels(y, epsilon=cfg.norm_epsilon, lean=lean)

        attended, position_bias = attend(attention_norm(x) if cfg.pre_norm else x)
        if cfg.pre_norm:
            x = x + attended
            x = x + feed_forward(final_norm(x))
        else:
            x = attention_norm(x + attended)
            x = final_norm(x + feed_forward(x))
        return x + self.bottleneck(x, epsilon=cfg.norm_epsilon) if kind == "mms" else x, position_bias
