"""A trace of a few steps of a run, as jax.profiler takes it: `--loop.profile-steps 3`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from tqdm import tqdm

WARM_UP = 10  # steps of this process before: programs of every static length are mostly compiled by then


class Profile:
    """Traces `steps` steps after `WARM_UP` others (fewer, if the run is shorter) into `folder`; 0 steps: nothing.

    Of several processes the first alone: they would write to one folder in the same second, for which jax has no place.
    A context: what ends early is written as far as it came.
    """

    def __init__(self, folder: Path, *, steps: int, left: int):
        """`left`: steps that this process will take."""
        self._folder, steps = folder, steps if jax.process_index() == 0 else 0
        self._first = min(WARM_UP, max(left - steps, 0))
        self._last = self._first + steps - 1
        self._taken, self._running = 0, False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[list]:
        """Around the dispatch of step `number`; what the block puts into the list is waited for after the last one."""
        results: list = []
        if self._taken == self._first <= self._last:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running = True
        with jax.profiler.StepTraceAnnotation("step", step_num=number) if self._running else contextlib.nullcontext():
            yield results
        if self._running and self._taken == self._last:
            jax.block_until_ready(results)
            self._stop()
        self._taken += 1

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
        tqdm.write(
            f"a trace of {self._last - self._first + 1} steps is in {self._folder}: docs/health.md says what opens it"
        )

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        if self._running:
            self._stop()
