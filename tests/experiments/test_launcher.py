"""The command line: as a process, as it is shipped, and most of its answers in this one, where imports are done."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments import __main__ as launcher
from experiments import hosts
from experiments.stages import STAGES
from wavlab_jax.encoder.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]


def launch(*arguments, module="experiments"):
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)


def test_list_names_every_stage_and_architecture():
    found = launch("list")
    assert found.returncode == 0, found.stderr
    stages, architectures = (part.splitlines()[1:] for part in found.stdout.split("\n\n"))
    assert [line.split()[0] for line in stages] == list(STAGES)
    assert [line.split()[0] for line in architectures] == list(ARCHITECTURES)


def test_show_takes_an_architecture(answer):
    found = answer("show", "xls_r_2b")  # 8.6 GB of parameters, of which none is made
    assert found.returncode == 0, found.stderr
    assert "encoder.width = 1920\n" in found.stdout and "2,159,259,648 parameters in the encoder" in found.stdout
    wrong = answer("show", "xlsr53")
    assert wrong.returncode == 1 and "xlsr_53" in wrong.stderr


def test_show_prints_values_overrides_and_parameters():
    found = launch("show", "wavlab_ms", "--size", "demo", "--learner.optimizer.peak-learning-rate", "0.25")
    assert found.returncode == 0, found.stderr
    assert "learner.optimizer.peak_learning_rate = 0.25\n" in found.stdout
    assert "data.draw.language_exponent = 0.3\n" in found.stdout
    assert re.search(r"[\d,]+ parameters in the encoder", found.stdout)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("trian", "wavlab_mk"), "nearest: train"),
        (("train", "wavlab_km"), "the nearest: wavlab_m"),
        (("show", "wavlab_mk", "--size", "tiny"), "paper, demo"),
        (("show", "wavlab_mk", "--learner.optimizer.peak-learning-rat", "1"), "peak-learning-rate"),
        (("show", "wavlab_mk", "--loop.steps", "many"), "loop.steps"),
        (("recipe", "dmeo"), "nearest: demo"),
        (("train",), "usage"),
        (("evaluate", "wavlab_mk", "--workdir", "/nonexistent", "--size", "demo"), "/nonexistent"),
        (("export", "wavlab_mk", "--workdir", "/nonexistent", "--out", "/nonexistent/out"), "experiments train"),
        (("show", "hubert_base_it1", "--learner.encoder.heads", "5"), "error: width 768 is not a multiple of heads"),
    ],
)
def test_mistakes_are_answered_without_a_traceback(answer, arguments, expected):
    found = answer(*arguments)
    assert found.returncode != 0
    assert expected in found.stderr + found.stdout and "Traceback" not in found.stderr


def test_a_mistake_ends_the_process_with_one_line():
    found = launch("show", "hubert_base_it1", "--learner.encoder.heads", "5")
    assert found.returncode == 1 and found.stderr == "error: width 768 is not a multiple of heads 5\n"


def test_a_device_without_memory_is_told_what_takes_less(answer, monkeypatch):
    def full(arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9663676416 bytes.")

    monkeypatch.setitem(launcher.VERBS, "train", full)
    found = answer("train", "wavlab_mk")
    assert found.returncode == 1 and "Traceback" in found.stderr
    assert found.stderr.splitlines()[-1].startswith("error: out of memory. ") and "--seconds-per-device" in found.stderr


def test_an_error_of_any_class_ends_one_of_several_processes_at_once(answer, monkeypatch):
    """Python's own way out leads through jax, which would wait there for the others, as they wait for this one."""
    left = []
    monkeypatch.setattr(hosts, "leave", left.append)
    monkeypatch.setitem(launcher.VERBS, "train", lambda arguments: {}["absent"])
    found = answer("train", "wavlab_mk")
    assert found.returncode == 1 and left == [1] and "KeyError: 'absent'" in found.stderr


def test_a_closed_connection_ends_one_of_several_processes_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(hosts, "leave", left.append)
    monkeypatch.setattr(sys, "argv", ["python -m experiments", "train", "wavlab_mk"])
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # it is pytest's stdout here

    def closed(arguments):
        raise BrokenPipeError

    monkeypatch.setitem(launcher.VERBS, "train", closed)
    assert launcher.main() == 141 and left == [141]


def test_help_of_every_verb(answer):
    assert "recipe NAME" in answer().stdout
    for verb in ("show", "train", "units", "quality", "evaluate"):
        found = answer(verb, "wavlab_mk", "--help")
        assert found.returncode == 0 and "--workdir" in found.stdout
    assert launch("prepare", "--help", module="data_pipelines").returncode == 0


def test_every_command_of_the_readme_exists(answer):
    text = (ROOT / "README.md").read_text()
    verbs = set(re.findall(r"-m experiments (\w+)", text)) | set(re.findall(r"`(\w+) STAGE`", text))
    known = set(re.findall(r"^    (\w+)", answer().stdout, re.MULTILINE))
    assert verbs and verbs <= known
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", text)) <= targets
