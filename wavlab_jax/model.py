"""The pre-training model: an encoder and a head; and its parameters as a plain nested dict."""

import json
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from data_pipelines.atomic import whole_file
from wavlab_jax.encoder import Encoder, EncoderConfig, make_encoder
from wavlab_jax.encoder.config import EncoderError
from wavlab_jax.heads import KINDS, AnyHead, AnyHeadConfig, kind_name, make_head

Parameters = dict[str, Any]  # nested dict of arrays; what sharding, optimizers, checkpoints and conversion see


class Model(nnx.Module):
    """`encoder` and `head`."""

    encoder: Encoder | None
    head: AnyHead

    def __init__(self, key: jax.Array, encoder: EncoderConfig | None, head: AnyHeadConfig):
        encoder_key, head_key = jax.random.split(key)
        self.encoder = None if encoder is None else make_encoder(encoder_key, encoder)
        self.head = make_head(head_key, head, encoder=encoder)


def make_model(key: jax.Array, encoder: EncoderConfig | None, head: AnyHeadConfig) -> Model:
    """A freshly initialised model; without an encoder, its head alone, which is given other features."""
    return Model(key, encoder, head)


def parameters(module: nnx.Module) -> Parameters:
    """The module's parameters as a nested dict whose keys are strings only."""
    return _string_keys(nnx.to_pure_dict(nnx.state(module)))


@lru_cache
def _structure(encoder: EncoderConfig | None, head: AnyHeadConfig):
    return nnx.split(nnx.eval_shape(lambda: make_model(jax.random.key(0), encoder, head)))


def assemble(params: Parameters, encoder: EncoderConfig | None, head: AnyHeadConfig) -> Model:
    """The model of these configurations holding `params`; inverse of `parameters`. Works under jit."""
    graph, abstract = _structure(encoder, head)
    state = jax.tree.map(lambda x: x, abstract)
    nnx.replace_by_pure_dict(state, _int_keys(params))
    return nnx.merge(graph, state)


def abstract_parameters(encoder: EncoderConfig | None, head: AnyHeadConfig) -> Parameters:
    """Shapes and dtypes of the parameters, without allocating them."""
    return _string_keys(nnx.to_pure_dict(_structure(encoder, head)[1]))


class Description(NamedTuple):
    """The two configurations that say which parameters a checkpoint holds."""

    encoder: EncoderConfig | None
    head: AnyHeadConfig


def write_description(path: Path, encoder: EncoderConfig | None, head: AnyHeadConfig) -> None:
    """Writes both configurations as JSON, whole or not at all."""
    described = {"encoder": encoder and asdict(encoder), "head": {"kind": kind_name(head), **asdict(head)}}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(described, indent=1) + "\n")


def read_description(path: Path) -> Description:
    """What `write_description` wrote. Raises EncoderError naming the file if it is something else."""
    try:
        raw = json.loads(path.read_text())
        encoder, head = (
            {k: tuple(v) if isinstance(v, list) else v for k, v in (raw[name] or {}).items()}
            for name in ("encoder", "head")
        )
        kind = head.pop("kind", "units")  # the only one when descriptions did not say it
        return Description(EncoderConfig(**encoder) if raw["encoder"] else None, KINDS[kind].config(**head))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
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
