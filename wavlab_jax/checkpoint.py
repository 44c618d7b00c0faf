"""Checkpoints on disk (Orbax), and what a run starts from.

A checkpoint is a folder named after its step, with a folder for each item: `params` and `optimizer` (arrays), and as
JSON `train` (the step, the open window of metrics, time so far), `data` (the next batch's number, a digest of what the
batches depend on) and `about` (format, configuration, versions). It appears under its name when it is whole.
"""

import contextlib
import dataclasses
import inspect
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from data_pipelines.atomic import cannot_write
from wavlab_jax.model import Parameters
from wavlab_jax.state import TrainState

PARAMS, OPTIMIZER, TRAIN, DATA, ABOUT = ITEMS = ("params", "optimizer", "train", "data", "about")
BEFORE = "record"  # an item of the first format, in which params, optimizer and record were all there was
FORMAT = 2  # of the items; another one is refused
SCORE = "score"  # by which `keep_best` and `best_steps` judge; the lower, the better
SPARE_BYTES = 4 << 20  # what a checkpoint takes beside its arrays, generously


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or does not fit the model; names the folder and the parameter."""


class Restored(NamedTuple):
    """`state` and the JSON `record` saved with it."""

    state: TrainState
    record: dict


class Checkpoints:
    """The checkpoints of one run, written asynchronously and atomically; a step folder that exists is whole.

    With several processes all of them make one, and call its methods at the same steps.

    Args:
        folder: of the run's checkpoints.
        keep: how many of the latest stay. keep_every: those of steps that this divides stay too, 0: none. keep_best:
            so many with the lowest score, too, 0: none.
        data: JSON-able: what the batches depend on; a checkpoint with another is not restored.
        about: JSON-able: configuration and versions, for people and for `read_about`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        keep_every: int = 0,
        keep_best: int = 0,
        data: Mapping[str, Any] | None = None,
        about: Mapping[str, Any] | None = None,
    ):
        self.folder = Path(folder).absolute()
        logging.getLogger("absl").addFilter(_of_interest)
        self._data, self._about = dict(data or {}), {"format": FORMAT, **(about or {})}
        kept = [policies.LatestN(keep)]
        kept += [policies.EveryNSteps(keep_every)] if keep_every else []
        best = {"get_metric_fn": _score, "reverse": True, "keep_checkpoints_without_metrics": False}
        kept += [policies.BestN(n=keep_best, **best)] if keep_best else []
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_names=ITEMS,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                best_fn=_score,  # decides nothing here, but without it Orbax writes no score
                best_mode="min",
                cleanup_tmp_directories=True,
                create=True,
            ),
        )

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, record: dict, *, score: float = math.nan) -> None:
        """Writes `state` and the JSON-able `record` in the background. Errors surface at the next call or `close`.

        `score`: what `keep_best` goes by; the lower, the better; not finite: none.

        Raises CheckpointError before anything is written if there is no space for it: Orbax would come to the same end,
        but by way of a traceback for every array.
        """
        step = int(state.step)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.optimizer))) + SPARE_BYTES
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"{self.folder} has no space for the checkpoint of step {step}: it needs {needed / 1e6:,.1f} MB, "
                f"{free / 1e6:,.1f} MB are free: free some, then run the same command again; the newest whole "
                "checkpoint stays"
            )
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave(state.optimizer),
            train=ocp.args.JsonSave({"step": step, **record}),
            data=ocp.args.JsonSave({"next_batch": step, **self._data}),
            about=ocp.args.JsonSave(self._about),
        )
        with self._named():
            self._manager.save(step, args=items, metrics={SCORE: score} if math.isfinite(score) else None, force=True)

    def restore(self, like: TrainState, *, step: int | None = None) -> Restored:
        """The checkpoint of `step` (the newest by default), laid out as `like` (shapes with shardings) says.

        Raises CheckpointError if there is none, if its arrays are not those of `like`, or if it is damaged.
        """
        found = _restore_state(self._manager, like, step)
        heard = {key: value for key, value in found.data.items() if key in self._data}
        if heard != {key: self._data[key] for key in heard}:
            raise CheckpointError(
                f"the checkpoints in {self.folder} are of a run with other batches: give another --workdir"
            )
        return Restored(found.state, found.record)

    def wait(self) -> None:
        """Returns when everything is on disk. Raises CheckpointError naming the folder if it could not be written."""
        with self._named():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is on disk, and lets go of the folder."""
        with self._named():
            self._manager.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            # Of what else failed with it, asyncio would tell one by one, after our own words.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            reason = cannot_write(error, self.folder)
            raise CheckpointError(f"{reason}; the newest whole checkpoint stays") from error


def restore_state(folder: Path, like: TrainState, *, step: int | None = None) -> TrainState:
    """The whole state of another run's checkpoint, its newest by default: parameters, optimizer and step.

    Raises CheckpointError as `Checkpoints.restore` does.
    """
    with _reading(folder) as manager:
        return _restore_state(manager, like, step).state


def restore_parameters(folder: Path, like, *, step: int | None = None):
    """Parameters alone from a run's checkpoints: for evaluation, units, export, and stages that continue another.

    `like` is a nested dict of shapes with shardings, or of NumPy arrays, which come back as such. Raises
    CheckpointError as `Checkpoints.restore` does.
    """
    with _reading(folder) as manager:
        step = _step(manager, step)
        try:
            with _without_echoes():
                restored = manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(like)))
        except Exception as error:
            raise _cannot_restore(error, manager, step, {PARAMS: like}) from error
        return restored[PARAMS]


def read_about(folder: Path, step: int | None = None) -> dict:
    """What a checkpoint says of itself: format, configuration, versions. Raises CheckpointError."""
    with _reading(folder) as manager:
        return _about(manager, _chosen(manager, step))


def steps_of(folder: Path) -> dict[int, float]:
    """Steps of a run's whole checkpoints, ascending, and the score of each; NaN where it has none."""
    with _reading(folder) as manager:
        return {step: (manager.metrics(step) or {}).get(SCORE, math.nan) for step in sorted(manager.all_steps())}


