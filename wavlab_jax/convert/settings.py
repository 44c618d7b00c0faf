"""The settings table: fields of `EncoderConfig` <-> fields of Hugging Face's config.json and preprocessor_config.json.

Numbers keep their meaning; what one side cannot say is refused, never dropped.
"""

import dataclasses
import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.batch import SAMPLE_RATE
from wavlab_jax.convert.checkpoint import kind_of
from wavlab_jax.convert.names import LARGEST_SIZE, ConvertError, short
from wavlab_jax.encoder import EncoderConfig

PREPROCESSOR_EPSILON = 1e-7  # transformers `feature_extraction_wav2vec2.py` zero_mean_unit_var_norm
EXTRACTOR_EPSILON = 1e-5  # PyTorch's default, which transformers' extractor norms keep whatever layer_norm_eps says

# Our field -> transformers' field, where the values mean the same.
SAME: dict[str, str] = {
    "extractor_channels": "conv_dim",
    "extractor_kernels": "conv_kernel",
    "extractor_strides": "conv_stride",
    "extractor_bias": "conv_bias",
    "extractor_norm": "feat_extract_norm",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "feed_forward": "intermediate_size",
    "pre_norm": "do_stable_layer_norm",
    "position_kernel": "num_conv_pos_embeddings",
    "position_groups": "num_conv_pos_embedding_groups",
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "projection_dropout": "feat_proj_dropout",
    "layerdrop": "layerdrop",
    "norm_epsilon": "layer_norm_eps",
}
# `Checkpoint.settings` -> transformers' field, of wav2vec 2.0 with its pre-training heads.
CONTRASTIVE: dict[str, str] = {
    "temperature": "contrastive_logits_temperature",
    "negatives": "num_negatives",
    "diversity_weight": "diversity_loss_weight",
}
BIAS: dict[str, str] = {"bias_buckets": "num_buckets", "bias_max_distance": "max_bucket_distance"}

# What transformers takes a field for that config.json leaves out (its three config classes agree).
ABSENT: dict[str, Any] = {
    "conv_dim": (512,) * 7,
    "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
    "conv_stride": (5, 2, 2, 2, 2, 2, 2),
    "conv_bias": False,
    "feat_extract_norm": "group",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "do_stable_layer_norm": False,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.1,
    "layer_norm_eps": 1e-5,
    "num_buckets": 320,
    "max_bucket_distance": 800,
}

# Fields with the one value that this encoder computes.
REQUIRED: dict[str, Any] = {
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "feat_proj_layer_norm": True,
    "conv_pos_batch_norm": False,
    "layer_norm_eps": EXTRACTOR_EPSILON,
    "add_adapter": False,
    "adapter_attn_dim": None,
}

_WHY = {"adapter_attn_dim": "MMS has adapters inside each layer", "add_adapter": "an adapter on top"}

# Fields that concern fine-tuning only: transformers' own defaults, spelled out so that later ones do not replace them.
# mask_time_prob must not be 0: transformers leaves the mask embedding out of the model then.
FINE_TUNING: dict[str, Any] = {
    "apply_spec_augment": True,
    "mask_time_prob": 0.05,
    "mask_time_length": 10,
    "mask_time_min_masks": 2,
    "mask_feature_prob": 0.0,
    "mask_feature_length": 10,
    "final_dropout": 0.1,
    "initializer_range": 0.02,
    "ctc_zero_infinity": False,
    "use_weighted_layer_sum": False,
    "classifier_proj_size": 256,
    "vocab_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HUBERT_ONLY: dict[str, Any] = {
    "feat_proj_layer_norm": True,
    "conv_pos_batch_norm": False,
    "mask_feature_min_masks": 0,
    "ctc_loss_reduction": "sum",
}
WAVLM_ONLY: dict[str, Any] = {"add_adapter": False, "ctc_loss_reduction": "mean"}
WAV2VEC2_ONLY: dict[str, Any] = {
    "mask_feature_min_masks": 0,
    "ctc_loss_reduction": "sum",
    "add_adapter": False,
    "adapter_attn_dim": None,
    "feat_quantizer_dropout": 0.0,
    "num_negatives": 100,
    "contrastive_logits_temperature": 0.1,
    "diversity_loss_weight": 0.1,
}
_ONLY = {"hubert": HUBERT_ONLY, "wavlm": WAVLM_ONLY, "wav2vec2": WAV2VEC2_ONLY}

# Heads that transformers has a class for, which is then what config.json names.
PRETRAINING_HEADS = frozenset(
    f"{name}.{kind}" for name in ("quantizer.weight_proj", "project_q", "project_hid") for kind in ("weight", "bias")
) | {"quantizer.codevectors"}
CTC_HEADS = frozenset({"lm_head.weight", "lm_head.bias"})
ADAPTER = "adapter_layer"  # part of the keys of MMS's bottlenecks, one in every layer (`convert.adapters`)

# Our fields that transformers has no name for, kept in config.json so that a folder of ours comes back whole.
OURS = "wavlab_jax"
_NAMED = {*SAME, *BIAS, "relative_bias", "normalize_waveform"}
_OURS_FIELDS = tuple(field.name for field in dataclasses.fields(EncoderConfig) if field.name not in _NAMED)

