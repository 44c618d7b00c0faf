"""ESPnet's self-supervised encoders in and out: hubert1 (WavLabLM EK, MK and MS, CV-HuBERT) and wavlm1.

A state dict (.pth) and config.yaml beside it. The encoder is torchaudio's HuBERTPretrainModel under a prefix:

    encoder.hubert_pretrain_model.*   espnet2/asr/encoder/hubert_encoder.py TorchAudioHuBERTPretrainEncoder
    encoder.wavlm_pretrain_model.*    espnet2/asr/encoder/wavlm_encoder.py TorchAudioWavLMPretrainEncoder
    encoder.global_step               a counter of fine-tuning

config.yaml, as espnet2/tasks/hubert.py build_model reads it: `encoder_conf` has the arguments of torchaudio's builder,
by their own names (`torchaudio_settings.ARGUMENTS`) and with the defaults in `DEFAULTS`; `num_classes` and `token_list`
stand beside it (token k names unit k; `<unk>` and `<sos/eos>` come after the units); `normalize` says what becomes of
waveforms.

ESPnet loads with strict=False: a name that it does not know is passed over in silence. So `write` spells weight norm
the old way, which torch of any age understands.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from wavlab_jax.convert.checkpoint import Checkpoint
from wavlab_jax.convert.huggingface import local
from wavlab_jax.convert.names import ConvertError, short
from wavlab_jax.convert.plain_yaml import read_yaml
from wavlab_jax.convert.torchaudio import (
    TEMPERATURE,
    checkpoint_from,
    fill_slots,
    has_hubert_head,
    open_tensors,
    read_side_file,
    side_notes,
    write_folder,
)
from wavlab_jax.convert.torchaudio_names import state_dict, to_hub
from wavlab_jax.convert.torchaudio_settings import (
    GRADIENT,
    OURS,
    builder_arguments,
    config_of,
    encoder_fields,
    gradient_argument,
    own_fields,
    require_same,
)
from wavlab_jax.encoder import EncoderConfig

MODEL_FILE = "model.pth"
CONFIG_FILE = "config.yaml"
_PREFIXES: dict[str, str] = {  # of the parameters -> the encoder's name in config.yaml
    "encoder.hubert_pretrain_model.": "torchaudio_hubert",
    "encoder.wavlm_pretrain_model.": "torchaudio_wavlm",
}
_MODELS = {"torchaudio_hubert": "torchaudio", "torchaudio_wavlm": "torchaudio_wavlm"}

# Defaults of TorchAudioHuBERTPretrainEncoder and TorchAudioWavLMPretrainEncoder (the last two: of the latter alone).
DEFAULTS: dict[str, Any] = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": None,
    "extractor_conv_bias": False,
    "encoder_embed_dim": 768,
    "encoder_projection_dropout": 0.1,
    "encoder_pos_conv_kernel": 128,
    "encoder_pos_conv_groups": 16,
    "encoder_num_layers": 12,
    "encoder_num_heads": 12,
    "encoder_attention_dropout": 0.1,
    "encoder_ff_interm_features": 3072,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.1,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.05,
    "feature_grad_mult": 0.1,
    "encoder_num_buckets": 320,
    "encoder_max_distance": 800,
}
_FINAL_DIM, _NUM_CLASSES = 256, 100  # theirs, for a head that is not there
# Arguments that change no hidden state: masks, loss, fine-tuning.
_NO_MATTER = ("mask_", "no_mask_", "skip_", "final_dim", "finetuning", "freeze_encoder_updates")
_AFTER_UNITS = ("<unk>", "<sos/eos>")  # egs2/TEMPLATE/asr1/scripts/feats/perform_kmeans.sh, stage 5
_FRAME_RATE = 50


def matches(path_or_loaded: Path | Any) -> bool:
    """Whether this is such a state dict, or a folder with one and its config.yaml; no values are read."""
    try:
        if isinstance(path_or_loaded, Path):
            if path_or_loaded.is_dir():
                return (path_or_loaded / CONFIG_FILE).is_file() and any(path_or_loaded.glob("*.pth"))
            path_or_loaded = open_tensors(path_or_loaded)
        found = state_dict(path_or_loaded, where="")
    except ConvertError:
        return False
    return any(key.startswith(prefix) for key in found for prefix in _PREFIXES)


def read(path: Path, *, architecture: EncoderConfig | None = None) -> Checkpoint:
    """The model in a .pth that has config.yaml beside it, or in a folder with both.

    Args:
        path: local. In a folder with several .pth the file must be named, unless the others are checkpoint.pth (where
            training stood) and links.
        architecture: of the encoder, where config.yaml is lost, or to choose another waveform normalisation; what
            config.yaml says of shapes and norms must agree.

    Raises:
        ConvertError: a file is absent or cannot be read; config.yaml has another kind of encoder, a front end or
            something that this encoder does not compute; tensors are missing, unexpected or of another shape.
    """
    path = local(path)
    file = _model_file(path) if path.is_dir() else path
    found = state_dict(open_tensors(file), where=str(file))
    prefix = next((prefix for prefix in _PREFIXES if any(key.startswith(prefix) for key in found)), None)
    if prefix is None:
        raise ConvertError(f"{file} has no {' or '.join(f'{prefix}*' for prefix in _PREFIXES)}: it is no such encoder")
    inside = {key.removeprefix(prefix): stored for key, stored in found.items() if key.startswith(prefix)}
    left_over = tuple(sorted(stored.key for key, stored in found.items() if not key.startswith(prefix)))
    hub = to_hub(inside, where=str(file))
    units = next(iter(hub.heads["label_embeddings"].shape), 0) if "label_embeddings" in hub.heads else None

    settings, notes, where = {}, (), file.parent / CONFIG_FILE
    if where.is_file():
        config = read_yaml(where)
        encoder, notes = architecture_of(config, _PREFIXES[prefix], architecture, where=str(where))
        settings = _settings(config, units, where=str(where))
    elif architecture is None:
        raise ConvertError(f"{where} does not exist; put the model's own there, or pass architecture=")
    else:
        encoder = architecture
    return checkpoint_from(
        hub,
        layout="espnet",
        encoder=encoder,
        where=str(file),
        side=read_side_file(file.parent) if file.name == MODEL_FILE else {},
        model_type="hubert",
        settings=settings,
        notes=notes,
        left_over=left_over,
    )


def write(checkpoint: Checkpoint, out: Path, *, card: str | None = None) -> tuple[str, ...]:
    """Writes the folder `out`: model.pth, config.yaml, README.md and a side file for heads that ESPnet has no slot for.

    `HubertTask.build_model_from_file("config.yaml", "model.pth")` is this model; of a head that the checkpoint does not
    have, ESPnet draws the values.

    Args:
        checkpoint: its tensors are read as they are written.
        out: local; must not exist, or be an empty folder. It appears whole or not at all.
        card: text of README.md; by default a short one.

    Returns: the names of the files.

    Raises:
        ConvertError: torchaudio cannot compute this encoder; a tensor is missing, of another shape, not finite or
            absurdly large; `out` has something in it already.
        CannotWrite: the disk is full, for one.
    """
    config = _config(checkpoint)
    slots = fill_slots(checkpoint, pretraining=True, old_weight_norm=True)
    prefix = {name: prefix for prefix, name in _PREFIXES.items()}[config["encoder"]]
    content = {f"{prefix}{key}": stored for key, stored in slots.model.items()}
    content["encoder.global_step"] = np.zeros(1, np.int64)
    notes = [*differences(checkpoint), *side_notes(slots.side)]
    text = "".join(f"# {note}\n" for note in notes)
    text += yaml.safe_dump(config, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    return write_folder(
        checkpoint,
        out,
        texts={CONFIG_FILE: text},
        model={MODEL_FILE: content},
        side=slots.side,
        notes=differences(checkpoint),
        card=card,
    )


def differences(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Where ESPnet will not compute quite what the encoder does, or has no place for what it knows: a sentence each."""
    cfg, notes = checkpoint.encoder, []
    if not has_hubert_head(checkpoint):
        notes.append("The checkpoint has no HuBERT head over one label set: ESPnet draws mask-prediction heads anew.")
    if cfg.normalize_waveform:
        notes.append(
            f"Waveforms are normalised with {cfg.waveform_epsilon:g} added to the variance; ESPnet's utterance_mvn "
            "adds nothing, which differs for very quiet audio, and S3PRL's espnet_hubert leaves it out altogether."
        )
    if checkpoint.settings.get("temperature", TEMPERATURE) != TEMPERATURE:
        notes.append(f"torchaudio divides logits by {TEMPERATURE}, not by {checkpoint.settings['temperature']}.")
    return tuple(notes)


