"""The product quantizer of wav2vec 2.0 (2006.11477, section 2): Gumbel noise, straight-through, perplexities."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wavlab_jax.metrics import Sum


class Quantized(NamedTuple):
    """`vectors` [rows, frames, groups * dim] float32 and the `codes` that make them, int32 [rows, frames, groups]."""

    vectors: jax.Array
    codes: jax.Array


def gumbel_temperature(step: jax.Array, *, start: float, floor: float, decay: float) -> jax.Array:
    """max(start * decay ** step, floor), [] float32; `step` updates were made (fairseq `set_num_updates`)."""
    # a power of a float32 0.999995 would be 1 % off after 400k steps
    return jnp.maximum(start * jnp.exp(step.astype(jnp.float32) * math.log(decay)), floor)


def gumbel_noise(keys: jax.Array, *, frames: int, groups: int, codes: int) -> jax.Array:
    """[rows, frames, groups, codes] float32 standard Gumbel variables; row i depends on `keys[i]` alone."""
    return jax.vmap(lambda key: jax.random.gumbel(key, (frames, groups, codes)))(keys)


def choose(logits: jax.Array, noise: jax.Array | None, *, temperature: jax.Array | float) -> jax.Array:
    """Weights of the codes, [rows, frames, groups, codes]: one-hot at the largest of `logits` + `noise`.

    The gradient is that of softmax((logits + noise) / temperature) in their place (Jang et al., 1611.01144, straight
    through): its Jacobian at this noise, times whatever comes from the hard choice's use. Without noise (evaluation)
    the choice has no gradient, as in fairseq and transformers.

    The weights are exactly 0 and 1. PyTorch's `gumbel_softmax(hard=True)` rounds, so that there two frames with the
    same codes may get vectors that differ in the last bit, which then count as a negative for each other.
    """
    noisy = logits if noise is None else logits + noise
    hard = jax.nn.one_hot(jnp.argmax(noisy, axis=-1), logits.shape[-1], dtype=jnp.float32)
    if noise is None:
        return hard
    soft = jax.nn.softmax(noisy / temperature, axis=-1)
    return hard + (soft - jax.lax.stop_gradient(soft))


def quantize(weights: jax.Array, codevectors: jax.Array) -> Quantized:
    """`weights` [rows, frames, groups, codes] of `choose`, `codevectors` [groups, codes, dim]: a vector a frame."""
    vectors = jnp.einsum("rfgc,gcd->rfgd", weights, codevectors.astype(jnp.float32))
    return Quantized(vectors.reshape(*vectors.shape[:2], -1), jnp.argmax(weights, axis=-1).astype(jnp.int32))


class Perplexities(NamedTuple):
    """How many codes are in use, summed over groups: groups * codes at most, groups after a collapse; [] float32.

    Attributes:
        code: exp(entropy) of how often each code is the most probable one.
        prob: exp(entropy) of the mean probability of each code; has a gradient.
    """

    code: jax.Array
    prob: jax.Array


def perplexities(logits: jax.Array, counted: jax.Array) -> Perplexities:
    """Over the frames `counted` [rows, frames] of `logits` [rows, frames, groups, codes], without noise.

    A nonlinear statistic of a batch: it neither adds up over passes nor stays what it is when they are made smaller.
    (fairseq `gumbel_vector_quantizer.py`; 1e-7 inside the logarithm.)
    """
    weight = counted[..., None, None].astype(jnp.float32)
    total = jnp.maximum(jnp.sum(weight), 1.0)

    def perplexity(probabilities):
        mean = jnp.sum(weight * probabilities, axis=(0, 1)) / total
        return jnp.sum(jnp.exp(-jnp.sum(mean * jnp.log(mean + 1e-7), axis=-1)))

    hard = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.float32)
    return Perplexities(perplexity(hard), perplexity(jax.nn.softmax(logits, axis=-1)))


def diversity(prob_perplexity: jax.Array, *, entries: int, frames: jax.Array) -> Sum:
    """(entries - perplexity) / entries of one pass, weighted by its number of hidden `frames`.

    0 where all `entries` (groups * codes) are used alike (fairseq `wav2vec2.py` get_extra_losses). The paper's equation
    4 has the entropy instead. Of several passes it is the weighted mean.
    """
    return Sum((entries - prob_perplexity) / entries * frames, frames)
