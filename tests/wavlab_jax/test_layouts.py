"""Every layout is recognised by what is in it, takes what it can hold, and gives it back bit for bit."""

import dataclasses
import os
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.wavlab_jax import tiny
from wavlab_jax.convert import Checkpoint, ConvertError, StoredTensor, to_encoder
from wavlab_jax.convert.checkpoint import fit, from_encoder
from wavlab_jax.convert.layouts import LAYOUTS, differences, read_checkpoint, write_checkpoint
from wavlab_jax.convert.names import wanted
from wavlab_jax.convert.torch_files import read_torch_file, write_torch_file
from wavlab_jax.encoder import EncoderConfig

BASE = tiny.encoder(position_kernel=8, feature_gradient_scale=0.1)
LARGE = dataclasses.replace(BASE, extractor_norm="layer", pre_norm=True, normalize_waveform=True)
CONFIGS: dict[str, EncoderConfig] = {
    "hubert": BASE,
    "wavlm": dataclasses.replace(LARGE, relative_bias=True, bias_buckets=16, bias_max_distance=20),
    "wav2vec2": dataclasses.replace(LARGE, extractor_bias=True),
}
HUBERT_HEAD = {"final_proj.weight": (6, 16), "final_proj.bias": (6,), "label_embeddings": (5, 6)}
HEAD_SHAPES = {
    "hubert": HUBERT_HEAD,
    "wavlm": HUBERT_HEAD,
    "wav2vec2": {
        "quantizer.codevectors": (1, 8, 3),
        "quantizer.weight_proj.weight": (8, 8),
        "quantizer.weight_proj.bias": (8,),
        "project_q.weight": (7, 6),
        "project_q.bias": (7,),
        "project_hid.weight": (7, 16),
        "project_hid.bias": (7,),
    },
}


def randomised(model_type: str, *, seed: int = 0) -> Checkpoint:
    """A checkpoint in memory in which no two values are alike."""
    rng, cfg = np.random.default_rng(seed), CONFIGS[model_type]

    def tensor(key, shape):
        return StoredTensor.of(key, rng.standard_normal(shape).astype(np.float32))

    return Checkpoint(
        layout="wavlab_jax",
        model_type=model_type,
        encoder=cfg,
        tensors={key: tensor(key, entry.shape) for key, entry in wanted(cfg).items()},
        heads={name: tensor(name, shape) for name, shape in HEAD_SHAPES[model_type].items()},
        settings={"sample_rate": 16_000, "temperature": 0.1},
    )


def assert_same(before: Checkpoint, after: Checkpoint) -> None:
    """Tensors and heads are equal, bit for bit, and so is what the encoder computes."""
    for left, right in ((before.tensors, after.tensors), (before.heads, after.heads)):
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name].values(), right[name].values(), err_msg=name)
    assert (after.model_type, after.encoder) == (before.model_type, before.encoder)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", CONFIGS)
def test_there_and_back(model_type, layout, tmp_path):
    before = randomised(model_type)
    if layout == "unilm" and model_type != "wavlm":
        with pytest.raises(ConvertError, match="unilm"):
            write_checkpoint(before, tmp_path / "model", layout=layout)
        assert os.listdir(tmp_path) == []
        return
    files = write_checkpoint(before, tmp_path / "model", layout=layout)
    assert set(files) == set(os.listdir(tmp_path / "model")) >= {"README.md"}
    after = read_checkpoint(tmp_path / "model")
    # WavLM has one file for both in s3prl
    assert after.layout == ("unilm" if (layout, model_type) == ("s3prl", "wavlm") else layout)
    # ESPnet has no wav2vec 2.0: its encoder goes as HuBERT's, which computes the same
    if (layout, model_type) == ("espnet", "wav2vec2"):
        assert after.model_type == "hubert"
        after = dataclasses.replace(after, model_type="wav2vec2")
    else:
        assert after.settings["temperature"] == 0.1
    assert_same(before, after)
    assert after.left_over == (("encoder.global_step",) if layout == "espnet" else ())
    card = (tmp_path / "model" / "README.md").read_text()
    assert all(note in card for note in differences(before, layout=layout))


