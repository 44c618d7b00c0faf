"""fairseq's layouts without torch: the configuration's grammar, what is refused, heads that fairseq has no slot for.

`test_fairseq.py` compares with s3prl's classes.
"""

import dataclasses
import json
import pickle
import zipfile

import numpy as np
import pytest

from tests.wavlab_jax import tiny
from wavlab_jax.convert import ConvertError, fairseq
from wavlab_jax.convert.checkpoint import Checkpoint, StoredTensor
from wavlab_jax.convert.fairseq_heads import SPECIALS
from wavlab_jax.convert.fairseq_settings import CONVOLUTIONS, convolutions, convolutions_text
from wavlab_jax.convert.names import wanted
from wavlab_jax.convert.torch_files import read_torch_file, write_torch_file
from wavlab_jax.encoder import EncoderConfig

BASE = tiny.encoder(waveform_epsilon=1e-7, rematerialize="layers")
LARGE = tiny.encoder(extractor_norm="layer", pre_norm=True, normalize_waveform=True, extractor_bias=True)
WAVLM = dataclasses.replace(LARGE, relative_bias=True, bias_buckets=32, bias_max_distance=64, extractor_bias=False)
UNITS, DIM, WIDTH = 7, 5, 16
SEVEN = [(512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2]


def stored(*shape: int, seed: int = 0) -> StoredTensor:
    values = np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)
    return StoredTensor.of("stored", values)


def hubert_heads() -> dict:
    return {
        "final_proj.weight": stored(DIM, WIDTH),
        "final_proj.bias": stored(DIM),
        "label_embeddings": stored(UNITS, DIM),
        "label_specials": stored(4, DIM),
    }


def contrastive_heads() -> dict:
    return {
        "quantizer.codevectors": stored(1, 6, 4),
        "quantizer.weight_proj.weight": stored(6, 8),
        "quantizer.weight_proj.bias": stored(6),
        "project_q.weight": stored(DIM, 8),
        "project_q.bias": stored(DIM),
        "project_hid.weight": stored(DIM, WIDTH),
        "project_hid.bias": stored(DIM),
    }


def checkpoint(cfg: EncoderConfig, model_type: str = "hubert", *, heads=None, **fields) -> Checkpoint:
    tensors = {key: stored(*tensor.shape, seed=1 + k) for k, (key, tensor) in enumerate(wanted(cfg).items())}
    return Checkpoint("wavlab_jax", model_type, cfg, tensors, heads or {}, **fields)


def written(tmp_path, cfg=BASE, model_type="hubert", *, layout="fairseq", **fields) -> dict:
    """The content of a file that `write` made, whose tensors may be changed and written again."""
    fairseq.write(checkpoint(cfg, model_type, **fields), tmp_path / "out", layout=layout)
    return read_torch_file(tmp_path / "out" / "checkpoint.pt")


def read_changed(tmp_path, content: dict) -> Checkpoint:
    write_torch_file(tmp_path / "changed.pt", {key: value for key, value in content.items() if key != "wavlab_jax"})
    return fairseq.read(tmp_path / "changed.pt")


CTC = {"lm_head.weight": stored(9, WIDTH), "lm_head.bias": stored(9)}
CASES = {
    "hubert": (BASE, "hubert", "fairseq", hubert_heads()),
    "hubert for s3prl": (LARGE, "hubert", "s3prl", hubert_heads()),
    "bare hubert": (BASE, "hubert", "s3prl", {}),
    "wav2vec2": (LARGE, "wav2vec2", "fairseq", contrastive_heads()),
    "bare wav2vec2": (LARGE, "wav2vec2", "s3prl", {}),
    "wavlm": (WAVLM, "wavlm", "fairseq", hubert_heads()),
    "wavlm for unilm": (WAVLM, "wavlm", "unilm", hubert_heads()),
    "wavlm with ctc": (WAVLM, "wavlm", "s3prl", CTC),
    "ctc": (BASE, "hubert", "fairseq", hubert_heads() | CTC),
    "other heads": (BASE, "hubert", "fairseq", {"speaker.weight": stored(3, 4)}),
}


