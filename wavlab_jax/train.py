"""The loop. It is given a state, batches and a step, and holds the order of events and nothing else.

1. The step on batch k is dispatched.            4. Every `log_every` steps, one line of metrics is written.
2. The metrics of step k - 1 are read.           5. Every `save_every` steps, and at the end or when interrupted, the
3. A step that was not finite changes nothing;      state is saved - after its own metrics were read.
   it stops the run, or is skipped and named.    6. Before that, where a probe is due, the parameters are probed.

A signal to stop may reach one process of several. Its number travels with the next step, whose result tells it to all;
they read that in 2., and so stop after the same step. Alone, a process stops after the step at hand.
"""

import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from tqdm import tqdm

from data_pipelines.batch import Batch
from wavlab_jax.checkpoint import Checkpoints
from wavlab_jax.clock import Clock, Work
from wavlab_jax.metrics import MetricsWriter, Sum
from wavlab_jax.model import Parameters
from wavlab_jax.profile import Profile
from wavlab_jax.skipped import NonFinite, Skips
from wavlab_jax.state import TrainState
from wavlab_jax.step import StepResult
from wavlab_jax.window import Window

__all__ = ["Interrupted", "LoopConfig", "LoopError", "NonFinite", "Probes", "train"]


NONE_SKIPPED = {"in_row": 0, "in_all": 0}


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
        keep_best: beside them, so many with the lowest training loss, taken over the steps since the scored checkpoint
            before, or with the lowest validation loss where there is one; 0: none. One that a signal asked for has no
            score.
        non_finite: what a step does whose loss or gradient is not finite; it changes no parameters either way. "stop"
            the run, or "skip" it: the next batch follows, and the learning rate goes on as if it had counted.
        skip_in_row, skip_in_all: how many such steps are borne, one after the other and in the whole run, before it
            stops all the same.
        profile_steps: that each call of `train` traces, of its first process, into the stage's folder `profile`; 0 for
            none.
        wandb: project of Weights & Biases that the metrics go to as well; empty for none. The run is called as the
            stage is, and stays one run however often it is continued.
    """

    steps: int = 400_000
    log_every: int = 100
    save_every: int = 5_000
    keep: int = 2
    keep_every: int = 0
    keep_best: int = 0
    non_finite: Literal["stop", "skip"] = "stop"
    skip_in_row: int = 5
    skip_in_all: int = 100
    profile_steps: int = 0
    wandb: str = ""

    def __post_init__(self):
        for name in ("steps", "log_every", "save_every", "keep", "skip_in_row", "skip_in_all"):
            if getattr(self, name) < 1:
                raise LoopError(f"loop.{name} is {getattr(self, name)}; it must be at least 1")
        if self.profile_steps < 0:
            raise LoopError(f"loop.profile_steps is {self.profile_steps}; give how many steps to trace, or 0 for none")
        if self.keep_best < 0 or self.keep_every < 0 or self.keep_every % self.save_every:
            raise LoopError(
                f"loop.keep_every is {self.keep_every}, loop.keep_best {self.keep_best}: neither may be negative, and "
                f"the first must be a multiple of loop.save_every, {self.save_every}"
            )

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is due then, signals apart."""
        return step % self.save_every == 0 or step == self.steps


class Probes(NamedTuple):
    """How the parameters are judged while they are trained.

    Attributes:
        every: steps between two probes; there is one after the last step as well.
        at_start: whether one comes before the first step.
        judge: the parameters and the number of steps made, to what is written: all processes call it at the same steps.
    """

    every: int
    at_start: bool
    judge: Callable[[Parameters, int], Mapping[str, Any]]


@dataclass
class Score:
    """The training loss over the steps since a checkpoint had it for its score."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, step: Sum) -> None:
        """Another step's."""
        self.total, self.weight = self.total + float(step.total), self.weight + float(step.weight)

    def taken(self) -> float:
        """The mean, NaN of no step; begins anew."""
        mean = self.total / self.weight if self.weight else math.nan
        self.total, self.weight = 0.0, 0.0
        return mean

    def record(self) -> list[float]:
        """To be `Score(*record)` again."""
        return [self.total, self.weight]


