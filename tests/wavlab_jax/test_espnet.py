"""ESPnet's checkpoints against ESPnet's own encoder around torchaudio's classes, whose weights are not ours."""

import dataclasses
import os
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import yaml

from tests.wavlab_jax import torchaudio_peer
from tests.wavlab_jax.test_torchaudio import TOLERANCE, VARIANTS, assert_same, compare, encode_row
from wavlab_jax.convert import ConvertError, espnet, to_encoder, torchaudio
from wavlab_jax.encoder import EncoderConfig

pytestmark = pytest.mark.torch

UNITS, DIM = 7, 5
PUBLISHED = [[512, 10, 5], *[[512, 3, 2]] * 4, *[[512, 2, 2]] * 2]
# ESPnet applies no normalisation unless it is asked to.
PLAIN = {name: dataclasses.replace(cfg, normalize_waveform=False) for name, cfg in VARIANTS.items()}


def make(cfg: EncoderConfig) -> tuple[str, torch.nn.Module]:
    """The attribute of ESPnet's encoder, and the encoder itself, whose state dict has that prefix."""
    if not cfg.relative_bias:
        encoder = torchaudio_peer.espnet_encoder(
            input_size=1, num_classes=UNITS, final_dim=DIM, **torchaudio_peer.arguments(cfg)
        )
        torchaudio_peer.randomised(encoder)
        return "hubert_pretrain_model", encoder
    # newer than ESPnet's last release: espnet2/asr/encoder/wavlm_encoder.py
    encoder = torch.nn.Module()
    model = torchaudio_peer.pretraining_wavlm(num_classes=UNITS, final_dim=DIM, **torchaudio_peer.arguments(cfg))
    encoder.wavlm_pretrain_model = torchaudio_peer.randomised(model)
    encoder.register_buffer("global_step", torch.zeros(1, dtype=torch.long))
    return "wavlm_pretrain_model", encoder


def write_theirs(folder, cfg: EncoderConfig, *, name: str = "5epoch.pth", **changes) -> torch.nn.Module:
    """A folder as ESPnet leaves it: state dict and config.yaml; returns the encoder."""
    attribute, encoder = make(cfg)
    config = {
        "input_size": 1,
        "num_classes": UNITS,
        "token_list": [*"gfedcba", "<unk>", "<sos/eos>"],  # by frequency, not in the order of clusters
        "collate_fn_conf": {"label_downsampling": 2, "pad": False},
        "frontend": None,
        "normalize": None,
        "encoder": {"hubert_pretrain_model": "torchaudio_hubert"}.get(attribute, "torchaudio_wavlm"),
        "encoder_conf": {**torchaudio_peer.arguments(cfg), "final_dim": DIM, "mask_prob": 0.65},
        "batch_bins": 4_000_000,
        **changes,
    }
    torch.save({f"encoder.{key}": value for key, value in encoder.state_dict().items()}, folder / name)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return getattr(encoder, attribute)


@pytest.mark.parametrize("variant", ["hubert-base", "hubert-large", "wavlm-large"])
def test_both_ways(variant, tmp_path):
    cfg = dataclasses.replace(PLAIN[variant], feature_gradient_scale=0.1)  # ESPnet's default, which its Large keeps
    model = write_theirs(tmp_path, cfg)
    assert espnet.matches(tmp_path) and espnet.matches(tmp_path / "5epoch.pth")
    assert not torchaudio.matches(tmp_path / "5epoch.pth")
    checkpoint = espnet.read(tmp_path)
    assert checkpoint.encoder == cfg and checkpoint.layout == "espnet"
    assert checkpoint.left_over == ("encoder.global_step",)
    assert checkpoint.settings == {"dictionaries": [[*"gfedcba"]], "label_rate": 100, "temperature": 0.1}
    assert len(checkpoint.notes) == 1 and "not normalised" in checkpoint.notes[0]
    encoder = to_encoder(checkpoint)
    assert compare(encoder, model.wav2vec2) < TOLERANCE

    assert espnet.write(checkpoint, tmp_path / "out") == ("README.md", "config.yaml", "model.pth")
    state = torch.load(tmp_path / "out/model.pth", weights_only=True)
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    if cfg.relative_bias:
        conf = {key: value for key, value in config["encoder_conf"].items() if key != "feature_grad_mult"}
        built = torch.nn.Module()
        built.wavlm_pretrain_model = torchaudio_peer.pretraining_wavlm(num_classes=config["num_classes"], **conf)
        built.register_buffer("global_step", torch.zeros(1, dtype=torch.long))
        again = built.wavlm_pretrain_model
    else:
        # HubertTask.build_model
        built = torchaudio_peer.espnet_encoder(
            input_size=config["input_size"], num_classes=config["num_classes"], **config["encoder_conf"]
        )
        again = built.hubert_pretrain_model
    built.load_state_dict({key.removeprefix("encoder."): value for key, value in state.items()}, strict=True)
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    back = espnet.read(tmp_path / "out")
    assert_same(back, checkpoint)
    assert (back.encoder, back.settings) == (checkpoint.encoder, checkpoint.settings)


