"""The science on one screen: hide spans of a (mixed) waveform's frames, predict the clean utterance's units there.

HuBERT (2106.07447) with WavLM's denoising (2110.13900): the waveform carries interference, the units do not, so one
cross-entropy asks for content under the mask and for separation from the interference at once.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from data_pipelines.batch import Batch
from wavlab_jax.encoder import Formulation, encode
from wavlab_jax.losses import cosine_logits, cross_entropy, feature_penalty
from wavlab_jax.masking import MaskConfig, channel_masks, span_masks
from wavlab_jax.metrics import Sums
from wavlab_jax.model import Model


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the terms (fairseq `hubert_criterion.py` and the HuBERT yamls).

    Attributes:
        mask: which frames are hidden.
        temperature: divides the cosine similarities.
        masked_weight, unmasked_weight: of the cross-entropy at hidden and at visible frames.
        feature_penalty_weight: of the extractor's mean squared output.
    """

    mask: MaskConfig = MaskConfig()
    temperature: float = 0.1
    masked_weight: float = 1.0
    unmasked_weight: float = 0.0
    feature_penalty_weight: float = 10.0

    def coefficients(self) -> dict[str, float]:
        """Weight of each term of the loss, by its name among the `Sums`."""
        return {
            "masked_loss": self.masked_weight,
            "unmasked_loss": self.unmasked_weight,
            "feature_penalty": self.feature_penalty_weight,
        }


def draw_masks(batch: Batch, key: jax.Array, cfg: ObjectiveConfig) -> jax.Array:
    """[rows, frames] bool: the frames that this step hides; a row's mask depends on (key, the row's seed) alone."""
    keys = jax.vmap(lambda seed: jax.random.fold_in(key, seed))(batch.seed)
    return span_masks(keys, frames=batch.valid.shape[1], cfg=cfg.mask, valid=batch.valid)


def draw_channel_masks(batch: Batch, key: jax.Array, cfg: ObjectiveConfig, *, width: int) -> jax.Array:
    """[rows, width] bool: the channels that are zero in this step's rows; in training only, as dropout is."""
    keys = jax.vmap(lambda seed: jax.random.fold_in(key, seed))(batch.seed)
    return channel_masks(keys, width=width, cfg=cfg.mask)


def scored_frames(batch: Batch, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Frames whose prediction counts: (hidden, visible), both [rows, frames] bool, real and labelled ones only."""
    labelled = batch.valid & (batch.units[..., 0] >= 0)
    return labelled & mask, labelled & ~mask


def denominators(batch: Batch, mask: jax.Array, *, channels: int) -> dict[str, jax.Array]:
    """What each term of the loss is divided by: counts over the whole step, known before any forward pass.

    They do not depend on parameters, so gradients of micro-batches simply add up: the sum is the large batch's.
    """
    hidden, visible = scored_frames(batch, mask)
    return {
        "masked_loss": jnp.sum(hidden, dtype=jnp.float32),
        "unmasked_loss": jnp.sum(visible, dtype=jnp.float32),
        "feature_penalty": jnp.sum(batch.valid, dtype=jnp.float32) * channels,
    }


class Prediction(NamedTuple):
    """`logits` [rows, frames, units] float32 and the extractor's `features` [rows, frames, channels]."""

    logits: jax.Array
    features: jax.Array


def predict(
    model: Model,
    batch: Batch,
    mask: jax.Array,
    *,
    key: jax.Array | None,
    cfg: ObjectiveConfig,
    padded: bool,
    formulation: Formulation,
) -> Prediction:
    """What the model says of every frame, [rows, frames, units], with `mask` [rows, frames] hidden.

    Args:
        model: parameters and structure.
        batch: rows.
        mask: bool, from `draw_masks`, or injected.
        key: for dropout and channel masks; None in evaluation.
        cfg: the temperature, and how many channels are masked.
        padded: whether rows may end in padding, which the encoder then leaves out; training rows never do.
        formulation: see `encode`.
    """
    valid = None
    if padded:
        valid = jnp.arange(batch.waveform.shape[1])[None] < batch.samples[:, None]
    seeds, channel_mask = None if key is None else batch.seed, None
    if key is not None and cfg.mask.channel_probability:
        channel_mask = draw_channel_masks(batch, key, cfg, width=model.encoder.config.width)
    encoded = encode(
        model.encoder,
        batch.waveform,
        valid,
        mask=mask,
        channel_mask=channel_mask,
        key=key,
        seeds=seeds,
        formulation=formulation,
    )
    projected = model.head.projection(encoded.hidden[-1])
    logits = cosine_logits(projected, model.head.embeddings[...], temperature=cfg.temperature)
    return Prediction(logits, encoded.features)


def sums_of(predicted: Prediction, batch: Batch, mask: jax.Array) -> Sums:
    """Every term of the loss and the accuracies over these rows."""
    hidden, visible = scored_frames(batch, mask)
    units = batch.units[..., 0]
    masked_loss, masked_accuracy = cross_entropy(predicted.logits, units, hidden)
    unmasked_loss, unmasked_accuracy = cross_entropy(predicted.logits, units, visible)
    return {
        "masked_loss": masked_loss,
        "masked_accuracy": masked_accuracy,
        "unmasked_loss": unmasked_loss,
        "unmasked_accuracy": unmasked_accuracy,
        "feature_penalty": feature_penalty(predicted.features, batch.valid),
    }


def loss_of(sums: Sums, denominator: dict[str, jax.Array], cfg: ObjectiveConfig) -> jax.Array:
    """The scalar to minimise: each term's total over these rows, divided by the step's count, times its weight."""
    return sum(
        weight * sums[name].total / jnp.maximum(denominator[name], 1.0)
        for name, weight in cfg.coefficients().items()
        if weight
    )
