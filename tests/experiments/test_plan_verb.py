"""`plan` as it is typed: for GPUs that are not here, with a corpus, and what it refuses."""

import dataclasses
import json

import pytest

from benchmarks.plans import tables
from experiments import __main__ as launcher
from experiments import plan as plans
from experiments.plan import PlanConfig
from experiments.stage import StageError
from experiments.stages import stage_function
from tests.experiments.conftest import small
from wavlab_jax.compiled_program import Program
from wavlab_jax.plan import Compiled, Memory


def test_a_plan_for_gpus_with_a_corpus(corpus, monkeypatch, capsys):
    """Everything that is asked of a plan is in it, and adds up."""
    stage = dataclasses.replace(small("hubert_base_it1", steps=900), seconds_per_device=2.0)
    monkeypatch.setattr(launcher, "stage_function", lambda name, size: lambda: stage)
    arguments = "hubert_base_it1 --chips 8 --chip a100-80 --mesh.fsdp 2 --utilisation 0.5 --search False --json".split()
    launcher.plan([*arguments, "--corpus", str(corpus)])
    found = json.loads(capsys.readouterr().out)
    assert found["devices"]["mesh"] == {"data": 4, "fsdp": 2} and "an estimate" in found["devices"]["compiled_by"]
    flops, run, memory = found["flops_per_step"], found["run"], found["memory"]
    assert 0.97 < flops["ratio"] < 1.05 and found["unexplained"] == [] and found["fits"]
    assert found["extrapolated_seconds_per_chip"] > found["step"]["seconds_per_chip_and_pass"]
    assert run["audio_hours"] == 900 * stage.data.seconds_per_step / 3600
    assert run["chip_hours"] == pytest.approx(900 * flops["formula"] / (312e12 * 0.5) / 3600)
    # what the formula counts of state and batch is what the compiler was given
    assert memory["parameters"] == found["memory_by_formula"]["parameters"]
    assert memory["batch"] == pytest.approx(found["memory_by_formula"]["batch"], rel=0.05)
    heard = sum(row["heard"] for row in found["languages"].values())
    assert heard == pytest.approx(run["audio_hours"], rel=0.02)
    text = plans.table(found)
    assert "8 a100-80 (data 4 x fsdp 2)" in text and "chip-hours" in text and "swa" in text
    full = plans.table(found | {"fits": False})  # by an estimate, which leaves some of the memory to others
    assert "does not fit        this step needs more than 72.0 GiB of 80.0, the most that is planned" in full
    page = tables({"a plan": found, "another": found | {"does_not_fit": "8 GiB too many"}})
    assert page.count("| a plan | ") == page.count("| another | ") == 3 and "| data 4 x fsdp 2 | " in page


def test_a_plan_must_say_for_what():
    stage = stage_function("wavlab_mk")()
    for config in (PlanConfig(), PlanConfig(topology="v5e:2x2", chips=4), PlanConfig(chips=4)):
        with pytest.raises(StageError, match="--chip"):
            plans.plan_stage(stage, config)
    for chips in (0, -4):
        with pytest.raises(StageError, match="--chips N, at least 1"):
            plans.plan_stage(stage, PlanConfig(chips=chips, chip="h100"))
    with pytest.raises(StageError, match="leave out --chip h100"):
        plans.plan_stage(stage, PlanConfig(topology="v5e:16x16", chip="h100", compile=False))
    with pytest.raises(StageError, match="share of the peak"):
        plans.plan_stage(stage, PlanConfig(chips=4, chip="h100", utilisation=40.0))


def test_a_plan_that_does_not_fit_says_what_takes_less(monkeypatch):
    def refuse(*_, **__):
        raise plans.DoesNotFit("Ran out of memory")

    for compile_step in (refuse, lambda *_, **__: Compiled(Memory(2**36, 2**34, 0, 0, 0), Program(0.0, ()))):
        monkeypatch.setattr(plans.plan, "compile_step", compile_step)
        found = plans.plan_stage(stage_function("wavlab_mk")(), PlanConfig(chips=8, chip="h100", search=False))
        text = plans.table(found)
        assert "does not fit        " in text and "note: this step does not fit. Training takes less" in text


def test_a_plan_by_formula_alone_compiles_nothing(monkeypatch):
    monkeypatch.setattr(plans.plan, "compile_step", None)
    found = plans.plan_stage(stage_function("wavlab_mk")(), PlanConfig(chips=8, chip="h100", compile=False))
    assert "memory" not in found and found["memory_by_formula"]["total"] > 4 * found["memory_by_formula"]["parameters"]
    text, page = plans.table(found), tables({"a plan": found})
    assert "by formula alone" in text and "does not fit" not in text and page.count("not compiled") == 2
