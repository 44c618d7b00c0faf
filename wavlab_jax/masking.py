"""Which frames are hidden from the encoder: fairseq's span masks, drawn row by row on the device."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


class MaskError(ValueError):
    """A mask configuration that cannot be drawn."""


@dataclass(frozen=True)
class MaskConfig:
    """Span masks of HuBERT, WavLM and wav2vec 2.0 (fairseq `data_utils.py` compute_mask_indices).

    Attributes:
        probability: expected share of frames that spans would cover if they did not overlap; probability / length of
            all frames start a span (0.8 / 10 = 8 %), and about 57 % of the frames end up hidden.
        length: frames of a span.
        minimum_spans: at least so many in every row.
    """

    probability: float = 0.8
    length: int = 10
    minimum_spans: int = 2

    def __post_init__(self):
        if not 0.0 <= self.probability <= 1.0 or self.length < 1 or self.minimum_spans < 0:
            raise MaskError(f"mask probability must lie in [0, 1], length be at least 1: got {self}")


def span_masks(keys: jax.Array, *, frames: int, cfg: MaskConfig, valid: jax.Array | None = None) -> jax.Array:
    """[batch, frames] bool, True = hidden; row i depends on `keys[i]` (and on how many of its frames are real) alone.

    A row of n real frames gets int(probability * n / length + U[0, 1)) spans, at least `minimum_spans`; starts are
    drawn without replacement from [0, n - length); spans may overlap. (fairseq then cuts every row to the smallest
    count in the batch, which fragments the spans and ties rows to each other; that is not done here.)

    Args:
        keys: [batch] keys, one a row.
        frames: of every row.
        cfg: probabilities.
        valid: [batch, frames] real frames, leading ones; None if all are real.
    """
    real = jnp.full(keys.shape, frames) if valid is None else jnp.sum(valid, axis=1)

    def one_row(key, n):
        count_key, start_key = jax.random.split(key)
        spans = jnp.floor(cfg.probability * n / cfg.length + jax.random.uniform(count_key)).astype(jnp.int32)
        spans = jnp.maximum(spans, cfg.minimum_spans)
        # a row too short for that many distinct starts offers one place more than it has spans (fairseq's rule)
        places = jnp.where(n - cfg.length > spans, n - cfg.length, spans + 1)
        position = jnp.arange(frames)
        order = jnp.where(position < jnp.minimum(places, n), jax.random.uniform(start_key, (frames,)), 2.0)
        rank = jnp.argsort(jnp.argsort(order))
        starts = ((rank < spans) & (order < 2.0)).astype(jnp.int32)
        covered = jnp.cumsum(starts)
        before = jnp.concatenate([jnp.zeros((cfg.length,), jnp.int32), covered])[:frames]
        return (covered > before) & (position < n)

    return jax.vmap(one_row)(keys, real)
