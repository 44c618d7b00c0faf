"""The pre-training model: an encoder and the head that predicts units; and its parameters as a plain nested dict."""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from data_pipelines.atomic import whole_file
from wavlab_jax.encoder import Encoder, EncoderConfig, make_encoder
from wavlab_jax.encoder.config import EncoderError
from wavlab_jax.encoder.layers import Dense

Parameters = dict[str, Any]  # nested dict of arrays; what sharding, optimizers, checkpoints and conversion see


@dataclass(frozen=True)
class HeadConfig:
    """The prediction head.

    Attributes:
        units: number of classes.
        dim: of the space in which projected frames and unit embeddings meet (fairseq `final_dim`: 256 Base, 768 Large).
        more_units: classes of further sets of units that are predicted beside these (fairseq: several `labels`).
        split_projection: a projection for each set (fairseq `untie_final_proj`), not one for all.
    """

    units: int = 500
    dim: int = 256
    more_units: tuple[int, ...] = ()
    split_projection: bool = False

    @property
    def unit_sets(self) -> tuple[int, ...]:
        """Classes of each set."""
        return (self.units, *self.more_units)


class Head(nnx.Module):
    """Final projection [width -> dim, or dim a set] and one embedding a unit, U(0, 1) at first (fairseq `hubert.py`).

    Embeddings of several sets follow one another, as in fairseq's `label_embs_concat`.
    """

    def __init__(self, key: jax.Array, cfg: HeadConfig, *, encoder: EncoderConfig):
        projection_key, embedding_key = jax.random.split(key)
        projections = len(cfg.unit_sets) if cfg.split_projection else 1
        self.projection = Dense(projection_key, encoder.width, cfg.dim * projections, bert=False)
        self.embeddings = nnx.Param(jax.random.uniform(embedding_key, (sum(cfg.unit_sets), cfg.dim)))


class Model(nnx.Module):
    """`encoder` and `head`."""

    encoder: Encoder
    head: Head

    def __init__(self, key: jax.Array, encoder: EncoderConfig, head: HeadConfig):
        encoder_key, head_key = jax.random.split(key)
        self.encoder = make_encoder(encoder_key, encoder)
        self.head = Head(head_key, head, encoder=encoder)


def make_model(key: jax.Array, encoder: EncoderConfig, head: HeadConfig) -> Model:
    """A freshly initialised model."""
    return Model(key, encoder, head)


def parameters(module: nnx.Module) -> Parameters:
    """The module's parameters as a nested dict whose keys are strings only."""
    return _string_keys(nnx.to_pure_dict(nnx.state(module)))


@lru_cache
def _structure(encoder: EncoderConfig, head: HeadConfig):
    return nnx.split(nnx.eval_shape(lambda: make_model(jax.random.key(0), encoder, head)))


def assemble(params: Parameters, encoder: EncoderConfig, head: HeadConfig) -> Model:
    """The model of these configurations holding `params`; inverse of `parameters`. Works under jit."""
    graph, abstract = _structure(encoder, head)
    state = jax.tree.map(lambda x: x, abstract)
    nnx.replace_by_pure_dict(state, _int_keys(params))
    return nnx.merge(graph, state)


def abstract_parameters(encoder: EncoderConfig, head: HeadConfig) -> Parameters:
    """Shapes and dtypes of the parameters, without allocating them."""
    return _string_keys(nnx.to_pure_dict(_structure(encoder, head)[1]))


class Description(NamedTuple):
    """The two configurations that say which parameters a checkpoint holds."""

    encoder: EncoderConfig
    head: HeadConfig


def write_description(path: Path, encoder: EncoderConfig, head: HeadConfig) -> None:
    """Writes both configurations as JSON, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps({"encoder": asdict(encoder), "head": asdict(head)}, indent=1) + "\n")


def read_description(path: Path) -> Description:
    """What `write_description` wrote. Raises EncoderError naming the file if it is something else."""
    try:
        raw = json.loads(path.read_text())
        encoder = {k: tuple(v) if isinstance(v, list) else v for k, v in raw["encoder"].items()}
        return Description(EncoderConfig(**encoder), HeadConfig(**raw["head"]))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise EncoderError(f"{path} does not describe a model of this version: {error}") from error


def count(params: Parameters) -> int:
    """Number of scalars."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))


def _string_keys(tree):
    return {str(k): _string_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _int_keys(tree):
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: _int_keys(v) for k, v in tree.items()}
