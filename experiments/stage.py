"""What a stage is: a frozen, nested configuration, its flat text, and where its files lie."""

import ast
import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any

from data_pipelines.pipeline import DataConfig
from experiments.probe_clips import ProbesConfig
from experiments.stage_files import StageFiles
from experiments.targets import UnitSetConfig, is_online
from wavlab_jax.sharding import MeshConfig
from wavlab_jax.step import LearnerConfig
from wavlab_jax.train import LoopConfig


class StageError(ValueError):
    """A stage that is unknown, contradicts itself, or was changed under a run; the message says what to do."""


@dataclass(frozen=True)
class StageConfig:
    """One pre-training stage.

    Attributes:
        name: of the stage; its folder in the workdir.
        learner: architecture, objective, optimizer, seed.
        data: lengths, seconds a step, draw, mixing.
        units: the targets; the set that the stage is judged by: k-means units from a store or, with `online`, computed
            in the step; or a random projection's, always computed in the step. None where the objective learns its
            own. more_units: further sets, predicted beside it by the same projection or by one each
            (`HeadConfig.split_projection`).
        loop: steps and intervals.
        mesh: devices along each axis.
        seconds_per_device: audio that a device holds at once; passes a step follow from it and the devices at hand.
        init_from: stage whose final encoder this one continues, and whose head too if both predict the same units; or
            a model that `python -m experiments import` takes, by its path. None: from scratch.
        continue_from: a run of the workdir, `stage` or `stage@step`, whose whole state this one takes and goes on from:
            parameters, optimizer and number of steps, so that batches and schedule go on there, by this stage's data
            and learner. To fork a run, under another `name`.
        init_head: of such a model, take the head over too: its units are this stage's (nothing here can check that).
        evaluation_rows: held-out rows judged at once.
        probes: how the parameters are judged while they are trained; by default not at all.
    """

    name: str
    learner: LearnerConfig
    data: DataConfig
    units: UnitSetConfig | None
    loop: LoopConfig
    mesh: MeshConfig = MeshConfig()
    seconds_per_device: float = 90.0
    more_units: tuple[UnitSetConfig, ...] = ()
    init_from: str | None = None
    continue_from: str | None = None
    init_head: bool = False
    evaluation_rows: int = 16
    probes: ProbesConfig = ProbesConfig()

    def __post_init__(self):
        classes, units = self.learner.head.unit_sets, tuple(each.units for each in self.unit_sets)
        if classes != units:
            raise StageError(
                f"{self.name}: the head has {_listed(classes)} classes but the units have {_listed(units)}: set "
                "learner.head.units and units.units (and more_units of both) to the same numbers, or units to None "
                "where the objective is contrastive"
            )
        if self.learner.frozen_encoder or self.learner.encoder is None:
            raise StageError(f"{self.name}: a stage trains an encoder: leave learner.frozen_encoder False")
        if self.data.mixing is not None and any(map(is_online, self.unit_sets)) and not self.data.keep_clean:
            raise StageError(
                f"{self.name}: units that are computed in the step are of the clean waveform, and data.mixing leaves "
                "only the mixed one: set data.keep_clean to True, or data.mixing to None"
            )
        if not (math.isfinite(self.seconds_per_device) and self.seconds_per_device > 0):
            raise StageError(
                f"{self.name}: seconds_per_device is {self.seconds_per_device:g}; it must be positive: the seconds of "
                "audio that a device can hold at once"
            )
        if self.init_from is not None and self.continue_from is not None:
            raise StageError(
                f"{self.name}: init_from begins with a model's parameters, continue_from goes on with a run's whole "
                "state: give one of them"
            )
        layers, layer = self.learner.encoder.layers, self.probes.layer
        if layer is not None and not 0 <= layer <= layers:
            raise StageError(f"{self.name}: probes.layer is {layer}; the encoder has layers 0 to {layers}")
        if self.evaluation_rows < 1:
            raise StageError(f"{self.name}: evaluation_rows is {self.evaluation_rows}; it must be at least 1")

    @property
    def unit_sets(self) -> tuple[UnitSetConfig, ...]:
        """`units`, then `more_units`: the order of the last axis of a labelled `Batch.units`."""
        return (*(() if self.units is None else (self.units,)), *self.more_units)


def _listed(numbers: tuple[int, ...]) -> str:
    return " and ".join(map(str, numbers)) or "no"


