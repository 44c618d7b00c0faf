"""The layouts of torchaudio and ESPnet without torch: names, settings, and what cannot be told from shapes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from tests.wavlab_jax import tiny
from wavlab_jax.convert import ConvertError, StoredTensor, espnet, from_encoder, torchaudio
from wavlab_jax.convert.names import wanted
from wavlab_jax.convert.safetensors_files import write_safetensors_file
from wavlab_jax.convert.torch_files import read_torch_file
from wavlab_jax.convert.torchaudio_names import Hub, from_hub, to_hub
from wavlab_jax.convert.torchaudio_settings import infer_architecture
from wavlab_jax.encoder import EncoderConfig, make_encoder

HUBERT = tiny.encoder(extractor_norm="layer", pre_norm=True, normalize_waveform=True, extractor_bias=True)
WAVLM = tiny.encoder(relative_bias=True, bias_buckets=32, bias_max_distance=64)
HEAD = {"final_proj.weight": (5, 16), "final_proj.bias": (5,), "label_embeddings": (7, 5)}


def checkpoint_of(cfg: EncoderConfig, *, heads: dict = HEAD, **settings):
    """A checkpoint with random values, as training would hand it over."""
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: make_encoder(jax.random.key(0), cfg)))
    encoder = nnx.merge(graph, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), state))
    head = {name: rng.normal(size=shape).astype(np.float32) for name, shape in heads.items()}
    return from_encoder(encoder, head=head, settings=settings)


@pytest.mark.parametrize("layout", [torchaudio, espnet])
@pytest.mark.parametrize("cfg", [HUBERT, WAVLM], ids=["hubert", "wavlm"])
def test_round_trip_is_exact(cfg, layout, tmp_path):
    checkpoint = checkpoint_of(cfg, dictionaries=[[*"abcdefg"]], label_rate=50)
    files = layout.write(checkpoint, tmp_path / "out", card="# Mine\n")
    assert {"README.md", layout.MODEL_FILE} <= set(files) == {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out/README.md").read_text() == "# Mine\n"
    assert layout.matches(tmp_path / "out") and layout.matches(tmp_path / "out" / layout.MODEL_FILE)
    back = layout.read(tmp_path / "out")
    assert back.encoder == cfg and back.settings.items() >= checkpoint.settings.items()
    for ours, theirs in ((checkpoint.tensors, back.tensors), (checkpoint.heads, back.heads)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert np.array_equal(ours[name].values(), theirs[name].values()), name


def test_names_are_a_bijection():
    shapes = {name: tensor.shape for name, tensor in wanted(WAVLM).items()}
    found = Hub({name: StoredTensor(name, shape, None) for name, shape in shapes.items()}, {})
    for pretraining in (False, True):
        for old in (False, True):
            there = from_hub(found, wavlm=True, pretraining=pretraining, old_weight_norm=old)
            assert any(key.endswith("weight_g") for key in there) == old
            back = to_hub(there, where="")
            assert {name: stored.shape for name, stored in back.tensors.items()} == shapes


def test_other_layouts_are_not_taken_for_these(tmp_path):
    """Hugging Face's names are the same below a prefix; a file of them must not pass."""
    checkpoint = checkpoint_of(HUBERT)
    write_safetensors_file(tmp_path / "model.safetensors", checkpoint.tensors)
    for layout in (torchaudio, espnet):
        for path in ("model.safetensors", "absent.pt", ""):
            assert not layout.matches(tmp_path / path)
        assert not layout.matches({"cfg": None, "model": {}}) and not layout.matches([1])
    with pytest.raises(ConvertError, match=r"missing: encoder.layer.*unexpected: encoder.layer_norm"):
        torchaudio.read(tmp_path / "model.safetensors", architecture=HUBERT)


def shapes_of(cfg: EncoderConfig) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in wanted(cfg).items()}


