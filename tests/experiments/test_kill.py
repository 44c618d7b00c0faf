"""A stage that is killed with -9 and started again ends bit for bit where one that never was ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.stage_files import StageFiles
from tests.experiments.conftest import lines
from wavlab_jax.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parents[2]

KILLED = """
import sys
from pathlib import Path
from experiments.run import train_stage
from tests.experiments.conftest import small
train_stage(small("hubert_base_it1", steps=40), workdir=Path(sys.argv[1]), corpus=Path(sys.argv[2]))
"""


def parameters_of(workdir):
    from experiments.trained import load_model
    from wavlab_jax.model import parameters

    return jax.device_get(parameters(load_model(workdir, "hubert_base_it1", make_mesh(MeshConfig()))))


def run_killed(workdir, corpus, *, kill_after_lines=None):
    """Runs the stage in a process of its own; kills it with -9 once it has written that many lines of metrics."""
    command = [sys.executable, "-c", KILLED, str(workdir), str(corpus)]
    with open(workdir / "log", "a") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    path = StageFiles(workdir, "hubert_base_it1").metrics / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if kill_after_lines and path.exists() and path.read_text().count("\n") >= kill_after_lines:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.02)
    code = process.wait(10)
    assert code == (-9 if kill_after_lines else 0), (workdir / "log").read_text()[-2000:]


def test_kill_9_and_the_same_command_again_end_bit_for_bit_the_same(corpus, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    run_killed(whole, corpus)
    for after in (2, 8, 13):
        run_killed(killed, corpus, kill_after_lines=after)
    run_killed(killed, corpus)
    a, b = parameters_of(whole), parameters_of(killed)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    assert lines(whole, "hubert_base_it1") == lines(killed, "hubert_base_it1")
    assert [line["step"] for line in lines(killed, "hubert_base_it1")] == list(range(2, 41, 2))
