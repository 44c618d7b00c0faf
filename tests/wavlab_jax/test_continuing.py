"""What a stage takes over from an imported model: what fits, by name; the rest is named."""

import dataclasses

import numpy as np
import pytest

from tests.wavlab_jax import tiny
from wavlab_jax.convert import Checkpoint, ConvertError, from_encoder
from wavlab_jax.convert.continuing import continued
from wavlab_jax.convert.heads import head_parameters, stored_head
from wavlab_jax.convert.layouts import read_checkpoint, write_checkpoint
from wavlab_jax.convert.names import flatten
from wavlab_jax.model import parameters

HUBERT = tiny.encoder(layers=3)


def encoders(here, there=HUBERT):
    """(what is continued, its parameters, fresh parameters of a stage) for two architectures."""
    model = tiny.randomised(there, seed=1)
    return from_encoder(model), flatten(parameters(model)), parameters(tiny.randomised(here, seed=2))


def test_the_same_architecture_is_taken_over_whole():
    checkpoint, theirs, fresh = encoders(HUBERT)
    found = continued(checkpoint, HUBERT, fresh=fresh)
    assert (found.fresh, found.unused, found.differing) == ((), (), ()) and found.taken == len(checkpoint.tensors)
    ours = flatten(found.params)
    assert ours.keys() == theirs.keys()
    for path in theirs:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


def test_wavlm_goes_on_from_hubert_with_fresh_gates():
    cfg = tiny.encoder(layers=3, relative_bias=True, normalize_waveform=True)
    checkpoint, theirs, fresh = encoders(cfg)
    found = continued(checkpoint, cfg, fresh=fresh)
    assert set(found.fresh) == {"relative_bias"} | {
        f"layers/attention/gate/{name}" for name in ("dense/kernel", "dense/bias", "constant")
    }
    assert found.differing == (
        "normalize_waveform: False there, True here",
        "relative_bias: False there, True here",
    )
    assert flatten(found.params).keys() == theirs.keys() and found.unused == ()


@pytest.mark.parametrize("there", [True, False])
def test_biases_of_the_extractor_that_one_side_lacks_are_said(there):
    here = tiny.encoder(layers=3, extractor_bias=not there)
    checkpoint, _, fresh = encoders(here, tiny.encoder(layers=3, extractor_bias=there))
    found = continued(checkpoint, here, fresh=fresh)
    assert found.differing == (f"extractor_bias: {there} there, {not there} here",)
    biases = {f"feature_extractor.conv_layers.{index}.conv.bias" for index in range(2)} if there else set()
    assert set(found.unused) == biases and len(found.fresh) == (0 if there else 2)


def test_layers_that_are_more_or_fewer():
    deeper = tiny.encoder(layers=5)
    checkpoint, theirs, fresh = encoders(deeper)
    found = continued(checkpoint, deeper, fresh=fresh)
    assert found.fresh == ("layers 3 to 4 (16 parameters)",) and found.unused == ()
    kernel = flatten(found.params)["layers/expand/kernel"]
    np.testing.assert_array_equal(kernel[:3], theirs["layers/expand/kernel"])
    np.testing.assert_array_equal(kernel[3:], flatten(fresh)["layers/expand/kernel"][3:])
    shallower = tiny.encoder(layers=2)
    found = continued(checkpoint, shallower, fresh=parameters(tiny.randomised(shallower)))
    assert found.fresh == () and len(found.unused) == 16
    assert all(key.startswith("encoder.layers.2.") for key in found.unused)


def test_another_width_leaves_the_transformer_fresh():
    wider = tiny.encoder(layers=3, width=24, heads=2)
    checkpoint, _, fresh = encoders(wider)
    found = continued(checkpoint, wider, fresh=fresh)
    paths = flatten(found.params).keys()
    assert "frontend/convolutions/0/kernel" in paths and not any(path.startswith("layers/attention") for path in paths)


@pytest.mark.parametrize(
    "changes", [{"pre_norm": True}, {"heads": 4}, {"extractor_norm": "layer"}], ids=lambda changes: next(iter(changes))
)
def test_what_would_compute_something_else_is_refused(changes):
    cfg = dataclasses.replace(HUBERT, **changes)
    checkpoint, _, fresh = encoders(cfg)
    with pytest.raises(ConvertError, match=f"cannot be continued by this stage: {next(iter(changes))} is"):
        continued(checkpoint, cfg, fresh=fresh)


def test_a_model_of_which_nothing_fits_is_refused():
    other = tiny.encoder(extractor_channels=(10, 12), width=24, feed_forward=40, position_kernel=6)
    checkpoint, _, fresh = encoders(other)
    # the gain of a tap is all that such models share; another number of taps leaves nothing
    with pytest.raises(ConvertError, match="no tensor .* 3 layers of width 16, the stage 2 of width 24"):
        continued(checkpoint, other, fresh=fresh)


def test_damaged_values_are_not_continued():
    checkpoint, _, fresh = encoders(HUBERT)
    key = "encoder.layer_norm.bias"
    spoilt = dataclasses.replace(checkpoint.tensors[key], read=lambda: np.full(16, np.inf, np.float32))
    checkpoint = dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, key: spoilt})
    with pytest.raises(ConvertError, match="norm/bias has 16 values that are not finite"):
        continued(checkpoint, HUBERT, fresh=fresh)


def test_a_linear_head_comes_back_from_every_layout(tmp_path):
    """No layout has a place for it, none takes half of it for HuBERT's, and all keep it."""
    rng = np.random.default_rng(0)
    head = {
        "projection": {"kernel": rng.standard_normal((16, 8)), "bias": rng.standard_normal(8)},
        "embeddings": rng.standard_normal((12, 8)),
        "bias": rng.standard_normal(12),
    }
    checkpoint = from_encoder(tiny.randomised(HUBERT), head=stored_head(head))
    for layout in ("huggingface", "fairseq", "torchaudio"):
        write_checkpoint(checkpoint, tmp_path / layout, layout=layout)
        again = head_parameters(read_checkpoint(tmp_path / layout), like=head)
        for path, array in flatten(head).items():
            np.testing.assert_array_equal(flatten(again)[path], array.astype(np.float32))


def test_a_head_comes_back():
    rng = np.random.default_rng(0)
    head = {
        "projection": {"kernel": rng.standard_normal((16, 8)), "bias": rng.standard_normal(8)},
        "embeddings": rng.standard_normal((12, 8)),
    }
    checkpoint = from_encoder(tiny.randomised(HUBERT), head=stored_head(head))
    again = head_parameters(checkpoint, like=head)
    for path, array in flatten(head).items():
        np.testing.assert_array_equal(flatten(again)[path], array.astype(np.float32))
    with pytest.raises(ConvertError, match=r"label_embeddings \[12, 8\], not \[13, 8\]; set learner.head"):
        head_parameters(checkpoint, like={**head, "embeddings": np.zeros((13, 8))})
    bare = Checkpoint("huggingface", "hubert", HUBERT, checkpoint.tensors)
    with pytest.raises(ConvertError, match="has no final_proj.weight, final_proj.bias, label_embeddings"):
        head_parameters(bare, like=head)
