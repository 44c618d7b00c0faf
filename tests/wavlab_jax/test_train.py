"""The loop and its checkpoints: interrupted runs end where uninterrupted ones do, and bad batches are named."""

import dataclasses
import functools
import gc
import json
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from orbax.checkpoint import CheckpointManager

from data_pipelines.atomic import CannotWrite
from tests.wavlab_jax import tiny
from tests.wavlab_jax.full_disk import FullDisk
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
from wavlab_jax.clock import TIMES
from wavlab_jax.metrics import MetricsWriter, read_lines
from wavlab_jax.sharding import MeshConfig, make_mesh, place_batch
from wavlab_jax.skipped import Skips
from wavlab_jax.step import abstract_state, initial_state, make_train_step
from wavlab_jax.train import Interrupted, LoopConfig, LoopError, NonFinite, Probes, train

CFG = tiny.learner(dropout=0.1, layerdrop=0.1)
LOOP = LoopConfig(steps=12, log_every=3, save_every=4, keep=2)
DATA = {"digest": "of the batches"}
ABOUT = {"versions": {"jax": jax.__version__}}
KEEPING = dataclasses.replace(LOOP, keep=9)
SKIP = dataclasses.replace(LOOP, non_finite="skip", skip_in_row=2, skip_in_all=3)
LANGUAGES = ("aaa", "bbb", "ccc")


def batches(first):
    k = first
    while True:
        yield tiny.batch(4, seed=k)._replace(language=np.array([k % 3, 1, 1, k % 2], np.int32))
        k += 1


@functools.cache
def made():
    """Mesh, step and initial values, compiled once for all runs."""
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    return mesh, make_train_step(CFG, mesh, languages=len(LANGUAGES)), jax.device_get(initial_state(CFG, mesh))


def run(folder, *, loop=LOOP, stream=batches, judge=None, validate=None):
    mesh, step, initial = made()
    checkpoints = Checkpoints(folder / "checkpoints", keep=loop.keep, data=DATA, about=ABOUT)
    like = abstract_state(CFG, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    restored = start(checkpoints, like=like, fresh=lambda: jax.device_put(initial, shardings))
    first = int(restored.state.step)
    own = checkpoints.latest() is not None
    writer = MetricsWriter(folder, resume_step=first if own else -1)
    try:
        state = train(
            restored.state,
            step,
            stream(first),
            place=lambda batch: place_batch(batch, mesh=mesh, passes=1),
            describe=lambda batch: [f"row {i}: clip {u}" for i, u in enumerate(batch.utterance)],
            checkpoints=checkpoints,
            writer=writer,
            folder=folder,
            cfg=loop,
            record=restored.record,
            title="test",
            languages=LANGUAGES,
            probes=judge and Probes(5, not own, judge),
            validate=validate,
        )
    finally:
        writer.close()
        checkpoints.close()
    return jax.device_get(state)


def lines_of(folder):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_lines(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, loop=KEEPING)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_signal_that_comes_again_does_not_end_the_last_save(tmp_path, monkeypatch):
    """Schedulers send SIGTERM to a launcher that passes it on and to the process itself, and a save takes a while."""
    missed, wait = [], Checkpoints.wait
    before = signal.signal(signal.SIGTERM, lambda *_: missed.append("ended"))

    def waiting(checkpoints):
        os.kill(os.getpid(), signal.SIGTERM)
        wait(checkpoints)

    def interrupting(first):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from batches(first)

    monkeypatch.setattr(Checkpoints, "wait", waiting)
    try:
        with pytest.raises(Interrupted, match="stopped after step 1 of 12, saved"):
            run(tmp_path, stream=interrupting)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not missed and list(steps_of(tmp_path / "checkpoints")) == [1]


@pytest.mark.parametrize("stop_at", [2, *(pytest.param(k, marks=pytest.mark.soak) for k in (5, 8))])
def test_an_interrupted_run_ends_bit_for_bit_where_a_whole_one_does(whole, tmp_path, stop_at, caplog):
    """SIGTERM while batch `stop_at` is read, between and at the intervals of saving and logging."""

    def interrupting(first):
        for k, batch in enumerate(batches(first), first):
            if k == stop_at and first == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with pytest.raises(Interrupted, match="the same command continues"):
        run(tmp_path, loop=KEEPING, stream=interrupting)
    same(run(tmp_path, loop=KEEPING, stream=interrupting), whole[1])
    assert lines_of(tmp_path) == lines_of(whole[0])
    scores = steps_of(tmp_path / "checkpoints")  # those of the usual steps go by the same steps as if uninterrupted
    assert {step: score for step, score in scores.items() if np.isfinite(score)} == steps_of(whole[0] / "checkpoints")
    assert set(scores) - {4, 8, 12} <= {stop_at + 1} and 4 in scores
    assert "metrics" not in caplog.text  # Orbax would warn of the one without a score
    assert [line["step"] for line in lines_of(tmp_path)] == [3, 6, 9, 12]


@pytest.mark.parametrize(
    ("full", "told"),
    [
        ("metrics.jsonl", r"metrics\.jsonl cannot be written \(No space left on device\): free some space"),
        pytest.param(
            "tfevents",
            r"tensorboard/events\S* cannot be written \(No space left on device\): free some space",
            marks=pytest.mark.soak,
        ),
        pytest.param(
            "checkpoint",
            r"checkpoints has no space for the checkpoint of step 8: it needs 4\.\d MB, 1\.0 MB are free",
            marks=pytest.mark.soak,
        ),
        ("late", r"checkpoints cannot be written \(No space left on device\).*; the newest whole checkpoint stays$"),
    ],
)
def test_a_full_disk_is_told_and_with_space_again_the_run_ends_bit_for_bit_the_same(
    whole, tmp_path, monkeypatch, full, told
):
    with monkeypatch.context() as patch:
        if full == "checkpoint":
            free = iter((1e9, 1e6))
            patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=next(free)))
        elif full == "late":  # while Orbax writes: what TensorStore says then
            words = "RESOURCE_EXHAUSTED: Error writing local file: No space left on device [os_error_code='28']"
            patch.setattr(CheckpointManager, "wait_until_finished", lambda _: (_ for _ in ()).throw(ValueError(words)))
        else:
            FullDisk(patch, full, free=600)
        with pytest.raises((CannotWrite, CheckpointError), match=told):
            run(tmp_path)
    same(run(tmp_path), whole[1])
    assert lines_of(tmp_path) == lines_of(whole[0])
    assert [line["step"] for line in lines_of(tmp_path)] == [3, 6, 9, 12]


