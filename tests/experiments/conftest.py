"""A prepared small corpus, stages cut down to seconds, and a recipe of them that ran to its end."""

import dataclasses
import shutil
import subprocess
import sys

import jax
import pytest

from data_pipelines.prepare import prepare
from experiments import __main__ as launcher
from experiments import evaluate, recipes, run, steps
from experiments.probe_clips import ProbesConfig
from experiments.stage_files import StageFiles
from experiments.stages import STAGES, stage_function
from experiments.units import UnitsConfig
from tests.experiments.small_corpus import write_alignments, write_corpus
from tests.wavlab_jax import tiny
from wavlab_jax.clock import TIMES
from wavlab_jax.heads import HeadConfig
from wavlab_jax.metrics import read_lines
from wavlab_jax.sharding import make_mesh

# Once they have the tiny encoder below, they differ from others that the suite trains in their data alone; `make soak`
# trains them too.
TWINS = ("cv_hubert_base", "wavlab_ek", "wavlm_base_plus", "wavlm_large", "xlsr_300m", "xlsr_2b", "mhubert_147_it3")


def small(name: str, *, steps: int = 6):
    """A stage's demo form with a tiny encoder and few steps: what the suite trains."""
    cfg = stage_function(name, size="demo")()
    if isinstance(cfg.learner.head, HeadConfig):
        head = dataclasses.replace(cfg.learner.head, units=tiny.UNITS, dim=8)
    else:
        head = dataclasses.replace(cfg.learner.head, dim=8, codevector_dim=8, codes=4)
    learner = dataclasses.replace(
        cfg.learner,
        encoder=tiny.encoder(normalize_waveform=True, pre_norm=True, relative_bias=True),
        head=head,
        optimizer=dataclasses.replace(cfg.learner.optimizer, warmup_steps=2, total_steps=steps),
    )
    lengths = (16_000, 32_000) if name in ("hubert_base_it1", "wavlab_ms") else (32_000,)  # each is compiled for
    data = dataclasses.replace(cfg.data, lengths=lengths, seconds_per_step=8.0, threads=1)
    units = cfg.units and dataclasses.replace(cfg.units, units=tiny.UNITS)
    if isinstance(units, UnitsConfig):
        units = dataclasses.replace(units, layer=min(units.layer, 2), fit_hours=0.01)
    loop = dataclasses.replace(cfg.loop, steps=steps, log_every=2, save_every=3)
    return dataclasses.replace(cfg, learner=learner, data=data, units=units, loop=loop)


def probed(cfg, phones, *, only="wavlab_ms"):
    """The stage with probes every fourth step, if it is called so."""
    probes = ProbesConfig(every=4, clips=24, language_clips=60, alignments=str(phones), phone_clips=24, phone_units=8)
    return dataclasses.replace(cfg, probes=probes) if cfg.name == only else cfg


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A prepared corpus folder."""
    folder = tmp_path_factory.mktemp("corpus")
    audio = write_corpus(folder / "audio")
    prepare(audio, out=folder / "prepared", workers=1, progress=False, join_seconds=2.0, min_seconds=2.0)
    return folder / "prepared"


@pytest.fixture(scope="session", autouse=True)
def two_devices():
    """Stages run on two of the eight devices, which compiles in half the time; `trained` has one that runs on all."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (run, steps, evaluate):
            patch.setattr(module, "make_mesh", lambda cfg: make_mesh(cfg, devices=jax.devices()[:2]))
        yield


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """The demo's recipe with tiny stages, the last of which is probed: its workdir, in which it ran once."""
    folder = tmp_path_factory.mktemp("recipe with spaces")
    audio = write_corpus(folder / "audio", clips=20)
    phones = write_alignments(audio, folder / "phones")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "stage_function", lambda name, size: lambda: probed(small(name), phones))
        patch.setitem(recipes.RECIPES, "demo", lambda workdir, _: recipes.multi_stage(workdir, audio, size="demo"))
        patch.setattr(recipes, "git_commit", lambda: "abc1234")
        recipes.run_recipe("demo", folder / "work")
    return folder / "work"


@pytest.fixture(scope="session")
def trained(recipe, tmp_path_factory):
    """A workdir of its own with what the recipe left, in which every other stage but the `TWINS` was trained too."""
    workdir = tmp_path_factory.mktemp("trained") / "work"
    shutil.copytree(recipe, workdir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_mesh", make_mesh)  # on all eight devices
        for name in (name for name in STAGES if name not in TWINS and not StageFiles(workdir, name).finished.exists()):
            run.train_stage(small(name), workdir=workdir, corpus=workdir / "corpus")
    return workdir


@pytest.fixture(scope="session")
def heard(trained):
    """The corpus that the stages of `trained` heard."""
    return trained / "corpus"


def lines(workdir, name):
    """A stage's metrics without what depends on the clock."""
    found = read_lines(StageFiles(workdir, name).metrics / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in found]


@pytest.fixture
def answer(monkeypatch, capsys):
    """The launcher's `main` in this process: a function of the arguments that gives what `launch` gives."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["python -m experiments", *arguments])
        try:
            status = launcher.main()
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, status, said.out, said.err)

    return run
