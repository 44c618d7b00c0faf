"""Which layout a file or folder is in, found by what is in it; and the one way in and the one way out.

    layout         what it is known by                                  module
    huggingface    a folder with config.json                            huggingface
    fairseq        .pt: cfg or args, and model                          fairseq
    unilm          .pt: cfg, which has encoder_layers itself, and model fairseq
    s3prl          .pt: task_cfg, model_cfg, model_weight               fairseq
    torchaudio     a state dict; or a folder with torchaudio.json       torchaudio
    espnet         .pth beside config.yaml, or a folder with both       espnet

All are written as folders, so that a card and what has no slot in the model's own file can lie beside it.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from wavlab_jax.convert import espnet, fairseq, huggingface, torchaudio
from wavlab_jax.convert.checkpoint import Checkpoint
from wavlab_jax.convert.huggingface import local
from wavlab_jax.convert.names import ConvertError
from wavlab_jax.convert.safetensors_files import read_safetensors_file
from wavlab_jax.convert.torch_files import read_torch_file
from wavlab_jax.encoder import EncoderConfig

WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")  # what a folder is searched for
_MODULES = (espnet, fairseq, torchaudio)  # of single files; the first that knows the keys

_WRITERS: dict[str, Callable[..., tuple[str, ...]]] = {
    "huggingface": huggingface.write,
    **{layout: partial(fairseq.write, layout=layout) for layout in ("fairseq", "unilm", "s3prl")},
    "torchaudio": torchaudio.write,
    "espnet": espnet.write,
}
_DIFFERENCES: dict[str, Callable[[Checkpoint], tuple[str, ...]]] = {
    "huggingface": huggingface.differences,
    **{layout: partial(fairseq.differences, layout=layout) for layout in ("fairseq", "unilm", "s3prl")},
    "torchaudio": torchaudio.differences,
    "espnet": espnet.differences,
}
LAYOUTS = tuple(_WRITERS)


def read_checkpoint(
    path: str | os.PathLike, *, architecture: EncoderConfig | None = None, normalize_waveform: bool | None = None
) -> Checkpoint:
    """The model at `path`, a local file or folder, in whichever layout it is; its values are not read yet.

    `architecture` says what the file does not: of a bare state dict the whole architecture, of a Hugging Face folder
    without a preprocessor whether waveforms are normalised. `normalize_waveform` overrules the file's word on that.

    Raises ConvertError: no layout that is known here, with what was looked for and the keys that were found; or the
    layout's own complaint. UnsafeFile: a file that asks for code to be run.
    """
    checkpoint = _read(local(path), architecture)
    if normalize_waveform is None:
        return checkpoint
    return replace(
        checkpoint,
        encoder=replace(checkpoint.encoder, normalize_waveform=normalize_waveform),
        notes=(*checkpoint.notes, f"normalize_waveform is {normalize_waveform} because that was asked for."),
    )


def _read(path: Path, architecture: EncoderConfig | None) -> Checkpoint:
    if not path.exists():
        raise ConvertError(f"{path} does not exist")
    if path.is_dir():
        return _read_folder(path, architecture)
    if path.name.startswith(("model.safetensors", "pytorch_model.bin")) and huggingface.matches(path.parent):
        return huggingface.read(path.parent, architecture=architecture)
    content = read_safetensors_file(path) if path.suffix == ".safetensors" else read_torch_file(path)
    for module in _MODULES:
        if module.matches(content):
            return module.read(path, architecture=architecture)
    raise ConvertError(_unknown(path, content))


def write_checkpoint(
    checkpoint: Checkpoint, out: str | os.PathLike, *, layout: str, card: str | None = None
) -> tuple[str, ...]:
    """Writes the folder `out`, whole or not at all; returns the names of its files. `card`: text of its README.md.

    Raises ConvertError: an unknown layout, one that cannot say this model, damaged values; CannotWrite.
    """
    return _of(layout, _WRITERS)(checkpoint, local(out), card=card)


def differences(checkpoint: Checkpoint, *, layout: str) -> tuple[str, ...]:
    """Where the layout's own code does not compute quite what the encoder does, or counts otherwise, in sentences."""
    return _of(layout, _DIFFERENCES)(checkpoint)


def _of(layout: str, table: Mapping[str, Any]) -> Any:
    if layout not in table:
        raise ConvertError(f"no layout is called {layout!r}; there are {', '.join(LAYOUTS)}")
    return table[layout]


def _read_folder(folder: Path, architecture: EncoderConfig | None) -> Checkpoint:
    for module in (huggingface, espnet, torchaudio, fairseq):
        if module.matches(folder):
            return module.read(folder, architecture=architecture)
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS and path.is_file())
    weights = [path for path in files if path.name != huggingface.HEAD_FILE]
    if len(weights) == 1:
        return _read(weights[0], architecture)
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise ConvertError(
        f"{folder} is no model folder: it has no config.json (Hugging Face), no config.yaml with a .pth (ESPnet), no "
        f"torchaudio.json, and {len(weights) or 'no'} files of weights ({', '.join(WEIGHTS)}). There is {there}. "
        + ("Name the one that is meant" if weights else "Is it the right folder?")
    )


def _unknown(path: Path, content: Any) -> str:
    """What to say of a file that no layout knows."""
    advice = "; if these are Hugging Face's, config.json must lie beside the file, under the name it has there"
    if isinstance(content, Mapping):
        keys = [str(key) for key in content]
        found = f"a dict of {len(keys)}: {', '.join(keys[:8])}" + (" ..." if len(keys) > 8 else "")
    else:
        found, advice = f"a {type(content).__name__}", ""
    return (
        f"{path} is in no layout that is known here. Looked for: `model` beside `cfg` or `args` (fairseq, unilm), "
        "`model_weight` (s3prl), encoder.transformer.* (torchaudio), encoder.hubert_pretrain_model.* (ESPnet). "
        f"Found {found}{advice}"
    )