@pytest.mark.parametrize(("layout", "name"), [("fairseq", "w2v_encoder.proj"), ("torchaudio", "aux")])
@pytest.mark.parametrize("blank", [0, 2, 4])
def test_the_blank_of_ctc_is_their_first_row(layout, name, blank, tmp_path):
    """transformers' is pad_token_id; fairseq's and torchaudio's is row 0. Way back it is where it was."""
    rng = np.random.default_rng(0)
    arrays = {f"lm_head.{kind}": rng.standard_normal(s).astype(np.float32) for kind, s in
              (("weight", (5, 16)), ("bias", (5,)))}  # fmt: skip
    heads = {key: StoredTensor.of(key, array) for key, array in arrays.items()}
    settings = {"sample_rate": 16_000} | ({"fine_tuning": {"pad_token_id": blank}} if blank else {})
    before = dataclasses.replace(randomised("wav2vec2"), heads=heads, settings=settings)
    write_checkpoint(before, tmp_path / "model", layout=layout)
    found = read_torch_file(next((tmp_path / "model").glob("*.pt")))
    found = found["model"] if layout == "fairseq" else found
    order = [blank, *(row for row in range(5) if row != blank)]
    for kind in ("weight", "bias"):
        np.testing.assert_array_equal(found[f"{name}.{kind}"].values(), arrays[f"lm_head.{kind}"][order])
    assert_same(before, read_checkpoint(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert (f"pad_token_id {blank} in transformers) is row 0" in card) == bool(blank)

    wrong = dataclasses.replace(before, settings={"fine_tuning": {"pad_token_id": 5}})
    with pytest.raises(ConvertError, match="lm_head has 5 rows, but pad_token_id.* is 5"):
        write_checkpoint(wrong, tmp_path / "wrong", layout=layout)


def test_a_chain_of_layouts_changes_nothing(tmp_path):
    first = now = randomised("hubert")
    for layout in ("fairseq", "torchaudio", "s3prl", "espnet", "huggingface"):
        write_checkpoint(now, tmp_path / layout, layout=layout)
        now = read_checkpoint(tmp_path / layout)
        assert now.layout == layout
    assert_same(first, now)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_single_files_are_recognised(layout, tmp_path):
    """The file itself may be named instead of its folder."""
    before = randomised("wavlm")
    write_checkpoint(before, tmp_path / "model", layout=layout)
    ending = ".safetensors" if layout == "huggingface" else (".pth" if layout == "espnet" else ".pt")
    (file,) = (f for f in (tmp_path / "model").iterdir() if f.suffix == ending and "head" not in f.name)
    assert read_checkpoint(file).tensors.keys() == before.tensors.keys()
    # alone in a folder, under another name, if it says all by itself
    if layout in ("fairseq", "unilm", "s3prl"):
        (tmp_path / "alone").mkdir()
        shutil.copy(file, tmp_path / "alone" / "renamed.pt")
        assert read_checkpoint(tmp_path / "alone").encoder == before.encoder


def test_what_is_in_no_layout_is_described(tmp_path):
    write_torch_file(tmp_path / "other.pt", {"state": {"a": np.zeros(3, np.float32)}, "epoch": 3})
    with pytest.raises(ConvertError, match=r"other.pt is in no layout .*Looked for: .*Found a dict of 2: state, epoch"):
        read_checkpoint(tmp_path / "other.pt")
    write_torch_file(tmp_path / "list.pt", [1, 2])
    with pytest.raises(ConvertError, match="Found a list"):
        read_checkpoint(tmp_path / "list.pt")
    with pytest.raises(ConvertError, match=r"no model folder.*and 2 files of weights.*list.pt, other.pt"):
        read_checkpoint(tmp_path)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ConvertError, match="text.pt is not a file that torch.save wrote"):
        read_checkpoint(tmp_path / "text.pt")
    save_file({"encoder.layers.0.attention.q_proj.weight": np.zeros(3, np.float32)}, tmp_path / "bare.safetensors")
    with pytest.raises(ConvertError, match="config.json must lie beside"):
        read_checkpoint(tmp_path / "bare.safetensors")
    with pytest.raises(ConvertError, match="absent does not exist"):
        read_checkpoint(tmp_path / "absent")
    with pytest.raises(ConvertError, match="s3://bucket/model is not local"):
        read_checkpoint("s3://bucket/model")
    with pytest.raises(ConvertError, match="no layout is called 'nemo'; there are huggingface, fairseq"):
        write_checkpoint(randomised("hubert"), tmp_path / "out", layout="nemo")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [np.nan, 3e38])