def test_a_batch_that_is_not_finite_stops_the_run_and_is_named(tmp_path):
    def poisoned(first):
        for k, batch in enumerate(batches(first), first):
            if k == 6:
                batch.waveform[2, 5] = np.nan
                batch.utterance[2] = 4711
            yield batch

    with pytest.raises(
        NonFinite, match=r"step 7: loss nan.* changed no parameters.* skip goes on past (.|\n)*row 2: clip 4711"
    ):
        run(tmp_path, stream=poisoned)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest() == 4  # nothing was saved before its own metric was read
    checkpoints.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [3, 6]


def spoiled(first, *, bad):
    for k, batch in enumerate(batches(first), first):
        if k in bad:
            batch.waveform[2, 5] = np.inf
            batch.utterance[2] = 4711 + k
        yield batch


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    """A whole run that skips steps 4, 5 and 10."""
    folder = tmp_path_factory.mktemp("skipping")
    return folder, run(folder, loop=SKIP, stream=functools.partial(spoiled, bad=(3, 4, 9)))


def test_skipped_steps_are_counted_named_and_in_no_sum(skipping):
    folder, state = skipping
    assert int(state.step) == 12
    lines = lines_of(folder)
    assert [line["skipped"] for line in lines] == [0, 2, 2, 3]
    named = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [(line["step"], line["rows"][2]) for line in named] == [
        (4, "row 2: clip 4714"), (5, "row 2: clip 4715"), (10, "row 2: clip 4720")]  # fmt: skip
    assert named[0]["loss"] == "nan" and "values of the input of the first layer not finite" in named[0]["where"]
    # of the window 4 to 6 step 6 alone was made, which heard batch 5: its languages are 2, 1, 1, 1
    assert set(lines[1]["languages"]) == {"ccc", "bbb"}
    assert all(np.isfinite(line["masked_loss"]) and np.isfinite(line["update_to_weight"]) for line in lines)
    # the schedule goes by the step number, Adam's correction by the updates that were made
    assert sorted(int(x) for x in jax.tree.leaves(state.optimizer) if np.ndim(x) == 0) == [9, 12]


