"""Steps whose loss or gradient was not finite: they change nothing; they stop the run, or are skipped and named."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from data_pipelines.atomic import whole_file
from data_pipelines.batch import Batch
from wavlab_jax.metrics import read_lines
from wavlab_jax.step import StepResult


class NonFinite(RuntimeError):
    """Loss or gradient of a step was not finite. The parameters are those before it; the message names its rows."""


class Skips:
    """Counts the steps that were skipped and names each in FOLDER/skipped.jsonl, of host n > 0 skipped-n.jsonl.

    A line: {"step", "loss", "gradient_norm" (as text), "where", "rows" (this host's)}. Lines after the step that a run
    resumes from are dropped, as it will write them again; also those of hosts that it has no more.
    """

    def __init__(
        self,
        folder: Path,
        *,
        record: Mapping,
        resume_step: int,
        in_row: int,
        in_all: int,
        describe: Callable[[Batch], list[str]],
    ):
        """`record` is what `record()` gave to the checkpoint; `in_row` and `in_all` skips are allowed, 0 stops at once.

        `describe` names a batch's rows.
        """
        host = jax.process_index()
        self.path = folder / (f"skipped-{host}.jsonl" if host else "skipped.jsonl")
        for gone in () if host else folder.glob("skipped-*.jsonl"):  # of hosts that there were before, and are no more
            if int(gone.stem.partition("-")[2]) >= jax.process_count():
                _write(gone, _lines(gone, resume_step))
        self.total, self._run = record.get("skipped", 0), record.get("skipped_in_row", 0)
        self._in_row, self._in_all, self._describe = in_row, in_all, describe
        self._lines = _lines(self.path, resume_step)
        if self.path.exists():
            _write(self.path, self._lines)

    def record(self) -> dict:
        """What a checkpoint remembers."""
        return {"skipped": self.total, "skipped_in_row": self._run}

    def passed(self, number: int, result: StepResult, batch: Batch, *, saved: int) -> bool:
        """Whether step `number` was finite; `result` is on the host, the last checkpoint is of step `saved`.

        Raises NonFinite if it was not and no more may be skipped.
        """
        if result.finite:
            self._run = 0
            return True
        rows, where = self._describe(batch), first_place(result)
        said = f"step {number}: loss {result.loss}, gradient norm {result.gradient_norm}, {where}"
        if self._in_row:
            self._lines.append(
                {
                    "step": number,
                    "loss": str(result.loss),
                    "gradient_norm": str(result.gradient_norm),
                    "where": where,
                    "rows": rows,
                }
            )
            _write(self.path, self._lines)
        self.total, self._run = self.total + 1, self._run + 1
        if self._run <= self._in_row and self.total <= self._in_all:
            return False
        bound = " --loop.non-finite skip goes on past such steps; docs/health.md says what to look at first."
        if self._in_row:
            bound = (
                f" It is number {self._run} in a row and {self.total} in all (loop.skip_in_row allows {self._in_row}, "
                f"loop.skip_in_all {self._in_all}); {self.path} names them all."
            )
        raise NonFinite(
            f"{said}. It changed no parameters; the last checkpoint is of step {saved}.{bound} "
            "The step's rows:\n  " + "\n  ".join(rows)
        )


def _lines(path: Path, last: int) -> list[dict]:
    return [line for line in read_lines(path) if line["step"] <= last]


def _write(path: Path, lines: list[dict]) -> None:
    with whole_file(path) as temporary:  # on the disk when the block ends: a checkpoint may follow
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def first_place(result: StepResult) -> str:
    """Where in the encoder values that are not finite came up first, in words; a model on log-mel features has none."""
    if "nonfinite" not in result.layers:
        return "there is no encoder"
    nonfinite = np.asarray(result.layers["nonfinite"].total)
    places = np.flatnonzero(nonfinite > 0)
    if not places.size:
        return "every hidden value finite"
    place = "the input of the first layer" if places[0] == 0 else f"the output of layer {places[0]}"
    return f"{nonfinite[places[0]]:.0f} values of {place} not finite"
