"""Hugging Face folders in and out: HuBERT, WavLM and wav2vec 2.0, bare or under a head; no torch, no transformers.

Hidden states of both sides agree to float32 rounding for one utterance at a time. Where no conversion can remove a
difference, `differences` says so: the preprocessor there adds 1e-7 to the waveform's variance, and models with group
norm count a batch's padding in.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_pipelines.atomic import whole_folder
from wavlab_jax.convert.card import model_card
from wavlab_jax.convert.checkpoint import HEADS, Checkpoint, StoredTensor, fit, from_encoder, kind_of, to_encoder
from wavlab_jax.convert.fairseq_heads import require_widths
from wavlab_jax.convert.names import ConvertError, wanted
from wavlab_jax.convert.safetensors_files import read_safetensors_file, write_safetensors_file
from wavlab_jax.convert.settings import (
    BIAS,
    CTC_HEADS,
    PREPROCESSOR_EPSILON,
    SAME,
    checkpoint_settings,
    encoder_config,
    huggingface_config,
    preprocessor_config,
    read_json,
    says_normalisation,
    task_of,
)
from wavlab_jax.convert.tokenizer import PROCESSOR, TOKENIZER_FILES, read_tokenizer
from wavlab_jax.convert.torch_files import read_torch_file
from wavlab_jax.convert.torchaudio_settings import require_same
from wavlab_jax.encoder import Encoder, EncoderConfig

MODEL_FILE = "model.safetensors"
TORCH_FILE = "pytorch_model.bin"
HEAD_FILE = "pretraining_head.safetensors"
# Weight norm as PyTorch spelled it before `parametrizations`.
LEGACY = {".weight_g": ".parametrizations.weight.original0", ".weight_v": ".parametrizations.weight.original1"}


def matches(path: Path) -> bool:
    """Whether `path` is such a folder: one with a config.json."""
    return (Path(path) / "config.json").is_file()


def read(
    path: Path, *, architecture: EncoderConfig | None = None, normalize_waveform: bool | None = None
) -> Checkpoint:
    """The model in a folder as `save_pretrained` or `write` leaves it: safetensors or .bin, whole or in shards.

    Args:
        path: the folder; local.
        architecture: asked where the folder does not say whether waveforms are normalised; must be what it says else.
        normalize_waveform: overrules what the folder says of that. Without any of these the rule of the published
            models is taken (`encoder_config`), and `notes` says so.

    Raises ConvertError: a file is absent or damaged, the model is of another kind or computes something this encoder
    does not, tensors are missing, unexpected or of another shape. The message names them.
    """
    folder = local(path)
    config = read_json(folder / "config.json")
    cfg = encoder_config(config, folder=folder, normalize_waveform=normalize_waveform, architecture=architecture)
    if architecture is not None:
        stated = (*SAME, "relative_bias", *(BIAS if cfg.relative_bias else ()))
        require_same(architecture, {name: getattr(cfg, name) for name in stated}, where=f"{folder}/config.json")
    inner, heads = _divided(_stored_tensors(folder), prefix=f"{config['model_type']}.")
    if (folder / HEAD_FILE).is_file():
        beside = read_safetensors_file(folder / HEAD_FILE)
        if twice := sorted(heads.keys() & beside.keys()):
            raise ConvertError(f"{folder}: {twice[0]} is in {HEAD_FILE} and in the model; delete one of them")
        heads |= beside
    require_widths(heads, cfg, where=str(folder))
    advice = "Has config.json been changed, or is a shard missing?"
    tensors, notes = fit(cfg, inner, where=folder, advice=advice)
    settings = checkpoint_settings(config, heads=heads.keys())
    if CTC_HEADS <= heads.keys() and (tokenizer := read_tokenizer(folder, read_json)):
        settings["tokenizer"] = tokenizer
    if normalize_waveform is None and architecture is None and not says_normalisation(folder):
        notes += (
            f"No preprocessor_config.json says do_normalize. Waveforms are {'' if cfg.normalize_waveform else 'not '}"
            f"normalised, as in every published model with {cfg.extractor_norm} norm in the extractor but mHuBERT-147.",
        )
    if strange := sorted(heads.keys() - HEADS.keys()):
        notes += (f"Heads that no other layout has a name for are kept under their own: {', '.join(strange)}.",)
    return Checkpoint("huggingface", config["model_type"], cfg, tensors, heads, settings, notes)


def write(checkpoint: Checkpoint, out: Path, *, card: str | None = None) -> tuple[str, ...]:
    """Writes a folder that `transformers.AutoModel.from_pretrained` loads, in float32; returns its files' names.

    wav2vec 2.0 with its quantizer and projections is written for `Wav2Vec2ForPreTraining`, an `lm_head` for the CTC
    class, with the tokenizer's files if `checkpoint.settings` has them (`convert.tokenizer`). Heads without a place
    there go to `pretraining_head.safetensors`, by the names of `HEADS`. The folder appears under its name when it is
    whole, and not at all if anything fails.

    Args:
        checkpoint: its tensors are read one at a time, as they are written.
        out: local; must not exist, or be an empty folder.
        card: text of README.md; by default a short one.

    Raises:
        ConvertError: a tensor has values that no model has, `out` has something in it already or is not local, or
            the configuration has something that transformers cannot compute.
        CannotWrite: the disk is full, for one; nothing is left behind.
    """
    folder = local(out)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConvertError(f"{folder} exists already; delete it or export to another folder")
    cfg = checkpoint.encoder
    model_type = kind_of(cfg, checkpoint.model_type)
    require_widths(checkpoint.heads, cfg, where=f"the {checkpoint.layout} checkpoint")
    task = task_of(model_type, {name: tensor.shape for name, tensor in checkpoint.heads.items()})
    settings = {name: value for name, value in checkpoint.settings.items() if name != "tokenizer"}
    config = huggingface_config(cfg, model_type=model_type, task=task, settings=settings)
    tokenizer = checkpoint.settings.get("tokenizer") if task.heads >= CTC_HEADS else None
    preprocessor = preprocessor_config(cfg) | ({"processor_class": PROCESSOR} if tokenizer else {})
    prefix = f"{model_type}." if task.heads else ""
    model = {f"{prefix}{key}": checkpoint.tensors[key] for key in wanted(cfg)}
    model |= {name: checkpoint.heads[name] for name in sorted(task.heads)}
    beside = {name: checkpoint.heads[name] for name in sorted(checkpoint.heads.keys() - task.heads)}
    text = card if card is not None else model_card(checkpoint, notes=differences(checkpoint), head_file=HEAD_FILE)

    with whole_folder(folder) as partial:
        _write_json(partial / "config.json", config)
        _write_json(partial / "preprocessor_config.json", preprocessor)
        for name in TOKENIZER_FILES:
            if tokenizer and name in tokenizer:
                _write_json(partial / name, tokenizer[name])
        (partial / "README.md").write_text(text, encoding="utf-8")
        write_safetensors_file(partial / MODEL_FILE, model)
        if beside:
            write_safetensors_file(partial / HEAD_FILE, beside)
        files = tuple(sorted(path.name for path in partial.iterdir()))
        for name in files:
            shutil.copymode(partial / "config.json", partial / name)  # whoever may read the settings, the weights too
    return files


def export_huggingface(
    encoder: Encoder, folder: str | os.PathLike, *, head: Mapping[str, np.ndarray] | None = None
) -> tuple[str, ...]:
    """`write` of an encoder in memory; `head` by the names and in the shapes of `HEADS`."""
    return write(from_encoder(encoder, head=head), Path(local(folder)))


def import_huggingface(folder: str | os.PathLike, *, normalize_waveform: bool | None = None) -> Encoder:
    """`read`, as an encoder in memory; heads are left out."""
    return to_encoder(read(local(folder), normalize_waveform=normalize_waveform))


def differences(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Where transformers will not compute quite what the encoder does, and when that matters: a sentence each."""
    cfg, notes = checkpoint.encoder, []
    if cfg.normalize_waveform and cfg.waveform_epsilon != PREPROCESSOR_EPSILON:
        notes.append(
            f"Waveform normalisation was trained with {cfg.waveform_epsilon:g} added to the variance; the transformers "
            f"preprocessor adds {PREPROCESSOR_EPSILON:g}. They differ for recordings quieter than about -40 dB full "
            "scale."
        )
    if cfg.extractor_norm == "group":
        notes.append(
            "The first convolution is group-normed over time. transformers counts a batch's padding in, so there the "
            "hidden states of a padded row depend on the batch: encode one utterance at a time."
        )
    if cfg.pre_norm:
        notes.append(
            "`hidden_states[-1]` comes before the final LayerNorm in transformers 5 and after it in transformers 4; "
            "`last_hidden_state` comes after it in both."
        )
    if getattr(cfg, "valid_frames", "convolution") != "convolution":
        notes.append(
            "Which frames of a padded row are real follows fairseq's rule here (a frame is padding if its whole share "
            "of the row is), and the convolutions' length in transformers: they differ by a frame or two."
        )
    return tuple(notes)


