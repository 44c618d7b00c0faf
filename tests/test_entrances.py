"""How a newcomer's first seconds go: Ctrl-C while a command imports, and `.ci/run` on the interpreters at hand."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("command", [("experiments", "list"), ("data_pipelines", "describe", "/nowhere")])
def test_ctrl_c_while_a_command_imports(command):
    started = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # as a terminal starts it: what runs in a shell's background ignores Ctrl-C, and so does what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    maps, deadline = Path(f"/proc/{started.pid}/maps"), time.monotonic() + 60
    while "/numpy/" not in maps.read_text():  # the first of the large imports has begun
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    started.send_signal(signal.SIGINT)
    stdout, stderr = started.communicate(timeout=60)
    assert (started.returncode, stdout) == (130, "")
    assert stderr == "interrupted; the same command goes on from here\n"


@pytest.mark.parametrize(
    ("there", "made", "said"),
    [
        ((11, 12), ["test PYTHON=python3.11", "test-subset PYTHON=python3.12"], "all tests"),
        ((12, 13), ["test-subset PYTHON=python3.12"], "no Python 3.11 here"),
        ((13,), ["test-subset PYTHON=python3.13"], "no Python 3.11 here"),
        ((11,), ["test PYTHON=python3.11"], "no Python 3.12 or newer here"),
        ((), [], "nothing was tested"),
    ],
)
def test_ci_runs_what_the_interpreters_at_hand_can(tmp_path, there, made, said):
    def program(name, text):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    for minor in (11, 12, 13, 14):
        answer = f"""case "$*" in *print*) echo 3.{minor};; *"(3, {minor})"*|--version);; *) exit 1;; esac"""
        program(f"python3.{minor}", answer if minor in there else "exit 127")
    program("python3", "exit 127")
    program("pyenv", "exit 127")
    program("make", f'echo "$1 $2" >> {tmp_path}/made')
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ran = subprocess.run([ROOT / ".ci" / "run"], env=env, capture_output=True, text=True)
    assert ran.returncode == (0 if made else 1) and said in ran.stdout + ran.stderr
    assert ((tmp_path / "made").read_text().splitlines() if made else []) == made
