"""torchaudio's state dicts in and out: `Wav2Vec2Model` (HuBERT, wav2vec 2.0, WavLM; CTC), `HuBERTPretrainModel`.

torchaudio has no file of settings. `write` puts torchaudio.json beside the state dict, with the builder's arguments,
and `read` takes the architecture from there; of a bare state dict it is inferred from the shapes
(`torchaudio_settings.infer_architecture`).

Layers: `extract_features` there gives `layers` entries, the outputs of the layers: neither the input of the first
one nor the final LayerNorm of pre-norm models.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.atomic import whole_folder
from wavlab_jax.convert.card import model_card
from wavlab_jax.convert.checkpoint import MASK_EMBEDDING, Checkpoint, StoredTensor, fit, kind_of
from wavlab_jax.convert.fairseq_heads import blank_first, blank_note
from wavlab_jax.convert.huggingface import HEAD_FILE, local
from wavlab_jax.convert.names import ConvertError
from wavlab_jax.convert.safetensors_files import read_safetensors_file, write_safetensors_file
from wavlab_jax.convert.settings import read_json
from wavlab_jax.convert.torch_files import read_torch_file, write_torch_file
from wavlab_jax.convert.torchaudio_names import Hub, from_hub, state_dict, to_hub
from wavlab_jax.convert.torchaudio_settings import (
    GRADIENT,
    OURS,
    builder_arguments,
    config_of,
    encoder_fields,
    gradient_argument,
    infer_architecture,
    own_fields,
    require_same,
)
from wavlab_jax.encoder import EncoderConfig

MODEL_FILE = "model.pt"
ARGUMENTS_FILE = "torchaudio.json"
TEMPERATURE = 0.1  # components.py _compute_logits: a constant there

HUBERT_HEAD = ("final_proj.weight", "final_proj.bias", "label_embeddings")
_CTC_HEAD = ("lm_head.weight", "lm_head.bias")
_HALLMARKS = {"encoder.feature_projection.projection.weight", "encoder.transformer.layer_norm.weight"}

# Arguments of `hubert_pretrain_model` that concern masks and loss, as in `hubert_pretrain_base`; it has no defaults.
_MASKING: dict[str, Any] = {
    "mask_prob": 0.8,
    "mask_selection": "static",
    "mask_other": 0.0,
    "mask_length": 10,
    "no_mask_overlap": False,
    "mask_min_space": 1,
    "mask_channel_prob": 0.0,
    "mask_channel_selection": "static",
    "mask_channel_other": 0.0,
    "mask_channel_length": 10,
    "no_mask_channel_overlap": False,
    "mask_channel_min_space": 1,
    "skip_masked": False,
    "skip_nomask": False,
}


def matches(path_or_loaded: Path | Any) -> bool:
    """Whether this is a state dict of torchaudio's, or a folder that `write` made; no values are read."""
    try:
        if isinstance(path_or_loaded, Path):
            if path_or_loaded.is_dir():
                return (path_or_loaded / ARGUMENTS_FILE).is_file()
            path_or_loaded = open_tensors(path_or_loaded)
        found = state_dict(path_or_loaded, where="")
    except ConvertError:
        return False
    return {key.removeprefix("wav2vec2.") for key in found} >= _HALLMARKS


def read(path: Path, *, architecture: EncoderConfig | None = None) -> Checkpoint:
    """The model in a state dict (.pt, .pth, .safetensors), or in a folder that `write` made.

    Args:
        path: local.
        architecture: of the encoder. By default what torchaudio.json beside model.pt says, else what the shapes tell;
            `notes` says what was assumed.

    Raises:
        ConvertError: the file cannot be read; tensors are missing, unexpected or of another shape than the architecture
            asks for; nothing tells the architecture.
    """
    path = local(path)
    folder, file = (path, path / MODEL_FILE) if path.is_dir() else (path.parent, path)
    found = state_dict(open_tensors(file), where=str(file))
    said, side = None, {}
    if file.name == MODEL_FILE and (folder / ARGUMENTS_FILE).is_file():
        said = _said(folder / ARGUMENTS_FILE)
        side = read_side_file(folder)
        if architecture is not None:
            require_same(architecture, said.stated, where=str(folder / ARGUMENTS_FILE))
    return checkpoint_from(
        to_hub(found, where=str(file)),
        layout="torchaudio",
        encoder=architecture or (said.encoder if said else None),
        where=str(file),
        side=side,
        model_type=said.model_type if said else None,
        settings=said.settings if said else {},
    )


