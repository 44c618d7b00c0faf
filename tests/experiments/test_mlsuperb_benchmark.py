"""ML-SUPERB from folder to table, with a downstream model of a few numbers: results, faults, kills, devices."""

import csv
import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipelines.mlsuperb.batches import TrackBatchesConfig
from data_pipelines.mlsuperb.layout import LeftOut, MlSuperbError
from data_pipelines.mlsuperb.tracks import Track
from experiments.mlsuperb import benchmark, training, verbs
from experiments.mlsuperb.benchmark import run_benchmark, summary, tracks_of
from experiments.mlsuperb.encoders import LOG_MEL, read_encoder
from experiments.mlsuperb.faults import visible
from experiments.mlsuperb.gathered import write_leaderboard
from experiments.mlsuperb.judging import COLUMNS, text_of
from experiments.mlsuperb.protocol import (
    ProtocolConfig,
    ProtocolError,
    deviations,
    downstream_of,
    incomplete,
    schedule_of,
)
from tests.experiments.small_mlsuperb import CFG, DOWNSTREAM, encoder, run, write_challenge, write_folder
from tests.wavlab_jax import tiny
from wavlab_jax.convert import export_huggingface
from wavlab_jax.downstream import DownstreamConfig, SpecAugmentConfig
from wavlab_jax.model import abstract_parameters, count
from wavlab_jax.sharding import MeshConfig, make_mesh
from wavlab_jax.train import Interrupted

pytestmark = pytest.mark.once

EXAMPLE = Path(__file__).parent / "mlsuperb_example"  # what a run of this folder left, for whoever reads results


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("superb"))


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(root, workdir)


def test_results_have_every_figure_and_name_every_fault(whole, root):
    workdir, results = whole
    folder = workdir / "mlsuperb" / "tiny" / "10min" / "joint"
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["all"]["utterances"] == 16 and results["groups"]["few-shot"]["utterances"] == 5
    low, high = results["groups"]["normal"]["error_rate_interval"]
    assert low <= results["groups"]["normal"]["error_rate"] <= high
    assert results["chance"]["uniform"] == pytest.approx(100 / 3)
    assert results["chance"]["language"] == "eng" and results["chance"]["majority"]["normal"] == pytest.approx(600 / 11)
    assert sum(map(sum, (row.values() for row in results["confusions"].values()))) == 16
    assert np.isclose(sum(results["layer_weights"]), 1) and len(results["layer_weights"]) == 2

    assert results["left_out"]["train"] == {"recording missing": 1, "no text": 1}
    assert results["unseen_tokens"] == {"Q": 1}
    data = results["data"]
    assert (
        data["recordings_without_text"]["count"] == 1
        and "mls_eng_900000" in data["recordings_without_text"]["first"][0]
    )
    assert data["infeasible"]["train"] == {"count": 1, "first": ["mls_eng_900001"]}
    assert data["parts"]["train"]["utterances"] == 16 and not data["miniature"]
    with open(folder / "left_out.tsv", encoding="utf-8") as file:
        faults = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert Counter(row["fault"] for row in faults) == {
        "left out": 2, "recording without text": 1, "corpus not there": 12, "more tokens than frames": 1,
        "tokens that training never saw": 1,
    }  # fmt: skip
    assert [tuple(row.values()) for row in faults if row["fault"].startswith(("more", "tokens"))] == [
        ("train", "more tokens than frames", "mls_eng_900001", ""),
        ("test", "tokens that training never saw", "mls_eng_900001", "Q"),
    ]
    with open(folder / "hypotheses.tsv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == 16 and sum(int(row["tokens"]) for row in rows) == results["all"]["tokens"]
    assert rows[-1]["reference"].startswith("[eng] ") or rows[0]["reference"].startswith("[deu] ")
    said = summary(results)
    for part in (f"1, no text ({root}/mls/eng/transcript_10min_train.txt:8)",
                 "more tokens than frames: 1 (mls_eng_900001)", "1 times: Q; first in mls_eng_900001",
                 "NOT THE PUBLISHED PROTOCOL: scale", "PROTOCOL: 12 of the benchmark's 14 corpora are not there: ALFFA",
                 "PROTOCOL: of train 1 left out: recording missing"):  # fmt: skip
        assert part in said, said
    assert len(data["missing_sources"]) == 12 and data["missing_few_shot"]["count"] == 0


def test_readers_find_the_keys_of_the_example(whole):
    """Those that every track has, at every depth that has fixed names."""
    _, results = whole
    example = json.loads((EXAMPLE / "results.json").read_text())
    assert results.keys() == example.keys()
    for name in ("model", "protocol", "data", "all", "chance", "training"):
        assert results[name].keys() == example[name].keys(), name
    assert results["examples"][0].keys() == example["examples"][0].keys()
    head = (EXAMPLE / "hypotheses.tsv").read_text().splitlines()[0]
    assert tuple(head.split("\t")) == COLUMNS


def test_the_verbs_from_folder_to_table(root, tmp_path, capsys):
    """As they are typed, with a narrow downstream model: four batches of log-mel features, two updates."""
    command = f"log-mel --mlsuperb {root} --workdir {tmp_path} --track lid --scale 1e-5 --seed 3 --name mel"
    command += " --width 32 --accumulate 2"
    command += " --batches.size 2 --batches.step 0.6 --batches.fillers True --batches.threads 0"
    verbs.superb(command.split())
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "mlsuperb" / "mel" / "10min" / "identification" / "results.json").read_text())
    assert "[1/1] mel, identification, 10min: 4 batches, 6 tokens" in said and "results: " in said
    assert results["model"]["kind"] == "log-mel" and results["all"]["utterances"] == 16
    assert (results["protocol"]["iterations"], results["protocol"]["batch"], results["protocol"]["seed"]) == (4, 2, 3)
    said = results["protocol"]["deviations"]
    assert said[-2] == "an update for every 2 batches, not for 4" and "width 32 in place of 256, heads 1" in said[-1]
    default = abstract_parameters(None, dataclasses.replace(downstream_of(ProtocolConfig(), tokens=6), projection=0))
    assert count(default) == 4_599_303 > 10 * results["model"]["downstream_parameters"]
    verbs.superb(command.split())
    assert "done already" in capsys.readouterr().out
    verbs.leaderboard(["--workdir", str(tmp_path)])
    assert "| **mel** |" in capsys.readouterr().out and (tmp_path / "mlsuperb" / "leaderboard.html").exists()


