"""The draw at 544 buckets, 25 million utterances and 40,000 hours, beside Grain's `MapDataset.mix` over as many.

    python -m benchmarks.sampling [--utterances 25000000] [--write]

Makes a manifest of invented utterances (136 languages x 4 corpora, Zipf, 2 to 30 s, 5.8 s on average) in a temporary
folder of about 2 GB, deleted at the end. Measures, each in a process of its own: the plan made (seconds, and memory
that is not mapped from files), the plan mapped from its file, step 1,000,000 reached; and in one process, by turns, the
time from an index to (row, crop, partner) here, and to an element of Grain's mix. `--write` puts the table into
docs/data.md. 1 to 2 minutes on one core.
"""

import argparse
import contextlib
import itertools
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.sections import write_section
from data_pipelines.balance import DrawConfig
from data_pipelines.manifest import MANIFEST_NAME, Manifest, Split, write_manifest
from data_pipelines.plan import PLAN_FOLDER
from data_pipelines.sampling import ROW_PERIOD, Draw

LANGUAGES, CORPORA, HOURS = 136, 4, 40_000
LENGTHS = (30_000, 60_000, 120_000, 240_000)
SECONDS_PER_STEP = 2880
ROWS = tuple(SECONDS_PER_STEP * 16_000 // length for length in LENGTHS)
DRAW = DrawConfig(language_exponent=0.5, corpus_exponent=0.8)
RESUMED = 1_000_000


def make_manifest(root: Path, utterances: int) -> None:
    """Zipf over buckets; lengths log-normal between 2 and 30 s, scaled to 40,000 hours at 25 million."""
    rng = np.random.default_rng(0)
    buckets = LANGUAGES * CORPORA
    share = 1 / np.arange(1, buckets + 1) ** 1.2
    bucket = rng.choice(buckets, utterances, p=rng.permutation(share / share.sum())).astype(np.int32)
    bucket[:buckets] = np.arange(buckets)
    samples = np.clip(rng.lognormal(np.log(4.9), 0.55, utterances) * 16_000, 32_000, 480_000).astype(np.int64)

    def named(codes: np.ndarray, names: list[str]) -> pa.DictionaryArray:
        return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(names, pa.large_string()))

    write_manifest(
        root,
        samples=samples,
        language=named(bucket // CORPORA, [f"l{n:03d}" for n in range(LANGUAGES)]),
        corpus=named(bucket % CORPORA, [f"corpus{n}" for n in range(CORPORA)]),
    )


class Anonymous(threading.Thread):
    """Looks every 10 ms at how much memory of this process is not mapped from files; `peak` is the most, in bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self._over = 0, threading.Event()
        self.first = self.now()

    @staticmethod
    def now() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    def run(self):
        while not self._over.wait(0.01):
            self.peak = max(self.peak, self.now() - self.first)

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.peak


def measure_start(root: Path) -> dict:
    """In a fresh process: the corpus opened, the draw built, step RESUMED located; seconds, and bytes at most."""
    memory = Anonymous()
    memory.start()
    begin = time.perf_counter()
    manifest = Manifest.load(root, check_shards=False)
    opened = time.perf_counter()
    draw = Draw(manifest, lengths=LENGTHS, rows=ROWS, cfg=DRAW)
    built = time.perf_counter()
    step = draw.step(RESUMED)
    draw.take(step.length, step.first_row, ROWS[step.length])
    located = time.perf_counter()
    return {
        "open": opened - begin,
        "plan": built - opened,
        "locate": located - built,
        "all": located - begin,
        "bytes": memory.stop(),
    }


def measure_index(root: Path, rounds: int = 15) -> dict:
    """Microseconds an index, by turns: here to (row, crop, partner), by whole steps; in Grain to an element."""
    import grain

    manifest = Manifest.load(root, check_shards=False)
    draw = Draw(manifest, lengths=LENGTHS, rows=ROWS, cfg=DRAW)
    pairs = manifest.language.astype(np.int32) * CORPORA + manifest.corpus
    counts = np.bincount(pairs, minlength=LANGUAGES * CORPORA)
    shares = {(share.language, share.corpus): share.drawn for share in draw.shares()}
    weights = [shares[f"l{n // CORPORA:03d}", f"corpus{n % CORPORA}"] for n in range(LANGUAGES * CORPORA)]
    leaves = [grain.MapDataset.range(int(n)).shuffle(seed=k).repeat() for k, n in enumerate(counts)]
    by_weight = np.argsort(-np.array(weights))  # measured to be Grain's faster order
    mix = grain.MapDataset.mix([leaves[k] for k in by_weight], weights=[weights[k] for k in by_weight])
    ours, theirs, located = [], [], []
    steps, indices = itertools.count(RESUMED), itertools.count(RESUMED * 400)
    for _ in range(rounds):
        begin, rows, inside = time.perf_counter(), 0, 0.0
        while rows < 3 * ROW_PERIOD:
            k = next(steps)
            before = time.perf_counter()
            step = draw.step(k)
            drawn = draw.take(step.length, step.first_row, ROWS[step.length])
            inside += time.perf_counter() - before
            for row in range(ROWS[step.length]):
                draw.partner(step.length, step.first_row + row)
            rows += len(drawn.utterance)
        ours.append((time.perf_counter() - begin) / rows)
        located.append(inside / rows)
        begin = time.perf_counter()
        for k in itertools.islice(indices, 400):
            mix[k]
        theirs.append((time.perf_counter() - begin) / 400)
    return {
        "ours": float(np.median(ours) * 1e6),
        "located": float(np.median(located) * 1e6),
        "grain": float(np.median(theirs) * 1e6),
        "version": grain.__version__ if hasattr(grain, "__version__") else "",
    }


def table(start: dict, again: dict, index: dict, utterances: int, machine: str) -> str:
    """The Markdown of docs/data.md."""
    rows = [
        ("plan made, nothing kept (s)", f"{start['plan']:.2f}", "10"),
        ("memory for it besides mapped files (MB)", f"{start['bytes'] / 1e6:,.0f}", "1,000"),
        ("plan mapped from its file, its checksum read (s)", f"{again['plan']:.2f}", ""),
        (f"corpus opened, plan mapped, step {RESUMED:,} located (s)", f"{again['all']:.2f}", "5"),
        ("index to (row, crop, partner) (µs)", f"{index['ours']:.1f}", "60"),
        ("of these, row and crop (µs)", f"{index['located']:.2f}", ""),
        ("Grain's `MapDataset.mix`, index to element (µs)", f"{index['grain']:.1f}", ""),
        ("ratio", f"{index['grain'] / index['ours']:.1f}", "3"),
    ]
    lines = [
        f"{LANGUAGES} languages x {CORPORA} corpora = {LANGUAGES * CORPORA} buckets of each of {len(LENGTHS)} static "
        f"lengths, {utterances / 1e6:g} million invented",
        f"utterances; steps of {SECONDS_PER_STEP} s; {machine}. `python -m benchmarks.sampling --write`.",
        "",
        "| what | measured | aim |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    return "\n".join(lines)


def main() -> None:
    """Makes the corpus, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--utterances", type=int, default=25_000_000)
    parser.add_argument("--folder", type=Path, help="make the manifest here and keep it, or use the one that is here")
    parser.add_argument("--write", action="store_true", help="put the table into docs/data.md")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "DIR"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        what, root = asked.measure
        print(json.dumps({"start": measure_start, "index": measure_index}[what](Path(root))))
        return
    with contextlib.ExitStack() as kept_open:
        root = asked.folder or Path(kept_open.enter_context(tempfile.TemporaryDirectory(prefix="sampling-")))
        if not (root / MANIFEST_NAME).exists():
            make_manifest(root, asked.utterances)
        shutil.rmtree(root / PLAN_FOLDER, ignore_errors=True)
        manifest = Manifest.load(root, check_shards=False)
        hours = manifest.samples.sum() / 16_000 / 3600
        buckets = len(manifest.seconds(Split.TRAIN, by=("language", "corpus")))
        print(f"{len(manifest):,} utterances, {hours:,.0f} h, {buckets} buckets")
        del manifest

        def measured(what: str) -> dict:
            command = [sys.executable, "-m", "benchmarks.sampling", "--measure", what, str(root)]
            out = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            print(what, out)
            return out

        start = measured("start")
        kept = sum(file.stat().st_size for file in (root / PLAN_FOLDER).iterdir())
        print(f"plan file: {kept / 1e6:,.0f} MB")
        again, index = measured("start"), measured("index")
    machine = f"one core, {platform.machine()}, Python {platform.python_version()}"
    text = table(start, again, index, asked.utterances, machine)
    print(text)
    if asked.write:
        write_section("docs/data.md", "Sampling at scale", text)


if __name__ == "__main__":
    main()