def write(checkpoint: Checkpoint, out: Path, *, card: str | None = None) -> tuple[str, ...]:
    """Writes the folder `out`: model.pt, torchaudio.json, README.md and, for what has no slot in model.pt, a side file.

    model.pt is a HuBERTPretrainModel's state dict where the checkpoint has a HuBERT head over one label set, else a
    Wav2Vec2Model's. torchaudio.json names the builder and its arguments, with which it loads, strict=True.

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
    cfg = checkpoint.encoder
    arguments = builder_arguments(cfg)
    pretraining = _is_pretraining(checkpoint)
    slots = fill_slots(checkpoint, pretraining=pretraining)
    if pretraining:
        builder = "hubert_pretrain_model"
        units, dim = checkpoint.heads["label_embeddings"].shape
        arguments |= {**_MASKING, "num_classes": units, "final_dim": dim, GRADIENT: gradient_argument(cfg)}
    else:
        builder = "wavlm_model" if cfg.relative_bias else "wav2vec2_model"
        arguments["aux_num_out"] = slots.model["aux.weight"].shape[0] if "aux.weight" in slots.model else None
    content = {
        "builder": f"torchaudio.models.{builder}",
        "arguments": arguments,
        "model_type": checkpoint.model_type,
        "settings": dict(checkpoint.settings),
        "wavlab_jax": {name: getattr(cfg, name) for name in OURS},
        "notes": [*differences(checkpoint), *side_notes(slots.side)],
    }
    return write_folder(
        checkpoint,
        out,
        texts={ARGUMENTS_FILE: json.dumps(content, indent=2) + "\n"},
        model={MODEL_FILE: slots.model},
        side=slots.side,
        notes=differences(checkpoint),
        card=card,
    )


def open_tensors(file: Path) -> Any:
    """What a .safetensors or `torch.save` file holds, its tensors not read yet. Raises ConvertError naming the file."""
    if not file.is_file():
        raise ConvertError(f"{file} does not exist")
    return read_safetensors_file(file) if file.suffix == ".safetensors" else read_torch_file(file)


def checkpoint_from(
    hub: Hub,
    *,
    layout: str,
    encoder: EncoderConfig | None,
    where: str,
    side: Mapping[str, StoredTensor],
    model_type: str | None,
    settings: Mapping[str, Any],
    notes: tuple[str, ...] = (),
    left_over: tuple[str, ...] = (),
) -> Checkpoint:
    """The checkpoint of renamed tensors; `encoder` None: inferred. Raises ConvertError naming keys of the file."""
    found = {**{name: stored for name, stored in side.items() if name == MASK_EMBEDDING}, **hub.tensors}
    heads = {name: stored for name, stored in side.items() if name != MASK_EMBEDDING}
    heads |= blank_first(hub.heads, settings, back=True)
    advice = "Missing ones go by Hugging Face's names"
    if encoder is None:
        encoder, assumed = infer_architecture({name: stored.shape for name, stored in found.items()}, where=where)
        notes += assumed
        if model_type is None and not encoder.relative_bias and not any(name in heads for name in HUBERT_HEAD):
            # HuBERT's extractors have no biases, those of wav2vec 2.0 Large, XLSR-53, XLS-R and MMS have
            model_type = "wav2vec2" if encoder.extractor_bias else "hubert"
            notes += (f"Taken for {model_type}; HuBERT and wav2vec 2.0 compute the same in torchaudio.",)
    else:
        advice += ". If the architecture is another one, correct it or leave it out"
    fitted = fit(encoder, found, where=where, advice=advice)
    _require_head_shapes(heads, encoder.width, where=where)
    if "label_embeddings" in hub.heads:
        settings = {"temperature": TEMPERATURE, **settings}
    return Checkpoint(
        layout=layout,
        model_type=kind_of(encoder, model_type),
        encoder=encoder,
        tensors=fitted.tensors,
        heads=heads,
        settings=dict(settings),
        notes=(*notes, *fitted.notes),
        left_over=left_over,
    )


class Slots(NamedTuple):
    """`model`: a state dict by torchaudio's names; `side`: what has no place in it, by the names of `HEADS`."""

    model: dict[str, StoredTensor]
    side: dict[str, StoredTensor]


