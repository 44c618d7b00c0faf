"""What every layout is read into and written from: an encoder's configuration, and tensors under Hugging Face's names.

    file ─ read (one module a layout) ▶ Checkpoint ─ to_encoder ▶ Encoder
    Encoder ─ from_encoder ▶ Checkpoint ─ write (one module a layout) ▶ file

Hugging Face's names are the hub because they are public, complete, and already those of the name table
(`names.TABLE`). A layout only renames (and fuses or splits q, k, v), so a conversion never goes through JAX, and a
tensor is read when it is written: memory stays near the size of the file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from wavlab_jax.convert.names import ConvertError, flatten, tensors, unflatten, wanted
from wavlab_jax.encoder import Encoder, EncoderConfig, make_encoder

# Names of `Checkpoint.heads`; each may be absent. Shapes are PyTorch's, [outputs, inputs].
HEADS: dict[str, str] = {
    "final_proj.weight": "[dim, width] HuBERT's projection before the cosine (all label sets' dims concatenated)",
    "final_proj.bias": "[dim]",
    "label_embeddings": "[units, dim] one row a unit (all label sets' units concatenated)",
    "label_projection.weight": "[dim, width] in place of final_proj where logits are linear, not cosines",
    "label_projection.bias": "[dim]",
    "label_classifier.weight": "[units, dim] likewise, in place of label_embeddings",
    "label_classifier.bias": "[units]",
    "label_specials": "[4, dim] fairseq's rows for <s>, <pad>, </s>, <unk>, which come before the units there",
    "quantizer.codevectors": "[1, groups * codes, dim / groups] wav2vec 2.0",
    "quantizer.weight_proj.weight": "[groups * codes, channels]",
    "quantizer.weight_proj.bias": "[groups * codes]",
    "project_q.weight": "[projected, dim] of the quantized targets",
    "project_q.bias": "[projected]",
    "project_hid.weight": "[projected, width] of the context (fairseq calls it final_proj)",
    "project_hid.bias": "[projected]",
    "lm_head.weight": "[vocabulary, width] CTC",
    "lm_head.bias": "[vocabulary]",
}

# No parameter of a trained model is near it; damaged copies of released checkpoints have values of 1e30 and more.
LARGEST = 1e4
MASK_EMBEDDING = "masked_spec_embed"
PROJECTION = "feature_projection.projection"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still where it is stored.

    Attributes:
        key: its name there, for messages.
        shape: its shape.
        read: fetches it as a NumPy array of that shape, in the stored precision (bfloat16 comes as float32).
        file: where it is stored, for messages; empty for what is in memory.
    """

    key: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    file: str = ""

    @classmethod
    def of(cls, key: str, array: np.ndarray) -> "StoredTensor":
        """A tensor that is in memory already."""
        return cls(key, tuple(array.shape), lambda: array)

    def values(self) -> np.ndarray:
        """The tensor as float32, C-contiguous: what every writer writes.

        Raises ConvertError naming file and key if it is not of `shape`, no floating-point numbers, or has a value that
        is not finite or larger than `LARGEST`.
        """
        array = self.read()
        where = f"{self.file}: {self.key}" if self.file else self.key
        if tuple(array.shape) != tuple(self.shape):
            raise ConvertError(f"{where} was read as {list(array.shape)}, but should be {list(self.shape)}")
        if array.dtype.kind != "f":
            raise ConvertError(f"{where} holds {array.dtype}, not floating-point numbers: convert it from a full copy")
        if array.size:
            low, high = float(array.min()), float(array.max())  # NaN if any is
            if not (np.isfinite(low) and np.isfinite(high)):
                bad = int(array.size - np.count_nonzero(np.isfinite(array)))
                raise ConvertError(f"{where} has {bad} values that are not finite; such a model is of no use to anyone")
            if max(-low, high) > LARGEST:
                raise ConvertError(
                    f"{where} has values up to {max(-low, high):.3g}; no trained model has any above {LARGEST:g}: the "
                    "file is damaged, get it anew"
                )
        return np.ascontiguousarray(array, np.float32).reshape(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A model between two layouts.

    Attributes:
        layout: where it came from: "huggingface", "fairseq", "unilm", "s3prl", "torchaudio", "espnet" or "wavlab_jax".
        model_type: "hubert", "wavlm" or "wav2vec2".
        encoder: its architecture.
        tensors: the bare encoder's, by Hugging Face's names without the model's prefix and in the new spelling of
            weight norm (`parametrizations.weight.original0`); PyTorch's shapes.
        heads: what sits on the encoder, by the names of `HEADS`; others that the file has keep their own name.
        settings: what else the file says that another layout can carry, as plain JSON: `sample_rate`, `label_rate`,
            `temperature`, `dictionaries` (a list of unit names a label set), ... Absent where not said.
        notes: what had to be assumed, and what was left out, in sentences for people.
        left_over: keys of the file that went nowhere.
    """

    layout: str
    model_type: str
    encoder: EncoderConfig
    tensors: Mapping[str, StoredTensor]
    heads: Mapping[str, StoredTensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    left_over: tuple[str, ...] = ()

    def parameters(self) -> int:
        """Number of scalars in the encoder."""
        return sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in self.tensors.values())


class Fitted(NamedTuple):
    """`Checkpoint.tensors`, complete and in a fixed order, and notes on what the file did not have."""

    tensors: dict[str, StoredTensor]
    notes: tuple[str, ...]


def fit(cfg: EncoderConfig, found: Mapping[str, StoredTensor], *, where: Any, advice: str = "") -> Fitted:
    """The tensors of an encoder of `cfg` out of `found`, which has Hugging Face's keys; no values are read.

    Two things a file may lack: the mask embedding (inference-only files), which is drawn anew, and a projection between
    equal widths (fairseq has none then), which becomes the identity: exact.

    Raises ConvertError that begins with `where` (the file), ends with `advice`, and lists what is missing, unexpected
    and of another shape, each by its name in the file; or says by how much the configuration is larger than the file.
    """
    found, notes = dict(found), []
    _require_size(cfg, found, where=where)
    if MASK_EMBEDDING not in found:
        values = np.random.default_rng(0).uniform(size=cfg.width).astype(np.float32)
        found[MASK_EMBEDDING] = StoredTensor.of(MASK_EMBEDDING, values)
        notes.append(
            "The file has no mask embedding; it was drawn anew from U(0, 1), fairseq's initial values. It is used "
            "where frames are masked, nowhere else."
        )
    if cfg.width == cfg.extractor_channels[-1] and not any(key.startswith(f"{PROJECTION}.") for key in found):
        for name, values in (
            ("weight", np.eye(cfg.width, dtype=np.float32)),
            ("bias", np.zeros(cfg.width, np.float32)),
        ):
            found[f"{PROJECTION}.{name}"] = StoredTensor.of(f"{PROJECTION}.{name}", values)
        notes.append(
            f"The file has no projection of features, which are as wide as the Transformer ({cfg.width}); the identity "
            "stands in its place, which is exactly the same."
        )
    asked = wanted(cfg)
    problems = []
    for title, keys in (
        ("missing", [key for key in asked if key not in found]),
        ("unexpected", [found[key].key for key in found if key not in asked]),
        (
            "of another shape than the configuration asks for",
            [
                f"{found[key].key} {list(found[key].shape)}, not {list(tensor.shape)}"
                for key, tensor in asked.items()
                if key in found and tuple(found[key].shape) != tuple(tensor.shape)
            ],
        ),
    ):
        if keys:
            more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
            problems.append(f"{len(keys)} {title}: {', '.join(sorted(keys)[:8])}{more}")
    if problems:
        raise ConvertError(f"{where} does not hold this encoder. {'; '.join(problems)}{advice and f'. {advice}'}")
    return Fitted({key: found[key] for key in asked}, tuple(notes))


def _require_size(cfg: EncoderConfig, found: Mapping[str, StoredTensor], *, where: Any) -> None:
    """Raises ConvertError if a configuration asks for much more than the file has, before anything is made by it."""
    largest = max((max(stored.shape, default=0) for stored in found.values()), default=0)
    sizes = (*cfg.extractor_channels, cfg.width, cfg.feed_forward, cfg.position_kernel)
    if cfg.layers + len(cfg.extractor_channels) > len(found):
        raise ConvertError(
            f"{where}: {cfg.layers} layers on {len(cfg.extractor_channels)} convolutions are asked for, but there are "
            f"only {len(found)} tensors"
        )
    if max(sizes) > largest:
        raise ConvertError(f"{where}: a size of {max(sizes)} is asked for, but no tensor has more than {largest}")


def to_encoder(checkpoint: Checkpoint) -> Encoder:
    """The encoder, its parameters float32. Each tensor is read once, into the place where JAX keeps it on CPU.

    Raises ConvertError naming a tensor that is missing, of another shape, not finite or larger than `LARGEST`.
    """
    cfg = checkpoint.encoder
    found = fit(cfg, checkpoint.tensors, where=f"the {checkpoint.layout} checkpoint").tensors
    graph, abstract = nnx.split(nnx.eval_shape(lambda: make_encoder(jax.random.key(0), cfg)))
    shapes = flatten(nnx.to_pure_dict(abstract))
    flat: dict[str, Any] = {}
    for key, tensor in wanted(cfg).items():
        if tensor.path not in flat:
            flat[tensor.path] = _aligned(shapes[tensor.path].shape)
        place = flat[tensor.path] if tensor.layer is None else flat[tensor.path][tensor.layer]
        place[...] = tensor.turn.from_torch(found[key].values())
    nnx.replace_by_pure_dict(abstract, unflatten({path: jax.device_put(array) for path, array in flat.items()}))
    return nnx.merge(graph, abstract)


def from_encoder(
    encoder: Encoder,
    *,
    head: Mapping[str, np.ndarray] | None = None,
    settings: Mapping[str, Any] | None = None,
    model_type: str | None = None,
) -> Checkpoint:
    """The checkpoint of an encoder whose arrays this process can address; they are turned when they are written.

    Args:
        encoder: from `make_encoder`, training or `to_encoder`.
        head: by the names and in the shapes of `HEADS`.
        settings: see `Checkpoint.settings`.
        model_type: "wav2vec2" or "hubert" for an encoder without relative bias (both compute the same); by default
            "hubert".
    """
    cfg = encoder.config
    flat = flatten(nnx.to_pure_dict(nnx.state(encoder)))

    def stored(tensor) -> StoredTensor:
        def read() -> np.ndarray:
            array = np.asarray(flat[tensor.path])
            array = array if tensor.layer is None else array[tensor.layer]
            return tensor.turn.to_torch(np.asarray(array, np.float32))

        layer = "" if tensor.layer is None else f", layer {tensor.layer}"
        return StoredTensor(f"parameter {tensor.path}{layer}", tensor.shape, read)

    return Checkpoint(
        layout="wavlab_jax",
        model_type=kind_of(cfg, model_type),
        encoder=cfg,
        tensors={tensor.key: stored(tensor) for tensor in tensors(flat)},
        heads={name: StoredTensor.of(f"head tensor {name}", np.asarray(array)) for name, array in (head or {}).items()},
        settings=dict(settings or {}),
    )


def kind_of(cfg: EncoderConfig, model_type: str | None = None) -> str:
    """The model type that computes what `cfg` says: "wavlm" with a relative bias, else `model_type` or "hubert"."""
    if cfg.relative_bias:
        return "wavlm"
    return model_type if model_type in ("hubert", "wav2vec2") else "hubert"


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An empty float32 array on a 64-byte boundary: `jax.device_put` takes such memory on CPU without copying it."""
    size = 4 * int(np.prod(shape, dtype=np.int64))
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(np.float32).reshape(shape)
