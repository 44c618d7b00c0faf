"""The table of published encoders: names, what counts as the same encoder, and counts that were published."""

import dataclasses

import pytest

from experiments.architectures import parameter_counts
from tests.wavlab_jax import tiny
from wavlab_jax.convert.checkpoint import HEADS
from wavlab_jax.encoder import EncoderConfig
from wavlab_jax.encoder.architectures import ARCHITECTURES, TABLE, architecture, name_of
from wavlab_jax.encoder.config import EncoderError


def test_every_name_finds_its_encoder_again():
    for name, cfg in ARCHITECTURES.items():
        assert architecture(name) is cfg
        found = name_of(cfg)
        assert list(ARCHITECTURES).index(found) <= list(ARCHITECTURES).index(name)
        assert TABLE[name_of(cfg, model_type=TABLE[name].model_type)].model_type == TABLE[name].model_type
    assert name_of(ARCHITECTURES["mms_1b"]) == "xls_r_1b"
    assert name_of(ARCHITECTURES["wav2vec2_base"]) == "hubert_base"
    assert name_of(ARCHITECTURES["wav2vec2_base"], model_type="wav2vec2") == "wav2vec2_base"
    assert name_of(ARCHITECTURES["wavlablm_ms"]) == "wavlablm_ek"


@pytest.mark.parametrize(
    "change",
    [
        {"dropout": 0.3, "layerdrop": 0.2, "feature_gradient_scale": 0.5},
        {"compute_dtype": "bfloat16", "rematerialize": "layers"},
        {"waveform_epsilon": 1e-7, "valid_frames": "fairseq_bins"},
        {"bias_buckets": 32, "bias_max_distance": 64},  # of a bias that it does not have
    ],
)
def test_how_it_is_trained_or_run_is_not_which_it_is(change):
    assert name_of(dataclasses.replace(architecture("hubert_large"), **change)) == "hubert_large"


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 23},
        {"width": 1280},
        {"heads": 8},
        {"feed_forward": 3072},
        {"pre_norm": False},
        {"extractor_norm": "group"},
        {"position_kernel": 127},
        {"position_groups": 8},
        {"bias_max_distance": 1280},
        {"bias_buckets": 160},
        {"norm_epsilon": 1e-6},
        {"extractor_bias": True},
        {"normalize_waveform": False},
    ],
)
def test_what_changes_the_function_changes_the_name(change):
    assert name_of(dataclasses.replace(architecture("wavlm_large"), **change)) is None


def test_what_is_in_no_table_has_no_name():
    assert name_of(tiny.encoder()) is None
    assert name_of(EncoderConfig()) == "hubert_base"


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(EncoderError, match="xlsr_53"):
        architecture("XLSR-53b")
    with pytest.raises(EncoderError, match="hubert_base, .*wavlablm_ms"):
        architecture("?")


def test_counts_are_the_published_ones():
    """fairseq's README and papers: wav2vec 2.0 Base 95,044,608 with its head; XLS-R 317 M, 965 M and 2,162 M."""
    assert parameter_counts("hubert_base") == (94_371_712, 325_888)
    assert sum(parameter_counts("wav2vec2_base")) == 95_044_608
    for name, millions in (("xls_r_300m", 317), ("xls_r_1b", 965), ("xls_r_2b", 2162)):
        assert sum(parameter_counts(name)) // 1_000_000 == millions
    assert parameter_counts("wavlablm_ms") == (315_435_136, 1024 * 768 + 768 + 500 * 768)


def test_heads_are_tensors_that_checkpoints_have():
    for row in TABLE.values():
        assert row.head.shapes(row.encoder.width).keys() <= HEADS.keys()


def test_a_contrastive_head_has_the_published_size():
    from wavlab_jax.heads import ContrastiveHeadConfig
    from wavlab_jax.model import abstract_parameters, count

    for name in ("wav2vec2_base", "xls_r_300m"):
        row = TABLE[name]
        head = ContrastiveHeadConfig(dim=row.head.dim, codevector_dim=row.head.dim)
        assert count(abstract_parameters(row.encoder, head)["head"]) == row.head_parameters()
