"""Waiting for a batch, but not for ever: a read that hangs and a process that was killed become errors with a name."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

STALL_SECONDS = 900.0  # without a batch, after which a run is given up: workers start within a minute

T = TypeVar("T")


class StallError(RuntimeError):
    """No batch came: a read hangs, or a process that makes batches is gone; the message names the step.

    `hangs`: something is still at it, so that closing the iterator would wait for it.
    """

    def __init__(self, reason: str, *, hangs: bool):
        super().__init__(reason)
        self.hangs = hangs


def next_in_time(iterator: Iterator[T], *, step: int, seconds: float) -> T:
    """The iterator's next element, made in a thread of its own, so that the one that waits for it can give up.

    Raises StallError naming `step` after `seconds`, and at once where Grain says that a worker process died. What else
    the iterator raises is raised here.
    """
    answer: queue.SimpleQueue = queue.SimpleQueue()

    def make() -> None:
        try:
            answer.put((next(iterator), None))
        except BaseException as error:  # whatever it is, it belongs to the thread that asked
            answer.put((None, error))

    threading.Thread(target=make, daemon=True).start()
    try:
        element, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise StallError(
            f"no batch of step {step} after {seconds:g} s: a read hangs, or nothing makes batches any more. Look at "
            "the disk or network that the corpus lies on; the run goes on from its last checkpoint",
            hangs=True,
        ) from None
    if error is not None and "Worker process was terminated" in str(error):  # Grain's words
        raise StallError(
            f"a process that makes batches died before step {step} ({str(error).partition('. ')[0]}): killed for "
            "memory, perhaps; lower data.workers or data.prefetch. The run goes on from its last checkpoint",
            hangs=False,
        ) from error
    if error is not None:
        raise error
    return element
