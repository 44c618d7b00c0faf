"""What a card says of the stages that led to a model, from their files alone."""

import json

from data_pipelines.manifest import Manifest, write_manifest
from experiments import stage_card
from experiments.stage import as_text
from experiments.stage_files import StageFiles
from experiments.stages import STAGES, stage_function

SHARES = {
    "eng": {"hours": 90.0, "natural": 0.9, "drawn": 0.6, "heard": 120.0, "epochs": 4 / 3},
    "gle": {"hours": 10.0, "natural": 0.1, "drawn": 0.4, "heard": 80.0, "epochs": 8.0},
}


def write_stages(workdir) -> None:
    for name in STAGES:
        files = StageFiles(workdir, name)
        files.folder.mkdir(parents=True)
        files.config.write_text(as_text(stage_function(name)()))
        files.inputs.write_text(json.dumps({"corpus": "abc", "units": "{}"}))
        (files.folder / "shares.json").write_text(json.dumps(SHARES))


def test_stages_are_told_oldest_first_through_parents_and_teachers(tmp_path):
    write_stages(tmp_path)
    lineage = stage_card.lineage_of(tmp_path, "wavlab_ms")
    assert list(lineage.configs) == ["hubert_base_it1", "hubert_base_it2", "wavlab_mk", "wavlab_ms"]
    assert lineage.imported == {}
    told = stage_card.sections(tmp_path, "wavlab_ms", None)
    rows = [
        line for line in told["Training"].splitlines() if line.startswith("| wavlab") or line.startswith("| hubert")
    ]
    assert rows[0].startswith("| hubert_base_it1 | random values | 100 k-means of MFCC | 250,000 |")
    assert rows[-1] == (
        "| wavlab_ms | wavlab_mk | 500 k-means of layer 9 of hubert_base_it2 | 40,000 | 32,000.00 | 5e-05 | 0.3 | 20% |"
    )
    assert "100.00 hours of training audio in 2 languages" in told["Data"]
    assert "| Irish | gle | 10.000 | 10.00% | 40.00% | 8.00 |" in told["Data"] and "`abc`" in told["Data"]
    assert stage_card.languages(tmp_path, "wavlab_ms") == ["eng", "gle"]
    assert stage_card.papers(tmp_path, "wavlab_ms") == ("hubert", "wavlablm")
    assert stage_card.papers(tmp_path, "hubert_base_it2") == ("hubert",)


def test_only_the_corpus_that_the_stage_heard_is_named(tmp_path, monkeypatch):
    load = Manifest.load
    monkeypatch.setattr(Manifest, "load", lambda root: load(root, check_shards=False))
    write_stages(tmp_path)
    write_manifest(tmp_path, samples=[16_000] * 2, language=["eng", "gle"], corpus=["read", "spoken"])
    told = stage_card.sections(tmp_path, "wavlab_ms", tmp_path)["Data"]
    assert stage_card.NOT_THERE in told and "spoken" not in told
    heard = {"corpus": load(tmp_path, check_shards=False).fingerprint, "units": "{}"}
    StageFiles(tmp_path, "wavlab_ms").inputs.write_text(json.dumps(heard))
    told = stage_card.sections(tmp_path, "wavlab_ms", tmp_path)["Data"]
    assert "Corpora: read, spoken." in told and stage_card.NOT_THERE not in told
