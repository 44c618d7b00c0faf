"""fairseq's configuration of HuBERT, wav2vec 2.0 and WavLM (`cfg.model`, `cfg.task`) <-> `EncoderConfig`.

Names and defaults: fairseq `models/wav2vec/wav2vec2.py` Wav2Vec2Config, `models/hubert/hubert.py` HubertConfig; unilm
`wavlm/WavLM.py` WavLMConfig, which puts `normalize` among them.
"""

import ast
import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from data_pipelines.batch import SAMPLE_RATE
from wavlab_jax.convert.names import LARGEST_SIZE, ConvertError, short
from wavlab_jax.encoder import EncoderConfig

EPSILON = 1e-5  # of every norm there, and of `F.layer_norm` over the waveform
CONVOLUTIONS = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"

# Our field -> theirs, where values mean the same; and what theirs is where a file does not say.
_SAME: dict[str, tuple[str, Any]] = {
    "width": ("encoder_embed_dim", 768),
    "layers": ("encoder_layers", 12),
    "heads": ("encoder_attention_heads", 12),
    "feed_forward": ("encoder_ffn_embed_dim", 3072),
    "pre_norm": ("layer_norm_first", False),
    "extractor_bias": ("conv_bias", False),
    "position_kernel": ("conv_pos", 128),
    "position_groups": ("conv_pos_groups", 16),
    "dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "activation_dropout": ("activation_dropout", 0.0),
    "layerdrop": ("encoder_layerdrop", 0.0),
    "projection_dropout": ("dropout_input", 0.0),
    "feature_gradient_scale": ("feature_grad_mult", 1.0),
}
# The released WavLMs have max_distance 800; 1280 is what the code takes for a file that does not say.
_BIAS: dict[str, tuple[str, Any]] = {
    "bias_buckets": ("num_buckets", 320),
    "bias_max_distance": ("max_distance", 1280),
}
_MODES = {"group": "default", "layer": "layer_norm"}
_TRAINING_ONLY = {"dropout", "attention_dropout", "activation_dropout", "layerdrop", "projection_dropout"} | {
    "feature_gradient_scale"
}
# Our fields that fairseq has none for; a file of ours keeps them beside `cfg`.
_SAID = {*_SAME, *_BIAS, "extractor_norm", "extractor_channels", "extractor_kernels", "extractor_strides"}
OWN_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(EncoderConfig)
    if field.name not in {*_SAID, "relative_bias", "normalize_waveform"}
)

# Fields with the one value that this encoder computes, and what another would be.
_REQUIRED: dict[str, tuple[Any, str]] = {
    "activation_fn": ("gelu", "another activation"),
    "layer_type": ("transformer", "conformer layers, or adapters inside the layers (MMS)"),
    "conv_pos_batch_norm": (False, "batch norm before the positional convolution"),
    "pos_conv_depth": (1, "several positional convolutions (data2vec)"),
    "target_glu": (False, "a gated linear unit over the targets"),
    "quantize_input": (False, "a Transformer that hears quantized features"),
    "crop_seq_to_multiple": (1, "frames cut off at the end"),
    "expand_attention_head_size": (-1, "attention heads of another width"),
}

# Fields of training alone, which are kept from one fairseq file to the next.
_TRAINING: tuple[str, ...] = (
    *("mask_length", "mask_prob", "mask_selection", "mask_other", "no_mask_overlap", "mask_min_space"),
    *("mask_channel_length", "mask_channel_prob", "mask_channel_selection", "mask_channel_other"),
    *("no_mask_channel_overlap", "mask_channel_min_space", "dropout_features", "latent_temp"),
)
_OF_KIND: dict[str, tuple[str, ...]] = {
    "hubert": ("skip_masked", "skip_nomask"),
    "wavlm": ("skip_masked", "skip_nomask"),
    "wav2vec2": (
        *("negatives_from_everywhere", "cross_sample_negatives", "codebook_negatives", "mask_channel_before"),
        *("quantizer_depth", "quantizer_factor"),
    ),
}


class Stated(NamedTuple):
    """What a file says of an encoder.

    Attributes:
        fields: of `EncoderConfig`.
        settings: see `Checkpoint.settings`.
        notes: what was assumed.
    """

    fields: dict[str, Any]
    settings: dict[str, Any]
    notes: tuple[str, ...]


def resolved(section: Any, root: Mapping[str, Any]) -> dict[str, Any]:
    """A section of a configuration with omegaconf's "${task.label_rate}" looked up in `root` and "???" left out."""

    def look_up(value: Any, depth: int = 8) -> Any:
        reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
        if reference is None:
            return value
        found: Any = root
        for part in reference[1].split("."):
            found = found.get(part, "???") if isinstance(found, Mapping) else "???"
        return look_up(found, depth - 1) if depth else "???"

    plain = {key: look_up(value) for key, value in section.items()} if isinstance(section, Mapping) else {}
    return {key: value for key, value in plain.items() if value != "???"}


