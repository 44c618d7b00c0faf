"""The 107-language corpus from nothing to batches, by the commands that docs/data.md gives: what each took and said.

    PYTHONPATH=. python -m benchmarks.synthetic_table [--work FOLDER] [--hours 0.33] [--write]

`--write` puts the section into docs/data.md. Needs espeak-ng (see `synthetic_corpus`).
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.sections import ROOT, write_section

TITLE = "A corpus of 107 languages from nothing"


class Step(NamedTuple):
    """One command: its name in the table, and how what it printed is told."""

    name: str
    command: str
    told: str  # a regular expression; its groups are joined


def steps(work: str, hours: float) -> list[Step]:
    """The commands in their order; `work` is where the corpus and the prepared folder go."""
    module = "python -m data_pipelines"
    return [
        Step(
            "generate",
            f"python benchmarks/synthetic_corpus.py {work}/synthetic --hours {hours:g}",
            r"(\d[\d,]* clips, .*) in ",
        ),
        Step("prepare", f"{module} prepare {work}/synthetic --out {work}/synthetic-prepared", r"(\d[\d,]* clips, .*)"),
        Step(
            "inspect, all decoded",
            f"{module} inspect {work}/synthetic-prepared --html {work}/synthetic.html --alpha 1 0.5 --steps 1000 "
            "--decode",
            r"(\d[^\n]*decoded[^\n]*)|synthetic\.html: ([^\n]*)",
        ),
        Step(
            "sample, 200 steps of 32 s at alpha 0.5",
            f"{module} sample {work}/synthetic-prepared --steps 200 --seconds-per-step 32 --alpha 0.5",
            r"(\d+ of \d+ languages heard[^\n]*)",
        ),
    ]


def run(step: Step) -> str:
    """The step's row of the table."""
    command = [sys.executable if word == "python" else word for word in shlex.split(step.command)]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."}, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{step.command}: exit status {done.returncode}")
    told = ["".join(filter(None, groups.groups())) for groups in re.finditer(step.told, done.stdout)]
    row = f"| {step.name} | {seconds:.1f} s | {'; '.join(told)} |"
    print(row, flush=True)
    return row


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="an empty folder that stays; by default one that is deleted")
    parser.add_argument("--hours", type=float, default=0.33)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = [run(step) for step in steps(str(given.work or scratch), given.hours)]
    shown = "\n".join(step.command for step in steps("work", given.hours))
    shown = shown.replace("python benchmarks/", "PYTHONPATH=. python benchmarks/")
    cores = len(os.sched_getaffinity(0))
    text = "\n".join(
        [
            f"```\napt-get install espeak-ng\n{shown}\n```\n",
            f"All four, and this table: `PYTHONPATH=. python -m benchmarks.synthetic_table --write`; {cores} cores, "
            f"shared (load {os.getloadavg()[0]:.1f}).\n",
            "| step | time | what it said |\n|---|---:|---|",
            *rows,
            "\n(Every language gets at least 6 s, so 0.33 h asked for become 0.61; few periods of draws make shares "
            "coarse.)\nFormant synthesis says nothing about a model's quality.",
        ]
    )
    if given.write:
        write_section("docs/data.md", TITLE, text)


if __name__ == "__main__":
    main()
