"""The cosine prediction against HuBERT's own formulation in NumPy and PyTorch, and sums that add."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wavlab_jax.heads import ContrastiveHeadConfig, HeadConfig, HeadError
from wavlab_jax.losses import cosine_logits, cross_entropy, feature_penalty
from wavlab_jax.objectives import ContrastiveConfig, ObjectiveError, PredictionConfig


def example(seed=0, batch=3, frames=17, dim=8, units=11):
    rng = np.random.default_rng(seed)
    projected = rng.normal(size=(batch, frames, dim)).astype(np.float32)
    embeddings = rng.uniform(size=(units, dim)).astype(np.float32)
    targets = rng.integers(0, units, (batch, frames)).astype(np.int32)
    scored = rng.random((batch, frames)) < 0.5
    return projected, embeddings, targets, scored


def test_against_brute_force():
    projected, embeddings, targets, scored = example()
    logits = cosine_logits(jnp.asarray(projected), jnp.asarray(embeddings), temperature=0.1)
    loss, correct = cross_entropy(logits, jnp.asarray(targets), jnp.asarray(scored))
    total, right, count = 0.0, 0, 0
    for b, f in zip(*np.nonzero(scored), strict=True):
        x = projected[b, f].astype(np.float64)
        cosines = [float(x @ e / np.linalg.norm(x) / np.linalg.norm(e)) / 0.1 for e in embeddings.astype(np.float64)]
        total += np.log(np.sum(np.exp(cosines))) - cosines[targets[b, f]]
        right += int(np.argmax(cosines) == targets[b, f])
        count += 1
    assert float(loss.total.sum()) == pytest.approx(total, rel=1e-5)
    assert [float(x.sum()) for x in (correct.total, loss.weight, correct.weight)] == [right, count, count]


@pytest.mark.torch
def test_value_and_gradient_against_fairseq_formulation():
    import torch

    projected, embeddings, targets, scored = example(seed=1)
    x = torch.tensor(projected[scored], requires_grad=True)
    classes = torch.tensor(embeddings, requires_grad=True)
    target = torch.tensor(targets[scored]).long()
    positive = classes[target]
    # fairseq `compute_nce`: target first, then all classes, the target's duplicate at -inf; the answer is always 0
    both = torch.cat([positive[None], classes[:, None].expand(-1, len(x), -1)], 0)
    logits = torch.cosine_similarity(x[None], both, dim=-1) / 0.1
    duplicate = (classes[:, None] == positive[None]).all(-1)
    logits[1:][duplicate] = float("-inf")
    theirs = torch.nn.functional.cross_entropy(logits.T, torch.zeros(len(x)).long(), reduction="sum")
    theirs.backward()

    def ours(projected, embeddings):
        return cross_entropy(cosine_logits(projected, embeddings, temperature=0.1), targets, scored)[0].total.sum()

    value, (to_projected, to_embeddings) = jax.value_and_grad(ours, (0, 1))(projected, embeddings)
    assert float(value) == pytest.approx(theirs.item(), rel=1e-5)
    np.testing.assert_allclose(np.asarray(to_projected)[scored], x.grad.numpy(), atol=2e-5)
    np.testing.assert_allclose(np.asarray(to_embeddings), classes.grad.numpy(), atol=2e-4)
    assert not np.asarray(to_projected)[~scored].any()


def test_terms_add_over_any_split_of_the_rows():
    projected, embeddings, targets, scored = example(seed=2, batch=4)
    logits = cosine_logits(jnp.asarray(projected), jnp.asarray(embeddings), temperature=0.1)
    whole = cross_entropy(logits, targets, scored)[0]
    parts = [cross_entropy(logits[i : i + 1], targets[i : i + 1], scored[i : i + 1])[0] for i in range(4)]
    np.testing.assert_allclose(whole.total, np.concatenate([p.total for p in parts]), rtol=1e-6)
    np.testing.assert_array_equal(whole.weight, np.concatenate([p.weight for p in parts]))


def test_labels_outside_the_scored_frames_do_not_matter():
    projected, embeddings, targets, scored = example(seed=3)
    logits = cosine_logits(jnp.asarray(projected), jnp.asarray(embeddings), temperature=0.1)
    other = np.where(scored, targets, -1)
    for a, b in zip(cross_entropy(logits, targets, scored), cross_entropy(logits, other, scored), strict=True):
        np.testing.assert_array_equal(a.total, b.total)


def test_the_feature_penalty_leaves_padding_out():
    features = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    valid = np.array([[True] * 5, [True] * 2 + [False] * 3])
    penalty = feature_penalty(jnp.asarray(features), jnp.asarray(valid))
    assert float(penalty.total / penalty.weight) == pytest.approx(np.mean(features[valid] ** 2), rel=1e-6)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (PredictionConfig, "temperature", 0.0),
        (PredictionConfig, "unmasked_weight", -1.0),
        (PredictionConfig, "masked_weight", np.nan),
        (ContrastiveConfig, "temperature", -0.1),
        (ContrastiveConfig, "negatives", 0),
        (ContrastiveConfig, "gumbel_decay", 1.5),
        (ContrastiveConfig, "feature_dropout", 1.0),
        (HeadConfig, "units", 0),
        (HeadConfig, "more_units", (5, 0)),
        (ContrastiveHeadConfig, "codevector_dim", 0),
    ],
)
def test_what_no_objective_can_mean_is_refused(config, field, value):
    with pytest.raises((ObjectiveError, HeadError), match=field):
        config(**{field: value})
