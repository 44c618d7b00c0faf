"""Memory that compiling a program took, returned to the system."""

import ctypes
from functools import cache

from jax import monitoring

COMPILED = "/jax/core/compile/backend_compile_duration"  # jax's name of the event, `jax/_src/dispatch.py`
LONG = 1.0  # seconds of compiling that leave something worth returning


@cache
def return_memory_after_compiling() -> None:
    """From now on this process returns what compiling took to the system, before the program runs.

    XLA and LLVM free it, but the GNU C library keeps most for what it might be asked for next, and the step's arrays
    are not put there: their pages are asked of the system anew. Without that library nothing is done.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return

    def compiled(event: str, seconds: float, **_) -> None:
        if event == COMPILED and seconds >= LONG:
            trim(0)

    monitoring.register_event_duration_secs_listener(compiled)