def train(
    state: TrainState,
    step: Callable[[TrainState, Batch, int], tuple[TrainState, StepResult]],
    batches: Iterator[Batch],
    *,
    place: Callable[[Batch], Batch],
    describe: Callable[[Batch], list[str]],
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    folder: Path,
    cfg: LoopConfig,
    record: dict,
    title: str,
    languages: Sequence[str] = (),
    work: Work | None = None,
    probes: Probes | None = None,
    shown: tuple[str, ...] = ("masked_loss", "masked_accuracy"),
    validate: Callable[[Parameters], float] | None = None,
    say_start: bool = False,
) -> TrainState:
    """Runs until `cfg.steps` updates have been made and saved; returns the final state.

    Args:
        state: to start from; batch number `state.step` is the first that `batches` yields.
        step: from `make_train_step`.
        batches: this host's rows of each batch, in order.
        place: host rows -> global arrays. describe: names of a batch's rows, for messages.
        checkpoints, writer: opened at `state.step`. folder: for what else the run leaves: skipped.jsonl, profile.
        cfg: lengths and intervals. probes: when and how the parameters are judged; None: never.
        record: what was saved beside `state`: the open window of metrics, the score so far, the time spent so far.
        languages: names of those that the step tells apart. work: what utilisation is measured with.
        title: of the progress bar. shown: the sums that it shows beside the speed (an objective's `SHOWN`).
        validate: parameters -> the validation loss, asked for before each save but a signal's; it is what `keep_best`
            goes by then, and stands in the metrics as `valid_loss`.
        say_start: whether to say when the first step ended.

    Raises:
        NonFinite: naming the files of the batch; and of those that were skipped before it, where they are named.
        Interrupted: after saving.
    """
    done, window = int(state.step), Window.restored(record.get("window"))
    clock = Clock.restored(record, work=work)
    allowed = {"in_row": cfg.skip_in_row, "in_all": cfg.skip_in_all} if cfg.non_finite == "skip" else NONE_SKIPPED
    skips = Skips(folder, record=record, resume_step=done, describe=describe, **allowed)
    pending: tuple[int, StepResult, Batch] | None = None
    saved, score = done, Score(*record.get("score", ()))
    alone, agreed = jax.process_count() == 1, 0  # the number of a signal that every process knows of

    def stopping() -> int:
        return max(stop, default=0) if alone else agreed

    def read_pending(window: Window) -> Window:
        nonlocal agreed
        if pending is None:
            return window
        number, result, batch = pending
        result = jax.device_get(result)
        agreed = max(agreed, int(result.wish))
        clock.heard(batch)
        if skips.passed(number, result, batch, saved=saved):
            window = window.plus(result)
            score.add(result.sums[shown[0]])
        if number % cfg.log_every == 0 or number == cfg.steps:
            told = {"learning_rate": float(result.learning_rate), "skipped": skips.total, **clock.line()}
            values = {**window.line(languages), **told}
            writer.write(number, values)
            bar.set_postfix_str(_beside_bar(values, shown), refresh=False)
            return Window()
        return window

    def save(window: Window) -> None:
        # where a signal asks for it, at once, and not scored: there may be few steps since the last
        found = score.taken() if cfg.saves_after(done) else math.nan
        if validate is not None and cfg.saves_after(done):
            found = validate(state.params)
            writer.write(int(state.step), {"valid_loss": found})
        writer.sync()  # a run that continues from this checkpoint does not write the lines before it again
        kept = {**clock.record(), **skips.record(), "window": window.record(), "score": score.record()}
        checkpoints.save(state, kept, score=found)

    def probe() -> None:
        with clock.probing():
            told = probes.judge(state.params, done)
        writer.write_probe(done, {**told, **clock.probed()})

    bar_of = {"total": cfg.steps, "initial": done, "desc": title, "unit": "step", "disable": jax.process_index() > 0}
    with (
        stop_signals() as stop,
        Profile(folder / "profile", steps=cfg.profile_steps, left=cfg.steps - done) as profile,
        tqdm(**bar_of, dynamic_ncols=True, mininterval=1.0) as bar,
    ):
        if probes is not None and probes.at_start:
            probe()
        while done < cfg.steps and not stopping():
            with clock.waiting():
                batch = next(batches)
            with profile.step(done + 1) as awaited:
                state, result = step(state, place(batch), max(stop, default=0))
                awaited.append(result.loss)
            if say_start and (said := clock.first_step(result.loss)):
                bar.write(said)
            window = read_pending(window)  # of the step before, while this one computes
            done += 1
            pending = (done, result, batch)
            bar.update()
            if probes is not None and (done % probes.every == 0 or done == cfg.steps):
                window, pending = read_pending(window), None
                probe()
            if cfg.saves_after(done) or stopping():
                window, pending = read_pending(window), None
                save(window)
                saved = done
            clock.stepped()
        if saved < done:
            save(read_pending(window))
        checkpoints.wait()  # a signal that comes again meanwhile must not end the save
    if done < cfg.steps:
        said = f"stopped after step {done} of {cfg.steps}, saved; the same command continues"
        raise Interrupted(said, number=stopping())
    return state


def _beside_bar(values: Mapping[str, Any], shown: Sequence[str]) -> str:
    said = "".join(f"{name.replace('_', ' ')} {values.get(name, math.nan):.3f}, " for name in shown)
    return f"{said}{values['audio_hours_per_hour']:.0f} audio-h/h"


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
