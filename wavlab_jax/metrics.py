"""Sums that are divided once, and the files that metrics are written to."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tensorboardX import SummaryWriter

JSON_LINES = "metrics.jsonl"


class Sum(NamedTuple):
    """A total and the weight it will be divided by, once, at the very end. Both scalars, or both of one shape."""

    total: jax.Array
    weight: jax.Array


Sums = dict[str, Sum]  # adds across micro-batches, devices, hosts and steps; each term has its own denominator


def add(left: Sums, right: Sums) -> Sums:
    """Term by term; both sides have the same terms, or one is empty."""
    if not left or not right:
        return dict(left or right)
    return jax.tree.map(lambda a, b: a + b, left, right)


def ratios(sums: Mapping[str, Sum]) -> dict[str, float]:
    """total / weight of each term; NaN where nothing was counted."""
    return {name: float(total) / float(weight) if weight else math.nan for name, (total, weight) in sums.items()}


class MetricsWriter:
    """Appends one JSON line a record and the same numbers to TensorBoard; a step is never written twice.

    Opening with `resume_step` drops every line after that step, so that a run killed between a metric and the next
    checkpoint does not leave lines that the resumed run will write again. Of several hosts one is `active`; the others'
    writers write nothing.
    """

    def __init__(self, folder: Path, *, resume_step: int = 0, active: bool = True):
        self._lines = None
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / JSON_LINES
        kept = [line for line in read_lines(self.path) if line["step"] <= resume_step]
        temporary = self.path.with_suffix(".partial")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, self.path)
        self._lines = open(self.path, "a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line {"step": step, **values}; non-finite floats become null, so that the line stays JSON."""
        if self._lines is None:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._lines.write(json.dumps({"step": step, **clean}) + "\n")
        for name, value in clean.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes both files."""
        if self._lines is None:
            return
        self._lines.close()
        self._board.close()


def read_lines(path: Path) -> Iterable[dict]:
    """The records of a metrics file; a last line cut short by a kill is left out."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
