"""Checkpoints on disk (Orbax), and what a run starts from."""

import contextlib
import dataclasses
import inspect
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from data_pipelines.atomic import cannot_write
from wavlab_jax.model import Parameters
from wavlab_jax.state import TrainState

PARAMS, OPTIMIZER, RECORD = "params", "optimizer", "record"  # items of a checkpoint, one folder each
SPARE_BYTES = 4 << 20  # what a checkpoint takes beside its arrays, generously


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or does not fit the model; names the folder and the parameter."""


class Restored(NamedTuple):
    """`state` and the JSON `record` saved with it."""

    state: TrainState
    record: dict


class Checkpoints:
    """The checkpoints of one run, written asynchronously and atomically; a step folder that exists is whole.

    Args:
        folder: of the run's checkpoints.
        keep: how many of the latest stay.
    """

    def __init__(self, folder: Path, *, keep: int = 2):
        self.folder = Path(folder).absolute()
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_names=(PARAMS, OPTIMIZER, RECORD),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.LatestN(keep), cleanup_tmp_directories=True, create=True
            ),
        )

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, record: dict) -> None:
        """Writes `state` and the JSON-able `record` in the background. Errors surface at the next call or `close`.

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
            record=ocp.args.JsonSave({"step": step, **record}),
        )
        with self._named():
            self._manager.save(step, args=items, force=True)

    def restore(self, like: TrainState, *, step: int | None = None) -> Restored:
        """The checkpoint of `step` (the newest by default), laid out as `like` (shapes with shardings) says.

        Raises CheckpointError if there is none, if its arrays are not those of `like`, or if it is damaged.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise CheckpointError(f"{self.folder} holds no whole checkpoint")
        try:
            with _without_echoes():
                items = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        params=ocp.args.StandardRestore(like.params),
                        optimizer=ocp.args.StandardRestore(like.optimizer),
                        record=ocp.args.JsonRestore(),
                    ),
                )
        except Exception as error:  # of what it cannot read, Orbax tells by exceptions of no class of its own
            items = {PARAMS: like.params, OPTIMIZER: like.optimizer}
            raise _cannot_restore(error, self._manager, step, items) from error
        step_array = jax.device_put(jnp.asarray(step, jnp.int32), like.step.sharding)
        return Restored(TrainState(step_array, items[PARAMS], items[OPTIMIZER]), items[RECORD])

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


def restore_parameters(folder: Path, like, *, step: int | None = None):
    """Parameters alone from a run's checkpoints: for evaluation, units, export, and stages that continue another.

    `like` is a nested dict of shapes with shardings. Raises CheckpointError as `Checkpoints.restore` does.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist: has that stage been trained in this workdir?")
    manager = ocp.CheckpointManager(folder, item_names=(PARAMS, OPTIMIZER, RECORD))
    try:
        step = manager.latest_step() if step is None else step
        if step is None:
            raise CheckpointError(f"{folder} holds no whole checkpoint: has that stage been trained to the end?")
        try:
            with _without_echoes():
                restored = manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(like)))
        except Exception as error:
            raise _cannot_restore(error, manager, step, {PARAMS: like}) from error
        return restored[PARAMS]
    finally:
        manager.close()


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
    inherited: Parameters | Callable[[Parameters], Parameters] | None = None,
) -> Restored:
    """What a run starts from, by precedence.

    1. The run's own newest checkpoint: it continues, bit for bit.
    2. `inherited` parameters, all of them or whole branches (or a function that makes them of the fresh ones): step 0,
       an untouched optimizer, the rest fresh.
    3. Nothing: `fresh()`, a newly initialised TrainState.
    """
    if checkpoints.latest() is not None:
        return checkpoints.restore(like)
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
