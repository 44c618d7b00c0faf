"""Hugging Face folders in and out: HuBERT, WavLM and, inwards, wav2vec 2.0 encoders; without torch or transformers.

Hidden states of both sides agree to float32 rounding for one utterance at a time. Two differences remain that no
conversion can remove, and `ExportReport.notes` says so where they apply: the preprocessor there adds 1e-7 to the
waveform's variance, and models with group norm count a batch's padding in.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data_pipelines.batch import SAMPLE_RATE
from wavlab_jax.convert.names import ConvertError, flatten, tensors, unflatten
from wavlab_jax.convert.settings import (
    PREPROCESSOR_EPSILON,
    encoder_config,
    huggingface_config,
    preprocessor_config,
    read_json,
)
from wavlab_jax.encoder import Encoder, EncoderConfig, make_encoder

MODEL_FILE = "model.safetensors"
HEAD_FILE = "pretraining_head.safetensors"
_LEGACY = {".weight_g": ".parametrizations.weight.original0", ".weight_v": ".parametrizations.weight.original1"}


class ExportReport(NamedTuple):
    """What was written.

    Attributes:
        folder: the finished folder.
        model_type: "hubert" or "wavlm".
        tensors, parameters: number of tensors and of scalars in model.safetensors.
        files: names in the folder.
        notes: where transformers will not compute quite what the encoder does, and when that matters.
    """

    folder: Path
    model_type: str
    tensors: int
    parameters: int
    files: tuple[str, ...]
    notes: tuple[str, ...]


def export_huggingface(
    encoder: Encoder,
    folder: str | os.PathLike,
    *,
    head: Mapping[str, np.ndarray] | None = None,
    card: str | None = None,
) -> ExportReport:
    """Writes `folder` so that `transformers.AutoModel.from_pretrained(folder)` is this encoder, in float32.

    The folder appears under its name when it is whole, and not at all if anything fails.

    Args:
        encoder: its arrays must be addressable from this process; call it from one process only.
        folder: local; must not exist, or be empty.
        head: the pre-training head (final projection, unit embeddings). Hugging Face has no place for it, so it goes
            to `pretraining_head.safetensors` beside the model, names and dtypes as given.
        card: text of README.md; by default a short one made from the configuration and `notes`.

    Raises:
        ConvertError: a parameter is not finite, the folder has something in it already or is not local, or the
            configuration has something that transformers cannot compute.
        OSError: from the file system; nothing is left behind.
    """
    folder = _local(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConvertError(f"{folder} exists already; delete it or export to another folder")
    config = huggingface_config(encoder.config)
    model = _torch_tensors(encoder)
    head = {name: np.ascontiguousarray(array) for name, array in (head or {}).items()}
    for name, array in head.items():
        _require_finite(array, f"head tensor {name}")
    notes = _notes(encoder.config)
    parameters = sum(array.size for array in model.values())

    with _whole_folder(folder) as partial:
        _write_json(partial / "config.json", config)
        _write_json(partial / "preprocessor_config.json", preprocessor_config(encoder.config))
        save_file(model, partial / MODEL_FILE, metadata={"format": "pt"})
        if head:
            save_file(head, partial / HEAD_FILE, metadata={"format": "np"})
        text = card if card is not None else _card(config, parameters, notes, head=bool(head))
        (partial / "README.md").write_text(text, encoding="utf-8")
        files = tuple(sorted(path.name for path in partial.iterdir()))
        for name in files:
            shutil.copymode(partial / "config.json", partial / name)  # safetensors lets nobody else read its files
    return ExportReport(folder, config["model_type"], len(model), parameters, files, notes)


def import_huggingface(folder: str | os.PathLike, *, normalize_waveform: bool | None = None) -> Encoder:
    """The encoder in `folder`, which holds a HuBERT, WavLM or wav2vec 2.0 model, bare or under a head.

    Weights of a head (`lm_head`, `quantizer`, ...) are left out; everything of the encoder must be there and nothing
    else. Both spellings of weight norm, several shards, and half-precision files are read; parameters are float32.

    Args:
        folder: local, as `save_pretrained` or `export_huggingface` leave it.
        normalize_waveform: whether the model hears waveforms of zero mean and unit variance. By default what
            preprocessor_config.json (or processor_config.json) says.

    Raises:
        ConvertError: a file is absent, the model is of another kind or computes something this encoder does not,
            tensors are missing, unexpected, of another shape or not finite. The message names them.
    """
    folder = _local(folder)
    config = read_json(folder / "config.json")
    cfg = encoder_config(config, folder=folder, normalize_waveform=normalize_waveform)
    with contextlib.ExitStack() as stack:
        found = _open_tensors(folder, stack)
        prefix = f"{config['model_type']}."
        if any(key.startswith(prefix) for key in found):
            found = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
        return _assemble(cfg, found, folder=folder)


def _torch_tensors(encoder: Encoder) -> dict[str, np.ndarray]:
    """Key -> float32 array as PyTorch lays it out."""
    flat = flatten(nnx.to_pure_dict(nnx.state(encoder)))
    turned, path, array = {}, None, None
    for tensor in tensors(flat):
        if tensor.path != path:  # all layers of a stacked parameter come in a row: fetch it once
            path, array = tensor.path, np.asarray(flat[tensor.path], np.float32)
        ours = array if tensor.layer is None else array[tensor.layer]
        _require_finite(ours, f"parameter {path}" + ("" if tensor.layer is None else f", layer {tensor.layer}"))
        turned[tensor.key] = tensor.turn.to_torch(ours)
    return turned


def _require_finite(array: np.ndarray, what: str) -> None:
    bad = int(np.size(array) - np.count_nonzero(np.isfinite(np.asarray(array, np.float32))))
    if bad:
        raise ConvertError(f"{what} has {bad} values that are not finite; such a model is of no use to anyone")


class _Found(NamedTuple):
    """A tensor in an open safetensors file; `get` reads it."""

    file: Any
    key: str

    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.key).get_shape())

    def get(self) -> np.ndarray:
        return np.array(self.file.get_tensor(self.key), np.float32)  # a copy: the file is mapped, and may change


def _open_tensors(folder: Path, stack: contextlib.ExitStack) -> dict[str, _Found]:
    """Key, in the new spelling of weight norm -> where it is, over all shards."""
    index = folder / f"{MODEL_FILE}.index.json"
    if (folder / MODEL_FILE).is_file():
        names = [MODEL_FILE]
    elif index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
    else:
        raise ConvertError(
            f"{folder} has no {MODEL_FILE}. A pytorch_model.bin runs code when it is read: load it where you trust it, "
            "with transformers, and `save_pretrained` it again"
        )
    found = {}
    for name in names:
        if Path(name).name != name:
            raise ConvertError(f"{index} names {name!r}, which is not a file in its folder")
        try:
            file = stack.enter_context(safe_open(folder / name, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise ConvertError(f"{folder / name} cannot be read: {error}") from error
        for key in file.keys():
            ending = next((ending for ending in _LEGACY if key.endswith(ending)), "")
            new = key.removesuffix(ending) + _LEGACY.get(ending, "")
            if new in found:
                raise ConvertError(f"{folder}: {key} is there twice, as {found[new].key} too")
            found[new] = _Found(file, key)
    return found


def _assemble(cfg: EncoderConfig, found: dict[str, _Found], *, folder: Path) -> Encoder:
    graph, abstract = nnx.split(nnx.eval_shape(lambda: make_encoder(jax.random.key(0), cfg)))
    shapes = flatten(nnx.to_pure_dict(abstract))
    wanted = {tensor.key: tensor for tensor in tensors(shapes)}
    problems = []
    for title, keys in (
        ("missing", [key for key in wanted if key not in found]),
        ("unexpected", [found[key].key for key in found if key not in wanted]),
        (
            "of another shape than config.json asks for",
            [
                f"{found[key].key} {list(found[key].shape())}, not {list(tensor.shape)}"
                for key, tensor in wanted.items()
                if key in found and found[key].shape() != tensor.shape
            ],
        ),
    ):
        if keys:
            more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
            problems.append(f"{len(keys)} {title}: {', '.join(sorted(keys)[:8])}{more}")
    if problems:
        raise ConvertError(f"{folder} does not hold this encoder. " + "; ".join(problems))

    flat = {}
    for tensor in wanted.values():
        array = found[tensor.key].get()
        _require_finite(array, f"{folder}: {found[tensor.key].key}")
        array = tensor.turn.from_torch(array)
        if tensor.layer is None:
            flat[tensor.path] = jnp.asarray(array)
        else:
            stack = flat.setdefault(tensor.path, np.empty(shapes[tensor.path].shape, np.float32))
            stack[tensor.layer] = array
            if tensor.layer == len(stack) - 1:
                flat[tensor.path] = jnp.asarray(stack)
    nnx.replace_by_pure_dict(abstract, unflatten(flat))
    return nnx.merge(graph, abstract)


def _notes(cfg: EncoderConfig) -> tuple[str, ...]:
    notes = []
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
    return tuple(notes)


def _card(config: dict, parameters: int, notes: tuple[str, ...], *, head: bool) -> str:
    """A model card in Markdown from what is known here: architecture, use, differences."""
    kind = {"hubert": "HuBERT", "wavlm": "WavLM"}[config["model_type"]]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: feature-extraction",
        f"tags: [speech, self-supervised, {config['model_type']}]",
        "---",
        "",
        f"# {kind} encoder, {parameters / 1e6:.1f} M parameters",
        "",
        f"Pre-trained with WavLab-JAX. {config['num_hidden_layers']} layers, width {config['hidden_size']}, "
        f"{config['num_attention_heads']} heads; {SAMPLE_RATE} Hz mono in, one hidden state every 20 ms out.",
        "",
        "```python",
        "from transformers import AutoFeatureExtractor, AutoModel",
        "",
        'extractor = AutoFeatureExtractor.from_pretrained("FOLDER")',
        'model = AutoModel.from_pretrained("FOLDER").eval()',
        f'inputs = extractor(waveform, sampling_rate={SAMPLE_RATE}, return_tensors="pt")',
        "hidden = model(**inputs, output_hidden_states=True).hidden_states",
        "```",
        "",
        *(["## Before you compare numbers", "", *(f"- {note}" for note in notes), ""] if notes else []),
    ]
    if head:
        lines += [f"`{HEAD_FILE}` holds the pre-training head, which transformers has no place for.", ""]
    return "\n".join(lines)


def _local(folder: str | os.PathLike) -> Path:
    if "://" in str(folder):
        raise ConvertError(f"{folder} is not a local folder; write or read a local one and copy it")
    return Path(folder).absolute()


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A sibling folder to write to, renamed to `folder` when the block ends well and deleted when it does not."""
    partial = folder.with_name(f".partial-{os.getpid()}-{secrets.token_hex(4)}-{folder.name}")
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # the bytes reach the disk before the name does
            finally:
                os.close(descriptor)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
