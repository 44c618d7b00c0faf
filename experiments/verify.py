"""Whether an exported model computes the same in PyTorch: every hidden state, by the peer's own code."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from wavlab_jax.convert import torchaudio as torchaudio_files
from wavlab_jax.convert.checkpoint import Checkpoint, to_encoder
from wavlab_jax.convert.layouts import read_checkpoint
from wavlab_jax.convert.settings import (
    CTC_HEADS,
    OURS,
    PREPROCESSOR_EPSILON,
    PRETRAINING_HEADS,
    huggingface_config,
    preprocessor_config,
    read_json,
)
from wavlab_jax.encoder import Encoder, encode

TOLERANCE = 1e-4  # largest absolute difference of any hidden state that counts as the same


class VerifyError(RuntimeError):
    """The exported model does not compute what ours does, or could not be checked though that was asked for."""


class Comparison(NamedTuple):
    """`differences`: hidden state (0: the input of the first layer) -> largest absolute one; `peer`: what ran."""

    differences: dict[int, float]
    peer: str

    @property
    def largest(self) -> float:
        """Over all hidden states; NaN counts as infinite."""
        return max(np.inf if np.isnan(each) else each for each in self.differences.values())


def verify(checkpoint: Checkpoint, folder: Path, waveform: np.ndarray, *, layout: str) -> list[Comparison]:
    """Runs `waveform` [samples] through the exported `folder` in PyTorch and through the encoder here.

    Hugging Face's layout is loaded by transformers itself. Other layouts are read back, compared value by value with
    what was to be written, and run as transformers' model; torchaudio's in its own class too, where it can be imported.

    Raises VerifyError: something differs, by more than `TOLERANCE` for hidden states; or transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise VerifyError(
            "nothing to verify with: transformers and PyTorch are not installed (pip install torch transformers)"
        ) from error
    ours = [np.asarray(state[0]) for state in encode(_in_float32(to_encoder(checkpoint)), waveform[None]).hidden]
    peers: list[Comparison] = []
    if layout == "huggingface":
        model, loading = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
        unknown = set(loading["unexpected_keys"]) - PRETRAINING_HEADS - CTC_HEADS  # of the class that has a head
        if loading["missing_keys"] or unknown:
            raise VerifyError(f"{folder}: transformers misses {loading['missing_keys']}, knows not {unknown}")
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
        peers.append(_in_transformers(model, extractor, waveform, ours))
    else:
        again = read_checkpoint(folder)
        _require_equal(checkpoint, again, folder)
        model = _transformers_model(again)
        extractor = transformers.Wav2Vec2FeatureExtractor.from_dict(preprocessor_config(again.encoder))
        peers.append(_in_transformers(model, extractor, waveform, ours, ", which was given the file read back"))
    if layout == "torchaudio":
        peers += _in_torchaudio(checkpoint, folder, waveform, ours)
    for peer in peers:
        if peer.largest > TOLERANCE:
            raise VerifyError(
                f"{folder}: hidden states differ by up to {peer.largest:.2e} from {peer.peer} (limit {TOLERANCE})"
            )
    return peers


def table(peers: list[Comparison]) -> str:
    """Lines for people: each hidden state's largest difference, and what ran."""
    lines = []
    for peer in peers:
        lines.append(f"largest differences to {peer.peer}:")
        lines += [f"  hidden state {layer:>2}  {difference:.1e}" for layer, difference in peer.differences.items()]
    return "\n".join(lines)


def _in_transformers(model, extractor, waveform: np.ndarray, ours: list[np.ndarray], how: str = "") -> Comparison:
    import torch
    import transformers

    inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        answer = model.eval()(inputs.input_values, output_hidden_states=True)
    # transformers 5 gives the last layer's output before the final norm among hidden_states, and after it beside them
    theirs = (*answer.hidden_states[:-1], answer.last_hidden_state)
    differences = {i: _largest(a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))}
    return Comparison(differences, f"transformers {transformers.__version__} on PyTorch {torch.__version__}{how}")


def _transformers_model(checkpoint: Checkpoint):
    """A bare model of transformers with the checkpoint's values, made in memory."""
    import torch
    import transformers

    config = huggingface_config(checkpoint.encoder, model_type=checkpoint.model_type)
    config.pop(OURS)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**config))
    values = {key: torch.from_numpy(tensor.values()) for key, tensor in checkpoint.tensors.items()}
    model.load_state_dict(values, strict=True, assign=True)
    return model


def _in_torchaudio(
    checkpoint: Checkpoint, folder: Path, waveform: np.ndarray, ours: list[np.ndarray]
) -> list[Comparison]:
    try:
        import torch
        import torchaudio
    except (ImportError, OSError, RuntimeError, AttributeError):  # its extension goes with one version of torch
        return []
    said: dict[str, Any] = read_json(folder / torchaudio_files.ARGUMENTS_FILE)
    builders = {
        f"torchaudio.models.{name}": name for name in ("wav2vec2_model", "wavlm_model", "hubert_pretrain_model")
    }
    model = getattr(torchaudio.models, builders[said["builder"]])(**said["arguments"])
    model.load_state_dict(torch.load(folder / torchaudio_files.MODEL_FILE, weights_only=True), strict=True)
    model = getattr(model, "wav2vec2", model).eval()
    heard, cfg = torch.from_numpy(waveform)[None], checkpoint.encoder
    if cfg.normalize_waveform:
        heard = torch.nn.functional.layer_norm(heard, heard.shape[1:], eps=PREPROCESSOR_EPSILON)
    with torch.no_grad():
        layers, _ = model.extract_features(heard)
        features, _ = model.feature_extractor(heard, None)
        last = model.encoder(features, None)  # after the final norm, which extract_features leaves out
    theirs = (*layers[:-1], last)
    differences = {i: _largest(a, b) for i, (a, b) in enumerate(zip(ours[1:], theirs, strict=True), 1)}
    version = getattr(torchaudio, "__version__", "")
    return [Comparison(differences, f"torchaudio {version} on PyTorch {torch.__version__}")]


def _largest(ours: np.ndarray, theirs) -> float:
    return float(np.abs(ours - theirs[0].numpy()).max())


def _require_equal(checkpoint: Checkpoint, again: Checkpoint, folder: Path) -> None:
    """Raises VerifyError naming tensors and heads that did not come back bit for bit."""
    for before, after in ((checkpoint.tensors, again.tensors), (checkpoint.heads, again.heads)):
        wrong = [
            name
            for name in before
            if name not in after or not np.array_equal(before[name].values(), after[name].values())
        ]
        if wrong or after.keys() - before.keys():
            names = ", ".join([*wrong, *after.keys() - before.keys()][:8])
            raise VerifyError(f"{folder} does not hold what was exported: {names}")


def _in_float32(encoder: Encoder) -> Encoder:
    """The same parameters, computed in float32 and with transformers' epsilon: what differs by that, the card says."""
    graph, state = nnx.split(encoder)
    copy = nnx.merge(graph, state)
    copy.config = dataclasses.replace(encoder.config, compute_dtype="float32", waveform_epsilon=PREPROCESSOR_EPSILON)
    return copy