def stated(model: Mapping[str, Any], task: Mapping[str, Any], *, model_type: str, where: str) -> Stated:
    """What `cfg.model` and `cfg.task` say. Raises ConvertError naming a field that this encoder does not compute."""

    def value(section: Mapping[str, Any], name: str, default: Any) -> Any:
        found = section.get(name, default)
        found = float(found) if type(default) is float and type(found) is int else found
        found = bool(found) if type(default) is bool and found in (0, 1) else found
        if type(found) is not type(default):
            raise ConvertError(f"{where}: {name} is {short(found)}, which is no {type(default).__name__}")
        if type(default) is int and not 0 < found < LARGEST_SIZE:
            raise ConvertError(f"{where}: {name} is {short(found)}, as no speech encoder has it")
        return found

    for name, (only, otherwise) in _REQUIRED.items():
        found = model.get(name, only)
        if found != only and not (name == "expand_attention_head_size" and found in (0, None)):
            raise ConvertError(f"{where}: {name} is {short(found)}: {otherwise}; this encoder only has {only!r}")
    fields = {ours: value(model, theirs, default) for ours, (theirs, default) in _SAME.items()}
    notes = []

    biased = value(model, "relative_position_embedding", False)
    gated = value(model, "gru_rel_pos", False)
    if biased != gated or biased != (model_type == "wavlm"):
        raise ConvertError(
            f"{where}: relative_position_embedding is {biased} and gru_rel_pos {gated} in a "
            f"{model_type} model; this encoder has both (WavLM) or neither"
        )
    if biased:
        fields |= {ours: value(model, theirs, default) for ours, (theirs, default) in _BIAS.items()}
        notes += [
            f"The file does not say {theirs}; {default} was taken, as unilm's code does."
            for theirs, default in _BIAS.values()
            if theirs not in model
        ]
    mode = value(model, "extractor_mode", "default")
    norm = {theirs: ours for ours, theirs in _MODES.items()}.get(mode)
    if norm is None:
        raise ConvertError(f"{where}: extractor_mode is {mode!r}, can be {' or '.join(_MODES.values())}")
    channels, kernels, strides = zip(
        *convolutions(value(model, "conv_feature_layers", CONVOLUTIONS), where=where), strict=True
    )
    rate = value(task, "sample_rate", SAMPLE_RATE)
    if rate != SAMPLE_RATE:
        raise ConvertError(f"{where}: a model of audio at {rate} Hz; this encoder hears {SAMPLE_RATE} Hz")
    said = {**model, **task}
    fields |= {
        "relative_bias": biased,
        "extractor_norm": norm,
        "extractor_channels": channels,
        "extractor_kernels": kernels,
        "extractor_strides": strides,
        "normalize_waveform": value(said, "normalize", False),
    }
    settings: dict[str, Any] = {"sample_rate": rate, "temperature": value(model, "logit_temp", 0.1)}
    label_rate = said.get("label_rate")
    if type(label_rate) in (int, float) and label_rate > 0:
        settings["label_rate"] = float(label_rate)
    if model_type == "wav2vec2" and type(model.get("num_negatives")) is int:
        settings["negatives"] = model["num_negatives"]
    kept = {name: _plain(model.get(name)) for name in (*_TRAINING, *_OF_KIND[model_type])}
    kept = {name: value for name, value in kept.items() if value is not None}
    return Stated(fields, settings | ({"fairseq": kept} if kept else {}), tuple(notes))


def require_same(given: EncoderConfig, said: Mapping[str, Any], *, where: str) -> None:
    """Raises ConvertError naming what the file says otherwise than the architecture given; dropout may differ."""
    wrong = [
        f"{name} is {value!r} there and {getattr(given, name)!r} in architecture"
        for name, value in said.items()
        if getattr(given, name) != value and name not in _TRAINING_ONLY
    ]
    if wrong:
        raise ConvertError(f"{where} contradicts the architecture that was given: {', '.join(wrong)}; mend either")


def own_fields(said: Any, *, where: str) -> dict[str, Any]:
    """Fields of `OWN_FIELDS` that a file of ours keeps. Raises ConvertError naming one of another type or unknown."""
    kinds = {field.name: type(field.default) for field in dataclasses.fields(EncoderConfig) if field.name in OWN_FIELDS}
    said = said if isinstance(said, dict) else {}
    for name, value in said.items():
        if name not in kinds or type(value) is not kinds[name]:
            raise ConvertError(f"{where}: wavlab_jax has {name} = {short(value)}, which this version does not know")
    return said


