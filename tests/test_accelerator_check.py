"""The check of an accelerator runs to its end where there is none, and says what failed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import accelerator_check, accelerator_runs
from benchmarks.accelerator_sections import SECTIONS, attention

ROOT = Path(__file__).resolve().parents[1]


def test_what_a_part_cannot_do_is_told_and_the_page_shows_it(tmp_path):
    """cuDNN's attention is refused on a CPU, XLA's is timed; a part that dies is a failure with its last words."""
    told = attention(tmp_path, small=True)
    assert len(told["rows"]) == 6 and not told["failed"]
    assert all(row["cudnn"].startswith("refused: ") and row["xla_ms"] > 0 for row in told["rows"])
    died = accelerator_check.run_section("resume", tmp_path / "nowhere", small=True)
    assert "No such file" in died["failed"][0]
    unheld = {"rows": [{"planned_gb": 2.0, "held_gb": None}], "told": False, "failed": [], "seconds": 1.0}
    results = {"attention": {**told, "seconds": 1.0}, "resume": died, "memory": unheld}
    page = accelerator_check.page(results, small=True)
    assert "| attention | holds | 1 |" in page and "| 2 x 50 x 2 x 16 | a row's own | True | " in page
    assert page.count("| refused: ") == 6
    assert "| planned gb | held gb |\n|---|---|\n| 2 | – |\n\nThis device does not tell what it held" in page
    assert "the part did not end well" in page


@pytest.mark.parametrize("killed_with", [0, -signal.SIGKILL])
def test_a_run_that_was_not_killed_is_a_failure_and_old_runs_are_not_gone_on_from(tmp_path, monkeypatch, killed_with):
    """Of runs that end at once, as if there were nothing to do."""
    asked = []

    def ended(workdir, audio, *, kill_after=0, **_):
        asked.append((workdir.name, workdir.exists()))
        return subprocess.CompletedProcess((), killed_with if kill_after else 1 if killed_with else 0, "", "said")

    (tmp_path / "machine.json").write_text('{"platform": "cpu"}')
    for name in ("train", "whole", "killed"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(accelerator_runs, "_train", ended)
    accelerator_runs.train(tmp_path, small=True)
    failed = accelerator_runs.resume(tmp_path, small=True)["failed"]
    assert asked == [(name, False) for name in ("train", "whole", "killed", "killed")]
    assert any("the run to be killed ended with 0 before it was" in why for why in failed) == (killed_with == 0)


@pytest.mark.soak
def test_every_part_of_the_small_form_holds_on_this_machine(tmp_path):
    command = [sys.executable, "benchmarks/accelerator_check.py", "--small", "--out", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert ran.returncode == 0, ran.stdout + ran.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == list(SECTIONS) and not any(part["failed"] for part in results.values())
    assert "values of the input of the first layer not finite" in results["nonfinite"]["where"]
    assert results["memory"]["rows"][0]["temporaries_gb"] > 0 and results["memory"]["told"] is False
    assert results["resume"]["largest_weight_difference"] == 0 and results["resume"]["killed_with"] == -9
    assert (tmp_path / "curves.png").stat().st_size > 10_000 and "curves.png" in (tmp_path / "README.md").read_text()
