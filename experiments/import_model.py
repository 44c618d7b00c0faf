"""Taking over a published model: found out what it is, and written as a Hugging Face folder."""

from pathlib import Path

import numpy as np

from wavlab_jax.convert import huggingface
from wavlab_jax.convert.card import model_card
from wavlab_jax.convert.checkpoint import HEADS, Checkpoint
from wavlab_jax.convert.layouts import read_checkpoint
from wavlab_jax.convert.source_card import read_source_card
from wavlab_jax.encoder import EncoderConfig
from wavlab_jax.encoder.architectures import name_of


def import_model(
    path: Path,
    out: Path,
    *,
    architecture: EncoderConfig | None = None,
    normalize_waveform: bool | None = None,
    licence: str | None = None,
) -> str:
    """Writes the model at `path` into the folder `out`, and returns what was found, in lines for people.

    `architecture` and `normalize_waveform` as `read_checkpoint` takes them. The card says what that beside the model
    does of licence, languages and data; `licence` comes before it.

    Raises ConvertError, with nothing written: no layout that is known, damaged, or not an encoder of this kind.
    """
    checkpoint = read_checkpoint(path, architecture=architecture, normalize_waveform=normalize_waveform)
    card = model_card(
        checkpoint,
        notes=huggingface.differences(checkpoint),
        head_file=huggingface.HEAD_FILE,
        licence=licence,
        source=read_source_card(path),
    )
    files = huggingface.write(checkpoint, out, card=card)
    return f"{description(checkpoint)}\n{out}: {', '.join(files)}"


def description(checkpoint: Checkpoint) -> str:
    """Layout, architecture, parameters, heads, keys left over and notes of a checkpoint; a line each."""
    cfg = checkpoint.encoder
    name = name_of(cfg, model_type=checkpoint.model_type)
    rows = [
        ("layout", checkpoint.layout),
        ("model", f"{checkpoint.model_type}, {name or 'an architecture without a name'}: {_shape(cfg)}"),
        ("parameters", f"{checkpoint.parameters():,} in the encoder, {_heads_size(checkpoint):,} in heads"),
        *((("head", _head(checkpoint, name))) for name in checkpoint.heads),
        ("left over", ", ".join(checkpoint.left_over) or "nothing"),
        *(("note", note) for note in checkpoint.notes),
    ]
    return "\n".join(f"{title:<12}{text}" for title, text in rows)


def _shape(cfg: EncoderConfig) -> str:
    return (
        f"{cfg.layers} layers, width {cfg.width}, {cfg.heads} heads, {'pre' if cfg.pre_norm else 'post'}-norm, "
        f"{cfg.extractor_norm} norm in the extractor{', with biases' if cfg.extractor_bias else ''}, waveforms "
        f"{'normalised' if cfg.normalize_waveform else 'as they are'}"
    )


def _head(checkpoint: Checkpoint, name: str) -> str:
    known = "" if name in HEADS else " (kept under its own name)"
    return f"{name} {list(checkpoint.heads[name].shape)}{known}"


def _heads_size(checkpoint: Checkpoint) -> int:
    return sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in checkpoint.heads.values())
