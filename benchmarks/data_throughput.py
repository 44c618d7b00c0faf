"""Audio-hours per core-second of the whole training chain beside bare decoding, and beside PyTorch's DataLoader.

    PYTHONPATH=. python benchmarks/data_throughput.py [PREPARED] [--write docs/data.md]

Turns are interleaved and medians are given. Everything reads the same corpus (the demo corpus where none is given,
joined to 10 s) from the page cache. Core-seconds are processor time of this process and all below it.

* bare: the FLAC bytes of every crop, partners' crops too, lie in memory already and are decoded in one loop.
* chain: `LoadBatch`, as training has it: draw, read, decode, mix, label, batch; with threads or workers, in Grain.
* DataLoader: a PyTorch data set of the same rows in the same order, read by the same reader and mixed by the same
  functions; the drawing of rows was done before and costs it nothing.

What works ahead has full buffers when its turn begins, and its turn ends when they are full again: so a turn of n steps
is charged for the making of n steps.
"""

import argparse
import os
import platform
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipelines.audio import decode_crop
from data_pipelines.batch import HOP, SAMPLE_RATE, num_frames
from data_pipelines.manifest import Manifest
from data_pipelines.mixing import MixingConfig
from data_pipelines.pipeline import DataConfig, LoadBatch, train_batches
from data_pipelines.prepare import prepare
from data_pipelines.sources import ShardSource
from data_pipelines.units import UnitStore, UnitWriter

UNITS = 500
LENGTHS = (128_000, 256_000)
IDLE, STILL = 0.02, 5  # looked so often, in seconds; so often in a row nothing runs: the buffers are full
UTILISATION = 0.4
HOSTS = {"TPU v5e, 8 chips": (8, 197e12), "4 A100": (4, 312e12), "4 H100": (4, 989e12)}  # chips, FLOP/s of one
MODELS = {"Base, 86 M in the layers": 86e6, "Large, 302 M": 302e6}
BEGIN, END = "<!-- throughput -->", "<!-- /throughput -->"


class Turn(NamedTuple):
    """One way's turn: audio delivered, wall-clock seconds, core-seconds."""

    audio: float
    wall: float
    cores: float


class Crop(NamedTuple):
    """What a read asked for."""

    utterance: int
    start: int
    samples: int


class Noting(ShardSource):
    """A source that notes what is asked of it."""

    def __init__(self, manifest: Manifest):
        super().__init__(manifest)
        self.crops: list[Crop] = []

    def read(self, i: int, *, start: int = 0, samples: int | None = None, out=None) -> np.ndarray:
        """As the source; `crops` grows by one."""
        self.crops.append(Crop(int(i), start, samples))
        return super().read(i, start=start, samples=samples, out=out)


class Key(NamedTuple):
    """A row of a step, drawn already."""

    step: int
    row: int
    place: int
    first_row: int
    utterance: int
    start: int


class Rows:
    """The same rows as a PyTorch data set: an item is (waveform, labels, language)."""

    def __init__(self, loader: LoadBatch):
        self.loader = loader

    def __getitem__(self, key):
        loader, samples = self.loader, self.loader.cfg.lengths[key.place]
        rng = np.random.default_rng([loader.cfg.seed, key.step, key.row])
        rng.integers(1 << 32, dtype=np.uint32)
        waveform = loader.source.read(key.utterance, start=key.start, samples=samples)
        heard = loader.interferer.disturb(waveform, place=key.place, row=key.first_row + key.row, rng=rng)
        labels = loader.units[0].crop(key.utterance, start=key.start, frames=num_frames(samples))
        return heard.waveform, labels.astype(np.int32), int(loader.manifest.language[key.utterance])


def cpu_seconds() -> float:
    """Processor time of this process and of all its living descendants."""
    total, left, tick = time.process_time(), children(os.getpid()), os.sysconf("SC_CLK_TCK")
    while left:
        pid = left.pop()
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / tick
        left += children(pid)
    return total


