"""A k-means fit between two passes, and the file that one which was stopped goes on from."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from data_pipelines.atomic import whole_file


class FitState(NamedTuple):
    """All that the next pass depends on, besides the features.

    Attributes:
        centers: float64 [units, width] around `shift`.
        seen: int64 [units], frames that each center is the running mean of (mini-batches only).
        shift: float32 [width], the mean of the features.
        variance: of the features, averaged over dimensions.
        history, reseeded, converged: as in `kmeans.Centroids`.
    """

    centers: np.ndarray
    seen: np.ndarray
    shift: np.ndarray
    variance: float
    history: tuple[float, ...]
    reseeded: int
    converged: bool


def write_state(path: Path, state: FitState, source: str) -> None:
    """Saves the state, whole or not at all; the first process does. Raises CannotWrite."""
    if jax.process_index() == 0:
        with whole_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, source=source, **state._asdict())


def read_state(path: Path, source: str) -> FitState | None:
    """The state that was saved for the same `source`; None if there is none."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as kept:
        if str(kept["source"]) != source:
            return None
        state = FitState(**{name: kept[name] for name in FitState._fields})
    return state._replace(
        variance=float(state.variance),
        history=tuple(state.history.tolist()),
        reseeded=int(state.reseeded),
        converged=bool(state.converged),
    )
