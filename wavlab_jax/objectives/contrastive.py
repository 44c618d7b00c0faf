"""wav2vec 2.0 and XLS-R: tell a hidden frame's quantized target from those of other hidden frames of its utterance.

wav2vec 2.0 (2006.11477, equations 2 to 4) as fairseq trains it (`wav2vec2.py`, `wav2vec_criterion.py`). No units are
needed: the targets are learned beside the encoder, by a product quantizer of the extractor's normalised output, which
hears everything. loss = contrastive + diversity_weight * diversity + feature_penalty_weight * mean(features ** 2).

The diversity term and the perplexities are statistics of one pass (over all of its devices), weighted by its hidden
frames; with gradient accumulation they depend on the number of passes, as they do on fairseq's GPUs.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from data_pipelines.batch import Batch
from wavlab_jax.encoder import Formulation
from wavlab_jax.encoder.layers import dropout, fold
from wavlab_jax.heads import ContrastiveHead, ContrastiveHeadConfig
from wavlab_jax.losses import contrast, feature_penalty
from wavlab_jax.masking import MaskConfig
from wavlab_jax.metrics import Sum
from wavlab_jax.model import Model
from wavlab_jax.objectives.hiding import Judged, Keys, Measured, hear, require, total
from wavlab_jax.quantizer import choose, diversity, gumbel_noise, gumbel_temperature, perplexities, quantize

SHOWN = ("contrastive_loss", "contrastive_accuracy", "code_perplexity")
ADDITIVE = False  # diversity
PADDED = False

# Streams of a row's keys; the encoder and the masks have other ones.
_NEGATIVES, _GUMBEL, _FEATURE_DROPOUT = 10, 2000, 2001


@dataclass(frozen=True)
class ContrastiveConfig:
    """Weights and schedules; the defaults are wav2vec 2.0 Base (fairseq `wav2vec2_base_librispeech.yaml`).

    Attributes:
        mask: which frames are hidden.
        temperature: divides the cosine similarities (`logit_temp`).
        negatives: drawn for each hidden frame, with replacement, from the other hidden frames of its row.
        diversity_weight: of the unused share of the codes.
        feature_penalty_weight: of the extractor's mean squared output; 10 Base, 0 Large and XLS-R.
        feature_dropout: of the features that are quantized (`dropout_features`); 0.1 Base, 0 Large.
        gumbel_start, gumbel_floor, gumbel_decay: the Gumbel temperature after n updates is max(start * decay ** n,
            floor) (`latent_temp`); floor 0.5 Base, 0.1 Large and XLS-R.
    """

    mask: MaskConfig = MaskConfig(probability=0.65)
    temperature: float = 0.1
    negatives: int = 100
    diversity_weight: float = 0.1
    feature_penalty_weight: float = 10.0
    feature_dropout: float = 0.1
    gumbel_start: float = 2.0
    gumbel_floor: float = 0.5
    gumbel_decay: float = 0.999995

    def __post_init__(self):
        require(self, lambda x: 0 < x < math.inf, "be positive", "temperature", "gumbel_start", "gumbel_floor")
        require(self, lambda x: 0 <= x < math.inf, "be at least 0", "diversity_weight", "feature_penalty_weight")
        require(self, lambda x: x >= 1, "be at least 1", "negatives")
        require(self, lambda x: 0 < x <= 1, "lie in (0, 1]", "gumbel_decay")
        require(self, lambda x: 0 <= x < 1, "lie in [0, 1)", "feature_dropout")


def coefficients(cfg: ContrastiveConfig, head: ContrastiveHeadConfig) -> dict[str, float]:
    """Weight of each term of the loss, by its name among the `Sums`."""
    return {
        "contrastive_loss": 1.0,
        "diversity_loss": cfg.diversity_weight,
        "feature_penalty": cfg.feature_penalty_weight,
    }


def denominators(batch: Batch, mask: jax.Array, *, channels: int) -> dict[str, jax.Array]:
    """Hidden frames; of the penalty, the extractor's outputs."""
    hidden = jnp.sum(batch.valid & mask, dtype=jnp.float32)
    outputs = jnp.sum(batch.valid, dtype=jnp.float32) * channels
    return {"contrastive_loss": hidden, "diversity_loss": hidden, "feature_penalty": outputs}


def draw_negatives(keys: jax.Array, hidden: jax.Array, *, count: int) -> jax.Array:
    """int32 [rows, frames, count]: for each hidden frame, frames of its row that are hidden too and not itself.

    Uniform, with replacement (fairseq `sample_negatives` of the masked features). Row i depends on `keys[i]` and on
    `hidden[i]` alone. Where there is nothing to draw, at visible frames and in rows with a single hidden frame, the
    entry is the number of frames, which no frame has.
    """
    frames = hidden.shape[1]

    def one_row(key, hidden):
        others = jnp.sum(hidden, dtype=jnp.int32) - 1
        drawn = jax.random.randint(key, (frames, count), 0, jnp.maximum(others, 1))
        place = jnp.cumsum(hidden, dtype=jnp.int32) - 1  # of a hidden frame among the hidden ones
        drawn = drawn + (drawn >= place[:, None])
        hidden_first = jnp.argsort(~hidden, stable=True).astype(jnp.int32)
        chosen = hidden_first[jnp.minimum(drawn, frames - 1)]
        return jnp.where(hidden[:, None] & (others > 0), chosen, frames)

    return jax.vmap(one_row)(keys, hidden)


