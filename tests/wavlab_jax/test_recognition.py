"""Recognisers through the step: a frozen encoder, a trained one, none; devices, accumulation, and rows on their own."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from data_pipelines.batch import NO_UNIT, num_frames
from tests.wavlab_jax import tiny
from wavlab_jax.downstream import DownstreamConfig, SpecAugmentConfig, greedy
from wavlab_jax.encoder import make_encoder
from wavlab_jax.heads import HeadError, LinearHeadConfig
from wavlab_jax.masking import MaskConfig
from wavlab_jax.model import parameters, read_description, write_description
from wavlab_jax.objectives import RecognitionConfig, recognition
from wavlab_jax.optim import OptimizerConfig
from wavlab_jax.sharding import MeshConfig, make_mesh, parameter_shardings, place_batch
from wavlab_jax.skipped import NonFinite, Skips
from wavlab_jax.step import (
    LearnerConfig,
    abstract_state,
    initial_state,
    make_predict_step,
    make_train_step,
    make_validation_step,
)
from wavlab_jax.window import Window

TOKENS = 9
HEAD = DownstreamConfig(
    tokens=TOKENS, projection=20, channels=20, width=16, layers=1, heads=2, feed_forward=24,
    augment=SpecAugmentConfig(time_masks=2),
)  # fmt: skip
OPTIMIZER = OptimizerConfig(
    peak_learning_rate=1e-2, warmup_steps=0, schedule="constant", weight_decay=1e-6, decoupled_decay=False, clip_norm=5,
    accumulate=2,
)  # fmt: skip


def learner(**changes) -> LearnerConfig:
    fields = dict(
        encoder=tiny.encoder(layers=1, dropout=0.1),
        head=HEAD,
        objective=RecognitionConfig(),
        optimizer=OPTIMIZER,
        frozen_encoder=True,
    )
    return LearnerConfig(**{**fields, **changes})


def batch(rows=4, samples=16_000, seed=0):
    """Rows of several lengths, and a filler at the end."""
    rng = np.random.default_rng(seed)
    real = np.array([samples, samples - 3_000, samples // 2, 0], np.int32)[:rows]
    made = tiny.batch(rows, samples, seed)
    units = np.full_like(made.units, NO_UNIT)
    units[: rows - 1, :3, 0] = rng.integers(1, TOKENS, (rows - 1, 3))
    valid = np.arange(made.valid.shape[1])[None] < num_frames(real)[:, None]
    return made._replace(samples=real, valid=valid, units=units, language=np.arange(rows, dtype=np.int32) % 3)


def encoder_parameters(cfg, mesh):
    params = {"encoder": parameters(make_encoder(jax.random.key(7), cfg.encoder))}
    return jax.device_put(params, parameter_shardings(params, mesh))["encoder"]


def run(cfg, *, devices=1, fsdp=1, updates=2, same=False):
    """States after each step, and the results."""
    mesh = make_mesh(MeshConfig(fsdp=fsdp), devices=jax.devices()[:devices])
    frozen = encoder_parameters(cfg, mesh) if cfg.frozen_encoder else None
    state, step = initial_state(cfg, mesh), make_train_step(cfg, mesh, encoder=frozen, languages=3)
    states, results = [jax.device_get(state)], []
    for k in range(updates):
        state, result = step(state, place_batch(batch(seed=0 if same else k), mesh=mesh, passes=1))
        states.append(jax.device_get(state))
        results.append(jax.device_get(result))
    return states, results


@pytest.fixture(scope="module")
def frozen():
    return run(learner())


def test_a_frozen_encoder_is_no_part_of_the_state_and_updates_come_in_twos(frozen):
    states, results = frozen
    assert set(states[0].params) == {"head"}
    leaves = [jax.tree.leaves(state.params) for state in states]
    assert all(map(np.array_equal, leaves[0], leaves[1])) and not any(map(np.array_equal, leaves[1], leaves[2]))
    assert [int(state.step) for state in states] == [0, 1, 2]
    assert results[0].sums["ctc_loss"].weight == 3  # the filler is no row
    line = Window().plus(results[0]).plus(results[1]).line(["a", "b", "c"])
    assert line["ctc_loss"] > 0 and line["infeasible"] == 0 and set(line["languages"]) == {"a", "b", "c"}
    assert line["update_to_weight"] > 0 and set(line["modules"]) == {"head"}


@pytest.mark.once
def test_devices_do_not_change_the_update(frozen):
    """Dropout and SpecAugment included, the encoder and the head in pieces."""
    states, results = frozen
    others, found = run(learner(), devices=4, fsdp=2)
    for mine, theirs in zip(results, found, strict=True):
        assert float(theirs.loss) == pytest.approx(float(mine.loss), rel=1e-5)
        assert float(theirs.gradient_norm) == pytest.approx(float(mine.gradient_norm), rel=1e-4)
    for mine, theirs in zip(jax.tree.leaves(states[-1].params), jax.tree.leaves(others[-1].params), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=3e-4)


def test_a_trained_encoder_is_the_same_objective_with_a_switch():
    """The linear head of fine-tuning, with masks: the loss falls, and every parameter of the encoder moves."""
    mask = MaskConfig(probability=0.5, length=4, channel_probability=0.2, channel_length=2)
    optimizer = dataclasses.replace(OPTIMIZER, accumulate=1)
    cfg = learner(head=LinearHeadConfig(TOKENS), objective=RecognitionConfig(mask=mask), frozen_encoder=False)
    states, results = run(dataclasses.replace(cfg, optimizer=optimizer), updates=6, same=True)
    assert set(states[0].params) == {"encoder", "head"}
    assert results[-1].loss < results[0].loss
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), states[0].params, states[-1].params)
    assert all(jax.tree.leaves(moved))
    assert set(Window().plus(results[0]).line(["a", "b", "c"])["layers"]) == {"0", "1"}


def test_rows_are_judged_alone_and_validated_together(tmp_path):
    """Neighbours and padding change no hypothesis; validation reports what training does, without noise."""
    cfg = learner()
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    encoder, params = encoder_parameters(cfg, mesh), initial_state(cfg, mesh).params
    params = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape), params)
    judge = make_predict_step(cfg, mesh, encoder=encoder)
    whole = batch()
    found = judge(params, place_batch(whole, mesh=mesh, passes=1))
    texts = greedy(found.best, found.frames)
    assert len(set(map(tuple, texts))) > 1 and not texts[3]
    wider = batch(samples=22_400)
    waveform = np.zeros_like(wider.waveform)
    waveform[:, :16_000] = whole.waveform
    alone = wider._replace(waveform=waveform, samples=np.array([0, 0, whole.samples[2], 0], np.int32))
    again = judge(params, place_batch(alone, mesh=mesh, passes=1))
    assert greedy(again.best, again.frames)[2] == texts[2]
    assert found.frames.tolist() == [recognition.frames_for(n, log_mel=False) for n in whole.samples.tolist()]
    sums = make_validation_step(cfg, mesh, encoder=encoder)(params, place_batch(whole, mesh=mesh, passes=1))
    assert sums["ctc_loss"].weight == 3 and np.isfinite(sums["ctc_loss"].total)

    write_description(tmp_path / "model.json", cfg.encoder, cfg.head)
    assert read_description(tmp_path / "model.json") == (cfg.encoder, cfg.head)
    write_description(tmp_path / "model.json", None, cfg.head)
    assert read_description(tmp_path / "model.json") == (None, cfg.head)


def test_log_mel_needs_no_encoder():
    cfg = learner(encoder=None, head=dataclasses.replace(HEAD, projection=0), frozen_encoder=False)
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    state = abstract_state(cfg, mesh)
    assert set(state.params) == {"head"} and "projection" not in state.params["head"]
    sums = make_validation_step(cfg, mesh)(initial_state(cfg, mesh).params, place_batch(batch(), mesh=mesh, passes=1))
    assert sums["ctc_loss"].weight == 3 and np.isfinite(sums["ctc_loss"].total)
    with pytest.raises(HeadError, match="LinearHeadConfig needs one"):
        learner(encoder=None, head=LinearHeadConfig(TOKENS))
    with pytest.raises(HeadError, match="trains a DownstreamConfig or a LinearHeadConfig"):
        learner(head=tiny.learner().head)


def test_a_step_of_log_mel_that_is_not_finite_is_named(tmp_path):
    cfg = learner(encoder=None, head=dataclasses.replace(HEAD, projection=0), frozen_encoder=False)
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    spoiled = batch()
    spoiled.waveform[:3] = np.inf  # of one row, SpecAugment may hide all
    placed = place_batch(spoiled, mesh=mesh, passes=1)
    result = jax.device_get(make_train_step(cfg, mesh, languages=3)(initial_state(cfg, mesh), placed)[1])
    skips = Skips(tmp_path, record={}, resume_step=0, in_row=1, in_all=1, describe=lambda batch: ["row 1: clip 4711"])
    assert not skips.passed(7, result, spoiled, saved=6)
    (line,) = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert (line["step"], line["where"], line["rows"]) == (7, "there is no encoder", ["row 1: clip 4711"])
    with pytest.raises(NonFinite, match=r"step 8: loss nan, .*, there is no encoder(.|\n)*clip 4711"):
        skips.passed(8, result, spoiled, saved=6)


def test_rows_have_as_many_frames_as_s3prl_gives_them():
    """ceil(n / 320), frames after the last real one repeating it; nothing of less than a frame."""
    features = np.random.default_rng(0).normal(size=(4, num_frames(6_400), 3)).astype(np.float32)
    samples = np.array([6_400, 5_000, 719, 399], np.int32)
    matched, frames = jax.jit(recognition.to_s3prl_length, static_argnames="longest")(features, samples, longest=6_400)
    assert frames.tolist() == [20, 16, 3, 0]
    for row, (count, real) in enumerate(zip(frames.tolist(), num_frames(samples).tolist(), strict=True)):
        wanted = [features[row, min(place, real - 1)] for place in range(count)]
        np.testing.assert_array_equal(matched[row, :count], np.array(wanted).reshape(count, 3))
