"""Conversion against transformers: every hidden state of random models, in both directions."""

import dataclasses
import json
import logging
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from data_pipelines.batch import num_frames
from tests.wavlab_jax import tiny
from tests.wavlab_jax.tiny import randomised
from wavlab_jax.convert import export_huggingface, huggingface_config, import_huggingface
from wavlab_jax.convert.settings import ABSENT, FINE_TUNING, HUBERT_ONLY, REQUIRED, WAVLM_ONLY
from wavlab_jax.encoder import EncoderConfig, encode, formulation_for, make_encoder
from wavlab_jax.encoder.layers import relative_buckets

pytestmark = pytest.mark.torch

TOLERANCE = 1e-4
SAMPLES = 400 + 74 * 320 + 111  # 75 frames: past the largest bucketed distance

# The usual seven convolutions, small.
SEVEN = tiny.encoder(
    extractor_channels=(6,) * 7,
    extractor_kernels=EncoderConfig.extractor_kernels,
    extractor_strides=EncoderConfig.extractor_strides,
    position_groups=4,
    waveform_epsilon=1e-7,  # the preprocessor's there
    feature_gradient_scale=0.1,  # not written there, so that reading takes the default
)
# The same frames from three convolutions of different widths.
THREE = dataclasses.replace(
    SEVEN, extractor_channels=(4, 7, 6), extractor_kernels=(10, 3, 20), extractor_strides=(5, 4, 16)
)
WAVLM = {"relative_bias": True, "bias_buckets": 32, "bias_max_distance": 64}
LARGE = {"extractor_norm": "layer", "pre_norm": True, "normalize_waveform": True, "feature_gradient_scale": 1.0}
VARIANTS = {
    "hubert-base": SEVEN,
    "hubert-large": dataclasses.replace(SEVEN, **LARGE),
    "hubert-large-biased": dataclasses.replace(THREE, extractor_bias=True, **LARGE),
    "mhubert-biased": dataclasses.replace(THREE, extractor_bias=True, normalize_waveform=True),
    "wavlm-base": dataclasses.replace(THREE, **WAVLM),
    "wavlm-large": dataclasses.replace(SEVEN, **WAVLM, **LARGE),
    "group-pre-odd": dataclasses.replace(THREE, pre_norm=True, position_kernel=9, layers=3, heads=4),
}


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """Loading bars and advice of transformers stay out of the test log; torch keeps to one thread."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def waveforms(rows: int, cfg: EncoderConfig) -> np.ndarray:
    """[rows, samples] float32 with an offset; where normalised, so quiet that the epsilon there counts."""
    rng = np.random.default_rng(1)
    level = 5e-4 if cfg.normalize_waveform else 0.1
    return (level * (rng.standard_normal((rows, SAMPLES)) + 0.3)).astype(np.float32)


def randomised_torch(model, *, seed: int = 0):
    """The model with every parameter far from its initial value, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around_one = "norm.weight" in name or name.endswith(("original0", "gru_rel_pos_const"))
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator) + float(around_one))
    return model.eval()


def torch_config(cfg: EncoderConfig, **fields):
    """The configuration as transformers itself would have written it, without what is ours."""
    return transformers.AutoConfig.for_model(**(huggingface_config(cfg) | {"wavlab_jax": None} | fields))


_encode = jax.jit(
    lambda encoder, waveform, valid, mask: encode(
        encoder, waveform, valid, mask=mask, formulation=formulation_for("cpu")
    ),
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)


def compare(encoder, model, extractor, waveform, mask) -> float:
    """Largest difference over the convolutions' output and every hidden state of one row."""
    ours = _encode(encoder, waveform[None], None, mask)
    with torch.no_grad():
        inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt").input_values
        theirs = model(inputs, mask_time_indices=torch.from_numpy(mask.copy()), output_hidden_states=True)
        features = model.feature_extractor(inputs).transpose(1, 2)
    # transformers 5 leaves the final norm of pre-norm models out of hidden_states[-1]
    states = (*theirs.hidden_states[:-1], theirs.last_hidden_state)
    assert len(ours.hidden) == len(states) == encoder.config.layers + 1
    pairs = [*zip(ours.hidden, states, strict=True), (ours.features, features)]
    for one, other in pairs:
        assert one.shape == other.shape and other.std() > 0.01
    return max(float(np.abs(np.asarray(one) - other.numpy()).max()) for one, other in pairs)


