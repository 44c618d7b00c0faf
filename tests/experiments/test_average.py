"""Means of a stage's checkpoints, which stand where a stage can, and runs that fork another one."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments.average import AverageError, average_stage
from experiments.evaluate import evaluate_stage
from experiments.export import export_model
from experiments.features import load_model as load_for_features
from experiments.run import inherit, train_stage, write_json
from experiments.stage import StageError
from experiments.stage_card import sections
from experiments.stage_files import StageFiles
from experiments.trained import lineage, load_encoder, load_model
from experiments.units import made_from
from tests.experiments.conftest import lines, small
from wavlab_jax.checkpoint import read_about, restore_parameters, steps_of
from wavlab_jax.model import parameters
from wavlab_jax.sharding import MeshConfig, make_mesh
from wavlab_jax.step import abstract_state

pytestmark = pytest.mark.once
NAME, MEAN = "hubert_base_it1", "hubert_base_it1@average"


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def averaged(corpus, tmp_path_factory):
    """A workdir with a trained stage, and the mean of its two checkpoints."""
    workdir = tmp_path_factory.mktemp("work")
    train_stage(small(NAME), workdir=workdir, corpus=corpus)
    average_stage(NAME, workdir=workdir, last=2)
    return workdir


def leaves(tree):
    return jax.tree.leaves(jax.device_get(tree))


def test_a_mean_stands_where_a_stage_can(averaged, corpus, mesh, tmp_path, answer):
    files, cfg = StageFiles(averaged, NAME), small(NAME)
    like = abstract_state(cfg.learner, mesh).params
    each = [leaves(restore_parameters(files.checkpoints, like, step=step)) for step in (3, 6)]
    mean = load_model(averaged, MEAN, mesh)
    for found, first, last in zip(leaves(parameters(mean)), *each, strict=True):
        np.testing.assert_array_equal(found, ((first.astype(np.float64) + last) / 2).astype(np.float32))
    # judged by the verb, as it was trained, and kept apart from its stage's own
    judged = evaluate_stage(dataclasses.replace(cfg, name=MEAN), workdir=averaged, corpus=corpus)
    assert judged["stage"] == MEAN and 0 < judged["total"]["accuracy"] < 1
    assert StageFiles(averaged, MEAN).evaluation.exists() and not files.evaluation.exists()
    told = answer("evaluate", MEAN, "--size", "demo", "--workdir", str(averaged), "--learner.seed", "9")
    assert told.returncode == 1 and "learner.seed: 0 then, 9 now" in told.stderr
    # exported, heard, continued, and taken as a teacher
    exported = export_model(MEAN, workdir=averaged, corpus=None, out=tmp_path / "hf")
    assert f"| {MEAN} |" in (exported.folder / "README.md").read_text()
    assert "mean of the parameters of 2 checkpoints, steps 3, 6" in (exported.folder / "README.md").read_text()
    assert load_for_features(MEAN, workdir=averaged) is not None
    assert load_encoder(averaged, MEAN, mesh).config == cfg.learner.encoder
    child = dataclasses.replace(small("hubert_base_it2"), init_from=MEAN)
    write_json(StageFiles(averaged, child.name).inputs, {"units": "others"})
    taken = inherit(child, averaged, mesh)({})["encoder"]
    for found, one in zip(leaves(taken), leaves(parameters(mean)["encoder"]), strict=True):
        np.testing.assert_array_equal(found, one)
    units = dataclasses.replace(child.units, teacher=MEAN)
    assert (
        json.loads(made_from(units, averaged, _Corpus()))["lineage"]
        == lineage(averaged, MEAN)
        != lineage(averaged, NAME)
    )


class _Corpus:
    fingerprint = "any"


def test_what_was_averaged_is_said_and_another_mean_is_refused(averaged, answer):
    files = StageFiles(averaged, MEAN)
    said = json.loads(files.inputs.read_text())["average_of"]
    assert (said["stage"], said["steps"]) == (NAME, [3, 6])
    assert read_about(files.checkpoints)["average_of"] == said
    assert average_stage(NAME, workdir=averaged, last=2).steps == [3, 6]
    with pytest.raises(AverageError, match="is another mean"):
        average_stage(NAME, workdir=averaged, last=1)
    scores = steps_of(StageFiles(averaged, NAME).checkpoints)
    found = answer("average", NAME, "--best", "1", "--name", "best", "--workdir", str(averaged))
    assert found.returncode == 0 and f"steps {min(scores, key=scores.get)}\n" in found.stdout, found.stderr
    told = answer("average", NAME, "--best", "3", "--workdir", str(averaged)).stderr
    assert "no 3 checkpoints, but 2 (step and training loss: 3 (" in told and "--loop.keep-best 3" in told
    assert "one of them" in answer("average", NAME, "--workdir", str(averaged)).stderr
    assert "is a mean of checkpoints, which is not trained" in answer("train", MEAN).stderr


def test_how_many_must_be_said(answer, tmp_path):
    for wrong in ((), ("--last", "0"), ("--best", "0"), ("--last", "-1"), ("--last", "1", "--best", "1")):
        told = answer("average", NAME, *wrong, "--workdir", str(tmp_path))
        assert told.returncode == 1 and told.stderr == "error: give --last N or --best N, one of them, at least 1\n"


def test_a_fork_takes_a_whole_state_and_goes_on_from_there(averaged, corpus, answer):
    """From step 3 of 6, with nothing changed but the name: the source's numbers, from there on."""
    cfg = small(NAME)
    fork = dataclasses.replace(cfg, name="fork", continue_from=f"{NAME}@3")
    train_stage(fork, workdir=averaged, corpus=corpus)
    own, source = lines(averaged, "fork"), lines(averaged, NAME)
    assert [line["step"] for line in own] == [4, 6]  # line 4 of the source sums steps 3 and 4, the fork's 4 alone
    for name in ("masked_loss", "gradient_norm", "learning_rate"):
        assert own[-1][name] == source[-1][name]
    begun = json.loads(StageFiles(averaged, "fork").inputs.read_text())["continue_from"]
    assert (begun["stage"], begun["step"]) == (NAME, 3)
    assert f"| fork | the whole state of {NAME}@3 |" in sections(averaged, "fork", None)["Training"]
    # its mean is judged and heard by the name that it was given
    places = ("--workdir", str(averaged))
    assert answer("average", "fork", "--last", "1", *places).returncode == 0
    judged = answer("evaluate", "fork@average", *places, "--corpus", str(corpus))
    assert judged.returncode == 0 and StageFiles(averaged, "fork@average").evaluation.exists(), judged.stderr
    assert load_for_features("fork", workdir=averaged) is not None
    for wrong, told in (
        (MEAN, "of an average there is no optimizer"),
        (f"{NAME}@6", "step 6; hubert_base_it1 keeps 3, 6, and this stage makes 6 steps"),
        (f"{NAME}@4", "step 4; hubert_base_it1 keeps 3, 6"),
        ("new", "is this stage itself"),
    ):
        with pytest.raises(StageError, match=told):
            train_stage(dataclasses.replace(cfg, name="new", continue_from=wrong), workdir=averaged, corpus=corpus)
    post = dataclasses.replace(cfg.learner.encoder, pre_norm=not cfg.learner.encoder.pre_norm)  # of equal shapes
    other = dataclasses.replace(cfg, name="new", learner=dataclasses.replace(cfg.learner, encoder=post))
    for said in ({"continue_from": f"{NAME}@3"}, {"init_from": MEAN}):
        with pytest.raises(StageError, match="new cannot go on from hubert_base_it1.*: pre_norm is "):
            train_stage(dataclasses.replace(other, **said), workdir=averaged, corpus=corpus)
    with pytest.raises(StageError, match="give one of them"):
        dataclasses.replace(cfg, init_from=NAME, continue_from=NAME)