def test_the_challenge_is_trained_as_its_baseline_and_judged_on_both_sets(root, tmp_path, monkeypatch):
    challenge = write_challenge(tmp_path / "challenge", root)
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    cfg = dataclasses.replace(CFG, scale=8 / 400_000, learning_rate=2e-4)
    arguments = dict(root=challenge, workdir=tmp_path, duration="10min", cfg=cfg, mesh=mesh, downstream=DOWNSTREAM)
    (dialects,) = run_benchmark(encoder(mesh), tracks=[("challenge", "dev_dialect")], **arguments)
    monkeypatch.setattr(training, "train", None)  # nothing is trained again
    (dev,) = run_benchmark(encoder(mesh), tracks=[("challenge", "dev")], **arguments)
    assert dialects["all"]["utterances"] == 2 and dev["all"]["utterances"] == 4 and dev["set"] == "1h"
    assert dev["challenge"].keys() == {"accuracy", "error_rate", "deviation", "worst_15"}
    assert dialects["training"] == dev["training"] and "averages over languages: accuracy" in summary(dev)
    deviates = [said.split(":")[0] for said in dev["protocol"]["deviations"]]
    assert deviates == ["scale 2e-05", "batches of 3, not 8", "downstream model"]
    schedule = schedule_of(ProtocolConfig(), "challenge", "1h")
    assert (schedule.iterations, schedule.validations, schedule.averaged) == (400_000, 20, 2)
    said = deviations(ProtocolConfig(), schedule, miniature=False, challenge=True)
    assert said == ["learning rate 0.0001, not 0.0002"]


def test_languages_that_sound_different_are_told_apart(root, tmp_path):
    """Log-mel features, from folder to accuracy: 100 updates, each language beeping at its own pitch."""
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    plain = SpecAugmentConfig(warp_frames=0, channel_masks=1, channel_mask_width=1, time_masks=1, time_mask_share=0)
    found = run_benchmark(
        read_encoder(LOG_MEL, workdir=tmp_path, mesh=mesh), root=root, workdir=tmp_path, duration="10min", mesh=mesh,
        tracks=[("identification", None)], downstream=dataclasses.replace(DOWNSTREAM, dropout=0.0, augment=plain),
        cfg=ProtocolConfig(scale=400 / 300_000, learning_rate=1e-2, batches=TrackBatchesConfig(step=1.0, threads=0)),
    )[0]  # fmt: skip
    assert found["all"]["accuracy"] >= 90, found["confusions"]
    assert found["layer_weights"] == [] and "error_rate" not in found["all"]


