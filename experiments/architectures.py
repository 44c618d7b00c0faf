"""What `show` and `list` say of a published architecture."""

from typing import NamedTuple

import jax

from experiments.stage import flatten
from wavlab_jax.encoder import make_encoder
from wavlab_jax.encoder.architectures import TABLE, architecture
from wavlab_jax.model import count

_BARE = {"hubert": "HubertModel", "wavlm": "WavLMModel", "wav2vec2": "Wav2Vec2Model"}


class Counts(NamedTuple):
    """Number of scalars: in the bare encoder as transformers' model has it, and in the head it was pre-trained with."""

    encoder: int
    head: int


def parameter_counts(name: str) -> Counts:
    """Of an architecture; nothing is allocated. Raises EncoderError with the nearest names if there is no such one."""
    cfg = architecture(name)
    return Counts(count(jax.eval_shape(lambda: make_encoder(jax.random.key(0), cfg))), TABLE[name].head_parameters())


def list_architectures() -> str:
    """Name and model of each, a line each."""
    width = max(map(len, TABLE))
    return "\n".join(f"{name:<{width}}  {row.about}" for name, row in TABLE.items())


def show_architecture(name: str) -> str:
    """The configuration, value by value, the head's tensors, and the parameter counts. Raises as `parameter_counts`."""
    cfg, counts = architecture(name), parameter_counts(name)
    row = TABLE[name]
    lines = [f"{row.about}; `{row.model_type}` in transformers", ""]
    lines += [f"encoder.{path} = {value}" for path, value in flatten(cfg).items()]
    lines += [f"head.{path} = {value}" for path, value in flatten(row.head).items()]
    lines += [
        "",
        f"{counts.encoder:,} parameters in the encoder (transformers' {_BARE[row.model_type]}), {counts.head:,} in the "
        f"head it was pre-trained with; {sum(counts):,} in all",
    ]
    return "\n".join(lines)
