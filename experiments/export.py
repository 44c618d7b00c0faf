"""Writing a trained stage for PyTorch, and checking that PyTorch computes the same."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import wavlab_jax.model as models
from data_pipelines.manifest import Manifest, Split
from data_pipelines.sources import ShardSource
from experiments.trained import load_model
from wavlab_jax.convert import export_huggingface
from wavlab_jax.encoder import Encoder, encode
from wavlab_jax.sharding import MeshConfig, make_mesh

TOLERANCE = 1e-4  # largest absolute difference of any hidden state that counts as the same


class ExportError(RuntimeError):
    """The exported model does not compute what ours does."""


def export_stage(stage: str, *, workdir: Path, corpus: Path | None, out: Path) -> dict:
    """Writes the newest model of a stage as a Hugging Face folder; returns what was written and how it was checked.

    With `transformers` and PyTorch installed, a held-out clip is run through both and every hidden state compared.
    Raises ExportError if any differs by more than `TOLERANCE`.
    """
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    waveform = _clip(corpus)
    model = load_model(workdir, stage, mesh)
    head = {name.replace("/", "."): np.asarray(leaf) for name, leaf in _leaves(models.parameters(model.head))}
    report = export_huggingface(model.encoder, out, head=head)
    try:
        compared = _compare(model.encoder, Path(out), waveform)
    except ExportError:
        shutil.rmtree(out)  # nothing wrong stays under the name that was asked for
        raise
    result = {
        "folder": str(out),
        "files": sorted(path.name for path in Path(out).iterdir()),
        "bytes": sum(path.stat().st_size for path in Path(out).iterdir()),
        "notes": list(getattr(report, "notes", ())),
        **compared,
    }
    return result


def _compare(encoder: Encoder, folder: Path, waveform: np.ndarray) -> dict:
    try:
        import torch
        import transformers
    except ImportError:
        return {"largest_difference": None, "checked_with": "not checked: transformers and PyTorch are not installed"}
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    peer, loading = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    if loading["missing_keys"] or loading["unexpected_keys"]:
        raise ExportError(
            f"{folder}: transformers misses {loading['missing_keys']}, knows not {loading['unexpected_keys']}"
        )
    inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        answer = peer.eval()(inputs.input_values, output_hidden_states=True)
    # transformers 5 gives the last layer's output before the final norm among hidden_states, and after it beside them
    theirs = (*answer.hidden_states[:-1], answer.last_hidden_state)
    ours = encode(_in_float32(encoder), waveform[None]).hidden
    largest = max(float(np.abs(np.asarray(a) - b.numpy()).max()) for a, b in zip(ours, theirs, strict=True))
    if largest > TOLERANCE:
        raise ExportError(
            f"{folder}: hidden states differ by up to {largest:.2e} from transformers' (limit {TOLERANCE})"
        )
    version = f"transformers {transformers.__version__} on PyTorch {torch.__version__}"
    return {"largest_difference": largest, "checked_with": version}


def _in_float32(encoder: Encoder) -> Encoder:
    """The same parameters, computed in float32 as PyTorch will."""
    graph, state = nnx.split(encoder)
    copy = nnx.merge(graph, state)
    copy.config = dataclasses.replace(encoder.config, compute_dtype="float32")
    return copy


def _clip(corpus: Path | None) -> np.ndarray:
    """A held-out clip of at least a second, or noise where there is none; float32 [samples]."""
    if corpus is not None:
        manifest = Manifest.load(corpus)
        for i in np.concatenate([manifest.rows(Split.TEST), manifest.rows(Split.DEV)]):
            if manifest.samples[i] >= 16_000:
                return ShardSource(manifest).read(int(i))[: 16_000 * 10]
    return np.random.default_rng(0).normal(scale=0.1, size=32_000).astype(np.float32)


def _leaves(tree: dict, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value