def frame_masks() -> tuple[np.ndarray, np.ndarray]:
    """[1, frames] bool each: nothing, and two spans."""
    nothing = np.zeros((1, num_frames(SAMPLES)), bool)
    spans = nothing.copy()
    spans[0, 5:15] = spans[0, 40:52] = True
    return nothing, spans


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_model_is_the_same_in_transformers(variant, tmp_path):
    cfg = VARIANTS[variant]
    encoder = randomised(cfg)
    export_huggingface(encoder, tmp_path / "model")
    model, info = transformers.AutoModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()), info  # missing, unexpected, mismatched, errors
    assert model.dtype == torch.float32
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "model")
    assert extractor.do_normalize == cfg.normalize_waveform
    waveform = waveforms(1, cfg)[0]
    for mask in frame_masks():
        assert compare(encoder, model.eval(), extractor, waveform, mask) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_their_model_is_the_same_here(variant, tmp_path):
    cfg = VARIANTS[variant]
    model = randomised_torch(transformers.AutoModel.from_config(torch_config(cfg)))
    model.save_pretrained(tmp_path)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=cfg.normalize_waveform)
    extractor.save_pretrained(tmp_path)
    encoder = import_huggingface(tmp_path)
    assert encoder.config == cfg
    waveform = waveforms(1, cfg)[0]
    for mask in frame_masks():
        assert compare(encoder, model, extractor, waveform, mask) < TOLERANCE


@pytest.mark.parametrize("variant", ["hubert-large-biased", "wavlm-large"])
def test_a_padded_batch_is_the_same_at_real_frames(variant, tmp_path):
    cfg = VARIANTS[variant]
    encoder = randomised(cfg)
    export_huggingface(encoder, tmp_path / "model")
    model = transformers.AutoModel.from_pretrained(tmp_path / "model").eval()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "model")
    lengths = np.array([SAMPLES, 9_001, 16_000])
    waveform = waveforms(3, cfg)
    valid = np.arange(SAMPLES) < lengths[:, None]
    rows = [row[:length] for row, length in zip(waveform, lengths, strict=True)]
    inputs = extractor(rows, sampling_rate=16_000, padding=True, return_tensors="pt")
    np.testing.assert_array_equal(inputs.attention_mask, valid)  # the exported preprocessor makes it by itself
    with torch.no_grad():
        theirs = model(**inputs, output_hidden_states=True)
    ours = _encode(encoder, np.where(valid, waveform, 7.0).astype(np.float32), valid, None)
    states = (*theirs.hidden_states[:-1], theirs.last_hidden_state)
    for row, length in enumerate(lengths):
        frames = num_frames(length)
        assert int(ours.valid[row].sum()) == frames
        for one, other in zip(ours.hidden, states, strict=True):
            np.testing.assert_allclose(np.asarray(one)[row, :frames], other[row, :frames], atol=TOLERANCE)