_CLASSES = {"hubert": "Hubert", "wavlm": "WavLM", "wav2vec2": "Wav2Vec2"}


class Task(NamedTuple):
    """The class of transformers that a checkpoint is written for.

    Attributes:
        architecture: its name, "HubertModel".
        heads: names of the heads that it has.
        fields: of config.json, that follow from their shapes.
    """

    architecture: str
    heads: frozenset[str]
    fields: dict[str, Any]

    @property
    def auto_class(self) -> str:
        """Which of transformers' AutoModel classes loads all of it: "AutoModel", "AutoModelForCTC", ..."""
        _, separator, kind = self.architecture.partition("For")
        return f"AutoModel{separator}{kind}"


def task_of(model_type: str, heads: Mapping[str, tuple[int, ...]]) -> Task:
    """The class with the most of these heads (name -> shape): pre-training, CTC, or the bare model.

    transformers can pre-train wav2vec 2.0 only; HuBERT's heads have no place there. Raises ConvertError if shapes do
    not fit each other.
    """
    if model_type == "wav2vec2" and heads.keys() >= PRETRAINING_HEADS:
        _, codes, width = heads["quantizer.codevectors"]
        projected, dim = heads["project_q.weight"]
        if not width or dim % width or codes % (dim // width):
            raise ConvertError(
                f"quantizer.codevectors {list(heads['quantizer.codevectors'])} do not make groups for project_q.weight "
                f"{list(heads['project_q.weight'])}: is the file whole?"
            )
        groups = dim // width
        fields = {
            "codevector_dim": dim,
            "proj_codevector_dim": projected,
            "num_codevector_groups": groups,
            "num_codevectors_per_group": codes // groups,
        }
        return Task("Wav2Vec2ForPreTraining", PRETRAINING_HEADS, fields)
    inner = {name: shape for name, shape in heads.items() if f".{ADAPTER}." in name}
    if heads.keys() >= CTC_HEADS:
        fields = {"vocab_size": heads["lm_head.weight"][0]}
        fields |= next(({"adapter_attn_dim": s[0]} for name, s in inner.items() if name.endswith("linear_1.bias")), {})
        return Task(f"{_CLASSES[model_type]}ForCTC", CTC_HEADS | inner.keys(), fields)
    return Task(f"{_CLASSES[model_type]}Model", frozenset(), {})


def huggingface_config(
    cfg: EncoderConfig,
    *,
    model_type: str | None = None,
    task: Task | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of config.json for an encoder: every field that its config class in transformers defines.

    Args:
        cfg: of the encoder.
        model_type: "hubert" or "wav2vec2" for one without relative bias; by default "hubert".
        task: from `task_of`; by default the bare model.
        settings: `Checkpoint.settings`; what config.json has no field for goes into the entry `OURS`.

    Raises ConvertError where the encoder is one that transformers cannot compute.
    """
    if cfg.norm_epsilon != EXTRACTOR_EPSILON:
        raise ConvertError(
            f"norm_epsilon is {cfg.norm_epsilon}, but transformers' extractor always uses {EXTRACTOR_EPSILON}: the "
            "exported model would differ"
        )
    model_type = kind_of(cfg, model_type)
    task = task or task_of(model_type, {})
    same = SAME | (BIAS if cfg.relative_bias else {})
    settings = dict(settings or {})
    tuned = settings.get("fine_tuning")
    tuned = tuned if isinstance(tuned, Mapping) else {}
    said = {theirs: settings[ours] for ours, theirs in CONTRASTIVE.items() if ours in settings}
    ours: dict[str, Any] = {name: getattr(cfg, name) for name in _OURS_FIELDS}
    return {
        "architectures": [task.architecture],
        "model_type": model_type,
        "torch_dtype": "float32",
        **{theirs: _plain(getattr(cfg, ours)) for ours, theirs in same.items()},
        "num_feat_extract_layers": len(cfg.extractor_channels),
        "hidden_act": "gelu",
        "feat_extract_activation": "gelu",
        **FINE_TUNING,
        **_ONLY[model_type],
        **{name: value for name, value in tuned.items() if name in _tuned(model_type)},
        **(said if model_type == "wav2vec2" else {}),
        **task.fields,
        OURS: ours | ({"settings": settings} if settings else {}),
    }


def checkpoint_settings(config: dict[str, Any], *, heads: Set[str]) -> dict[str, Any]:
    """`Checkpoint.settings` of a config.json: what it says beside the architecture, if it differs from the defaults."""
    settings: dict[str, Any] = {"sample_rate": SAMPLE_RATE}
    if heads >= PRETRAINING_HEADS:
        settings |= {ours: config[theirs] for ours, theirs in CONTRASTIVE.items() if theirs in config}
    defaults = _tuned(config["model_type"])
    tuned = {name: config[name] for name, value in defaults.items() if config.get(name, value) != value}
    if not tuned.get("mask_time_prob", True):
        del tuned["mask_time_prob"]  # see FINE_TUNING
    if tuned:
        settings["fine_tuning"] = tuned
    ours = config.get(OURS)
    said = ours.get("settings") if isinstance(ours, dict) else None
    return settings | (said if isinstance(said, dict) else {})


def _tuned(model_type: str) -> dict[str, Any]:
    """Fields that concern fine-tuning alone -> their defaults."""
    fields = FINE_TUNING | _ONLY[model_type]
    return {name: value for name, value in fields.items() if name not in REQUIRED and name not in CONTRASTIVE.values()}


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def preprocessor_config(cfg: EncoderConfig) -> dict[str, Any]:
    """The content of preprocessor_config.json for an encoder."""
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "padding_value": 0.0,
        "padding_side": "right",
        "do_normalize": cfg.normalize_waveform,
        # transformers' convention: a group-norm model there hears padding in any case, and takes no mask
        "return_attention_mask": cfg.extractor_norm == "layer",
    }


def encoder_config(
    config: dict[str, Any],
    *,
    folder: Path,
    normalize_waveform: bool | None = None,
    architecture: EncoderConfig | None = None,
) -> EncoderConfig:
    """The configuration that the content of a config.json describes; `folder` is where the preprocessor's file lies.

    Whether waveforms are normalised is what `normalize_waveform` says, else the folder, else `architecture`, else the
    rule of the published models: iff the extractor has layer norm (fairseq's issue 3277; mHuBERT-147 breaks it).

    Raises ConvertError naming the field: another kind of model, or something this encoder does not compute.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _CLASSES:
        raise ConvertError(f"{folder}/config.json: model_type is {short(model_type)}, can import {', '.join(_CLASSES)}")
    for name, value in REQUIRED.items():
        if config.get(name, value) != value:
            raise ConvertError(
                f"{folder}/config.json: {name} is {short(config[name])}, this encoder only has {value!r}"
                + (f" ({_WHY[name]}): take the model without it" if name in _WHY else "")
            )
    heard = _preprocessor(folder)
    if heard.get("sampling_rate", SAMPLE_RATE) != SAMPLE_RATE:
        raise ConvertError(f"{folder} hears {short(heard['sampling_rate'])} Hz; this encoder hears {SAMPLE_RATE}")
    if normalize_waveform is None and "do_normalize" in heard:
        normalize_waveform = bool(heard["do_normalize"])
    if normalize_waveform is None and architecture is not None:
        normalize_waveform = architecture.normalize_waveform
    relative_bias = model_type == "wavlm"
    same = SAME | (BIAS if relative_bias else {})
    fields = {ours: _value(config, theirs, folder=folder) for ours, theirs in same.items()}
    if fields["extractor_norm"] not in ("group", "layer"):
        raise ConvertError(f"{folder}/config.json: no such feat_extract_norm as {short(fields['extractor_norm'])}")
    if normalize_waveform is None:
        normalize_waveform = fields["extractor_norm"] == "layer"
    # fairseq's Base and Large, and the preprocessor that the model is used with there; unless the folder is ours
    fields["feature_gradient_scale"] = 0.1 if fields["extractor_norm"] == "group" else 1.0
    fields["waveform_epsilon"] = PREPROCESSOR_EPSILON
    ours = config.get(OURS)
    for name, value in (ours if isinstance(ours, dict) else {}).items():
        if name in _OURS_FIELDS:
            kind = type(getattr(EncoderConfig(), name))
            if type(value) is not kind:
                raise ConvertError(
                    f"{folder}/config.json: {OURS}.{name} is {short(value)}, which is no {kind.__name__}"
                )
            fields[name] = value
    try:
        return EncoderConfig(**fields, relative_bias=relative_bias, normalize_waveform=normalize_waveform)
    except ValueError as error:
        raise ConvertError(f"{folder}/config.json: {error}") from error


def _value(config: dict[str, Any], name: str, *, folder: Path):
    """The field, or transformers' default, as the type that it has there."""
    value, kind = config.get(name, ABSENT[name]), type(ABSENT[name])
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    elif kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConvertError(f"{folder}/config.json: {name} is {short(value)}, which is no {kind.__name__}")
    for size in value if kind is tuple else (value,) if kind is int else ():
        if type(size) is not int or not 0 < size < LARGEST_SIZE:
            raise ConvertError(f"{folder}/config.json: {name} has the size {short(size)}, as no speech encoder has it")
    return value


def _preprocessor(folder: Path) -> dict[str, Any]:
    """What the folder says of waveforms: newer processors keep the extractor's settings inside their own file."""
    for name, inside in (("processor_config.json", "feature_extractor"), ("preprocessor_config.json", None)):
        if (folder / name).is_file():
            said = read_json(folder / name)
            said = said.get(inside) if inside else said
            if isinstance(said, dict) and "do_normalize" in said:
                return said
    return {}


def says_normalisation(folder: Path) -> bool:
    """Whether the folder says if waveforms are normalised."""
    return "do_normalize" in _preprocessor(folder)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConvertError naming the file when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConvertError(f"{path} does not exist") from error
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ConvertError(f"{path} is not JSON: {why}") from error
    if not isinstance(content, dict):
        raise ConvertError(f"{path} holds a {type(content).__name__}, not an object")
    return content
