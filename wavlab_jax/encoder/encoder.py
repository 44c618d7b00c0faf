"""The public pair: make an encoder from a key and a configuration, and encode waveforms with it."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from data_pipelines.batch import HOP, RECEPTIVE_FIELD, num_frames
from wavlab_jax.encoder.config import EncoderConfig, EncoderError, Formulation, formulation_for
from wavlab_jax.encoder.frontend import Frontend
from wavlab_jax.encoder.gradients import unstack
from wavlab_jax.encoder.layers import DENSE, Layer, Norm, PositionConvolution, dropout, fold, relative_buckets


class LayerStatistics(NamedTuple):
    """Of the first layer's input and of each layer's output, before a final norm; each [layers + 1, batch] float32.

    Attributes:
        largest: largest absolute value among the finite ones.
        nonfinite: how many values are infinite or not a number.
    """

    largest: jax.Array
    nonfinite: jax.Array


class Encoded(NamedTuple):
    """What `encode` returns.

    Attributes:
        hidden: layers + 1 arrays [batch, frames, width]: the input of the first layer, then each layer's output; the
            last one after the final norm, where there is one. Hugging Face's `hidden_states` up to transformers 4;
            version 5 leaves the final norm of pre-norm models to `last_hidden_state`.
        features: [batch, frames, channels] output of the convolutions, before LayerNorm and projection.
        valid: [batch, frames] real frames, or None if all are.
        statistics: of every layer; None unless `watch` asked for them.
    """

    hidden: tuple[jax.Array, ...]
    features: jax.Array
    valid: jax.Array | None
    statistics: LayerStatistics | None = None


class Encoder(nnx.Module):
    """Parameters and structure of an encoder; `encode` is what runs it. Layers are stacked on a leading axis."""

    def __init__(self, key: jax.Array, cfg: EncoderConfig):
        keys = jax.random.split(key, 5)
        self.config = cfg
        self.frontend = Frontend(keys[0], cfg)
        self.mask_embedding = nnx.Param(jax.random.uniform(keys[1], (cfg.width,)))
        self.position = PositionConvolution(keys[2], cfg)
        self.norm = Norm(cfg.width)
        table = 0.02 * jax.random.normal(keys[3], (cfg.bias_buckets, cfg.heads)) if cfg.relative_bias else None
        self.relative_bias = None if table is None else nnx.Param(table)
        self.layers = jax.vmap(lambda k: Layer(k, cfg))(jax.random.split(keys[4], cfg.layers))


def make_encoder(key: jax.Array, cfg: EncoderConfig) -> Encoder:
    """A freshly initialised encoder. Initial values depend on the key and the configuration alone, not on devices."""
    return Encoder(key, cfg)


def unstack_layers(encoder: Encoder) -> Encoder:
    """The same encoder for `encode` alone: its layers in a list, each with arrays of its own (copies).

    A stacked encoder is what is trained, stored and converted. Where layers are unrolled, every call copies each weight
    out of the stack; this spares that, about 3 % of HuBERT Base on CPU.
    """
    copy = nnx.merge(*nnx.split(encoder))
    layers = range(encoder.config.layers)
    copy.layers = nnx.List([jax.tree.map(lambda p, i=index: p[i], encoder.layers) for index in layers])
    return copy


def lower_layers(encoder: Encoder, layer: int) -> Encoder:
    """The encoder without the layers that `hidden[layer]` does not need; the others' arrays are copies of its own.

    One more than needed stays, if there is one: the final norm of a pre-norm encoder belongs to the last layer.
    """
    kept = min(layer + 1, encoder.config.layers)
    short = nnx.merge(*nnx.split(encoder))
    short.config = dataclasses.replace(encoder.config, layers=kept)
    short.layers = jax.tree.map(lambda p: p[:kept], encoder.layers)
    return short


def encode(
    encoder: Encoder,
    waveform: jax.Array,
    valid: jax.Array | None = None,
    *,
    mask: jax.Array | None = None,
    channel_mask: jax.Array | None = None,
    key: jax.Array | None = None,
    seeds: jax.Array | None = None,
    watch: bool = False,
    formulation: Formulation | None = None,
) -> Encoded:
    """Hidden states of `waveform` [batch, samples] at every layer, each [batch, frames, width].

    Args:
        encoder: from `make_encoder` or `unstack_layers`, or imported.
        waveform: float, 16 kHz.
        valid: [batch, samples] bool, True = real, real samples first; None if all are real. Outputs at real frames
            are those of the unpadded row, to rounding, with either norm, unless `cfg.valid_frames` is "fairseq_bins".
        mask: [batch, frames] bool, True = replaced with the mask embedding after projection (fairseq's place).
        channel_mask: [batch, width] bool, True = zero in all frames of the row, hidden frames too (fairseq applies it
            after the mask embedding).
        key: of this step; with `seeds` draws dropout and layerdrop. None: no dropout, no layerdrop.
        seeds: [batch] uint32, one a row; dropout of a row depends on (key, seed) alone, layerdrop on the key alone.
        watch: whether to take `LayerStatistics` of every frame, real or not.
        formulation: spelling of platform-dependent operations; by default that of JAX's default backend.

    Raises:
        EncoderError: the waveform is not [batch, samples] or too short to make a frame; `valid`, `mask`,
            `channel_mask` or `seeds` do not have its shape; only one of `key` and `seeds` is given.
    """
    cfg = encoder.config
    if waveform.ndim != 2 or num_frames(waveform.shape[1]) == 0:
        raise EncoderError(f"waveform must be [batch, samples] with at least 400 samples, got {list(waveform.shape)}")
    batch = waveform.shape[0]
    for name, array, shape in (
        ("valid", valid, waveform.shape),
        ("mask", mask, (batch, num_frames(waveform.shape[1]))),
        ("channel_mask", channel_mask, (batch, cfg.width)),
        ("seeds", seeds, (batch,)),
    ):
        if array is not None and array.shape != shape:
            raise EncoderError(f"`{name}` must be {list(shape)} for this waveform, got {list(array.shape)}")
    if (key is None) != (seeds is None):
        raise EncoderError("dropout needs both `key` (of the step) and `seeds` (one a row), or neither")

    formulation = formulation or formulation_for(jax.default_backend())
    lean = formulation.lean_gradients
    samples = None if valid is None else jnp.sum(valid, axis=1)
    if formulation.extractor_by_row and (key is None or lean):
        rows = _rows(waveform, samples)
        features = lax.map(lambda row: encoder.frontend.features(row[0], samples=row[1], cfg=cfg, lean=lean), rows)[
            :, 0
        ]
    else:
        features = encoder.frontend.features(waveform, samples=samples, cfg=cfg, lean=lean)
    frames = features.shape[1]
    if samples is not None:
        valid = jnp.arange(frames)[None] < _real_frames(samples, waveform.shape[1], frames, cfg=cfg)[:, None]
    row_keys = None if key is None else jax.vmap(lambda seed: jax.random.fold_in(key, seed))(seeds)
    hidden, statistics = _through_layers(
        encoder,
        features,
        valid,
        mask=mask,
        channel_mask=channel_mask,
        key=key,
        row_keys=row_keys,
        watch=watch,
        formulation=formulation,
    )
    return Encoded(hidden=hidden, features=features, valid=valid, statistics=statistics)


def encode_features(
    encoder: Encoder,
    features: jax.Array,
    valid: jax.Array | None = None,
    *,
    formulation: Formulation | None = None,
) -> tuple[jax.Array, ...]:
    """The second half of `encode`: `features` [batch, frames, channels] of the convolutions to `Encoded.hidden`.

    `valid` is [batch, frames]. Nothing is hidden, and there is no dropout.
    """
    formulation = formulation or formulation_for(jax.default_backend())
    nothing = dict.fromkeys(("mask", "channel_mask", "key", "row_keys"))
    return _through_layers(encoder, features, valid, **nothing, watch=False, formulation=formulation)[0]


def _through_layers(
    encoder, features, valid, *, mask, channel_mask, key, row_keys, watch: bool, formulation: Formulation
) -> tuple[tuple[jax.Array, ...], LayerStatistics | None]:
    """`Encoded.hidden` and `Encoded.statistics`; `row_keys` [batch] are `key` with each row's seed folded in."""
    cfg = encoder.config
    lean = formulation.lean_gradients
    x = encoder.frontend.project(features, cfg=cfg, lean=lean)
    x = dropout(x, rate=cfg.projection_dropout, keys=fold(row_keys, 1000))
    if mask is not None:
        x = jnp.where(mask[..., None], encoder.mask_embedding[...].astype(x.dtype)[None, None], x)
    if channel_mask is not None:
        x = jnp.where(channel_mask[:, None], 0.0, x)
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0.0)
    x = x + encoder.position(x, spelling=formulation.position, lean=lean)
    if not cfg.pre_norm:
        x = encoder.norm.over_channels(x, epsilon=cfg.norm_epsilon, lean=lean)
    x = dropout(x, rate=cfg.dropout, keys=fold(row_keys, 1001))

    hidden, statistics = _run_layers(encoder, x, valid, key, row_keys, watch, formulation)
    if cfg.pre_norm:
        hidden = (*hidden[:-1], encoder.norm.over_channels(hidden[-1], epsilon=cfg.norm_epsilon, lean=lean))
    return hidden, statistics


