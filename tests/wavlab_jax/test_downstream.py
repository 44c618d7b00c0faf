"""ML-SUPERB's downstream model against ESPnet's own classes, with the same weights and padding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from espnet2.asr.encoder.transformer_encoder import TransformerEncoder
from espnet2.layers.mask_along_axis import mask_along_axis
from espnet2.layers.utterance_mvn import UtteranceMVN
from flax import nnx

from tests.wavlab_jax.torchaudio_peer import randomised
from wavlab_jax import downstream
from wavlab_jax.downstream import Downstream, DownstreamConfig, DownstreamError, SpecAugmentConfig

pytestmark = pytest.mark.torch

CFG = DownstreamConfig(tokens=11, projection=20, channels=20, width=16, heads=4, feed_forward=24)
HIDDEN, INPUTS, FRAMES = 4, 6, (33, 21, 8)


class Peer(torch.nn.Module):
    """ESPnet's order: weighted sum, mean, Linear, encoder, CTC's Linear (`espnet_model.py` encode, `ctc.py`)."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(HIDDEN))
        self.normalize = UtteranceMVN()
        self.linear_out = torch.nn.Linear(INPUTS, CFG.channels)
        self.encoder = TransformerEncoder(
            input_size=CFG.channels,
            output_size=CFG.width,
            attention_heads=CFG.heads,
            linear_units=CFG.feed_forward,
            num_blocks=CFG.layers,
            dropout_rate=0.1,
            positional_dropout_rate=0.1,
            attention_dropout_rate=0.1,
            input_layer="conv2d2",
            normalize_before=True,
        )
        self.ctc_lo = torch.nn.Linear(CFG.width, CFG.tokens)

    def forward(self, hidden, frames):
        shares = torch.softmax(self.weights, dim=-1)
        feats = (shares[:, None, None, None] * torch.stack(hidden)).sum(0)
        feats, frames = self.normalize(feats.clone(), frames)
        encoded, left, _ = self.encoder(self.linear_out(feats), frames)
        return self.ctc_lo(encoded), left


def taken_over(peer: Peer) -> Downstream:
    """Our model with the peer's weights."""
    model = Downstream(jax.random.key(0), CFG, hidden=HIDDEN, inputs=INPUTS)
    theirs = {name: value.detach().numpy() for name, value in peer.state_dict().items()}

    def dense(name):
        return {"kernel": theirs[f"{name}.weight"].T, "bias": theirs[f"{name}.bias"]}

    def norm(name):
        return {"scale": theirs[f"{name}.weight"], "bias": theirs[f"{name}.bias"]}

    def block(number):
        prefix = f"encoder.encoders.{number}"
        attention = {"query": "linear_q", "key": "linear_k", "value": "linear_v", "output": "linear_out"}
        return {
            **{ours: dense(f"{prefix}.self_attn.{name}") for ours, name in attention.items()},
            "expand": dense(f"{prefix}.feed_forward.w_1"),
            "contract": dense(f"{prefix}.feed_forward.w_2"),
            "attention_norm": norm(f"{prefix}.norm1"),
            "feed_forward_norm": norm(f"{prefix}.norm2"),
        }

    params = {
        "layer_weights": theirs["weights"],
        "projection": dense("linear_out"),
        "convolutions": {
            ours: {
                "kernel": theirs[f"encoder.embed.conv.{number}.weight"].transpose(2, 3, 1, 0),
                "bias": theirs[f"encoder.embed.conv.{number}.bias"],
            }
            for ours, number in ((0, 0), (1, 2))
        },
        "embed": dense("encoder.embed.out.0"),
        "blocks": jax.tree.map(lambda *each: np.stack(each), *(block(number) for number in range(CFG.layers))),
        "norm": norm("encoder.after_norm"),
        "output": dense("ctc_lo"),
    }
    graph, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    peer = randomised(Peer())
    return peer, taken_over(peer)


def hidden_states(seed=0):
    rng = np.random.default_rng(seed)
    real = np.arange(max(FRAMES))[None] < np.array(FRAMES)[:, None]
    return [(rng.normal(size=(3, max(FRAMES), INPUTS)) * real[..., None]).astype(np.float32) for _ in range(HIDDEN)]