def own_settings(settings: Any, *, where: str) -> dict[str, Any]:
    """`Checkpoint.settings` that a file of ours keeps. Raises ConvertError unless they are plain and of sane size."""
    seen = 0

    def is_plain(value: Any) -> bool:
        nonlocal seen
        seen += 1  # what is shared inside could make them endless when written out
        if isinstance(value, dict):
            return seen < 1 << 20 and all(isinstance(key, str) and is_plain(part) for key, part in value.items())
        if isinstance(value, list | tuple):
            return seen < 1 << 20 and all(is_plain(part) for part in value)
        return value is None or isinstance(value, bool | int | float | str)

    if not isinstance(settings, dict) or not is_plain(settings):
        raise ConvertError(f"{where}: the settings under wavlab_jax are not plain values; remove that entry")
    return settings


def model_section(cfg: EncoderConfig, *, model_type: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`cfg.model` for an encoder, without what follows from the heads. Raises ConvertError if fairseq cannot say it."""
    if cfg.norm_epsilon != EPSILON:
        raise ConvertError(f"norm_epsilon is {cfg.norm_epsilon}, but fairseq's norms always add {EPSILON}")
    training = settings.get("fairseq") or {}
    label_rate = {} if model_type == "wav2vec2" else {"label_rate": float(settings.get("label_rate", 50.0))}
    bias = {
        "relative_position_embedding": True,
        "gru_rel_pos": True,
        **{theirs: getattr(cfg, ours) for ours, (theirs, _) in _BIAS.items()},
    }
    negatives = {"num_negatives": settings["negatives"]} if "negatives" in settings else {}
    return {
        "_name": model_type,
        **label_rate,
        "extractor_mode": _MODES[cfg.extractor_norm],
        **{theirs: getattr(cfg, ours) for ours, (theirs, _) in _SAME.items()},
        "conv_feature_layers": convolutions_text(cfg),
        "activation_fn": "gelu",
        "logit_temp": float(settings.get("temperature", 0.1)),
        **(bias if cfg.relative_bias else {}),
        **(negatives if model_type == "wav2vec2" else {}),
        **{name: training[name] for name in (*_TRAINING, *_OF_KIND[model_type]) if name in training},
    }


def task_section(
    cfg: EncoderConfig, *, model_type: str, settings: Mapping[str, Any], label_sets: int
) -> dict[str, Any]:
    """`cfg.task`: no more than every version of the task's dataclass has, for fairseq refuses what it does not know."""
    common = {"data": "", "sample_rate": SAMPLE_RATE, "normalize": cfg.normalize_waveform}
    if model_type == "wav2vec2":
        return {"_name": "audio_pretraining", **common}
    name = {"hubert": "hubert_pretraining", "wavlm": "utterance_mixing_pretraining"}[model_type]
    labels = ["km"] if label_sets < 2 else [f"km{index}" for index in range(label_sets)]
    return {"_name": name, **common, "label_rate": float(settings.get("label_rate", 50.0)), "labels": labels}


def convolutions(text: str, *, where: str) -> list[tuple[int, int, int]]:
    """(channels, kernel, stride) of each convolution from fairseq's expression, "[(512,10,5)] + [(512,3,2)] * 4".

    Only lists of such triples, `+` and `* number` are understood; peers `eval` it. Raises ConvertError for the rest.
    """

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=int(number)) if type(number) is int and 0 < number < 1 << 20:
                return number
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                return [value(part) for part in parts]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return few([*value(left), *value(right)])
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                one, other = value(left), value(right)
                repeated, times = (other, one) if isinstance(one, int) else (one, other)
                return few(repeated * min(times, 65))
        raise ValueError

    def few(triples: list) -> list:
        if len(triples) > 64:  # layers: no model has so many, and a product of products could fill the memory
            raise ValueError
        return triples

    try:
        found = value(ast.parse(text.strip(), mode="eval").body) if len(text) < 1000 else []
        if found and all(len(triple) == 3 and all(type(n) is int for n in triple) for triple in found):
            return [tuple(triple) for triple in found]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        pass
    raise ConvertError(
        f"{where}: conv_feature_layers is {text[:80]!r}; only lists of (channels, kernel, stride) are understood, "
        "joined by + and repeated by *"
    )


def convolutions_text(cfg: EncoderConfig) -> str:
    """The inverse of `convolutions`: fairseq's spelling."""
    layers = zip(cfg.extractor_channels, cfg.extractor_kernels, cfg.extractor_strides, strict=True)
    parts = []
    for (channels, kernel, stride), same in itertools.groupby(layers):
        times = len(list(same))
        parts.append(f"[({channels},{kernel},{stride})]" + (f" * {times}" if times > 1 else ""))
    return " + ".join(parts)


def _plain(value: Any) -> Any:
    """A scalar, or a list of a few; None for anything else. Older files spell the latter "(2,0.5,0.999995)"."""
    if isinstance(value, str) and re.fullmatch(r"\([\d.,e\s-]{1,100}\)", value):
        try:
            value = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            return None
    parts = value if isinstance(value, list | tuple) and len(value) < 8 else (value,)
    if not all(type(part) in (bool, int, float, str) for part in parts):
        return None
    return list(parts) if isinstance(value, list | tuple) else value