@pytest.mark.parametrize("case", CASES)
def test_everything_comes_back(case, tmp_path):
    """Bit for bit: the encoder, heads with and without a slot, and what fairseq's configuration cannot say."""
    cfg, model_type, layout, heads = CASES[case]
    settings = {"sample_rate": 16_000, "temperature": 0.2, "label_rate": 25.0, "source": {"hours": [1, 2.5]}}
    before = checkpoint(cfg, model_type, heads=heads, settings=settings)
    files = fairseq.write(before, tmp_path / "out", layout=layout)
    assert files == tuple(sorted(path.name for path in (tmp_path / "out").iterdir()))
    assert fairseq.matches(tmp_path / "out") and fairseq.matches(tmp_path / "out" / "checkpoint.pt")
    after = fairseq.read(tmp_path / "out")
    assert (after.encoder, after.model_type) == (cfg, model_type)
    assert after.settings.items() >= settings.items() and json.dumps(after.settings)
    assert after.heads.keys() == heads.keys() and after.tensors.keys() == before.tensors.keys()
    for name, tensor in (dict(before.tensors) | heads).items():
        np.testing.assert_array_equal((dict(after.tensors) | dict(after.heads))[name].read(), tensor.read(), name)
    if case in ("hubert", "wav2vec2"):
        again = fairseq.write(after, tmp_path / "again", layout=layout)
        assert again == files and fairseq.read(tmp_path / "again").settings == after.settings


def test_half_precision_and_a_moved_file_come_in(tmp_path):
    content = written(tmp_path, heads=hubert_heads())
    whole = fairseq.read(tmp_path / "out")
    content["model"] = {key: tensor.read().astype(np.float16) for key, tensor in content["model"].items()}
    found = read_changed(tmp_path, content)
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(found.tensors[name].values(), tensor.read().astype(np.float16), name)
    assert (
        found.encoder.waveform_epsilon == 1e-5 and found.encoder.rematerialize == "nothing"
    )  # what fairseq cannot say


# ------------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CONVOLUTIONS, SEVEN),
        ("[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]", SEVEN),  # wav2vec 2.0's spelling
        (" 2 * ([(4,3,2)] * 2 + [[5,2,1]]) ", [(4, 3, 2), (4, 3, 2), (5, 2, 1)] * 2),
    ],
)
def test_convolutions_are_read_as_literals(text, expected):
    assert convolutions(text, where="x") == expected


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "[(512, 10, 5)] + open('x')",
        "[(512, 10, 5)] * 10**9",
        "[(512, 10, 5)] * 60 * 60 * 60 * 60",
        "[(512, 10, 5)] + [(512, 3, 2)] * 64",
        "[(x, 10, 5) for x in range(9)]",
        "[(512, 10)]",
        "[(512, 10, 5.0)]",
        "[(512, 10, True)]",
        "[(512, -10, 5)]",
        "[(512, (10,), 5)]",
        "2 * 3",
        "7",
        "[]",
        "",
        "[" * 999,
        "(" * 300 + "[(1,1,1)]" + ")" * 300 + "+" * 2000,
        "-" * 900 + "1",
    ],
)
def test_other_expressions_are_refused(text):
    with pytest.raises(ConvertError, match="conv_feature_layers"):
        convolutions(text, where="x.pt")


def test_convolutions_are_spelled_as_fairseq_spells_them():
    assert convolutions_text(EncoderConfig()) == CONVOLUTIONS
    assert convolutions(convolutions_text(BASE), where="") == [(8, 16, 16), (8, 25, 20)]


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("conv_pos_batch_norm", True, "batch norm"),
        ("pos_conv_depth", 5, "several positional convolutions"),
        ("target_glu", True, "gated linear"),
        ("layer_type", "conformer", "conformer"),
        ("layer_type", "trf_adp", "adapters"),
        ("activation_fn", "relu", "another activation"),
        ("quantize_input", True, "quantized features"),
        ("crop_seq_to_multiple", 2, "cut off"),
        ("expand_attention_head_size", 32, "another width"),
        ("extractor_mode", "batch", "extractor_mode is 'batch'"),
        ("encoder_layers", "2", "no int"),
        ("conv_feature_layers", "[(8,16,16)]", "frame of 16 samples every 16"),
        ("relative_position_embedding", True, "gru_rel_pos"),
        ("encoder_attention_heads", 5, "not a multiple of heads"),
        ("encoder_embed_dim", 32, "of another shape"),
        ("encoder_layers", 3, "missing: encoder.layers.2"),
        ("encoder_layers", 1, "unexpected: encoder.layers.1.fc1.bias"),
        ("encoder_layers", 10**5, "but there are"),
        ("encoder_layers", 10**9, "as no speech encoder"),
        ("encoder_attention_heads", 0, "as no speech encoder"),
        ("encoder_embed_dim", [[[1] * 9] * 9] * 9, ", which is no int"),
        ("_name", "data2vec_audio", "'data2vec_audio'"),
    ],
)
def test_models_that_are_not_computed_here_are_named(name, value, why, tmp_path):
    content = written(tmp_path)
    content["cfg"]["model"][name] = value
    with pytest.raises(ConvertError, match=f"changed.pt.*{why}"):
        read_changed(tmp_path, content)


