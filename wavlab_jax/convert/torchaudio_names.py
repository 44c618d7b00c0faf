"""The name table of torchaudio's state dicts <-> Hugging Face's names, and the wrappings that such files wear.

    feature_extractor.*                             the same
    encoder.feature_projection.*                    feature_projection.*
    encoder.transformer.*                           encoder.*
    *.attention.attention.in_proj_{weight,bias}     WavLM: q_proj, k_proj and v_proj, one below the other
    *.attention.attention.out_proj.*                WavLM: attention.out_proj.*
    aux.*                                           lm_head.*
    mask_generator.mask_embedding                   masked_spec_embed
    logit_generator.final_proj.*                    final_proj.* [dim, width]
    logit_generator.label_embeddings                label_embeddings [units, dim]; no rows for special symbols

A HuBERTPretrainModel has the first five under `wav2vec2.`, and the last three (torchaudio/models/wav2vec2/model.py,
components.py, wavlm_attention.py).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from wavlab_jax.convert.checkpoint import MASK_EMBEDDING, StoredTensor
from wavlab_jax.convert.names import ConvertError

HEAD_NAMES: dict[str, str] = {
    "logit_generator.final_proj.weight": "final_proj.weight",
    "logit_generator.final_proj.bias": "final_proj.bias",
    "logit_generator.label_embeddings": "label_embeddings",
    "aux.weight": "lm_head.weight",
    "aux.bias": "lm_head.bias",
}
_MASK_NAME = "mask_generator.mask_embedding"
_MODEL = "wav2vec2."  # HuBERTPretrainModel's own model
_PREFIXES = {
    "feature_extractor.": "feature_extractor.",
    "encoder.feature_projection.": "feature_projection.",
    "encoder.transformer.": "encoder.",
}
_PARTS = ("q_proj", "k_proj", "v_proj")  # as `torch.nn.MultiheadAttention` stacks them
_FUSED = ".attention.attention."  # the module of that class inside WavLM's
_NEW = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
_OLD = {new: old for old, new in _NEW.items()}

# What training wraps a model in: torch.compile puts its own anywhere, the others come first in every key.
_COMPILED = "_orig_mod."
_WRAPPERS = ("module.", "model.")  # DistributedDataParallel; torchaudio's bundles and Lightning modules
_ENVELOPES = ("model", "state_dict", "module")  # of a checkpoint: ESPnet's, Lightning's, DeepSpeed's


def state_dict(loaded: Any, *, where: str) -> dict[str, StoredTensor]:
    """The tensors of a state dict without what it is wrapped in: envelopes, `_orig_mod.`, `module.`, `model.`.

    Raises ConvertError: no state dict in there, a value that is no tensor, a key that is there twice without wrappers.
    """
    for _ in _ENVELOPES:
        inner = [loaded[name] for name in _ENVELOPES if isinstance(loaded, Mapping) and name in loaded]
        inner = [value for value in inner if isinstance(value, Mapping)]
        if inner:
            loaded = inner[0]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ConvertError(f"{where} holds no state dict: expected names and tensors, got {type(loaded).__name__}")
    wrong = [str(key) for key, value in loaded.items() if not isinstance(value, StoredTensor)]
    if wrong:
        raise ConvertError(f"{where} holds no state dict: {', '.join(wrong[:8])} are no tensors")
    found: dict[str, StoredTensor] = {}
    for key, stored in loaded.items():
        name = key.replace(_COMPILED, "")
        if name in found:
            raise ConvertError(f"{where}: {key} is there twice, as {found[name].key} too")
        found[name] = stored
    while prefix := next((prefix for prefix in _WRAPPERS if all(key.startswith(prefix) for key in found)), None):
        found = {key.removeprefix(prefix): stored for key, stored in found.items()}
    return found


class Hub(NamedTuple):
    """A state dict by Hugging Face's names: `tensors` of the encoder, `heads` by the names of `checkpoint.HEADS`."""

    tensors: dict[str, StoredTensor]
    heads: dict[str, StoredTensor]


