"""`superb` killed with -9, time and again, ends where one ends that never was."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.experiments.small_mlsuperb import write_folder

ROOT = Path(__file__).resolve().parents[2]
KILLS = 10


def launched(root: Path, workdir: Path) -> subprocess.Popen:
    workdir.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.experiments.small_mlsuperb", str(root), str(workdir)]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "TQDM_DISABLE": "1"}
    with open(workdir / "log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)


def results_of(workdir: Path) -> dict:
    """All but how long it took."""
    found = json.loads((workdir / "mlsuperb" / "tiny" / "10min" / "joint" / "results.json").read_text())
    del found["seconds"]
    return found


@pytest.mark.soak
def test_kill_9_at_random_moments(tmp_path, capsys):
    root, seed = write_folder(tmp_path / "superb"), random.SystemRandom().randrange(1 << 32)
    draw, times = random.Random(seed), []
    began = time.monotonic()
    assert launched(root, tmp_path / "whole").wait(600) == 0, (tmp_path / "whole" / "log").read_text()[-2000:]
    whole = time.monotonic() - began
    for _ in range(KILLS):
        process = launched(root, tmp_path / "killed")
        times.append(draw.uniform(0.2, 1.0) * whole)
        try:
            ended = process.wait(times[-1])
        except subprocess.TimeoutExpired:
            process.kill()
            ended = process.wait()
        assert ended in (0, -9), f"seed {seed}: {(tmp_path / 'killed' / 'log').read_text()[-2000:]}"
        if ended == 0:
            break
    assert launched(root, tmp_path / "killed").wait(600) == 0, (tmp_path / "killed" / "log").read_text()[-2000:]
    assert results_of(tmp_path / "killed") == results_of(tmp_path / "whole"), f"seed {seed}"
    metrics = [
        (tmp_path / name / "mlsuperb" / "tiny" / "10min" / "joint" / "metrics.jsonl").read_text().splitlines()
        for name in ("killed", "whole")
    ]
    steps = [[(row["step"], "valid_loss" in row) for row in map(json.loads, each)] for each in metrics]
    assert steps[0] == steps[1] and len(set(steps[0])) == len(steps[0])
    with capsys.disabled():
        print(f"\nkilled after {', '.join(f'{each:.1f}' for each in times)} s of {whole:.1f} s (seed {seed}): the same")
