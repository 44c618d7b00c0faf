"""Ctrl-C in the seconds in which a command line imports what it needs: one line instead of a traceback."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

SAID = "interrupted; the same command goes on from here"
STATUS = 130  # what shells give for SIGINT


@contextlib.contextmanager
def interrupts_end_at_once() -> Iterator[None]:
    """In this block Ctrl-C says so and ends the process with status 130, on the spot.

    For imports, in which nothing is under way that must be put in order: an exception that passed through them would
    be shown by whichever C extension it meets. Where Ctrl-C is ignored (`nohup`), or answered otherwise, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def end(number, frame):
        os.write(sys.stderr.fileno(), f"{SAID}\n".encode())
        os._exit(STATUS)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
