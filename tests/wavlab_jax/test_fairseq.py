"""fairseq's, unilm's and s3prl's layouts against s3prl's own classes: weights and outputs that our code never made."""

import argparse
import sys
import types

import jax
import numpy as np
import omegaconf
import pytest
import torch

from tests.wavlab_jax import s3prl_peer
from wavlab_jax.convert import ConvertError, fairseq, from_encoder, to_encoder
from wavlab_jax.convert.fairseq_heads import SPECIALS
from wavlab_jax.convert.torch_files import read_torch_file
from wavlab_jax.encoder import encode, formulation_for

pytestmark = pytest.mark.torch

TOLERANCE = 1e-4
SAMPLES = 400 + 74 * 320 + 111  # 75 frames: past the largest bucketed distance, and odd

# Configurations in fairseq's own words.
BASE = {
    "conv_feature_layers": "[(8,16,16)] + [(8,25,20)]",
    "encoder_layers": 2,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 32,
    "encoder_attention_heads": 2,
    "conv_pos": 8,
    "conv_pos_groups": 2,
    "final_dim": 6,
    "encoder_layerdrop": 0.05,
    "feature_grad_mult": 0.1,
    "mask_prob": 0.8,
}
LARGE = BASE | {"extractor_mode": "layer_norm", "layer_norm_first": True, "feature_grad_mult": 1.0}
BIAS = {"relative_position_embedding": True, "gru_rel_pos": True, "num_buckets": 32, "max_distance": 64}
QUANTIZED = {"quantize_targets": True, "latent_vars": 5, "latent_groups": 2, "latent_dim": 8, "num_negatives": 7}
SEVEN = "[(6,10,5)] + [(6,3,2)] * 4 + 2*[(6,2,2)]"
HUBERT = {
    "base": (BASE, False),
    "large": (LARGE, True),
    "mhubert": (BASE | {"logit_temp": 0.2}, True),
    "seven-convolutions": (BASE | {"conv_feature_layers": SEVEN, "conv_pos": 9}, False),
    "no-projection": (BASE | {"conv_feature_layers": "[(16,16,16), (16,25,20)]"}, False),
}
WAV2VEC2 = {
    "base": (BASE | QUANTIZED, False),
    "xls-r": (LARGE | QUANTIZED | {"conv_bias": True}, True),
    "not-quantized": (BASE, False),
    "deep-quantizer": (BASE | QUANTIZED | {"quantizer_depth": 2, "quantizer_factor": 3}, False),
}
WAVLM = {"base": (BASE | BIAS, False), "large": (LARGE | BIAS, True)}
UNITS = [str(k) for k in range(7)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def hubert(variant: str, symbols: list | None = None, **changes):
    cfg, normalize = HUBERT[variant]
    model_cfg = {"_name": "hubert", "label_rate": 50.0, **cfg, **changes}
    task_cfg = {"_name": "hubert_pretraining", "normalize": normalize, "label_rate": 50.0, "labels": ["km"]}
    symbols = symbols or [[*SPECIALS, *UNITS]]
    model = s3prl_peer.randomised(s3prl_peer.hubert(model_cfg, task_cfg, symbols))
    return model, model_cfg, task_cfg, symbols


def wav2vec2(variant: str):
    cfg, normalize = WAV2VEC2[variant]
    model_cfg, task_cfg = {"_name": "wav2vec2", **cfg}, {"_name": "audio_pretraining", "normalize": normalize}
    return s3prl_peer.randomised(s3prl_peer.wav2vec2(model_cfg)), model_cfg, task_cfg


def wavlm(variant: str):
    cfg, normalize = WAVLM[variant]
    cfg = cfg | {"normalize": normalize}
    return s3prl_peer.randomised(s3prl_peer.wavlm(cfg)), cfg


def waveform(samples: int = SAMPLES, seed: int = 1) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(samples).astype(np.float32) + 0.02


_encode = jax.jit(
    lambda encoder, waveform, valid: encode(encoder, waveform, valid, formulation=formulation_for("cpu")),
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)


def compare(checkpoint, model) -> float:
    """Largest difference over s3prl's hidden states, which are ours one for one."""
    cfg = checkpoint.encoder
    ours = _encode(to_encoder(checkpoint), waveform()[None], None)
    theirs = s3prl_peer.hidden_states(model, [torch.from_numpy(waveform())], normalize=cfg.normalize_waveform)
    assert len(ours.hidden) == len(theirs) == cfg.layers + 1
    for one, other in zip(ours.hidden, theirs, strict=True):
        assert one.shape == other.shape and other.std() > 0.01
    return max(float(np.abs(np.asarray(a) - b.numpy()).max()) for a, b in zip(ours.hidden, theirs, strict=True))


def same(stored, parameter: torch.Tensor) -> bool:
    return np.array_equal(stored.read(), parameter.detach().numpy())


class Dictionary:
    """Pickled as `fairseq.data.dictionary.Dictionary`, with the attributes that it has."""

    def __init__(self, symbols):
        self.symbols = symbols
        self.count = [1] * len(symbols)
        self.indices = {symbol: k for k, symbol in enumerate(symbols)}
        self.bos_word, self.pad_word, self.eos_word, self.unk_word = SPECIALS
        self.bos_index, self.pad_index, self.eos_index, self.unk_index = range(4)
        self.nspecial = 4


def save_as_fairseq(path, *, monkeypatch, model, dictionaries=None, **state):
    """Saves as fairseq's trainer does, omegaconf nodes and Dictionary objects included."""
    file = types.ModuleType("fairseq.data.dictionary")
    file.Dictionary = Dictionary
    with monkeypatch.context() as patch:
        for name in ("fairseq", "fairseq.data"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, file.__name__, file)
        patch.setattr(Dictionary, "__module__", file.__name__)
        task_state = {"dictionaries": [Dictionary(names) for names in dictionaries]} if dictionaries else {}
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])
        content = {
            "args": None,
            "cfg": None,
            "model": model,
            "criterion": None,
            "optimizer_history": [{"criterion_name": "HubertCriterion", "num_updates": 400_000}],
            "task_state": task_state,
            "extra_state": {"train_iterator": {"epoch": 3}, "previous_training_time": np.float64(1.5)},
            "last_optimizer_state": optimizer.state_dict(),
        }
        torch.save(content | state, path)