def _watch(x: jax.Array) -> LayerStatistics:
    """Statistics of x [batch, frames, width], each [batch]; no gradient goes through them."""
    size = jnp.abs(lax.stop_gradient(x))
    finite = jnp.isfinite(size)
    return LayerStatistics(
        jnp.max(jnp.where(finite, size, 0.0), axis=(1, 2)).astype(jnp.float32),
        jnp.sum(~finite, axis=(1, 2), dtype=jnp.float32),
    )


def _rows(waveform: jax.Array, samples: jax.Array | None):
    """Batches of one row, for `lax.map`."""
    return waveform[:, None], None if samples is None else samples[:, None]


def _real_frames(samples: jax.Array, padded: int, frames: int, *, cfg: EncoderConfig) -> jax.Array:
    """How many frames of each row are real, [batch], where `samples` [batch] of `padded` are: `cfg.valid_frames`."""
    if cfg.valid_frames == "fairseq_bins":  # fairseq `models/hubert/hubert.py` forward_padding_mask
        bin_samples = padded // frames
        return jnp.minimum(-(-samples // bin_samples), frames)
    return jnp.maximum((samples - RECEPTIVE_FIELD) // HOP + 1, 0)  # `num_frames` of a traced array


def _run_layers(
    encoder, x, valid, key, row_keys, watch, formulation
) -> tuple[tuple[jax.Array, ...], LayerStatistics | None]:
    """The input and every layer's output, by scan or unrolled; and their statistics, taken where each is made.

    Taken from the returned outputs instead, they would keep all of them in memory until the step's end.
    """
    cfg = encoder.config
    position_bias = None
    if encoder.relative_bias is not None:
        buckets = relative_buckets(x.shape[1], buckets=cfg.bias_buckets, max_distance=cfg.bias_max_distance)
        table = encoder.relative_bias[...]
        # a copy for each part of the rows, so that each has a gradient of its own until it is folded into the table
        position_bias = jnp.broadcast_to(table[None], (formulation.row_shards, *table.shape))[:, buckets]
        position_bias = position_bias.transpose(0, 3, 1, 2)

    x = formulation.along_rows(x)

    def run(layer, x, position_bias, index):
        def apply(x, position_bias):
            keys = None if row_keys is None else jax.vmap(lambda k: jax.random.fold_in(k, index))(row_keys)
            return layer(
                x,
                cfg=cfg,
                valid=valid,
                position_bias=position_bias,
                keys=keys,
                formulation=formulation,
            )

        if key is None or cfg.layerdrop == 0.0:
            return apply(x, position_bias)
        # One draw a layer and step, for all rows: every device and micro-batch skips the same layers.
        keep = jax.random.bernoulli(jax.random.fold_in(jax.random.fold_in(key, 2**20), index), 1.0 - cfg.layerdrop)
        return lax.cond(keep, apply, lambda *unchanged: unchanged, x, position_bias)

    if cfg.rematerialize == "layers":
        run = jax.checkpoint(run)
    elif cfg.rematerialize == "dots":
        run = jax.checkpoint(run, policy=jax.checkpoint_policies.save_only_these_names(DENSE))
    stacked = not isinstance(encoder.layers, nnx.List)
    # XLA:CPU heeds no barrier: unrolled, it would find that what is to be made again was made before, and keep it
    remade = cfg.rematerialize != "nothing" and key is not None
    if (formulation.scan_layers or remade) and stacked:

        def body(x, layer_and_index):
            x = formulation.along_rows(run(layer_and_index[0], x, position_bias, layer_and_index[1])[0])
            return x, (x, _watch(x) if watch else None)

        _, (outputs, rest) = lax.scan(body, x, (encoder.layers, np.arange(cfg.layers)))
        hidden = (x, *(outputs[i] for i in range(cfg.layers)))
        if not watch:
            return hidden, None
        return hidden, jax.tree.map(lambda first, others: jnp.concatenate([first[None], others]), _watch(x), rest)
    hidden = [x]
    if stacked and formulation.lean_gradients:
        layers = unstack(encoder.layers)
    elif stacked:
        layers = [jax.tree.map(lambda p, i=index: p[i], encoder.layers) for index in range(cfg.layers)]
    else:
        layers = encoder.layers
    for index, layer in enumerate(layers):
        x, position_bias = run(layer, x, position_bias, index)
        hidden.append(formulation.along_rows(x))
    return tuple(hidden), jax.tree.map(lambda *each: jnp.stack(each), *map(_watch, hidden)) if watch else None