def test_the_loss_falls_and_the_best_checkpoints_are_averaged(whole):
    workdir, results = whole
    losses = {row["step"]: row["valid_loss"] for row in results["training"]["losses"] if "valid_loss" in row}
    assert list(losses) == [24, 48] and losses[48] < losses[24]
    assert results["training"]["averaged"] == {"24": losses[24], "48": losses[48]}
    folder = workdir / "mlsuperb" / "tiny" / "10min" / "joint"
    assert not (folder / "checkpoints").exists() and (folder / "average").is_dir()


def test_a_killed_run_goes_on_to_the_same_numbers(whole, root, tmp_path, monkeypatch):
    """Stopped in the middle of training, then before anything was judged."""
    _, results = whole
    original = training.train

    def dies(state, step, batches, **arguments):
        def thirty(state, batch, wish):
            if int(state.step) == 30:
                raise Interrupted("killed", number=9)
            return step(state, batch, wish)

        return original(state, thirty, batches, **arguments)

    monkeypatch.setattr(training, "train", dies)
    with pytest.raises(Interrupted):
        run(root, tmp_path)
    monkeypatch.setattr(training, "train", original)
    monkeypatch.setattr(benchmark, "decode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path)
    monkeypatch.undo()
    again = run(root, tmp_path)
    same = ("all", "groups", "languages", "confusions", "layer_weights", "training", "examples")
    assert {key: again[key] for key in same} == {key: results[key] for key in same}
    with pytest.raises(ProtocolError, match="protocol.seed: 0 then, 1 now"):
        run(root, tmp_path, seed=1)


@pytest.mark.soak
def test_devices_do_not_change_what_is_learned(whole, root, tmp_path):
    _, results = whole
    sharded = run(root, tmp_path, devices=4, fsdp=2)
    for mine, theirs in zip(results["training"]["losses"], sharded["training"]["losses"], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-3)
    np.testing.assert_allclose(sharded["layer_weights"], results["layer_weights"], atol=1e-3)


def test_the_table_says_what_it_is_not(whole):
    workdir, results = whole
    text = write_leaderboard(workdir, workdir / "table.md")
    assert (workdir / "table.md").read_text() == text
    assert "not by the published protocol" in text and "SUPERB points" not in text and "XLS-R" not in text
    row = next(line for line in text.splitlines() if line.startswith("| **tiny**"))
    assert row.count("–") == 4 and f"{results['groups']['normal']['accuracy']:.1f}" in row
    assert "33.3" in text and "54.5 (eng)" in text and "| joint | 16 | 15 | 16 | 2 | 1 (1) | 1 / 0 / 0 |" in text
    with pytest.raises(ProtocolError, match="holds no results"):
        write_leaderboard(workdir / "nothing", workdir / "none.md")


def test_the_published_schedule_is_the_default():
    for task, duration, iterations in (
        ("monolingual", "1h", 15_000),
        ("joint", "10min", 300_000),
        ("joint", "1h", 600_000),
    ):
        schedule = schedule_of(ProtocolConfig(), task, duration)
        assert (schedule.iterations, schedule.validations, schedule.averaged) == (iterations, 30, 5)
        assert deviations(ProtocolConfig(), schedule, miniature=False) == []
    shape = DownstreamConfig(tokens=9)
    assert deviations(ProtocolConfig(), schedule, miniature=False, downstream=shape) == []
    other = dataclasses.replace(shape, width=64, heads=4)
    assert deviations(ProtocolConfig(), schedule, miniature=False, downstream=other) == [
        "downstream model: width 64 in place of 256, heads 4 in place of 8"
    ]
    short = schedule_of(ProtocolConfig(scale=0.001), "monolingual", "10min")
    assert (short.iterations, short.validate_every, short.averaged) == (16, 16, 1)
    said = deviations(ProtocolConfig(scale=0.001, learning_rate=2e-4), short, miniature=True)
    assert len(said) == 2 and "miniature" in said[0]
    assert said[1] == ("scale 0.001: 16 of 15,000 iterations, 1 of 30 validations, the best 1 of them averaged, not 5")
    half = ProtocolConfig(scale=0.5)
    said = deviations(half, schedule_of(half, "monolingual", "10min"), miniature=False)
    assert said == ["scale 0.5: 7,440 of 15,000 iterations"]
    narrow = ProtocolConfig(width=64, accumulate=1)
    assert deviations(narrow, schedule_of(narrow, "joint", "10min"), miniature=False) == [
        "an update for each batch, not for 4",
        "downstream model: width 64 in place of 256, heads 2 in place of 8, feed_forward 256 in place of 1024",
    ]
    for wrong, why in (
        (dict(scale=0), "share of the published"),
        (dict(scale=1.5), "share of the published"),
        (dict(accumulate=0), "takes one batch"),
        (dict(width=40), "a multiple of 32"),
    ):
        with pytest.raises(ProtocolError, match=why):
            ProtocolConfig(**wrong)


def test_what_is_wrong_with_the_last_track_is_said_before_the_first_is_trained(whole, root, tmp_path):
    """A corpus that is not there, and a folder that holds another run."""
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    arguments = dict(root=root, duration="10min", cfg=CFG, mesh=mesh, downstream=DOWNSTREAM)
    with pytest.raises(MlSuperbError, match="monolingual jpn has no train utterance"):
        run_benchmark(encoder(mesh), workdir=tmp_path, tracks=[("joint", None), ("monolingual", "jpn")], **arguments)
    workdir, _ = whole
    other = [("multilingual", None), ("joint", None)]
    with pytest.raises(ProtocolError, match="holds another run"):
        run_benchmark(
            encoder(mesh), workdir=workdir, tracks=other, **arguments | {"cfg": dataclasses.replace(CFG, seed=1)}
        )
    assert list(tmp_path.iterdir()) == [] and [
        each.name for each in (workdir / "mlsuperb" / "tiny" / "10min").iterdir()
    ] == ["joint"]


def test_a_folder_that_is_not_whole_is_not_the_published_protocol():
    """What the protocol leaves out itself is no deviation; few-shot utterances are none of the monolingual sets'."""
    usual = [LeftOut("a:1", "not between 0.1 and 20 s"), LeftOut("a:2", "no text but punctuation")]
    whole = Track("joint", "joint", "10min", {}, {"train": usual, "test": []}, [], [], "character")
    lacks = {"sources": ["NST", "mls"], "few_shot": ["cv_tur_000095"]}
    assert incomplete(whole, sources=[], few_shot=[]) == []
    assert incomplete(whole._replace(task="monolingual"), sources=[], few_shot=["cv_tur_000095"]) == []
    broken = [LeftOut("b:1", "recording missing"), LeftOut("b:2", "recording truncated")]
    said = incomplete(whole._replace(left_out={"train": usual, "test": broken}), **lacks)
    wanted = ("2 of the benchmark's 14 corpora are not there: NST, mls", "1 of the utterances.*cv_tur_000095",
              "of test 1 left out: recording missing", "of test 1 left out: recording truncated")  # fmt: skip
    assert len(said) == len(wanted) and all(map(re.match, wanted, said)), said
    schedule = schedule_of(ProtocolConfig(), "joint", "10min")
    assert deviations(ProtocolConfig(), schedule, miniature=False, incomplete=said) == said


def test_tracks_and_models_by_name(tmp_path):
    assert tracks_of(["monolingual", "joint"], ["eng1", "xty"]) == [
        ("monolingual", "eng1"), ("monolingual", "xty"), ("joint", None)]  # fmt: skip
    assert len(tracks_of(["monolingual"], [])) == 13
    with pytest.raises(ProtocolError, match="no monolingual set 'eng9'"):
        tracks_of(["monolingual"], ["eng9"])
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    log_mel = read_encoder(LOG_MEL, workdir=tmp_path, mesh=mesh)
    assert (log_mel.kind, log_mel.config, log_mel.params) == ("log-mel", None, None)
    for name in ("a/b", "../a", "..", "", "a/"):
        with pytest.raises(ProtocolError, match="give the name of one folder"):
            read_encoder(LOG_MEL, workdir=tmp_path, mesh=mesh, name=name)


def test_a_folder_with_a_dot_is_named_whole(tmp_path):
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    export_huggingface(tiny.randomised(tiny.encoder(pre_norm=True, extractor_norm="layer")), tmp_path / "mHuBERT-0.3B")
    model = read_encoder(str(tmp_path / "mHuBERT-0.3B"), workdir=tmp_path, mesh=mesh)
    assert (model.name, model.kind) == ("mHuBERT-0.3B", "imported")
    assert read_encoder(f"{tmp_path}/mHuBERT-0.3B/", workdir=tmp_path, mesh=mesh).name == "mHuBERT-0.3B"


def test_white_space_is_named_by_its_number():
    assert [visible(token) for token in ("Ä", "\u00a0", "<unk>")] == ["Ä", "U+00A0", "<unk>"]


def test_text_of_tokens():
    made = Track(
        "t", "joint", "10min", {}, {}, ["<blank>", "<unk>", "[eng]", "<space>", "A", "<sos/eos>"], [], "character"
    )
    assert text_of(made, [2, 3, 4, 3, 4]) == "[eng] A A"
    assert text_of(made._replace(token_kind="phone"), [4, 4]) == "A A"
