"""Fine-tuning's loss and its gradients, of every parameter, against `HubertForCTC` and `WavLMForCTC`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from data_pipelines.batch import NO_UNIT
from tests.wavlab_jax import tiny
from wavlab_jax.convert import from_encoder
from wavlab_jax.convert import huggingface as folders
from wavlab_jax.convert.names import flatten, tensors
from wavlab_jax.encoder import formulation_for
from wavlab_jax.heads import LinearHeadConfig
from wavlab_jax.model import assemble, parameters
from wavlab_jax.objectives import Keys, RecognitionConfig, loss_of, recognition

pytestmark = pytest.mark.torch

TOKENS = 7
LENGTHS = (8_000, 5_280)  # samples of the rows; the second one is padded
LABELS = ([3, 1, 4, 4, 5], [2, 6])


def padded_batch():
    """Two rows, the second of them padded, with tokens."""
    batch = tiny.batch(rows=2, samples=LENGTHS[0])
    units = np.full(batch.units.shape, NO_UNIT, np.int32)
    for row, (length, labels) in enumerate(zip(LENGTHS, LABELS, strict=True)):
        batch.waveform[row, length:] = 0.0
        batch.valid[row, (length - 400) // 320 + 1 :] = False
        units[row, : len(labels), 0] = labels
    return batch._replace(units=units, samples=np.array(LENGTHS, np.int32))


@pytest.mark.parametrize("kind", ["HubertForCTC", "WavLMForCTC"])
def test_loss_and_gradients_are_those_of_transformers(kind, tmp_path):
    cfg = tiny.encoder(extractor_norm="layer", pre_norm=True, relative_bias=kind == "WavLMForCTC")
    encoder, head, rng = tiny.randomised(cfg), LinearHeadConfig(TOKENS), np.random.default_rng(1)
    output = {"kernel": rng.normal(size=(16, TOKENS)).astype(np.float32), "bias": rng.normal(size=TOKENS)}
    params = {"encoder": parameters(encoder), "head": {"output": jax.tree.map(jnp.float32, output)}}
    batch = padded_batch()

    heads = {"lm_head.weight": output["kernel"].T, "lm_head.bias": output["bias"].astype(np.float32)}
    folders.write(from_encoder(encoder, head=heads), tmp_path / "out")
    settings = dict(ctc_loss_reduction="sum", pad_token_id=0, attn_implementation="eager")
    model = transformers.AutoModelForCTC.from_pretrained(tmp_path / "out", **settings).eval()
    assert type(model).__name__ == kind
    attended = torch.arange(LENGTHS[0])[None] < torch.tensor(LENGTHS)[:, None]
    labels = torch.full((2, 5), -100)
    for row, each in enumerate(LABELS):
        labels[row, : len(each)] = torch.tensor(each)
    wanted = model(torch.tensor(batch.waveform), attention_mask=attended.long(), labels=labels).loss / 2
    wanted.backward()

    def loss(params):
        measured = recognition.measure(
            assemble(params, cfg, head),
            batch,
            jnp.zeros(batch.valid.shape, bool),
            keys=Keys(jax.random.key(0), None),
            step=jnp.zeros((), jnp.int32),
            cfg=RecognitionConfig(),
            head=head,
            padded=True,
            formulation=formulation_for("cpu"),
        )
        counts = recognition.denominators(batch, None, channels=8)
        return loss_of(measured.sums, counts, recognition.coefficients(RecognitionConfig(), head))

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert float(value) == pytest.approx(wanted.item(), rel=1e-5)
    theirs = {name.partition(".")[2]: p.grad for name, p in model.named_parameters() if not name.startswith("lm_head")}
    flat = flatten(gradient["encoder"])
    for tensor in tensors(flat):
        if tensor.key == "masked_spec_embed":
            continue  # nothing is hidden: no gradient there, zeros here
        ours = np.asarray(flat[tensor.path] if tensor.layer is None else flat[tensor.path][tensor.layer])
        found, peer = tensor.turn.to_torch(ours), theirs[tensor.key].numpy()
        np.testing.assert_allclose(found, peer, rtol=2e-3, atol=2e-4 * np.abs(peer).max() + 1e-5, err_msg=tensor.key)
    np.testing.assert_allclose(gradient["head"]["output"]["kernel"].T, model.lm_head.weight.grad, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(gradient["head"]["output"]["bias"], model.lm_head.bias.grad, rtol=1e-3, atol=1e-4)