def test_settings_of_the_recipes():
    """egs2/librispeech/{hubert1,wavlm1}/conf/tuning: Base says nothing, Large this; WavLabLM is of that kind."""
    large = {
        "encoder_projection_dropout": 0.0,
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_drop": 0.0,
        "extractor_mode": "layer_norm",
        "encoder_embed_dim": 1024,
        "encoder_num_layers": 24,
        "encoder_num_heads": 16,
        "encoder_ff_interm_features": 4096,
        "encoder_layer_norm_first": True,
        "final_dim": 768,
    }

    def architecture(conf, kind="torchaudio_hubert", **config):
        said = {"encoder": kind, "encoder_conf": conf, "normalize": None, **config}
        return espnet.architecture_of(said, kind, None, where="config.yaml")[0]

    assert architecture({}) == EncoderConfig()
    expected = EncoderConfig(
        extractor_norm="layer",
        width=1024,
        layers=24,
        heads=16,
        feed_forward=4096,
        pre_norm=True,
        dropout=0.0,
        attention_dropout=0.0,
        projection_dropout=0.0,
        layerdrop=0.0,
    )
    assert architecture(large) == expected
    wavlm = architecture({**large, "encoder_num_buckets": 320, "encoder_max_distance": 1280}, "torchaudio_wavlm")
    assert wavlm == dataclasses.replace(expected, relative_bias=True, bias_max_distance=1280)
    normalised = {"normalize": "utterance_mvn", "normalize_conf": {"norm_vars": True}}
    assert architecture(large, **normalised).normalize_waveform
    assert architecture({"extractor_conv_layer_config": PUBLISHED, "feature_grad_mult": None}) == EncoderConfig(
        feature_gradient_scale=1.0
    )


def test_what_training_leaves(tmp_path):
    """checkpoint.pth, links, torch.compile's and DeepSpeed's wrappings, and old weight norm, are the same model."""
    cfg = PLAIN["hubert-base"]
    write_theirs(tmp_path, cfg)
    plain = espnet.read(tmp_path)
    state = torch.load(tmp_path / "5epoch.pth", weights_only=True)
    os.symlink("5epoch.pth", tmp_path / "latest.pth")
    compiled = {key.replace("encoder.", "encoder._orig_mod.", 1): value for key, value in state.items()}
    torch.save({"model": compiled, "reporter": {"epoch": 5}, "optimizers": []}, tmp_path / "checkpoint.pth")
    for name in ("", "latest.pth", "checkpoint.pth"):
        assert_same(espnet.read(tmp_path / name), plain)
    (tmp_path / "cache").mkdir()
    for name in ("5epoch.pth", "config.yaml"):
        os.symlink(tmp_path / name, tmp_path / "cache" / name)
    assert_same(espnet.read(tmp_path / "cache"), plain)
    old = {key.replace("parametrizations.weight.original0", "weight_g"): value for key, value in state.items()}
    old = {key.replace("parametrizations.weight.original1", "weight_v"): value for key, value in old.items()}
    torch.save({"module": old}, tmp_path / "old.pth")
    assert_same(espnet.read(tmp_path / "old.pth"), plain)
    with pytest.raises(ConvertError, match="must have one .pth, has 5epoch.pth, old.pth; name the file"):
        espnet.read(tmp_path)
    (tmp_path / "config.yaml").unlink()
    assert_same(espnet.read(tmp_path / "old.pth", architecture=cfg), plain)
    with pytest.raises(ConvertError, match="config.yaml does not exist"):
        espnet.read(tmp_path / "old.pth")


def test_normalisation_and_heads_without_a_slot_come_back(tmp_path):
    cfg = VARIANTS["hubert-large"]
    write_theirs(tmp_path, PLAIN["hubert-large"])
    given = espnet.read(tmp_path, architecture=cfg)
    assert given.encoder == cfg and not given.notes
    heads = {"lm_head.weight": np.ones((4, cfg.width), np.float32), "lm_head.bias": np.ones(4, np.float32)}
    heads = {name: torchaudio.StoredTensor.of(name, array) for name, array in heads.items()}
    checkpoint = dataclasses.replace(given, heads=heads, settings={})
    assert "pretraining_head.safetensors" in espnet.write(checkpoint, tmp_path / "out")
    text = (tmp_path / "out/config.yaml").read_text()
    assert "# The checkpoint has no HuBERT head" in text and "utterance_mvn" in text
    back = espnet.read(tmp_path / "out")
    assert back.encoder == cfg
    assert_same(back, checkpoint)


