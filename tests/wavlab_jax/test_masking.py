"""Span masks against a NumPy transcription of the published rule, and what must hold for every row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wavlab_jax.masking import MaskConfig, MaskError, span_masks


def oracle(rng, frames, cfg):
    """fairseq's `compute_mask_indices` for one row, static lengths, overlap allowed, without the cut to the batch."""
    spans = max(int(cfg.probability * frames / cfg.length + rng.random()), cfg.minimum_spans)
    shortest = cfg.length
    if frames - shortest <= spans:
        shortest = frames - spans - 1
    starts = rng.choice(frames - shortest, spans, replace=False)
    mask = np.zeros(frames, bool)
    for start in starts:
        mask[start : start + cfg.length] = True
    return mask


def runs(mask):
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return edges[1::2] - edges[::2]


def draw(rows, frames, cfg, valid=None, seed=0):
    keys = jax.random.split(jax.random.key(seed), rows)
    return np.asarray(span_masks(keys, frames=frames, cfg=cfg, valid=valid))


@pytest.mark.parametrize("frames", [99, 781])
def test_coverage_and_runs_are_those_of_the_published_rule(frames):
    cfg = MaskConfig()
    ours = draw(1500, frames, cfg)
    rng = np.random.default_rng(0)
    theirs = np.stack([oracle(rng, frames, cfg) for _ in range(1500)])
    assert ours.mean() == pytest.approx(theirs.mean(), abs=0.006)
    our_runs = np.concatenate([runs(row) for row in ours])
    their_runs = np.concatenate([runs(row) for row in theirs])
    assert our_runs.mean() == pytest.approx(their_runs.mean(), rel=0.03)
    assert our_runs.min() == their_runs.min() == cfg.length
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=0.08)
    if frames == 781:
        assert ours.mean() == pytest.approx(0.568, abs=0.006)  # peers' documented coverage


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(0, 2**31 - 1))
def test_a_padded_row_is_masked_inside_its_real_part_only(real, seed):
    valid = jnp.arange(60)[None] < real
    mask = draw(1, 60, MaskConfig(), valid=valid, seed=seed)[0]
    assert not mask[real:].any()
    if real >= 3:
        assert mask.any()
    if real > 2 * 10 + 3:
        assert all(length >= 10 for length in runs(mask))


def test_a_row_does_not_depend_on_its_neighbours():
    keys = jax.random.split(jax.random.key(1), 6)
    together = np.asarray(span_masks(keys, frames=120, cfg=MaskConfig()))
    alone = np.concatenate([np.asarray(span_masks(keys[i : i + 1], frames=120, cfg=MaskConfig())) for i in range(6)])
    np.testing.assert_array_equal(together, alone)
    assert len({row.tobytes() for row in together}) == 6


def test_probability_zero_keeps_the_minimum_and_nonsense_is_refused():
    assert not draw(20, 100, MaskConfig(probability=0.0, minimum_spans=0)).any()
    assert (draw(20, 100, MaskConfig(probability=0.0, minimum_spans=1)).sum(1) == 10).all()
    with pytest.raises(MaskError, match="probability"):
        MaskConfig(probability=1.5)