def flatten(config: Any, prefix: str = "") -> dict[str, str]:
    """A nested dataclass as {"learner.optimizer.beta1": "0.9", ...}: the golden text, a line a field."""
    flat = {}
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{prefix}{field.name}"
        several = isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value))
        for place, part in ((f"{path}.{i}", v) for i, v in enumerate(value)) if several else ((path, value),):
            flat |= flatten(part, f"{place}.") if dataclasses.is_dataclass(part) else {place: repr(part)}
    return flat


def as_text(config: StageConfig) -> str:
    """`path = value` lines, in the order of the dataclasses."""
    return "".join(f"{path} = {value}\n" for path, value in flatten(config).items())


# A run may be continued with other values of these; everything else would make it another run.
# (Steps that are not finite change no parameters, whether they are skipped or stop the run.)
FREE_TO_CHANGE = ("loop.log_every", "loop.keep", "loop.non_finite", "loop.skip_", "loop.profile_steps", "loop.wandb",
                  "mesh.", "seconds_per_device", "evaluation_rows", "probes.", "data.workers", "data.threads",
                  "data.prefetch", "learner.encoder.rematerialize")  # fmt: skip


def _by_default(config: Any, prefix: str = "") -> dict[str, str]:
    """`flatten` of every field that has a default, with that default."""
    flat = {}
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), f"{prefix}{field.name}"
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif dataclasses.is_dataclass(value):
            flat |= _by_default(value, f"{path}.")
            continue
        else:
            continue
        flat |= flatten(value, f"{path}.") if dataclasses.is_dataclass(value) else {path: repr(value)}
    return flat


def _related(path: str, other: str) -> bool:
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


def paths_of(files: StageFiles) -> set[str]:
    """The fields that the configuration of this folder's run had."""
    return {line.split(" = ", 1)[0] for line in files.config.read_text().splitlines()}


def beginning(files: StageFiles) -> str:
    """A digest of what a run was begun with, wherever it is by now: its inputs, and its configuration but for values
    that are free to change, which may be others when it goes on. Raises StageError if it is not there."""
    if not (files.config.exists() and files.inputs.exists()):
        raise StageError(
            f"{files.folder} is not there any more, from which a run of this workdir was begun: bring it back (its "
            f"{files.config.name} and {files.inputs.name} will do), or begin anew in another --workdir"
        )
    lines = files.config.read_text().splitlines(keepends=True)
    fixed = "".join(line for line in lines if not line.startswith(FREE_TO_CHANGE))
    return hashlib.sha256(fixed.encode() + files.inputs.read_bytes()).hexdigest()[:16]


START_ANEW = "give these values again (and --size demo if that is what it is), or another --workdir to start anew"


def as_started(like: StageConfig, files: StageFiles) -> StageConfig:
    """The configuration that this folder's run was started with; `like` (of the same stage) where there is none.

    `like` gives the classes, and the values of fields that are younger than the run. Where the run has fields that
    `like` has not, it is returned as it is: `check_unchanged` names them.
    """
    if not files.config.exists():
        return like
    then = dict(line.split(" = ", 1) for line in files.config.read_text().splitlines())
    if then.keys() - flatten(like).keys():
        return like

    def value(path: str, now: Any) -> Any:
        if dataclasses.is_dataclass(now):
            fields = dataclasses.fields(now)
            return dataclasses.replace(now, **{f.name: value(f"{path}{f.name}.", getattr(now, f.name)) for f in fields})
        if isinstance(now, tuple) and any(map(dataclasses.is_dataclass, now)):
            return tuple(value(f"{path}{i}.", part) for i, part in enumerate(now))
        path = path.removesuffix(".")
        return ast.literal_eval(then[path]) if path in then else now

    return value("", like)


def check_unchanged(config: StageConfig, files: StageFiles, *, advice: str = START_ANEW) -> None:
    """Raises StageError naming every line by which `config` differs from what this folder's run was started with.

    A field that is younger than the run must have its default, which means what was done without it.
    """
    if not files.config.exists():
        return
    then = dict(line.split(" = ", 1) for line in files.config.read_text().splitlines())
    # not where the run had None in place of a group of values, or such a group in place of None
    said = {path: value for path, value in _by_default(config).items() if not any(_related(path, p) for p in then)}
    then, now = said | then, flatten(config)
    changed = [
        f"  {path}: {then.get(path, '(absent)')} then, {now.get(path, '(absent)')} now"
        for path in sorted(then.keys() | now.keys())
        if then.get(path) != now.get(path) and not path.startswith(FREE_TO_CHANGE)
    ]
    if changed:
        raise StageError(f"{files.folder} holds a run of another configuration:\n" + "\n".join(changed) + f"\n{advice}")
