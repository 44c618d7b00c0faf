"""Conversion without torch: the name table, whole folders there and back, and what is refused."""

import dataclasses
import json
import os
import re
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx
from safetensors.numpy import load_file, save_file

from data_pipelines.atomic import CannotWrite
from tests.wavlab_jax import tiny
from tests.wavlab_jax.tiny import randomised
from wavlab_jax.convert import (
    Checkpoint,
    ConvertError,
    export_huggingface,
    from_encoder,
    huggingface_config,
    import_huggingface,
)
from wavlab_jax.convert import huggingface as folders
from wavlab_jax.convert.layouts import read_checkpoint
from wavlab_jax.convert.names import TABLE, Turn, flatten, tensors, unflatten
from wavlab_jax.encoder import EncoderConfig, make_encoder
from wavlab_jax.encoder.config import EncoderError

# Sizes are all different, so that no axis can pass for another.
HUBERT = tiny.encoder(
    extractor_channels=(4, 6, 5),
    extractor_kernels=(10, 3, 20),
    extractor_strides=(5, 4, 16),
    extractor_bias=True,
    width=12,
    layers=3,
    heads=3,
    feed_forward=20,
    position_kernel=6,
    position_groups=2,
    waveform_epsilon=3e-6,
    feature_gradient_scale=0.3,
    layerdrop=0.125,
)
WAVLM = dataclasses.replace(
    HUBERT,
    extractor_bias=False,
    extractor_norm="layer",
    pre_norm=True,
    normalize_waveform=True,
    relative_bias=True,
    bias_buckets=16,
    bias_max_distance=20,
    compute_dtype="bfloat16",
    rematerialize="layers",
    activation_dropout=0.05,
)


def arrays(encoder) -> dict[str, np.ndarray]:
    """Path -> array."""
    return jax.tree.map(np.asarray, flatten(nnx.to_pure_dict(nnx.state(encoder))))


@pytest.fixture(scope="module")
def encoder():
    return randomised(WAVLM)


@pytest.fixture
def folder(encoder, tmp_path):
    """An exported folder that a test may spoil."""
    export_huggingface(encoder, tmp_path / "model")
    return tmp_path / "model"


def change_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ------------------------------------------------------------------------------------------------------ name table


def test_every_parameter_has_one_key_and_every_row_a_parameter():
    used = set()
    for cfg in (HUBERT, WAVLM):
        shapes = flatten(nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda c=cfg: make_encoder(jax.random.key(0), c)))))
        listed = list(tensors(shapes))
        assert len({tensor.key for tensor in listed}) == len(listed)
        assert {tensor.path for tensor in listed} == set(shapes)
        assert sum(np.prod(t.shape, dtype=int) for t in listed) == sum(x.size for x in shapes.values())
        used |= {re.sub(r"\b\d+\b", "{index}", path) for path in shapes}
    assert used == {row.path for row in TABLE}
    assert len(TABLE) == len({row.path for row in TABLE}) == len({row.hugging_face for row in TABLE})


@pytest.mark.parametrize("turn", Turn)
def test_turns_are_undone(turn):
    ndim = {Turn.DENSE: 2, Turn.CONVOLUTION: 3}.get(turn, 1)
    x = np.arange(24.0).reshape((24,) if ndim == 1 else (2, 12) if ndim == 2 else (2, 3, 4))
    there = turn.to_torch(x)
    assert there.flags.c_contiguous and there.shape == turn.torch_shape(x.shape)
    np.testing.assert_array_equal(turn.from_torch(there), x)


def test_paths_nest_and_flatten():
    tree = {"a": {0: {"kernel": 1}, 1: {"kernel": 2}}, "b": 3}
    assert flatten(tree) == {"a/0/kernel": 1, "a/1/kernel": 2, "b": 3}
    assert unflatten(flatten(tree)) == tree


def test_a_parameter_without_a_row_is_named():
    with pytest.raises(ConvertError, match="layers/attention/novelty/kernel"):
        list(tensors({"layers/attention/novelty/kernel": np.zeros((2, 3, 3))}))


# --------------------------------------------------------------------------------------------------- whole folders