@pytest.mark.parametrize("stop_at", [4, 10])
def test_a_run_that_skips_is_resumed_bit_for_bit(skipping, tmp_path, stop_at):
    def interrupting(first):
        for k, batch in enumerate(spoiled(first, bad=(3, 4, 9)), first):
            if k == stop_at and first == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with pytest.raises(Interrupted):
        run(tmp_path, loop=SKIP, stream=interrupting)
    same(run(tmp_path, loop=SKIP, stream=interrupting), skipping[1])
    assert lines_of(tmp_path) == lines_of(skipping[0])
    assert (tmp_path / "skipped.jsonl").read_text() == (skipping[0] / "skipped.jsonl").read_text()


def test_what_hosts_that_are_gone_have_named_is_dropped_as_well(tmp_path):
    """Steps after the checkpoint, whose rows the hosts that are left will name."""
    for name in ("skipped.jsonl", "skipped-3.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"step": step}) + "\n" for step in (4, 9)))
    Skips(tmp_path, record={}, resume_step=6, in_row=1, in_all=1, describe=list)
    for name in ("skipped.jsonl", "skipped-3.jsonl"):
        assert [line["step"] for line in read_lines(tmp_path / name)] == [4]


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ((3, 4, 5), r"step 6: .* number 3 in a row and 3 in all \(loop.skip_in_row allows 2, (.|\n)*clip 4716"),
        ((1, 3, 5, 7), r"step 8: .* number 1 in a row and 4 in all \(.* loop.skip_in_all 3\)(.|\n)*clip 4718"),
    ],
)
def test_skipping_has_bounds(tmp_path, bad, told):
    with pytest.raises(NonFinite, match=told):
        run(tmp_path, loop=SKIP, stream=functools.partial(spoiled, bad=bad))
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == len(bad)


@pytest.mark.parametrize("killed", [False, True])
def test_probes_change_nothing_and_each_is_written_once(whole, tmp_path, killed):
    """Probed at 0, 5, 10 and 12. Stopped during the probe of step 5; or killed in that of step 10, back to step 8."""
    seen = []

    def judge(params, step):
        if len(seen) == (2 if killed else 1):
            seen.append("stopped")
            if killed:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append(step)
        return {"norm": float(sum(abs(leaf).sum() for leaf in jax.tree.leaves(params))), "step": step}

    with pytest.raises(KeyboardInterrupt if killed else Interrupted):
        run(tmp_path, judge=judge)
    assert seen == ([0, 5, "stopped"] if killed else [0, "stopped", 5])
    assert [line["step"] for line in read_lines(tmp_path / "probes.jsonl")] == [0, 5]
    same(run(tmp_path, judge=judge), whole[1])
    assert lines_of(tmp_path) == lines_of(whole[0])
    found = list(read_lines(tmp_path / "probes.jsonl"))
    assert [line["step"] for line in found] == [0, 5, 10, 12] and seen[3:] == [10, 12]
    norm = sum(float(abs(leaf).sum()) for leaf in jax.tree.leaves(whole[1].params))
    assert found[-1]["norm"] == pytest.approx(norm, rel=1e-5)
    assert all(0 < line["probe_share"] < 1 for line in found[1:]) and not (whole[0] / "probes.jsonl").exists()


def test_metrics_are_sums_over_their_window(whole):
    """A line's accuracy is correct frames over scored frames of its three steps, not a mean of three ratios."""
    assert all(0 <= line["masked_accuracy"] <= 1 for line in lines_of(whole[0]))
    assert [round(line["audio_hours"] * 3600, 3) for line in lines_of(whole[0])] == [6.0, 12.0, 18.0, 24.0]


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


def test_a_checkpoint_that_a_signal_asks_for_is_not_validated(tmp_path):
    asked = []

    def interrupting(first):
        for number, batch in enumerate(batches(first), start=first):
            if number == 5 and first == 0:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    again = {"loop": KEEPING, "stream": interrupting, "validate": lambda params: float(asked.append(1) or len(asked))}
    with pytest.raises(Interrupted):
        run(tmp_path, **again)
    run(tmp_path, **again)
    np.testing.assert_equal(steps_of(tmp_path / "checkpoints"), {4: 1.0, 6: np.nan, 8: 2.0, 12: 3.0})


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
