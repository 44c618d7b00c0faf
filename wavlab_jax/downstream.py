"""ML-SUPERB's downstream model: what a frozen encoder's layers are worth to a small CTC recogniser (2305.10615, 2.3).

    hidden states ─ weighted sum ▶ SpecAugment ▶ less the utterance's mean ▶ Linear(width -> 80)
        ▶ two 3x3 convolutions (256 channels, strides 2 and 1) ▶ 2 pre-norm Transformer layers ▶ Linear, CTC

Constants and order are those of ESPnet `egs2/ml_superb/asr1/conf/tuning/train_asr_s3prl_10min.yaml` and of the
classes that it names (`espnet2/asr/espnet_model.py` encode, `espnet2/asr/encoder/transformer_encoder.py`); the
weighted sum is s3prl's `nn/upstream.py` Featurizer. What follows from ESPnet's padding is kept: a row's mean is taken
off its padding as well, and the last frames of a row that is shorter than its batch's longest hear that in the
convolutions.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from wavlab_jax.encoder.layers import Dense, Norm, dropout, fold, torch_uniform
from wavlab_jax.metrics import Sum

NORM_EPSILON = 1e-12  # ESPnet's LayerNorm
CUBIC = -0.75  # PyTorch's coefficient of cubic convolution


class DownstreamError(ValueError):
    """A downstream model that cannot be built; names the field."""


@dataclass(frozen=True)
class SpecAugmentConfig:
    """Masks and warps of the features while training (ESPnet `espnet2/asr/specaug/specaug.py`).

    Attributes:
        warp_frames: how far a moment of the utterance is moved, at most; 0 for not at all.
        channel_masks, channel_mask_width: how many, and below which width.
        time_masks, time_mask_share: how many, and below which share of the batch's longest row.
    """

    warp_frames: int = 5
    channel_masks: int = 2
    channel_mask_width: int = 27
    time_masks: int = 10
    time_mask_share: float = 0.05


@dataclass(frozen=True)
class DownstreamConfig:
    """Attributes:
    tokens: outputs, the blank (0), <unk> and <sos/eos> included.
    projection: channels after the weighted sum; 0 where the features have that many already (log-mel).
    channels: of the features that the convolutions read.
    width, layers, heads, feed_forward: of the Transformer.
    dropout: everywhere in it.
    """

    tokens: int
    projection: int = 80
    channels: int = 80
    width: int = 256
    layers: int = 2
    heads: int = 8
    feed_forward: int = 1024
    dropout: float = 0.1
    augment: SpecAugmentConfig = SpecAugmentConfig()

    def __post_init__(self):
        if isinstance(self.augment, dict):  # as a model's description has it
            object.__setattr__(self, "augment", SpecAugmentConfig(**self.augment))
        if self.tokens < 3:
            raise DownstreamError(f"tokens is {self.tokens}; there are a blank, <unk> and <sos/eos> at least")
        if self.width % self.heads:
            raise DownstreamError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.projection not in (0, self.channels):
            raise DownstreamError(f"projection is {self.projection}; it is 0, or the {self.channels} channels")

    @property
    def unit_sets(self) -> tuple[int, ...]:
        """Of frame by frame labels that it is told: none."""
        return ()


class Block(nnx.Module):
    """A pre-norm Transformer layer with ReLU."""

    def __init__(self, key: jax.Array, cfg: DownstreamConfig):
        keys = jax.random.split(key, 6)
        self.query, self.key, self.value, self.output = (Dense(k, cfg.width, cfg.width, bert=False) for k in keys[:4])
        self.expand = Dense(keys[4], cfg.width, cfg.feed_forward, bert=False)
        self.contract = Dense(keys[5], cfg.feed_forward, cfg.width, bert=False)
        self.attention_norm, self.feed_forward_norm = Norm(cfg.width), Norm(cfg.width)

    def __call__(self, x: jax.Array, *, cfg: DownstreamConfig, valid: jax.Array, keys) -> jax.Array:
        """[batch, frames, width] -> same shape; `valid` [batch, frames] masks what is attended to."""
        y = self.attention_norm.over_channels(x, epsilon=NORM_EPSILON)
        x = x + dropout(self._attend(y, cfg=cfg, valid=valid, keys=keys), rate=cfg.dropout, keys=fold(keys, 1))
        y = self.feed_forward_norm.over_channels(x, epsilon=NORM_EPSILON)
        y = dropout(jax.nn.relu(self.expand(y)), rate=cfg.dropout, keys=fold(keys, 2))
        return x + dropout(self.contract(y), rate=cfg.dropout, keys=fold(keys, 3))

    def _attend(self, x, *, cfg: DownstreamConfig, valid, keys):
        def split(y):
            return y.reshape(*y.shape[:2], cfg.heads, -1)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        logits = jnp.where(valid[:, None, None], logits / math.sqrt(query.shape[-1]), jnp.finfo(jnp.float32).min)
        weights = dropout(jax.nn.softmax(logits).astype(x.dtype), rate=cfg.dropout, keys=fold(keys, 0))
        return self.output(jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape))


class Convolution2d(nnx.Module):
    """3 x 3 over time and channels, no padding; kernel [3, 3, inputs, outputs], PyTorch's initial values."""

    def __init__(self, key: jax.Array, inputs: int, outputs: int):
        kernel_key, bias_key = jax.random.split(key)
        self.kernel = nnx.Param(torch_uniform(kernel_key, (3, 3, inputs, outputs), fan_in=9 * inputs))
        self.bias = nnx.Param(torch_uniform(bias_key, (outputs,), fan_in=9 * inputs))

    def __call__(self, x: jax.Array, *, stride: int, by_tap: bool) -> jax.Array:
        """[batch, time, channels, inputs] -> [batch, time', channels', outputs]."""
        kernel = self.kernel[...].astype(x.dtype)
        if by_tap and stride == 1 and min(x.shape[1:3]) > 2:
            y = convolve_by_tap(x, kernel)
        else:
            layout = ("NHWC", "HWIO", "NHWC")
            y = lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=layout)
        return jax.nn.relu(y + self.bias[...].astype(x.dtype)[None, None, None])


