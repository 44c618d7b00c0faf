"""The speech encoder: one code path for HuBERT, WavLM and wav2vec 2.0, at every size."""

from wavlab_jax.encoder.config import EncoderConfig, Formulation, formulation_for
from wavlab_jax.encoder.encoder import Encoded, Encoder, encode, lower_layers, make_encoder, unstack_layers

__all__ = [
    "Encoded",
    "Encoder",
    "EncoderConfig",
    "Formulation",
    "encode",
    "formulation_for",
    "lower_layers",
    "make_encoder",
    "unstack_layers",
]
