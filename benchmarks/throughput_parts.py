"""Where the processor time of a training batch goes, beside bare decoding: what docs/data.md explains shares with.

    PYTHONPATH=. python -m benchmarks.throughput_parts [PREPARED] [--write]

Parts of `LoadBatch` are timed alone, by turns, each over the same steps of 64 s without mixing, in processor time of
this thread; then whole batches by one worker process, as processor time of each thread of each process. Each figure is
a median of rounds, in milliseconds a batch; differences are medians of differences within a round.
"""

import argparse
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.data_throughput import LENGTHS, Crop, Noting, children, labelled_corpus, take, wait_until_full
from benchmarks.sections import write_section
from data_pipelines.audio import decode_crop
from data_pipelines.manifest import Manifest
from data_pipelines.pipeline import DataConfig, LoadBatch, train_batches

TITLE = "Throughput: what the share consists of"


class Unread:
    """A source that reads nothing: what is left of the chain is all but reading and decoding."""

    def __init__(self, source):
        self.manifest = source.manifest

    def read(self, i: int, *, start: int = 0, samples: int | None = None, out=None) -> np.ndarray:
        """`out`, as it is."""
        return out


def in_thread(work: Callable[[], None]) -> float:
    """Processor seconds of `work` in a thread of its own."""
    took = []

    def timed() -> None:
        begin = time.thread_time()
        work()
        took.append(time.thread_time() - begin)

    thread = threading.Thread(target=timed)
    thread.start()
    thread.join()
    return took[0]


def parts(manifest: Manifest, units: tuple, *, rounds: int, steps: int) -> list[str]:
    """The first table."""
    cfg = DataConfig(lengths=LENGTHS, mixing=None)
    noting = LoadBatch(cfg, manifest, units)
    noting.source = noting.interferer.source = Noting(manifest)
    for step in range(steps):
        noting.map(step)
    crops: list[Crop] = noting.source.crops
    loader, unread = LoadBatch(cfg, manifest, units), LoadBatch(cfg, manifest, units)
    unread.source = unread.interferer.source = Unread(loader.source)
    held = {crop.utterance: loader.source.record(crop.utterance)["audio"] for crop in crops}

    def decode_held() -> None:
        for crop in crops:
            decode_crop(held[crop.utterance], start=crop.start, samples=crop.samples)

    def read_records() -> None:
        for crop in crops:
            loader.source.record(crop.utterance)

    def read_and_decode() -> None:
        for crop in crops:
            loader.source.read(crop.utterance, start=crop.start, samples=crop.samples)

    def rest() -> None:
        for step in range(steps):
            unread.map(step)

    def chain() -> None:
        for step in range(steps):
            loader.map(step)

    ways = {
        "bare decoding of records in memory": decode_held,
        "records read, unpacked and checked, nothing decoded": read_records,
        "records read and decoded one after another": read_and_decode,
        "all but these: draw, seeds, labels, the batch's arrays": rest,
        "the chain": chain,
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for work in ways.values():
        work()
    for _ in range(rounds):
        for name, work in ways.items():
            took[name].append(in_thread(work) * 1000 / steps)
    base = np.array(took["bare decoding of records in memory"])
    return [
        "| in one thread | ms a batch | more than bare decoding |",
        "|---|---:|---:|",
        *(f"| {name} | {np.median(ms):.2f} | {np.median(np.array(ms) - base):+.2f} |" for name, ms in took.items()),
    ]


def _threads() -> dict[tuple[int, str], float]:
    """{(process, thread): processor seconds} of this process and all below it; the first thread is "main"."""
    found, left = {}, [os.getpid()]
    while left:
        pid = left.pop()
        left += children(pid)
        for task in Path(f"/proc/{pid}/task").iterdir():
            try:
                seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
            except OSError:
                continue
            key = (pid, "main" if int(task.name) == pid else "others")
            found[key] = found.get(key, 0.0) + seconds
    return found


def by_process(manifest: Manifest, units: tuple, *, rounds: int, steps: int) -> list[str]:
    """The second table."""
    rows: dict[str, list[float]] = {}
    cfg = DataConfig(lengths=LENGTHS, mixing=None, workers=1, threads=1, prefetch=4)
    with train_batches(cfg, manifest, units) as batches:
        work = take(batches, steps)
        take(batches, 8)()
        wait_until_full()
        for _ in range(rounds):
            before = _threads()
            work()
            looking = wait_until_full().looking
            after = _threads()
            after[os.getpid(), "main"] -= looking
            for (pid, thread), seconds in after.items():
                where = "this process" if pid == os.getpid() else "worker"
                spent = (seconds - before.get((pid, thread), 0.0)) * 1000 / steps
                rows.setdefault(f"{where}, {'first thread' if thread == 'main' else 'the others'}", []).append(spent)
    return [
        "| one worker that reads ahead with one thread | ms a batch |",
        "|---|---:|",
        *(f"| {name} | {np.median(ms):.2f} |" for name, ms in rows.items() if np.median(ms) >= 0.05),
    ]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root, manifest, units = labelled_corpus(given.prepared, Path(scratch))
        lines = [
            f"`python -m benchmarks.throughput_parts --write`; {platform.machine()}, {os.cpu_count()} cores, shared",
            f"(load {os.getloadavg()[0]:.1f}); steps of 64 s without mixing, processor time, medians of {given.rounds}",
            "rounds.",
            "",
            *parts(manifest, units, rounds=given.rounds, steps=given.steps),
            "",
            *by_process(manifest, units, rounds=given.rounds, steps=given.steps),
        ]
    print("\n".join(lines))
    if given.write:
        write_section("docs/data.md", TITLE, "\n".join(lines))


if __name__ == "__main__":
    main()
