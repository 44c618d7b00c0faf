"""Weights in and out: a table of names, a table of settings, and one file a layout."""

from wavlab_jax.convert.huggingface import ExportReport, export_huggingface, import_huggingface
from wavlab_jax.convert.names import ConvertError
from wavlab_jax.convert.settings import huggingface_config

__all__ = ["ConvertError", "ExportReport", "export_huggingface", "huggingface_config", "import_huggingface"]
