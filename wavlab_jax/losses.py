"""What a prediction costs. Every function returns sums and weights, never means; all arithmetic is float32."""

import jax
import jax.numpy as jnp

from wavlab_jax.metrics import Sum


def cosine_logits(projected: jax.Array, embeddings: jax.Array, *, temperature: float) -> jax.Array:
    """[batch, frames, dim] and [units, dim] -> [batch, frames, units]: cosine similarity / temperature.

    HuBERT equation 3 (2106.07447). fairseq's `compute_nce` puts the target first among all classes and removes its
    duplicate: that is this softmax over the classes. eps 1e-8 as in torch.cosine_similarity.
    """

    def unit_length(x):
        x = x.astype(jnp.float32)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-8)

    return jnp.einsum("bfd,ud->bfu", unit_length(projected), unit_length(embeddings)) / temperature


def cross_entropy(logits: jax.Array, targets: jax.Array, scored: jax.Array) -> tuple[Sum, Sum]:
    """Cross-entropy in nats and number correct over scored frames, each with the number of scored frames.

    Args:
        logits: [batch, frames, units] float32.
        targets: [batch, frames] int; values outside [0, units) only where not scored.
        scored: [batch, frames] bool.
    """
    weight = jnp.sum(scored, dtype=jnp.float32)
    safe = jnp.where(scored, targets, 0)
    log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), safe[..., None], axis=-1)[..., 0]
    correct = jnp.argmax(logits, axis=-1) == targets
    return (
        Sum(-jnp.sum(jnp.where(scored, log_likelihood, 0.0)), weight),
        Sum(jnp.sum(scored & correct, dtype=jnp.float32), weight),
    )


def feature_penalty(features: jax.Array, valid: jax.Array) -> Sum:
    """Sum of squares of the extractor's output [batch, frames, channels] over real frames, and their number.

    HuBERT's features_pen: mean(features ** 2) before LayerNorm, in float32 (fairseq `hubert.py` forward).
    """
    squares = jnp.where(valid[..., None], jnp.square(features.astype(jnp.float32)), 0.0)
    return Sum(jnp.sum(squares), jnp.sum(valid, dtype=jnp.float32) * features.shape[-1])
