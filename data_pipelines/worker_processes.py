"""Processes that work for this one: Ctrl-C is for it to answer, and they end when it does, however it ends."""

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # a container's share: microseconds of processor time, in so many


def cores() -> int:
    """Cores that this process may use: under Slurm, taskset or in a container fewer than the machine has."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        share, period = CPU_MAX.read_text().split()
        return max(1, min(count, math.ceil(int(share) / int(period))))
    except (OSError, ValueError):  # no such limit, or "max"
        return count


@contextlib.contextmanager
def interrupts_blocked(*others: int) -> Iterator[None]:
    """Processes that are started in this block, or by threads that are, never see Ctrl-C; this one answers it after.

    Nor do they see the signals `others`, which this process answers as soon as it can. Ctrl-C reaches the whole process
    group, and so may what a scheduler sends. A worker can only arrange itself with that once it runs our code; before,
    while it imports, it would die of it with a traceback, and the run with it. A blocked signal is inherited instead.
    The mask is the thread's alone: a thread of some library may still take the signal, and Python would raise it here
    between a process' start and the message that it waits for. So the answer is put off as well.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *others})
    resource_tracker.ensure_running()  # a process as well; started by the first other one, it would unblock them then
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *others})
    taken = []
    answer = signal.getsignal(signal.SIGINT)
    puts_off = callable(answer) and threading.current_thread() is threading.main_thread()
    if puts_off:  # where it is ignored (`nohup`), it stays so
        signal.signal(signal.SIGINT, lambda *event: taken.append(event))
    try:
        yield
    finally:
        if puts_off:
            signal.signal(signal.SIGINT, answer)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if taken:
            answer(*taken[0])


def die_of_interrupts() -> None:
    """In a worker that may stop anywhere: from here on Ctrl-C ends it, without a word.

    Where Ctrl-C is ignored (`nohup`, a shell's background) it stays so.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def follow_parent() -> None:
    """In a worker: end at once when the parent does, also if that is killed and cannot say so."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