# ------------------------------------------------------------------------------------------------------------ inwards


@pytest.mark.parametrize("variant", HUBERT)
def test_hubert_of_s3prl_comes_in(variant, tmp_path):
    model, model_cfg, task_cfg, symbols = hubert(variant)
    state = {"task_cfg": task_cfg, "model_cfg": model_cfg, "model_weight": model.state_dict()}
    torch.save(state | {"dictionaries_symbols": symbols}, tmp_path / "hubert.pt")
    found = fairseq.read(tmp_path / "hubert.pt")
    assert (found.layout, found.model_type) == ("s3prl", "hubert") and found.encoder.waveform_epsilon == 1e-5
    assert compare(found, model) < TOLERANCE
    assert same(found.heads["label_specials"], model.label_embs_concat[:4])
    assert same(found.heads["label_embeddings"], model.label_embs_concat[4:])
    assert same(found.heads["final_proj.weight"], model.final_proj.weight)
    assert same(found.heads["final_proj.bias"], model.final_proj.bias)
    assert found.settings["dictionaries"] == [UNITS] and found.settings["label_rate"] == 50.0
    assert found.settings["temperature"] == model.logit_temp
    assert same(found.tensors["masked_spec_embed"], model.mask_emb)


@pytest.mark.parametrize("variant", WAV2VEC2)
def test_wav2vec2_of_s3prl_comes_in(variant, tmp_path):
    model, model_cfg, task_cfg = wav2vec2(variant)
    torch.save({"task_cfg": task_cfg, "model_cfg": model_cfg, "model_weight": model.state_dict()}, tmp_path / "x.pt")
    found = fairseq.read(tmp_path / "x.pt")
    assert (found.layout, found.model_type) == ("s3prl", "wav2vec2")
    assert compare(found, model) < TOLERANCE
    assert same(found.heads["project_hid.weight"], model.final_proj.weight)
    assert same(found.heads["project_q.bias"], model.project_q.bias)
    if model.quantizer is not None:
        assert same(found.heads["quantizer.codevectors"], model.quantizer.vars) and found.settings["negatives"] == 7


