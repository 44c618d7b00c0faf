"""Masked prediction: hide spans of a (mixed) waveform's frames, predict the clean utterance's units there.

HuBERT (2106.07447) with WavLM's denoising (2110.13900): the waveform carries interference, the units do not, so one
cross-entropy asks for content under the mask and for separation from the interference at once. BEST-RQ (2202.01855),
XEUS (2407.00837) and mHuBERT-147 (2406.06371) are this with other units or a linear head (`HeadConfig.scoring`).

Each set of units has a term of its own with its own denominator, and all terms have the same weight: the loss is the
sum over sets of the mean over that set's scored frames. Where every frame has a unit in every set that is fairseq's,
which adds up the sets' losses and divides by the first set's count (`hubert_criterion.py`).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from data_pipelines.batch import Batch
from wavlab_jax.encoder import Formulation
from wavlab_jax.encoder.encoder import LayerStatistics
from wavlab_jax.heads import HeadConfig
from wavlab_jax.losses import cosine_logits, cross_entropy, feature_penalty, linear_logits
from wavlab_jax.masking import MaskConfig
from wavlab_jax.metrics import Sums
from wavlab_jax.model import Model
from wavlab_jax.objectives.hiding import Judged, Keys, Measured, hear, occurrences, require, total

SHOWN = ("masked_loss", "masked_accuracy")
ADDITIVE = True
PADDED = False


@dataclass(frozen=True)
class PredictionConfig:
    """Weights of the terms (fairseq `hubert_criterion.py` and the HuBERT yamls).

    Attributes:
        mask: which frames are hidden.
        temperature: divides the similarities; 0.1 with linear scoring too (ESPnet's HuBERTLossCrossEntropy).
        masked_weight, unmasked_weight: of the cross-entropy at hidden and at visible frames.
        feature_penalty_weight: of the extractor's mean squared output.
    """

    mask: MaskConfig = MaskConfig()
    temperature: float = 0.1
    masked_weight: float = 1.0
    unmasked_weight: float = 0.0
    feature_penalty_weight: float = 10.0

    def __post_init__(self):
        require(self, lambda x: 0 < x < math.inf, "be positive", "temperature")
        weights = ("masked_weight", "unmasked_weight", "feature_penalty_weight")
        require(self, lambda x: 0 <= x < math.inf, "be at least 0", *weights)


def coefficients(cfg: PredictionConfig, head: HeadConfig) -> dict[str, float]:
    """Weight of each term of the loss, by its name among the `Sums`."""
    weights = {"feature_penalty": cfg.feature_penalty_weight}
    for end in _endings(len(head.unit_sets)):
        weights |= {f"masked_loss{end}": cfg.masked_weight, f"unmasked_loss{end}": cfg.unmasked_weight}
    return weights


def _endings(sets: int) -> list[str]:
    """Of the names of each set's terms: "" for the first, "_1", "_2", ... for further ones."""
    return ["", *(f"_{number}" for number in range(1, sets))]


def scored_frames(batch: Batch, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Frames whose prediction counts: (hidden, visible), both [rows, frames, sets] bool; real and labelled ones."""
    labelled = batch.valid[..., None] & (batch.units >= 0)
    return labelled & mask[..., None], labelled & ~mask[..., None]


def denominators(batch: Batch, mask: jax.Array, *, channels: int) -> dict[str, jax.Array]:
    """What each term of the loss is divided by: its number of scored frames, or of the extractor's outputs."""
    hidden, visible = (jnp.sum(frames, axis=(0, 1), dtype=jnp.float32) for frames in scored_frames(batch, mask))
    counts = {"feature_penalty": jnp.sum(batch.valid, dtype=jnp.float32) * channels}
    for number, end in enumerate(_endings(batch.units.shape[-1])):
        counts |= {f"masked_loss{end}": hidden[number], f"unmasked_loss{end}": visible[number]}
    return counts


class Prediction(NamedTuple):
    """What the model says of every frame.

    Attributes:
        logits: of each set, [rows, frames, units] float32.
        features: [rows, frames, channels], the extractor's.
        layers: of the encoder, [layers + 1, rows]; None where rows are padded.
    """

    logits: tuple[jax.Array, ...]
    features: jax.Array
    layers: LayerStatistics | None


def predict(
    model: Model,
    batch: Batch,
    mask: jax.Array,
    *,
    keys: Keys,
    cfg: PredictionConfig,
    head: HeadConfig,
    padded: bool,
    formulation: Formulation,
) -> Prediction:
    """What the model says of every frame, with `mask` [rows, frames] hidden: drawn, or injected."""
    encoded = hear(model.encoder, batch, mask, keys=keys, cfg=cfg.mask, padded=padded, formulation=formulation)
    logits = set_logits(model.head, encoded.hidden[-1], cfg=cfg, head=head)
    return Prediction(logits, encoded.features, encoded.statistics)


def set_logits(head_module, hidden: jax.Array, *, cfg: PredictionConfig, head: HeadConfig) -> tuple[jax.Array, ...]:
    """hidden [rows, frames, width] -> [rows, frames, units] of each set, by the shared projection or its own."""
    projected = head_module.projection(hidden)
    embeddings, logits, first = head_module.embeddings[...], [], 0
    for number, units in enumerate(head.unit_sets):
        own = projected[..., number * head.dim :][..., : head.dim] if head.split_projection else projected
        rows = slice(first, first + units)
        if head.scoring == "cosine":
            logits.append(cosine_logits(own, embeddings[rows], temperature=cfg.temperature))
        else:
            bias = head_module.bias[...][rows]
            logits.append(linear_logits(own, embeddings[rows], bias, temperature=cfg.temperature))
        first += units
    return tuple(logits)


def measure(
    model: Model,
    batch: Batch,
    mask: jax.Array,
    *,
    keys: Keys,
    step: jax.Array,
    cfg: PredictionConfig,
    head: HeadConfig,
    padded: bool,
    formulation: Formulation,
) -> Measured:
    """Every term of the loss and the accuracies over these rows; nothing depends on `step`."""
    predicted = predict(model, batch, mask, keys=keys, cfg=cfg, head=head, padded=padded, formulation=formulation)
    return measure_prediction(predicted, batch, mask)


def measure_prediction(predicted: Prediction, batch: Batch, mask: jax.Array) -> Measured:
    """As `measure`, of what was predicted. By language the first set's loss and accuracy at hidden frames."""
    hidden, visible = scored_frames(batch, mask)
    sums: Sums = {"feature_penalty": feature_penalty(predicted.features, batch.valid)}
    rows: Sums = {}
    counts: dict[str, jax.Array] = {}
    for number, (logits, end) in enumerate(zip(predicted.logits, _endings(len(predicted.logits)), strict=True)):
        units, asked = batch.units[..., number], hidden[..., number]
        for name, scored in (("masked", asked), ("unmasked", visible[..., number])):
            rows[f"{name}_loss{end}"], rows[f"{name}_accuracy{end}"] = cross_entropy(logits, units, scored)
        for name, labels in (("target", units), ("predicted", jnp.argmax(logits, axis=-1))):
            counts[f"{name}_perplexity{end}"] = occurrences(labels, asked, units=logits.shape[-1])
    sums |= {name: total(term) for name, term in rows.items()}
    by_language = {name: rows[name] for name in ("masked_loss", "masked_accuracy")}
    return Measured(sums, by_language, counts, predicted.layers)


def judge(
    model: Model,
    batch: Batch,
    mask: jax.Array,
    *,
    keys: Keys,
    cfg: PredictionConfig,
    head: HeadConfig,
    formulation: Formulation,
) -> Judged:
    """The prediction of the first set's units at every frame of padded rows."""
    logits = predict(model, batch, mask, keys=keys, cfg=cfg, head=head, padded=True, formulation=formulation).logits[0]
    units = jnp.where(batch.valid, batch.units[..., 0], -1)
    chosen = jnp.maximum(units, 0)[..., None]
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, axis=-1)[..., 0]
    return Judged(mask, units, jnp.argmax(logits, axis=-1).astype(jnp.int32), loss)
