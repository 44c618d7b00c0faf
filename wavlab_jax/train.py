"""The loop. It is given a state, batches and a step, and holds the order of events and nothing else.

1. The step on batch k is dispatched.            4. Every `log_every` steps, one line of metrics is written.
2. The metrics of step k - 1 are read.           5. Every `save_every` steps, and at the end or when interrupted, the
3. A step that was not finite stops the run.        state is saved - after its own metrics were read.

A signal to stop may reach one process of several. Its number travels with the next step, whose result tells it to all;
they read that in 2., and so stop after the same step. Alone, a process stops after the step at hand.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import jax
from tqdm import tqdm

from data_pipelines.batch import Batch
from wavlab_jax.checkpoint import Checkpoints
from wavlab_jax.metrics import MetricsWriter, Sum, Sums, ratios
from wavlab_jax.state import TrainState
from wavlab_jax.step import StepResult


class NonFinite(RuntimeError):
    """Loss or gradient of a step was not finite. The parameters are those before it; the message names its rows."""


class LoopError(ValueError):
    """A loop that cannot run, or would leave nothing behind; the message names the field and what to give."""


class Interrupted(RuntimeError):
    """The run was asked to stop, saved its state, and can be continued by the same command.

    `status` to exit with: 130 after Ctrl-C; 75 (EX_TEMPFAIL: run me again) after SIGTERM or SIGUSR1, by which
    schedulers announce the end of an allocation.
    """

    def __init__(self, said: str, *, number: int):
        super().__init__(said)
        self.status = 130 if number == signal.SIGINT else 75


@dataclass(frozen=True)
class LoopConfig:
    """How long, and how often what.

    Attributes:
        steps: updates in all.
        log_every: updates a line of metrics sums up.
        save_every: updates between checkpoints.
        keep: of the latest checkpoints, how many stay.
        keep_every: beside them, those whose step this divides; a multiple of `save_every`; 0: none.
        keep_best: beside them, so many with the lowest training loss, taken over the steps since the checkpoint before;
            0: none.
    """

    steps: int = 400_000
    log_every: int = 100
    save_every: int = 5_000
    keep: int = 2
    keep_every: int = 0
    keep_best: int = 0

    def __post_init__(self):
        for name in ("steps", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise LoopError(f"loop.{name} is {getattr(self, name)}; it must be at least 1")
        if self.keep_best < 0 or self.keep_every < 0 or self.keep_every % self.save_every:
            raise LoopError(
                f"loop.keep_every is {self.keep_every}, loop.keep_best {self.keep_best}: neither may be negative, and "
                f"the first must be a multiple of loop.save_every, {self.save_every}"
            )


class Window(NamedTuple):
    """What has been summed since the last line of metrics; plain floats, so that a checkpoint can carry it exactly."""

    sums: dict[str, tuple[float, float]]
    gradient_norm: float
    steps: int

    @classmethod
    def empty(cls) -> "Window":
        """Nothing summed yet."""
        return cls({}, 0.0, 0)

    def plus(self, sums: dict[str, tuple[float, float]], gradient_norm: float) -> "Window":
        """This window and one more step."""
        added = {name: (t + sums[name][0], w + sums[name][1]) for name, (t, w) in self.sums.items()} or sums
        return Window(added, self.gradient_norm + gradient_norm, self.steps + 1)


def train(
    state: TrainState,
    step: Callable[[TrainState, Batch, int], tuple[TrainState, StepResult]],
    batches: Iterator[Batch],
    *,
    place: Callable[[Batch], Batch],
    describe: Callable[[Batch], list[str]],
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    cfg: LoopConfig,
    record: dict,
    title: str,
    shown: tuple[str, ...] = ("masked_loss", "masked_accuracy"),
) -> TrainState:
    """Runs until `cfg.steps` updates have been made and saved; returns the final state.

    Args:
        state: to start from; batch number `state.step` is the first that `batches` yields.
        step: from `make_train_step`.
        batches: this host's rows of each batch, in order.
        place: host rows -> global arrays.
        describe: names of a batch's rows, for messages.
        checkpoints, writer: opened at `state.step`.
        cfg: lengths and intervals.
        record: what was saved beside `state`: the open window of metrics and the time spent so far.
        title: of the progress bar. shown: the sums that it shows beside the speed (an objective's `SHOWN`).

    Raises:
        NonFinite: naming the files of the batch.
        Interrupted: after saving.
    """
    done = int(state.step)
    window = Window(*record["window"]) if record.get("window") else Window.empty()
    clock = Clock(seconds=record.get("seconds", 0.0), audio_seconds=record.get("audio_seconds", 0.0))
    pending: tuple[int, StepResult, Batch] | None = None
    saved, scored = done, (0.0, 0.0)  # of the steps since: the loss and its weight
    alone, agreed = jax.process_count() == 1, 0  # the number of a signal that every process knows of

    def stopping() -> int:
        return max(stop, default=0) if alone else agreed

    def read_pending(window: Window) -> Window:
        nonlocal agreed, scored
        if pending is None:
            return window
        number, result, batch = pending
        result = jax.device_get(result)
        if not result.finite:
            raise NonFinite(
                f"step {number}: loss {result.loss}, gradient norm {result.gradient_norm}. It changed no parameters; "
                f"the last checkpoint is of step {saved}. The step's rows:\n  " + "\n  ".join(describe(batch))
            )
        agreed = max(agreed, int(result.wish))
        clock.heard(batch)
        window = window.plus(_floats(result.sums), float(result.gradient_norm))
        scored = tuple(float(so_far + here) for so_far, here in zip(scored, result.sums[shown[0]], strict=True))
        if number % cfg.log_every == 0 or number == cfg.steps:
            values = _line(window, result, clock)
            writer.write(number, values)
            said = "".join(f"{name.replace('_', ' ')} {values[name]:.3f}, " for name in shown)
            bar.set_postfix_str(f"{said}{values['audio_hours_per_hour']:.0f} audio-h/h", refresh=False)
            return Window.empty()
        return window

    def save(window: Window) -> None:
        nonlocal scored
        writer.sync()  # a run that continues from this checkpoint does not write the lines before it again
        score = scored[0] / scored[1] if scored[1] else math.nan
        checkpoints.save(state, {**clock.record(), "window": list(window)}, score=score)
        scored = (0.0, 0.0)

    bar_of = {"total": cfg.steps, "initial": done, "desc": title, "unit": "step", "disable": jax.process_index() > 0}
    with stop_signals() as stop, tqdm(**bar_of, dynamic_ncols=True, mininterval=1.0) as bar:
        while done < cfg.steps and not stopping():
            batch = next(batches)
            state, result = step(state, place(batch), max(stop, default=0))
            window = read_pending(window)  # of the step before, while this one computes
            done += 1
            pending = (done, result, batch)
            bar.update()
            if done % cfg.save_every == 0 or done == cfg.steps or stopping():
                window, pending = read_pending(window), None
                save(window)
                saved = done
        if saved < done:
            save(read_pending(window))
    checkpoints.wait()
    if done < cfg.steps:
        said = f"stopped after step {done} of {cfg.steps}, saved; the same command continues"
        raise Interrupted(said, number=stopping())
    return state


class Clock:
    """Time and audio that the whole run took so far, pauses between its processes left out."""

    def __init__(self, *, seconds: float, audio_seconds: float):
        self._before, self._since, self.audio_seconds = seconds, time.monotonic(), audio_seconds
        self._mark: tuple[float, float] = (seconds, audio_seconds)

    def heard(self, batch: Batch) -> None:
        """Counts this host's rows, times the number of hosts."""
        self.audio_seconds += batch.waveform.size / 16_000 * jax.process_count()

    def record(self) -> dict:
        """What a checkpoint remembers."""
        return {"seconds": self._seconds(), "audio_seconds": self.audio_seconds}

    def rate(self) -> float:
        """Audio-hours per hour since this was last asked."""
        now = (self._seconds(), self.audio_seconds)
        seconds, audio = now[0] - self._mark[0], now[1] - self._mark[1]
        self._mark = now
        return audio / seconds if seconds > 0 else math.nan

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._since


def _floats(sums: Sums) -> dict[str, tuple[float, float]]:
    return {name: (float(total), float(weight)) for name, (total, weight) in sums.items()}


def _line(window: Window, result: StepResult, clock: Clock) -> dict[str, float]:
    values = ratios({name: Sum(*pair) for name, pair in window.sums.items()})
    return {
        **values,
        "gradient_norm": window.gradient_norm / window.steps,
        "learning_rate": float(result.learning_rate),
        "audio_hours": clock.audio_seconds / 3600,
        "audio_hours_per_hour": clock.rate(),
        "seconds": clock.record()["seconds"],
    }


@contextmanager
def stop_signals():
    """A list of the numbers of the signals that came: SIGINT, SIGTERM, and SIGUSR1, by which Slurm warns.

    A second Ctrl-C ends the process as usual. The others may come again, by way of whoever passes them on, and do not.
    """
    caught: list[int] = []
    before = {}

    def handle(number, frame):
        caught.append(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        before[number] = signal.signal(number, handle)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
