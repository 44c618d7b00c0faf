"""torchaudio's state dicts against torchaudio's own classes, whose weights and outputs our code did not write."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.torch
import torch

from tests.wavlab_jax import tiny, torchaudio_peer
from wavlab_jax.convert import ConvertError, from_encoder, to_encoder, torchaudio
from wavlab_jax.convert.checkpoint import MASK_EMBEDDING
from wavlab_jax.convert.torch_files import read_torch_file
from wavlab_jax.convert.torchaudio_settings import infer_architecture
from wavlab_jax.encoder import EncoderConfig, encode, formulation_for
from wavlab_jax.losses import cosine_logits

pytestmark = pytest.mark.torch

TOLERANCE = 1e-4
SAMPLES = 400 + 74 * 320 + 111  # 75 frames: past the largest bucketed distance
UNITS, DIM = 7, 5

BASE = tiny.encoder(dropout=0.1, layerdrop=0.05, feature_gradient_scale=0.1)
LARGE = {"extractor_norm": "layer", "pre_norm": True, "normalize_waveform": True, "feature_gradient_scale": 1.0}
WAVLM = {"relative_bias": True, "bias_buckets": 32, "bias_max_distance": 64}
VARIANTS: dict[str, EncoderConfig] = {
    "hubert-base": BASE,
    "hubert-large": dataclasses.replace(BASE, **LARGE),
    "xls-r": dataclasses.replace(BASE, extractor_bias=True, position_kernel=9, heads=4, **LARGE),
    "mhubert": dataclasses.replace(BASE, normalize_waveform=True),
    "wavlm-base": dataclasses.replace(BASE, **WAVLM),
    "wavlm-large": dataclasses.replace(BASE, **WAVLM, **LARGE),
}
HUBERT = ("hubert-base", "hubert-large")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


def make(cfg: EncoderConfig, *, aux: int | None = None) -> torch.nn.Module:
    builder = "wavlm_model" if cfg.relative_bias else "wav2vec2_model"
    model = getattr(torchaudio_peer.models(), builder)(**torchaudio_peer.arguments(cfg), aux_num_out=aux)
    return torchaudio_peer.randomised(model)


def waveforms(rows: int = 1) -> np.ndarray:
    return 0.1 * np.random.default_rng(1).standard_normal((rows, SAMPLES)).astype(np.float32) + 0.02


encode_row = jax.jit(
    lambda encoder, waveform, mask: encode(encoder, waveform, mask=mask, formulation=formulation_for("cpu")),
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)


def compare(encoder, model) -> float:
    """Largest difference over the convolutions' output and all hidden states, the input and the final norm too."""
    waveform = waveforms()
    ours = encode_row(encoder, waveform, None)
    with torch.no_grad():
        x = torch.from_numpy(waveform)
        if encoder.config.normalize_waveform:
            x = torch.nn.functional.layer_norm(x, x.shape)  # as the bundles' wrapper does
        features, _ = model.feature_extractor(x, None)
        entry = model.encoder.transformer._preprocess(model.encoder._preprocess(features)[0])
        layers, _ = model.extract_features(x)
        last = model.encoder(features)
    theirs = [entry, *layers[:-1], last]
    assert len(ours.hidden) == len(theirs) == encoder.config.layers + 1
    largest = 0.0
    for one, other in [*zip(ours.hidden, theirs, strict=True), (ours.features, features)]:
        assert one.shape == other.shape and other.std() > 0.01
        largest = max(largest, float(np.abs(np.asarray(one) - other.numpy()).max()))
    return largest


