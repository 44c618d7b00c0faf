"""The speech encoder: one code path for HuBERT and WavLM, at every size."""

from wavlab_jax.encoder.config import EncoderConfig, Formulation, formulation_for
from wavlab_jax.encoder.encoder import Encoded, Encoder, encode, make_encoder

__all__ = ["Encoded", "Encoder", "EncoderConfig", "Formulation", "encode", "formulation_for", "make_encoder"]