class Compared(NamedTuple):
    """What the head makes of a pass.

    Attributes:
        context, targets: [rows, frames, dim], projected.
        codes: int32 [rows, frames, groups] of the targets.
        logits: [rows, frames, groups, codes] float32 of the quantizer, without noise.
    """

    context: jax.Array
    targets: jax.Array
    codes: jax.Array
    logits: jax.Array


def compare(
    head: ContrastiveHead, hidden: jax.Array, features: jax.Array, *, noise: jax.Array | None, temperature
) -> Compared:
    """Both sides of the comparison, of every frame.

    Args:
        head: parameters.
        hidden: [rows, frames, width] the encoder's last output.
        features: [rows, frames, channels] the extractor's, after LayerNorm, nothing hidden.
        noise: [rows, frames, groups, codes] Gumbel variables; None takes the most probable codes.
        temperature: of the Gumbel softmax, whose gradient it scales.
    """
    codevectors = head.quantizer.codevectors[...]
    scores = head.quantizer.scores(features.astype(jnp.float32))  # float32: a code must not hang on bfloat16's rounding
    logits = scores.reshape(*scores.shape[:2], *codevectors.shape[:2])
    quantized = quantize(choose(logits, noise, temperature=temperature), codevectors)
    return Compared(head.context_projection(hidden), head.target_projection(quantized.vectors), quantized.codes, logits)


def measure(
    model: Model,
    batch: Batch,
    mask: jax.Array,
    *,
    keys: Keys,
    step: jax.Array,
    cfg: ContrastiveConfig,
    head: ContrastiveHeadConfig,
    padded: bool,
    formulation: Formulation,
    negatives: jax.Array | None = None,
    noise: jax.Array | None = None,
) -> Measured:
    """Every term of the loss, the share of positives that were picked, and how many codes are in use.

    `negatives` [rows, frames, count] and Gumbel `noise` [rows, frames, groups, codes] are drawn, or injected.
    """
    encoded = hear(model.encoder, batch, mask, keys=keys, cfg=cfg.mask, padded=padded, formulation=formulation)
    hidden, rows = batch.valid & mask, keys.rows_noise(batch)
    if negatives is None:
        negatives = draw_negatives(fold(keys.rows_asked(batch), _NEGATIVES), hidden, count=cfg.negatives)
    if noise is None and rows is not None:
        frames = mask.shape[1]
        noise = gumbel_noise(fold(rows, _GUMBEL), frames=frames, groups=head.groups, codes=head.codes)
    features = normalised_features(model, encoded.features)
    features = dropout(features, rate=cfg.feature_dropout, keys=fold(rows, _FEATURE_DROPOUT))
    tau = gumbel_temperature(step, start=cfg.gumbel_start, floor=cfg.gumbel_floor, decay=cfg.gumbel_decay)
    compared = compare(model.head, encoded.hidden[-1], features, noise=noise, temperature=tau)
    told_apart = contrast(compared.context, compared.targets, compared.codes, negatives, temperature=cfg.temperature)
    counts = jnp.sum(hidden, axis=1, dtype=jnp.float32)
    count = jnp.sum(counts)
    used = perplexities(compared.logits, hidden)
    by_row = {
        "contrastive_loss": Sum(jnp.sum(jnp.where(hidden, told_apart.loss, 0.0), axis=1), counts),
        "contrastive_accuracy": Sum(jnp.sum(hidden & told_apart.correct, axis=1, dtype=jnp.float32), counts),
    }
    sums = {
        **{name: total(term) for name, term in by_row.items()},
        "diversity_loss": diversity(used.prob, entries=head.groups * head.codes, frames=count),
        "feature_penalty": feature_penalty(encoded.features, batch.valid),
        "code_perplexity": Sum(used.code * count, count),
        "prob_perplexity": Sum(used.prob * count, count),
        "gumbel_temperature": Sum(tau * count, count),
    }
    return Measured(sums, by_row, {}, encoded.statistics)


def normalised_features(model: Model, features: jax.Array) -> jax.Array:
    """[rows, frames, channels]: what the quantizer hears: the extractor's output after LayerNorm, before projection."""
    encoder = model.encoder
    return encoder.frontend.norm.over_channels(features, epsilon=encoder.config.norm_epsilon)


def judge(
    model: Model,
    batch: Batch,
    mask: jax.Array,
    *,
    keys: Keys,
    cfg: ContrastiveConfig,
    head: ContrastiveHeadConfig,
    formulation: Formulation,
) -> Judged:
    """Whether the positive is picked: the right answer is 0 everywhere, the model's is 0 or 1. No noise.

    Negatives depend on the keys and the masks alone, so all models are asked the same; the targets are each model's
    own, so neither accuracies nor losses of two models say which encoder is the better one.
    """
    encoded = hear(model.encoder, batch, mask, keys=keys, cfg=cfg.mask, padded=True, formulation=formulation)
    negatives = draw_negatives(fold(keys.rows_asked(batch), _NEGATIVES), batch.valid & mask, count=cfg.negatives)
    features = normalised_features(model, encoded.features)
    compared = compare(model.head, encoded.hidden[-1], features, noise=None, temperature=1.0)
    told_apart = contrast(compared.context, compared.targets, compared.codes, negatives, temperature=cfg.temperature)
    answers = jnp.where(batch.valid, 0, -1)
    return Judged(mask, answers, (~told_apart.correct).astype(jnp.int32), told_apart.loss)
