"""fairseq's checkpoints in and out, and their two descendants:

    fairseq   {"cfg" or "args", "model", "task_state", ...}: HuBERT, mHuBERT, CV-HuBERT, wav2vec 2.0, XLSR, XLS-R, MMS,
              the WavLM of UniSpeech; also fine-tuned with CTC (`w2v_encoder.w2v_model.*`, `w2v_encoder.proj.*`)
    unilm     {"cfg", "model"}: WavLM for inference, without heads
    s3prl     {"task_cfg", "model_cfg", "model_weight"[, "dictionaries_symbols"]}: what s3prl converts fairseq's into;
              WavLM is in unilm's layout there

Files are read without running what they say (`torch_files`), and written so that `torch.load(weights_only=True)` takes
them: dictionaries are plain lists of symbols. fairseq needs no more than their lengths to build and load a model; to go
on with training there, give it dict.km.txt and leave `task_state` out.

Layers: fairseq's `output_layer=n` gives what comes out of layer n, before the final LayerNorm of pre-norm models.
unilm's `layer_results[0]` is the first layer's input. s3prl's `hidden_states` are those of `encode`, one for one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from wavlab_jax.convert.checkpoint import Checkpoint, StoredTensor, fit, kind_of
from wavlab_jax.convert.fairseq_heads import (
    CTC_PREFIX,
    Slots,
    blank_first,
    blank_note,
    fill_ctc,
    fill_heads,
    has_ctc,
    label_symbols,
    read_heads,
    require_widths,
)
from wavlab_jax.convert.fairseq_names import WEIGHT_NORM, encoder_weights, fairseq_name
from wavlab_jax.convert.fairseq_settings import (
    EPSILON,
    OWN_FIELDS,
    Stated,
    model_section,
    own_fields,
    own_settings,
    require_same,
    resolved,
    stated,
    task_section,
)
from wavlab_jax.convert.huggingface import local
from wavlab_jax.convert.names import ConvertError, wanted
from wavlab_jax.convert.torch_files import read_torch_file
from wavlab_jax.convert.torchaudio import read_side_file, side_notes, write_folder
from wavlab_jax.encoder import EncoderConfig
from wavlab_jax.encoder.config import EncoderError

Layout = Literal["fairseq", "unilm", "s3prl"]
MODEL_FILE = "checkpoint.pt"
OURS = "wavlab_jax"  # an entry of our files beside theirs, which peers pass over
_INNER = f"{CTC_PREFIX}w2v_model."


class _Parts(NamedTuple):
    """What a file of any of the layouts holds.

    Attributes:
        layout: of the file.
        name: fairseq's name of the model.
        model, task: sections of the configuration, references resolved; empty where the file has none.
        weights: by fairseq's names, without the prefix of a fine-tuned model.
        symbols: of each label set; empty where the file does not say.
        ours: the entry of a file that `write` made.
        notes: what is left out.
    """

    layout: Layout
    name: str
    model: dict[str, Any]
    task: dict[str, Any]
    weights: dict[str, StoredTensor]
    symbols: list[list[str] | None]
    ours: dict[str, Any]
    notes: tuple[str, ...]


def layout_of(loaded: Any) -> Layout | None:
    """Which of the layouts the content of a file has; None if it is another one's."""
    if not isinstance(loaded, dict):
        return None
    if {"task_cfg", "model_cfg", "model_weight"} <= loaded.keys():
        return "s3prl"
    cfg = loaded.get("cfg")
    if not isinstance(loaded.get("model"), dict):
        return None
    if isinstance(cfg, dict) and "encoder_layers" in cfg:
        return "unilm"
    return "fairseq" if isinstance(cfg, dict) or isinstance(loaded.get("args"), dict) else None


def matches(path_or_loaded: Path | Any) -> bool:
    """Whether this is such a file's content, such a file, or a folder that `write` made; no values are read."""
    if not isinstance(path_or_loaded, Path):
        return layout_of(path_or_loaded) is not None
    try:
        return layout_of(read_torch_file(_file(path_or_loaded))) is not None
    except ConvertError:
        return False


