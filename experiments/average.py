"""The mean of a stage's checkpoints, as a stage of its own: for evaluation, export, features, units and `init_from`.

The WavLabLM papers average 10 checkpoints; ESPnet's recipes take the 10 best. Parameters alone are averaged: a mean is
judged and used, not trained.
"""

import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import wavlab_jax.model as models
from data_pipelines.atomic import whole_folder
from experiments.machine import git_commit, versions
from experiments.stage import beginning
from experiments.stage_files import StageFiles, write_json
from wavlab_jax.checkpoint import CheckpointError, average, steps_of, write_parameters


class AverageError(ValueError):
    """A mean that cannot be made, or was made of others; the message says what there is."""


class Averaged(NamedTuple):
    """The stage `name` in the workdir, a mean of these `steps`."""

    name: str
    steps: list[int]


def average_stage(
    stage: str, *, workdir: Path, last: int | None = None, best: int | None = None, name: str = "average"
) -> Averaged:
    """Writes the stage `stage`@`name`: the mean of the parameters of the `last` newest checkpoints, or the `best`.

    The best are those of the lowest training loss (`LoopConfig.keep_best`). The stage need not be finished. What was
    averaged stands in the mean's inputs.json, and so in the lineage of all that is made with it. Returns at once if it
    is there. Raises AverageError, CheckpointError.
    """
    files, result = StageFiles(workdir, stage), StageFiles(workdir, f"{stage}@{name}")
    if (last is None) == (best is None) or (best if last is None else last) < 1:
        raise AverageError("give --last N or --best N, one of them, at least 1")
    if not files.checkpoints.is_dir():
        raise CheckpointError(f"{files.checkpoints} does not exist: has {stage} been trained in this workdir?")
    steps = _chosen(files.checkpoints, last=last, best=best)
    inputs = json.loads(files.inputs.read_text())
    inputs["average_of"] = {"stage": stage, "steps": steps, "begun": beginning(files)}
    if result.folder.exists():
        if json.loads(result.inputs.read_text()) != inputs:
            raise AverageError(
                f"{result.folder} is another mean: {result.inputs.read_text()}\ngive --name, or delete that folder"
            )
        return Averaged(f"{stage}@{name}", steps)
    described = models.read_description(files.model)
    shapes = models.abstract_parameters(described.encoder, described.head)
    mean = average(files.checkpoints, steps, shapes)
    with whole_folder(result.folder) as temporary:
        for path in (files.data, files.model, files.folder / "shares.json"):
            shutil.copyfile(path, temporary / path.name)
        lines = files.config.read_text().splitlines(keepends=True)
        named = [f"name = {result.folder.name!r}\n" if line.startswith("name = ") else line for line in lines]
        (temporary / result.config.name).write_text("".join(named))
        about = {"configuration": "".join(named), "versions": versions(), "commit": git_commit(), **inputs}
        write_parameters(temporary / result.checkpoints.name, mean, step=steps[-1], about=about)
        write_json(temporary / result.inputs.name, inputs)
        write_json(temporary / result.finished.name, {"step": steps[-1]})
    return Averaged(f"{stage}@{name}", steps)


def _chosen(folder: Path, *, last: int | None, best: int | None) -> list[int]:
    """Steps of the checkpoints to average, ascending."""
    scores = steps_of(folder)
    judged = [step for step in scores if math.isfinite(scores[step])]
    chosen = sorted(judged, key=scores.__getitem__)[:best] if best else list(scores)[-last:]
    wanted = best or last
    if len(chosen) < wanted:
        field = "loop.keep-best" if best else "loop.keep"
        kept = ", ".join(f"{step} ({scores[step]:.4f})" for step in scores)
        raise AverageError(
            f"{folder} has no {wanted} checkpoints, but {len(chosen)} (step and training loss: {kept}): a stage keeps "
            f"more with --{field} {wanted}"
        )
    return sorted(chosen)
