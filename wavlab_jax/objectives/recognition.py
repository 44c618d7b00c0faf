"""Recognition: a row's tokens by CTC, from an encoder's hidden states or, without an encoder, from log-mel features.

The encoder is frozen or trained (`LearnerConfig.frozen_encoder`); nothing here depends on which. What reads its hidden
states is the head: ML-SUPERB's downstream model of all of them (`DownstreamConfig`), or a Linear layer of the last one
(`LinearHeadConfig`), as fine-tuned HuBERT has it. `Batch.units` [rows, frames, 1] holds a row's tokens from its first
frame on, `NO_UNIT` after them (`data_pipelines.mlsuperb.batches`); token 0 is the blank. Rows end in padding.

For the downstream model n samples make ceil(n / 320) frames, the last real one repeated, as s3prl hands them to ESPnet
(`s3prl/nn/upstream.py` S3PRLUpstream.forward); for log-mel floor(n / 320) + 1, ESPnet's.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from data_pipelines.batch import HOP, RECEPTIVE_FIELD, Batch, num_frames
from wavlab_jax.downstream import DownstreamConfig, ctc, logits_of, weighted_sum
from wavlab_jax.encoder import Formulation, encode
from wavlab_jax.encoder.encoder import Encoded
from wavlab_jax.encoder.layers import dropout, fold
from wavlab_jax.features import centred_log_mel
from wavlab_jax.heads import LinearHeadConfig
from wavlab_jax.masking import MaskConfig
from wavlab_jax.model import Model
from wavlab_jax.objectives.hiding import Keys, Measured, draw_channel_masks, total

SHOWN = ("ctc_loss", "infeasible")
ADDITIVE = False  # a row of the downstream model hears how long its batch's longest is, as in ESPnet
PADDED = True
NO_MASK = MaskConfig(probability=0.0, minimum_spans=0)
FINAL_DROPOUT = 2000  # of a row's key: the stream of the linear head's dropout


@dataclass(frozen=True)
class RecognitionConfig:
    """What is hidden and dropped while a recogniser is trained.

    Attributes:
        mask: frames and channels that the encoder does not hear while training; none in ML-SUPERB.
        encoder_noise: whether the encoder draws its dropout and layerdrop while training. Without, a frozen encoder on
            CPU is spelled faster. ESPnet leaves a frozen one in training mode (`espnet2/train/trainer.py`), with
            layerdrop 0 (`s3prl/upstream/hubert/expert.py`).
    """

    mask: MaskConfig = NO_MASK
    encoder_noise: bool = True


def coefficients(cfg: RecognitionConfig, head: DownstreamConfig | LinearHeadConfig) -> dict[str, float]:
    """One term."""
    return {"ctc_loss": 1.0}


def denominators(batch: Batch, mask: jax.Array, *, channels: int) -> dict[str, jax.Array]:
    """The mean is over rows, as ESPnet's and PyTorch's of a batch; fillers have no samples."""
    return {"ctc_loss": jnp.sum(batch.samples > 0, dtype=jnp.float32)}


class Spelled(NamedTuple):
    """Scores of tokens.

    Attributes:
        logits: [rows, time, tokens] float32.
        frames: [rows] int32, how many of them are real.
        encoded: what the encoder said; None without one.
    """

    logits: jax.Array
    frames: jax.Array
    encoded: Encoded | None


def spell(
    model: Model,
    batch: Batch,
    mask: jax.Array,
    *,
    keys: Keys,
    cfg: RecognitionConfig,
    head: DownstreamConfig | LinearHeadConfig,
    formulation: Formulation,
    alone: bool = False,
) -> Spelled:
    """Scores of tokens at every frame of the head. `alone`: each row as if it were the batch, which is how ESPnet
    decodes; padding and other rows then change nothing."""
    seeds = None if keys.noise is None else batch.seed
    if model.encoder is None:
        encoded, (features, frames) = None, centred_log_mel(batch.waveform, batch.samples, mels=head.channels)
    else:
        noise = keys.noise if cfg.encoder_noise else None
        encoded = encode(
            model.encoder,
            batch.waveform,
            jnp.arange(batch.waveform.shape[1])[None] < batch.samples[:, None],
            mask=mask if keys.noise is not None and cfg.mask != NO_MASK else None,
            channel_mask=draw_channel_masks(batch, keys, cfg.mask, width=model.encoder.config.width),
            key=noise,
            seeds=None if noise is None else seeds,
            watch=keys.noise is not None,
            formulation=formulation,
        )
        if isinstance(head, LinearHeadConfig):
            x = dropout(encoded.hidden[-1], rate=head.dropout, keys=fold(keys.rows_noise(batch), FINAL_DROPOUT))
            real = jnp.sum(encoded.valid, axis=1, dtype=jnp.int32)
            return Spelled(model.head.output(x).astype(jnp.float32), real, encoded)
        features = weighted_sum(encoded.hidden, model.head.layer_weights[...])
        features, frames = to_s3prl_length(features, batch.samples, longest=batch.waveform.shape[1])
    by_tap = formulation.convolution_by_tap
    if alone:

        def row(one, count):
            logits, left = logits_of(model.head, one[None], count[None], cfg=head, convolution_by_tap=by_tap)
            return logits[0], left[0]

        return Spelled(*jax.vmap(row)(features, frames), encoded)
    said = {"cfg": head, "key": keys.noise, "seeds": seeds, "convolution_by_tap": by_tap}
    return Spelled(*logits_of(model.head, features, frames, **said), encoded)


def to_s3prl_length(features: jax.Array, samples: jax.Array, *, longest: int) -> tuple[jax.Array, jax.Array]:
    """features [rows, num_frames(longest), width] -> ([rows, ceil(longest / 320), width], ceil(samples / 320) [rows]).

    After its last real frame a row repeats it. s3prl repeats the last frame of the batch, so that it does this to rows
    that are as long as the batch alone, and hands on what the encoder made of padding at the end of the others.
    """
    real = jnp.maximum((samples - RECEPTIVE_FIELD) // HOP + 1, 0)  # `num_frames` of a traced array
    place = jnp.minimum(jnp.arange(-(-longest // HOP))[None], jnp.maximum(real - 1, 0)[:, None])
    frames = jnp.where(real > 0, -(-samples // HOP), 0).astype(jnp.int32)
    return jnp.take_along_axis(features, place[..., None], axis=1), frames


def measure(
    model: Model,
    batch: Batch,
    mask: jax.Array,
    *,
    keys: Keys,
    step: jax.Array,
    cfg: RecognitionConfig,
    head: DownstreamConfig | LinearHeadConfig,
    padded: bool,
    formulation: Formulation,
) -> Measured:
    """The CTC loss of these rows, in all and by language, and how many of them do not fit into their frames.

    Nothing depends on `step`; rows are padded.
    """
    spelled = spell(model, batch, mask, keys=keys, cfg=cfg, head=head, formulation=formulation)
    rows = ctc(spelled.logits, spelled.frames, *labels_of(batch, most=spelled.logits.shape[1]))
    sums = {name: total(term) for name, term in rows.items()}
    return Measured(sums, rows, {}, None if spelled.encoded is None else spelled.encoded.statistics)


def labels_of(batch: Batch, *, most: int) -> tuple[jax.Array, jax.Array]:
    """(tokens [rows, most], 0 after the last; how many there are [rows]); more than `most` frames cannot spell."""
    lengths = jnp.sum(batch.units[..., 0] >= 0, axis=1, dtype=jnp.int32)
    return jnp.maximum(batch.units[:, :most, 0], 0), lengths


class Recognised(NamedTuple):
    """An evaluated batch; `wavlab_jax.downstream.greedy` reads its text.

    Attributes:
        best: int32 [rows, time], the best token of each frame.
        frames: int32 [rows], how many of them are real.
    """

    best: jax.Array
    frames: jax.Array


def judge(
    model: Model,
    batch: Batch,
    mask: jax.Array,
    *,
    keys: Keys,
    cfg: RecognitionConfig,
    head: DownstreamConfig | LinearHeadConfig,
    formulation: Formulation,
) -> Recognised:
    """The best token of each frame, every row as if it were alone; nothing is hidden."""
    quiet = RecognitionConfig()
    spelled = spell(model, batch, mask, keys=keys, cfg=quiet, head=head, formulation=formulation, alone=True)
    return Recognised(jnp.argmax(spelled.logits, axis=-1).astype(jnp.int32), spelled.frames)


def frames_for(samples: int, *, log_mel: bool) -> int:
    """Frames that the downstream model's convolutions leave an utterance of so many samples, alone."""
    heard = samples // HOP + 1 if log_mel else -(-samples // HOP) if num_frames(samples) else 0
    return max((heard - 1) // 2 - 2, 0)