def write_parameters(folder: Path, params: Parameters, *, step: int, about: Mapping[str, Any]) -> None:
    """A checkpoint that holds parameters and `about` alone: what was averaged, not trained."""
    with contextlib.closing(ocp.CheckpointManager(Path(folder).absolute(), item_names=(PARAMS, ABOUT))) as manager:
        items = {"params": ocp.args.StandardSave(params), "about": ocp.args.JsonSave({"format": FORMAT, **about})}
        manager.save(step, args=ocp.args.Composite(**items), force=True)
        manager.wait_until_finished()


def average(folder: Path, steps: list[int], shapes: Parameters) -> Parameters:
    """The mean of the parameters at these steps, NumPy arrays of the stored types; summed in float64, one by one.

    `shapes`: a nested dict of shapes. Raises CheckpointError as `Checkpoints.restore` does.
    """
    like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
    total = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float64), shapes)
    for step in steps:
        jax.tree.map(
            lambda into, found: np.add(into, found, out=into), total, restore_parameters(folder, like, step=step)
        )
    return jax.tree.map(lambda leaf, summed: (summed / len(steps)).astype(leaf.dtype), like, total)


def _of_interest(record: logging.LogRecord) -> bool:
    """Whether Orbax' message is news: it warns of a checkpoint without a score, as a signal's is."""
    return "did not provide metrics" not in record.getMessage()


def _score(metrics: Mapping[str, float]) -> float:
    return metrics[SCORE]


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[ocp.CheckpointManager]:
    """A manager that changes nothing in a run's folder, not even what a writer left half done."""
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist: has that stage been trained in this workdir?")
    options = ocp.CheckpointManagerOptions(create=False)  # and no cleaning
    with contextlib.closing(ocp.CheckpointManager(folder, item_names=ITEMS, options=options)) as manager:
        yield manager


def _step(manager: ocp.CheckpointManager, step: int | None) -> int:
    """`step`, or the newest. Raises CheckpointError if there is no such checkpoint, or if it is of another format."""
    step = _chosen(manager, step)
    found = _about(manager, step).get("format")
    if found != FORMAT:
        raise CheckpointError(
            f"{manager.directory / str(step)} is of format {found}, and this code reads {FORMAT}: use what wrote it"
        )
    return step


def _about(manager: ocp.CheckpointManager, step: int) -> dict:
    try:
        with _without_echoes():
            return manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))[ABOUT]
    except Exception as error:
        raise _cannot_restore(error, manager, step, {}) from error


def _chosen(manager: ocp.CheckpointManager, step: int | None) -> int:
    kept = sorted(manager.all_steps())
    if not kept:
        raise CheckpointError(f"{manager.directory} holds no whole checkpoint: has that stage been trained to the end?")
    if step is not None and step not in kept:
        raise CheckpointError(
            f"{manager.directory} holds no checkpoint of step {step}; there are {', '.join(map(str, kept))}"
        )
    return kept[-1] if step is None else step


class _Found(NamedTuple):
    state: TrainState
    record: dict
    data: dict


