"""Probes while a stage trains: which clips, what is said of them, and that a run with them is the same run."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from data_pipelines.manifest import Manifest, Split
from experiments import run
from experiments.probe_clips import (
    ProbesConfig,
    ProbesError,
    aligned_rows,
    labels_of,
    language_rows,
    masked_rows,
    spread,
)
from experiments.probes import make_probes, said
from experiments.run import train_stage
from experiments.stage import StageError
from experiments.stage_files import StageFiles
from experiments.targets import Labels
from tests.experiments.conftest import lines, probed, small
from wavlab_jax.clock import PROBE_TIMES
from wavlab_jax.evaluation import language_probe
from wavlab_jax.evaluation.unit_quality import UnitQualityError
from wavlab_jax.metrics import read_lines
from wavlab_jax.model import abstract_parameters
from wavlab_jax.sharding import MeshConfig, make_mesh
from wavlab_jax.train import Interrupted

STAGE = "wavlab_ms"


def probes_of(workdir):
    found = read_lines(StageFiles(workdir, STAGE).metrics / "probes.jsonl")
    return [{key: value for key, value in line.items() if key not in PROBE_TIMES} for line in found]


@pytest.mark.parametrize("limit", [1, 3, 7, 20, 100])
def test_clips_are_spread_as_evenly_as_they_are_there(limit):
    groups = np.random.default_rng(limit).permutation(np.repeat([0, 3, 4], [2, 5, 30]))
    chosen = spread(groups, limit)
    assert len(chosen) == min(limit, 37) == len(set(chosen.tolist())) and (np.diff(chosen) > 0).all()
    counts = np.array([(groups[chosen] == group).sum() for group in (0, 3, 4)])
    level = counts.max()
    assert all(count >= min(level - 1, size) for count, size in zip(counts, (2, 5, 30), strict=True))


def test_the_language_probe_hears_what_takes_part_of_every_cell(corpus):
    manifest = Manifest.load(corpus)
    everything = np.flatnonzero(language_probe.taking_part(**labels_of(manifest, np.arange(len(manifest)))))
    np.testing.assert_array_equal(language_rows(manifest, ProbesConfig(language_clips=10**6)), everything)
    few = language_rows(manifest, ProbesConfig(language_clips=24))
    cells = list(zip(manifest.language[few], manifest.corpus[few], manifest.split[few] == Split.TRAIN, strict=True))
    assert len(few) == 24 and all(cells.count(cell) == 2 for cell in set(cells)) and len(set(cells)) == 12
    assert len(masked_rows(manifest, ProbesConfig(clips=5))) == 5


def test_too_few_alignments_and_values_that_cannot_be_are_named(corpus, tmp_path):
    told = "of 12 held-out utterances that were looked at, 0 have an alignment that fits; at least 20 must; the first"
    cfg = ProbesConfig(every=1, alignments=str(tmp_path))
    with pytest.raises(UnitQualityError, match=told):
        aligned_rows(Manifest.load(corpus), cfg, training=False)
    with pytest.raises(UnitQualityError, match="training utterances"):  # before any units are made
        train_stage(dataclasses.replace(small("hubert_base_it1"), probes=cfg), workdir=tmp_path, corpus=corpus)
    with pytest.raises(ProbesError, match="probes.clips is 0; it must be at least 1"):
        ProbesConfig(clips=0)
    with pytest.raises(StageError, match="probes.layer is 9; the encoder has layers 0 to 2"):
        dataclasses.replace(small(STAGE), probes=ProbesConfig(every=1, layer=9))


def test_where_nothing_can_be_asked_the_line_says_so(corpus, tmp_path, monkeypatch):
    """A corpus without held-out clips is trained on all the same."""
    manifest = Manifest.load(corpus)
    manifest = dataclasses.replace(manifest, split=np.zeros_like(manifest.split))
    cfg = dataclasses.replace(small(STAGE), probes=ProbesConfig(every=2))
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    named = {"at_start": True, "files": StageFiles(tmp_path, STAGE)}
    probes = make_probes(cfg, Labels([], None, []), manifest, mesh, **named)
    shapes = abstract_parameters(cfg.learner.encoder, cfg.learner.head)
    named["files"].folder.mkdir(parents=True)
    line = probes.judge(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes), 0)
    assert line["masked"] == {"note": "no held-out data"} and "no held-out data" in line["language"]["note"]
    assert said(line).startswith("masked: no held-out data; language: no held-out data: none of the sources")
    found = {"masked": {"accuracy": 0.5, "low": 0.4, "high": 0.6, "majority": 0.1, "copy": 0.2, "chance": None}}
    assert said(found) == "masked accuracy 0.500 [0.400, 0.600], without learning 0.200"
    assert make_probes(dataclasses.replace(cfg, probes=ProbesConfig()), None, None, None, **named) is None


@pytest.mark.once
def test_a_stage_is_probed_before_its_first_step_on_schedule_and_at_the_end(recipe):
    found = probes_of(recipe)
    assert [line["step"] for line in found] == [0, 4, 6]
    for line in found:
        masked, language, phones = (line[name] for name in ("masked", "language", "phones"))
        assert masked["clips"] == 24 == sum(row["clips"] for row in masked["languages"].values())
        assert language["clips"] == 24 and language["chance"] == pytest.approx(1 / 3) and language["layer"] == 1
        assert phones["clips"] == 24 and phones["phones"] == 4 and phones["frames"] > 500
        for part, key in ((masked, "accuracy"), (language, "accuracy"), (phones, "purity")):
            assert part["low"] <= part[key] <= part["high"]
            assert ("since_first" in part) == (line["step"] > 0)
    first, last = found[0], found[-1]
    for part, key in (("masked", "accuracy"), ("language", "accuracy"), ("phones", "purity")):
        assert last[part]["since_first"]["difference"] == pytest.approx(last[part][key] - first[part][key], abs=1e-9)


@pytest.mark.once
def test_the_last_probe_says_what_evaluation_says(recipe):
    """All 24 held-out clips are probed here."""
    result = json.loads(StageFiles(recipe, STAGE).evaluation.read_text())
    last = probes_of(recipe)[-1]["masked"]
    assert last["accuracy"] == pytest.approx(result["macro"]["accuracy"], abs=1e-9)
    assert last["copy"] == pytest.approx(result["macro"]["copy"])
    for name, row in last["languages"].items():
        assert row == {key: result["languages"][name][key] for key in row}


@pytest.mark.soak
def test_probes_change_nothing_and_a_stopped_run_writes_each_once(recipe, tmp_path, monkeypatch):
    """Stopped at a step that is probed, then killed after the probe that followed its checkpoint."""
    for name in ("units", "corpus", "stages"):
        shutil.copytree(recipe / name, tmp_path / name)
    shutil.rmtree(StageFiles(tmp_path, STAGE).folder)
    cfg, judged = probed(small(STAGE), recipe.parent / "phones"), run.make_probes

    def stopping(*arguments, **named):
        made = judged(*arguments, **named)

        def judge(params, step):
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return made.judge(params, step)

        return made._replace(judge=judge)

    monkeypatch.setattr(run, "make_probes", stopping)
    with pytest.raises(Interrupted):
        train_stage(cfg, workdir=tmp_path, corpus=tmp_path / "corpus")
    monkeypatch.setattr(run, "make_probes", judged)
    metrics = StageFiles(tmp_path, STAGE).metrics
    with open(metrics / "probes.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "masked": {}}) + "\n")
    train_stage(cfg, workdir=tmp_path, corpus=tmp_path / "corpus")
    assert probes_of(tmp_path) == probes_of(recipe) and lines(tmp_path, STAGE) == lines(recipe, STAGE)
    # from the beginning, with the lines of a process that was killed before its first checkpoint
    shutil.rmtree(metrics / "checkpoints")
    (metrics / "finished.json").unlink()
    train_stage(cfg, workdir=tmp_path, corpus=tmp_path / "corpus")
    assert probes_of(tmp_path) == probes_of(recipe)
    # and without probes the same parameters are trained
    shutil.rmtree(metrics)
    train_stage(small(STAGE), workdir=tmp_path, corpus=tmp_path / "corpus")
    assert lines(tmp_path, STAGE) == lines(recipe, STAGE) and not (metrics / "probes.jsonl").exists()