def read(path: Path, *, architecture: EncoderConfig | None = None) -> Checkpoint:
    """The model in a .pt file, or in a folder that `write` made.

    Args:
        path: local.
        architecture: of the encoder, for files that do not say; where they do, it must be the same.

    Raises:
        UnsafeFile: the file asks for code to be run.
        ConvertError: the file is damaged or of another kind, the model computes something that this encoder does not,
            tensors are missing, unexpected or of another shape. The message names them.
    """
    file = _file(local(path))
    parts = _parts(read_torch_file(file), where=str(file))
    model_type = _model_type(parts, where=str(file))
    said, encoder = _encoder(parts, architecture, model_type=model_type, where=str(file))

    names = {fairseq_name(key, encoder): key for key in wanted(encoder)}
    tensors = {names[key]: tensor for key, tensor in parts.weights.items() if key in names}
    labels = parts.task.get("labels")
    heads = read_heads(
        {key: tensor for key, tensor in parts.weights.items() if key not in names},
        model_type=model_type,
        symbols=parts.symbols,
        label_sets=len(labels) if isinstance(labels, list) else 1,
        where=str(file),
    )
    if strange := [key for key in heads.unknown if "adapter" in key]:
        raise ConvertError(
            f"{file} has adapters inside its layers ({strange[0]}, ...), which this encoder does not compute"
        )
    advice = "Missing ones go by Hugging Face's names"
    fitted = fit(encoder, tensors | heads.unknown, where=file, advice=advice)

    own = own_settings(parts.ours.get("settings", {}), where=str(file))
    made_up = _names(parts.ours, "made_up")
    found = {n: t for n, t in heads.tensors.items() if n not in made_up and n.rsplit(".", 1)[0] not in made_up}
    require_widths(found, encoder, where=str(file))
    found = blank_first(found, own, back=True)
    beside = [name for name in _names(parts.ours, "side") if name not in found]
    side = read_side_file(file.parent) if beside else {}
    settings = said.settings | heads.settings | own
    if parts.model.get("untie_final_proj") is True and "label_embeddings" in found:
        settings["untie_final_proj"] = True
    return Checkpoint(
        layout=parts.layout,
        model_type=model_type,
        encoder=encoder,
        tensors=fitted.tensors,
        heads=found | {name: side[name] for name in beside if name in side},
        settings=settings,
        notes=(*said.notes, *parts.notes, *heads.notes, *fitted.notes),
    )


def write(checkpoint: Checkpoint, out: Path, *, layout: Layout = "fairseq", card: str | None = None) -> tuple[str, ...]:
    """Writes the folder `out`: checkpoint.pt, README.md and, for what has no slot in the layout, a side file.

    Where fairseq's class demands a tensor that the checkpoint does not have, zeros stand in its place (`final_proj`,
    `project_q`), or fairseq's initial values (the four special rows of the label embeddings, U(0, 1)); the entry
    "wavlab_jax" of the file and the card name them, and `read` leaves them out again.

    Args:
        checkpoint: its tensors are read as they are written.
        out: local; must not exist, or be an empty folder. It appears whole or not at all.
        layout: "fairseq" (fine-tuned, if there is a CTC head), "unilm" (WavLM only) or "s3prl".
        card: text of README.md; by default a short one.

    Returns: the names of the files.

    Raises:
        ConvertError: the layout cannot hold this encoder; a tensor is missing, of another shape, not finite or absurdly
            large; `out` has something in it already.
        CannotWrite: the disk is full, for one.
    """
    cfg, settings = checkpoint.encoder, checkpoint.settings
    model_type = kind_of(cfg, checkpoint.model_type)
    if layout == "unilm" and model_type != "wavlm":
        raise ConvertError(
            f"unilm's code runs WavLM only, and this is {model_type}: export the layout fairseq or s3prl"
        )
    bare = model_type == "wavlm" and layout != "fairseq"  # s3prl has WavLM as unilm has
    ctc = layout == "fairseq" and model_type != "wavlm" and has_ctc(checkpoint.heads)
    if bare:
        slots = Slots({}, {}, [], (), dict(checkpoint.heads))
    elif ctc:
        slots = fill_ctc(checkpoint.heads, settings)
    else:
        channels = cfg.extractor_channels[-1]
        slots = fill_heads(
            checkpoint.heads, model_type=model_type, width=cfg.width, channels=channels, settings=settings
        )
    require_widths(checkpoint.heads, cfg, where=f"the {checkpoint.layout} checkpoint")
    prefix = _INNER if ctc else ""
    weights = {f"{prefix}{name}": tensor for name, tensor in encoder_weights(checkpoint).items()}
    weights |= {f"{CTC_PREFIX if ctc else ''}{name}": tensor for name, tensor in slots.model.items()}
    weights = {name: replace(tensor, read=tensor.values) for name, tensor in weights.items()}

    model = model_section(cfg, model_type=model_type, settings=settings) | slots.fields
    task = task_section(cfg, model_type=model_type, settings=settings, label_sets=len(slots.symbols))
    ours = {
        "model_type": model_type,
        "encoder": {name: getattr(cfg, name) for name in OWN_FIELDS},
        "settings": dict(settings),
        "made_up": list(slots.made_up),
        "side": sorted(slots.side),
    }
    if bare:
        content = {"cfg": model | {"normalize": cfg.normalize_waveform}, "model": weights, OURS: ours}
    elif layout == "s3prl":
        content = {"task_cfg": task, "model_cfg": model, "model_weight": weights, OURS: ours}
        content |= {} if model_type == "wav2vec2" else {"dictionaries_symbols": slots.symbols}
    else:
        content = _fairseq_content(model, task, weights, slots, settings, ctc=ctc) | {OURS: ours}
    notes = differences(checkpoint, layout=layout, made_up=slots.made_up)
    return write_folder(
        checkpoint,
        out,
        texts={},
        model={MODEL_FILE: content},
        side=slots.side,
        notes=(*notes, *side_notes(slots.side)),
        card=card,
    )


