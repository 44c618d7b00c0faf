"""The contrastive objective against transformers' Wav2Vec2ForPreTraining: loss, and gradients of every parameter.

One model goes through the converters, so these hold too. Masks, negatives and Gumbel noise are injected.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.wavlab_jax import tiny
from wavlab_jax.convert import from_encoder, to_encoder
from wavlab_jax.convert import huggingface as folders
from wavlab_jax.convert.heads import head_parameters, stored_head
from wavlab_jax.encoder import formulation_for
from wavlab_jax.heads import ContrastiveHeadConfig
from wavlab_jax.masking import MaskConfig
from wavlab_jax.model import abstract_parameters, assemble, parameters
from wavlab_jax.objectives import ContrastiveConfig, Keys, contrastive, draw_masks, loss_of
from wavlab_jax.objectives.hiding import row_keys
from wavlab_jax.quantizer import gumbel_temperature

pytestmark = pytest.mark.torch

ROWS, NEGATIVES, STEP = 2, 5, 40_000
HEAD = ContrastiveHeadConfig(dim=10, codevector_dim=8, groups=2, codes=3)  # few codes: negatives equal the positive
CFG = ContrastiveConfig(
    mask=MaskConfig(probability=0.5, length=3),
    temperature=0.2,
    negatives=NEGATIVES,
    diversity_weight=0.3,
    feature_penalty_weight=0.0,
    feature_dropout=0.0,
)
ARCHITECTURE = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    conv_dim=[8, 8],
    conv_kernel=[16, 25],
    conv_stride=[16, 20],
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    conv_bias=True,
    do_stable_layer_norm=True,
    feat_extract_norm="layer",
    codevector_dim=HEAD.codevector_dim,
    proj_codevector_dim=HEAD.dim,
    num_codevector_groups=HEAD.groups,
    num_codevectors_per_group=HEAD.codes,
    num_negatives=NEGATIVES,
    contrastive_logits_temperature=CFG.temperature,
    diversity_loss_weight=CFG.diversity_weight,
    **dict.fromkeys(
        (
            *("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop"),
            *("feat_quantizer_dropout", "final_dropout", "mask_feature_prob"),
        ),
        0.0,
    ),
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Their model and ours with the same random parameters, and what both are asked."""
    folder = tmp_path_factory.mktemp("theirs")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    theirs = transformers.Wav2Vec2ForPreTraining(transformers.Wav2Vec2Config(**ARCHITECTURE))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape) + ("norm.weight" in name))
    theirs.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    checkpoint = folders.read(folder)
    like = abstract_parameters(checkpoint.encoder, HEAD)["head"]
    params = {"encoder": parameters(to_encoder(checkpoint)), "head": head_parameters(checkpoint, like=like)}
    batch = jax.tree.map(jnp.asarray, tiny.batch(ROWS))
    mask = draw_masks(batch, jax.random.key(3), CFG.mask)
    negatives = contrastive.draw_negatives(row_keys(jax.random.key(4), batch), mask, count=NEGATIVES)
    noise = jax.random.gumbel(jax.random.key(5), (*mask.shape, HEAD.groups, HEAD.codes))
    return theirs, checkpoint.encoder, params, batch, mask, negatives, noise


def ours(encoder, params, batch, mask, negatives, noise):
    """Sums, and the loss in nats a hidden frame with its gradient of every parameter."""

    def loss(params):
        sums = contrastive.measure(
            assemble(params, encoder, HEAD),
            batch,
            mask,
            keys=Keys(jax.random.key(0), None),
            step=jnp.asarray(STEP),
            cfg=CFG,
            head=HEAD,
            padded=False,
            formulation=formulation_for("cpu"),
            negatives=negatives,
            noise=noise,
        ).sums
        counts = contrastive.denominators(batch, mask, channels=8)
        return loss_of(sums, counts, contrastive.coefficients(CFG, HEAD)), sums

    (value, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return float(value), sums, gradient


def asked(theirs, batch, mask, negatives):
    """Their forward pass on what we were asked: their negatives count through all rows."""
    x = np.asarray(batch.waveform, np.float64)
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-7)
    frames = mask.shape[1]
    drawn = np.where(np.asarray(negatives) < frames, negatives, 0) + frames * np.arange(ROWS)[:, None, None]
    return theirs(
        torch.tensor(x, dtype=torch.float32),
        mask_time_indices=torch.tensor(np.asarray(mask)),
        sampled_negative_indices=torch.tensor(drawn),
    )


