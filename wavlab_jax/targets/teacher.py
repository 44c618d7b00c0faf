"""Units of a frozen teacher, computed in the step: the nearest centroid of a layer of its encoder, or of MFCC.

The same numbers as in a label store of the same centroids, without the store, as long as a row is a whole utterance. A
crop hears less: the teacher's attention, its group norm and the normalisation of the waveform, and the deltas of MFCC
at the borders, then see the crop alone, where the store's labels were made of whole utterances.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wavlab_jax.encoder import Encoder, Formulation, encode, lower_layers
from wavlab_jax.features import mfcc
from wavlab_jax.targets.nearest import nearest_unit
from wavlab_jax.targets.online import OnlineSet


class Teacher(NamedTuple):
    """`encoder`, and `centers` [units, width] of the layer's outputs, float32."""

    encoder: Encoder
    centers: jax.Array


def teacher_units(encoder: Encoder, centers: np.ndarray, *, layer: int, formulation: Formulation) -> OnlineSet:
    """The set of units of `layer` of the encoder (0: the first layer's input) and `centers` [units, width].

    Layers above `layer` are neither kept nor computed.
    """
    short = lower_layers(encoder, layer)
    formulation = formulation._replace(scan_layers=False)  # unrolled, the last layer is left out by the compiler

    def units_of(frozen: Teacher, waveform: jax.Array, samples: jax.Array) -> jax.Array:
        valid = jnp.arange(waveform.shape[1])[None] < samples[:, None]
        hidden = encode(frozen.encoder, waveform, valid, formulation=formulation).hidden[layer]
        return nearest_unit(frozen.centers, hidden.astype(jnp.float32))

    return OnlineSet(Teacher(short, jnp.asarray(centers, jnp.float32)), units_of)


def mfcc_units(centers: np.ndarray) -> OnlineSet:
    """The set of units of 39-d MFCC, every second frame of 100 Hz, and `centers` [units, 39]."""

    def units_of(frozen: jax.Array, waveform: jax.Array, samples: jax.Array) -> jax.Array:
        return nearest_unit(frozen, mfcc(waveform, samples)[:, ::2])

    return OnlineSet(jnp.asarray(centers, jnp.float32), units_of)
