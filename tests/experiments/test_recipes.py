"""A whole recipe on a small corpus: every step, the report, and what running it again does."""

import dataclasses
import json
import shutil

import pytest

from data_pipelines.prepare import prepare
from experiments import recipes, steps
from experiments.stage import StageError
from tests.experiments.conftest import probed, small
from tests.experiments.small_corpus import write_corpus

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def same_recipe(recipe, monkeypatch):
    """`run_recipe("demo")` means the recipe of `recipe` in this file."""
    audio, phones = recipe.parent / "audio", recipe.parent / "phones"
    monkeypatch.setattr(recipes, "stage_function", lambda name, size: lambda: probed(small(name), phones))
    monkeypatch.setitem(recipes.RECIPES, "demo", lambda workdir, _: recipes.multi_stage(workdir, audio, size="demo"))
    monkeypatch.setattr(recipes, "git_commit", lambda: "abc1234")


def test_the_report_stands_on_every_step(recipe):
    page = (recipe / "report.html").read_text()
    assert "control" in page and "Swahili" in page
    results = json.loads((recipe / "results.json").read_text())
    assert len(results["steps"]) == 16 and all(step["note"] for step in results["steps"])
    assert [row["stage"] for row in results["accuracy"]][-3:] == ["wavlab_mk", "wavlab_ms", "wavlab_mk_continued"]
    assert {row["units"] for row in results["units"]} == {12} and len(results["units"]) == 3
    assert len(results["low_resource"]["differences"]) == 2 and results["probe"]["rows"]
    for row in (*results["low_resource"]["differences"], *results["probe"]["differences"]):
        assert row["clips"] > 0
    for row in results["accuracy"]:
        total = row["total"]
        assert total["times_trivial"] == total["accuracy"] / max(total["majority"], total["copy"])
    assert {row["stage"]: row["continues"] for row in results["curves"]} == {
        "hubert_base_it1": None,
        "hubert_base_it2": "hubert_base_it1",
        "wavlab_mk": "hubert_base_it2",
        "wavlab_ms": "wavlab_mk",
        "wavlab_mk_continued": "wavlab_mk",
    }
    assert (recipe / "export" / "config.json").exists()


def test_again_with_nothing_left_to_do_changes_no_result(recipe, monkeypatch):
    """Not even if another commit on another machine draws the report again."""
    before = {name: (recipe / name).read_bytes() for name in ("results.json", "report.html", "times.json")}
    monkeypatch.setattr(recipes, "git_commit", lambda: "another")
    monkeypatch.setattr(recipes, "describe_machine", lambda: {"processor": "another"})
    recipes.run_recipe("demo", recipe)
    assert {name: (recipe / name).read_bytes() for name in before} == before
    results = json.loads(before["results.json"])
    assert results["commit"] == "abc1234" and results["machine"]["cores"] and results["finished"]


def test_again_does_what_is_missing_and_nothing_else(recipe, capsys):
    shutil.rmtree(recipe / "export")
    recipes.run_recipe("demo", recipe)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("]")[1].strip() for line in lines if line.startswith("[")] == ["export wavlab_ms"]


def test_a_stage_that_was_changed_since_is_not_taken_for_done(recipe, monkeypatch):
    monkeypatch.setattr(recipes, "stage_function", lambda name, size: lambda: small(name, steps=7))
    with pytest.raises(StageError, match="loop.steps: 6 then, 7 now"):
        recipes.run_recipe("demo", recipe)


def test_other_audio_is_noticed(tmp_path):
    audio = write_corpus(tmp_path / "audio", clips=2)

    def digests():
        return [step.made_with for step in recipes.multi_stage(tmp_path, audio, size="demo")]

    before = digests()
    assert digests() == before
    steps.prepare_corpus(audio, tmp_path / "corpus")
    with open(audio / "manifest.tsv", "a") as table:
        table.write("swa/more.wav\tswa\tread\tx\ttrain\n")
    shutil.copy(audio / "swa" / "read-0.wav", audio / "swa" / "more.wav")
    assert not set(digests()) & set(before)
    with pytest.raises(StageError, match="something else: clips were 12, are 13.*; give the recipe another --workdir"):
        steps.prepare_corpus(audio, tmp_path / "corpus")


def test_recipes_of_the_papers_size_are_planned_without_running_anything(tmp_path, capsys):
    with pytest.raises(recipes.RecipeError, match="give --corpus CORPUS"):
        recipes.run_recipe("wavlablm", tmp_path / "work")
    for name, stages, last in (("wavlablm", 5, "wavlab_ms"), ("cv_hubert", 2, "cv_hubert_base")):
        assert recipes.run_recipe(name, tmp_path / "work", corpus=tmp_path / "corpus", plan_only=True) is None
        said = capsys.readouterr().out.splitlines()
        assert sum(" train " in line for line in said) == stages and all("to do" in line for line in said[1:])
        assert f"export {last}" in said[-1]
    assert not (tmp_path / "work").exists()
    steps_of = recipes.cv_hubert(tmp_path, tmp_path / "corpus")
    assert [step.name for step in steps_of][:3] == ["units mfcc", "train hubert_base_it1", "evaluate hubert_base_it1"]


@pytest.mark.soak
def test_a_recipe_on_a_corpus_that_lies_elsewhere_ends_in_its_report(tmp_path, monkeypatch):
    corpus = tmp_path / "prepared"
    prepare(write_corpus(tmp_path / "audio", clips=20), out=corpus, workers=1, progress=False, min_seconds=2.0)
    stages = [small("hubert_base_it1", steps=4), small("cv_hubert_base", steps=4)]
    stages[1] = dataclasses.replace(stages[1], init_from=None)

    def chain(workdir, corpus):
        return recipes.chain(
            workdir, stages, judged=[cfg.name for cfg in stages], exported="cv_hubert_base", corpus=corpus
        )

    monkeypatch.setitem(recipes.RECIPES, "cv_hubert", chain)
    report = recipes.run_recipe("cv_hubert", tmp_path / "work", corpus=corpus)
    assert "CV-HuBERT" in report.read_text()