def _restore_state(manager: ocp.CheckpointManager, like: TrainState, step: int | None) -> _Found:
    step = _step(manager, step)
    try:
        with _without_echoes():
            items = manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(like.params),
                    optimizer=ocp.args.StandardRestore(like.optimizer),
                    train=ocp.args.JsonRestore(),
                    data=ocp.args.JsonRestore(),
                ),
            )
    except Exception as error:  # of what it cannot read, Orbax tells by exceptions of no class of its own
        raise _cannot_restore(error, manager, step, {PARAMS: like.params, OPTIMIZER: like.optimizer}) from error
    step_array = jax.device_put(jnp.asarray(step, jnp.int32), like.step.sharding)
    return _Found(TrainState(step_array, items[PARAMS], items[OPTIMIZER]), items[TRAIN], items[DATA])


@contextlib.contextmanager
def _without_echoes() -> Iterator[None]:
    """Of a read that fails in this block, the first error is told, by an exception; the others, one by one, are not.

    asyncio would log them; Python would show the coroutines that were given up; and TensorStore, answering from its own
    threads to an event loop that is closed by then, a traceback for each. Some of this comes later, so that the filter
    stays after a failure.
    """
    before = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed" and not inspect.iscoroutine(unraisable.object):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    except Exception:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise
    sys.unraisablehook = before


def _cannot_restore(error: Exception, manager: ocp.CheckpointManager, step: int, items: dict) -> CheckpointError:
    """Why the checkpoint of `step` could not be restored as `items` (name -> tree of shapes): misfit, or damage."""
    folder = Path(manager.directory) / str(step)
    if (folder / BEFORE).is_dir():
        return CheckpointError(
            f"{folder} was written before checkpoints had their present form, and cannot be read any more: train the "
            "stage again, in another --workdir"
        )
    if OPTIMIZER in items and (folder / PARAMS).is_dir() and not (folder / OPTIMIZER).is_dir():
        return CheckpointError(
            f"{folder} holds parameters and no optimizer (an average?): init_from takes it, continue_from does not"
        )
    if _holds_others(folder, items):
        return CheckpointError(
            f"{folder} does not fit this configuration (was the stage changed since? then give a new --workdir): "
            f"{error}"
        )
    before = max((other for other in manager.all_steps() if other < step), default=None)
    reason = str(error.__cause__ or error).splitlines()[0][:120]
    return CheckpointError(
        f"{folder} is damaged ({reason}): copy it again; or delete that folder and train the stage again, which goes "
        f"on from {'the beginning' if before is None else f'step {before}'}"
    )


def _holds_others(folder: Path, items: dict) -> bool:
    """Whether a checkpoint has other arrays than `items`, by its own description, where that can be read."""
    for name, like in items.items():
        try:
            stored = ocp.StandardCheckpointHandler().metadata(folder / name).tree
        except Exception:
            return False
        if _shapes(stored) != _shapes(like):
            return True
    return False


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def start(
    checkpoints: Checkpoints,
    *,
    like: TrainState,
    fresh: Callable[[], TrainState],
    forked: Callable[[], TrainState] | None = None,
    inherited: Parameters | Callable[[Parameters], Parameters] | None = None,
) -> Restored:
    """What a run starts from, by precedence.

    1. The run's own newest checkpoint: it continues, bit for bit.
    2. `forked()`, the whole state of another run (`restore_state`): parameters, optimizer and step, and so the number
       of the next batch and the place in the schedule; metrics and clock begin anew.
    3. `inherited` parameters, all of them or whole branches (or a function that makes them of the fresh ones): step 0,
       an untouched optimizer, the rest fresh.
    4. Nothing: `fresh()`, a newly initialised TrainState.
    """
    if checkpoints.latest() is not None:
        return checkpoints.restore(like)
    if forked is not None:
        return Restored(forked(), {})
    state = fresh()
    if inherited is not None:
        params = inherited(state.params) if callable(inherited) else inherited
        state = dataclasses.replace(state, params=_overlaid(state.params, params))
    return Restored(state, {})


def _overlaid(params: Parameters, inherited: Parameters, path: str = "") -> Parameters:
    """`params` with every leaf that `inherited` has replaced. Raises CheckpointError naming what does not fit."""
    unknown = inherited.keys() - params.keys()
    if unknown:
        raise CheckpointError(f"the model to continue has parameters that this one lacks: {path}{sorted(unknown)[0]}")
    result = dict(params)
    for name, value in inherited.items():
        if isinstance(value, dict):
            result[name] = _overlaid(params[name], value, f"{path}{name}/")
        elif value.shape != params[name].shape:
            raise CheckpointError(f"{path}{name} is {value.shape} in the model to continue, {params[name].shape} here")
        else:
            result[name] = jax.device_put(value, params[name].sharding)
    return result