def fill_slots(checkpoint: Checkpoint, *, pretraining: bool, old_weight_norm: bool = False) -> Slots:
    """Puts a checkpoint's tensors where they belong, as a HuBERTPretrainModel's state dict or a Wav2Vec2Model's.

    `old_weight_norm`: see `torchaudio_names.from_hub`. Raises ConvertError if the encoder is not whole.
    """
    fitted = fit(checkpoint.encoder, checkpoint.tensors, where=f"the {checkpoint.layout} checkpoint").tensors
    _require_head_shapes(checkpoint.heads, checkpoint.encoder.width, where=f"the {checkpoint.layout} checkpoint")
    slot = HUBERT_HEAD if pretraining else _CTC_HEAD
    whole = has_hubert_head(checkpoint) if pretraining else all(name in checkpoint.heads for name in slot)
    ordered = checkpoint.heads if pretraining else blank_first(checkpoint.heads, checkpoint.settings)
    inside = {name: stored for name, stored in ordered.items() if whole and name in slot}
    side = {name: stored for name, stored in checkpoint.heads.items() if name not in inside}
    if not pretraining:
        side[MASK_EMBEDDING] = fitted.pop(MASK_EMBEDDING)
    model = from_hub(
        Hub(_checked(fitted), _checked(inside)),
        wavlm=checkpoint.encoder.relative_bias,
        pretraining=pretraining,
        old_weight_norm=old_weight_norm,
    )
    return Slots(model, side)


def has_hubert_head(checkpoint: Checkpoint) -> bool:
    """Whether it has a whole HuBERT head over one label set: what `logit_generator` has slots for."""
    heads, label_sets = checkpoint.heads, len(checkpoint.settings.get("dictionaries") or ())
    if label_sets > 1 or not all(name in heads for name in HUBERT_HEAD):
        return False
    return heads["final_proj.weight"].shape[:1] == heads["label_embeddings"].shape[1:]


def _is_pretraining(checkpoint: Checkpoint) -> bool:
    """Whether it goes into a HuBERTPretrainModel; there is no builder for WavLM's pre-training."""
    return has_hubert_head(checkpoint) and not checkpoint.encoder.relative_bias


def side_notes(side: Mapping[str, StoredTensor]) -> list[str]:
    """A sentence on what is in the side file."""
    return [f"{HEAD_FILE} holds what this layout has no slot for: {', '.join(side)}."] if side else []