def _model_file(folder: Path) -> Path:
    """The one .pth in the folder that is meant."""
    paths = sorted(folder.glob("*.pth"), key=lambda path: (path.is_symlink(), path.name))
    found: dict[Path, Path] = {}  # all may be links, as in the hub's cache, or some links to others, as in ESPnet's
    for path in paths:
        found.setdefault(path.resolve(), path)
    named = [path for path in found.values() if path.name != "checkpoint.pth"] or [*found.values()]
    if len(named) != 1:
        names = ", ".join(path.name for path in named) or "none"
        raise ConvertError(f"{folder} must have one .pth, has {names}; name the file that you want")
    return named[0]


def architecture_of(
    config: dict[str, Any], name: str, architecture: EncoderConfig | None, *, where: str
) -> tuple[EncoderConfig, tuple[str, ...]]:
    """The configuration that config.yaml describes, or `architecture` if they agree; and notes on what was assumed."""
    conf = config.get("encoder_conf") or {}
    if config.get("encoder", name) != name:
        raise ConvertError(f"{where}: encoder is {short(config['encoder'])}, but the parameters are those of {name}")
    if not isinstance(conf, dict):
        raise ConvertError(f"{where}: encoder_conf is {short(conf)}, not names and values")
    unknown = [str(key) for key in conf if key not in DEFAULTS and not str(key).startswith(_NO_MATTER)]
    if unknown:
        raise ConvertError(
            f"{where}: encoder_conf has {', '.join(unknown[:8])}, which may change what the encoder computes; remove "
            "what does not"
        )
    found = encoder_fields(conf, defaults=DEFAULTS, relative_bias=name == "torchaudio_wavlm", where=where)
    if architecture is not None:
        require_same(architecture, found, where=where)
        return architecture, ()
    if "wavlab_jax" in config:
        return config_of(found | own_fields(config["wavlab_jax"], where=where), where=where), ()
    normalisation, note = _normalisation(config, where=where)
    return config_of(found | normalisation, where=where), (note,)