@pytest.mark.parametrize("variant", WAVLM)
def test_wavlm_of_unilm_comes_in(variant, tmp_path):
    model, cfg = wavlm(variant)
    torch.save({"cfg": cfg, "model": model.state_dict()}, tmp_path / "wavlm.pt", _use_new_zipfile_serialization=False)
    found = fairseq.read(tmp_path / "wavlm.pt")
    assert (found.layout, found.model_type, found.encoder.bias_max_distance) == ("unilm", "wavlm", 64)
    assert compare(found, model) < TOLERANCE


def test_a_training_checkpoint_of_fairseq_comes_in(tmp_path, monkeypatch):
    model, model_cfg, task_cfg, symbols = hubert("large")
    cfg = omegaconf.OmegaConf.create(
        {
            "common": {"fp16": True},
            "model": model_cfg | {"label_rate": "${task.label_rate}", "conv_pos_batch_norm": False, "w2v_path": "???"},
            "task": task_cfg | {"data": "/data"},
        }
    )
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    save_as_fairseq(tmp_path / "best.pt", monkeypatch=monkeypatch, model=half, dictionaries=symbols, cfg=cfg)
    found = fairseq.read(tmp_path / "best.pt")
    assert (found.layout, found.model_type) == ("fairseq", "hubert")
    model.load_state_dict(half)  # rounded
    assert compare(found, model) < TOLERANCE
    assert found.settings["dictionaries"] == [UNITS] and found.settings["label_rate"] == 50.0
    assert any("optimizer" in note for note in found.notes)


def test_an_old_checkpoint_with_a_namespace_comes_in(tmp_path, monkeypatch):
    model, model_cfg, _ = wav2vec2("xls-r")
    model_cfg["latent_temp"] = "(2,0.1,0.999995)"
    args = argparse.Namespace(arch="wav2vec2", task="audio_pretraining", normalize=True, data=["/data"], **model_cfg)
    save_as_fairseq(tmp_path / "old.pt", monkeypatch=monkeypatch, model=model.state_dict(), args=args)
    found = fairseq.read(tmp_path / "old.pt")
    assert (found.layout, found.model_type) == ("fairseq", "wav2vec2") and found.encoder.extractor_bias
    assert compare(found, model) < TOLERANCE
    assert found.settings["fairseq"]["latent_temp"] == [2, 0.1, 0.999995]


def test_newer_weight_norm_and_the_wavlm_of_unispeech_come_in(tmp_path, monkeypatch):
    model, cfg = wavlm("base")
    weights = {
        name.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): tensor
        for name, tensor in model.state_dict().items()
    }
    head = {"final_proj.weight": torch.randn(6, 16), "final_proj.bias": torch.randn(6)}
    head["label_embs_concat"] = torch.randn(11, 6)
    cfg = {"model": {"_name": "wavlm", **cfg, "expand_attention_head_size": -1}, "task": {"normalize": False}}
    save_as_fairseq(tmp_path / "x.pt", monkeypatch=monkeypatch, model=weights | head, cfg=cfg)
    found = fairseq.read(tmp_path / "x.pt")
    assert (found.layout, found.model_type) == ("fairseq", "wavlm")
    assert compare(found, model) < TOLERANCE
    assert same(found.heads["label_embeddings"], head["label_embs_concat"][4:])


