"""The table of times: what a killed process spent is kept, and what was measured stays as it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import ledger as ledgers
from experiments.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]

SLEEPER = """
import sys, time
from pathlib import Path
from experiments import ledger
ledger.BEAT = 0.05
with ledger.Ledger(Path(sys.argv[1])).timing("train", made_with="a", commit="first"):
    time.sleep(100)
"""


def entry_of(path):
    return json.loads(path.read_text())["train"]


def test_a_killed_process_leaves_its_time(tmp_path):
    path = tmp_path / "times.json"
    for killed in (1, 2):
        began = time.monotonic()
        process = subprocess.Popen([sys.executable, "-c", SLEEPER, str(path)], cwd=ROOT)
        while not (path.exists() and entry_of(path)["seconds"] > 0.6 * killed):
            assert process.poll() is None and time.monotonic() < began + 60
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        spent, lasted = entry_of(path)["seconds"], time.monotonic() - began
        assert 0.6 * killed < spent < 0.6 * (killed - 1) + lasted + 0.5
        assert not entry_of(path)["done"]
    ledger = Ledger(path)
    with ledger.timing("train", made_with="a", commit="second") as entry:
        entry["note"] = "trained"
    assert ledger.done("train", made_with="a") and not ledger.done("train", made_with="b")
    assert ledger.rows(["train", "later"]) == [
        {"name": "train", "seconds": pytest.approx(spent, abs=0.5), "note": "trained"},
        {"name": "later", "seconds": 0.0, "note": ""},
    ]
    assert Ledger(path).origin(["train"])["commit"] == "first, then second"


def test_a_step_that_fails_keeps_its_time_and_is_not_done(tmp_path):
    ledger = Ledger(tmp_path / "times.json")
    with pytest.raises(RuntimeError), ledger.timing("train", made_with="a"):
        time.sleep(0.1)
        raise RuntimeError
    again = Ledger(tmp_path / "times.json")
    assert 0.1 <= again.seconds("train") < 5 and not again.done("train", made_with="a")
    assert again.origin(["train"]) == {}


def test_beats_end_with_their_step(tmp_path, monkeypatch):
    monkeypatch.setattr(ledgers, "BEAT", 0.01)
    ledger = Ledger(tmp_path / "times.json")
    with ledger.timing("train", made_with="a") as entry:
        time.sleep(0.1)
        assert entry_of(ledger.path)["seconds"] > 0 and not entry_of(ledger.path)["done"]
        entry["note"] = "trained"
    written = ledger.path.read_bytes()
    time.sleep(0.05)
    assert ledger.path.read_bytes() == written and entry_of(ledger.path)["note"] == "trained"


def test_the_origin_is_that_of_the_steps(tmp_path):
    ledger = Ledger(tmp_path / "times.json")
    small, large = {"cores": 2, "jax": "0.10"}, {"cores": 64, "jax": "0.10"}
    for step, machine in (("a", small), ("b", large), ("c", small)):
        with ledger.timing(step, made_with="", commit="abc", machine=machine):
            pass
    origin = ledger.origin(["a", "b", "c", "not yet"])
    assert origin.pop("finished") == max(json.loads(ledger.path.read_text())[step]["finished"] for step in "abc")
    assert origin == {"commit": "abc", "machine": {"cores": "2, then 64", "jax": "0.10"}}
    assert ledger.origin(["c"])["machine"] == small
