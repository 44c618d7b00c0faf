"""Schedules and the optimizer against their published formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from wavlab_jax.optim import OptimizerConfig, OptimizerError, learning_rate, make_optimizer


def test_linear_schedule_is_fairseq_polynomial_decay():
    cfg = OptimizerConfig(peak_learning_rate=5e-4, warmup_steps=100, total_steps=1000)
    schedule = learning_rate(cfg)
    for update in (1, 2, 50, 99, 100, 101, 500, 999, 1000):
        # fairseq's step_update(number of updates made) in a run of one more, whose first update has rate 0
        expected = 5e-4 * update / 100 if update <= 100 else 5e-4 * (1 - (update - 100) / (1001 - 100))
        assert float(schedule(update - 1)) == pytest.approx(expected, rel=1e-4)


def test_inverse_square_root_is_espnet_warmuplr():
    cfg = OptimizerConfig(peak_learning_rate=5e-4, warmup_steps=100, schedule="inverse_sqrt")
    schedule = learning_rate(cfg)
    for step in (1, 10, 99, 100, 101, 400, 10_000):
        expected = 5e-4 * 100**0.5 * min(step**-0.5, step * 100**-1.5)
        assert float(schedule(step - 1)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_updates_are_adam_with_decoupled_decay_after_clipping(clip):
    cfg = OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=1, schedule="constant", clip_norm=clip)
    optimizer = make_optimizer(cfg)
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, 3)), "b": rng.normal(size=3)}
    ours = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    state = optimizer.init(ours)
    first = {k: np.zeros_like(v) for k, v in params.items()}
    second = {k: np.zeros_like(v) for k, v in params.items()}
    for step in range(1, 6):
        grads = {k: rng.normal(size=v.shape) for k, v in params.items()}
        updates, state = optimizer.update({k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}, state, ours)
        ours = {k: ours[k] + updates[k] for k in ours}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        scale = min(1.0, clip / norm) if clip else 1.0
        for k, g in grads.items():
            first[k] = 0.9 * first[k] + 0.1 * g * scale
            second[k] = 0.98 * second[k] + 0.02 * (g * scale) ** 2
            direction = (first[k] / (1 - 0.9**step)) / (np.sqrt(second[k] / (1 - 0.98**step)) + 1e-6)
            params[k] = params[k] - 1e-2 * (direction + 0.01 * params[k])
    for k in params:
        np.testing.assert_allclose(np.asarray(ours[k]), params[k], rtol=2e-5, atol=2e-6)


def test_epsilon_is_added_to_corrected_moments():
    """And so as much as the docstring says away from fairseq's plain Adam (`fairseq/optim/adam.py`)."""
    cfg = OptimizerConfig(peak_learning_rate=1.0, warmup_steps=1, schedule="constant", clip_norm=0.0, weight_decay=0.0)
    optimizer = make_optimizer(cfg)
    gradient = 1e-6  # of the size of epsilon: for larger ones it does not matter
    state, first, second = optimizer.init(jnp.zeros(())), 0.0, 0.0
    for update in range(1, 201):
        step, state = optimizer.update(jnp.float32(gradient), state, jnp.zeros(()))
        first, second = 0.9 * first + 0.1 * gradient, 0.98 * second + 0.02 * gradient**2
        correction1, correction2 = 1 - 0.9**update, 1 - 0.98**update
        plain = np.sqrt(correction2) / correction1 * first / (np.sqrt(second) + 1e-6)
        by_docstring = first / correction1 / (np.sqrt(second / correction2) + 1e-6 / np.sqrt(correction2))
        assert plain == pytest.approx(by_docstring, rel=1e-9)
        if update in (1, 200):
            assert float(-step) == pytest.approx(0.5, rel=1e-3)
            assert plain == pytest.approx({1: 1 / (1 + 1 / np.sqrt(0.02)), 200: 0.4978}[update], rel=1e-3)


def test_a_linear_schedule_that_ends_in_its_warm_up_is_refused():
    with pytest.raises(OptimizerError, match="total_steps"):
        OptimizerConfig(warmup_steps=100, total_steps=100)


@pytest.mark.parametrize(
    ("field", "value"),
    [("peak_learning_rate", -1.0), ("peak_learning_rate", np.nan), ("warmup_steps", -1), ("beta2", 1.0),
     ("weight_decay", -0.1), ("clip_norm", -1.0), ("epsilon", np.inf)],
)  # fmt: skip
def test_what_adam_cannot_have_is_refused(field, value):
    with pytest.raises(OptimizerError, match=f"{field} is {value}; it must"):
        OptimizerConfig(**{field: value})


@pytest.mark.torch
def test_accumulated_updates_are_pytorchs_adam():
    """ESPnet's order (`espnet2/train/trainer.py`): the mean of the gradients, clipping, weight decay added, Adam."""
    import torch

    cfg = OptimizerConfig(
        peak_learning_rate=1e-2, warmup_steps=0, schedule="constant", beta2=0.999, epsilon=1e-8, weight_decay=0.1,
        decoupled_decay=False, clip_norm=0.5, accumulate=3,
    )  # fmt: skip
    optimizer, rng = make_optimizer(cfg), np.random.default_rng(0)
    start = rng.normal(size=(4, 3)).astype(np.float32)
    ours, theirs = jnp.asarray(start), torch.nn.Parameter(torch.tensor(start))
    state, peer = optimizer.init(ours), torch.optim.Adam([theirs], lr=1e-2, weight_decay=0.1)
    for step in range(1, 7):
        gradient = rng.normal(size=start.shape).astype(np.float32)
        updates, state = optimizer.update(jnp.asarray(gradient), state, ours)
        ours = ours + updates
        ((theirs * torch.tensor(gradient)).sum() / 3).backward()
        if step % 3 == 0:
            torch.nn.utils.clip_grad_norm_([theirs], 0.5)
            peer.step()
            peer.zero_grad()
        np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
