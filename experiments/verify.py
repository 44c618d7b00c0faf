"""Whether an exported model computes the same in PyTorch, by the peer's code: hidden states, a recogniser's logits."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from wavlab_jax.convert import torchaudio as torchaudio_files
from wavlab_jax.convert.checkpoint import Checkpoint, to_encoder
from wavlab_jax.convert.layouts import read_checkpoint
from wavlab_jax.convert.settings import (
    OURS,
    PREPROCESSOR_EPSILON,
    huggingface_config,
    preprocessor_config,
    read_json,
)
from wavlab_jax.convert.tokenizer import text_of
from wavlab_jax.encoder import Encoder, encode

# Largest difference that counts as the same: of a layer's largest absolute value, or absolute below one. float32 keeps
# seven digits of the largest value there is, and some models (Large, deep layers) have values of several hundred.
TOLERANCE = 1e-4


class VerifyError(RuntimeError):
    """The exported model does not compute what ours does, or could not be checked though that was asked for."""


class Comparison(NamedTuple):
    """How far a peer is from the encoder here.

    Attributes:
        differences: hidden state (0: the input of the first layer), or "logits" -> largest absolute difference.
        magnitudes: the same -> largest absolute value here.
        peer: what ran.
    """

    differences: dict[int | str, float]
    magnitudes: dict[int | str, float]
    peer: str

    @property
    def largest(self) -> float:
        """Over all of them; NaN counts as infinite."""
        return max(np.inf if np.isnan(each) else each for each in self.differences.values())

    def limit(self, layer: int | str) -> float:
        """The largest difference of a hidden state that counts as the same."""
        return TOLERANCE * max(1.0, self.magnitudes[layer])

    def wrong(self) -> list[int | str]:
        """Hidden states that differ by more; NaN does."""
        return [layer for layer, difference in self.differences.items() if not difference <= self.limit(layer)]


def verify(
    checkpoint: Checkpoint, folder: Path, waveform: np.ndarray, *, layout: str, encoder: Encoder | None = None
) -> list[Comparison]:
    """Runs `waveform` [samples] through the exported `folder` in PyTorch and through the encoder here.

    Hugging Face's layout is loaded by transformers itself, by the class that its config.json names; of a CTC head the
    logits are compared as well, and what its tokenizer reads in them. `encoder`: with an adapter in it, where the
    checkpoint's own tensors are not all of it. Other layouts are
    read back by our own reader, compared value by value with what was to be written, and run as transformers' model:
    neither fairseq nor ESPnet is run. torchaudio's is loaded by its own class too, where that can be imported.

    Raises VerifyError: something differs, by more than `TOLERANCE` for hidden states (the message has the table); or
    transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise VerifyError(
            "nothing to verify with: transformers and PyTorch are not installed (pip install torch transformers)"
        ) from error
    encoder = _in_float32(to_encoder(checkpoint) if encoder is None else encoder)
    ours = [np.asarray(state[0]) for state in encode(encoder, waveform[None]).hidden]
    peers: list[Comparison] = []
    if layout == "huggingface":
        kind = read_json(folder / "config.json")["architectures"][0]
        model, loading = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
        missing, unknown = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
        if missing or unknown:
            raise VerifyError(f"{folder}: {kind} of transformers misses {missing}, and does not know {unknown}")
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
        peers.append(_in_transformers(getattr(model, model.base_model_prefix, model), extractor, waveform, ours))
        if kind.endswith("ForCTC"):
            inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt")
            logits = _logits(checkpoint, ours[-1])
            peers.append(_spelled(checkpoint, folder, model, inputs.input_values, logits, peers[0].peer))
    else:
        again = read_checkpoint(folder)
        _require_equal(checkpoint, again, folder)
        model = _transformers_model(again)
        extractor = transformers.Wav2Vec2FeatureExtractor.from_dict(preprocessor_config(again.encoder))
        peers.append(_in_transformers(model, extractor, waveform, ours, ", which was given the file read back"))
    if layout == "torchaudio":
        peers += _in_torchaudio(checkpoint, folder, waveform, ours)
    for peer in peers:
        if wrong := peer.wrong():
            states = "hidden states " if isinstance(wrong[0], int) else ""
            raise VerifyError(
                f"{folder}: {states}{', '.join(map(str, wrong))} differ from {peer.peer} by more than "
                f"{TOLERANCE:g} of the layer's largest value\n{table(peers)}"
            )
    return peers


def table(peers: list[Comparison]) -> str:
    """Lines for people: each hidden state's largest difference, its largest value and the limit, and what ran."""
    lines = []
    for peer in peers:
        wrong = peer.wrong()
        lines += [f"largest differences to {peer.peer}:", "  hidden state  difference  largest value    limit"]
        lines += [
            f"  {layer:>12}  {difference:>10.1e}  {peer.magnitudes[layer]:>13.4g}  {peer.limit(layer):.1e}"
            + ("  too much" if layer in wrong else "")
            for layer, difference in peer.differences.items()
        ]
    return "\n".join(lines)


def _in_transformers(model, extractor, waveform: np.ndarray, ours: list[np.ndarray], how: str = "") -> Comparison:
    import torch
    import transformers

    inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        answer = model.eval()(inputs.input_values, output_hidden_states=True)
    # transformers 5 gives the last layer's output before the final norm among hidden_states, and after it beside them
    theirs = (*answer.hidden_states[:-1], answer.last_hidden_state)
    peer = f"transformers {transformers.__version__} on PyTorch {torch.__version__}{how}"
    return _comparison(dict(enumerate(zip(ours, theirs, strict=True))), peer)


def _logits(checkpoint: Checkpoint, hidden: np.ndarray) -> np.ndarray:
    """[frames, tokens] of the last hidden state [frames, width], by the checkpoint's CTC head."""
    return hidden @ checkpoint.heads["lm_head.weight"].values().T + checkpoint.heads["lm_head.bias"].values()


def _spelled(checkpoint: Checkpoint, folder: Path, model, heard, logits: np.ndarray, peer: str) -> Comparison:
    """The whole model's logits; and, raising VerifyError if it differs, what the folder's tokenizer reads in them."""
    import torch
    import transformers

    with torch.no_grad():
        theirs = model.eval()(heard).logits
    compared = _comparison({"logits": (logits, theirs)}, f"{type(model).__name__}, {peer}")
    files = checkpoint.settings.get("tokenizer")
    if files and checkpoint.layout == "wavlab_jax" and not compared.wrong():  # others' files are kept as they are
        best = theirs[0].argmax(-1).numpy()
        said, wanted = transformers.AutoProcessor.from_pretrained(folder).decode(best), text_of(best, files)
        if said != wanted:
            raise VerifyError(f"{folder}: the tokenizer reads {said!r} where {wanted!r} was recognised")
    return compared


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
    version = getattr(torchaudio, "__version__", "")
    pairs = dict(enumerate(zip(ours[1:], theirs, strict=True), 1))
    return [_comparison(pairs, f"torchaudio {version} on PyTorch {torch.__version__}")]


def _comparison(pairs: dict[int | str, tuple[np.ndarray, Any]], peer: str) -> Comparison:
    """Of (ours [frames, width], theirs [1, frames, width] in PyTorch) by hidden state."""
    differences = {layer: float(np.abs(ours - theirs[0].numpy()).max()) for layer, (ours, theirs) in pairs.items()}
    return Comparison(differences, {layer: float(np.abs(ours).max()) for layer, (ours, _) in pairs.items()}, peer)


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