@pytest.mark.parametrize("cfg", [HUBERT, WAVLM], ids=["hubert", "wavlm"])
def test_a_folder_comes_back_bit_for_bit(cfg, tmp_path):
    before = randomised(cfg)
    export_huggingface(before, tmp_path / "deep" / "model")
    after = import_huggingface(tmp_path / "deep" / "model")
    assert after.config == cfg
    left, right = arrays(before), arrays(after)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)
    written = load_file(tmp_path / "deep" / "model" / "model.safetensors")
    assert sum(x.size for x in written.values()) == sum(x.size for x in left.values())


def test_tensors_lie_as_pytorch_has_them(encoder, folder):
    ours, theirs = arrays(encoder), load_file(folder / "model.safetensors")
    layer = "encoder.layers.2"
    for key, expected in {
        "masked_spec_embed": ours["mask_embedding"],
        "feature_extractor.conv_layers.1.conv.weight": np.einsum("kio->oik", ours["frontend/convolutions/1/kernel"]),
        "feature_extractor.conv_layers.2.layer_norm.weight": ours["frontend/convolutions/2/norm/scale"],
        "feature_projection.projection.weight": ours["frontend/projection/kernel"].T,
        "encoder.pos_conv_embed.conv.parametrizations.weight.original0": ours["position/gain"][None, None],
        "encoder.pos_conv_embed.conv.parametrizations.weight.original1": np.einsum(
            "kio->oik", ours["position/direction"]
        ),
        "encoder.layers.0.attention.rel_attn_embed.weight": ours["relative_bias"],
        f"{layer}.attention.gru_rel_pos_const": ours["layers/attention/gate/constant"][2][None, :, None, None],
        f"{layer}.attention.v_proj.weight": ours["layers/attention/value/kernel"][2].T,
        f"{layer}.attention.v_proj.bias": ours["layers/attention/value/bias"][2],
        f"{layer}.feed_forward.intermediate_dense.weight": ours["layers/expand/kernel"][2].T,
        f"{layer}.final_layer_norm.bias": ours["layers/final_norm/bias"][2],
    }.items():
        np.testing.assert_array_equal(theirs[key], expected, err_msg=key)
        assert theirs[key].dtype == np.float32
    assert "encoder.layers.1.attention.rel_attn_embed.weight" not in theirs
    with safetensors.safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without


def test_settings_of_the_released_base_model():
    config = huggingface_config(EncoderConfig())
    assert (
        config.items()
        >= {
            "model_type": "hubert",
            "architectures": ["HubertModel"],
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "conv_dim": [512] * 7,
            "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
            "conv_stride": [5, 2, 2, 2, 2, 2, 2],
            "feat_extract_norm": "group",
            "do_stable_layer_norm": False,
            "feat_proj_layer_norm": True,
            "num_conv_pos_embeddings": 128,
            "num_conv_pos_embedding_groups": 16,
            "hidden_dropout": 0.1,
            "activation_dropout": 0.0,
            "feat_proj_dropout": 0.1,
            "layerdrop": 0.05,
        }.items()
    )
    assert "num_buckets" not in config
    wavlm = huggingface_config(EncoderConfig(relative_bias=True))
    assert (wavlm["model_type"], wavlm["num_buckets"], wavlm["max_bucket_distance"]) == ("wavlm", 320, 800)


