"""Checkpoints of a run: what they hold, what is restored from them and where, which are kept, which are refused."""

import dataclasses
import gc
import os
import shutil
import sys

import jax
import numpy as np
import pytest

from tests.wavlab_jax import tiny
from tests.wavlab_jax.small_run import ABOUT, CFG, lines_of, same
from wavlab_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    average,
    read_about,
    restore_parameters,
    restore_state,
    start,
    steps_of,
    write_parameters,
)
from wavlab_jax.sharding import MeshConfig, make_mesh
from wavlab_jax.step import abstract_state, initial_state
from wavlab_jax.train import LoopConfig, LoopError


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_a_checkpoint_restores_on_another_mesh(whole, fsdp):
    """Saved on one device; data x fsdp of 8 x 1, 4 x 2 and 1 x 8."""
    mesh = make_mesh(MeshConfig(fsdp=fsdp))
    checkpoints = Checkpoints(whole[0] / "checkpoints")
    restored = checkpoints.restore(abstract_state(CFG, mesh))
    checkpoints.close()
    same(jax.device_get(restored.state), whole[1])
    kernel = restored.state.params["encoder"]["layers"]["expand"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", None)
    assert kernel.addressable_shards[0].data.shape[1] * fsdp == kernel.shape[1]
    assert restored.record["step"] == 12


def test_what_a_run_starts_from(whole, tmp_path):
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    like = abstract_state(CFG, mesh)

    def fresh():
        return initial_state(CFG, mesh)

    empty = Checkpoints(tmp_path / "empty")
    # 4. nothing
    same(start(empty, like=like, fresh=fresh).state, fresh())
    # 3. parameters of another model, whole or in part
    whole_params = restore_parameters(whole[0] / "checkpoints", like.params)
    continued = start(empty, like=like, fresh=fresh, inherited=whole_params).state
    same(continued.params, whole[1].params)
    assert int(continued.step) == 0 and not any(np.any(x) for x in jax.tree.leaves(continued.optimizer))
    branch = start(empty, like=like, fresh=fresh, inherited={"encoder": whole_params["encoder"]}).state
    same(branch.params["encoder"], whole[1].params["encoder"])
    same(branch.params["head"], fresh().params["head"])
    # 2. the whole state of another run, before parameters; of any of its steps
    for step in (8, 12):
        forked = start(
            empty,
            like=like,
            fresh=fresh,
            forked=lambda step=step: restore_state(whole[0] / "checkpoints", like, step=step),
            inherited={"nonsense": 1},
        )
        assert int(forked.state.step) == step and forked.record == {}
        assert all(np.any(x) for x in jax.tree.leaves(forked.state.optimizer))
    same(forked.state, whole[1])
    # 1. its own newest checkpoint, before anything else
    own = Checkpoints(whole[0] / "checkpoints")
    assert int(start(own, like=like, fresh=fresh, forked=lambda: 1 / 0).state.step) == 12
    assert int(start(own, like=like, fresh=fresh, inherited={"nonsense": 1}).state.step) == 12
    with pytest.raises(CheckpointError, match="encoder/nonsense"):
        start(empty, like=like, fresh=fresh, inherited={"encoder": {"nonsense": np.zeros(3)}})
    with pytest.raises(CheckpointError, match=r"encoder/mask_embedding is \(3,\)"):
        start(empty, like=like, fresh=fresh, inherited={"encoder": {"mask_embedding": np.zeros(3)}})
    empty.close()
    own.close()


def test_what_a_checkpoint_holds(whole):
    folder = whole[0] / "checkpoints"
    items = {path.name for path in (folder / "12").iterdir() if path.is_dir()}
    assert items == {"params", "optimizer", "train", "data", "about", "metrics"}
    assert read_about(folder) == {"format": 2, **ABOUT}
    losses = [line["masked_loss"] for line in lines_of(whole[0])]
    assert list(steps_of(folder)) == [4, 8, 12] and min(losses) < steps_of(folder)[12] < max(losses)


def test_checkpoints_of_other_batches_formats_or_without_an_optimizer_are_refused(whole, tmp_path):
    like = abstract_state(CFG, make_mesh(MeshConfig(), devices=jax.devices()[:1]))
    shutil.copytree(whole[0] / "checkpoints", tmp_path / "run")
    other = Checkpoints(tmp_path / "run", data={"digest": "of others"})
    with pytest.raises(CheckpointError, match="of a run with other batches"):
        other.restore(like)
    other.close()
    about = tmp_path / "run" / "12" / "about" / "metadata"
    about.write_text(about.read_text().replace('"format": 2', '"format": 3'))
    for read, part in ((restore_parameters, like.params), (restore_state, like)):
        with pytest.raises(CheckpointError, match="12 is of format 3, and this code reads 2"):
            read(tmp_path / "run", part)
    shutil.rmtree(about.parent)
    (tmp_path / "run" / "12" / "record").mkdir()  # as before there were formats
    with pytest.raises(CheckpointError, match="written before checkpoints had their present form"):
        restore_parameters(tmp_path / "run", like.params)
    write_parameters(tmp_path / "mean", whole[1].params, step=12, about={})
    same(restore_parameters(tmp_path / "mean", like.params), whole[1].params)
    with pytest.raises(CheckpointError, match="parameters and no optimizer"):
        restore_state(tmp_path / "mean", like)


def test_an_average_is_the_mean_of_the_parameters(whole):
    folder, like = whole[0] / "checkpoints", abstract_state(CFG, make_mesh(MeshConfig(), devices=jax.devices()[:1]))
    each = [jax.tree.leaves(jax.device_get(restore_parameters(folder, like.params, step=step))) for step in (8, 12)]
    for mean, first, second in zip(jax.tree.leaves(average(folder, [8, 12], like.params)), *each, strict=True):
        np.testing.assert_array_equal(mean, ((first.astype(np.float64) + second) / 2).astype(np.float32))
        assert mean.dtype == np.float32


def test_checkpoints_are_kept_by_policy(tmp_path):
    """The latest, every fourth step, and the two lowest scores; an unscored one is not among the best."""
    state = initial_state(CFG, make_mesh(MeshConfig(), devices=jax.devices()[:1]))
    scores = {1: 0.5, 2: np.nan, 3: 0.7, 4: 8.0, 5: 0.6, 6: np.nan, 7: 5.0}
    for part in ((1, 2, 3), (4, 5, 6, 7)):  # the run is continued in between, and knows the scores again
        checkpoints = Checkpoints(tmp_path, keep=1, keep_every=4, keep_best=2)
        for step in part:
            checkpoints.save(dataclasses.replace(state, step=np.int32(step)), {}, score=scores[step])
        checkpoints.close()
    assert steps_of(tmp_path) == {1: 0.5, 4: 8.0, 5: 0.6, 7: 5.0}
    with pytest.raises(LoopError, match="multiple of loop.save_every, 3"):
        LoopConfig(save_every=3, keep_every=4)


def test_checkpoints_that_do_not_fit_or_do_not_exist_are_named(whole, tmp_path):
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    wider = dataclasses.replace(CFG, encoder=tiny.encoder(width=32))
    checkpoints = Checkpoints(whole[0] / "checkpoints")
    with pytest.raises(CheckpointError, match="does not fit this configuration"):
        checkpoints.restore(abstract_state(wider, mesh))
    checkpoints.close()
    with pytest.raises(CheckpointError, match="has that stage been trained"):
        restore_parameters(tmp_path / "nowhere", abstract_state(CFG, mesh).params)
    with pytest.raises(CheckpointError, match="does not fit this configuration"):
        restore_parameters(whole[0] / "checkpoints", abstract_state(wider, mesh).params)


def test_a_damaged_checkpoint_is_named(whole, tmp_path, monkeypatch):
    gc.collect()  # what other tests left behind is told before this one listens
    echoes = []  # what would be printed beside our words, a traceback each
    monkeypatch.setattr(sys, "unraisablehook", echoes.append)
    like = abstract_state(CFG, make_mesh(MeshConfig(), devices=jax.devices()[:1]))
    told = "12 is damaged .*delete that folder and train the stage again, which goes on from step 8"
    for place in ("params/manifest.ocdbt", "params/ocdbt.process_0/d/*", "optimizer/manifest.ocdbt"):
        run = tmp_path / place.replace("/", " ").replace("*", "all")
        shutil.copytree(whole[0] / "checkpoints", run)
        spoilt = max((run / "12").glob(place), key=lambda path: path.stat().st_size)
        os.truncate(spoilt, spoilt.stat().st_size // 2)  # without the manifest, there are as many errors as arrays
        checkpoints = Checkpoints(run)
        with pytest.raises(CheckpointError, match=told):
            checkpoints.restore(like)
        checkpoints.close()
        if place.startswith("params"):
            with pytest.raises(CheckpointError, match=told):
                restore_parameters(run, like.params)
    gc.collect()
    assert not echoes