def test_damaged_values_are_named_and_nothing_is_written(layout, value, tmp_path):
    before = randomised("wavlm")
    key = "encoder.layers.1.feed_forward.output_dense.weight"
    spoilt = before.tensors[key].values().copy()
    spoilt[3, 5] = value
    checkpoint = dataclasses.replace(before, tensors={**before.tensors, key: StoredTensor.of(key, spoilt)})
    with pytest.raises(ConvertError, match=f"{key} has"):
        write_checkpoint(checkpoint, tmp_path / "out", layout=layout)
    assert os.listdir(tmp_path) == []
    with pytest.raises(ConvertError, match=f"{key} has"):
        to_encoder(checkpoint)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_and_unknown_keys_are_named(layout, tmp_path):
    write_checkpoint(randomised("wavlm"), tmp_path / "model", layout=layout)
    folder = tmp_path / "model"
    if layout == "huggingface":
        state = load_file(folder / "model.safetensors")
        del state["encoder.layer_norm.bias"]
        save_file(state | {"encoder.novelty": np.zeros(3, np.float32)}, folder / "model.safetensors")
    else:
        (file,) = (path for path in folder.iterdir() if path.suffix in (".pt", ".pth"))
        content = read_torch_file(file)
        content = _in_memory(content)  # before the file is written anew
        state = next((content[key] for key in ("model", "model_weight") if key in content), content)
        norm = next(key for key in state if key.endswith(("encoder.layer_norm.bias", "transformer.layer_norm.bias")))
        state[norm.replace("layer_norm.bias", "novelty")] = state.pop(norm)
        write_torch_file(file, content)
    with pytest.raises(ConvertError, match=r"1 missing: .*encoder.layer_norm.bias; 1 unexpected: .*novelty"):
        read_checkpoint(folder)


def _in_memory(content):
    if isinstance(content, StoredTensor):
        return content.read()
    if isinstance(content, dict):
        return {key: _in_memory(value) for key, value in content.items()}
    return [_in_memory(value) for value in content] if isinstance(content, list) else content


def test_heads_that_do_not_fit_are_named(tmp_path):
    whole = randomised("wav2vec2")

    def with_heads(**shapes):
        heads = {name: StoredTensor.of(name, np.zeros(shape, np.float32)) for name, shape in shapes.items()}
        return dataclasses.replace(whole, heads={**whole.heads, **heads})

    with pytest.raises(ConvertError, match=r"heads of a wrong shape: project_hid.weight \[7, 5\], not \[..., 16\]"):
        write_checkpoint(with_heads(**{"project_hid.weight": (7, 5)}), tmp_path / "out", layout="huggingface")
    with pytest.raises(ConvertError, match=r"codevectors \[1, 8, 4\] do not make groups"):
        write_checkpoint(with_heads(**{"quantizer.codevectors": (1, 8, 4)}), tmp_path / "out", layout="huggingface")
    assert os.listdir(tmp_path) == []


def test_an_encoder_goes_out_and_comes_back(tmp_path):
    before = to_encoder(randomised("wavlm"))
    write_checkpoint(from_encoder(before), tmp_path / "model", layout="torchaudio")
    after = to_encoder(read_checkpoint(tmp_path / "model"))
    assert after.config == before.config
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(after), jax.tree.leaves(before))


def test_fit_fills_what_a_file_may_lack():
    cfg = dataclasses.replace(BASE, extractor_channels=(8, 16))
    tensors = {key: StoredTensor.of(key, np.zeros(entry.shape, np.float32)) for key, entry in wanted(cfg).items()}
    del tensors["masked_spec_embed"]
    for name in ("weight", "bias"):
        del tensors[f"feature_projection.projection.{name}"]
    fitted = fit(cfg, tensors, where="x")
    assert list(fitted.tensors) == list(wanted(cfg)) and len(fitted.notes) == 2
    np.testing.assert_array_equal(fitted.tensors["feature_projection.projection.weight"].values(), np.eye(16))
    del tensors["encoder.layer_norm.bias"]
    with pytest.raises(ConvertError, match="x does not hold this encoder. 1 missing: encoder.layer_norm.bias"):
        fit(cfg, tensors, where="x")