def test_two_label_sets_are_taken_apart_and_put_together(tmp_path):
    symbols = [[*SPECIALS, "a", "b"], [*SPECIALS, "2", "0", "1"]]
    model, model_cfg, task_cfg, _ = hubert("base", symbols, untie_final_proj=True)
    state = {"task_cfg": task_cfg, "model_cfg": model_cfg, "model_weight": model.state_dict()}
    torch.save(state | {"dictionaries_symbols": symbols}, tmp_path / "x.pt")
    found = fairseq.read(tmp_path / "x.pt")
    rows = model.label_embs_concat
    assert same(found.heads["label_embeddings"], torch.cat([rows[4:6], rows[10:13]]))
    assert same(found.heads["label_specials"], torch.cat([rows[0:4], rows[6:10]]))
    assert found.settings["dictionaries"] == [["a", "b"], ["2", "0", "1"]] and found.settings["untie_final_proj"]
    assert any("order" in note for note in found.notes)
    fairseq.write(found, tmp_path / "out", layout="s3prl")
    again = s3prl_peer.load(tmp_path / "out" / fairseq.MODEL_FILE)
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name]), name


class FineTuned(torch.nn.Module):
    """fairseq's Wav2VecCtc and HubertCtc: `w2v_encoder.w2v_model` without its heads, and `w2v_encoder.proj`."""

    def __init__(self, model, symbols: int):
        super().__init__()
        model.remove_pretraining_modules()
        self.w2v_encoder = torch.nn.Module()
        self.w2v_encoder.w2v_model = model
        self.w2v_encoder.proj = torch.nn.Linear(16, symbols)


@pytest.mark.parametrize("kind", ["hubert", "wav2vec2", "namespace"])
def test_fine_tuned_with_ctc_both_ways(kind, tmp_path, monkeypatch):
    if kind == "hubert":
        model, model_cfg, task_cfg, _ = hubert("large", [None])
    else:
        model, model_cfg, task_cfg = wav2vec2("xls-r")
    tuned = FineTuned(model, 9)
    name = "hubert_ctc" if kind == "hubert" else "wav2vec_ctc"
    args = {"model": model_cfg, "task": task_cfg}
    said = {"cfg": {"model": {"_name": name, "w2v_args": args, "w2v_path": "/x.pt"}, "task": {"normalize": True}}}
    if kind == "namespace":
        inner = argparse.Namespace(arch="wav2vec2", normalize=True, **model_cfg)
        said = {"args": argparse.Namespace(arch=name, w2v_args=inner, normalize=True)}
    save_as_fairseq(tmp_path / "tuned.pt", monkeypatch=monkeypatch, model=tuned.state_dict(), **said)

    found = fairseq.read(tmp_path / "tuned.pt")
    assert found.model_type == ("hubert" if kind == "hubert" else "wav2vec2")
    assert compare(found, model) < TOLERANCE
    assert same(found.heads["lm_head.weight"], tuned.w2v_encoder.proj.weight)
    fairseq.write(found, tmp_path / "out")
    state = torch.load(tmp_path / "out" / fairseq.MODEL_FILE, weights_only=True)
    assert state["cfg"]["model"]["_name"] == name and state["cfg"]["model"]["w2v_args"]["task"]["normalize"] is True
    tuned.load_state_dict(state["model"], strict=True)
    again = fairseq.read(tmp_path / "out")
    assert again.encoder == found.encoder and again.heads.keys() == found.heads.keys() == {
        "lm_head.weight",
        "lm_head.bias",
    }


# ----------------------------------------------------------------------------------------------------------- outwards


def ours(found, heads: dict | None = None):
    """A checkpoint of the same architecture that never was a file, with values of its own."""
    rng = np.random.default_rng(3)
    encoder = to_encoder(found)
    encoder = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), encoder)
    return from_encoder(encoder, head=heads, model_type=found.model_type, settings=found.settings)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("layout", ["fairseq", "s3prl"])