@partial(jax.jit, static_argnames="by_tap")
def run(model, hidden, frames=FRAMES, key=None, seeds=None, by_tap=False):
    features = downstream.weighted_sum(tuple(hidden), model.layer_weights[...])
    return downstream.logits_of(
        model, features, jnp.asarray(frames), cfg=CFG, key=key, seeds=seeds, convolution_by_tap=by_tap
    )


@pytest.mark.parametrize("by_tap", [False, True])
def test_logits_are_espnets_padding_and_all(pair, by_tap):
    """Real frames, the last ones of short rows included, which hear the padding there as here."""
    peer, model = pair
    hidden = hidden_states()
    with torch.no_grad():
        theirs, left = peer([torch.tensor(h) for h in hidden], torch.tensor(FRAMES))
    ours, frames = run(model, hidden, by_tap=by_tap)
    assert frames.tolist() == left.tolist() == [14, 11, 4]
    for row, count in enumerate(frames.tolist()):
        np.testing.assert_allclose(ours[row, :count], theirs[row, :count], atol=2e-5)


def test_more_padding_than_the_batch_needs_changes_nothing(pair):
    """Static shapes: rows padded beyond the longest one of their batch."""
    _, model = pair
    hidden = hidden_states()
    wider = [np.pad(h, ((0, 0), (0, 13), (0, 0)), constant_values=7.0) for h in hidden]
    ours, frames = run(model, hidden)
    wide, wide_frames = run(model, wider)
    assert frames.tolist() == wide_frames.tolist()
    for row, count in enumerate(frames.tolist()):
        np.testing.assert_allclose(wide[row, :count], ours[row, :count], atol=1e-5)


@pytest.mark.parametrize("by_tap", [False, True])
def test_gradients_are_espnets(pair, by_tap):
    """Of the CTC loss with respect to the layer weights and a convolution, through everything."""
    peer, model = pair
    hidden, labels, lengths = hidden_states(), np.array([[3, 3, 5, 0], [2, 0, 0, 0], [4, 4, 4, 0]]), np.array([3, 1, 3])
    logits, left = peer([torch.tensor(h) for h in hidden], torch.tensor(FRAMES))
    wanted = torch.nn.functional.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1),
        torch.tensor(labels),
        left,
        torch.tensor(lengths),
        reduction="none",
        zero_infinity=True,
    )
    peer.zero_grad()
    (wanted.sum() / 3).backward()
    graph, state = nnx.split(model)

    def loss(state):
        ours, frames = run(nnx.merge(graph, state), hidden, by_tap=by_tap)
        total, weight = downstream.ctc(ours, frames, jnp.asarray(labels), jnp.asarray(lengths))["ctc_loss"]
        return total.sum() / weight.sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(state)
    assert value == pytest.approx(wanted.mean().item(), rel=1e-5)
    gradient = nnx.to_pure_dict(gradient)
    np.testing.assert_allclose(gradient["layer_weights"], peer.weights.grad, atol=2e-5)
    theirs = peer.encoder.embed.conv[0].weight.grad.numpy().transpose(2, 3, 1, 0)
    np.testing.assert_allclose(gradient["convolutions"][0]["kernel"], theirs, atol=1e-4 * np.abs(theirs).max())


def test_labels_that_do_not_fit_weigh_nothing_and_are_counted():
    """Four frames hold no "aaa", which needs five; the third row is a filler."""
    logits = jnp.zeros((3, 4, 5))
    labels, lengths = jnp.asarray([[1, 1, 1], [1, 2, 0], [0, 0, 0]]), jnp.asarray([3, 2, 0])
    frames = jnp.asarray([4, 4, 0])
    sums = jax.jit(downstream.ctc)(logits, frames, labels, lengths)
    alone = torch.nn.functional.ctc_loss(
        torch.zeros(4, 1, 5).log_softmax(-1), torch.tensor([[1, 2]]), [4], [2], reduction="sum"
    )
    assert float(sums["ctc_loss"].total.sum()) == pytest.approx(alone.item(), rel=1e-5)
    assert sums["infeasible"].total.tolist() == [1.0, 0.0, 0.0]
    assert sums["infeasible"].weight.tolist() == sums["ctc_loss"].weight.tolist() == [1.0, 1.0, 0.0]

    def loss(x):
        return downstream.ctc(x, frames, labels, lengths)["ctc_loss"].total.sum()

    gradient = jax.jit(jax.grad(loss))(logits)
    assert np.isfinite(gradient).all() and not gradient[0].any() and gradient[1].any() and not gradient[2].any()


