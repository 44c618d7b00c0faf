"""The quantizer's choices and their gradient, negatives, and the contrastive loss, against NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavlab_jax.losses import contrast
from wavlab_jax.objectives.contrastive import draw_negatives
from wavlab_jax.quantizer import choose, gumbel_noise, gumbel_temperature, perplexities, quantize


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_the_straight_through_gradient_is_the_soft_jacobian_times_the_cotangent_at_the_hard_choice():
    rng = np.random.default_rng(0)
    logits, noise = rng.normal(size=(2, 2, 5, 2, 7))
    vectors, tau = rng.normal(size=(2, 7, 3)), 0.7

    def use(quantized):  # nonlinear, so that its gradient depends on where it is taken
        return jnp.sum(jnp.sin(quantized.vectors) * jnp.arange(1.0, 7.0)[None, None])

    def ours(logits):
        return use(quantize(choose(logits, noise, temperature=tau), jnp.asarray(vectors)))

    found = jax.jit(jax.grad(ours))(jnp.asarray(logits, jnp.float32))
    hard = np.eye(7)[(logits + noise).argmax(-1)]
    at = np.einsum("rfgc,gcd->rfgd", hard, vectors)
    cotangent = np.einsum("rfgd,gcd->rfgc", np.cos(at) * np.arange(1.0, 7.0).reshape(2, 3), vectors)
    soft = softmax((logits + noise) / tau)
    jacobian = (np.einsum("...c,cd->...cd", soft, np.eye(7)) - soft[..., None] * soft[..., None, :]) / tau
    np.testing.assert_allclose(found, np.einsum("...cd,...c->...d", jacobian, cotangent), atol=1e-5)
    weights = np.asarray(choose(jnp.asarray(logits), noise, temperature=tau))
    np.testing.assert_array_equal(weights, hard)


def test_the_temperature_falls_as_published():
    for step in (0, 1, 100_000, 250_000, 1_000_000):
        found = float(gumbel_temperature(jnp.asarray(step), start=2.0, floor=0.5, decay=0.999995))
        assert found == pytest.approx(max(2 * 0.999995**step, 0.5), rel=1e-6)


def test_noise_is_gumbel_and_a_rows_own():
    keys = jax.random.split(jax.random.key(0), 4)
    noise = np.asarray(gumbel_noise(keys, frames=50, groups=2, codes=100))
    assert noise.mean() == pytest.approx(0.5772, abs=0.02) and noise.var() == pytest.approx(np.pi**2 / 6, abs=0.05)
    np.testing.assert_array_equal(noise[2:3], gumbel_noise(keys[2:3], frames=50, groups=2, codes=100))


def test_perplexities_against_their_definition():
    rng = np.random.default_rng(1)
    logits, counted = 3 * rng.normal(size=(3, 20, 2, 6)), rng.random((3, 20)) < 0.4
    found = perplexities(jnp.asarray(logits, jnp.float32), jnp.asarray(counted))

    def perplexity(probabilities):
        mean = probabilities[counted].mean(0)
        return np.exp(-(mean * np.log(mean + 1e-7)).sum(-1)).sum()

    assert float(found.prob) == pytest.approx(perplexity(softmax(logits)), rel=1e-5)
    assert float(found.code) == pytest.approx(perplexity(np.eye(6)[logits.argmax(-1)]), rel=1e-5)
    one = perplexities(jnp.zeros((1, 4, 2, 6)).at[..., 3].set(50.0), jnp.ones((1, 4), bool))
    assert float(one.code) == pytest.approx(2, rel=1e-5) and float(one.prob) == pytest.approx(2, rel=1e-5)


@given(st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=3), st.integers(0, 99))
def test_negatives_are_other_hidden_frames_of_the_row(hidden, seed):
    hidden = np.array((hidden * 3)[:3])
    keys = jax.random.split(jax.random.key(seed), 3)
    drawn = np.asarray(NEGATIVES(keys, hidden))
    for row, frame in np.ndindex(3, 12):
        others = set(np.flatnonzero(hidden[row])) - {frame}
        expected = others if hidden[row, frame] and others else {12}
        assert set(drawn[row, frame]) <= expected
    alone = NEGATIVES(keys[np.ones(3, int)], hidden[np.ones(3, int)])[0]
    np.testing.assert_array_equal(drawn[1], alone)  # whatever lies beside it


NEGATIVES = jax.jit(lambda keys, hidden: draw_negatives(keys, hidden, count=6))


def test_negatives_are_uniform():
    hidden = np.zeros((1, 9), bool)
    hidden[0, [1, 2, 5, 8]] = True
    drawn = np.asarray(draw_negatives(jax.random.split(jax.random.key(0), 1), jnp.asarray(hidden), count=6000))[0]
    for frame in (1, 2, 5, 8):
        counts = np.bincount(drawn[frame], minlength=9)
        others = sorted({1, 2, 5, 8} - {frame})
        assert counts.sum() == counts[others].sum() and (abs(counts[others] - 2000) < 200).all()


def test_the_contrastive_loss_against_brute_force():
    """Repeated negatives count as often as they were drawn, those with the positive's codes not at all."""
    rng = np.random.default_rng(2)
    rows, frames, count = 2, 7, 5
    context, targets = rng.normal(size=(2, rows, frames, 4))
    codes = rng.integers(0, 2, (rows, frames, 2))
    targets = np.where((codes == 0).all(-1)[..., None], targets[0, 0], targets)  # equal codes are equal vectors
    negatives = rng.integers(0, frames, (rows, frames, count))
    negatives[0, 0] = frames  # a frame without any
    found = jax.device_get(jax.jit(partial(contrast, temperature=0.3))(context, targets, codes, negatives))
    for row, frame in np.ndindex(rows, frames):
        c = context[row, frame]

        def score(t, c=c, row=row):
            x = targets[row, t]
            return c @ x / np.linalg.norm(c) / np.linalg.norm(x) / 0.3

        left = [t for t in negatives[row, frame] if t < frames and (codes[row, t] != codes[row, frame]).any()]
        scores = np.array([score(frame), *map(score, left)])
        assert float(found.loss[row, frame]) == pytest.approx(np.log(np.exp(scores - scores[0]).sum()), abs=1e-5)
        assert bool(found.correct[row, frame]) == (bool(left) and scores[0] > scores[1:].max())