def head(rng) -> dict[str, np.ndarray]:
    """HuBERT's, over 4 units in 3 dimensions."""
    shapes = {"final_proj.weight": (3, HUBERT.width), "final_proj.bias": (3,), "label_embeddings": (4, 3)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_the_head_and_the_card_lie_beside_the_model(encoder, tmp_path):
    heads = head(np.random.default_rng(1))
    heads["final_proj.weight"] = np.asfortranarray(heads["final_proj.weight"])  # lies otherwise in memory
    checkpoint = from_encoder(
        encoder, head=heads, settings={"label_rate": 50.0, "dictionaries": [["a", "b", "c", "d"]]}
    )
    files = folders.write(checkpoint, tmp_path / "model", card="# Mine\n")
    read = load_file(tmp_path / "model" / "pretraining_head.safetensors")
    assert read.keys() == heads.keys()
    for name, array in heads.items():
        np.testing.assert_array_equal(read[name], array)
    assert (tmp_path / "model" / "README.md").read_text() == "# Mine\n"
    assert (
        set(files)
        == set(os.listdir(tmp_path / "model"))
        == {
            "README.md",
            "config.json",
            "model.safetensors",
            "preprocessor_config.json",
            "pretraining_head.safetensors",
        }
    )
    modes = {stat.S_IMODE((tmp_path / "model" / name).stat().st_mode) for name in files}
    assert len(modes) == 1  # whoever may read the card may read the weights
    again = folders.read(tmp_path / "model")
    assert again.settings == {"sample_rate": 16_000, **checkpoint.settings} and again.encoder == WAVLM
    for name, array in heads.items():
        np.testing.assert_array_equal(again.heads[name].values(), array)


def test_differences_stand_in_the_card(tmp_path):
    def said(cfg):
        return folders.differences(Checkpoint("wavlab_jax", "hubert", cfg, {}))

    (base,) = said(HUBERT)
    assert "padding" in base
    large = said(WAVLM)
    assert any("1e-07" in note for note in large) and any("transformers 4" in note for note in large)
    assert said(dataclasses.replace(WAVLM, waveform_epsilon=1e-7, pre_norm=False)) == ()
    export_huggingface(randomised(WAVLM), tmp_path / "model", head=head(np.random.default_rng(0)))
    card = (tmp_path / "model" / "README.md").read_text()
    assert all(note in card for note in large) and "# WavLM encoder" in card and "2110.13900" in card
    assert "`hidden_states` has 4 entries" in card and "`label_embeddings` [4, 3]" in card


def test_an_empty_folder_may_be_there_and_a_full_one_not(encoder, tmp_path):
    (tmp_path / "model").mkdir()
    export_huggingface(encoder, tmp_path / "model")
    before = (tmp_path / "model" / "config.json").stat().st_mtime_ns
    with pytest.raises(ConvertError, match="exists already"):
        export_huggingface(encoder, tmp_path / "model")
    assert (tmp_path / "model" / "config.json").stat().st_mtime_ns == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ConvertError, match="exists already"):
        export_huggingface(encoder, tmp_path / "file")


def test_a_failed_export_leaves_nothing(encoder, tmp_path, monkeypatch):
    def full_disk(path, tensors):
        path.write_bytes(b"half a mod")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "write_safetensors_file", full_disk)
    with pytest.raises(CannotWrite, match="No space left on device.*: free some space"):
        export_huggingface(encoder, tmp_path / "model")
    assert os.listdir(tmp_path) == []


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("path", "index", "named"),
    [
        ("layers/expand/kernel", (1, 2, 3), "layers/expand/kernel, layer 1"),
        ("position/gain", (0,), "position/gain"),
    ],
)
def test_parameters_that_are_not_finite_are_named(path, index, named, tmp_path):
    spoilt = randomised(HUBERT)
    node = spoilt
    for part in path.split("/"):
        node = getattr(node, part)
    node[...] = node[...].at[index].set(jnp.inf)
    with pytest.raises(ConvertError, match=f"{named} has 1 values"):
        export_huggingface(spoilt, tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_a_head_that_is_not_finite_is_named(encoder, tmp_path):
    with pytest.raises(ConvertError, match="head tensor label_embeddings has 2 values"):
        export_huggingface(encoder, tmp_path / "model", head={"label_embeddings": np.array([[np.nan, 1.0, -np.inf]])})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [2e4, -1e30])
def test_values_that_no_model_has_are_refused_both_ways(value, encoder, folder, tmp_path):
    model = load_file(folder / "model.safetensors")
    model["encoder.layers.0.layer_norm.bias"][2] = value
    save_file(model, folder / "model.safetensors")
    named = r"model.safetensors: encoder.layers.0.layer_norm.bias has values up to .*the file is damaged"
    with pytest.raises(ConvertError, match=named):
        import_huggingface(folder)
    with pytest.raises(ConvertError, match=named):
        folders.write(folders.read(folder), tmp_path / "other")
    assert os.listdir(tmp_path) == ["model"]


def test_what_transformers_cannot_compute_is_refused(tmp_path):
    with pytest.raises(ConvertError, match="norm_epsilon"):
        export_huggingface(randomised(dataclasses.replace(HUBERT, norm_epsilon=1e-6)), tmp_path / "model")