def test_value_and_gradient_of_every_parameter_in_training(pair, monkeypatch):
    theirs, encoder, params, batch, mask, negatives, noise = pair
    tau = float(gumbel_temperature(jnp.asarray(STEP), start=2.0, floor=0.5, decay=0.999995))
    assert tau == pytest.approx(2 * 0.999995**STEP, rel=1e-6)

    def gumbel_softmax(logits, tau, hard):
        noisy = logits + torch.tensor(np.asarray(noise)).reshape(logits.shape)
        soft = torch.softmax(noisy / tau, -1)
        one_hot = torch.nn.functional.one_hot(noisy.argmax(-1), HEAD.codes).to(soft)
        return one_hot + (soft - soft.detach())  # torch's own, without its rounding of the ones

    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", gumbel_softmax)
    theirs.train().set_gumbel_temperature(tau)
    theirs.zero_grad()
    output = asked(theirs, batch, mask, negatives)
    hidden = float(mask.sum())
    (output.loss / hidden).backward()

    value, sums, gradient = ours(encoder, params, batch, mask, negatives, noise)
    assert value == pytest.approx(output.loss.item() / hidden, rel=1e-5)
    assert float(sums["contrastive_loss"].total) == pytest.approx(output.contrastive_loss.item(), rel=1e-5)
    assert float(sums["diversity_loss"].total) == pytest.approx(output.diversity_loss.item(), rel=1e-5)
    assert float(sums["prob_perplexity"].total) / hidden == pytest.approx(output.codevector_perplexity.item(), rel=1e-5)

    model = assemble(gradient, encoder, HEAD)  # gradients in the place of parameters, so that the converters turn them
    found = from_encoder(model.encoder, head=stored_head(parameters(model.head)), model_type="wav2vec2")
    named = {f"wav2vec2.{name}": tensor for name, tensor in found.tensors.items()} | found.heads
    expected = dict(theirs.named_parameters())
    assert named.keys() == expected.keys()
    for name, parameter in expected.items():
        there = parameter.grad.numpy()
        assert name.endswith("k_proj.bias") or np.abs(there).max() > 1e-5, name  # keys' biases: softmax does not see it
        np.testing.assert_allclose(named[name].read(), there, atol=2e-5 * max(1.0, np.abs(there).max()), err_msg=name)


def test_value_in_evaluation(pair):
    """The most probable codes, and no gradient through their choice."""
    theirs, encoder, params, batch, mask, negatives, _ = pair
    with torch.no_grad():
        output = asked(theirs.eval(), batch, mask, negatives)
    _, sums, gradient = ours(encoder, params, batch, mask, negatives, None)
    assert float(sums["contrastive_loss"].total) == pytest.approx(output.contrastive_loss.item(), rel=1e-5)
    # there the perplexity of the hard choices
    hidden = float(mask.sum())
    assert float(sums["code_perplexity"].total) / hidden == pytest.approx(output.codevector_perplexity.item(), rel=1e-5)
    only_diversity = np.abs(gradient["head"]["quantizer"]["scores"]["kernel"]).max()
    assert 0 < only_diversity < np.abs(gradient["head"]["quantizer"]["codevectors"]).max()


def test_a_head_of_another_size_is_refused(pair, tmp_path):
    from wavlab_jax.convert import ConvertError

    _, encoder, params, *_ = pair
    checkpoint = from_encoder(
        assemble(params, encoder, HEAD).encoder, head=stored_head(params["head"]), model_type="wav2vec2"
    )
    other = abstract_parameters(encoder, dataclasses.replace(HEAD, codes=4))["head"]
    with pytest.raises(ConvertError, match=r"quantizer.codevectors \[1, 6, 4\], not \[1, 8, 4\]"):
        head_parameters(checkpoint, like=other)
