"""Small parameters that adapt a frozen encoder: LoRA on attention's projections, or a bottleneck in every layer.

They are a nested dict of their own, `{"adapter": ...}` beside the head, stacked over the Transformer's layers as the
encoder's are; the encoder's parameters are not among what is trained. `adapted` makes an ordinary encoder of both, in
the step as anywhere else. LoRA's is the very same kind of encoder with other numbers, so that exporting it merges it. A
bottleneck is a module more in each layer, which only some layouts have a place for (`convert.adapters`).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from wavlab_jax.encoder import Encoder, EncoderConfig
from wavlab_jax.encoder.layers import BOTTLENECK_KINDS, Bottleneck, torch_uniform
from wavlab_jax.model import Parameters, parameters

Projection = Literal["query", "key", "value", "output"]


class AdapterError(ValueError):
    """An adapter that cannot be built; names the field."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates of attention's projections: kernel + alpha / rank * down @ up (LoRA, 2106.09685, section 4.1).

    The defaults are ESPnet's (`espnet2/layers/create_adapter_fn.py` create_lora_adapter: rank 8, alpha 8, no dropout,
    the query alone), by which ML-SUPERB 2.0 adapts its encoders.

    Attributes:
        rank: of the update.
        alpha: its scale, times the rank.
        targets: projections that have one.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: tuple[Projection, ...] = ("query",)

    def __post_init__(self):
        if self.rank < 1 or not self.alpha > 0:
            raise AdapterError(f"rank must be at least 1 and alpha positive: got {self}")
        unknown = [name for name in self.targets if name not in get_args(Projection)]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise AdapterError(f"targets are some of {', '.join(get_args(Projection))}, each once: got {self.targets}")


@dataclass(frozen=True)
class BottleneckConfig:
    """Two small dense layers in every Transformer layer; `encoder.layers.Bottleneck` says where and which.

    Attributes:
        kind: "houlsby": as ESPnet adapts s3prl's encoders for ML-SUPERB 2.0; "mms": as MMS adapts wav2vec 2.0, for
            which transformers has a place in pre-norm HuBERT and wav2vec 2.0.
        width: of the bottleneck (ESPnet's default 32; MMS has 16, `adapter_attn_dim`).
    """

    kind: Literal["houlsby", "mms"] = "houlsby"
    width: int = 32

    def __post_init__(self):
        if self.width < 1 or self.kind not in BOTTLENECK_KINDS:
            raise AdapterError(f"kind is one of {', '.join(BOTTLENECK_KINDS)}, and width at least 1: got {self}")


AnyAdapterConfig = LoraConfig | BottleneckConfig


def make_adapter(key: jax.Array, cfg: AnyAdapterConfig, *, encoder: EncoderConfig) -> Parameters:
    """Fresh parameters, with which the encoder computes what it did before, or (a bottleneck) nearly.

    LoRA: {projection: {"down": [layers, width, rank], "up": [layers, rank, width]}}, with PyTorch's uniform values in
    `down` and zeros in `up`, as in LoRA's own code. A bottleneck: the parameters of `Bottleneck`, [layers, ...].
    """
    if isinstance(cfg, BottleneckConfig):
        return parameters(_bottlenecks(key, cfg, encoder))
    keys = jax.random.split(key, len(cfg.targets))
    shape = (encoder.layers, encoder.width, cfg.rank)
    return {
        target: {
            "down": torch_uniform(own, shape, fan_in=encoder.width),
            "up": jnp.zeros((encoder.layers, cfg.rank, encoder.width)),
        }
        for target, own in zip(cfg.targets, keys, strict=True)
    }


def adapted(encoder: Encoder, adapter: Parameters, cfg: AnyAdapterConfig) -> Encoder:
    """The encoder (its layers stacked) with the adapter in it; neither is changed. Works under `jit`."""
    copy = nnx.merge(*nnx.split(encoder))
    if isinstance(cfg, BottleneckConfig):
        abstract = nnx.eval_shape(lambda: _bottlenecks(jax.random.key(0), cfg, encoder.config))
        graph, state = nnx.split(abstract)
        nnx.replace_by_pure_dict(state, adapter)
        copy.layers.bottleneck = nnx.data(nnx.merge(graph, state))  # None was no data
        return copy
    for target in cfg.targets:
        dense, update = getattr(copy.layers.attention, target), adapter[target]
        change = jnp.einsum("lir,lro->lio", update["down"], update["up"], preferred_element_type=jnp.float32)
        dense.kernel = nnx.Param(dense.kernel[...] + cfg.alpha / cfg.rank * change)
    return copy


def _bottlenecks(key: jax.Array, cfg: BottleneckConfig, encoder: EncoderConfig) -> Bottleneck:
    """One a layer, stacked."""
    make = jax.vmap(lambda k: Bottleneck(k, kind=cfg.kind, width=encoder.width, inner=cfg.width))
    return make(jax.random.split(key, encoder.layers))