@pytest.mark.parametrize("variant", HUBERT)
def test_our_hubert_loads_there(variant, layout, tmp_path):
    model, model_cfg, task_cfg, symbols = hubert(variant)
    state = {"task_cfg": task_cfg, "model_cfg": model_cfg, "model_weight": model.state_dict()}
    torch.save(state | {"dictionaries_symbols": symbols}, tmp_path / "x.pt")
    heads = {"final_proj.weight": random(5, 16), "final_proj.bias": random(5), "label_embeddings": random(7, 5)}
    checkpoint = ours(fairseq.read(tmp_path / "x.pt"), heads)
    if variant == "no-projection":
        with pytest.raises(ConvertError, match="not the identity"):
            fairseq.write(checkpoint, tmp_path / "out", layout=layout)
        projection = {name: t for name, t in fairseq.read(tmp_path / "x.pt").tensors.items() if "projection.p" in name}
        checkpoint.tensors.update(projection)
    assert fairseq.write(checkpoint, tmp_path / "out", layout=layout) == ("README.md", "checkpoint.pt")
    load = s3prl_peer.load if layout == "s3prl" else s3prl_peer.load_fairseq
    loaded = load(tmp_path / "out" / "checkpoint.pt")
    assert compare(checkpoint, loaded) < TOLERANCE
    for name in ("weight", "bias"):
        np.testing.assert_array_equal(loaded.final_proj.state_dict()[name].numpy(), heads[f"final_proj.{name}"])
    np.testing.assert_array_equal(loaded.label_embs_concat[4:].detach().numpy(), heads["label_embeddings"])
    specials = loaded.label_embs_concat[:4].detach()
    assert 0 <= specials.min() and specials.max() <= 1 and specials.std() > 0.1  # drawn, as fairseq draws them
    back = fairseq.read(tmp_path / "out")
    assert back.encoder == checkpoint.encoder and back.heads.keys() == heads.keys() and back.layout == layout
    assert back.settings == checkpoint.settings | {"dictionaries": [UNITS]}
    assert all(np.array_equal(back.tensors[name].read(), t.values()) for name, t in checkpoint.tensors.items())


@pytest.mark.parametrize("layout", ["fairseq", "s3prl"])
@pytest.mark.parametrize("variant", WAV2VEC2)
def test_our_wav2vec2_loads_there(variant, layout, tmp_path):
    model, model_cfg, task_cfg = wav2vec2(variant)
    torch.save({"task_cfg": task_cfg, "model_cfg": model_cfg, "model_weight": model.state_dict()}, tmp_path / "x.pt")
    found = fairseq.read(tmp_path / "x.pt")
    checkpoint = ours(found, {name: tensor.values() + 0.5 for name, tensor in found.heads.items()})
    fairseq.write(checkpoint, tmp_path / "out", layout=layout)
    loaded = (s3prl_peer.load if layout == "s3prl" else s3prl_peer.load_fairseq)(tmp_path / "out" / "checkpoint.pt")
    assert compare(checkpoint, loaded) < TOLERANCE
    theirs = loaded.state_dict()
    for name, tensor in checkpoint.heads.items():
        there = name.replace("project_hid", "final_proj").replace("codevectors", "vars")
        np.testing.assert_array_equal(theirs[there].numpy(), tensor.values(), err_msg=name)
    if loaded.quantizer is not None:
        assert (loaded.quantizer.groups, loaded.quantizer.num_vars, loaded.n_negatives) == (2, 5, 7)
    back = fairseq.read(tmp_path / "out")
    assert back.encoder == checkpoint.encoder and back.heads.keys() == checkpoint.heads.keys()


@pytest.mark.parametrize("layout", ["unilm", "s3prl"])
@pytest.mark.parametrize("variant", WAVLM)
def test_our_wavlm_loads_there(variant, layout, tmp_path):
    model, cfg = wavlm(variant)
    torch.save({"cfg": cfg, "model": model.state_dict()}, tmp_path / "x.pt")
    heads = {"final_proj.weight": random(5, 16), "final_proj.bias": random(5), "label_embeddings": random(7, 5)}
    checkpoint = ours(fairseq.read(tmp_path / "x.pt"), heads)
    files = fairseq.write(checkpoint, tmp_path / "out", layout=layout)
    assert files == ("README.md", "checkpoint.pt", "pretraining_head.safetensors")
    loaded = s3prl_peer.load(tmp_path / "out" / "checkpoint.pt")
    assert compare(checkpoint, loaded) < TOLERANCE
    back = fairseq.read(tmp_path / "out")
    assert back.encoder == checkpoint.encoder and back.layout == "unilm"
    assert all(np.array_equal(back.heads[name].read(), heads[name]) for name in heads)


