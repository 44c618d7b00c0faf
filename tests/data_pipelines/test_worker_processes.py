"""Workers of the loader: signals do not reach them, not even while they start, and they end with their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipelines import worker_processes
from data_pipelines.prepare import PrepareError, prepare
from tests.experiments.small_corpus import write_corpus

REPOSITORY = Path(__file__).resolve().parents[2]

# Reads batches for good. The handler stands for a trainer's: signals are noted, and do not interrupt.
LOADER = """
import signal, sys
from data_pipelines.manifest import Manifest
from data_pipelines.pipeline import DataConfig, train_batches

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: print("noted", flush=True))
    cfg = DataConfig(lengths=(16_000,), seconds_per_step=4.0, mixing=None, workers=2, threads=1)
    with train_batches(cfg, Manifest.load(sys.argv[1]), ()) as batches:
        print("starting", flush=True)
        for batch in batches:
            print("batch", flush=True)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    audio = write_corpus(folder / "audio", clips=4)
    prepare(audio, out=folder / "out", workers=1, progress=False, join_seconds=2.0, min_seconds=2.0)
    return folder / "out"


def workers_of(session):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rsplit(")", 1)[1].split()[:4]
            command = (stat.parent / "cmdline").read_text()
            if int(its_session) == session and state not in "ZX" and "spawn_main" in command:
                found.append(int(stat.parent.name))
        except OSError:
            continue
    return found


def test_workers_outlast_signals_while_they_start_and_end_with_a_killed_parent(corpus, tmp_path):
    (tmp_path / "loader.py").write_text(LOADER)
    with open(tmp_path / "errors", "w") as errors:
        parent = subprocess.Popen(
            [sys.executable, str(tmp_path / "loader.py"), str(corpus)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    deadline = time.monotonic() + 240
    try:
        assert parent.stdout.readline() == "starting\n"
        while len(workers := workers_of(parent.pid)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.killpg(parent.pid, number)  # the workers have a process by now, and nothing else
        said = [parent.stdout.readline() for _ in range(6)]
        assert sorted(said) == ["batch\n"] * 3 + ["noted\n"] * 3, (tmp_path / "errors").read_text()
        assert workers_of(parent.pid) == workers
    finally:
        parent.kill()
        parent.communicate()
    while workers_of(parent.pid):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.02)
    assert "Traceback" not in (tmp_path / "errors").read_text()


def test_prepare_starts_a_process_for_each_core_that_it_may_run_on(raw, tmp_path, monkeypatch):
    """A job of a cluster has some of its machine's cores; one process for each of all would take memory and no time."""
    asked = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 6})
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(worker_processes, "CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr(
        "data_pipelines.prepare._run_in_pool", lambda shards, task, out, workers, _: asked.append(workers)
    )
    with pytest.raises(PrepareError, match="is not whole after it was written"):  # since nothing was written
        prepare(raw[0], out=tmp_path / "out", progress=False)
    assert asked == [3]
    for said, count in {"max 100000": 3, "150000 100000": 2, "1000 100000": 1, "900000 100000": 3}.items():
        (tmp_path / "cpu.max").write_text(f"{said}\n")  # as a container has it
        assert worker_processes.cores() == count, said