def differences(checkpoint: Checkpoint, *, layout: Layout = "fairseq", made_up: Sequence[str] = ()) -> tuple[str, ...]:
    """Where fairseq, unilm and s3prl do not compute quite what the encoder does, or count otherwise, in sentences."""
    cfg, notes = checkpoint.encoder, []
    if cfg.normalize_waveform:
        notes.append(
            "Give the model waveforms of zero mean and unit variance, each utterance by itself "
            f"(torch.nn.functional.layer_norm), as fairseq does; it adds {EPSILON:g} to the variance."
        )
        if cfg.waveform_epsilon != EPSILON:
            notes[-1] += (
                f" The model had {cfg.waveform_epsilon:g}; they differ for recordings quieter than about -40 dB."
            )
    if cfg.extractor_norm == "group":
        notes.append("The first convolution's norm counts a batch's padding in: encode one utterance at a time.")
    if cfg.pre_norm:
        notes.append("`output_layer` of the last layer comes before the final LayerNorm.")
    if layout == "fairseq" and kind_of(cfg, checkpoint.model_type) != "wavlm":  # CTC has a slot there
        notes += blank_note(checkpoint.heads, checkpoint.settings)
    if made_up:
        notes.append(f"Not from the model, only there because the layout demands it: {', '.join(made_up)}.")
    return tuple(notes)


def _names(ours: Mapping[str, Any], entry: str) -> list[str]:
    names = ours.get(entry)
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _file(path: Path) -> Path:
    return path / MODEL_FILE if path.is_dir() else path


def _parts(loaded: Any, *, where: str) -> _Parts:
    layout = layout_of(loaded)
    if layout is None:
        keys = (
            f"the keys {', '.join(sorted(map(str, loaded))[:8])}" if isinstance(loaded, dict) else type(loaded).__name__
        )
        raise ConvertError(f"{where} is no checkpoint of fairseq, unilm or s3prl: it has {keys}, but no cfg and model")
    weights = loaded["model_weight"] if layout == "s3prl" else loaded["model"]
    if layout == "s3prl":
        root = {"model": loaded["model_cfg"], "task": loaded["task_cfg"]}
    elif layout == "unilm":
        root = {"model": loaded["cfg"], "task": loaded["cfg"]}
    elif isinstance(loaded.get("args"), dict):  # fairseq too prefers it where both are there
        root = {"model": loaded["args"], "task": loaded["args"]}
    else:
        root = loaded["cfg"]
    if not isinstance(weights, dict) or not all(
        isinstance(key, str) and isinstance(tensor, StoredTensor) for key, tensor in weights.items()
    ):
        raise ConvertError(f"{where}: the model is no dict of tensors")
    model, task = (resolved(root.get(name), root) for name in ("model", "task"))
    name = _name(model)
    notes = ["The optimizer's state was left out."] if loaded.get("last_optimizer_state") else []

    if any(key.startswith(CTC_PREFIX) for key in weights):
        outside = [key for key in weights if not key.startswith((_INNER, f"{CTC_PREFIX}proj."))]
        if outside:
            raise ConvertError(f"{where} was fine-tuned into something else than CTC: it has {', '.join(outside[:4])}")
        weights = {key.removeprefix(_INNER).removeprefix(CTC_PREFIX): tensor for key, tensor in weights.items()}
        inner = model.get("w2v_args")
        inner = inner if isinstance(inner, dict) else {}
        inner = inner if isinstance(inner.get("model"), dict) else {"model": inner, "task": inner}
        normalize = {key: value for key, value in (*model.items(), *task.items()) if key == "normalize"}
        model, task = (resolved(inner[section], inner) for section in ("model", "task"))
        task = normalize | task
        name = _name(model) or name.removesuffix("_ctc")
    renamed = [WEIGHT_NORM.get(key, key) for key in weights]
    if len(set(renamed)) < len(renamed):
        raise ConvertError(
            f"{where} has the positional convolution in both spellings of weight norm; delete one of them"
        )
    weights = dict(zip(renamed, weights.values(), strict=True))
    ours = loaded.get(OURS)
    return _Parts(
        layout, name, model, task, weights, label_symbols(loaded), ours if isinstance(ours, dict) else {}, tuple(notes)
    )


