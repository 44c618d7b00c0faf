"""The formula against figures worked out elsewhere, and what it must grow with."""

import dataclasses

import pytest

from wavlab_jax.encoder.architectures import architecture
from wavlab_jax.flops import recomputed_flops, row_flops
from wavlab_jax.heads import ContrastiveHeadConfig, HeadConfig

BASE = architecture("hubert_base")


def test_hubert_base_over_ten_seconds():
    """T = 499; worked out by hand from the shapes: 49.1, 0.4, 4.7, 93.9 GFLOP."""
    flops = row_flops(BASE, samples=160_000)
    assert flops.extractor == pytest.approx(49.1e9, rel=2e-3)
    assert flops.projection == 2 * 499 * 512 * 768
    assert flops.position == pytest.approx(4.7e9, rel=5e-3)
    assert flops.attention + flops.feed_forward == pytest.approx(93.9e9, rel=1e-3)
    assert flops.first_convolution == 2 * 31_999 * 10 * 512
    assert flops.training == 3 * flops.forward - flops.first_convolution


def test_large_over_longer_rows():
    """781 frames of the Large shape: 76.7 + 0.8 + 13.1 + 531.7 GFLOP."""
    assert row_flops(architecture("hubert_large"), samples=250_240).forward == pytest.approx(622.3e9, rel=2e-3)


def test_the_gate_and_the_heads_count():
    gated = dataclasses.replace(BASE, relative_bias=True)
    assert row_flops(gated, samples=160_000).attention - row_flops(BASE, samples=160_000).attention == (
        12 * 2 * 499 * 768 * 8
    )
    units = row_flops(BASE, HeadConfig(units=500, dim=256, more_units=(100,)), samples=160_000)
    assert units.head == 2 * 499 * 256 * (768 + 600)
    contrastive = ContrastiveHeadConfig(dim=256, codevector_dim=256, groups=2, codes=320)
    few, many = (row_flops(BASE, contrastive, samples=160_000, negatives=n).head for n in (10, 100))
    assert many - few == 2 * 499 * 90 * 256


def test_what_is_computed_again():
    """HuBERT Large, 781 frames: all of a layer but its last product, post-norm that too; attention's two products."""
    large, frames = architecture("hubert_large"), 781
    again = dataclasses.replace(large, rematerialize="layers")
    half, mixing = 2 * frames * 1024 * 4096, 4 * frames**2 * 1024
    whole = row_flops(large, samples=250_240)
    assert recomputed_flops(large, samples=250_240) == 0
    assert recomputed_flops(again, samples=250_240) == whole.attention + whole.feed_forward - 24 * half
    post = dataclasses.replace(again, pre_norm=False)
    assert recomputed_flops(post, samples=250_240) == whole.attention + whole.feed_forward
    assert recomputed_flops(dataclasses.replace(large, rematerialize="dots"), samples=250_240) == 24 * mixing