@pytest.mark.parametrize("variant", VARIANTS)
def test_import_computes_what_torchaudio_does(variant, tmp_path, record_property):
    cfg = VARIANTS[variant]
    model = make(cfg)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    checkpoint = torchaudio.read(tmp_path / "model.pt", architecture=cfg)
    assert checkpoint.layout == "torchaudio" and checkpoint.encoder == cfg and not checkpoint.left_over
    assert any("no mask embedding" in note for note in checkpoint.notes)
    largest = compare(to_encoder(checkpoint), model)
    record_property("largest difference", largest)
    assert largest < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_loads_strictly_and_comes_back_whole(variant, tmp_path):
    cfg = VARIANTS[variant]
    encoder = to_encoder(torchaudio_checkpoint(make(cfg), tmp_path, cfg))
    files = torchaudio.write(from_encoder(encoder), tmp_path / "out")
    assert files == ("README.md", "model.pt", "pretraining_head.safetensors", "torchaudio.json")
    said = json.loads((tmp_path / "out/torchaudio.json").read_text())
    built = getattr(torchaudio_peer.models(), said["builder"].rpartition(".")[2])(**said["arguments"])
    state = torch.load(tmp_path / "out/model.pt", weights_only=True)
    assert state.keys() == built.state_dict().keys()
    built.load_state_dict(state, strict=True)
    assert compare(encoder, built.eval()) < TOLERANCE
    back = torchaudio.read(tmp_path / "out")
    assert back.encoder == cfg and "no mask embedding" not in " ".join(back.notes)
    assert_same(back, from_encoder(encoder))


