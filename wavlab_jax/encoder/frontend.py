"""Waveform to frames: normalisation, the strided convolutions, and their projection to the Transformer's width."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from wavlab_jax.encoder.config import EncoderConfig
from wavlab_jax.encoder.layers import Dense, Moments, Norm, gelu, standardize, torch_uniform
from wavlab_jax.encoder.lean_convolution import BlockParameters
from wavlab_jax.encoder.lean_extractor import extract


def convolved_length(samples, *, kernel: int, stride: int):
    """Output length of one unpadded convolution; works on integers and arrays."""
    return (
        jnp.maximum((samples - kernel) // stride + 1, 0)
        if isinstance(samples, jax.Array)
        else max((samples - kernel) // stride + 1, 0)
    )


class Convolution(nnx.Module):
    """One strided convolution and its optional norm; kernel [taps, inputs, outputs], kaiming normal as in fairseq."""

    def __init__(self, key: jax.Array, cfg: EncoderConfig, index: int):
        inputs = 1 if index == 0 else cfg.extractor_channels[index - 1]
        taps, outputs = cfg.extractor_kernels[index], cfg.extractor_channels[index]
        kernel_key, bias_key = jax.random.split(key)
        self.kernel = nnx.Param(
            math.sqrt(2.0 / (taps * inputs)) * jax.random.normal(kernel_key, (taps, inputs, outputs))
        )
        fan_in = taps * inputs
        self.bias = nnx.Param(torch_uniform(bias_key, (outputs,), fan_in=fan_in)) if cfg.extractor_bias else None
        self.norm = Norm(outputs) if cfg.extractor_norm == "layer" or index == 0 else None

    def convolve(self, x: jax.Array, *, stride: int) -> jax.Array:
        """[batch, time, inputs] -> [batch, time', outputs], before norm and GELU."""
        x = lax.conv_general_dilated(
            x, self.kernel[...].astype(x.dtype), (stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)[None, None]

    def __call__(
        self,
        x: jax.Array,
        *,
        stride: int,
        lengths: jax.Array | None,
        cfg: EncoderConfig,
        moments: Moments | None = None,
    ) -> jax.Array:
        """[batch, time, inputs] -> [batch, time', outputs]; `lengths` [batch]: real output frames (group norm).

        `moments` [outputs] of the group norm, where `x` is a part of the recording that they were measured on.
        """
        x = self.convolve(x, stride=stride)
        if self.norm is not None and cfg.extractor_norm == "layer":
            x = self.norm.over_channels(x, epsilon=cfg.norm_epsilon)
        elif self.norm is not None and moments is not None:
            x = self.norm.by_moments(x, moments, epsilon=cfg.norm_epsilon)
        elif self.norm is not None:
            valid = None if lengths is None else jnp.arange(x.shape[1])[None] < lengths[:, None]
            x = self.norm.over_time(x, valid=valid, epsilon=cfg.norm_epsilon)
        return gelu(x)


class WholeMoments(NamedTuple):
    """What the frontend must know of a whole recording to encode a part of it.

    Attributes:
        waveform: of the samples, scalars; used where the encoder normalises the waveform.
        first_convolution: of the first convolution's output over all time, [channels]; used by the group norm.
    """

    waveform: Moments
    first_convolution: Moments | None


class Frontend(nnx.Module):
    """Waveform [batch, samples] -> features [batch, frames, channels] -> projected [batch, frames, width]."""

    def __init__(self, key: jax.Array, cfg: EncoderConfig):
        keys = jax.random.split(key, len(cfg.extractor_channels) + 1)
        self.convolutions = nnx.List([Convolution(k, cfg, i) for i, k in enumerate(keys[:-1])])
        self.norm = Norm(cfg.extractor_channels[-1])
        self.projection = Dense(keys[-1], cfg.extractor_channels[-1], cfg.width, bert=False)

    def features(
        self,
        waveform: jax.Array,
        *,
        samples: jax.Array | None,
        cfg: EncoderConfig,
        whole: WholeMoments | None = None,
        lean: bool = False,
    ) -> jax.Array:
        """[batch, samples] -> [batch, frames, channels]; `samples` [batch]: how many are real, None if all are.

        With `whole`, the waveform is a part of one recording, and the frames are those of the whole recording. `lean`:
        with the gradient of `lean_extractor`, where there is more than one convolution and no `whole`.
        """
        x = waveform.astype(jnp.float32)
        real = None if samples is None else jnp.arange(x.shape[1])[None] < samples[:, None]
        if cfg.normalize_waveform and whole is not None:
            x = whole.waveform.standardize(x, epsilon=cfg.waveform_epsilon)
        elif cfg.normalize_waveform:
            x = standardize(x, axis=1, epsilon=cfg.waveform_epsilon, where=real)
        x = x if real is None else jnp.where(real, x, 0.0)  # "fairseq_bins" keeps frames that hear it
        x = x.astype(cfg.compute_dtype)
        if lean and whole is None and len(cfg.extractor_strides) > 1:
            return _scale_gradient(self._lean(x, samples, cfg=cfg), cfg.feature_gradient_scale)
        x = x[..., None]
        for convolution, kernel, stride in zip(
            self.convolutions, cfg.extractor_kernels, cfg.extractor_strides, strict=True
        ):
            samples = None if samples is None else convolved_length(samples, kernel=kernel, stride=stride)
            moments = None if whole is None else whole.first_convolution  # only the first has a norm over time
            x = convolution(x, stride=stride, lengths=samples, cfg=cfg, moments=moments)
        return _scale_gradient(x, cfg.feature_gradient_scale)

    def _lean(self, x: jax.Array, samples: jax.Array | None, *, cfg: EncoderConfig) -> jax.Array:
        def value(param):
            return None if param is None else param[...]

        blocks = [
            BlockParameters(
                value(each.kernel),
                value(each.bias),
                *((None, None) if each.norm is None else (value(each.norm.scale), value(each.norm.bias))),
            )
            for each in self.convolutions
        ]
        valid = None
        if samples is not None:
            kernel, stride = cfg.extractor_kernels[0], cfg.extractor_strides[0]
            lengths = convolved_length(samples, kernel=kernel, stride=stride)
            valid = jnp.arange(convolved_length(x.shape[1], kernel=kernel, stride=stride))[None] < lengths[:, None]
        return extract(
            x, blocks, valid, strides=cfg.extractor_strides, norm=cfg.extractor_norm, epsilon=cfg.norm_epsilon
        )

    def first_convolution(self, waveform: jax.Array, moments: Moments, *, cfg: EncoderConfig) -> jax.Array:
        """[batch, samples] of a part -> [batch, time, channels] that `WholeMoments.first_convolution` is taken of.

        `moments` are those of the whole recording's samples.
        """
        x = waveform.astype(jnp.float32)
        x = moments.standardize(x, epsilon=cfg.waveform_epsilon) if cfg.normalize_waveform else x
        return self.convolutions[0].convolve(x.astype(cfg.compute_dtype)[..., None], stride=cfg.extractor_strides[0])

    def project(self, features: jax.Array, *, cfg: EncoderConfig, lean: bool = False) -> jax.Array:
        """[batch, frames, channels] -> [batch, frames, width]."""
        return self.projection(self.norm.over_channels(features, epsilon=cfg.norm_epsilon, lean=lean))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scale_gradient(x: jax.Array, scale: float) -> jax.Array:
    """x itself, to the bit, with its gradient multiplied by `scale` (fairseq `GradMultiply`)."""
    return x


_scale_gradient.defvjp(lambda x, scale: (x, None), lambda scale, _, gradient: (scale * gradient,))