def test_utterance_normalisation_is_theirs(tmp_path):
    """ESPnet's own UtteranceMVN before the encoder, quiet and silent audio too."""
    cfg = PLAIN["hubert-large"]
    write_theirs(tmp_path, cfg, normalize="utterance_mvn", normalize_conf={"norm_vars": True})
    checkpoint = espnet.read(tmp_path)
    assert checkpoint.encoder.normalize_waveform and "S3PRL" in checkpoint.notes[0]
    normalised, plain = (to_encoder(dataclasses.replace(checkpoint, encoder=c)) for c in (checkpoint.encoder, cfg))
    rng = np.random.default_rng(0)
    for level in (0.1, 1e-5, 0.0):
        waveform = (level * (rng.standard_normal((1, 8_000)) + 0.3)).astype(np.float32)
        theirs = torchaudio_peer.espnet_normalisation(norm_vars=True)(torch.from_numpy(waveform.copy()))[0].numpy()
        ours = encode_row(normalised, waveform, None).hidden[-1]
        assert np.abs(np.asarray(ours - encode_row(plain, theirs, None).hidden[-1])).max() < TOLERANCE


REFUSED = {
    "another encoder": ({"encoder": "hubert_pretrain"}, "encoder is 'hubert_pretrain', but the parameters are"),
    "a front end": ({"input_size": None, "frontend": "default"}, "hears a frontend, not waveforms"),
    "a pre-encoder": ({"preencoder": "sinc"}, "hears a preencoder"),
    "means only": (
        {"normalize": "utterance_mvn", "normalize_conf": {}},
        "normalize is 'utterance_mvn' (norm_means True, norm_vars False)",
    ),
    "global statistics": ({"normalize": "global_mvn"}, "normalize is 'global_mvn'"),
    "an unknown argument": ({"encoder_conf": {"use_flash_attn": True}}, "encoder_conf has use_flash_attn"),
    "a wrong type": ({"encoder_conf": {"encoder_num_heads": "12"}}, "encoder_num_heads is '12', which is no int"),
    "another grid": ({"encoder_conf": {"extractor_conv_layer_config": [[8, 10, 5]]}}, "frame of 10 samples"),
    "no convolutions": ({"encoder_conf": {"extractor_conv_layer_config": "[(8, 10, 5)]"}}, "not a list of"),
    "another mode": ({"encoder_conf": {"extractor_mode": "default"}}, "group_norm or layer_norm"),
    "other classes": ({"num_classes": 9}, "num_classes is 9, but label_embeddings has 7 rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configurations_that_are_refused(case, tmp_path):
    changes, message = REFUSED[case]
    write_theirs(tmp_path, PLAIN["hubert-base"], **changes)
    with pytest.raises(ConvertError, match=re.escape(message)):
        espnet.read(tmp_path)


@pytest.mark.parametrize("entry", ["encoder", "normalize", "token_list", "num_classes"])
def test_values_that_multiply_are_refused(entry, tmp_path):
    """Ten levels of aliases: ten lines that stand for 10^10 values, and a message that would print them."""
    write_theirs(tmp_path, PLAIN["hubert-base"])
    config = yaml.safe_load((tmp_path / "config.yaml").read_text()) | {entry: "BOMB"}
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    bomb = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x, x]", *levels, ""])
    (tmp_path / "config.yaml").write_text(bomb + yaml.safe_dump(config).replace("BOMB", "*a9"))
    with pytest.raises(ConvertError, match="config.yaml cannot be read as YAML: aliases are not read"):
        espnet.read(tmp_path)
    # and without aliases no message prints what is inside
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config).replace("BOMB", f"[{', '.join(['[x]'] * 9)}]"))
    with pytest.raises(ConvertError, match=f"{entry} is a list") if entry != "token_list" else nullcontext():
        espnet.read(tmp_path)


def test_damage_is_named(tmp_path):
    cfg = PLAIN["hubert-base"]
    write_theirs(tmp_path, cfg)
    with pytest.raises(ConvertError, match="contradicts the architecture.*heads is 2 there and 4 in architecture"):
        espnet.read(tmp_path, architecture=dataclasses.replace(cfg, heads=4))
    for text in (
        "!!python/object/apply:os.system ['touch hacked']",
        "a: [1",
        "- 1",
        "b: 2026-99-99",
        "\0",
        "a: !!int ''",
        "[" * 9999,
    ):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ConvertError, match="config.yaml"):
            espnet.read(tmp_path)
    torch.save({"encoder.weight": torch.zeros(3)}, tmp_path / "5epoch.pth")
    assert not espnet.matches(tmp_path / "5epoch.pth")
    with pytest.raises(ConvertError, match="it is no such encoder"):
        espnet.read(tmp_path)
    (tmp_path / "5epoch.pth").unlink()
    with pytest.raises(ConvertError, match="must have one .pth, has none"):
        espnet.read(tmp_path)
