"""What `prepare` of 25 million clips takes in its own process: memory that is not mapped from files, time, and disk.

    PYTHONPATH=. python -m benchmarks.large_listing [--clips 25000000] [--folder FOLDER] [--write]

Runs `prepare` as it is, but for its two ends: the clips are invented (136 languages in 4 corpora, with ids, paths,
speakers and sentences as long as Common Voice's, in a shuffled order), and shards are written without audio. So the
listing, the plan, the check for repeated ids, the duplicates, the merging and a second call are those of a real corpus.
Needs 40 GB in FOLDER (a temporary one by default), deleted at the end. `--write` puts the table into docs/data.md.
"""

import argparse
import hashlib
import os
import platform
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pycountry

from benchmarks.sampling import Anonymous
from benchmarks.sections import write_section
from data_pipelines import prepare as module
from data_pipelines.batch import SAMPLE_RATE
from data_pipelines.corpora import Listing, readers
from data_pipelines.corpora.clips import NAMES, NUMBERS, STRINGS, Clips
from data_pipelines.corpora.listing import Lister
from data_pipelines.manifest import SHARD_FOLDER, Split
from data_pipelines.plan_shards import Plan, Planned, drop_duplicates
from data_pipelines.shards import HASH_BYTES, NO_FILTERS, TABLE, Joining, ShardTask, Tally, write_shard_table

TITLE = "Preparing 25 million clips: what the parent process takes"
CORPORA, SPOKEN = 4, 136
CONTAINERS = 500  # tar files of a corpus, so that there need not be 25 million files
PER_SHARD = 10_000
WORDS = "the quick brown fox jumps over a lazy dog while eight more of them look on".split()


class Phase(NamedTuple):
    """A part of `prepare`: seconds, and the most memory at any moment of it, in bytes."""

    name: str
    seconds: float
    memory: int


