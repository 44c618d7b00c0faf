"""Runs stopped by Ctrl-C, kill -9 or a full disk, and started again, end bit for bit where one that never was ends."""

import contextlib
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.stage_files import StageFiles
from tests.experiments.conftest import lines
from tests.experiments.small_corpus import write_corpus
from tests.experiments.small_launcher import STAGE, STEPS
from wavlab_jax.checkpoint import steps_of
from wavlab_jax.sharding import MeshConfig, make_mesh

pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parents[2]


class Launched:
    """The small launcher in a session of its own, as a terminal starts it: Ctrl-C reaches everything in it."""

    def __init__(self, workdir, *arguments, audio, log=None, python=sys.executable, steps=STEPS):
        workdir.mkdir(exist_ok=True)
        self.log, self.lines = log or workdir / "log", StageFiles(workdir, STAGE).metrics / "metrics.jsonl"
        command = [python, "-m", "tests.experiments.small_launcher", *arguments, "--workdir", str(workdir)]
        env = {**os.environ, "AUDIO": str(audio), "JAX_NUM_CPU_DEVICES": "1", "TQDM_DISABLE": "1", "STEPS": str(steps)}
        if python != sys.executable:
            env.pop("XLA_FLAGS", None)  # those of this jax; another one may not know them
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
            )

    def when(self, condition):
        """Waits until the condition holds; the process must not end before."""
        deadline = time.monotonic() + 300  # a busy machine is slow, not stuck
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.005)
        return self

    def when_lines(self, count):
        return self.when(lambda: self.lines.exists() and self.lines.read_text().count("\n") >= count)

    def interrupted(self):
        """Ctrl-C; returns what was printed, once nothing of the session is left."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.ended(130)

    def ended(self, status):
        text = f"expected {status}, got {self.process.wait(300)}: {self.log.read_text()[-2000:]}"
        assert self.process.returncode == status, text
        deadline = time.monotonic() + 60  # multiprocessing's resource tracker ends a little later
        while self.others():
            assert time.monotonic() < deadline, f"still there: {self.others()}"
            time.sleep(0.02)
        return self.log.read_text()

    def others(self):
        """Command lines of the session's processes beside the first."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = stat.read_text().rsplit(")", 1)[1].split()[:4]
                if int(session) == self.process.pid != int(stat.parent.name) and state not in "ZX":
                    found.append((stat.parent / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found

    def workers(self):
        return sum("spawn_main" in command for command in self.others())


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("audio") / "audio")


@pytest.fixture(scope="module")
def whole(audio, tmp_path_factory):
    """A workdir in which the small recipe ran without a stop."""
    workdir = tmp_path_factory.mktemp("whole")
    Launched(workdir, "recipe", "demo", audio=audio).ended(0)
    return workdir


def parameters_of(workdir):
    from experiments.trained import load_model
    from wavlab_jax.model import parameters

    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    return jax.device_get(parameters(load_model(workdir, STAGE, mesh)))


def assert_same(workdir, whole):
    for x, y in zip(jax.tree.leaves(parameters_of(workdir)), jax.tree.leaves(parameters_of(whole)), strict=True):
        np.testing.assert_array_equal(x, y)
    assert lines(workdir, STAGE) == lines(whole, STAGE)
    assert [line["step"] for line in lines(workdir, STAGE)] == list(range(2, STEPS + 1, 2))


def test_kill_9_and_the_same_command_again_end_bit_for_bit_the_same(whole, audio, tmp_path):
    command = ("train", STAGE, "--corpus", str(whole / "corpus"))
    for after in (2, 11):
        run = Launched(tmp_path / "killed", *command, audio=audio).when_lines(after)
        run.process.kill()
        run.ended(-9)
    said = Launched(tmp_path / "killed", *command, audio=audio).ended(0)
    assert_same(tmp_path / "killed", whole)
    told = [StageFiles(workdir, STAGE).metrics / "metrics.jsonl" for workdir in (tmp_path / "killed", whole)]
    assert said.count("the first step ended") == 1 and "first_step_seconds" in told[0].read_text()
    assert "first_step_seconds" not in told[1].read_text()  # a recipe was not launched for the stage alone


@pytest.mark.soak
def test_ctrl_c_of_a_recipe_and_the_same_command_again(whole, audio, tmp_path):
    """While `prepare`'s workers start, and while a stage trains."""
    workdir, command = tmp_path / "stopped", ("recipe", "demo")
    run = Launched(workdir, *command, audio=audio)
    said = run.when(run.workers).interrupted()
    assert said.rstrip().endswith("interrupted; the same command goes on from here") and "Traceback" not in said
    said = Launched(workdir, *command, audio=audio).when_lines(4).interrupted()
    assert said.rstrip().endswith(f"of {STEPS}, saved; the same command continues") and "Traceback" not in said
    assert not list(workdir.rglob(".partial-*"))
    Launched(workdir, *command, audio=audio).ended(0)
    assert_same(workdir, whole)


@pytest.mark.soak
def test_kill_9_at_20_random_moments(whole, audio, tmp_path, capsys):
    """Never more is lost than an interval and the save in flight; everything else is as if nothing had happened."""
    steps, interval = 240, 3
    command = ("train", STAGE, "--corpus", str(whole / "corpus"), "--loop.log-every", "1")
    Launched(tmp_path / "whole", *command, audio=audio, steps=steps).ended(0)
    seed = random.SystemRandom().randrange(1 << 32)
    draw, folder, lost, reached = random.Random(seed), StageFiles(tmp_path / "killed", STAGE).checkpoints, [], 0
    for kill in range(20):
        run = Launched(tmp_path / "killed", *command, audio=audio, steps=steps)
        if kill % 5 != 4:  # every fifth dies while it starts
            run.when_lines(min(reached + draw.randrange(1, 12), steps - 8))
        time.sleep(draw.uniform(0.0, 0.2 if kill % 5 != 4 else 6.0))
        run.process.kill()
        run.ended(-9)
        reached = max((line["step"] for line in lines(tmp_path / "killed", STAGE)), default=0)
        kept = max(steps_of(folder), default=0) if folder.is_dir() else 0
        lost.append(reached - kept)
        assert lost[-1] <= 2 * interval, f"seed {seed}: {reached} steps were made, and {kept} are left"
        reached = min(reached, kept)
    said = Launched(tmp_path / "killed", *command, audio=audio, steps=steps).ended(0)
    assert f"from step {reached}" in said
    one, other = (lines(tmp_path / name, STAGE) for name in ("killed", "whole"))
    assert one == other and [line["step"] for line in one] == list(range(1, steps + 1))
    for x, y in zip(*(jax.tree.leaves(parameters_of(tmp_path / name)) for name in ("killed", "whole")), strict=True):
        np.testing.assert_array_equal(x, y)
    assert not [path for path in folder.iterdir() if not re.fullmatch(r"\d+", path.name)]
    with capsys.disabled():
        print(
            f"\n20 kills of a run of {steps} steps that saves every {interval} (seed {seed}): steps lost {lost}, at "
            f"most {max(lost)}, median {statistics.median(lost):g}; {steps} lines of metrics, none twice; parameters "
            "bit for bit those of a run that was not killed"
        )


@pytest.mark.soak
def test_a_run_goes_on_with_another_jax_and_back(whole, audio, tmp_path):
    other = os.environ.get("OTHER_PYTHON", str(ROOT / ".venv-3.12" / "bin" / "python"))
    need = "this test needs an interpreter with another jax: make test-venv VENV=.venv-3.12 PYTHON=python3.12"
    assert Path(other).exists(), f"{need}, or OTHER_PYTHON=..."
    command, work = ("train", STAGE, "--corpus", str(whole / "corpus")), tmp_path / "work"
    for lines_so_far, python in ((4, sys.executable), (10, other)):
        run = Launched(work, *command, audio=audio, python=python).when_lines(lines_so_far)
        run.process.send_signal(signal.SIGTERM)
        assert "saved; the same command continues" in run.ended(75)
    said = Launched(work, *command, audio=audio).ended(0)
    assert "from step" in said
    for one, other in zip(lines(work, STAGE), lines(whole, STAGE), strict=True):
        assert one["masked_loss"] == pytest.approx(other["masked_loss"], rel=1e-3)


@pytest.mark.soak
def test_ctrl_c_of_a_stage_with_loader_processes(whole, audio, tmp_path):
    workdir, command = tmp_path / "stopped", ("train", STAGE, "--corpus", str(whole / "corpus"), "--data.workers", "2")
    run = Launched(workdir, *command, audio=audio).when_lines(4)
    assert run.workers() == 2
    said = run.interrupted()
    assert said.rstrip().endswith(f"of {STEPS}, saved; the same command continues") and "Traceback" not in said
    Launched(workdir, *command, audio=audio).ended(0)
    assert_same(workdir, whole)


@pytest.mark.soak
def test_a_really_full_disk_is_told_and_with_space_again_the_same_command_goes_on(whole, audio, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    assert mounted.returncode == 0, f"this test needs root and a machine that lets it mount: {mounted.stderr.strip()}"
    command = ("train", STAGE, "--corpus", str(whole / "corpus"))
    try:
        for after in (1, 6, 10):
            run = Launched(disk / "work", *command, audio=audio, log=tmp_path / "log").when_lines(after)
            with open(disk / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
                while True:
                    ballast.write(bytes(1 << 12))
            # Orbax's threads tell of the same on their own, before that line or after it.
            (said,) = (line for line in run.ended(1).splitlines() if line.startswith("error: "))
            assert said.startswith(f"error: {disk / 'work' / 'stages' / STAGE}/") and "free some" in said
            (disk / "ballast").unlink()
        Launched(disk / "work", *command, audio=audio, log=tmp_path / "log").ended(0)
        assert_same(disk / "work", whole)
        assert not list(disk.rglob(".partial-*")) and not list(disk.rglob("*checkpoint-tmp*"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
