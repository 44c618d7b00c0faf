"""The loop: interrupted runs end where uninterrupted ones do, and bad batches are named."""

import dataclasses
import functools
import json
import os
import shutil
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from orbax.checkpoint import CheckpointManager

from data_pipelines.atomic import CannotWrite
from tests.wavlab_jax.full_disk import FullDisk
from tests.wavlab_jax.small_run import KEEPING, LOOP, batches, lines_of, run, same
from wavlab_jax.checkpoint import CheckpointError, Checkpoints, steps_of
from wavlab_jax.metrics import read_lines
from wavlab_jax.skipped import Skips
from wavlab_jax.train import Interrupted, NonFinite

SKIP = dataclasses.replace(LOOP, non_finite="skip", skip_in_row=2, skip_in_all=3)


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