def test_folders_that_are_not_local_are_refused(encoder):
    with pytest.raises(ConvertError, match="gs://bucket/model is not local"):
        export_huggingface(encoder, "gs://bucket/model")
    with pytest.raises(ConvertError, match="not local"):
        import_huggingface("gs://bucket/model")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "data2vec-audio"}, "model_type is 'data2vec-audio'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"feat_extract_activation": "gelu_new"}, "feat_extract_activation is 'gelu_new'"),
        ({"feat_proj_layer_norm": False}, "feat_proj_layer_norm is False"),
        ({"conv_pos_batch_norm": True}, "conv_pos_batch_norm is True"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06"),
        ({"add_adapter": True}, "add_adapter is True"),
        ({"adapter_attn_dim": 16}, "adapter_attn_dim is 16"),
        ({"feat_extract_norm": "batch"}, "feat_extract_norm as 'batch'"),
        ({"conv_stride": [5, 4, 8]}, "400 samples every 160"),
        ({"num_attention_heads": 5}, "width 12 is not a multiple of heads 5"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers is 'three', which is no int"),
    ],
)
def test_other_models_are_refused_by_their_settings(fields, named, folder):
    change_json(folder / "config.json", **fields)
    with pytest.raises(ConvertError, match=re.escape(named)):
        import_huggingface(folder)


def test_tensors_that_do_not_fit_are_named(folder):
    model = load_file(folder / "model.safetensors")
    del model["encoder.layer_norm.bias"], model["encoder.layers.2.layer_norm.weight"]
    model["encoder.adapter.weight"] = np.zeros(3, np.float32)
    model["feature_projection.projection.bias"] = np.zeros(13, np.float32)
    save_file(model, folder / "model.safetensors")
    with pytest.raises(ConvertError) as caught:
        import_huggingface(folder)
    message = str(caught.value)
    assert "2 missing: encoder.layer_norm.bias, encoder.layers.2.layer_norm.weight" in message
    assert "1 unexpected: encoder.adapter.weight" in message
    assert "feature_projection.projection.bias [13], not [12]" in message


def test_many_missing_tensors_are_counted(folder):
    change_json(folder / "config.json", num_hidden_layers=5)
    with pytest.raises(ConvertError, match=r"38 missing: .* and 30 more\. Has config.json"):
        import_huggingface(folder)


def test_a_checkpoint_with_nan_is_refused(folder):
    model = load_file(folder / "model.safetensors")
    model["encoder.layers.1.final_layer_norm.weight"][3] = np.nan
    save_file(model, folder / "model.safetensors")
    with pytest.raises(ConvertError, match="encoder.layers.1.final_layer_norm.weight has 1 values"):
        import_huggingface(folder)


def test_half_precision_and_old_weight_norm_are_read(encoder, folder):
    model = {key: array.astype(np.float16) for key, array in load_file(folder / "model.safetensors").items()}
    convolution = "encoder.pos_conv_embed.conv"
    model[f"{convolution}.weight_g"] = model.pop(f"{convolution}.parametrizations.weight.original0")
    model[f"{convolution}.weight_v"] = model.pop(f"{convolution}.parametrizations.weight.original1")
    save_file({f"wavlm.{key}": array for key, array in model.items()} | {"lm_head.bias": np.zeros(3)}, folder / "new")
    (folder / "new").rename(folder / "model.safetensors")
    for path, array in arrays(import_huggingface(folder)).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, arrays(encoder)[path].astype(np.float16).astype(np.float32), err_msg=path)


def test_both_spellings_at_once_are_refused(folder):
    model = load_file(folder / "model.safetensors")
    model["encoder.pos_conv_embed.conv.weight_g"] = np.zeros((1, 1, 6), np.float32)
    save_file(model, folder / "model.safetensors")
    with pytest.raises(ConvertError, match="twice"):
        import_huggingface(folder)


def test_files_that_are_not_there_or_not_whole_are_named(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ConvertError, match="model.safetensors cannot be read"):
        import_huggingface(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConvertError, match="pytorch_model.bin"):
        import_huggingface(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConvertError, match="config.json is not JSON"):
        import_huggingface(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConvertError, match="config.json holds a list"):
        import_huggingface(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConvertError, match="config.json does not exist"):
        import_huggingface(folder)


