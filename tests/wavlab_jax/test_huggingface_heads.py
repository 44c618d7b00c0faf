"""Model types and heads against transformers: what it wrote goes back to it with the heads it has a place for."""

import json
import logging
import re

import pytest
import safetensors.torch
import torch
import transformers

from wavlab_jax.convert import ConvertError, from_encoder, to_encoder
from wavlab_jax.convert import huggingface as folders
from wavlab_jax.convert.settings import CTC_HEADS, PRETRAINING_HEADS

pytestmark = pytest.mark.torch

SMALL = dict(
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    conv_dim=[4, 6, 5],
    conv_kernel=[10, 3, 20],
    conv_stride=[5, 4, 16],
    num_feat_extract_layers=3,
    num_conv_pos_embeddings=6,
    num_conv_pos_embedding_groups=2,
    conv_bias=True,
    do_stable_layer_norm=True,
    feat_extract_norm="layer",
    vocab_size=7,
    codevector_dim=8,
    proj_codevector_dim=10,
    num_codevectors_per_group=4,
    contrastive_logits_temperature=0.07,
    num_negatives=9,
    final_dropout=0.2,
    pad_token_id=3,
)
CONFIGS = {
    "wav2vec2": transformers.Wav2Vec2Config,
    "hubert": transformers.HubertConfig,
    "wavlm": transformers.WavLMConfig,
}
CTC = {"wav2vec2": "Wav2Vec2ForCTC", "hubert": "HubertForCTC", "wavlm": "WavLMForCTC"}


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """Loading bars and advice of transformers stay out of the test log; torch keeps to one thread."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def randomised(model):
    """The model with every parameter far from its initial value, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def saved(kind: str, model_type: str, folder, **fields):
    """A random model of a class of transformers, saved as it saves it, with its preprocessor."""
    model = randomised(getattr(transformers, kind)(CONFIGS[model_type](**{**SMALL, **fields})))
    model.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    return model


def as_the_card_says(folder):
    """The model that the card's own lines load: nothing may be missing, nothing unexpected."""
    (line,) = re.findall(r"^model = (AutoModel\w*)\.from_pretrained", (folder / "README.md").read_text(), re.MULTILINE)
    return loaded(getattr(transformers, line), folder)


def loaded(auto, folder, *, unexpected=frozenset()):
    """The model that transformers makes of the folder; it misses nothing, and knows all but `unexpected`."""
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["error_msgs"], info
    assert set(info["unexpected_keys"]) == set(unexpected)
    return model.eval()


def same_state(left, right):
    """Every tensor of two models is equal, bit for bit."""
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


def test_wav2vec2_goes_back_with_its_quantizer(tmp_path):
    model = saved("Wav2Vec2ForPreTraining", "wav2vec2", tmp_path / "theirs")
    checkpoint = folders.read(tmp_path / "theirs")
    assert checkpoint.heads.keys() == PRETRAINING_HEADS and checkpoint.notes == checkpoint.left_over == ()
    assert (checkpoint.settings["temperature"], checkpoint.settings["negatives"]) == (0.07, 9)
    files = folders.write(checkpoint, tmp_path / "ours")
    assert folders.HEAD_FILE not in files
    again = loaded(transformers.AutoModelForPreTraining, tmp_path / "ours")
    assert type(again) is type(as_the_card_says(tmp_path / "ours")) is type(model)
    same_state(model, again)
    theirs, ours = model.config.to_dict(), again.config.to_dict()
    own = ("_name_or_path", "wavlab_jax", "transformers_version")
    assert {name: ours[name] for name in theirs if name not in own} == {
        name: value for name, value in theirs.items() if name not in own
    }
    bare = loaded(transformers.AutoModel, tmp_path / "ours", unexpected=PRETRAINING_HEADS)
    same_state(model.wav2vec2, bare)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_bare_model_keeps_its_type(model_type, tmp_path):
    kind = {"wav2vec2": "Wav2Vec2Model", "hubert": "HubertModel", "wavlm": "WavLMModel"}[model_type]
    model = saved(kind, model_type, tmp_path / "theirs")
    checkpoint = folders.read(tmp_path / "theirs")
    assert (checkpoint.model_type, checkpoint.heads) == (model_type, {})
    folders.write(checkpoint, tmp_path / "ours")
    same_state(model, as_the_card_says(tmp_path / "ours"))
    # by way of an encoder in memory
    folders.write(from_encoder(to_encoder(checkpoint), model_type=model_type), tmp_path / "encoder")
    again = loaded(transformers.AutoModel, tmp_path / "encoder")
    assert type(again) is type(model)
    same_state(model, again)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_ctc_head_goes_along(model_type, tmp_path):
    model = saved(CTC[model_type], model_type, tmp_path / "theirs")
    folders.write(folders.read(tmp_path / "theirs"), tmp_path / "ours")
    again = loaded(transformers.AutoModelForCTC, tmp_path / "ours")
    assert type(as_the_card_says(tmp_path / "ours")) is type(model)
    assert type(again) is type(model) and again.config.vocab_size == 7 and again.config.pad_token_id == 3  # blank
    same_state(model, again)
    loaded(transformers.AutoModel, tmp_path / "ours", unexpected=CTC_HEADS)


