"""What sits on the encoder while it is trained: configurations, parameters and initial values of each kind of head.

Structure only; what a head's numbers mean is said by the objective that reads it (`wavlab_jax.objectives`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
from flax import nnx

from wavlab_jax.downstream import Downstream, DownstreamConfig
from wavlab_jax.encoder import EncoderConfig
from wavlab_jax.encoder.layers import Dense, torch_uniform


class HeadError(ValueError):
    """A head that cannot be built, or that the objective cannot train; names the fields."""


@dataclass(frozen=True)
class HeadConfig:
    """The prediction head.

    Attributes:
        units: number of classes.
        dim: of the space in which projected frames and unit embeddings meet (fairseq `final_dim`: 256 Base, 768 Large).
        more_units: classes of further sets of units that are predicted beside these (fairseq: several `labels`).
        split_projection: a projection for each set (fairseq `untie_final_proj`), not one for all.
        scoring: of a projected frame against a unit's embedding. "cosine": cosine similarity (HuBERT, WavLM).
            "linear": inner product plus a bias a unit, so that the head is Linear(width -> dim), Linear(dim -> units):
            XEUS and Fast-HuBERT (ESPnet `ssl/loss/hubert_loss_ce.py`). Either is divided by the temperature.
    """

    units: int = 500
    dim: int = 256
    more_units: tuple[int, ...] = ()
    split_projection: bool = False
    scoring: Literal["cosine", "linear"] = "cosine"

    def __post_init__(self):
        if min(self.dim, *self.unit_sets) < 1:
            raise HeadError(f"units, more_units and dim must be at least 1: got {self}")

    @property
    def unit_sets(self) -> tuple[int, ...]:
        """Classes of each set."""
        return (self.units, *self.more_units)


@dataclass(frozen=True)
class ContrastiveHeadConfig:
    """wav2vec 2.0's head: a product quantizer of the extractor's output, and projections of it and of the context.

    Attributes:
        dim: of the space in which context and quantized targets meet (fairseq `final_dim`: 256 Base, 768 XLS-R 300M).
        codevector_dim: of the quantized vector, all groups together (fairseq `latent_dim`, which is `dim` if 0).
        groups, codes: codebooks, and entries of each (fairseq `latent_groups` 2, `latent_vars` 320).
    """

    dim: int = 256
    codevector_dim: int = 256
    groups: int = 2
    codes: int = 320

    def __post_init__(self):
        if min(self.dim, self.codevector_dim, self.groups) < 1:
            raise HeadError(f"dim, codevector_dim and groups must be at least 1: got {self}")
        if self.codes < 2 or self.codevector_dim % self.groups:
            raise HeadError(f"codevector_dim must be a multiple of groups, and codes at least 2: got {self}")

    @property
    def unit_sets(self) -> tuple[int, ...]:
        """Of labels that it is told: none."""
        return ()


@dataclass(frozen=True)
class LinearHeadConfig:
    """A Linear layer of the last hidden state to tokens, as `HubertForCTC` and fairseq's `HubertCtc` have it.

    Attributes:
        tokens: outputs, the blank (0) included.
        dropout: of the hidden state, before it (transformers `final_dropout`).
    """

    tokens: int
    dropout: float = 0.1

    def __post_init__(self):
        if self.tokens < 2 or not 0 <= self.dropout < 1:
            raise HeadError(f"tokens must be at least 2, dropout lie in [0, 1): got {self}")

    @property
    def unit_sets(self) -> tuple[int, ...]:
        """Of frame by frame labels that it is told: none."""
        return ()


AnyHeadConfig = HeadConfig | ContrastiveHeadConfig | DownstreamConfig | LinearHeadConfig


class Head(nnx.Module):
    """Final projection [width -> dim, or dim a set] and one embedding a unit, U(0, 1) at first (fairseq `hubert.py`).

    Embeddings of several sets follow one another, as in fairseq's `label_embs_concat`. With linear scoring they are the
    weight of a Linear layer, with PyTorch's initial values, and there is a bias a unit.
    """

    def __init__(self, key: jax.Array, cfg: HeadConfig, *, encoder: EncoderConfig):
        projection_key, embedding_key = jax.random.split(key)
        projections = len(cfg.unit_sets) if cfg.split_projection else 1
        self.projection = Dense(projection_key, encoder.width, cfg.dim * projections, bert=False)
        units, linear = sum(cfg.unit_sets), cfg.scoring == "linear"
        if linear:
            embedding_key, bias_key = jax.random.split(embedding_key)
            self.embeddings = nnx.Param(torch_uniform(embedding_key, (units, cfg.dim), fan_in=cfg.dim))
        else:
            self.embeddings = nnx.Param(jax.random.uniform(embedding_key, (units, cfg.dim)))
        self.bias = nnx.Param(torch_uniform(bias_key, (units,), fan_in=cfg.dim)) if linear else None


class Quantizer(nnx.Module):
    """Linear(channels -> groups * codes) and `codevectors` [groups, codes, codevector_dim / groups].

    At first U(0, 1) codevectors, N(0, 1) weights and a zero bias (fairseq `gumbel_vector_quantizer.py`).
    """

    def __init__(self, key: jax.Array, cfg: ContrastiveHeadConfig, *, channels: int):
        code_key, vector_key = jax.random.split(key)
        self.scores = Dense(code_key, channels, cfg.groups * cfg.codes)
        self.scores.kernel = nnx.Param(jax.random.normal(code_key, (channels, cfg.groups * cfg.codes)))
        shape = (cfg.groups, cfg.codes, cfg.codevector_dim // cfg.groups)
        self.codevectors = nnx.Param(jax.random.uniform(vector_key, shape))


class ContrastiveHead(nnx.Module):
    """`quantizer`, `target_projection` [codevector_dim -> dim] (fairseq `project_q`), `context_projection` [width ->
    dim] (fairseq `final_proj`, `project_hid` in transformers); Linear layers with PyTorch's initial values."""

    def __init__(self, key: jax.Array, cfg: ContrastiveHeadConfig, *, encoder: EncoderConfig):
        keys = jax.random.split(key, 3)
        self.quantizer = Quantizer(keys[0], cfg, channels=encoder.extractor_channels[-1])
        self.target_projection = Dense(keys[1], cfg.codevector_dim, cfg.dim, bert=False)
        self.context_projection = Dense(keys[2], encoder.width, cfg.dim, bert=False)


