"""A stage that goes on from an imported model, and what is exported of it and of the model itself."""

import dataclasses
import importlib.machinery
import os
import sys
import types

import jax
import numpy as np
import pytest

from experiments.export import check, export_model
from experiments.run import inherit, train_stage
from experiments.stage import StageError
from experiments.trained import imported_model, lineage, load_encoder, load_model
from experiments.verify import VerifyError, table
from tests.experiments.conftest import small
from tests.wavlab_jax import tiny
from wavlab_jax.checkpoint import CheckpointError
from wavlab_jax.convert import ConvertError, export_huggingface, from_encoder, to_encoder
from wavlab_jax.convert.layouts import LAYOUTS, read_checkpoint, write_checkpoint
from wavlab_jax.model import parameters
from wavlab_jax.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.once

NAME = "hubert_base_it1"


def continuing(path, **changes):
    """A tiny stage that goes on from `path` and learns nothing, so that what it began with can be looked at."""
    cfg = small(NAME, steps=3)
    still = dataclasses.replace(cfg.learner.optimizer, peak_learning_rate=0.0)
    learner = dataclasses.replace(cfg.learner, optimizer=still)
    loop = dataclasses.replace(cfg.loop, log_every=3, save_every=3)
    return dataclasses.replace(cfg, learner=learner, loop=loop, init_from=str(path), **changes)


