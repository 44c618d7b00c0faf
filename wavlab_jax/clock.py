"""Where the time goes: throughput, waiting for data, utilisation, and the host's memory."""

import contextlib
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from data_pipelines.batch import SAMPLE_RATE, Batch

# What a line tells of time and memory: other numbers each time, where all the rest of a resumed run is the same.
TIMES = (
    "audio_hours_per_hour",
    "input_wait",
    "step_seconds",
    "teraflops",
    "mfu",
    "host_memory_gb",
    "device_memory_gb",
    "first_step_seconds",
    "seconds",
)
PROBE_TIMES = ("probe_seconds", "probe_share")  # likewise, of a probe's line


_IMPORTED = time.monotonic()


class Work(NamedTuple):
    """What utilisation is measured with.

    Attributes:
        row_flops: samples of a row -> operations that training on it takes by formula (`flops.Flops.training`).
        devices: of the whole run.
        peak: bfloat16 operations a second of one device; None where it is not known.
    """

    row_flops: Callable[[int], float]
    devices: int
    peak: float | None


class Clock:
    """Time and audio that the whole run took so far, pauses between its processes left out; and of the open window, as
    far as this process saw it."""

    def __init__(self, *, seconds: float, audio_seconds: float, probe_seconds: float = 0.0, work: Work | None = None):
        self._probed_before, self._probed_here, self._last_probe = probe_seconds, 0.0, 0.0
        self._before, self._since, self.audio_seconds = seconds, time.monotonic(), audio_seconds
        self._work = work
        self._start_window()
        self._stepped = self._since
        self._first_step, self._told = None, False

    @classmethod
    def restored(cls, record: Mapping, *, work: Work | None = None) -> "Clock":
        """Of a run that goes on from what `record` said; from nothing where it says nothing."""
        seconds = {name: record.get(name, 0.0) for name in ("seconds", "audio_seconds", "probe_seconds")}
        return cls(**seconds, work=work)

    def heard(self, batch: Batch) -> None:
        """Counts this host's rows, times the number of hosts; of skipped steps too."""
        rows, samples = batch.waveform.shape
        rows *= jax.process_count()
        self.audio_seconds += rows * samples / SAMPLE_RATE
        if self._work is not None:
            self._flops += rows * self._work.row_flops(samples)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for the data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    @contextlib.contextmanager
    def probing(self) -> Iterator[None]:
        """Around a probe."""
        began = time.monotonic()
        yield
        self._last_probe = time.monotonic() - began
        self._probed_here += self._last_probe

    def probed(self) -> dict[str, float]:
        """`PROBE_TIMES`: seconds that the last probe took, and the share of the run's time that all of them took."""
        return {"probe_seconds": self._last_probe, "probe_share": _over(self._probed(), self._seconds())}

    def first_step(self, loss: jax.Array) -> str | None:
        """What to say of the start, once, when the first step of this process has been dispatched: waits for its loss.

        The next line has `first_step_seconds`, from the launch of the process to here.
        """
        if self._first_step is not None:
            return None
        dispatched = time.monotonic()
        jax.block_until_ready(loss)
        now = time.monotonic()
        self._first_step = since_launch()
        parts = {
            "until the loop": self._first_step - (now - self._since),
            "for the first batch": self._waited,
            "for a probe": self._probed_here,
            "to compile or load the step": dispatched - self._since - self._waited - self._probed_here,
            "to run it": now - dispatched,
        }
        said = ", ".join(f"{seconds:.1f} s {what}" for what, seconds in parts.items() if seconds >= 0.05)
        return f"the first step ended {self._first_step:.1f} s after the launch: {said}"

    def stepped(self) -> None:
        """At the end of every turn of the loop."""
        now = time.monotonic()
        self._turns.append(now - self._stepped)
        self._stepped = now

    def record(self) -> dict:
        """What a checkpoint remembers."""
        return {"seconds": self._seconds(), "audio_seconds": self.audio_seconds, "probe_seconds": self._probed()}

    def line(self) -> dict[str, float]:
        """The numbers of `TIMES` that are known, and `audio_hours`; a new window begins."""
        seconds = time.monotonic() - self._window
        values = {
            "audio_hours": self.audio_seconds / 3600,
            "audio_hours_per_hour": _over(self.audio_seconds - self._audio, seconds),
            "input_wait": _over(self._waited, seconds),
            "step_seconds": statistics.median(self._turns) if self._turns else math.nan,
        }
        if self._work is not None:
            rate = _over(self._flops, seconds) / self._work.devices
            values["teraflops"] = rate / 1e12
            if self._work.peak is not None:
                values["mfu"] = rate / self._work.peak
        values["host_memory_gb"] = host_memory() / 1e9
        on_device = device_memory()
        if on_device is not None:
            values["device_memory_gb"] = on_device / 1e9
        if self._first_step and not self._told:
            values["first_step_seconds"] = self._first_step
            self._told = True
        self._start_window()
        return {**values, "seconds": self._seconds()}

    def _start_window(self) -> None:
        self._window, self._audio = time.monotonic(), self.audio_seconds
        self._waited, self._flops = 0.0, 0.0
        self._turns: list[float] = []

    def _probed(self) -> float:
        return self._probed_before + self._probed_here

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._since


def since_launch() -> float:
    """Seconds since the system started this process; since this module was imported where it does not tell."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # field 22 of proc(5), ticks
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - _IMPORTED


def host_memory() -> int:
    """Bytes of memory that this process holds now; where the system does not tell, the most that it has held."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def device_memory() -> int | None:
    """The most bytes that any of this host's devices has held so far; None where they do not tell, as on a CPU."""
    found = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((size for size in found if size is not None), default=None)


def _over(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else math.nan