def renamed(key: str) -> str:
    """The key in the new spelling of weight norm."""
    ending = next((ending for ending in LEGACY if key.endswith(ending)), "")
    return key.removesuffix(ending) + LEGACY.get(ending, "")


def local(path: str | os.PathLike) -> Path:
    """An absolute path. Raises ConvertError for an address of something else."""
    if "://" in str(path):
        raise ConvertError(f"{path} is not local; write or read a local folder and copy it")
    return Path(path).absolute()


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Key, in the new spelling of weight norm -> where it is, over all shards."""
    found: dict[str, StoredTensor] = {}
    for name in _model_files(folder):
        read_file = read_safetensors_file if name.endswith(".safetensors") else read_torch_file
        content = read_file(folder / name)
        if not isinstance(content, dict) or not all(isinstance(value, StoredTensor) for value in content.values()):
            raise ConvertError(f"{folder / name} is not a dict of tensors, as a Hugging Face model is")
        for key, tensor in content.items():
            new = renamed(key)
            if new in found:
                raise ConvertError(f"{folder}: {key} is there twice, as {found[new].key} too; delete one of them")
            found[new] = tensor
    return found


def _model_files(folder: Path) -> list[str]:
    """Names of the files that hold the model, safetensors first. Raises ConvertError if there are none."""
    for name in (MODEL_FILE, TORCH_FILE):
        if (folder / name).is_file():
            return [name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map", {})
            shards = sorted({str(shard) for shard in shards.values()}) if isinstance(shards, dict) else []
            for shard in shards:
                # a shard may be a symbolic link, as in the hub's cache, but its name stays inside the folder
                if Path(shard).name != shard or Path(shard).suffix not in (".safetensors", ".bin"):
                    raise ConvertError(f"{index} names {shard!r}, which is not a file of weights in its folder")
            if not shards:
                raise ConvertError(f"{index} has no weight_map that names files")
            return shards
    raise ConvertError(f"{folder} has no {MODEL_FILE} and no {TORCH_FILE}, whole or with an index of its shards")


def _divided(found: dict[str, StoredTensor], *, prefix: str) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The encoder's tensors without the prefix that a model under a head has, and the heads."""
    if any(key.startswith(prefix) for key in found):
        inner = {key.removeprefix(prefix): tensor for key, tensor in found.items() if key.startswith(prefix)}
        return inner, {key: tensor for key, tensor in found.items() if not key.startswith(prefix)}
    heads = {key: found[key] for key in found if key in HEADS}
    return {key: tensor for key, tensor in found.items() if key not in heads}, heads


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
