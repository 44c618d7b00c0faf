"""The name table: every parameter of the encoder, its Hugging Face key, and how the array is turned.

One row a kind of tensor. `{index}` stands for the position in a list; parameters under `layers/` are stacked on a
leading axis here and are one tensor a layer there. Paths join the keys of `nnx.to_pure_dict` with "/".
"""

import enum
import reprlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from wavlab_jax.encoder import EncoderConfig, make_encoder

STACKED = "layers/"  # paths that start so hold all layers in one array
LARGEST_SIZE = 1 << 17  # of anything counted: the sample rate, in the end; a file may say any number


class ConvertError(ValueError):
    """Weights or a configuration that cannot be converted without changing the model; the message names which."""


def short(value: Any) -> str:
    """What a file says, for a message. Of a container only its type: what is shared inside could make it endless."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    return (
        reprlib.repr(value)[:60] if isinstance(value, str | bytes | int | float | None) else f"a {type(value).__name__}"
    )


class Turn(enum.Enum):
    """How an array of ours becomes PyTorch's: a permutation of axes, or axes of length one put in."""

    AS_IS = "as it is"
    DENSE = "[inputs, outputs] -> [outputs, inputs]"
    CONVOLUTION = "[taps, inputs, outputs] -> [outputs, inputs, taps]"
    GAIN = "[taps] -> [1, 1, taps]"
    HEADS = "[heads] -> [1, heads, 1, 1]"

    def to_torch(self, x: np.ndarray) -> np.ndarray:
        """Our array as a C-contiguous one in PyTorch's layout (safetensors writes memory as it lies)."""
        shape = self.torch_shape(x.shape)
        return np.ascontiguousarray(x.transpose() if self in _REVERSED else x).reshape(shape)

    def from_torch(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `to_torch`."""
        if self in _REVERSED:
            return x.transpose()
        return x.reshape(-1) if self in (Turn.GAIN, Turn.HEADS) else x

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """PyTorch's shape of an array that has `shape` here."""
        if self in _REVERSED:
            return tuple(reversed(shape))
        return {Turn.GAIN: (1, 1, *shape), Turn.HEADS: (1, *shape, 1, 1)}.get(self, tuple(shape))


_REVERSED = frozenset({Turn.DENSE, Turn.CONVOLUTION})


class Row(NamedTuple):
    """One kind of tensor: our path, the Hugging Face key, the turn."""

    path: str
    hugging_face: str
    turn: Turn = Turn.AS_IS


def _pair(path: str, key: str, turn: Turn) -> tuple[Row, Row]:
    """Weight and bias of a dense layer or convolution."""
    return Row(f"{path}/kernel", f"{key}.weight", turn), Row(f"{path}/bias", f"{key}.bias")


def _norm(path: str, key: str) -> tuple[Row, Row]:
    """Scale and shift of a norm."""
    return Row(f"{path}/scale", f"{key}.weight"), Row(f"{path}/bias", f"{key}.bias")


_LAYER = "encoder.layers.{index}"
_POSITION = "encoder.pos_conv_embed.conv"

TABLE: tuple[Row, ...] = (
    Row("mask_embedding", "masked_spec_embed"),
    *_pair("frontend/convolutions/{index}", "feature_extractor.conv_layers.{index}.conv", Turn.CONVOLUTION),
    *_norm("frontend/convolutions/{index}/norm", "feature_extractor.conv_layers.{index}.layer_norm"),
    *_norm("frontend/norm", "feature_projection.layer_norm"),
    *_pair("frontend/projection", "feature_projection.projection", Turn.DENSE),
    # PyTorch's weight norm over dim 2; older files spell these two .weight_g and .weight_v
    Row("position/gain", f"{_POSITION}.parametrizations.weight.original0", Turn.GAIN),
    Row("position/direction", f"{_POSITION}.parametrizations.weight.original1", Turn.CONVOLUTION),
    Row("position/bias", f"{_POSITION}.bias"),
    *_norm("norm", "encoder.layer_norm"),
    Row("relative_bias", "encoder.layers.0.attention.rel_attn_embed.weight"),
    *_pair("layers/attention/query", f"{_LAYER}.attention.q_proj", Turn.DENSE),
    *_pair("layers/attention/key", f"{_LAYER}.attention.k_proj", Turn.DENSE),
    *_pair("layers/attention/value", f"{_LAYER}.attention.v_proj", Turn.DENSE),
    *_pair("layers/attention/output", f"{_LAYER}.attention.out_proj", Turn.DENSE),
    *_pair("layers/attention/gate/dense", f"{_LAYER}.attention.gru_rel_pos_linear", Turn.DENSE),
    Row("layers/attention/gate/constant", f"{_LAYER}.attention.gru_rel_pos_const", Turn.HEADS),
    *_norm("layers/attention_norm", f"{_LAYER}.layer_norm"),
    *_pair("layers/expand", f"{_LAYER}.feed_forward.intermediate_dense", Turn.DENSE),
    *_pair("layers/contract", f"{_LAYER}.feed_forward.output_dense", Turn.DENSE),
    *_norm("layers/final_norm", f"{_LAYER}.final_layer_norm"),
)

_BY_PATH = {row.path: row for row in TABLE}


class Tensor(NamedTuple):
    """One tensor of a Hugging Face file.

    Attributes:
        key: its name there.
        shape: its shape there.
        path: our parameter.
        layer: index on that parameter's leading axis; None where it is not stacked.
        turn: between the two layouts.
    """

    key: str
    shape: tuple[int, ...]
    path: str
    layer: int | None
    turn: Turn


def tensors(parameters: Mapping[str, Any]) -> Iterator[Tensor]:
    """Every tensor that a Hugging Face file of these parameters has, in a fixed order.

    `parameters` maps paths to anything with a shape. Raises ConvertError naming a path that has no row in the table.
    """
    for path, array in parameters.items():
        parts = path.split("/")
        numbers = [part for part in parts if part.isdigit()]
        row = _BY_PATH.get("/".join("{index}" if part.isdigit() else part for part in parts))
        if row is None or len(numbers) > 1:
            raise ConvertError(f"parameter {path} has no row in wavlab_jax.convert.names.TABLE; add one")
        if path.startswith(STACKED):
            shape = row.turn.torch_shape(array.shape[1:])
            for layer in range(array.shape[0]):
                yield Tensor(row.hugging_face.format(index=layer), shape, path, layer, row.turn)
        else:
            key = row.hugging_face.format(index=numbers[0] if numbers else "")
            yield Tensor(key, row.turn.torch_shape(array.shape), path, None, row.turn)


@lru_cache
def wanted(cfg: EncoderConfig) -> Mapping[str, Tensor]:
    """Key -> tensor, for every one that a Hugging Face file of such an encoder has; nothing is allocated."""
    abstract = nnx.eval_shape(lambda: make_encoder(jax.random.key(0), cfg))
    return MappingProxyType({tensor.key: tensor for tensor in tensors(flatten(nnx.to_pure_dict(nnx.state(abstract))))})


def flatten(tree: Mapping[str | int, Any], *, prefix: str = "") -> dict[str, Any]:
    """A nested dict as one from paths ("frontend/convolutions/0/kernel") to leaves."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, prefix=f"{path}/") if isinstance(value, Mapping) else {path: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str | int, Any]:
    """The inverse of `flatten`; numbers become integers, as `nnx` has them."""
    tree: dict[str | int, Any] = {}
    for path, value in flat.items():
        *parents, name = (int(part) if part.isdigit() else part for part in path.split("/"))
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
