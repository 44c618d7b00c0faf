"""The settings table of torchaudio's model builders, and what the shapes of a bare state dict say of its architecture.

`torchaudio.models.wav2vec2_model`, `wavlm_model` and `hubert_pretrain_model` (torchaudio/models/wav2vec2/model.py) name
their arguments alike, and ESPnet's encoders, which call them, do the same.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from wavlab_jax.convert.names import LARGEST_SIZE, ConvertError, short
from wavlab_jax.encoder import EncoderConfig

# Our field -> torchaudio's argument, where the values mean the same.
ARGUMENTS: dict[str, str] = {
    "extractor_bias": "extractor_conv_bias",
    "width": "encoder_embed_dim",
    "projection_dropout": "encoder_projection_dropout",
    "position_kernel": "encoder_pos_conv_kernel",
    "position_groups": "encoder_pos_conv_groups",
    "layers": "encoder_num_layers",
    "heads": "encoder_num_heads",
    "attention_dropout": "encoder_attention_dropout",
    "feed_forward": "encoder_ff_interm_features",
    "activation_dropout": "encoder_ff_interm_dropout",
    "dropout": "encoder_dropout",
    "pre_norm": "encoder_layer_norm_first",
    "layerdrop": "encoder_layer_drop",
}
BIAS_ARGUMENTS: dict[str, str] = {"bias_buckets": "encoder_num_buckets", "bias_max_distance": "encoder_max_distance"}
MODE, CONVOLUTIONS, GRADIENT = "extractor_mode", "extractor_conv_layer_config", "feature_grad_mult"
MODES: dict[str, str] = {"group": "group_norm", "layer": "layer_norm"}

# What the builders take for `extractor_conv_layer_config=None`: (channels, kernel, stride).
PUBLISHED_CONVOLUTIONS = ((512, 10, 5), *((512, 3, 2),) * 4, *((512, 2, 2),) * 2)
NORM_EPSILON = 1e-5  # PyTorch's default, which torchaudio's norms and its bundles' waveform normalisation keep

# Heads of the published models by width (torchaudio/pipelines/_wav2vec2/impl.py); the shapes do not tell.
PUBLISHED_HEADS: dict[int, int] = {768: 12, 1024: 16, 1280: 16, 1920: 16}

# Our fields that not every builder has an argument for; kept beside them so that a model of ours comes back whole.
_SAID = {*ARGUMENTS, *BIAS_ARGUMENTS, "relative_bias", "norm_epsilon"} | {
    f"extractor_{part}" for part in ("norm", "channels", "kernels", "strides")
}
OURS: tuple[str, ...] = tuple(field.name for field in fields(EncoderConfig) if field.name not in _SAID)


_TRAINING_ONLY = {"dropout", "attention_dropout", "activation_dropout", "projection_dropout", "layerdrop"} | {
    "feature_gradient_scale"
}


def builder_arguments(cfg: EncoderConfig) -> dict[str, Any]:
    """torchaudio's arguments for an encoder, in the builders' order and as plain JSON; `feature_grad_mult` is left out.

    Raises ConvertError where the encoder is one that torchaudio cannot compute.
    """
    if cfg.norm_epsilon != NORM_EPSILON:
        raise ConvertError(
            f"norm_epsilon is {cfg.norm_epsilon}, but torchaudio's norms always use {NORM_EPSILON}: the exported model "
            "would differ"
        )
    convolutions = zip(cfg.extractor_channels, cfg.extractor_kernels, cfg.extractor_strides, strict=True)
    arguments = {MODE: MODES[cfg.extractor_norm], CONVOLUTIONS: [list(layer) for layer in convolutions]}
    for ours, theirs in ARGUMENTS.items():
        arguments[theirs] = getattr(cfg, ours)
        if ours == "heads" and cfg.relative_bias:
            arguments |= {theirs: getattr(cfg, ours) for ours, theirs in BIAS_ARGUMENTS.items()}
    return arguments


def gradient_argument(cfg: EncoderConfig) -> float | None:
    """`feature_grad_mult`, which torchaudio takes in (0, 1) or as None for the unscaled gradient."""
    return cfg.feature_gradient_scale if 0.0 < cfg.feature_gradient_scale < 1.0 else None


def encoder_fields(
    arguments: Mapping[str, Any], *, defaults: Mapping[str, Any], relative_bias: bool, where: str
) -> dict[str, Any]:
    """Fields of `EncoderConfig` that a builder's arguments say; `defaults` where they say nothing.

    Raises ConvertError naming the argument and `where` it stands: absent without a default, or of another type.
    """
    said = {**defaults, **arguments}

    def value(theirs: str, kind: type):
        if theirs not in said:
            raise ConvertError(f"{where} does not say {theirs}; add it, or pass architecture=")
        found = float(said[theirs]) if kind is float and type(said[theirs]) is int else said[theirs]
        if type(found) is not kind:
            raise ConvertError(f"{where}: {theirs} is {short(found)}, which is no {kind.__name__}")
        if kind is int and not 0 < found < LARGEST_SIZE:
            raise ConvertError(f"{where}: {theirs} is {short(found)}, as no speech encoder has it")
        return found

    kinds = {field.name: type(field.default) for field in fields(EncoderConfig)}
    table = ARGUMENTS | (BIAS_ARGUMENTS if relative_bias else {})
    found = {ours: value(theirs, kinds[ours]) for ours, theirs in table.items()}
    mode = {theirs: ours for ours, theirs in MODES.items()}.get(value(MODE, str))
    if mode is None:
        raise ConvertError(f"{where}: {MODE} is {short(said[MODE])}, can be {' or '.join(MODES.values())}")
    convolutions = said.get(CONVOLUTIONS) or PUBLISHED_CONVOLUTIONS
    if not isinstance(convolutions, list | tuple) or not all(
        isinstance(layer, list | tuple)
        and len(layer) == 3
        and all(type(n) is int and 0 < n < LARGEST_SIZE for n in layer)
        for layer in convolutions
    ):
        raise ConvertError(
            f"{where}: {CONVOLUTIONS} is {short(convolutions)}, not a list of [channels, kernel, stride]"
        )
    channels, kernels, strides = (tuple(column) for column in zip(*convolutions, strict=True))
    if GRADIENT in said:
        found["feature_gradient_scale"] = 1.0 if said[GRADIENT] is None else value(GRADIENT, float)
    return {
        **found,
        "extractor_norm": mode,
        "extractor_channels": channels,
        "extractor_kernels": kernels,
        "extractor_strides": strides,
        "relative_bias": relative_bias,
    }


def own_fields(said: Any, *, where: str) -> dict[str, Any]:
    """Fields of `OURS` out of what a file of ours keeps under "wavlab_jax". Raises ConvertError naming a wrong one."""
    kinds = {field.name: type(field.default) for field in fields(EncoderConfig) if field.name in OURS}
    if not isinstance(said, Mapping):
        raise ConvertError(f"{where}: wavlab_jax is {short(said)}, which is no object")
    for name, value in said.items():
        if name not in kinds or type(value) is not kinds[name]:
            raise ConvertError(
                f"{where}: wavlab_jax has {str(name)[:60]} = {short(value)}, which this version does not know"
            )
    return dict(said)


def require_same(given: EncoderConfig, said: Mapping[str, Any], *, where: str) -> None:
    """Raises ConvertError naming what `where` says otherwise than the architecture given; dropout may differ."""
    wrong = [
        f"{name} is {value!r} there and {getattr(given, name)!r} in architecture"
        for name, value in said.items()
        if getattr(given, name) != value and name not in _TRAINING_ONLY
    ]
    if wrong:
        raise ConvertError(f"{where} contradicts the architecture that was given: {', '.join(wrong)}; mend either")


def config_of(found: Mapping[str, Any], *, where: str) -> EncoderConfig:
    """The configuration of these fields. Raises ConvertError naming `where` they stand if they cannot work together."""
    try:
        return EncoderConfig(**found)
    except (ValueError, ZeroDivisionError, TypeError) as error:
        raise ConvertError(f"{where}: {error}") from error


class Inferred(NamedTuple):
    """`encoder`: the architecture; `notes`: what of it was assumed, in sentences."""

    encoder: EncoderConfig
    notes: tuple[str, ...]


def infer_architecture(shapes: Mapping[str, tuple[int, ...]], *, where: str) -> Inferred:
    """The architecture of an encoder whose tensors (Hugging Face's names, PyTorch's shapes) have these shapes.

    Shapes determine widths, depth, kernels, groups and biases. What they leave open is what the published models
    have: strides, the number of heads (WavLM's gates tell it), the order of norms and waveform normalisation, which go
    with the extractor's norm there, WavLM's largest distance, and dropout.

    Raises ConvertError where a tensor is absent or nothing published has these shapes: `architecture` must say then.
    """

    def shape(key: str, rank: int) -> tuple[int, ...]:
        found = shapes.get(key)
        if found is None or len(found) != rank or 0 in found:
            raise ConvertError(
                f"{where}: no {key} with {rank} dimensions, so the architecture cannot be told"
                + ("" if found is None else f" (it is {list(found)})")
                + ". Is it a whole encoder of torchaudio's?"
            )
        return found

    def count(pattern: str) -> int:
        indices = {int(match[1]) for key in shapes if (match := re.match(pattern, key))}
        if not indices or indices != set(range(len(indices))):
            raise ConvertError(f"{where}: the indices of {pattern} are {sorted(indices)[:8]}; some are missing")
        return len(indices)

    convolution = "feature_extractor.conv_layers.{}.{}"
    convolutions = [
        shape(convolution.format(index, "conv.weight"), 3)
        for index in range(count(r"feature_extractor\.conv_layers\.(\d{1,4})\."))
    ]
    kernels = tuple(kernel for _, _, kernel in convolutions)
    if kernels != tuple(kernel for _, kernel, _ in PUBLISHED_CONVOLUTIONS):
        raise ConvertError(
            f"{where}: the extractor's kernels are {list(kernels)}, unlike any published model's, and the strides are "
            "not in the file: pass architecture="
        )
    norm = "layer" if convolution.format(1, "layer_norm.weight") in shapes else "group"
    width = shape("feature_projection.projection.weight", 2)[0]
    position = shape("encoder.pos_conv_embed.conv.parametrizations.weight.original1", 3)
    large = norm == "layer"
    found = {
        "extractor_channels": tuple(outputs for outputs, _, _ in convolutions),
        "extractor_kernels": kernels,
        "extractor_strides": tuple(stride for _, _, stride in PUBLISHED_CONVOLUTIONS),
        "extractor_bias": convolution.format(0, "conv.bias") in shapes,
        "extractor_norm": norm,
        "width": width,
        "layers": count(r"encoder\.layers\.(\d{1,4})\."),
        "feed_forward": shape("encoder.layers.0.feed_forward.intermediate_dense.weight", 2)[0],
        "position_kernel": position[2],
        "position_groups": max(width // position[1], 1),
        "pre_norm": large,
        "normalize_waveform": large,
        "feature_gradient_scale": 1.0 if large else 0.1,
        "layerdrop": 0.0 if large else 0.05,
        **({name: 0.0 for name in ("dropout", "attention_dropout", "projection_dropout")} if large else {}),
    }
    notes = [
        f"The file has no configuration. Assumed, as in every model that torchaudio publishes with {norm} norm in the "
        f"extractor: LayerNorm {'before' if large else 'after'} attention and feed-forward, waveforms "
        f"{'' if large else 'not '}normalised, {'no dropout' if large else 'dropout of the Base models'}. Pass "
        "architecture= if that is not so (mHuBERT-147 has group norm and normalised waveforms)."
    ]
    if "encoder.layers.0.attention.rel_attn_embed.weight" in shapes:
        buckets, heads = shape("encoder.layers.0.attention.rel_attn_embed.weight", 2)
        found |= {"relative_bias": True, "bias_buckets": buckets, "heads": heads}
        notes.append("The relative position bias was assumed to reach 800 frames, as in every published WavLM.")
    else:
        found["heads"] = PUBLISHED_HEADS.get(width, width // 64 if width % 64 == 0 else 0)
        if not found["heads"]:
            raise ConvertError(f"{where}: the number of heads cannot be told for width {width}: pass architecture=")
        known = "the published models" if width in PUBLISHED_HEADS else "width / 64"
        notes.append(f"{found['heads']} heads were assumed for width {width} ({known}).")
    return Inferred(config_of(found, where=where), tuple(notes))
