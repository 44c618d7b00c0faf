"""Every stage: its golden text, its parameters, and what must hold between stages."""

import dataclasses
from pathlib import Path

import pytest

from data_pipelines.mixing import MixingConfig
from experiments.__main__ import parse_stage
from experiments.commands import QualityCommand, StageCommand
from experiments.stage import StageError, as_started, as_text, beginning, check_unchanged, flatten
from experiments.stage_files import StageFiles
from experiments.stages import SIZES, STAGES, run_of, stage_function
from wavlab_jax.model import abstract_parameters, count
from wavlab_jax.train import LoopConfig, LoopError

GOLDEN = Path(__file__).parent / "golden"
EVERY = [(name, size) for name in STAGES for size in SIZES]


@pytest.mark.parametrize(("name", "size"), EVERY)
def test_the_golden_text_stands(name, size):
    """After a meant change: `python tests/experiments/test_stages.py`, and look at the diff."""
    assert as_text(stage_function(name, size=size)()) == (GOLDEN / f"{name}.{size}.txt").read_text()


@pytest.mark.parametrize(("name", "size"), EVERY)
def test_a_stage_knows_its_name_and_its_teachers(name, size):
    cfg = stage_function(name, size=size)()
    assert cfg.name == name
    teacher = getattr(cfg.units, "teacher", None)
    for other in filter(None, (teacher, cfg.init_from)):
        if other not in STAGES:  # a model from elsewhere: the lab book says which, and how it comes here
            assert f"--out {other}" in STAGES[name].__doc__ and size == "paper"
            continue
        before = stage_function(other, size=size)()
        assert list(STAGES).index(other) < list(STAGES).index(name)
        if other == teacher:
            assert cfg.units.layer <= before.learner.encoder.layers
        else:
            assert before.learner.encoder == cfg.learner.encoder and before.units == cfg.units


def test_parameter_counts_are_the_published_ones():
    base = abstract_parameters(*_shapes("hubert_base_it1"))
    large = abstract_parameters(*_shapes("wavlab_mk"))
    assert count(base["encoder"]) == 94_371_712  # transformers' HubertModel of facebook/hubert-base-ls960's config
    assert count(large["encoder"]) == 315_435_136  # Large without convolution biases, as fairseq trains it


def _shapes(name):
    learner = stage_function(name)().learner
    return learner.encoder, learner.head


def test_stage_2_and_its_control_differ_in_the_draw_alone():
    for size in SIZES:
        balanced = flatten(stage_function("wavlab_ms", size=size)())
        control = flatten(stage_function("wavlab_mk_continued", size=size)())
        assert {key for key in balanced if balanced[key] != control[key]} == {
            "name",
            "data.draw.language_exponent",
            "data.draw.corpus_exponent",
        }


def test_unknown_stages_are_answered_with_the_nearest():
    with pytest.raises(StageError, match="wavlab_mk"):
        stage_function("wavlabmk")
    with pytest.raises(StageError, match="paper, demo"):
        stage_function("wavlab_mk", size="huge")


def test_a_head_that_does_not_fit_its_units_is_refused():
    cfg = stage_function("wavlab_mk", size="demo")()
    with pytest.raises(StageError, match="100 classes but the units have 50"):
        dataclasses.replace(cfg, units=dataclasses.replace(cfg.units, units=50))
    with pytest.raises(StageError, match="100 classes but the units have 100 and 50"):
        dataclasses.replace(cfg, more_units=(dataclasses.replace(cfg.units, units=50),))


def test_a_changed_stage_is_refused_by_name_and_free_values_are_not(tmp_path):
    cfg = stage_function("wavlab_mk", size="demo")()
    files = StageFiles(tmp_path, cfg.name)
    files.folder.mkdir(parents=True)
    files.config.write_text(as_text(cfg))
    check_unchanged(dataclasses.replace(cfg, seconds_per_device=7.0), files)
    younger = [line for line in as_text(cfg).splitlines(True) if "reverb" not in line and "init_head" not in line]
    files.config.write_text("".join(younger))
    check_unchanged(cfg, files)  # as if rooms did not exist yet when the run was started
    files.config.write_text(as_text(stage_function("hubert_base_it1", size="demo")()))
    check_unchanged(stage_function("hubert_base_it1", size="demo")(), files)  # mixes nothing in, by default one would
    files.config.write_text("".join(younger))
    reverb = dataclasses.replace(cfg.data.reverb, probability=0.3)
    with pytest.raises(StageError, match=r"data.reverb.probability: 0.0 then, 0.3 now"):
        check_unchanged(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, reverb=reverb)), files)
    optimizer = dataclasses.replace(cfg.learner.optimizer, peak_learning_rate=0.5)
    changed = dataclasses.replace(cfg, learner=dataclasses.replace(cfg.learner, optimizer=optimizer))
    with pytest.raises(StageError, match=r"learner.optimizer.peak_learning_rate: .* then, 0.5 now"):
        check_unchanged(changed, files)


def test_what_a_run_was_begun_with_outlasts_the_values_that_are_free(tmp_path):
    """Its forks and means are known by it, and it may go on with other ones, which stand in its config.txt then."""
    cfg = stage_function("wavlab_mk", size="demo")()
    files = StageFiles(tmp_path, cfg.name)
    files.folder.mkdir(parents=True)
    files.inputs.write_text("{}")
    found = []
    other = dataclasses.replace(cfg.learner, seed=9)
    free = dataclasses.replace(cfg, seconds_per_device=7.0, loop=dataclasses.replace(cfg.loop, keep=9))
    for each in (cfg, free, dataclasses.replace(cfg, learner=other)):
        files.config.write_text(as_text(each))
        found.append(beginning(files))
    assert found[0] == found[1] != found[2]
    files.inputs.unlink()
    with pytest.raises(StageError, match="wavlab_mk is not there any more.*bring it back"):
        beginning(files)


