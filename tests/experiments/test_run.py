"""Every stage trains in its small form, is judged and exported; changed inputs are named."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from data_pipelines.batch import num_frames
from data_pipelines.manifest import Manifest, ManifestError
from data_pipelines.prepare import prepare
from data_pipelines.sampling import SamplingError
from data_pipelines.sources import ShardSource
from data_pipelines.units import UnitsError, UnitStore
from experiments import run, steps
from experiments.evaluate import evaluate_stage, pool_utterances, probe_stages, table
from experiments.export import export_stage
from experiments.run import train_stage
from experiments.stage import StageError
from experiments.stage_files import StageFiles
from experiments.stages import STAGES
from experiments.trained import CorpusChanged
from experiments.units import UnitFiles, UnitMakingError, fit_sample, make_units
from tests.experiments.conftest import TWINS, lines, small
from wavlab_jax.checkpoint import CheckpointError
from wavlab_jax.objectives import objective_of
from wavlab_jax.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.once


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.soak) if n in TWINS else n for n in STAGES])
def test_every_stage_trains(trained, heard, name):
    train_stage(small(name), workdir=trained, corpus=heard)  # returns at once if that is done
    found = lines(trained, name)
    assert [line["step"] for line in found] == [2, 4, 6]
    loss, *_ = objective_of(small(name).learner.objective).SHOWN
    assert all(np.isfinite(line[loss]) for line in found)
    assert found[-1]["audio_hours"] == pytest.approx(6 * 8 / 3600)
    assert StageFiles(trained, name).finished.exists()


def test_stage_2_starts_where_stage_1_ended_and_hears_another_balance(trained):
    shares = {
        name: json.loads((StageFiles(trained, name).folder / "shares.json").read_text())
        for name in ("wavlab_ms", "wavlab_mk_continued")
    }
    for language in ("deu", "eng", "swa"):
        control = shares["wavlab_mk_continued"][language]
        assert control["drawn"] == pytest.approx(control["natural"])
    first = {name: lines(trained, name)[0]["unmasked_loss"] for name in shares}
    assert first["wavlab_ms"] < lines(trained, "wavlab_mk")[0]["unmasked_loss"]


def test_judged_on_every_held_out_clip(trained, heard):
    manifest = Manifest.load(heard)
    result = evaluate_stage(small("wavlab_ms"), workdir=trained, corpus=heard)
    held_out = int((manifest.split != 0).sum())
    assert result["total"]["clips"] == held_out == sum(row["clips"] for row in result["languages"].values())
    assert 0 <= result["total"]["accuracy"] <= 1 and result["total"]["copy"] > 0
    assert table(result).splitlines()[-1].startswith("all")
    again = evaluate_stage(small("wavlab_ms"), workdir=trained, corpus=heard)
    assert again == result


def test_nothing_held_out_is_told(trained, heard, monkeypatch):
    """In the note of the step, in evaluation.json, and in what the report is drawn from."""
    from experiments import evaluate
    from experiments.results import collect_results

    files = StageFiles(trained, "hubert_base_it1")
    monkeypatch.setattr(evaluate, "held_out", lambda manifest: np.zeros(0, np.int64))
    assert steps.evaluate(small("hubert_base_it1"), trained, heard) == "no held-out data"
    results = collect_results("recipe", trained, [])
    assert {"label": "HuBERT iteration 1", "stage": "hubert_base_it1", "note": "no held-out data"} in results[
        "accuracy"
    ]
    files.evaluation.unlink()


def test_the_probe_hears_the_first_8_seconds_of_what_takes_part(corpus):
    """Whatever length a batch is padded to, and however many windows an utterance has."""
    manifest, mesh = Manifest.load(corpus), make_mesh(MeshConfig(), devices=jax.devices()[:1])
    rows = np.flatnonzero(np.arange(len(manifest)) % 3 > 0)
    heard = {}

    def vectors(waveform, samples, valid):
        assert waveform.shape[1] == 16 and waveform.shape[2] in (16_000, 32_000)
        heard["rows"] = heard.get("rows", 0) + int((samples > 0).sum())
        return np.stack([samples[0], valid[0].sum(axis=1), np.square(waveform[0]).sum(axis=1)], axis=1)

    found = pool_utterances({"a": vectors, "b": vectors}, rows, manifest, mesh, lengths=(16_000, 32_000))
    source = ShardSource(manifest)
    assert heard["rows"] == 2 * len(rows) and (manifest.samples[rows] > 32_000).any()
    for place, i in enumerate(rows):
        samples = min(int(manifest.samples[i]), 32_000)
        energy = np.square(source.read(i, samples=samples)).sum()
        np.testing.assert_allclose(found["a"][place], [samples, num_frames(samples), energy], rtol=1e-4)
    np.testing.assert_array_equal(found["a"], found["b"])


def test_probed_across_sources(trained, heard):
    result = probe_stages([small("wavlab_mk"), small("wavlab_ms")], workdir=trained, corpus=heard)
    names = [row["name"] for row in result["rows"]]
    assert names == ["log-mel", "wavlab_mk", "wavlab_ms", "untrained encoder"]
    for row in result["rows"]:
        assert row["low"] <= row["accuracy"] <= row["high"] and row["chance"] == pytest.approx(1 / 3)
        assert row["languages"] == 3 and row["folds"] == 2
    assert {d["against"] for d in result["differences"]} == {"log-mel", "wavlab_mk", "untrained encoder"}


def test_exported(trained, heard, tmp_path):
    result = export_stage("wavlab_ms", workdir=trained, corpus=heard, out=tmp_path / "hf")
    assert {"config.json", "preprocessor_config.json", "model.safetensors", "README.md"} <= set(result["files"])
    assert result["largest_difference"] is None or result["largest_difference"] < 1e-4


@pytest.mark.torch
def test_the_export_was_compared_with_pytorch(trained, heard, tmp_path):
    result = export_stage("wavlab_ms", workdir=trained, corpus=heard, out=tmp_path / "hf")
    assert result["largest_difference"] < 1e-4 and "transformers" in result["checked_with"]


def test_units_are_made_once_and_not_for_another_corpus(trained, heard, corpus, tmp_path):
    cfg, mesh = small("hubert_base_it1").units, make_mesh(MeshConfig())
    manifest = Manifest.load(heard)
    before = (UnitFiles(trained, cfg.name).store / "units.uint16").stat().st_mtime_ns
    store = make_units(cfg, trained, manifest, mesh)
    assert (store.directory / "units.uint16").stat().st_mtime_ns == before
    with pytest.raises(UnitMakingError, match="was made otherwise"):
        make_units(dataclasses.replace(cfg, seed=5), trained, manifest, mesh)
    other = dataclasses.replace(small("hubert_base_it2").units, layer=7, name="other")
    with pytest.raises(UnitMakingError, match="layers 0 to 2"):
        make_units(other, trained, manifest, mesh)
    made = prepare(corpus.parent / "audio", out=tmp_path / "again", workers=1, progress=False, join_seconds=3.0)
    with pytest.raises(UnitsError, match="another corpus"):
        UnitStore.load(store.directory, made.manifest)


def test_units_do_not_depend_on_devices(trained, heard, tmp_path):
    manifest = Manifest.load(heard)
    cfg = small("hubert_base_it1").units
    one = make_units(cfg, tmp_path, manifest, make_mesh(MeshConfig(), devices=jax.devices()[:1]))
    eight = UnitStore.load(UnitFiles(trained, cfg.name).store, manifest)
    same = np.mean([np.mean(one.read(i) == eight.read(i)) for i in range(len(manifest))])
    assert same > 0.99


def test_units_are_fitted_on_training_audio_only(corpus):
    manifest = Manifest.load(corpus)
    rows = fit_sample(manifest, hours=0.003, exponent=0.0, seed=0)
    assert (manifest.split[rows] == 0).all()
    seconds = manifest.samples[rows].sum() / 16_000
    assert 0.003 * 3600 <= seconds <= 0.003 * 3600 + 3 * manifest.samples.max() / 16_000
    assert len(np.unique(manifest.language[rows])) == 3


def test_what_a_stage_needs_is_named(corpus, trained, tmp_path):
    with pytest.raises(CheckpointError, match="experiments train hubert_base_it1"):
        train_stage(small("hubert_base_it2"), workdir=tmp_path, corpus=corpus)
    changed = dataclasses.replace(small("wavlab_mk"), data=dataclasses.replace(small("wavlab_mk").data, seed=9))
    with pytest.raises(StageError, match=r"data.seed: 2 then, 9 now"):
        train_stage(changed, workdir=trained, corpus=corpus)


def test_a_finished_stage_refuses_another_corpus(trained, heard, corpus, tmp_path):
    cfg = small("hubert_base_it1")
    train_stage(cfg, workdir=trained, corpus=heard)
    with pytest.raises(ManifestError):
        train_stage(cfg, workdir=trained, corpus=tmp_path / "nowhere")
    other = prepare(corpus.parent / "audio", out=tmp_path / "other", workers=1, progress=False, join_seconds=3.0)
    now = Manifest.load(heard).fingerprint, other.manifest.fingerprint
    for act in (train_stage, evaluate_stage):
        with pytest.raises(
            CorpusChanged, match=f"{now[0]} then, {now[1]} now; give --corpus .* or another --workdir"
        ) as told:
            act(cfg, workdir=trained, corpus=other.root)
        assert "hours of swa: " in str(told.value)


def test_other_rules_of_the_draw_are_refused_in_the_middle_of_a_run(trained, heard, tmp_path):
    cfg, files = small("hubert_base_it1"), StageFiles(tmp_path, "hubert_base_it1")
    shutil.copytree(trained / "units", tmp_path / "units")
    shutil.copytree(StageFiles(trained, cfg.name).folder, files.folder)
    files.finished.unlink()
    before = json.loads(files.data.read_text())
    files.data.write_text(json.dumps({**before, "draw rules": 1}))
    with pytest.raises(StageError, match=f"draw rules: 1 then, {before['draw rules']} now\ngive another --workdir"):
        train_stage(cfg, workdir=tmp_path, corpus=heard)
    files.data.unlink()
    with pytest.raises(StageError, match="draw rules: those before they were noted then"):
        train_stage(cfg, workdir=tmp_path, corpus=heard)


def test_a_finished_stage_without_its_last_checkpoint_is_not_finished(trained, heard, tmp_path, monkeypatch):
    """Of a damaged checkpoint, its folder is deleted; the same command then goes on."""
    cfg, files = small("hubert_base_it1"), StageFiles(tmp_path, "hubert_base_it1")
    shutil.copytree(StageFiles(trained, cfg.name).folder, files.folder)
    monkeypatch.setattr(run, "make_labels", lambda *_: 1 / 0)  # the first thing that is not done for a finished stage
    train_stage(cfg, workdir=tmp_path, corpus=heard)
    shutil.rmtree(files.checkpoints / "6")
    with pytest.raises(CheckpointError, match="experiments train hubert_base_it1"):
        evaluate_stage(cfg, workdir=tmp_path, corpus=heard)
    with pytest.raises(ZeroDivisionError):
        train_stage(cfg, workdir=tmp_path, corpus=heard)


def test_a_corpus_with_too_little_for_a_step_is_told_before_units_are_made(corpus, tmp_path):
    cfg = small("hubert_base_it1")
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, seconds_per_step=2000.0))
    with pytest.raises(SamplingError, match="crops"):
        train_stage(cfg, workdir=tmp_path, corpus=corpus)
    with pytest.raises(SamplingError, match="crops"):
        steps.units(cfg, cfg.units, tmp_path, corpus)
    assert not (tmp_path / "units").exists()