def test_every_way_that_transformers_writes_a_model_is_read(tmp_path):
    """Under a head; in shards; with the weight norm spelled as before `parametrizations`; in bfloat16."""
    cfg = VARIANTS["wavlm-base"]
    model = randomised_torch(transformers.WavLMForCTC(torch_config(cfg)))
    model.save_pretrained(tmp_path / "whole")
    reference = import_huggingface(tmp_path / "whole", normalize_waveform=False)

    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    shards = import_huggingface(tmp_path / "shards", normalize_waveform=False)
    jax.tree.map(np.testing.assert_array_equal, shards, reference)

    state = model.state_dict()
    convolution = "wavlm.encoder.pos_conv_embed.conv"
    state[f"{convolution}.weight_g"] = state.pop(f"{convolution}.parametrizations.weight.original0")
    state[f"{convolution}.weight_v"] = state.pop(f"{convolution}.parametrizations.weight.original1")
    safetensors.torch.save_file(state, tmp_path / "whole" / "model.safetensors")
    old = import_huggingface(tmp_path / "whole", normalize_waveform=False)
    jax.tree.map(np.testing.assert_array_equal, old, reference)

    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    half = import_huggingface(tmp_path / "half", normalize_waveform=False)
    for one, other in zip(jax.tree.leaves(half), jax.tree.leaves(reference), strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_array_equal(one, np.asarray(other).astype(jnp.bfloat16).astype(np.float32))


def test_wav2vec2_with_a_pretraining_head_comes_in(tmp_path):
    """XLS-R's layout: conv bias, pre-norm, and a quantizer that is left behind."""
    cfg = VARIANTS["hubert-large-biased"]
    config = torch_config(cfg, model_type="wav2vec2", codevector_dim=8, num_codevectors_per_group=4)
    model = randomised_torch(transformers.Wav2Vec2ForPreTraining(config))
    model.save_pretrained(tmp_path)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    encoder = import_huggingface(tmp_path, normalize_waveform=True)
    assert encoder.config == cfg
    assert compare(encoder, model.wav2vec2, extractor, waveforms(1, cfg)[0], frame_masks()[1]) < TOLERANCE


@pytest.mark.parametrize(("variant", "kind"), [("hubert-base", "HubertForCTC"), ("wavlm-base", "WavLMForCTC")])
def test_fine_tuning_starts_from_the_exported_folder(variant, kind, tmp_path):
    export_huggingface(randomised(VARIANTS[variant]), tmp_path / "model")
    model, info = getattr(transformers, kind).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight", "lm_head.bias"} and not info["unexpected_keys"]
    loss = model.train()(torch.randn(1, 8000), labels=torch.tensor([[3, 4]])).loss
    assert torch.isfinite(loss)


def test_buckets_are_those_of_transformers():
    from transformers.models.wavlm.modeling_wavlm import WavLMAttention

    for buckets, max_distance in ((320, 800), (320, 1280), (32, 64), (16, 20)):
        attention = WavLMAttention(8, 1, num_buckets=buckets, max_distance=max_distance)
        with torch.no_grad():
            attention.rel_attn_embed.weight.copy_(torch.arange(buckets)[:, None])
            theirs = attention.compute_bias(1500, 1500)[0]
        np.testing.assert_array_equal(theirs, relative_buckets(1500, buckets=buckets, max_distance=max_distance))


BASE = EncoderConfig()
RELEASED = {
    "hubert-base": (BASE, 94_371_712),
    "wavlm-base": (dataclasses.replace(BASE, relative_bias=True), None),
    "hubert-large": (dataclasses.replace(BASE, width=1024, layers=24, heads=16, feed_forward=4096, **LARGE), None),
    "wavlm-large": (
        dataclasses.replace(BASE, width=1024, layers=24, heads=16, feed_forward=4096, relative_bias=True, **LARGE),
        None,
    ),
    "hubert-xlarge": (dataclasses.replace(BASE, width=1280, layers=48, heads=16, feed_forward=5120, **LARGE), None),
    "xls-r-300m": (
        dataclasses.replace(BASE, width=1024, layers=24, heads=16, feed_forward=4096, extractor_bias=True, **LARGE),
        None,
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_parameter_counts_are_those_of_transformers(name):
    cfg, known = RELEASED[name]
    abstract = jax.eval_shape(lambda: make_encoder(jax.random.key(0), cfg))
    ours = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    with torch.device("meta"):
        theirs = sum(p.numel() for p in transformers.AutoModel.from_config(torch_config(cfg)).parameters())
    assert ours == theirs
    assert known is None or ours == known


def test_defaults_are_those_of_transformers():
    for kind in (transformers.HubertConfig, transformers.WavLMConfig, transformers.Wav2Vec2Config):
        defaults = kind().to_dict()
        for name, value in (ABSENT | REQUIRED).items():
            if name in defaults:
                theirs = defaults[name]
                assert (tuple(theirs) if isinstance(theirs, list) else theirs) == value, (kind, name)
    assert ABSENT.keys() <= transformers.WavLMConfig().to_dict().keys()
    assert transformers.HubertConfig().to_dict().items() >= (FINE_TUNING | HUBERT_ONLY).items()
    assert transformers.WavLMConfig().to_dict().items() >= (FINE_TUNING | WAVLM_ONLY).items()


@pytest.mark.parametrize("variant", ["hubert-base", "wavlm-large"])
def test_config_json_leaves_nothing_to_defaults(variant, tmp_path):
    cfg = VARIANTS[variant]
    written = huggingface_config(cfg)
    own = vars(type(torch_config(cfg)))["__annotations__"]
    # sizes of heads and adapters that the exported model does not have
    heads = "codevector|negatives|contrastive|diversity|tdnn|xvector|ctc_classes|adapter|output_"
    assert [name for name in own if name not in written and not re.search(heads, name)] == []
    (tmp_path / "config.json").write_text(json.dumps(written))
    read = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    for name, value in written.items():
        assert read["dtype" if name == "torch_dtype" else name] == value, name


def test_readmes_lines_give_our_hidden_states(tmp_path):
    """Word for word: those for PyTorch, and what stands beneath them of the last hidden state."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(from transformers .*?)```", readme, re.DOTALL)
    assert len(lines.splitlines()) == 4 and lines.count('"work/demo/export"') == 1
    encoder = randomised(VARIANTS["wavlm-large"])
    export_huggingface(encoder, tmp_path / "model")
    known = {"waveform": waveforms(1, encoder.config)[0]}
    with torch.no_grad():
        exec(lines.replace('"work/demo/export"', repr(str(tmp_path / "model"))), known)
    outputs = known["outputs"]
    ours = jax.jit(lambda waveform: encode(encoder, waveform).hidden)(known["waveform"][None])
    theirs = (*outputs.hidden_states[:-1], outputs.last_hidden_state)
    for layer, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        np.testing.assert_allclose(a, b, atol=TOLERANCE, err_msg=f"hidden state {layer}")
    assert np.abs(outputs.hidden_states[-1].numpy() - ours[-1]).max() > 0.1, "README's warning is out of date"
