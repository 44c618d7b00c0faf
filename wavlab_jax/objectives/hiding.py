"""What all objectives share: frames are hidden, the encoder hears the rest, and terms are divided once."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from data_pipelines.batch import Batch
from wavlab_jax.encoder import Encoded, Encoder, Formulation, encode
from wavlab_jax.encoder.encoder import LayerStatistics
from wavlab_jax.masking import MaskConfig, channel_masks, span_masks
from wavlab_jax.metrics import Sum, Sums


class ObjectiveError(ValueError):
    """A weight, temperature or schedule of an objective that cannot be meant; names the field."""


def require(cfg: object, fits: Callable[[float], bool], said: str, *fields: str) -> None:
    """Raises ObjectiveError at the first of these `fields` of `cfg` that does not fit: it must be `said`."""
    for field in fields:
        if not fits(getattr(cfg, field)):
            raise ObjectiveError(f"{type(cfg).__name__}.{field} is {getattr(cfg, field)}; it must {said}")


class Keys(NamedTuple):
    """Streams of random numbers of one step; what a row draws depends on them and on the row's own seed alone.

    Attributes:
        asked: which frames are hidden, and against what they are told apart. In evaluation a function of the configured
            seed, so that all models are asked the same.
        noise: dropout, layerdrop, channel masks, Gumbel noise; None in evaluation: none of them.
    """

    asked: jax.Array
    noise: jax.Array | None

    def rows_asked(self, batch: Batch) -> jax.Array:
        """[rows] keys."""
        return row_keys(self.asked, batch)

    def rows_noise(self, batch: Batch) -> jax.Array | None:
        """[rows] keys, or None."""
        return None if self.noise is None else row_keys(self.noise, batch)


class Measured(NamedTuple):
    """What an objective measures of the rows of a pass, [rows, ...].

    Attributes:
        sums: scalars: every term of the loss, and what else is worth a line of metrics.
        rows: each [rows]: the terms that are told apart by language; they add up to those of the same names in `sums`.
        counts: each [units]: how often each unit is the answer, and how often it is given; of each a perplexity is
            reported under its name.
        layers: of the encoder, [layers + 1, rows]; None without one.
    """

    sums: Sums
    rows: Sums
    counts: dict[str, jax.Array]
    layers: LayerStatistics | None


def total(rows: Sum) -> Sum:
    """The scalars that a term's [rows] add up to."""
    return Sum(jnp.sum(rows.total), jnp.sum(rows.weight))


def occurrences(labels: jax.Array, counted: jax.Array, *, units: int) -> jax.Array:
    """[units] float32: how often each unit stands in `labels` [rows, frames] where `counted` [rows, frames]."""
    # compared and added up, not scattered: that is slow on a TPU, and would gather what is split over devices
    found = (labels[..., None] == jnp.arange(units)[None, None]) & counted[..., None]
    return jnp.sum(found, axis=(0, 1), dtype=jnp.float32)


class Judged(NamedTuple):
    """An evaluated batch, each [rows, frames].

    Attributes:
        mask: which frames were hidden.
        units: int32, the right answers, of the first set where there are several; `NO_UNIT` where there is none.
        predicted: int32, the model's answers.
        loss: nats, at every frame; meaningful where there is a right answer.
    """

    mask: jax.Array
    units: jax.Array
    predicted: jax.Array
    loss: jax.Array


def row_keys(key: jax.Array, batch: Batch) -> jax.Array:
    """[rows] keys, of `key` and each row's seed."""
    return jax.vmap(lambda seed: jax.random.fold_in(key, seed))(batch.seed)


def draw_masks(batch: Batch, key: jax.Array, cfg: MaskConfig) -> jax.Array:
    """[rows, frames] bool: the frames that this step hides; a row's mask depends on (key, the row's seed) alone."""
    return span_masks(row_keys(key, batch), frames=batch.valid.shape[1], cfg=cfg, valid=batch.valid)


def draw_channel_masks(batch: Batch, keys: Keys, cfg: MaskConfig, *, width: int) -> jax.Array | None:
    """[rows, width] bool: the channels that are zero in this step's rows; None if there are none, as in evaluation."""
    rows = keys.rows_noise(batch)
    return None if rows is None or not cfg.channel_probability else channel_masks(rows, width=width, cfg=cfg)


def hear(
    encoder: Encoder,
    batch: Batch,
    mask: jax.Array,
    *,
    keys: Keys,
    cfg: MaskConfig,
    padded: bool,
    formulation: Formulation,
) -> Encoded:
    """`encode` of the rows with `mask` [rows, frames] hidden, and channels as `cfg` says; watched where nothing is
    padded, as in training.

    `padded`: whether rows may end in padding, which the encoder then leaves out; training rows never do.
    """
    return encode(
        encoder,
        batch.waveform,
        jnp.arange(batch.waveform.shape[1])[None] < batch.samples[:, None] if padded else None,
        mask=mask,
        channel_mask=draw_channel_masks(batch, keys, cfg, width=encoder.config.width),
        key=keys.noise,
        seeds=None if keys.noise is None else batch.seed,
        watch=not padded,
        formulation=formulation,
    )


def loss_of(sums: Sums, denominators: Mapping[str, jax.Array], coefficients: Mapping[str, float]) -> jax.Array:
    """The scalar to minimise: each term's total over these rows, divided by the step's count, times its weight."""
    terms = (
        weight * sums[name].total / jnp.maximum(denominators[name], 1.0)
        for name, weight in coefficients.items()
        if weight
    )
    return sum(terms, jnp.zeros(()))