def test_shards_outside_the_folder_are_refused(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = folder / "model.safetensors.index.json"
    for shard in ("../elsewhere.safetensors", str(folder.parent / "elsewhere.safetensors"), "elsewhere.py", ""):
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(ConvertError, match="not a file of weights in its folder"):
            import_huggingface(folder)
    for content in ({}, {"weight_map": []}, {"weight_map": {}}):
        index.write_text(json.dumps(content))
        with pytest.raises(ConvertError, match="no weight_map"):
            import_huggingface(folder)


def test_waveforms_are_normalised_as_the_folder_says_or_else_by_the_published_rule(folder, tmp_path):
    said = (folder / "preprocessor_config.json").read_text()
    assert not any("do_normalize" in note for note in folders.read(folder).notes)
    (folder / "preprocessor_config.json").unlink()
    found = folders.read(folder)
    assert found.encoder.normalize_waveform is True and "normalised, as in every published" in found.notes[-1]
    assert import_huggingface(folder, normalize_waveform=False).config.normalize_waveform is False
    assert read_checkpoint(folder, normalize_waveform=False).encoder.normalize_waveform is False
    assert folders.read(folder, architecture=WAVLM).notes == ()
    export_huggingface(randomised(HUBERT), tmp_path / "group")
    (tmp_path / "group" / "preprocessor_config.json").unlink()
    found = folders.read(tmp_path / "group")
    assert found.encoder.normalize_waveform is False and "not normalised, as in every published" in found.notes[-1]
    # newer processors keep the extractor's settings inside their own file
    (folder / "processor_config.json").write_text(json.dumps({"feature_extractor": json.loads(said)}))
    assert import_huggingface(folder).config.normalize_waveform is True


def test_settings_of_a_foreign_folder(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["wavlab_jax"], config["layerdrop"], config["feat_proj_dropout"]
    (folder / "config.json").write_text(json.dumps(config))
    cfg = import_huggingface(folder).config
    assert (cfg.waveform_epsilon, cfg.feature_gradient_scale) == (1e-7, 1.0)  # the preprocessor's; fairseq's Large
    assert (cfg.layerdrop, cfg.projection_dropout) == (0.1, 0.0)  # what transformers takes absent fields for
    assert (cfg.compute_dtype, cfg.rematerialize) == ("float32", "nothing")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_hidden_layers": 100_000_000}, "num_hidden_layers has the size 100000000"),
        ({"num_hidden_layers": 100_000}, "100000 layers on 3 convolutions are asked for, but there are only"),
        ({"num_hidden_layers": -3}, "num_hidden_layers has the size -3"),
        ({"num_attention_heads": 0}, "num_attention_heads has the size 0"),
        ({"num_conv_pos_embedding_groups": 0}, "num_conv_pos_embedding_groups has the size 0"),
        ({"hidden_size": 3 * 2**15}, "a size of 98304 is asked for, but no tensor has more than 20"),
        ({"conv_kernel": [10, 3, "20"]}, "conv_kernel has the size '20'"),
        ({"conv_dim": [4, True, 5]}, "conv_dim has the size True"),
        ({"conv_dim": [1] * 50_000, "conv_kernel": [400] + [1] * 49_999, "conv_stride": [320] + [1] * 49_999},
         "on 50000 convolutions are asked for"),
        ({"model_type": ["hubert"]}, "model_type is a list"),
    ],
)  # fmt: skip
def test_sizes_that_no_model_has_are_refused_before_anything_is_made(fields, named, folder):
    change_json(folder / "config.json", **fields)
    with pytest.raises(ConvertError, match=re.escape(named)):
        folders.read(folder)


def test_json_that_is_nested_too_deeply_is_refused(folder):
    (folder / "config.json").write_text("[" * 200_000)
    with pytest.raises(ConvertError, match="config.json is not JSON: it is nested too deeply"):
        folders.read(folder)


@pytest.mark.parametrize("name", ["layers", "heads", "width", "position_groups", "bias_buckets", "feed_forward"])
def test_an_encoder_has_at_least_one_of_everything(name):
    with pytest.raises(EncoderError, match=f"{name} is 0; every size is at least 1"):
        dataclasses.replace(WAVLM, **{name: 0})
    with pytest.raises(EncoderError, match=r"extractor_kernels is \(400, -1\)"):
        tiny.encoder(extractor_kernels=(400, -1))
