"""Floating-point operations of a step by formula: what utilisation is measured against, and plans are made with.

A multiply-add counts as two. Matrix products and convolutions only; what is element by element is left out, as is
usual. For T_i outputs of convolution i (kernel k_i, channels C_i), T frames, width D, feed-forward F and L layers:

    extractor    sum of 2 T_i k_i C_{i-1} C_i              attention     L (2 T 4 D^2 + 4 T^2 D)
    projection   2 T C D                                   feed-forward  L 2 T 2 D F
    position     2 T kernel (D / groups) D                 gate (WavLM)  L 2 T D 8

Heads have theirs in `_head_flops` and `downstream_flops`.
"""

from typing import NamedTuple

from data_pipelines.batch import HOP, num_frames
from wavlab_jax.downstream import DownstreamConfig
from wavlab_jax.encoder.config import EncoderConfig
from wavlab_jax.heads import AnyHeadConfig, HeadConfig, LinearHeadConfig

TRAINING_OVER_FORWARD = 3  # the gradients of both factors of each product


class Flops(NamedTuple):
    """Operations of the forward pass over one row, by part; `first_convolution` is contained in `extractor`."""

    extractor: float
    first_convolution: float
    projection: float
    position: float
    attention: float
    feed_forward: float
    head: float

    @property
    def forward(self) -> float:
        """All parts together."""
        return sum(self) - self.first_convolution

    @property
    def training(self) -> float:
        """Forward and backward, without what rematerialisation repeats; nothing asks for the waveform's gradient."""
        return TRAINING_OVER_FORWARD * self.forward - self.first_convolution

    @property
    def frozen_training(self) -> float:
        """Forward, and backward through the head alone."""
        return self.forward + (TRAINING_OVER_FORWARD - 1) * self.head


def row_flops(
    encoder: EncoderConfig, head: AnyHeadConfig | None = None, *, samples: int, negatives: int = 100
) -> Flops:
    """Operations of one row of `samples` (16 kHz) through `encoder` and, if given, the `head`.

    `negatives` are those of a contrastive head (`ContrastiveConfig.negatives`).
    """
    frames, width = num_frames(samples), encoder.width
    extractor, first, inputs, length = 0.0, 0.0, 1, samples
    for channels, kernel, stride in zip(
        encoder.extractor_channels, encoder.extractor_kernels, encoder.extractor_strides, strict=True
    ):
        length = (length - kernel) // stride + 1
        extractor += 2.0 * length * kernel * inputs * channels
        first = first or extractor
        inputs = channels
    gate = 2.0 * frames * width * 8 if encoder.relative_bias else 0.0
    attention = 2.0 * frames * 4 * width**2 + 4.0 * frames**2 * width + gate
    return Flops(
        extractor=extractor,
        first_convolution=first,
        projection=2.0 * frames * inputs * width,
        position=2.0 * frames * encoder.position_kernel * (width // encoder.position_groups) * width,
        attention=encoder.layers * attention,
        feed_forward=encoder.layers * 2.0 * frames * 2 * width * encoder.feed_forward,
        head=0.0 if head is None else _head_flops(head, samples, width=width, channels=inputs, negatives=negatives),
    )


def downstream_flops(cfg: DownstreamConfig, frames: int, *, inputs: int) -> float:
    """Operations of the forward pass of ML-SUPERB's downstream model over one row of `frames` features of `inputs`.

    The weighted sum of hidden states is element by element. The convolutions halve time and channels, and take two
    more off both.
    """
    time, channels = max((frames - 1) // 2, 0), (cfg.channels - 1) // 2
    left, narrow = max(time - 2, 0), channels - 2
    projection = frames * inputs * cfg.projection
    convolutions = time * channels * 9 * cfg.width + left * narrow * 9 * cfg.width**2
    embed = left * cfg.width * narrow * cfg.width
    block = left * (4 * cfg.width**2 + 2 * cfg.width * cfg.feed_forward) + 2 * left**2 * cfg.width
    return 2.0 * (projection + convolutions + embed + cfg.layers * block + left * cfg.width * cfg.tokens)


def recomputed_flops(encoder: EncoderConfig, *, samples: int) -> float:
    """Operations that `encoder.rematerialize` makes the backward pass of one row do again, beyond `Flops.training`.

    "dots" keeps the outputs of dense products, so that the two products of attention are left; "layers" keeps a layer's
    input alone. Its last product is done again only where a norm reads what comes after it (not `pre_norm`).
    """
    frames, width = num_frames(samples), encoder.width
    mixing = 4.0 * frames**2 * width
    half = 2.0 * frames * width * encoder.feed_forward
    gate = 2.0 * frames * width * 8 if encoder.relative_bias else 0.0
    whole = 2.0 * frames * 4 * width**2 + mixing + gate + half * (1 if encoder.pre_norm else 2)
    return encoder.layers * {"nothing": 0.0, "dots": mixing, "layers": whole}[encoder.rematerialize]


def _head_flops(head: AnyHeadConfig, samples: int, *, width: int, channels: int, negatives: int) -> float:
    frames = num_frames(samples)
    if isinstance(head, DownstreamConfig):
        return downstream_flops(head, -(-samples // HOP), inputs=width)
    if isinstance(head, LinearHeadConfig):
        return 2.0 * frames * width * head.tokens
    if isinstance(head, HeadConfig):
        projections = len(head.unit_sets) if head.split_projection else 1
        return 2.0 * frames * head.dim * (width * projections + sum(head.unit_sets))
    codes = head.groups * head.codes
    quantizer = channels * codes + head.codes * head.codevector_dim + head.codevector_dim * head.dim
    return 2.0 * frames * (quantizer + width * head.dim + (negatives + 1) * head.dim)