def test_bare_encoders_load_with_zeros_in_the_heads_places(tmp_path):
    model, model_cfg, task_cfg, symbols = hubert("base")
    state = {"task_cfg": task_cfg, "model_cfg": model_cfg, "model_weight": model.state_dict()}
    torch.save(state | {"dictionaries_symbols": symbols}, tmp_path / "x.pt")
    found = fairseq.read(tmp_path / "x.pt")
    for model_type, made_up in (("hubert", "final_proj"), ("wav2vec2", "project_hid, project_q")):
        checkpoint = from_encoder(to_encoder(found), model_type=model_type)
        fairseq.write(checkpoint, tmp_path / model_type, layout="s3prl")
        loaded = s3prl_peer.load(tmp_path / model_type / "checkpoint.pt")
        assert compare(checkpoint, loaded) < TOLERANCE and not loaded.final_proj.weight.any()
        assert f"demands it: {made_up}." in (tmp_path / model_type / "README.md").read_text()
        assert not fairseq.read(tmp_path / model_type).heads


def test_what_we_write_is_what_torch_would_have(tmp_path):
    """The same content by torch.save and by our writer loads as the same."""
    model, model_cfg, task_cfg = wav2vec2("base")
    torch.save({"task_cfg": task_cfg, "model_cfg": model_cfg, "model_weight": model.state_dict()}, tmp_path / "x.pt")
    fairseq.write(fairseq.read(tmp_path / "x.pt"), tmp_path / "out", layout="s3prl")
    theirs, ours = (torch.load(path, weights_only=True) for path in (tmp_path / "x.pt", tmp_path / "out/checkpoint.pt"))
    assert ours["model_weight"].keys() == theirs["model_weight"].keys()
    for name, tensor in theirs["model_weight"].items():
        assert (
            torch.equal(tensor, ours["model_weight"][name]) and tensor.stride() == ours["model_weight"][name].stride()
        )
    assert ours["model_cfg"].items() >= model_cfg.items()
    assert ours["task_cfg"].items() >= task_cfg.items()
    assert not fairseq.read(tmp_path / "out").heads.keys() - fairseq.read(tmp_path / "x.pt").heads.keys()
    assert read_torch_file(tmp_path / "out" / "checkpoint.pt")["wavlab_jax"]["made_up"] == []


# ------------------------------------------------------------------------------------------------------------ padding


@pytest.mark.parametrize("kind", ["hubert", "wavlm", "wav2vec2"])
def test_real_frames_of_a_padded_batch_are_counted_as_there(kind, tmp_path):
    """fairseq's HuBERT and unilm's WavLM put samples into bins, wav2vec 2.0 counts by the convolutions."""
    if kind == "hubert":
        model, model_cfg, task_cfg, symbols = hubert("large")
        state = {"task_cfg": task_cfg, "model_cfg": model_cfg, "dictionaries_symbols": symbols}
    elif kind == "wav2vec2":
        model, model_cfg, task_cfg = wav2vec2("xls-r")
        state = {"task_cfg": task_cfg, "model_cfg": model_cfg}
    else:
        model, cfg = wavlm("large")
        state = {"cfg": cfg, "model": model.state_dict()}
    torch.save(state | ({} if kind == "wavlm" else {"model_weight": model.state_dict()}), tmp_path / "x.pt")
    found = fairseq.read(tmp_path / "x.pt")
    assert found.encoder.valid_frames == ("convolution" if kind == "wav2vec2" else "fairseq_bins")
    lengths = (SAMPLES, 15_000)
    rows = [waveform(length, seed=length) for length in lengths]
    theirs = s3prl_peer.hidden_states(model, [torch.from_numpy(row) for row in rows], normalize=True)
    padded = np.stack([np.pad(row, (0, SAMPLES - len(row))) for row in rows])
    ours = _encode(to_encoder(found), padded, np.arange(SAMPLES) < np.array(lengths)[:, None])
    real = np.asarray(ours.valid)
    assert real[1].sum() == (46 if kind == "wav2vec2" else 47)  # (15000 - 400) // 320 + 1; ceil(15000 / (24191 // 75))
    for one, other in zip(ours.hidden, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(one)[real], other.numpy()[real], atol=TOLERANCE)
