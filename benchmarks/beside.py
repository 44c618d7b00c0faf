"""Two sides measured beside each other in one process: the same threads and allocator, turn and turn about, medians."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ALLOCATOR = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # as the Makefile runs everything


def environment(threads: int) -> dict[str, str]:
    """Of a process that measures: huge pages for the C library's allocator, which serves both sides; no accelerator."""
    return {**os.environ, **ALLOCATOR, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(threads)}


def prepare(threads: int) -> None:
    """Starts this process again in that environment, unless it is in it; then confines it to `threads` cores.

    To be called before jax or torch is imported.
    """
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], environment(threads))
    if hasattr(os, "sched_setaffinity"):  # XLA takes as many threads as there are cores to run on
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    try:
        import torch
        import transformers
    except ImportError:  # ours alone
        return
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


class Turns(NamedTuple):
    """Seconds of each turn, in order: by the clock, and of processor time over all threads."""

    wall: list[float]
    processor: list[float]

    def summary(self, audio_seconds: float) -> dict[str, Any]:
        """Medians and bests; audio seconds encoded a second."""
        median = statistics.median(self.wall)
        return {
            "median_seconds": round(median, 3),
            "best_seconds": round(min(self.wall), 3),
            "median_processor_seconds": round(statistics.median(self.processor), 3),
            "times_real_time": round(audio_seconds / median, 2),
            "seconds": [round(second, 3) for second in self.wall],
        }


def take_turns(sides: dict[str, Callable[[], object]], *, repeats: int) -> dict[str, Turns]:
    """Each side `repeats` times, in alternating order; a call must return only when its result is there."""
    turns = {name: Turns([], []) for name in sides}
    for repeat in range(repeats):
        for name in sides if repeat % 2 == 0 else reversed(sides):
            wall, processor = time.perf_counter(), time.process_time()
            sides[name]()
            turns[name].wall.append(time.perf_counter() - wall)
            turns[name].processor.append(time.process_time() - processor)
    return turns


def ratios(ours: Turns, theirs: Turns) -> dict[str, float]:
    """Their time over ours: of the medians by the clock, of the bests, of processor time, and turn by turn."""
    pairs = [b / a for a, b in zip(ours.wall, theirs.wall, strict=True)]
    return {
        "ratio": round(statistics.median(theirs.wall) / statistics.median(ours.wall), 3),
        "ratio_of_bests": round(min(theirs.wall) / min(ours.wall), 3),
        "ratio_of_processor_time": round(statistics.median(theirs.processor) / statistics.median(ours.processor), 3),
        "median_of_paired_ratios": round(statistics.median(pairs), 3),
    }


def told(name: str, peer: str, found: dict[str, Any]) -> str:
    """A line of a comparison: `found` has the summaries of "wavlab_jax" and `peer`, and `ratios`."""
    ours, theirs = found["wavlab_jax"], found[peer]
    return (
        f"{name}: {ours['median_seconds']:.2f} s, {peer} {theirs['median_seconds']:.2f} s: {found['ratio']:.2f}x "
        f"(bests {found['ratio_of_bests']:.2f}x, processor time {found['ratio_of_processor_time']:.2f}x, pairs "
        f"{found['median_of_paired_ratios']:.2f}x)"
    )


def machine(threads: int) -> dict[str, Any]:
    """What the numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version

    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    versions = {}
    for name in ("jax", "torch", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "allocator": ALLOCATOR,
        "python": platform.python_version(),
        **versions,
    }
