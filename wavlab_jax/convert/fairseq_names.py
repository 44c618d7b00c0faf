"""The name table of fairseq's encoders: Hugging Face's names of tensors <-> fairseq's, which unilm and s3prl keep."""

import re

import numpy as np

from wavlab_jax.convert.checkpoint import PROJECTION, Checkpoint, StoredTensor, fit
from wavlab_jax.convert.names import ConvertError
from wavlab_jax.encoder import EncoderConfig

# By their beginnings; those inside a layer below.
_NAMES: tuple[tuple[str, str], ...] = (
    ("masked_spec_embed", "mask_emb"),
    ("feature_projection.layer_norm.", "layer_norm."),
    ("feature_projection.projection.", "post_extract_proj."),
    ("encoder.pos_conv_embed.conv.parametrizations.weight.original0", "encoder.pos_conv.0.weight_g"),
    ("encoder.pos_conv_embed.conv.parametrizations.weight.original1", "encoder.pos_conv.0.weight_v"),
    ("encoder.pos_conv_embed.conv.", "encoder.pos_conv.0."),
    ("encoder.layer_norm.", "encoder.layer_norm."),
)
_IN_LAYER: tuple[tuple[str, str], ...] = (
    ("attention.gru_rel_pos_linear.", "self_attn.grep_linear."),
    ("attention.gru_rel_pos_const", "self_attn.grep_a"),
    ("attention.rel_attn_embed.", "self_attn.relative_attention_bias."),
    ("attention.", "self_attn."),  # q_proj, k_proj, v_proj, out_proj
    ("layer_norm.", "self_attn_layer_norm."),
    ("feed_forward.intermediate_dense.", "fc1."),
    ("feed_forward.output_dense.", "fc2."),
    ("final_layer_norm.", "final_layer_norm."),
)
# How files that newer PyTorch saved spell weight norm -> how fairseq's own do.
WEIGHT_NORM = {
    "encoder.pos_conv.0.parametrizations.weight.original0": "encoder.pos_conv.0.weight_g",
    "encoder.pos_conv.0.parametrizations.weight.original1": "encoder.pos_conv.0.weight_v",
}


def fairseq_name(key: str, cfg: EncoderConfig) -> str:
    """fairseq's name of a tensor of Hugging Face's."""
    convolution = re.fullmatch(r"feature_extractor\.conv_layers\.(\d+)\.(conv|layer_norm)\.(\w+)", key)
    if convolution:
        # LayerNorm sits between two transpositions there, group norm stands alone
        place = "0" if convolution[2] == "conv" else "2.1" if cfg.extractor_norm == "layer" else "2"
        return f"feature_extractor.conv_layers.{convolution[1]}.{place}.{convolution[3]}"
    layer = re.match(r"encoder\.layers\.\d+\.", key)
    start, table = (layer[0], _IN_LAYER) if layer else ("", _NAMES)
    rest = key.removeprefix(start)
    ours, theirs = next(pair for pair in table if rest.startswith(pair[0]))
    return f"{start}{theirs}{rest.removeprefix(ours)}"


def encoder_weights(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The encoder's tensors by fairseq's names. Raises ConvertError if one is missing, or has no place in fairseq."""
    cfg = checkpoint.encoder
    tensors = fit(cfg, checkpoint.tensors, where=f"the {checkpoint.layout} checkpoint").tensors
    if cfg.width == cfg.extractor_channels[-1]:
        weight, bias = (tensors.pop(f"{PROJECTION}.{kind}").values() for kind in ("weight", "bias"))
        if not np.array_equal(weight, np.eye(cfg.width)) or bias.any():
            raise ConvertError(
                f"fairseq has no projection of features that are as wide as the Transformer ({cfg.width}), and this "
                "model's is not the identity: it cannot be written so"
            )
    return {fairseq_name(key, cfg): tensor for key, tensor in tensors.items()}