def read_side_file(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of the side file in `folder`; none if there is none."""
    return read_safetensors_file(folder / HEAD_FILE) if (folder / HEAD_FILE).is_file() else {}


def write_folder(
    checkpoint: Checkpoint,
    out: Path,
    *,
    texts: Mapping[str, str],
    model: Mapping[str, Mapping[str, Any]],
    side: Mapping[str, StoredTensor],
    notes: Sequence[str],
    card: str | None,
) -> tuple[str, ...]:
    """Writes an exported folder, whole or not at all, and returns the names of its files.

    Args:
        checkpoint: what it is of, for the card.
        out: local; must not exist, or be an empty folder, else ConvertError.
        texts, model: name -> content, of text files and of files for `torch.load`.
        side: for the side file; none is written without.
        notes: for the card, where the numbers may differ.
        card: instead of the short one.
    """
    out = local(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConvertError(f"{out} exists already; delete it or export to another folder")
    if card is None:
        card = model_card(checkpoint, notes=notes, head_file=HEAD_FILE if side else None, in_transformers=False)
    with whole_folder(out) as partial:
        for name, text in {**texts, "README.md": card}.items():
            (partial / name).write_text(text, encoding="utf-8")
        for name, content in model.items():
            write_torch_file(partial / name, content)
        if side:
            write_safetensors_file(partial / HEAD_FILE, side)
        for path in partial.iterdir():
            shutil.copymode(partial / "README.md", path)  # whoever may read the card, the weights too
        return tuple(sorted(path.name for path in partial.iterdir()))


class _Said(NamedTuple):
    """What torchaudio.json says; `stated`: of the encoder's fields, those that are torchaudio's arguments."""

    encoder: EncoderConfig
    stated: dict[str, Any]
    model_type: str | None
    settings: dict[str, Any]


def _said(path: Path) -> _Said:
    content = read_json(path)
    arguments, settings = content.get("arguments"), content.get("settings", {})
    if not isinstance(arguments, Mapping) or not isinstance(settings, Mapping):
        raise ConvertError(f"{path} has no arguments and settings as objects; export the model anew")
    relative_bias = content.get("builder") == "torchaudio.models.wavlm_model"
    stated = encoder_fields(arguments, defaults={}, relative_bias=relative_bias, where=str(path))
    encoder = config_of(stated | own_fields(content.get("wavlab_jax", {}), where=str(path)), where=str(path))
    return _Said(encoder, stated, content.get("model_type"), dict(settings))


def _checked(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The same, read as float32 and refused when damaged (`StoredTensor.values`)."""
    return {name: StoredTensor(found.key, found.shape, found.values, found.file) for name, found in tensors.items()}


def _require_head_shapes(heads: Mapping[str, StoredTensor], width: int, *, where: str) -> None:
    """Raises ConvertError naming a head that does not fit on an encoder of this width, or its own other half."""
    problems = []
    for name in ("final_proj", "lm_head", "project_hid"):
        weight, bias = heads.get(f"{name}.weight"), heads.get(f"{name}.bias")
        if weight and (len(weight.shape) != 2 or weight.shape[1] != width):
            problems.append(f"{weight.key} {list(weight.shape)}, not [..., {width}]")
        elif weight and bias and bias.shape != weight.shape[:1]:
            problems.append(f"{bias.key} {list(bias.shape)}, not {list(weight.shape[:1])}")
    embeddings = heads.get("label_embeddings")
    if embeddings and len(embeddings.shape) != 2:
        problems.append(f"{embeddings.key} {list(embeddings.shape)}, not [units, dim]")
    if problems:
        raise ConvertError(f"{where}: heads of a wrong shape: {', '.join(problems)}. Is the file whole?")


def differences(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Where torchaudio will not compute quite what the encoder does, or counts otherwise: a sentence each."""
    cfg, notes = checkpoint.encoder, ["extract_features gives the layers' outputs: not the first layer's input"]
    notes[0] += ", and the last one before the final LayerNorm." if cfg.pre_norm else "."
    if cfg.normalize_waveform:
        notes.append(
            "Give the model waveforms of zero mean and unit variance, each utterance by itself "
            f"(torch.nn.functional.layer_norm, {cfg.waveform_epsilon:g} added to the variance); the wrapper of "
            "torchaudio's bundles normalises a whole batch at once."
        )
    if cfg.extractor_norm == "group":
        notes.append("The first convolution's norm counts a batch's padding in: encode one utterance at a time.")
    if cfg.relative_bias:
        notes.append("With `lengths`, torchaudio's WavLM fails: encode one utterance at a time.")
    if not _is_pretraining(checkpoint):
        notes += blank_note(checkpoint.heads, checkpoint.settings)
    temperature = checkpoint.settings.get("temperature", TEMPERATURE)
    if temperature != TEMPERATURE and "label_embeddings" in checkpoint.heads:
        notes.append(f"The head was trained with logits divided by {temperature}; torchaudio divides by {TEMPERATURE}.")
    return tuple(notes)