@pytest.mark.parametrize("variant", HUBERT)
def test_hubert_pretraining_model_with_its_head(variant, tmp_path, monkeypatch):
    """Logits of masked and unmasked frames, with the mask injected; then back into torchaudio."""
    cfg = VARIANTS[variant]
    model = torchaudio_peer.models().hubert_pretrain_model(
        **torchaudio_peer.arguments(cfg),
        **torchaudio_peer.MASKS,
        num_classes=UNITS,
        final_dim=DIM,
        feature_grad_mult=None,
    )
    model = torchaudio_peer.randomised(model)
    torch.save({"state_dict": {f"model.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "m.pt")
    checkpoint = torchaudio.read(tmp_path / "m.pt", architecture=cfg)
    assert checkpoint.model_type == "hubert" and checkpoint.settings["temperature"] == 0.1
    assert not checkpoint.notes

    torchaudio.write(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out/pretraining_head.safetensors").exists()
    said = json.loads((tmp_path / "out/torchaudio.json").read_text())
    again = torchaudio_peer.models().hubert_pretrain_model(**said["arguments"])
    again.load_state_dict(torch.load(tmp_path / "out/model.pt", weights_only=True), strict=True)
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert_same(torchaudio.read(tmp_path / "out"), checkpoint)

    rng = np.random.default_rng(2)
    mask, labels = rng.random((1, 75)) < 0.5, rng.integers(0, UNITS, (1, 75))
    components = torchaudio_peer.models().model.components
    monkeypatch.setattr(components, "_compute_mask_indices", lambda *_, **__: torch.from_numpy(mask))
    x = torch.from_numpy(waveforms())
    with torch.no_grad():
        x = torch.nn.functional.layer_norm(x, x.shape) if cfg.normalize_waveform else x
        theirs = again.eval()(x, torch.from_numpy(labels))[:2]
    heads = {name: stored.values() for name, stored in checkpoint.heads.items()}
    hidden = np.asarray(encode_row(to_encoder(checkpoint), waveforms(), mask).hidden[-1])
    projected = hidden @ heads["final_proj.weight"].T + heads["final_proj.bias"]
    ours = np.asarray(cosine_logits(projected, heads["label_embeddings"], temperature=0.1))
    for chosen, logits in ((mask, theirs[0].numpy()), (~mask, theirs[1].numpy())):
        # torchaudio puts the target first, and takes it out of its own place
        target = labels[chosen]
        ours_first = np.take_along_axis(ours[chosen], target[:, None], axis=1)
        assert np.abs(ours_first - logits[:, :1]).max() < TOLERANCE
        others = np.arange(UNITS)[None] != target[:, None]
        assert np.isneginf(logits[:, 1:][~others]).all()
        assert np.abs(ours[chosen] - logits[:, 1:])[others].max() < TOLERANCE


@pytest.mark.parametrize("variant", ["xls-r", "wavlm-base"])
def test_ctc_heads_travel(variant, tmp_path):
    cfg = VARIANTS[variant]
    model = make(cfg, aux=UNITS)
    checkpoint = torchaudio_checkpoint(model, tmp_path, cfg)
    assert set(checkpoint.heads) == {"lm_head.weight", "lm_head.bias"}
    assert np.array_equal(checkpoint.heads["lm_head.weight"].values(), model.aux.weight.detach().numpy())
    torchaudio.write(checkpoint, tmp_path / "out")
    said = json.loads((tmp_path / "out/torchaudio.json").read_text())
    assert said["arguments"]["aux_num_out"] == UNITS
    assert_same(torchaudio.read(tmp_path / "out"), checkpoint)


def test_wrappings_and_spellings_are_the_same_model(tmp_path):
    """What torch.compile, DDP, bundles, Lightning, old torch and safetensors make of the names."""
    cfg = VARIANTS["wavlm-base"]
    state = make(cfg).state_dict()
    plain = torchaudio_checkpoint(make(cfg), tmp_path, cfg)
    old = {key.replace("parametrizations.weight.original0", "weight_g"): value for key, value in state.items()}
    old = {key.replace("parametrizations.weight.original1", "weight_v"): value for key, value in old.items()}
    assert old.keys() != state.keys()
    wrapped = {
        "bundle": {f"model.{key}": value for key, value in state.items()},
        "compiled": {f"_orig_mod.{key}".replace("layers.0.", "layers.0._orig_mod."): state[key] for key in state},
        "ddp": {"model": {f"module.model.{key}": value for key, value in state.items()}, "epoch": 3},
        "old": old,
    }
    for name, content in wrapped.items():
        torch.save(content, tmp_path / f"{name}.pt")
        assert torchaudio.matches(tmp_path / f"{name}.pt")
        assert_same(torchaudio.read(tmp_path / f"{name}.pt", architecture=cfg), plain)
    safetensors.torch.save_file(old, tmp_path / "model.safetensors")
    assert torchaudio.matches(tmp_path / "model.safetensors")
    assert_same(torchaudio.read(tmp_path / "model.safetensors", architecture=cfg), plain)
    torch.save({**state, **{f"_orig_mod.{key}": value for key, value in state.items()}}, tmp_path / "twice.pt")
    with pytest.raises(ConvertError, match=r"twice.pt: _orig_mod\S+ is there twice"):
        torchaudio.read(tmp_path / "twice.pt", architecture=cfg)


BUILDERS = {
    "wav2vec2_base": ("group", False),
    "wav2vec2_large": ("group", False),
    "wav2vec2_large_lv60k": ("layer", True),
    "wav2vec2_xlsr_300m": ("layer", True),
    "wav2vec2_xlsr_1b": ("layer", True),
    "wav2vec2_xlsr_2b": ("layer", True),
    "hubert_base": ("group", False),
    "hubert_large": ("layer", False),
    "hubert_xlarge": ("layer", False),
    "wavlm_base": ("group", False),
    "wavlm_large": ("layer", False),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_architecture_of_published_models_is_inferred(name):
    """From the shapes alone of what torchaudio's own factories make; nothing is allocated."""
    norm, bias = BUILDERS[name]
    with torch.device("meta"):
        model = getattr(torchaudio_peer.models(), name)()
    found = {key: torchaudio.StoredTensor(key, tuple(value.shape), None) for key, value in model.state_dict().items()}
    hub = torchaudio.to_hub(found, where=name)
    cfg, notes = infer_architecture({key: stored.shape for key, stored in hub.tensors.items()}, where=name)
    transformer, attention = model.encoder.transformer, model.encoder.transformer.layers[0].attention
    assert (cfg.extractor_norm, cfg.extractor_bias) == (norm, bias)
    assert cfg.pre_norm == transformer.layers[0].layer_norm_first and cfg.normalize_waveform == (norm == "layer")
    assert (cfg.width, cfg.layers, cfg.heads) == (attention.embed_dim, len(transformer.layers), attention.num_heads)
    assert cfg.feed_forward == transformer.layers[0].feed_forward.intermediate_dense.out_features
    position = transformer.pos_conv_embed.conv
    assert (cfg.position_kernel, cfg.position_groups) == (position.kernel_size[0], position.groups)
    assert cfg.extractor_strides == tuple(layer.stride for layer in model.feature_extractor.conv_layers)
    if cfg.relative_bias:
        assert (cfg.bias_buckets, cfg.bias_max_distance) == (attention.num_buckets, attention.max_distance)
    assert notes and torchaudio.fit(cfg, hub.tensors, where=name)


def test_damaged_files_are_named_and_nothing_is_written(tmp_path):
    cfg = VARIANTS["wavlm-base"]
    state = make(cfg).state_dict()

    def read(name: str, changed: dict) -> torchaudio.Checkpoint:
        torch.save({key: value for key, value in (state | changed).items() if value is not None}, tmp_path / name)
        return torchaudio.read(tmp_path / name, architecture=cfg)

    fused = "encoder.transformer.layers.1.attention.attention.in_proj_bias"
    with pytest.raises(ConvertError, match=r"short.pt.*missing: .*layers.1.attention.k_proj.bias"):
        read("short.pt", {fused: None})
    with pytest.raises(ConvertError, match=r"more.pt.*unexpected: decoder.weight"):
        read("more.pt", {"decoder.weight": torch.zeros(3)})
    with pytest.raises(ConvertError, match=r"shape.pt.*encoder.transformer.layer_norm.bias \[3\], not \[16\]"):
        read("shape.pt", {"encoder.transformer.layer_norm.bias": torch.zeros(3)})
    with pytest.raises(ConvertError, match=r"stack.pt: .*in_proj_bias is \[47\], not q, k and v"):
        read("stack.pt", {fused: torch.zeros(47)})
    with pytest.raises(ConvertError, match=r"heads of a wrong shape: aux.weight \[4, 9\]"):
        read("aux.pt", {"aux.weight": torch.zeros(4, 9), "aux.bias": torch.zeros(4)})
    with pytest.raises(ConvertError, match="unexpected.*gru_rel_pos"):
        torchaudio.read(tmp_path / "more.pt", architecture=VARIANTS["hubert-base"])
    for name, value in (("nan", float("nan")), ("huge", 3e37)):
        checkpoint = read(f"{name}.pt", {fused: torch.full((48,), value)})
        with pytest.raises(ConvertError, match=rf"{name}.pt: {fused}"):
            torchaudio.write(checkpoint, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    sound = read("sound.pt", {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(ConvertError, match="full exists already"):
        torchaudio.write(sound, tmp_path / "full")
    with pytest.raises(ConvertError, match="norm_epsilon"):
        torchaudio.write(
            dataclasses.replace(sound, encoder=dataclasses.replace(cfg, norm_epsilon=1e-6)), tmp_path / "x"
        )


def torchaudio_checkpoint(model, folder, cfg):
    """The checkpoint of a torchaudio model, through a file."""
    torch.save(model.state_dict(), folder / "theirs.pt")
    return torchaudio.read(folder / "theirs.pt", architecture=cfg)


def assert_same(one, other):
    """The same tensors and heads, bit for bit, but for a mask embedding that was drawn."""
    for ours, theirs in ((one.tensors, other.tensors), (one.heads, other.heads)):
        assert set(ours) == set(theirs)
        for name in ours:
            assert np.array_equal(ours[name].values(), theirs[name].values()), name


def test_the_side_file_keeps_what_has_no_slot(tmp_path):
    """Two label sets, a quantizer and the mask embedding: torchaudio's classes have no place for them."""
    cfg = VARIANTS["hubert-base"]
    sound = torchaudio_checkpoint(make(cfg), tmp_path, cfg)
    rng = np.random.default_rng(0)
    head = {
        "final_proj.weight": rng.normal(size=(2 * DIM, cfg.width)),
        "final_proj.bias": rng.normal(size=2 * DIM),
        "label_embeddings": rng.normal(size=(2 * UNITS, DIM)),
        "label_specials": rng.normal(size=(4, DIM)),
        "quantizer.codevectors": rng.normal(size=(1, 6, 4)),
    }
    head = {name: value.astype(np.float32) for name, value in head.items()}
    settings = {"dictionaries": [["a"] * UNITS, ["b"] * UNITS], "temperature": 0.1}
    checkpoint = from_encoder(to_encoder(sound), head=head, settings=settings)
    files = torchaudio.write(checkpoint, tmp_path / "out")
    assert "pretraining_head.safetensors" in files
    state = read_torch_file(tmp_path / "out/model.pt")
    assert not any(key.startswith(("logit_generator", "mask_generator", "wav2vec2")) for key in state)
    back = torchaudio.read(tmp_path / "out")
    assert back.settings == settings
    assert_same(back, checkpoint)
    assert np.array_equal(back.tensors[MASK_EMBEDDING].values(), sound.tensors[MASK_EMBEDDING].values())