@pytest.fixture(scope="module")
def model():
    """An encoder like those of the small stages, with a head for as many units."""
    rng = np.random.default_rng(0)
    shapes = {"final_proj.weight": (8, 16), "final_proj.bias": (8,), "label_embeddings": (tiny.UNITS, 8)}
    head = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return from_encoder(tiny.randomised(small(NAME).learner.encoder, seed=3), head=head)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """That model as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("imported") / "published"
    write_checkpoint(model, path, layout="huggingface")
    return path


@pytest.fixture(scope="module")
def workdir(folder, corpus, tmp_path_factory):
    """A workdir in which the tiny stage went on from the folder, head and all."""
    path = tmp_path_factory.mktemp("workdir")
    train_stage(continuing(folder, init_head=True), workdir=path, corpus=corpus)
    return path


def test_encoder_and_head_are_continued(workdir, model):
    trained = load_model(workdir, NAME, make_mesh(MeshConfig()))
    ours, theirs = jax.tree.leaves(trained.encoder), jax.tree.leaves(to_encoder(model))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(trained.head.embeddings[...], model.heads["label_embeddings"].values())
    np.testing.assert_array_equal(trained.head.projection.kernel[...], model.heads["final_proj.weight"].values().T)


def test_a_finished_stage_stays_as_it_is(workdir, folder, corpus):
    train_stage(continuing(folder, init_head=True), workdir=workdir, corpus=corpus)
    with pytest.raises(StageError, match="init_head: True then, False now"):
        train_stage(continuing(folder), workdir=workdir, corpus=corpus)


def fresh_parameters(cfg):
    """What such a stage would begin with."""
    units, dim, width = cfg.learner.head.units, cfg.learner.head.dim, cfg.learner.encoder.width
    head = {
        "projection": {"kernel": np.zeros((width, dim)), "bias": np.zeros(dim)},
        "embeddings": np.zeros((units, dim)),
    }
    return {"encoder": parameters(tiny.randomised(cfg.learner.encoder)), "head": head}


def test_the_head_is_fresh_unless_asked_for(folder, tmp_path, capsys, model):
    cfg = continuing(folder)
    deeper = dataclasses.replace(cfg.learner, encoder=dataclasses.replace(cfg.learner.encoder, layers=4))
    cfg = dataclasses.replace(cfg, learner=deeper)
    fresh = fresh_parameters(cfg)
    taken = inherit(cfg, tmp_path, make_mesh(MeshConfig()))(fresh)
    assert taken.keys() == {"encoder"}
    said = capsys.readouterr()
    said = said.out + said.err
    assert f"continues {folder} (huggingface): {len(model.tensors)} tensors of the encoder" in said
    assert "fresh: layers 2 to 3 (19 parameters)" in said and "fresh: the head (--init-head True" in said
    taken = inherit(dataclasses.replace(cfg, init_head=True), tmp_path, make_mesh(MeshConfig()))(fresh)
    np.testing.assert_array_equal(taken["head"]["embeddings"], model.heads["label_embeddings"].values())


def test_what_cannot_be_continued_is_named(folder, tmp_path):
    cfg = continuing(folder)
    post = dataclasses.replace(cfg.learner, encoder=dataclasses.replace(cfg.learner.encoder, pre_norm=False))
    cfg = dataclasses.replace(cfg, learner=post)
    with pytest.raises(ConvertError, match="pre_norm is True there and False here"):
        inherit(cfg, tmp_path, make_mesh(MeshConfig()))(fresh_parameters(cfg))
    with pytest.raises(ConvertError, match="absent does not exist"):
        lineage(tmp_path, str(tmp_path / "absent"))


def test_another_model_under_the_path_is_noticed(folder, tmp_path, model):
    """The fingerprint is that of the values, wherever they lie and in whatever layout."""
    before = lineage(tmp_path, str(folder))
    write_checkpoint(model, tmp_path / "moved", layout="torchaudio")
    assert lineage(tmp_path, str(tmp_path / "moved")) == before
    export_huggingface(tiny.randomised(model.encoder, seed=4), tmp_path / "changed")
    assert lineage(tmp_path, str(tmp_path / "changed")) != before


def test_a_plain_name_is_a_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wavlab_mk").mkdir()
    assert imported_model(tmp_path / "work", "wavlab_mk") == type(tmp_path)("wavlab_mk")
    (tmp_path / "work" / "stages" / "wavlab_mk").mkdir(parents=True)
    assert imported_model(tmp_path / "work", "wavlab_mk") is None
    assert imported_model(tmp_path / "work", "no_such_stage") is None
    with pytest.raises(CheckpointError, match="experiments train no_such_stage"):
        lineage(tmp_path / "work", "no_such_stage")


def test_an_imported_teacher_lies_where_the_mesh_says(folder, model, tmp_path):
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    encoder = load_encoder(tmp_path, str(folder), mesh)
    leaf = encoder.layers.expand.kernel[...]
    assert leaf.sharding.mesh == mesh and tuple(leaf.sharding.spec) == (None, "fsdp", None)
    np.testing.assert_array_equal(np.asarray(leaf), to_encoder(model).layers.expand.kernel[...])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stage_is_exported_in_every_layout(layout, workdir, corpus, tmp_path, model):
    exported = export_model(
        NAME, workdir=workdir, corpus=corpus, out=tmp_path / "out", layout=layout, licence="cc0-1.0"
    )
    again = read_checkpoint(tmp_path / "out")
    assert again.encoder == model.encoder and again.model_type == "wavlm"
    if layout not in ("unilm", "s3prl"):
        assert again.settings["temperature"] == exported.checkpoint.settings["temperature"]
    for name, tensor in exported.checkpoint.heads.items():
        np.testing.assert_array_equal(again.heads[name].values(), tensor.values())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: cc0-1.0" in card and "language: [deu, eng, swa]" in card
    assert f"| {NAME} | published | {tiny.UNITS} k-means of MFCC | 3 |" in card
    assert "`published` was trained elsewhere" in card and str(tmp_path.parent) not in card
    assert "| Swahili (macrolanguage) | swa |" in card and "2106.07447" in card and "2110.13900" in card


@pytest.mark.torch
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exports_are_verified_layer_by_layer(layout, folder, tmp_path):
    exported = export_model(str(folder), workdir=tmp_path, corpus=None, out=tmp_path / "out", layout=layout)
    peers = check(exported, None)
    assert list(peers[0].differences) == [0, 1, 2] and peers[0].largest < 1e-4
    rows = [line.split()[0] for line in table(peers).splitlines()]
    assert "transformers" in peers[0].peer and [row for row in rows if row.isdigit()] == ["0", "1", "2"]


@pytest.mark.torch
def test_torchaudio_runs_its_own_class_where_it_can_be_imported(folder, tmp_path, monkeypatch):
    from tests.wavlab_jax import torchaudio_peer

    torchaudio = types.ModuleType("torchaudio")
    torchaudio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)  # transformers asks for it
    torchaudio.models = torchaudio_peer.models()
    exported = export_model(str(folder), workdir=tmp_path, corpus=None, out=tmp_path / "out", layout="torchaudio")
    monkeypatch.setitem(sys.modules, "torchaudio", torchaudio)
    _, peer = check(exported, None)
    assert list(peer.differences) == [1, 2] and peer.largest < 1e-4 and peer.peer.startswith("torchaudio")


@pytest.mark.torch
def test_an_export_that_computes_something_else_is_deleted(folder, tmp_path):
    exported = export_model(str(folder), workdir=tmp_path, corpus=None, out=tmp_path / "out")
    other = from_encoder(tiny.randomised(exported.checkpoint.encoder, seed=9))
    with pytest.raises(VerifyError, match="hidden states 0, 1, 2 differ from transformers"):
        check(exported._replace(checkpoint=other), None)
    assert os.listdir(tmp_path) == []