def to_hub(found: Mapping[str, StoredTensor], *, where: str) -> Hub:
    """Renames a state dict, takes q, k and v apart, spells weight norm the new way. What has no rule keeps its name.

    Raises ConvertError where two keys become one, or a stack of q, k and v has no three equal parts.
    """
    hub = Hub({}, {})

    def put(target: dict[str, StoredTensor], name: str, stored: StoredTensor) -> None:
        if name in target:
            raise ConvertError(f"{where}: {stored.key} and {target[name].key} are the same tensor of the model, {name}")
        target[name] = stored

    for key, stored in found.items():
        if key in HEAD_NAMES:
            put(hub.heads, HEAD_NAMES[key], stored)
            continue
        if key == _MASK_NAME:
            put(hub.tensors, MASK_EMBEDDING, stored)
            continue
        name = key.removeprefix(_MODEL)
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:  # another layout's names must not pass for Hugging Face's own
            put(hub.tensors, f"unknown: {key}", stored)
            continue
        name = _PREFIXES[prefix] + name.removeprefix(prefix)
        stem, dot, last = name.rpartition(".")
        name = stem + dot + _NEW.get(last, last)
        before, fused, after = name.rpartition(_FUSED)
        if after.startswith("in_proj_"):
            for part, piece in zip(_PARTS, _split(stored, where=where), strict=True):
                put(hub.tensors, f"{before}.attention.{part}.{after.removeprefix('in_proj_')}", piece)
        else:
            put(hub.tensors, f"{before}.attention.{after}" if fused else name, stored)
    return hub


def from_hub(hub: Hub, *, wavlm: bool, pretraining: bool, old_weight_norm: bool = False) -> dict[str, StoredTensor]:
    """The inverse: a Wav2Vec2Model's state dict, or with `pretraining` a HuBERTPretrainModel's.

    Args:
        hub: complete, and nothing in it that the form has no slot for.
        wavlm: q, k and v are put together, as its attention has them.
        pretraining: which form.
        old_weight_norm: `weight_g` and `weight_v`, which torch of any age loads, for torchaudio 2.1's names.
    """
    model = _MODEL if pretraining else ""
    heads = {name: key for key, name in HEAD_NAMES.items()}
    found: dict[str, StoredTensor] = {}
    for name, stored in hub.tensors.items():
        if name == MASK_EMBEDDING:
            found[_MASK_NAME] = stored
            continue
        key = model + _torchaudio_name(name, old_weight_norm=old_weight_norm)
        before, attention, after = key.rpartition(".attention.")
        part, _, ending = after.partition(".")
        if wavlm and attention and part in _PARTS:
            if part == _PARTS[0]:
                stack = [hub.tensors[name.replace(f".{part}.", f".{other}.")] for other in _PARTS]
                found[f"{before}{_FUSED}in_proj_{ending}"] = _stacked(f"{before}{_FUSED}in_proj_{ending}", stack)
        elif wavlm and attention and part == "out_proj":
            found[f"{before}{_FUSED}{after}"] = stored
        else:
            found[key] = stored
    return found | {heads[name]: stored for name, stored in hub.heads.items()}


def _torchaudio_name(name: str, *, old_weight_norm: bool) -> str:
    prefix, hub = next((prefix, hub) for prefix, hub in _PREFIXES.items() if name.startswith(hub))
    name = prefix + name.removeprefix(hub)
    if not old_weight_norm:
        return name
    new = next((new for new in _OLD if name.endswith(f".{new}")), "")
    return name.removesuffix(new) + _OLD.get(new, "")


def _split(stored: StoredTensor, *, where: str) -> list[StoredTensor]:
    """[3 * width, ...] as three of [width, ...]; each reads the whole when it is read."""
    rows, over = divmod(stored.shape[0], 3) if stored.shape else (0, 1)
    if over or not rows:
        raise ConvertError(f"{where}: {stored.key} is {list(stored.shape)}, not q, k and v one below the other")

    def part(index: int) -> StoredTensor:
        key = f"{stored.key} ({_PARTS[index]})"
        own = slice(index * rows, (index + 1) * rows)
        return StoredTensor(key, (rows, *stored.shape[1:]), lambda: stored.read()[own], stored.file)

    return [part(index) for index in range(len(_PARTS))]


def _stacked(key: str, parts: list[StoredTensor]) -> StoredTensor:
    """The inverse of `_split`."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return StoredTensor(key, shape, lambda: np.concatenate([part.read() for part in parts]))