def children(pid: int) -> list[int]:
    """Processes that this one has started and that live."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except OSError:
            continue
    return found


def timed(work: Callable[[], float], *, ahead: bool) -> Turn:
    """`work` returns seconds of audio; `ahead`: it has buffers that others fill."""
    wall, cores = time.perf_counter(), cpu_seconds()
    audio = work()
    ended = wait_until_full() if ahead else Ended(time.perf_counter(), 0.0)
    return Turn(audio, ended.wall - wall, cpu_seconds() - cores - ended.looking)


class Ended(NamedTuple):
    """When the last of the work was seen, by `time.perf_counter`, and processor time that went into looking."""

    wall: float
    looking: float


def wait_until_full() -> Ended:
    """Waits until nothing runs or wants to run, here but for this thread and in all processes below: buffers are full.

    How much processor time is used says nothing of that on a machine where others work too.
    """
    begin, still = time.thread_time(), 0
    ended = time.perf_counter()
    while still < STILL:
        time.sleep(IDLE)
        if _anything_runs():
            still, ended = 0, time.perf_counter()
        else:
            still += 1
    return Ended(ended, time.thread_time() - begin)


def _anything_runs() -> bool:
    left, own = [os.getpid()], threading.get_native_id()
    while left:
        pid = left.pop()
        left += children(pid)
        for task in Path(f"/proc/{pid}/task").glob("*"):
            try:
                state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if state in "RD" and int(task.name) != own:
                return True
    return False


def bare(source: ShardSource, crops: list[Crop]) -> Callable[[], float]:
    """Decodes the crops from memory, nothing else."""
    held = {crop.utterance: source.record(crop.utterance)["audio"] for crop in crops}

    def work() -> float:
        for crop in crops:
            decode_crop(held[crop.utterance], start=crop.start, samples=crop.samples)
        return sum(crop.samples for crop in crops) / SAMPLE_RATE

    return work


def chain(loader: LoadBatch, steps: range) -> Callable[[], float]:
    """Makes the batches one after the other in this thread."""

    def work() -> float:
        return sum(loader.map(step).waveform.size for step in steps) / SAMPLE_RATE

    return work


def take(batches: Iterator, count: int) -> Callable[[], float]:
    """Takes batches that others make; a batch is a Batch or what DataLoader collates."""

    def work() -> float:
        return sum(np.prod(next(batches)[0].shape) for _ in range(count)) / SAMPLE_RATE

    return work


def dataloader(loader: LoadBatch, steps: range, workers: int):
    """PyTorch's, over the rows of `steps`."""
    import torch

    torch.set_num_threads(1)
    keys = []
    for step in steps:
        place, first = loader.draw.step(step)
        drawn = loader.draw.take(place, first, loader.rows[place])
        rows = zip(drawn.utterance.tolist(), drawn.start.tolist(), strict=True)
        keys.append([Key(step, row, place, first, *found) for row, found in enumerate(rows)])
    ahead = {"prefetch_factor": 2} if workers else {}
    return iter(torch.utils.data.DataLoader(Rows(loader), batch_sampler=keys, num_workers=workers, **ahead))


def per_core_second(turns: list[Turn]) -> float:
    """Median audio-hours per core-second."""
    return float(np.median([turn.audio / 3600 / turn.cores for turn in turns]))


def per_second(turns: list[Turn]) -> float:
    """Median audio-hours per second by the clock."""
    return float(np.median([turn.audio / 3600 / turn.wall for turn in turns]))


def labelled_corpus(root: Path | None, scratch: Path) -> tuple[Path, Manifest, tuple[UnitStore]]:
    """A prepared corpus, by default the demo corpus joined to 10 s, with one set of random units; made in `scratch`."""
    if root is None:
        root = scratch / "corpus"
        prepare(Path(__file__).parents[1] / "demo_corpus", out=root, join_seconds=10.0, min_seconds=8.0)
    manifest = Manifest.load(root)
    rng = np.random.default_rng(0)
    with UnitWriter(scratch / "units", manifest, units=UNITS, source="random") as writer:
        for i in range(len(manifest)):
            writer.add(i, rng.integers(UNITS, size=num_frames(int(manifest.samples[i]))))
    return root, manifest, (UnitStore.load(scratch / "units", manifest),)


def measure(root: Path | None, *, rounds: int, steps: int, workers: tuple[int, ...]) -> list[str]:
    """Runs everything; the lines of the section."""
    with tempfile.TemporaryDirectory() as scratch:
        root, manifest, units = labelled_corpus(root, Path(scratch))
        lines = [
            "",
            f"`PYTHONPATH=. python benchmarks/data_throughput.py`: {platform.machine()}, "
            f"{len(os.sched_getaffinity(0))} "
            f"cores, shared (load {os.getloadavg()[0]:.1f}); {rounds} rounds of {steps} steps, interleaved, medians. "
            f"{manifest.samples.sum() / SAMPLE_RATE / 3600:.2f} h in {len(manifest):,} utterances, "
            f"lengths 8 and 16 s, "
            f"steps of 64 s, one set of {UNITS} units.",
            "",
            "| mixing | way | audio-hours per core-second | of bare decoding | audio-hours per second |",
            "|---|---|---:|---:|---:|",
        ]
        for name, mixing in (("none", None), ("WavLM's, 20 % of rows", MixingConfig())):
            lines += measure_one(manifest, units, name, mixing, rounds=rounds, steps=steps, workers=workers)
        return [*lines, *feeding(lines)]


