"""Random encoders of transformers, and the same weights here, copied by key without the converter under test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from wavlab_jax.encoder import Encoder, EncoderConfig, encode, formulation_for, make_encoder

pytestmark = pytest.mark.torch  # so that it is left alone where torch is missing

CLASSES = {
    "hubert": (transformers.HubertConfig, transformers.HubertModel),
    "wavlm": (transformers.WavLMConfig, transformers.WavLMModel),
    "wav2vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model),
}

_run = jax.jit(
    lambda encoder, waveform, valid, mask, channel_mask: encode(
        encoder, waveform, valid, mask=mask, channel_mask=channel_mask, formulation=formulation_for("cpu")
    ),
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)


def run(encoder: Encoder, waveform, valid=None, *, mask=None, channel_mask=None):
    """`encode` as on CPU, as numpy arrays in float32."""
    return jax.tree.map(
        lambda x: np.asarray(x, np.float32 if x.dtype == jnp.bfloat16 else x.dtype),
        _run(encoder, jnp.asarray(waveform, jnp.float32), valid, mask, channel_mask),
    )


def config(model_type: str, cfg: EncoderConfig):
    """The configuration in transformers, in its own words."""
    fields = dict(
        hidden_size=cfg.width,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        intermediate_size=cfg.feed_forward,
        conv_dim=list(cfg.extractor_channels),
        conv_kernel=list(cfg.extractor_kernels),
        conv_stride=list(cfg.extractor_strides),
        num_feat_extract_layers=len(cfg.extractor_channels),
        conv_bias=cfg.extractor_bias,
        feat_extract_norm=cfg.extractor_norm,
        do_stable_layer_norm=cfg.pre_norm,
        num_conv_pos_embeddings=cfg.position_kernel,
        num_conv_pos_embedding_groups=cfg.position_groups,
    )
    if cfg.relative_bias:
        fields |= dict(num_buckets=cfg.bias_buckets, max_bucket_distance=cfg.bias_max_distance)
    return CLASSES[model_type][0](**fields)


def random_model(model_type: str, cfg: EncoderConfig, *, seed: int = 0):
    """A model in eval mode of which no parameter, norm or gate is at its initial value."""
    model = CLASSES[model_type][1](config(model_type, cfg))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around_one = "norm.weight" in name or name.endswith(("original0", "gru_rel_pos_const"))
            parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator) + float(around_one))
    return model.eval()


def copied(model, cfg: EncoderConfig) -> Encoder:
    """An encoder of `cfg` with the model's weights; every one of the model's is used, every one of ours is set."""
    theirs = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def pair(key, *axes):
        tree = {"kernel": theirs.pop(f"{key}.weight").transpose(axes)}
        return tree | ({"bias": theirs.pop(f"{key}.bias")} if f"{key}.bias" in theirs else {})

    def dense(key):
        return pair(key, 1, 0)

    def norm(key):
        return {"scale": theirs.pop(f"{key}.weight"), "bias": theirs.pop(f"{key}.bias")}

    def convolution(index):
        key = f"feature_extractor.conv_layers.{index}"
        tree = pair(f"{key}.conv", 2, 1, 0)
        return tree | ({"norm": norm(f"{key}.layer_norm")} if f"{key}.layer_norm.weight" in theirs else {})

    def layer(index):
        key = f"encoder.layers.{index}"
        attention = {
            name: dense(f"{key}.attention.{short}_proj")
            for name, short in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "out"))
        }
        if cfg.relative_bias:
            constant = theirs.pop(f"{key}.attention.gru_rel_pos_const").reshape(-1)
            attention["gate"] = {"dense": dense(f"{key}.attention.gru_rel_pos_linear"), "constant": constant}
        return {
            "attention": attention,
            "attention_norm": norm(f"{key}.layer_norm"),
            "expand": dense(f"{key}.feed_forward.intermediate_dense"),
            "contract": dense(f"{key}.feed_forward.output_dense"),
            "final_norm": norm(f"{key}.final_layer_norm"),
        }

    position = "encoder.pos_conv_embed.conv"
    tree = {
        "mask_embedding": theirs.pop("masked_spec_embed"),
        "frontend": {
            "convolutions": {index: convolution(index) for index in range(len(cfg.extractor_channels))},
            "norm": norm("feature_projection.layer_norm"),
            "projection": dense("feature_projection.projection"),
        },
        "position": {
            "gain": theirs.pop(f"{position}.parametrizations.weight.original0").reshape(-1),
            "direction": theirs.pop(f"{position}.parametrizations.weight.original1").transpose(2, 1, 0),
            "bias": theirs.pop(f"{position}.bias"),
        },
        "norm": norm("encoder.layer_norm"),
        "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *(layer(index) for index in range(cfg.layers))),
    }
    if cfg.relative_bias:
        tree["relative_bias"] = theirs.pop("encoder.layers.0.attention.rel_attn_embed.weight")
    assert not theirs, sorted(theirs)
    graph, state = nnx.split(nnx.eval_shape(lambda: make_encoder(jax.random.key(0), cfg)))
    jax.tree.map(lambda ours, leaf: np.testing.assert_equal(ours.shape, leaf.shape), nnx.to_pure_dict(state), tree)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, tree))
    return nnx.merge(graph, state)


def states(model, waveform, valid=None, *, mask=None, real=None) -> list[np.ndarray]:
    """The model's hidden states for `waveform` [rows, samples], the last after the final norm: layers + 1 arrays.

    `valid` [rows, samples] and `mask` [rows, frames] as in `encode`; `real` [rows, frames] replaces what the model
    makes of `valid`. (transformers 5 leaves the final norm out of `hidden_states[-1]`.)
    """
    if real is not None:
        model._get_feature_vector_attention_mask = lambda frames, valid, **_: torch.tensor(real)
    given = {"attention_mask": valid, "mask_time_indices": mask}
    given = {name: torch.tensor(array) for name, array in given.items() if array is not None}
    with torch.no_grad():
        found = model(torch.tensor(np.asarray(waveform), dtype=model.dtype), output_hidden_states=True, **given)
    return [state.float().numpy() for state in (*found.hidden_states[:-1], found.last_hidden_state)]