def test_what_shapes_do_not_tell_is_asked_for():
    seven = EncoderConfig(extractor_channels=(6,) * 7, width=128, layers=1, heads=2, feed_forward=8)
    inferred = infer_architecture(shapes_of(seven), where="x.pt")
    assert dataclasses.replace(inferred.encoder, feed_forward=8) == seven
    assert any("2 heads were assumed" in note for note in inferred.notes)
    wavlm = dataclasses.replace(seven, width=48, heads=4, relative_bias=True, position_groups=8)
    assert infer_architecture(shapes_of(wavlm), where="x.pt").encoder == wavlm
    with pytest.raises(ConvertError, match="x.pt: the extractor's kernels are .16, 25., .* pass architecture="):
        infer_architecture(shapes_of(HUBERT), where="x.pt")
    narrow = dataclasses.replace(seven, width=48, heads=4)
    with pytest.raises(ConvertError, match="number of heads cannot be told for width 48: pass architecture="):
        infer_architecture(shapes_of(narrow), where="x.pt")
    for changed, message in (
        ({"feature_projection.projection.weight": None}, "no feature_projection.projection.weight with 2 dimensions"),
        ({"feature_projection.projection.weight": (3,)}, r"\(it is \[3\]\)"),
        ({"encoder.layers.3.final_layer_norm.bias": (128,)}, r"indices of .* are \[0, 3\]; some are missing"),
        ({"encoder.layers.99999999.final_layer_norm.bias": (128,)}, None),
    ):
        shapes = {key: shape for key, shape in (shapes_of(seven) | changed).items() if shape}
        if message is None:
            assert infer_architecture(shapes, where="x.pt").encoder.layers == 1  # `fit` then calls it unexpected
        else:
            with pytest.raises(ConvertError, match=message):
                infer_architecture(shapes, where="x.pt")


def test_what_torchaudio_json_says_is_checked(tmp_path):
    torchaudio.write(checkpoint_of(HUBERT), tmp_path / "out")
    path = tmp_path / "out/torchaudio.json"
    said = json.loads(path.read_text())
    for changes, message in (
        ({"arguments": [1]}, "no arguments and settings as objects"),
        ({"arguments": {**said["arguments"], "encoder_num_heads": 2.5}}, "encoder_num_heads is 2.5, which is no int"),
        ({"arguments": {"encoder_embed_dim": 16}}, "does not say extractor_conv_bias"),
        ({"wavlab_jax": {"normalize_waveform": "yes"}}, "wavlab_jax has normalize_waveform = 'yes'"),
        ({"wavlab_jax": 3}, "wavlab_jax is 3"),
        ({"arguments": {**said["arguments"], "encoder_embed_dim": 17}}, "17 is not a multiple of heads"),
        ({"arguments": {**said["arguments"], "encoder_num_layers": 3}}, "missing.*encoder.layers.2"),
        (
            {"arguments": {**said["arguments"], "encoder_num_layers": 10**9}},
            "layers is 1000000000, as no speech encoder",
        ),
        ({"arguments": {**said["arguments"], "encoder_num_layers": 10**5}}, "100000 layers on .* are asked for"),
        ({"arguments": {**said["arguments"], "encoder_ff_interm_features": 10**5}}, "a size of 100000 is"),
        (
            {"arguments": {**said["arguments"], "encoder_ff_interm_features": 31}},
            r"of another shape.*\[32, 16\], not \[31",
        ),
    ):
        path.write_text(json.dumps({**said, **changes}))
        with pytest.raises(ConvertError, match=message):
            torchaudio.read(tmp_path / "out")
    path.write_text(json.dumps(said))
    with pytest.raises(ConvertError, match="contradicts the architecture.*heads is 2 there and 4"):
        torchaudio.read(tmp_path / "out", architecture=dataclasses.replace(HUBERT, heads=4))
    other = dataclasses.replace(HUBERT, normalize_waveform=False, dropout=0.3)
    assert torchaudio.read(tmp_path / "out", architecture=other).encoder == other


def test_nothing_is_left_of_a_write_that_fails(tmp_path):
    checkpoint = checkpoint_of(HUBERT)
    damaged = StoredTensor.of("theirs", np.full(16, np.nan, np.float32))
    tensors = {**checkpoint.tensors, "encoder.layer_norm.bias": damaged}
    for layout in (torchaudio, espnet):
        with pytest.raises(ConvertError, match="theirs has 16 values that are not finite"):
            layout.write(dataclasses.replace(checkpoint, tensors=tensors), tmp_path / "out")
        assert not list(tmp_path.iterdir())
    assert espnet.write(checkpoint, tmp_path / "out")
    state = read_torch_file(tmp_path / "out/model.pth")
    assert state["encoder.global_step"].read().tolist() == [0]