def test_greedy_takes_out_repeats_and_then_blanks():
    best = np.array([[0, 3, 3, 0, 3, 2, 2, 1], [4, 4, 0, 0, 0, 0, 1, 1]])
    assert downstream.greedy(best, np.array([7, 6])) == [[3, 3, 2], [4]]


@pytest.mark.parametrize(("frames", "center", "moved"), [(40, 12, 9), (40, 20, 25), (31, 5, 3)])
def test_warping_is_pytorchs_bicubic(frames, center, moved):
    x = np.random.default_rng(0).normal(size=(44, 3)).astype(np.float32)
    row = torch.tensor(x[None, None, :frames])
    wanted = [
        torch.nn.functional.interpolate(part, (size, 3), mode="bicubic", align_corners=False)[0, 0]
        for part, size in ((row[:, :, :center], moved), (row[:, :, center:], frames - moved))
    ]
    warped = jax.jit(downstream.warped_at)(
        jnp.asarray(x), jnp.asarray(frames), center=jnp.asarray(center), moved=jnp.asarray(moved)
    )
    np.testing.assert_allclose(warped[:frames], np.concatenate(wanted), atol=2e-5)
    np.testing.assert_array_equal(warped[frames:], x[frames:])


def test_masks_are_distributed_as_espnets():
    """The share that is masked, and by place, over 4,000 rows of one length: theirs within three standard errors."""
    size, width, count, rows = 50, 9, 3, 4000
    keys = jax.random.split(jax.random.key(0), rows)
    ours = jax.vmap(lambda key: downstream.spans(key, size, jnp.asarray(size), jnp.asarray(width), count))(keys)
    torch.manual_seed(0)
    theirs = torch.cat(
        [mask_along_axis(torch.ones(1, size, 1), None, (0, width), dim=1, num_mask=count)[0] == 0 for _ in range(rows)]
    )[..., 0].numpy()
    error = 3 * np.sqrt(2 * 0.25 / rows)
    np.testing.assert_allclose(np.mean(ours, axis=0), theirs.mean(axis=0), atol=error)
    spread = [np.asarray(each).sum(axis=1).std() for each in (ours, theirs)]
    assert spread[0] == pytest.approx(spread[1], rel=0.05)


def test_training_draws_by_row(pair):
    """Augmentation and dropout of a row depend on its seed and the step's key, not on its neighbours."""
    _, model = pair
    hidden = hidden_states()
    key, seeds = jax.random.key(1), jnp.arange(3, dtype=jnp.uint32)
    all_rows, frames = run(model, hidden, key=key, seeds=seeds)
    first, _ = run(model, [h[:1] for h in hidden], frames=FRAMES[:1], key=key, seeds=seeds[:1])
    np.testing.assert_allclose(first[0, : frames[0]], all_rows[0, : frames[0]], atol=1e-5)
    other, _ = run(model, hidden, key=key, seeds=seeds + 1)
    assert np.abs(other - all_rows).max() > 0.1


def test_short_rows_are_not_warped():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32))
    warped = jax.jit(lambda frames: downstream.warp(x, frames, key=jax.random.key(0), window=5))(10)
    np.testing.assert_array_equal(warped, x)
    assert SpecAugmentConfig() == SpecAugmentConfig(5, 2, 27, 10, 0.05)


def test_configurations_that_cannot_be():
    with pytest.raises(DownstreamError, match="tokens is 2"):
        DownstreamConfig(tokens=2)
    with pytest.raises(DownstreamError, match="30 channels need a projection"):
        Downstream(jax.random.key(0), DownstreamConfig(tokens=9, projection=0), hidden=1, inputs=30)