class LinearHead(nnx.Module):
    """`output` [width -> tokens]."""

    def __init__(self, key: jax.Array, cfg: LinearHeadConfig, *, encoder: EncoderConfig):
        self.output = Dense(key, encoder.width, cfg.tokens, bert=False)


def downstream(key: jax.Array, cfg: DownstreamConfig, *, encoder: EncoderConfig | None) -> Downstream:
    """ML-SUPERB's model for the hidden states of an encoder; without one, for log-mel features."""
    if encoder is None:
        return Downstream(key, cfg, hidden=1, inputs=cfg.channels)
    return Downstream(key, cfg, hidden=encoder.layers + 1, inputs=encoder.width)


AnyHead = Head | ContrastiveHead | Downstream | LinearHead


class Kind(NamedTuple):
    """A kind of head: its configuration, and what makes it: (key, configuration, encoder=)."""

    config: type
    module: Callable[..., AnyHead]


# By the name that a model's description has for it.
KINDS: dict[str, Kind] = {
    "units": Kind(HeadConfig, Head),
    "contrastive": Kind(ContrastiveHeadConfig, ContrastiveHead),
    "downstream": Kind(DownstreamConfig, downstream),
    "linear": Kind(LinearHeadConfig, LinearHead),
}


def kind_name(cfg: AnyHeadConfig) -> str:
    """The name of the kind of head that this configures."""
    return next(name for name, kind in KINDS.items() if type(cfg) is kind.config)


def make_head(key: jax.Array, cfg: AnyHeadConfig, *, encoder: EncoderConfig | None) -> AnyHead:
    """A freshly initialised head."""
    return KINDS[kind_name(cfg)].module(key, cfg, encoder=encoder)