@pytest.mark.parametrize(("name", "size"), EVERY)
def test_a_stage_may_be_continued_as_it_was_begun(name, size, tmp_path):
    cfg, files = stage_function(name, size=size)(), StageFiles(tmp_path, name)
    files.folder.mkdir(parents=True)
    files.config.write_text(as_text(cfg))
    check_unchanged(cfg, files)
    assert as_started(cfg, files) == cfg
    data = dataclasses.replace(cfg.data, mixing=None if cfg.data.mixing else MixingConfig(), keep_clean=True)
    other = dataclasses.replace(cfg, data=data)
    with pytest.raises(StageError, match="data.mixing"):
        check_unchanged(other, files)


def test_a_stage_that_was_begun_is_read_back_from_its_text(tmp_path):
    given = ["hubert_base_it1", "--size", "demo", "--workdir", str(tmp_path)]
    values = ("--loop.steps", "77", "--data.lengths", "16000", "32000", "--data.draw.language-exponent", "0.5")
    begun = parse_stage("train", [*given, *values]).config
    files = StageFiles(tmp_path, begun.name)
    files.folder.mkdir(parents=True)
    text = as_text(begun).replace("init_head = False\n", "")  # a field that is younger than the run
    files.config.write_text(text)
    assert parse_stage("evaluate", given, as_it_was=True).config == begun
    assert parse_stage("train", given).config == stage_function(begun.name, size="demo")()
    fewer = parse_stage("evaluate", [*given, "--evaluation-rows", "3"], as_it_was=True).config
    assert fewer == dataclasses.replace(begun, evaluation_rows=3)
    paper = stage_function("wavlab_mk")()
    assert as_started(paper, StageFiles(tmp_path, "wavlab_mk")) is paper  # not begun


@pytest.mark.parametrize(("name", "size"), EVERY)
def test_a_run_under_a_name_of_its_own_is_read_back_from_its_text(name, size, tmp_path):
    begun = dataclasses.replace(stage_function(name, size=size)(), name="slower", evaluation_rows=3)
    files = StageFiles(tmp_path, "slower")
    files.folder.mkdir(parents=True)
    files.config.write_text(as_text(begun).replace("init_head = False\n", ""))
    assert run_of(tmp_path, "slower") == begun
    assert run_of(tmp_path, "slower@average") == dataclasses.replace(begun, name="slower@average")
    assert run_of(tmp_path, name) is None and run_of(tmp_path, "faster") is None


def test_verbs_take_a_run_under_a_name_of_its_own(tmp_path, answer):
    given = ("wavlab_mk", "--name", "mk_slower", "--continue-from", "wavlab_mk@7", "--workdir", str(tmp_path))
    shown = answer("show", *given)
    assert (
        shown.returncode == 0 and "name = 'mk_slower'\n" in shown.stdout and STAGES["wavlab_mk"].__doc__ in shown.stdout
    )
    absent = answer("evaluate", *given).stderr
    assert "experiments train mk_slower --workdir" in absent and "`train STAGE --name mk_slower ...`" in absent
    assert "no stage is called 'mk_slower'" in answer("train", "mk_slower", "--workdir", str(tmp_path)).stderr
    begun, files = parse_stage("train", list(given)).config, StageFiles(tmp_path, "mk_slower")
    files.folder.mkdir(parents=True)
    files.config.write_text(as_text(begun))
    own = ["mk_slower", f"--workdir={tmp_path}"]
    for verb, kind, as_it_was in (("train", StageCommand, False), ("quality", QualityCommand, True)):
        assert parse_stage(verb, own, kind, as_it_was=as_it_was).config == begun
    assert as_text(begun) in answer("show", *own).stdout
    told = answer("evaluate", *own).stderr
    assert f"run `python -m experiments train mk_slower --workdir {tmp_path}` first\n" in told
    told = answer("evaluate", "mk_slower@best", *own[1:]).stderr
    assert "run `python -m experiments average mk_slower --last N --name best --workdir" in told


@pytest.mark.parametrize("field", ["steps", "log_every", "save_every", "keep"])
def test_a_loop_that_cannot_run_is_refused(field):
    for value in (0, -1):
        with pytest.raises(LoopError, match=f"loop.{field} is {value}; it must be at least 1"):
            LoopConfig(**{field: value})
    assert getattr(LoopConfig(**{field: 1}), field) == 1


def test_a_negative_number_of_steps_is_not_traced():
    with pytest.raises(LoopError, match="loop.profile_steps is -3; give how many"):
        LoopConfig(profile_steps=-3)


@pytest.mark.parametrize(
    ("field", "value"),
    [("seconds_per_device", 0.0), ("seconds_per_device", -1.0), ("seconds_per_device", float("nan")),
     ("evaluation_rows", 0)],
)  # fmt: skip
def test_what_no_device_can_hold_is_refused(field, value):
    with pytest.raises(StageError, match=f"hubert_base_it1: {field} is {value:g}; it must be"):
        dataclasses.replace(stage_function("hubert_base_it1")(), **{field: value})


if __name__ == "__main__":
    for stage, of_size in EVERY:
        (GOLDEN / f"{stage}.{of_size}.txt").write_text(as_text(stage_function(stage, size=of_size)()))