def test_heads_of_other_classes_lie_beside_the_model(tmp_path):
    saved("HubertForSequenceClassification", "hubert", tmp_path / "theirs", classifier_proj_size=6)
    checkpoint = folders.read(tmp_path / "theirs")
    assert set(checkpoint.heads) == {
        f"{name}.{part}" for name in ("projector", "classifier") for part in ("weight", "bias")
    }
    assert "classifier.bias" in checkpoint.notes[0]
    assert folders.HEAD_FILE in folders.write(checkpoint, tmp_path / "ours")
    loaded(transformers.AutoModel, tmp_path / "ours")
    assert folders.read(tmp_path / "ours").heads.keys() == checkpoint.heads.keys()


@pytest.mark.parametrize("shards", [False, True], ids=["whole", "shards"])
@pytest.mark.parametrize("old", [False, True], ids=["parametrizations", "weight_g"])
def test_bin_files_are_read(shards, old, tmp_path):
    """As transformers wrote them before safetensors: `torch.save` of state dicts, with an index of several."""
    model = saved("WavLMForCTC", "wavlm", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = model.state_dict()
    if old:
        convolution = "wavlm.encoder.pos_conv_embed.conv"
        state[f"{convolution}.weight_g"] = state.pop(f"{convolution}.parametrizations.weight.original0")
        state[f"{convolution}.weight_v"] = state.pop(f"{convolution}.parametrizations.weight.original1")
    if shards:
        keys = sorted(state)
        names = {key: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, key in enumerate(keys)}
        for name in set(names.values()):
            torch.save({key: state[key] for key in keys if names[key] == name}, tmp_path / name)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    folders.write(folders.read(tmp_path), tmp_path / "ours")
    same_state(model, loaded(transformers.AutoModelForCTC, tmp_path / "ours"))


def test_without_a_mask_embedding_it_is_drawn_and_said(tmp_path):
    """transformers leaves it out of models that are not to mask."""
    model = saved("HubertModel", "hubert", tmp_path / "theirs", mask_time_prob=0.0)
    assert "masked_spec_embed" not in model.state_dict()
    checkpoint = folders.read(tmp_path / "theirs")
    assert "mask embedding" in checkpoint.notes[0]
    folders.write(checkpoint, tmp_path / "ours")
    again = loaded(transformers.AutoModel, tmp_path / "ours").state_dict()
    drawn = again.pop("masked_spec_embed").numpy()
    assert drawn.shape == (12,) and 0 < drawn.min() < drawn.max() < 1
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again[key])


def test_a_model_without_a_projection_gets_the_identity(tmp_path):
    """fairseq has none where the extractor is as wide as the Transformer; transformers always has one."""
    model = saved("HubertModel", "hubert", tmp_path / "theirs", hidden_size=5, num_attention_heads=1,
                  num_conv_pos_embedding_groups=1)  # fmt: skip
    with torch.no_grad():
        model.feature_projection.projection.weight.copy_(torch.eye(5))
        model.feature_projection.projection.bias.zero_()
    state = {key: tensor for key, tensor in model.state_dict().items() if "projection.projection" not in key}
    safetensors.torch.save_file(state, tmp_path / "theirs" / "model.safetensors")
    checkpoint = folders.read(tmp_path / "theirs")
    assert "identity" in checkpoint.notes[0]
    folders.write(checkpoint, tmp_path / "ours")
    same_state(model, loaded(transformers.AutoModel, tmp_path / "ours"))


def test_adapters_are_refused(tmp_path):
    """MMS's language adapters change every layer; one on top shortens the frames."""
    saved("Wav2Vec2ForCTC", "wav2vec2", tmp_path, adapter_attn_dim=4)
    with pytest.raises(ConvertError, match="adapter_attn_dim is 4.*MMS"):
        folders.read(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["adapter_attn_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConvertError, match=r"unexpected: wav2vec2.encoder.layers.0.adapter_layer"):
        folders.read(tmp_path)


def test_half_precision_is_widened(tmp_path):
    model = saved("HubertForCTC", "hubert", tmp_path / "theirs").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    folders.write(folders.read(tmp_path / "theirs"), tmp_path / "ours")
    again = loaded(transformers.AutoModelForCTC, tmp_path / "ours")
    assert again.dtype == torch.float32
    same_state(model.to(torch.float32), again)


def test_another_sampling_rate_is_refused(tmp_path):
    saved("HubertModel", "hubert", tmp_path)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True, sampling_rate=8_000).save_pretrained(tmp_path)
    with pytest.raises(ConvertError, match="hears 8000 Hz"):
        folders.read(tmp_path)