def test_other_sample_rates_and_damaged_heads_are_named(tmp_path):
    content = written(tmp_path, heads=hubert_heads())
    content["cfg"]["task"]["sample_rate"] = 8_000
    with pytest.raises(ConvertError, match="8000 Hz"):
        read_changed(tmp_path, content)
    content["cfg"]["task"]["sample_rate"] = 16_000
    model, state = content["model"], content["task_state"]
    for changes, dictionaries, why in (
        ({"encoder.layers.0.adapter.weight": stored(2)}, None, "adapters"),
        ({"speaker.weight": stored(2)}, None, "unexpected: speaker.weight"),
        ({"final_proj.weight": stored(DIM, 3)}, None, r"final_proj.weight \[5, 3\], not \[..., 16\]"),
        ({"final_proj.bias": stored(3)}, None, r"final_proj.bias \[3\]"),
        ({"label_embs_concat": stored(4)}, None, r"label_embs_concat has the shape \[4\]"),
        ({}, [[*SPECIALS, "0"]], "belong to different models"),
        ({}, [[str(k) for k in range(UNITS + 4)]], "does not begin with <s>"),
        ({"encoder.pos_conv.0.parametrizations.weight.original0": stored(1)}, None, "both spellings"),
    ):
        content["task_state"] = {"dictionaries": dictionaries} if dictionaries else state
        content["model"] = model | changes
        with pytest.raises(ConvertError, match=why):
            read_changed(tmp_path, content)


def test_our_own_entry_may_be_spoiled(tmp_path):
    content = written(tmp_path, heads=hubert_heads())
    endless = [1]
    for _ in range(40):
        endless = [endless, endless]
    for ours, why in (
        ({"settings": {"a": endless}}, "not plain values"),
        ({"settings": [1]}, "not plain values"),
        ({"settings": {"a": {1: 2}}}, "not plain values"),
        ({"encoder": {"compute_dtype": 3}}, "compute_dtype = 3"),
        ({"encoder": {"novelty": 3}}, "novelty = 3"),
    ):
        with pytest.raises(ConvertError, match=why):
            fairseq.read(spoiled(tmp_path, content | {"wavlab_jax": ours}))
    for ours in ({"made_up": 3, "side": {"a": 1}, "encoder": 5}, {"side": ["a", 7]}, [1], "x", None):
        found = fairseq.read(spoiled(tmp_path, content | {"wavlab_jax": ours}))
        assert found.heads.keys() == hubert_heads().keys()


def spoiled(tmp_path, content: dict):
    """A file whose parts are shared, as pickle would have them: our writer writes each part wherever it stands."""
    ours = content.pop("wavlab_jax")
    write_torch_file(tmp_path / "spoiled.pt", content)
    raw = pickle.dumps(ours, 2)[2:-1]
    with zipfile.ZipFile(tmp_path / "spoiled.pt") as before, zipfile.ZipFile(tmp_path / "shared.pt", "w") as after:
        for name in before.namelist():
            part = before.read(name)
            if name.endswith("data.pkl"):
                key = pickle.dumps("wavlab_jax", 2)[2:-1]
                part = part.removesuffix(b".") + b"(" + key + raw + b"u."
            after.writestr(name, part)
    return tmp_path / "shared.pt"


def test_references_in_the_configuration_are_looked_up(tmp_path):
    content = written(tmp_path, settings={"label_rate": 25.0})
    content["cfg"]["model"] |= {"label_rate": "${task.label_rate}", "dropout": "${common.none}", "conv_bias": "???"}
    content["cfg"]["task"] |= {"normalize": "${model.normalize}"}
    content["cfg"]["model"]["normalize"] = "${task.normalize}"  # a circle says nothing
    found = read_changed(tmp_path, content)
    assert found.settings["label_rate"] == 25.0 and found.encoder.dropout == 0.1
    assert found.encoder.normalize_waveform is False


def test_label_sets_without_dictionaries_are_kept_whole(tmp_path):
    content = written(tmp_path, heads=hubert_heads())
    content["task_state"] = {}
    found = read_changed(tmp_path, content)
    assert found.heads["label_embeddings"].shape == (UNITS, DIM) and "dictionaries" not in found.settings
    content["cfg"]["task"]["labels"] = ["km", "ltr"]
    found = read_changed(tmp_path, content)
    assert found.heads["label_embs_concat"].shape == (UNITS + 4, DIM) and "how many" in " ".join(found.notes)


