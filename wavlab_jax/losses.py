"""What a prediction costs. Every function returns sums and weights, never means; all arithmetic is float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from wavlab_jax.metrics import Sum


def cosine_logits(projected: jax.Array, embeddings: jax.Array, *, temperature: float) -> jax.Array:
    """[batch, frames, dim] and [units, dim] -> [batch, frames, units]: cosine similarity / temperature.

    HuBERT equation 3 (2106.07447). fairseq's `compute_nce` puts the target first among all classes and removes its
    duplicate: that is this softmax over the classes. eps 1e-8 as in torch.cosine_similarity.
    """

    return jnp.einsum("bfd,ud->bfu", _unit_length(projected), _unit_length(embeddings)) / temperature


def linear_logits(projected: jax.Array, weight: jax.Array, bias: jax.Array, *, temperature: float) -> jax.Array:
    """[batch, frames, dim], [units, dim] and [units] -> [batch, frames, units]: (x . w + b) / temperature.

    Fast-HuBERT's plain cross-entropy (2309.13860), as XEUS has it (ESPnet `ssl/loss/hubert_loss_ce.py`).
    """
    product = jnp.einsum("bfd,ud->bfu", projected.astype(jnp.float32), weight.astype(jnp.float32))
    return (product + bias.astype(jnp.float32)[None, None]) / temperature


def _unit_length(x: jax.Array) -> jax.Array:
    """x [..., dim] as float32 over its norm, or over 1e-8 where that is larger."""
    x = x.astype(jnp.float32)
    # the square is floored, not the root: a zero vector then has a gradient of zero, not 0 / 0
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-16))


def cross_entropy(logits: jax.Array, targets: jax.Array, scored: jax.Array) -> tuple[Sum, Sum]:
    """Of each row, cross-entropy in nats and number correct over its scored frames, with their number; all [batch].

    Args:
        logits: [batch, frames, units] float32.
        targets: [batch, frames] int; values outside [0, units) only where not scored.
        scored: [batch, frames] bool.
    """
    weight = jnp.sum(scored, axis=1, dtype=jnp.float32)
    safe = jnp.where(scored, targets, 0)
    log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), safe[..., None], axis=-1)[..., 0]
    correct = jnp.argmax(logits, axis=-1) == targets
    return (
        Sum(-jnp.sum(jnp.where(scored, log_likelihood, 0.0), axis=1), weight),
        Sum(jnp.sum(scored & correct, axis=1, dtype=jnp.float32), weight),
    )


def feature_penalty(features: jax.Array, valid: jax.Array) -> Sum:
    """Sum of squares of the extractor's output [batch, frames, channels] over real frames, and their number.

    HuBERT's features_pen: mean(features ** 2) before LayerNorm, in float32 (fairseq `hubert.py` forward).
    """
    squares = jnp.where(valid[..., None], jnp.square(features.astype(jnp.float32)), 0.0)
    return Sum(jnp.sum(squares), jnp.sum(valid, dtype=jnp.float32) * features.shape[-1])


class Contrasted(NamedTuple):
    """`loss` in nats and whether the positive was picked (`correct`), both [rows, frames]; mean something at frames
    that have negatives."""

    loss: jax.Array
    correct: jax.Array


def contrast(
    context: jax.Array, targets: jax.Array, codes: jax.Array, negatives: jax.Array, *, temperature: float
) -> Contrasted:
    """InfoNCE: each frame's context against its own target and those of its negatives, by cosine / temperature.

    wav2vec 2.0 (2006.11477) equation 3. Negatives whose codes are the positive's are left out (fairseq sets their
    logits to -inf, `wav2vec2.py` compute_preds). The positive is picked if it is more similar than every negative that
    is left; where none is left (all frames have one code), nothing was told apart, and it does not count as picked.
    fairseq counts it then, and half of the ties, so that a collapsed codebook looks perfect there.

    Similarities are computed once a pair of frames and weighted by how often the pair was drawn: [rows, frames, frames]
    instead of the negatives' vectors [rows, frames, negatives, dim], 100 x dim / frames times as large; and their
    gradient needs no scattered addition of floats, whose order, hence rounding, changes from run to run on a GPU.

    Args:
        context, targets: [rows, frames, dim].
        codes: int [rows, frames, groups] of the targets.
        negatives: int [rows, frames, count], frames of the row; any other number stands for none.
        temperature: of the similarities.
    """
    frames = context.shape[1]
    similarity = jnp.einsum("rfd,rtd->rft", _unit_length(context), _unit_length(targets)) / temperature
    positive = jnp.diagonal(similarity, axis1=1, axis2=2)
    same = jnp.ones(similarity.shape, bool)
    for group in range(codes.shape[-1]):
        same &= codes[:, :, None, group] == codes[:, None, :, group]
    drawn = jnp.where(same, 0, _times_drawn(negatives, frames))
    counted = jnp.where(jnp.eye(frames, dtype=bool)[None], 1, drawn)
    weighted = similarity + jnp.log(jnp.maximum(counted, 1).astype(jnp.float32))
    loss = jax.nn.logsumexp(jnp.where(counted > 0, weighted, -jnp.inf), axis=-1) - positive
    best = jnp.max(jnp.where(drawn > 0, similarity, -jnp.inf), axis=-1)
    return Contrasted(loss, (positive > best) & jnp.any(drawn > 0, axis=-1))


def _times_drawn(negatives: jax.Array, frames: int) -> jax.Array:
    """[rows, frames, frames] int32: how often frame t is among the negatives [rows, frames, count] of frame f."""

    def one_frame(drawn):
        return jnp.zeros((frames,), jnp.int32).at[jnp.where(drawn < 0, frames, drawn)].add(1, mode="drop")

    return jax.vmap(jax.vmap(one_frame))(negatives)
