"""Prediction of several sets of units against PyTorch: every projection and both ways of scoring."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tests.wavlab_jax import tiny
from wavlab_jax.heads import HeadConfig, HeadError, make_head
from wavlab_jax.model import parameters
from wavlab_jax.objectives import PredictionConfig, loss_of, prediction

CFG = PredictionConfig(temperature=0.2, masked_weight=1.0, unmasked_weight=0.5, feature_penalty_weight=3.0)


@pytest.mark.torch
@pytest.mark.parametrize("scoring", ["cosine", "linear"])
@pytest.mark.parametrize("split", [False, True])
def test_value_and_gradient_against_pytorch(split, scoring):
    import torch

    head = HeadConfig(units=11, dim=6, more_units=(5,), split_projection=split, scoring=scoring)
    rng = np.random.default_rng(0)
    units = sum(head.unit_sets)
    kernel = rng.normal(size=(16, 12 if split else 6))
    params = {"kernel": kernel, "bias": rng.normal(size=kernel.shape[1]), "embeddings": rng.normal(size=(units, 6))}
    if scoring == "linear":
        params["unit_bias"] = rng.normal(size=units)
    params = {name: array.astype(np.float32) for name, array in params.items()}
    shapes = jax.eval_shape(lambda: parameters(make_head(jax.random.key(0), head, encoder=tiny.encoder())))
    assert shapes["projection"]["kernel"].shape == kernel.shape and shapes["embeddings"].shape == (units, 6)
    assert ("bias" in shapes) == (scoring == "linear")
    batch = tiny.batch(3, samples=4_000)
    units = np.stack([rng.integers(-1, n, batch.valid.shape) for n in head.unit_sets], axis=-1).astype(np.int32)
    batch, mask = batch._replace(units=units), rng.random(batch.valid.shape) < 0.5
    hidden = rng.normal(size=(*mask.shape, 16)).astype(np.float32)
    features = rng.normal(size=(*mask.shape, 8)).astype(np.float32)

    def ours(params, hidden, features):
        module = SimpleNamespace(
            projection=lambda x: x @ params["kernel"] + params["bias"][None, None],
            embeddings=params["embeddings"],
            bias=params.get("unit_bias"),
        )
        logits = prediction.set_logits(module, hidden, cfg=CFG, head=head)
        sums = prediction.measure_prediction(prediction.Prediction(logits, features, None), batch, mask).sums
        counts = prediction.denominators(batch, mask, channels=8)
        return loss_of(sums, counts, prediction.coefficients(CFG, head)), sums

    compiled = jax.jit(jax.value_and_grad(ours, (0, 1, 2), has_aux=True))
    (value, sums), gradients = compiled(params, hidden, features)

    p = {name: torch.tensor(np.asarray(array), requires_grad=True) for name, array in params.items()}
    x, f = torch.tensor(hidden, requires_grad=True), torch.tensor(features, requires_grad=True)
    projected = x @ p["kernel"] + p["bias"]
    loss, first = 3.0 * (f**2).mean(), 0
    for number, classes in enumerate(head.unit_sets):
        # fairseq `hubert.py` forward: chunks of the projection, or the same for every set
        own = projected.chunk(2, dim=-1)[number] if split else projected
        vectors = p["embeddings"][first : first + classes]
        if scoring == "cosine":
            logits = torch.cosine_similarity(own[:, :, None], vectors[None, None], dim=-1) / 0.2
        else:
            logits = (torch.nn.functional.linear(own, vectors, p["unit_bias"][first : first + classes])) / 0.2
        first += classes
        label = torch.tensor(units[..., number]).long()
        for weight, chosen in ((1.0, mask), (0.5, ~mask)):
            chosen = torch.tensor(chosen) & (label >= 0)
            loss = loss + weight * torch.nn.functional.cross_entropy(logits[chosen], label[chosen])
            name = f"{'masked' if weight == 1.0 else 'unmasked'}_accuracy{'_1' if number else ''}"
            assert float(sums[name].total) == (logits[chosen].argmax(-1) == label[chosen]).sum().item()
            assert float(sums[name].weight) == chosen.sum().item()
    loss.backward()
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    for name, tensor in p.items():
        np.testing.assert_allclose(gradients[0][name], tensor.grad.numpy(), rtol=1e-5, atol=2e-6, err_msg=name)
    np.testing.assert_allclose(gradients[1], x.grad.numpy(), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(gradients[2], f.grad.numpy(), rtol=1e-5, atol=2e-6)


def test_a_model_is_described_with_its_head_and_old_descriptions_are_read(tmp_path):
    import json

    from wavlab_jax.heads import ContrastiveHeadConfig
    from wavlab_jax.model import read_description, write_description

    for head in (HeadConfig(more_units=(3,), scoring="linear"), ContrastiveHeadConfig(dim=12)):
        write_description(tmp_path / "model.json", tiny.encoder(), head)
        assert tuple(read_description(tmp_path / "model.json")) == (tiny.encoder(), head)
    old = json.loads((tmp_path / "model.json").read_text()) | {"head": {"units": 7, "dim": 4}}
    (tmp_path / "model.json").write_text(json.dumps(old))
    assert read_description(tmp_path / "model.json").head == HeadConfig(units=7, dim=4)


def test_an_objective_and_a_head_that_do_not_belong_together_are_refused():
    import dataclasses

    from wavlab_jax.objectives import ContrastiveConfig

    with pytest.raises(HeadError, match="ContrastiveConfig trains a ContrastiveHeadConfig"):
        dataclasses.replace(tiny.learner(), objective=ContrastiveConfig())