def _normalisation(config: dict[str, Any], *, where: str) -> tuple[dict[str, Any], str]:
    """Our fields for what happens to the waveform before the encoder, and a note; raises where we have none."""
    before = [key for key in ("frontend", "preencoder") if config.get(key) is not None]
    if config.get("input_size", 1) is None or before:
        raise ConvertError(f"{where}: the encoder hears a {' and a '.join(before) or 'frontend'}, not waveforms")
    kind, conf = config.get("normalize"), config.get("normalize_conf") or {}
    if kind is None:
        return {"normalize_waveform": False}, (
            "config.yaml says normalize: null, so waveforms are not normalised, as in ESPnet and S3PRL's espnet_hubert."
        )
    if not isinstance(conf, dict):
        raise ConvertError(f"{where}: normalize_conf is {short(conf)}, not names and values")
    means, variances = conf.get("norm_means", True), conf.get("norm_vars", False)  # espnet2/layers/utterance_mvn.py
    if kind == "utterance_mvn" and means and variances:
        return {"normalize_waveform": True, "waveform_epsilon": 1e-20}, (
            "config.yaml says normalize: utterance_mvn, so waveforms are normalised; S3PRL's espnet_hubert leaves that "
            "out."
        )
    raise ConvertError(
        f"{where}: normalize is {short(kind)} (norm_means {short(means)}, norm_vars {short(variances)}), which this "
        "encoder does not compute; pass architecture= with normalize_waveform as you want it (S3PRL's "
        "espnet_hubert leaves normalisation out)"
    )


def _settings(config: dict[str, Any], units: int | None, *, where: str) -> dict[str, Any]:
    """What else config.yaml says: the names of the units, and their rate."""
    settings: dict[str, Any] = {}
    classes, names = config.get("num_classes"), config.get("token_list")
    if units is not None and classes is not None and classes != units:
        raise ConvertError(
            f"{where}: num_classes is {short(classes)}, but label_embeddings has {units} rows: whose is it?"
        )
    if units is not None and isinstance(names, list) and len(names) >= units:
        settings["dictionaries"] = [[name if isinstance(name, str) else short(name) for name in names[:units]]]
    collate = config.get("collate_fn_conf")
    downsampling = collate.get("label_downsampling") if isinstance(collate, Mapping) else None
    if type(downsampling) is int and downsampling > 0:
        settings["label_rate"] = _FRAME_RATE * downsampling
    return settings


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The content of config.yaml: all that `HubertTask.build_model` asks for."""
    cfg, settings = checkpoint.encoder, checkpoint.settings
    units, dim = _NUM_CLASSES, _FINAL_DIM
    if has_hubert_head(checkpoint):
        units, dim = checkpoint.heads["label_embeddings"].shape
    dictionaries = settings.get("dictionaries") or []
    names = dictionaries[0] if len(dictionaries) == 1 and len(dictionaries[0]) == units else map(str, range(units))
    encoder = "torchaudio_wavlm" if cfg.relative_bias else "torchaudio_hubert"
    return {
        "input_size": 1,
        "num_classes": units,
        "token_list": [*names, *_AFTER_UNITS],
        "token_type": "word",
        "collate_fn_conf": {"label_downsampling": max(int(settings.get("label_rate", 0)) // _FRAME_RATE, 1)},
        **{name: None for name in ("init", "frontend", "specaug", "preencoder")},
        **{f"{name}_conf": {} for name in ("frontend", "specaug", "preencoder", "model")},
        "normalize": "utterance_mvn" if cfg.normalize_waveform else None,
        "normalize_conf": {"norm_means": True, "norm_vars": True} if cfg.normalize_waveform else {},
        "model": _MODELS[encoder],
        "encoder": encoder,
        "encoder_conf": {**builder_arguments(cfg), "final_dim": dim, GRADIENT: gradient_argument(cfg)},
        "wavlab_jax": {name: getattr(cfg, name) for name in OURS},
    }