@jax.custom_vjp
def convolve_by_tap(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [batch, time, channels, inputs] by kernel [3, 3, inputs, outputs], no padding: a matrix product a tap.

    XLA:CPU convolves as fast forward, and three times slower backward. The gradients are products as well: that of x is
    this again, the kernel's takes three taps at once.
    """
    time, channels = x.shape[1] - 2, x.shape[2] - 2
    taps = ((i, j) for i in range(3) for j in range(3))
    return sum(jnp.einsum("btci,io->btco", x[:, i : i + time, j : j + channels], kernel[i, j]) for i, j in taps)


def _convolve_by_tap_gradient(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    time, channels = gradient.shape[1:3]
    beside = jnp.concatenate([x[:, :, j : j + channels] for j in range(3)], axis=-1)
    flat = gradient.reshape(-1, gradient.shape[-1])
    rows = [beside[:, i : i + time].reshape(-1, beside.shape[-1]).T @ flat for i in range(3)]
    wide = jnp.pad(gradient, ((0, 0), (2, 2), (2, 2), (0, 0)))
    of_x = convolve_by_tap(wide, kernel[::-1, ::-1].transpose(0, 1, 3, 2))
    return of_x, jnp.stack(rows).reshape(kernel.shape)


convolve_by_tap.defvjp(lambda x, kernel: (convolve_by_tap(x, kernel), (x, kernel)), _convolve_by_tap_gradient)


class Downstream(nnx.Module):
    """The parameters; `logits_of` runs it. `hidden` counts the encoder's hidden states, `inputs` their width."""

    def __init__(self, key: jax.Array, cfg: DownstreamConfig, *, hidden: int, inputs: int):
        if not cfg.projection and inputs != cfg.channels:
            raise DownstreamError(f"features of {inputs} channels need a projection to {cfg.channels}")
        keys = jax.random.split(key, 6)
        self.layer_weights = nnx.Param(jnp.zeros((hidden,)))
        self.projection = Dense(keys[0], inputs, cfg.projection, bert=False) if cfg.projection else None
        self.convolutions = nnx.List(
            [Convolution2d(keys[1], 1, cfg.width), Convolution2d(keys[2], cfg.width, cfg.width)]
        )
        self.embed = Dense(keys[3], cfg.width * ((cfg.channels - 1) // 2 - 2), cfg.width, bert=False)
        self.blocks = jax.vmap(lambda k: Block(k, cfg))(jax.random.split(keys[4], cfg.layers))
        self.norm = Norm(cfg.width)
        self.output = Dense(keys[5], cfg.width, cfg.tokens, bert=False)


def weighted_sum(hidden: tuple[jax.Array, ...], weights: jax.Array) -> jax.Array:
    """Hidden states, each [batch, frames, width] -> their sum weighted by the softmax of `weights` [layers + 1]."""
    shares = jax.nn.softmax(weights)
    return sum(share * states.astype(jnp.float32) for share, states in zip(shares, hidden, strict=True))


def logits_of(
    model: Downstream,
    features: jax.Array,
    frames: jax.Array,
    *,
    cfg: DownstreamConfig,
    key: jax.Array | None = None,
    seeds: jax.Array | None = None,
    by_tap: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Weighted features [batch, time, channels], of which `frames` [batch] are real -> (logits, their real frames).

    Logits are [batch, time', tokens] float32; of n real frames about n / 2 are left. With `key` (of the step) and
    `seeds` [batch] (one a row), as in training, features are augmented and dropout is drawn. `by_tap` as
    `Formulation.convolution_by_tap`.
    """
    row_keys = None if key is None else jax.vmap(lambda seed: jax.random.fold_in(key, seed))(seeds)
    longest = jnp.max(frames)
    real = jnp.arange(features.shape[1])[None] < frames[:, None]
    x = jnp.where(real[..., None], features.astype(jnp.float32), 0.0)
    if row_keys is not None:
        x = augment(x, frames, longest, keys=row_keys, cfg=cfg.augment)
        x = jnp.where(real[..., None], x, 0.0)
    x = x - jnp.sum(x, axis=1, keepdims=True) / jnp.maximum(frames, 1)[:, None, None]
    if model.projection is not None:
        x = model.projection(x)
    x = x[..., None]
    for convolution, stride in zip(model.convolutions, (2, 1), strict=True):
        x = convolution(x, stride=stride, by_tap=by_tap)
    batch, time = x.shape[:2]
    x = model.embed(x.transpose(0, 1, 3, 2).reshape(batch, time, -1))  # channels first, as PyTorch's view has them
    x = x * math.sqrt(cfg.width) + positions(time, cfg.width)[None]
    x = dropout(x, rate=cfg.dropout, keys=fold(row_keys, 100))
    left = jnp.minimum((frames + 1) // 2, convolved(longest))
    valid = jnp.arange(time)[None] < left[:, None]
    for index in range(cfg.layers):
        block = jax.tree.map(lambda p, i=index: p[i], model.blocks)
        x = block(x, cfg=cfg, valid=valid, keys=fold(row_keys, index))
    return model.output(model.norm.over_channels(x, epsilon=NORM_EPSILON)).astype(jnp.float32), left


def convolved(frames):
    """Frames that the two convolutions leave of `frames`, without padding: (frames - 1) // 2 - 2."""
    return jnp.maximum((frames - 1) // 2 - 2, 0)


def positions(frames: int, width: int) -> np.ndarray:
    """[frames, width] float32: sines and cosines by turns (ESPnet `transformer/embedding.py` PositionalEncoding)."""
    angles = np.arange(frames)[:, None] * np.exp(np.arange(0, width, 2) * -(math.log(10_000.0) / width))
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(frames, width).astype(np.float32)


def ctc(logits: jax.Array, frames: jax.Array, labels: jax.Array, lengths: jax.Array) -> dict[str, Sum]:
    """CTC's loss of each row, and which rows cannot be spelled in their frames: "ctc_loss", "infeasible", each [batch].

    Args:
        logits: [batch, time, tokens]; frames: [batch] real ones.
        labels: [batch, most] int, 0 where there is none; lengths: [batch].

    The loss is a row's negative log-likelihood; its mean is over rows, as ESPnet's. A row whose labels do not fit (they
    need a frame each, and one between two that are the same) has no alignment and weighs nothing but in the count, as
    PyTorch's `zero_infinity`. Rows without frames and labels are fillers, and weigh nothing.
    """
    time, most = jnp.arange(logits.shape[1])[None], jnp.arange(labels.shape[1])[None]
    padded_labels = most >= lengths[:, None]
    repeats = jnp.sum((labels[:, 1:] == labels[:, :-1]) & ~padded_labels[:, 1:], axis=1)
    filler = (frames == 0) & (lengths == 0)
    fits = (lengths + repeats <= frames) & ~filler
    losses = optax.ctc_loss(
        logits, (time >= frames[:, None]).astype(jnp.float32), labels, padded_labels.astype(jnp.float32)
    )
    real = (~filler).astype(jnp.float32)
    return {
        "ctc_loss": Sum(jnp.where(fits, losses, 0.0), real),
        "infeasible": Sum((~fits & ~filler).astype(jnp.float32), real),
    }


def greedy(best: np.ndarray, frames: np.ndarray) -> list[list[int]]:
    """Of `best` [batch, time], the best token of each frame, what is read: real frames (`frames` [batch]) alone,
    repeats and then blanks (0) taken out: [batch] lists."""
    rows = []
    for row, count in zip(np.asarray(best), np.asarray(frames), strict=True):
        row = row[:count]
        changed = np.flatnonzero(np.diff(row, prepend=-1))
        rows.append([int(token) for token in row[changed] if token])
    return rows


def augment(
    x: jax.Array, frames: jax.Array, longest: jax.Array, *, keys: jax.Array, cfg: SpecAugmentConfig
) -> jax.Array:
    """SpecAugment of features [batch, time, channels], each row by its own key: warp, channel masks, time masks."""

    def one(row, count, key):
        warp_key, channel_key, time_key = jax.random.split(jax.random.fold_in(key, 3000), 3)
        if cfg.warp_frames:
            row = warp(row, count, key=warp_key, window=cfg.warp_frames)
        width = jnp.asarray(cfg.channel_mask_width)
        hidden = spans(channel_key, row.shape[1], jnp.asarray(row.shape[1]), width, cfg.channel_masks)
        row = jnp.where(hidden[None], 0.0, row)
        widest = jnp.floor(longest * cfg.time_mask_share).astype(jnp.int32)
        hidden = spans(time_key, row.shape[0], longest, widest, cfg.time_masks)
        return jnp.where(hidden[:, None], 0.0, row)

    return jax.vmap(one)(x, frames, keys)


def spans(key: jax.Array, size: int, length: jax.Array, below: jax.Array, count: int) -> jax.Array:
    """[size] bool: `count` spans below a width, anywhere in the first `length` (`layers/mask_along_axis.py`).

    Widths are uniform over 0 .. below - 1, starts over 0 .. length - the row's widest - 1; ESPnet takes the widest of
    the whole batch there, which would make a row depend on its neighbours.
    """
    width_key, start_key = jax.random.split(key)
    widths = jax.random.randint(width_key, (count,), 0, jnp.maximum(below, 1))
    starts = jax.random.randint(start_key, (count,), 0, jnp.maximum(length - jnp.max(widths), 1))
    place = jnp.arange(size)[None]
    return jnp.any((place >= starts[:, None]) & (place < (starts + widths)[:, None]), axis=0)


def warp(x: jax.Array, frames: jax.Array, *, key: jax.Array, window: int) -> jax.Array:
    """Features [time, channels] with a random one of their `frames` frames moved by up to `window`.

    What lies before and after it is stretched by cubic convolution (`layers/time_warp.py`). In no more than two
    windows, nothing is moved.
    """
    center_key, moved_key = jax.random.split(key)
    center = jax.random.randint(center_key, (), window, jnp.maximum(frames - window, window + 1))
    moved = jax.random.randint(moved_key, (), center - window, center + window) + 1
    return jnp.where(frames - window <= window, x, warped_at(x, frames, center=center, moved=moved))


def warped_at(x: jax.Array, frames: jax.Array, *, center: jax.Array, moved: jax.Array) -> jax.Array:
    """Frames 0 .. center - 1 of x [time, channels] stretched to 0 .. moved - 1, the rest of `frames` to the rest."""
    place = jnp.arange(x.shape[0])
    left = place < moved
    first = jnp.where(left, 0, center)
    last = jnp.where(left, center, frames) - 1
    scale = jnp.where(left, center / moved, (frames - center) / jnp.maximum(frames - moved, 1))
    at = (place - jnp.where(left, 0, moved) + 0.5) * scale - 0.5 + first
    whole = jnp.floor(at).astype(jnp.int32)
    part = (at - whole)[:, None]
    total = jnp.zeros_like(x)
    for tap in (-1, 0, 1, 2):
        source = jnp.clip(whole + tap, first, last)
        total += _cubic(jnp.abs(part - tap)) * x[jnp.clip(source, 0, x.shape[0] - 1)]
    return jnp.where((place < frames)[:, None], total, x)


def _cubic(distance: jax.Array) -> jax.Array:
    """Cubic convolution's kernel (Keys 1981) at a distance of 0 to 2."""
    near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
    far = ((CUBIC * distance - 5 * CUBIC) * distance + 8 * CUBIC) * distance - 4 * CUBIC
    return jnp.where(distance <= 1, near, far)