def _name(model: Mapping[str, Any]) -> str:
    found = model.get("_name") or model.get("arch")
    return found if isinstance(found, str) else ""


def _model_type(parts: _Parts, *, where: str) -> str:
    name = parts.name.removesuffix("_ctc")
    ours = parts.ours.get("model_type")
    if ours in ("hubert", "wavlm", "wav2vec2"):
        return ours
    if parts.layout == "unilm" or any(key.endswith(".grep_a") for key in parts.weights):
        return "wavlm"
    if name in ("hubert", "wavlm") or name.startswith("wav2vec2"):
        return "wav2vec2" if name.startswith("wav2vec2") else name
    if name not in ("", "wav2vec"):
        raise ConvertError(f"{where} holds a model called {name!r}; can import hubert, wavlm and wav2vec2")
    contrastive = "quantizer.vars" in parts.weights or "label_rate" not in parts.model
    return "wav2vec2" if contrastive and "label_embs_concat" not in parts.weights else "hubert"


def _encoder(
    parts: _Parts, architecture: EncoderConfig | None, *, model_type: str, where: str
) -> tuple[Stated, EncoderConfig]:
    """What the file says, and the configuration that it or `architecture` gives."""
    if "encoder_layers" not in parts.model:
        if architecture is None:
            raise ConvertError(
                f"{where} does not say what its encoder is made of (a fine-tuned file refers to another one for that): "
                "pass architecture="
            )
        settings = {"temperature": 0.1}
        return Stated({}, settings, ("The file does not say its architecture; it was given.",)), architecture
    said = stated(parts.model, parts.task, model_type=model_type, where=where)
    if said.fields["layers"] > len(parts.weights):  # each has sixteen tensors and more
        raise ConvertError(
            f"{where}: encoder_layers is {said.fields['layers']}, but there are {len(parts.weights)} tensors"
        )
    if architecture is not None:
        require_same(architecture, said.fields, where=where)
        return said, architecture
    # unilm and fairseq's HuBERT bin the samples; wav2vec 2.0 there counts frames by the convolutions
    own = {"valid_frames": "convolution" if model_type == "wav2vec2" else "fairseq_bins", "waveform_epsilon": EPSILON}
    own |= own_fields(parts.ours.get("encoder"), where=where)
    try:
        return said, EncoderConfig(**said.fields, **own)
    except EncoderError as error:
        raise ConvertError(f"{where}: {error}") from error


def _fairseq_content(
    model: Mapping[str, Any],
    task: Mapping[str, Any],
    weights: Mapping[str, StoredTensor],
    slots: Slots,
    settings: Mapping[str, Any],
    *,
    ctc: bool,
) -> dict[str, Any]:
    """A training checkpoint as `fairseq/checkpoint_utils.py` load_model_ensemble_and_task takes it."""
    dictionaries: dict[str, Any] = {} if model["_name"] == "wav2vec2" else {"dictionaries": slots.symbols}
    if ctc:
        kind = {"hubert": "hubert_ctc", "wav2vec2": "wav2vec_ctc"}[model["_name"]]
        finetuning = {"hubert": {"fine_tuning": True, "labels": ["ltr"]}, "wav2vec2": {"labels": "ltr"}}[model["_name"]]
        args = {"model": dict(model), "task": dict(task)}
        model = {"_name": kind, "w2v_path": "", "w2v_args": args, "normalize": task["normalize"], "apply_mask": False}
        task = {**task, **finetuning} | ({"_name": "audio_finetuning"} if kind == "wav2vec_ctc" else {})
    history = {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}
    return {
        "args": None,
        "cfg": {
            "_name": None,
            "common": {"tpu": False},
            "distributed_training": {"ddp_backend": "legacy_ddp"},
            "model": dict(model),
            "task": dict(task),
        },
        "model": dict(weights),
        "optimizer_history": [history],
        "task_state": dictionaries,
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
    }