class Free(threading.Thread):
    """Looks every 50 ms at how much of a disk is free; `least` is the least, in bytes."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self._folder, self._over = folder, threading.Event()
        self.first = self.least = self.now()

    def now(self) -> int:
        """Bytes that are free now."""
        status = os.statvfs(self._folder)
        return status.f_bavail * status.f_frsize

    def run(self):
        """Looks, until stopped."""
        while not self._over.wait(0.05):
            self.least = min(self.least, self.now())

    def stop(self) -> int:
        """The most that was taken since the beginning, in bytes."""
        self._over.set()
        self.join()
        return self.first - self.least


def generated(folder: str | Path, *, clips: int = 0, number: int = 0) -> Listing:
    """A reader: `clips` invented clips in the tar files of `folder`; languages and speakers are skewed as real ones."""
    lister = Lister(folder, total=clips)
    rng = np.random.default_rng(number)
    codes = sorted(x.alpha_3 for x in pycountry.languages if hasattr(x, "alpha_2"))[:SPOKEN]
    share = 1 / np.arange(1, SPOKEN + 1) ** 1.2
    heard = [" ".join(rng.choice(WORDS, 12)) for _ in range(5000)]
    names: dict[tuple[int, int], str] = {}
    row = 0
    for container in range(CONTAINERS):
        count = clips * (container + 1) // CONTAINERS - clips * container // CONTAINERS
        language = rng.choice(SPOKEN, count, p=share / share.sum()).tolist()
        speaker = ((rng.pareto(1.0, count) * 20).astype(np.int64) % 2000).tolist()
        text = rng.integers(len(heard), size=count).tolist()
        scattered = rng.permutation(count).tolist()  # not in the order of their names
        for k in range(count):
            row += 1
            key = (language[k], speaker[k])
            if key not in names:
                names[key] = hashlib.sha512(b"%d-%d-%d" % (number, *key)).hexdigest()
            name = f"common_voice_{codes[language[k]]}_{container:04d}{scattered[k]:08d}"
            lister.add(
                f"{container:04d}.tar",
                row=row,
                id=f"{container:04d}/{name}",
                language=codes[language[k]],
                speaker=names[key],
                split=Split.TRAIN if k % 20 else Split.DEV,
                text=heard[text[k]],
                size=50_000 + k,
                member=f"{name}.mp3@{k * 50_000}+{50_000 + k}",
            )
    return lister.listing(source=folder)


def without_audio(task: ShardTask, out: str | Path) -> Tally:
    """As `write_shard`, for clips of 4 s that nobody decoded: every clip is an utterance; one in 1,000 is a copy."""
    row = task.clips.columns["row"]
    copies = row % 1000 == 0
    number = task.clips.columns["corpus"].to_numpy(zero_copy_only=False)
    number = np.array([int(name.removeprefix("corpus")) for name in number])
    said = np.where(copies, row % 100_000 + 1, (1 << 40) + row * CORPORA + number)
    kept = np.ones(len(row), bool)
    kept[[duplicate.place for duplicate in task.duplicates]] = False
    kept = np.flatnonzero(kept)
    values = {
        name: task.clips.values(name, kept) for name in ("id", "text", "licence", "language", "corpus", "speaker")
    }
    values["clip_names"] = pa.LargeListArray.from_arrays(np.arange(len(kept) + 1), values["id"])
    values["samples"] = np.full(len(kept), 4 * SAMPLE_RATE)
    values["split"] = task.clips.values("split", kept)
    samples = 4 * SAMPLE_RATE * len(kept)
    tally = Tally(len(row), len(kept), samples, samples)
    hashes = [f"{value:0{2 * HASH_BYTES}x}" for value in said.tolist()]
    head = {"bytes": 0, "tally": tally, "rejected": [], "hashes": hashes, "times": task.times, "source_rates": {}}
    (Path(out) / SHARD_FOLDER / f"{task.name}.arrayrecord").touch()
    write_shard_table(task.name, out, pa.table(values, schema=TABLE), head)
    return tally


def measure(folder: Path, clips: int, *, again: bool) -> list[str]:
    """Runs it; the lines of the section."""
    corpora = []
    for number in range(CORPORA):
        place = folder / f"corpus{number}"
        place.mkdir(parents=True)
        for container in range(CONTAINERS):
            (place / f"{container:04d}.tar").touch()
        options = f"options = {{clips = {clips // CORPORA}, number = {number}}}"
        corpora.append(
            f'[[corpus]]\nname = "corpus{number}"\nreader = "generated"\nfolder = "corpus{number}"\n{options}\n'
        )
    (folder / "corpora.toml").write_text("\n".join(corpora))
    readers.READERS["generated"] = generated
    module.write_shard = without_audio
    phases: list[Phase] = []

    def watched(name: str, told: str):
        work = getattr(module, name)

        def timed(*args, **kwargs):
            memory, begin = Anonymous(), time.perf_counter()
            memory.start()
            result = work(*args, **kwargs)
            again_told = f"{told}, those with copies again" if any(p.name == told for p in phases) else told
            phases.append(Phase(again_told, time.perf_counter() - begin, memory.first + memory.stop()))
            print(phases[-1], flush=True)
            return result

        setattr(module, name, timed)

    for name, told in (
        ("list_corpora", "listing"),
        ("make_plan", "plan"),
        ("_run", "shards without audio"),
        ("drop_duplicates", "duplicates found"),
        ("merge_shards", "merged, ids checked, manifest written"),
    ):
        watched(name, told)
    disk = Free(folder)
    disk.start()
    started = Anonymous.now()

    def run() -> module.Prepared:
        corpora, out = folder / "corpora.toml", folder / "out"
        return module.prepare(corpora, out=out, workers=1, clips_per_shard=PER_SHARD, duplicates=False)

    made = run()
    taken, stays = disk.stop(), disk.first - disk.now()
    count, copies = len(made.manifest), clips - len(made.manifest)
    assert made.fresh and made.tally.clips == clips, "clips were lost"
    del made
    lines = [
        f"{clips:,} invented clips of {SPOKEN} languages in {CORPORA} corpora, {PER_SHARD:,} a shard, one process,",
        f"{platform.machine()}, Python {platform.python_version()}. Memory is what is not mapped from files, at most;",
        f"{started / 1e6:.0f} MB of it are Python and the libraries. `python -m benchmarks.large_listing --write`.",
        "",
        "| part of `prepare` | seconds | memory (MB) |",
        "|---|---:|---:|",
        *(f"| {phase.name} | {phase.seconds:.0f} | {phase.memory / 1e6:,.0f} |" for phase in phases),
    ]
    if again:
        phases.clear()
        begin = time.perf_counter()
        assert not run().fresh, "the second call found something to do"
        seconds, memory = time.perf_counter() - begin, max(phase.memory for phase in phases)
        lines.append(f"| the same command again: nothing to do | {seconds:.0f} | {memory / 1e6:,.0f} |")
    lines += [
        "",
        f"{count:,} utterances in the manifest, {copies:,} copies left out. At most {taken / 1e9:.1f} GB of disk were",
        f"taken, {stays / 1e9:.1f} GB of them stay (manifest and shards' tables; audio comes on top).",
    ]
    return lines


def measure_duplicates(clips: int) -> str:
    """The search for copies alone, over as many invented hashes, one in 1,000 of them given a hundred times or more."""
    rng = np.random.default_rng(0)
    root = pa.DictionaryArray.from_arrays(pa.array(rng.integers(CORPORA, size=clips, dtype=np.int32)), list("abcd"))
    text = pa.array([""], pa.large_string()).take(pa.array(np.zeros(clips, np.int64)))
    columns = {name: root for name in NAMES} | {name: text for name in STRINGS}
    columns |= {name: np.zeros(clips, dtype) for name, dtype in NUMBERS.items()}
    columns["row"] = np.arange(clips)
    rows = np.arange(clips, dtype=np.int32)
    shards = [Planned(f"{at}", "", rows[at : at + PER_SHARD], 0) for at in range(0, clips, PER_SHARD)]
    plan = Plan(tuple(shards), Clips(columns), {}, Joining(1, 1), NO_FILTERS, "", "", {})

    def hashes():
        for shard in shards:
            found = rng.integers(1 << 62, size=(len(shard.rows), HASH_BYTES // 8), dtype=np.uint64)
            found[::1000] = shard.rows[::1000, None] // 1000 % 100 + 1
            yield found.tobytes()

    memory, begin = Anonymous(), time.perf_counter()
    memory.start()
    less = drop_duplicates(plan, hashes(), order=list("abcd"))
    seconds, copies = time.perf_counter() - begin, sum(len(shard.duplicates) for shard in less)
    return (
        f"{copies:,} copies found in {clips:,} clips: {seconds:.0f} s, {memory.stop() / 1e6:,.0f} MB more than before"
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=25_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--duplicates", action="store_true", help="only measure the search for copies")
    parser.add_argument("--again", action="store_true", help="measure a second call too")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if given.duplicates:
        print(measure_duplicates(given.clips))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        lines = measure(Path(scratch), given.clips, again=given.again)
    print("\n".join(lines))
    if given.write:
        write_section("docs/data.md", TITLE, "\n".join(lines))


if __name__ == "__main__":
    main()