def test_an_architecture_may_be_given(tmp_path):
    content = written(tmp_path, LARGE, "wav2vec2", heads=contrastive_heads())
    write_torch_file(tmp_path / "x.pt", content)
    assert fairseq.read(tmp_path / "x.pt", architecture=LARGE).encoder == LARGE
    with pytest.raises(ConvertError, match="position_kernel is 8 there and 9"):
        fairseq.read(tmp_path / "x.pt", architecture=dataclasses.replace(LARGE, position_kernel=9))
    tuned = written(tmp_path / "ctc", LARGE, "wav2vec2", heads=CTC)
    tuned["cfg"]["model"]["w2v_args"] = None
    with pytest.raises(ConvertError, match="pass architecture="):
        read_changed(tmp_path, tuned)
    write_torch_file(tmp_path / "y.pt", {key: value for key, value in tuned.items() if key != "wavlab_jax"})
    found = fairseq.read(tmp_path / "y.pt", architecture=LARGE)
    assert found.encoder == LARGE and found.model_type == "wav2vec2" and "lm_head.bias" in found.heads


# ------------------------------------------------------------------------------------------------------------ writing


def test_what_a_layout_cannot_hold_is_refused(tmp_path):
    for model, layout, why in (
        (checkpoint(BASE), "unilm", "WavLM only"),
        (checkpoint(dataclasses.replace(BASE, norm_epsilon=1e-6)), "fairseq", "norm_epsilon"),
        (checkpoint(BASE, heads={"lm_head.weight": stored(3, 4)}), "s3prl", r"lm_head|stored \[3, 4\]"),
        (checkpoint(BASE, heads=hubert_heads(), settings={"dictionaries": [["a"]]}), "fairseq", "name 1; mend"),
        (checkpoint(BASE, heads=hubert_heads(), settings={"dictionaries": [["a"] * 3, ["b"] * 4]}), "s3prl", "8, 5"),
        (checkpoint(LARGE, "wav2vec2", heads={"quantizer.codevectors": stored(1, 6, 4)}), "s3prl", "half a quantizer"),
        (
            checkpoint(BASE, heads=hubert_heads() | {"final_proj.weight": stored(6, WIDTH)}),
            "s3prl",
            "untie_final_proj|5",
        ),
    ):
        with pytest.raises(ConvertError, match=why):
            fairseq.write(model, tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -2e4])
@pytest.mark.parametrize("where", ["encoder.layers.1.attention.v_proj.bias", "final_proj.weight", "label_specials"])
def test_damaged_values_are_named_and_nothing_is_written(value, where, tmp_path):
    model = checkpoint(BASE, heads=hubert_heads())
    tensors = model.heads if where in model.heads else model.tensors
    damaged = tensors[where].read().copy()
    damaged.flat[3] = value
    tensors[where] = StoredTensor(where, damaged.shape, lambda: damaged, "x.pt")
    with pytest.raises(ConvertError, match=f"x.pt: {where}"):
        fairseq.write(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_incomplete_encoders_are_named_and_nothing_is_overwritten(tmp_path):
    model = checkpoint(BASE)
    del model.tensors["encoder.layers.0.feed_forward.output_dense.bias"]
    with pytest.raises(ConvertError, match="missing: encoder.layers.0.feed_forward.output_dense.bias"):
        fairseq.write(model, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(ConvertError, match="exists already"):
        fairseq.write(checkpoint(BASE), tmp_path / "out")


def test_other_files_are_not_taken_for_fairseqs(tmp_path):
    write_torch_file(tmp_path / "x.pt", {"model": {"a": np.zeros(3, np.float32)}, "epoch": 3})
    assert not fairseq.matches(tmp_path / "x.pt") and not fairseq.matches(tmp_path / "none.pt")
    assert (
        not fairseq.matches({"encoder.weight": stored(3)})
        and not fairseq.matches([1])
        and not fairseq.matches(tmp_path)
    )
    with pytest.raises(ConvertError, match="it has the keys epoch, model, but no cfg"):
        fairseq.read(tmp_path / "x.pt")
    for content, why in (
        ({"cfg": {"model": {"_name": "hubert"}}, "model": {"a": 1}}, "no dict of tensors"),
        ({"model_cfg": {}, "task_cfg": {}, "model_weight": [1]}, "no dict of tensors"),
    ):
        write_torch_file(tmp_path / "y.pt", content)
        with pytest.raises(ConvertError, match=why):
            fairseq.read(tmp_path / "y.pt")
