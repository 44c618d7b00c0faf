"""Which frames and channels are hidden from the encoder: fairseq's span masks, drawn row by row on the device."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

_KEPT, _CHANNELS, _KEPT_CHANNELS = 2, 3, 4  # streams of a row's key; span masks draw from its two halves


class MaskError(ValueError):
    """A mask configuration that cannot be drawn."""


@dataclass(frozen=True)
class MaskConfig:
    """Span masks of HuBERT, WavLM and wav2vec 2.0 (fairseq `data_utils.py` compute_mask_indices, static lengths).

    Attributes:
        probability: expected share of frames that spans would cover if they did not overlap; probability / length of
            all frames start a span (0.8 / 10 = 8 %), and about 57 % of the frames end up hidden. HuBERT and WavLM
            have 0.8, wav2vec 2.0 0.65 (49 % hidden).
        length: frames of a span.
        minimum_spans: at least so many in every row (fairseq's models ask for 2).
        overlap: whether spans may overlap or touch (all of fairseq's pre-training yamls). If not, spans are put down
            one by one with `minimum_space` visible frames between them, as many as fit (`no_mask_overlap`).
        minimum_space: between spans that may not overlap (`mask_min_space`). fairseq fails at times with 0, where it
            draws from an empty range; 0 here lets spans touch.
        legacy_same_count: cut every row to the smallest number of hidden frames among the rows of the pass, by
            un-hiding frames at random (`require_same_masks`, fairseq's default, not exposed in HuBERT; torchaudio's
            and so WavLabLM's only way). Spans are cut to pieces: of 64 rows of 781 frames 51 % of the frames are hidden
            instead of 57 %, in runs of 6.4 frames instead of 16. Off, because a row's mask then depends on its
            neighbours, and with gradient accumulation on the number of passes.
        channel_probability, channel_length: the same for channels of the projected features, which are set to zero for
            a whole row (`mask_channel_prob` 0.0, `mask_channel_length` 10; no minimum, overlap allowed). Fine-tuning
            recipes use it; no pre-training one does.
    """

    probability: float = 0.8
    length: int = 10
    minimum_spans: int = 2
    overlap: bool = True
    minimum_space: int = 1
    legacy_same_count: bool = False
    channel_probability: float = 0.0
    channel_length: int = 10

    def __post_init__(self):
        if not 0.0 <= self.probability <= 1.0 or self.length < 1 or self.minimum_spans < 0:
            raise MaskError(f"mask probability must lie in [0, 1], length be at least 1: got {self}")
        if self.minimum_space < 0:
            raise MaskError(f"minimum_space must be at least 0 frames: got {self}")
        if not 0.0 <= self.channel_probability <= 1.0 or self.channel_length < 1:
            raise MaskError(f"channel_probability must lie in [0, 1], channel_length be at least 1: got {self}")


def span_masks(keys: jax.Array, *, frames: int, cfg: MaskConfig, valid: jax.Array | None = None) -> jax.Array:
    """[batch, frames] bool, True = hidden; row i depends on `keys[i]` (and on how many of its frames are real) alone.

    A row of n real frames gets int(probability * n / length + U[0, 1)) spans, at least `minimum_spans`; starts are
    drawn without replacement from [0, n - length), so the last frame is never hidden; spans may overlap. Without
    `overlap` spans are put down one by one: the i-th falls into one of the free stretches that hold it, with
    probability in proportion to the stretch's length, at a uniform place. That is fairseq's rule and exact, in as many
    sequential iterations as a row may have spans.

    With `cfg.legacy_same_count` every row is then cut to the smallest count among these rows (see `same_count`), so
    pass all rows that belong together: under `jit` the rows of one forward pass over all devices, where fairseq took
    those of one GPU. With gradient accumulation each pass is cut by itself.

    Args:
        keys: [batch] keys, one a row.
        frames: of every row.
        cfg: probabilities.
        valid: [batch, frames] real frames, leading ones; None if all are real.
    """
    real = jnp.full(keys.shape, frames) if valid is None else jnp.sum(valid, axis=1)

    def one_row(key, n):
        count_key, start_key = jax.random.split(key)
        spans = _span_count(count_key, n, cfg.probability, cfg.length, cfg.minimum_spans)
        if cfg.overlap:
            return _overlapping_spans(start_key, n, spans, size=frames, length=cfg.length)
        most = max(int(cfg.probability * frames / cfg.length) + 1, cfg.minimum_spans)
        space = cfg.minimum_space
        return _separate_spans(start_key, n, spans, size=frames, length=cfg.length, most=most, space=space)

    mask = jax.vmap(one_row)(keys, real)
    return same_count(_stream(keys, _KEPT), mask, real=real > 0) if cfg.legacy_same_count else mask


def channel_masks(keys: jax.Array, *, width: int, cfg: MaskConfig) -> jax.Array:
    """[batch, width] bool, True = the channel is zero in all frames of the row; give it to `encode` as `channel_mask`.

    Spans of `channel_length` neighbouring channels, drawn by the rule of `span_masks` with overlap and no minimum, from
    streams of `keys` [batch] of their own. `cfg.legacy_same_count` ties rows together here as well.
    """

    def one_row(key):
        count_key, start_key = jax.random.split(key)
        spans = _span_count(count_key, width, cfg.channel_probability, cfg.channel_length, 0)
        return _overlapping_spans(start_key, width, spans, size=width, length=cfg.channel_length)

    mask = jax.vmap(one_row)(_stream(keys, _CHANNELS))
    every = jnp.ones(keys.shape, bool)
    return same_count(_stream(keys, _KEPT_CHANNELS), mask, real=every) if cfg.legacy_same_count else mask


def same_count(keys: jax.Array, mask: jax.Array, *, real: jax.Array) -> jax.Array:
    """`mask` [batch, frames] with as many True in every row as the poorest `real` row [batch] has.

    Which of a row's hidden frames stay hidden is uniform, drawn from its key of `keys` [batch]. Rows that are not
    `real` (fillers, where nothing is hidden) do not count.
    """
    counts = jnp.where(real, jnp.sum(mask, axis=1), mask.shape[1])
    order = jnp.where(mask, jax.vmap(lambda key: jax.random.uniform(key, mask.shape[1:]))(keys), 2.0)
    return mask & (_rank(order) < jnp.min(counts))


def _stream(keys: jax.Array, number: int) -> jax.Array:
    """Keys [batch] of another stream of the same rows."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def _rank(order: jax.Array) -> jax.Array:
    """Place of each value of the last axis in ascending order."""
    return jnp.argsort(jnp.argsort(order, axis=-1), axis=-1)


def _span_count(key: jax.Array, n, probability: float, length: int, minimum: int) -> jax.Array:
    """int(probability * n / length + U[0, 1)), at least `minimum`: rounded up or down at random."""
    spans = jnp.floor(probability * n / length + jax.random.uniform(key)).astype(jnp.int32)
    return jnp.maximum(spans, minimum)


def _overlapping_spans(key: jax.Array, n, spans: jax.Array, *, size: int, length: int) -> jax.Array:
    """[size] bool: `spans` spans of `length` whose starts are distinct; nothing from n on."""
    # a row too short for that many distinct starts offers one place more than it has spans (fairseq's rule)
    places = jnp.where(n - length > spans, n - length, spans + 1)
    position = jnp.arange(size)
    order = jnp.where(position < jnp.minimum(places, n), jax.random.uniform(key, (size,)), 2.0)
    starts = ((_rank(order) < spans) & (order < 2.0)).astype(jnp.int32)
    return _cover(starts, length) & (position < n)


def _separate_spans(key: jax.Array, n, spans: jax.Array, *, size: int, length: int, most: int, space: int) -> jax.Array:
    """[size] bool: at most `spans` (never over `most`) spans of `length`, `space` frames apart; nothing from n on.

    fairseq's `arrange`: free stretches are [begin, end), a span starts in [begin, end - length), and what is left of
    it and right of it, less the space, is free again if a span fits. The end of a left rest is one frame further than
    the space allows, which makes up for the start that the range excludes.
    """

    def put(i, state):
        begin, end, starts = state
        stretch_key, place_key = jax.random.split(jax.random.fold_in(key, i))
        room = end - begin
        fits = room >= length + max(space, 1)
        room = jnp.where(fits, room, 0)
        total = jnp.sum(room)
        go = (total > 0) & (i < spans)
        # the stretch: the first whose cumulated room is over a uniform integer below the total
        drawn = jax.random.randint(stretch_key, (), 0, jnp.maximum(total, 1))
        chosen = jnp.argmax(jnp.cumsum(room) > drawn)
        low, high = begin[chosen], end[chosen]
        start = jax.random.randint(place_key, (), low, jnp.maximum(high - length, low + 1))
        left_end = jnp.where(start - low - space >= length, start - space + 1, low)
        right = start + length + space
        right_end = jnp.where(high - right > length, high, right)
        begin = jnp.where(go, begin.at[i + 1].set(right), begin)
        end = jnp.where(go, end.at[chosen].set(left_end).at[i + 1].set(right_end), end)
        return begin, end, starts.at[start].add(go.astype(jnp.int32))

    empty = jnp.zeros((most + 1,), jnp.int32)
    state = (empty, empty.at[0].set(n), jnp.zeros((size,), jnp.int32))
    _, _, starts = lax.fori_loop(0, most, put, state)
    return _cover(starts, length) & (jnp.arange(size) < n)


def _cover(starts: jax.Array, length: int) -> jax.Array:
    """[size] bool: positions less than `length` after a start; `starts` [size] are 0 or 1."""
    started = jnp.cumsum(starts)
    before = jnp.concatenate([jnp.zeros((length,), started.dtype), started])[: starts.shape[0]]
    return started > before
