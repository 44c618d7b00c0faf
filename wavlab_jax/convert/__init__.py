"""Weights in and out: a table of names, a table of settings, and one file a layout."""

from wavlab_jax.convert.checkpoint import Checkpoint, StoredTensor, from_encoder, to_encoder
from wavlab_jax.convert.huggingface import export_huggingface, import_huggingface
from wavlab_jax.convert.names import ConvertError
from wavlab_jax.convert.settings import huggingface_config

__all__ = [
    "Checkpoint",
    "ConvertError",
    "StoredTensor",
    "export_huggingface",
    "from_encoder",
    "huggingface_config",
    "import_huggingface",
    "to_encoder",
]