def measure_one(manifest, units, name, mixing, *, rounds: int, steps: int, workers: tuple[int, ...]) -> list[str]:
    """The rows of the table for one mixing."""
    cfg = DataConfig(lengths=LENGTHS, mixing=mixing)
    noting = LoadBatch(cfg, manifest, units)
    noting.source = noting.interferer.source = Noting(manifest)
    for step in range(steps):
        noting.map(step)
    loader = LoadBatch(cfg, manifest, units)
    ways: dict[str, Callable[[], float]] = {
        "bare decoding": bare(loader.source, noting.source.crops),
        "chain, one thread": chain(loader, range(steps)),
    }
    more = {
        **{f"chain, {t} threads": (0, t) for t in (1, 2)},
        **{f"chain, {w} workers": (w, 1) for w in workers if w},
    }
    closing, buffered = [], set()
    for way, (processes, threads) in more.items():
        batches = train_batches(replace(cfg, workers=processes, threads=threads, prefetch=4), manifest, units)
        take(batches, 8)()
        closing.append(batches)
        ways[way] = take(batches, steps)
        buffered.add(way)
    for count in workers:
        batches = dataloader(loader, range((rounds + 1) * steps + 16), count)
        take(batches, 8)()
        ways[f"DataLoader, {count} workers"] = take(batches, steps)
        if count:
            buffered.add(f"DataLoader, {count} workers")
    turns: dict[str, list[Turn]] = {way: [] for way in ways}
    time.sleep(3)
    for round_ in range(rounds):
        order = list(ways)[round_ % len(ways) :] + list(ways)[: round_ % len(ways)]
        for way in order:
            turns[way].append(timed(ways[way], ahead=way in buffered))
    for batches in closing:
        batches.close()
    # Bare decoding decodes partners too: what the chain delivers is less than what it has to decode.
    delivered = turns["chain, one thread"][0].audio / turns["bare decoding"][0].audio
    floor = [turn._replace(audio=turn.audio * delivered) for turn in turns["bare decoding"]]
    rows = []
    for way, taken in turns.items():
        taken = floor if way == "bare decoding" else taken
        share = np.median(
            [own.audio / own.cores / (base.audio / base.cores) for own, base in zip(taken, floor, strict=True)]
        )
        rows.append(f"| {name} | {way} | {per_core_second(taken):.3f} | {share:.0%} | {per_second(taken):.3f} |")
        print(rows[-1], flush=True)
    return rows


def feeding(lines: list[str]) -> list[str]:
    """What feeds a host's accelerators, from the slowest mixing's chain in one thread."""
    rates = [float(line.split("|")[3]) for line in lines if "chain, one thread" in line]
    told = [
        "",
        f"Cores that feed a host, at {min(rates):.3f} audio-hours per core-second (the chain in one thread, the slower",
        "of the mixings). What steps take is an assumption, not a measurement:",
        f"{UTILISATION:.0%} of the peak in bfloat16 (makers' data sheets), at 6 floating-point operations per weight",
        "and frame for the layers and three forward passes of the convolutions (4.9 GFLOP a second of audio).",
        "",
        "| host | model | GFLOP per second of audio | audio-hours per second | cores |",
        "|---|---|---:|---:|---:|",
    ]
    for host, (chips, peak) in HOSTS.items():
        for model, weights in MODELS.items():
            flop = 6 * weights * SAMPLE_RATE / HOP + 3 * 4.9e9
            hours = chips * peak * UTILISATION / flop / 3600
            told.append(f"| {host} | {model} | {flop / 1e9:.0f} | {hours:.2f} | {hours / min(rates):.1f} |")
    return told


def write_section(path: Path, lines: list[str]) -> None:
    """Puts the lines between the section's marks, at the end of the file where it has none."""
    text = path.read_text(encoding="utf-8") if path.exists() else "# Data\n"
    section = "\n".join([BEGIN, *lines, "", END])
    if BEGIN in text:
        text = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: section, text, flags=re.DOTALL)
    else:
        text += f"\n## Throughput\n\n{section}\n"
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prepared", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    lines = measure(given.prepared, rounds=given.rounds, steps=given.steps, workers=tuple(given.workers))
    if given.write:
        write_section(given.write, lines)


if __name__ == "__main__":
    main()
