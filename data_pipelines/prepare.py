"""From a folder of clips to shards and a manifest: once, offline, in parallel, and as often as it takes.

    listing ── plan ──▶ shard tasks ── worker processes ──▶ shards/*.arrayrecord + *.arrow ──▶ manifest.arrow

The plan is a pure function of the listing and the options, every shard is a pure function of its task, and a shard's
name holds a hash of its task. So a run that was killed goes on where it stopped, the result is the same to the byte for
any number of workers, and a corpus that grew by one language re-encodes only that language. `manifest.arrow` is last.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from data_pipelines.atomic import TEMPORARY_PREFIX, delete_leftovers, whole_file
from data_pipelines.batch import SAMPLE_RATE
from data_pipelines.corpora import Clip, CorpusError, Listing, Rejected
from data_pipelines.corpora import folder as folder_corpus
from data_pipelines.manifest import MANIFEST_NAME, SHARD_FOLDER, Manifest, ManifestError, Split, write_manifest
from data_pipelines.shards import Joining, Shard, ShardTask, Tally, make_task, read_shard, write_shard
from data_pipelines.worker_processes import die_of_interrupts, follow_parent, interrupts_blocked

PLAN_NAME = "plan.json"
QUARANTINE_NAME = "quarantine.tsv"
_ONE_FIELD = dict.fromkeys(map(ord, "\t\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), " ")
IN_FLIGHT = 3  # tasks handed out per worker, so that a long plan is not pickled all at once


class PrepareError(RuntimeError):
    """`prepare` cannot go on: another plan or another run holds the folder, nothing is usable, a worker died."""


class OtherPlan(PrepareError):
    """The folder was prepared from other clips, or with other options; `reason` says so without what to do."""

    def __init__(self, reason: str):
        super().__init__(f"{reason}. Give another --out, or --overwrite (shards that stay the same are kept)")
        self.reason = reason


class Plan(NamedTuple):
    """What will be made: the `tasks`, a `digest` of them all, and `summary`, which tells two plans apart in words."""

    tasks: tuple[ShardTask, ...]
    digest: str
    summary: dict


class Prepared(NamedTuple):
    """What `prepare` made: the `root` folder, the `manifest`, the `tally` of all shards, what was `rejected`.

    `fresh` is False where everything was there already.
    """

    root: Path
    manifest: Manifest
    tally: Tally
    rejected: tuple[Rejected, ...]
    fresh: bool


def prepare(
    folder: str | Path,
    *,
    out: str | Path,
    table: str | Path | None = None,
    workers: int | None = None,
    clips_per_shard: int = 1000,
    join_seconds: float = 4.0,
    min_seconds: float = 2.0,
    overwrite: bool = False,
    progress: bool = True,
) -> Prepared:
    """Prepares a corpus; see `corpora.folder.read` for what a folder and its table may be.

    Training clips shorter than `join_seconds` are joined with their neighbours of the same language, corpus and
    speaker (clips without a speaker count as one speaker's); a speaker with less than `min_seconds` is repeated up to
    it. Held-out clips are never joined. Long clips are kept whole. Unusable clips are left out and listed in
    quarantine.tsv. `workers` (default: one a core) does not change the result.

    Raises CorpusError (folder, table), PrepareError (another plan or run in `out`, no usable clip, no training clip, a
    worker that died), OSError naming the file that could not be written. Run it again after any of these: finished
    shards are kept.
    """
    if clips_per_shard < 1 or join_seconds < 0 or min_seconds < 0 or (workers is not None and workers < 1):
        raise PrepareError("clips_per_shard and workers must be at least 1, join_seconds and min_seconds at least 0")
    if join_seconds < min_seconds:
        raise PrepareError(
            f"join_seconds ({join_seconds:g}) is less than min_seconds ({min_seconds:g}): utterances shorter than the "
            "minimum would remain"
        )
    out = Path(out)
    if out.resolve() == Path(folder).resolve():
        raise PrepareError(f"--out is the corpus folder itself ({out}); give another one")
    listing = folder_corpus.read(folder, table=table)
    plan = make_plan(
        folder, listing, clips_per_shard=clips_per_shard, join_seconds=join_seconds, min_seconds=min_seconds
    )
    (out / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
    with _only_one_run(out) as alone:
        done = _finished(out, plan, overwrite=overwrite)
        if done is not None:
            return done
        for place in (out, out / SHARD_FOLDER):
            delete_leftovers(place, everyones=alone)
        with whole_file(out / PLAN_NAME) as temporary:
            temporary.write_text(json.dumps({"digest": plan.digest, **plan.summary}, indent=1, ensure_ascii=False))
        _run(plan, out, workers or os.cpu_count() or 1, progress=progress)
        return _merge(plan, listing, out)


def make_plan(
    folder: str | Path, listing: Listing, *, clips_per_shard: int, join_seconds: float, min_seconds: float
) -> Plan:
    """Deals the clips out to shards, sorted by (split, language, corpus, speaker, path).

    A shard holds one split of one language; a speaker is divided only when alone above `clips_per_shard`.

    Raises PrepareError: no usable clip, or none to train on.
    """
    if not listing.clips:
        first = listing.rejected[0]
        raise PrepareError(
            f"none of the {len(listing.rejected)} clips of {folder} is usable; "
            f"the first: {first.path} (row {first.row}): {first.reason}"
        )
    if all(clip.split is not Split.TRAIN for clip in listing.clips):
        raise PrepareError(f"{folder} has no clip of the split 'train', only {', '.join(_splits(listing.clips))}")
    clips = sorted(listing.clips, key=lambda c: (c.split, c.language, c.corpus, c.speaker, c.path, c.id))
    joining = Joining(round(join_seconds * SAMPLE_RATE), round(min_seconds * SAMPLE_RATE))
    tasks = []
    for _, kin in itertools.groupby(clips, key=lambda c: (c.split, c.language)):
        for number, dealt in enumerate(_deal(list(kin), clips_per_shard)):
            tasks.append(make_task(number, folder, dealt, joining))
    rejected = sorted(listing.rejected, key=lambda r: r.row)
    content = json.dumps([[task.name for task in tasks], rejected], ensure_ascii=False)
    languages = {}
    for language, kin in itertools.groupby(sorted(clips, key=lambda c: c.language), key=lambda c: c.language):
        kin = list(kin)
        languages[language] = [len(kin), hashlib.sha256(json.dumps(kin).encode()).hexdigest()[:16]]
    summary = {
        "options": {"clips_per_shard": clips_per_shard, "join_seconds": join_seconds, "min_seconds": min_seconds},
        "clips": len(clips),
        "rejected": len(rejected),
        "languages": languages,
    }
    return Plan(tuple(tasks), hashlib.sha256(content.encode()).hexdigest(), summary)


def _splits(clips: list[Clip]) -> list[str]:
    return [split.name.lower() for split in sorted({clip.split for clip in clips})]


def _deal(clips: list[Clip], limit: int) -> Iterator[list[Clip]]:
    shard: list[Clip] = []
    for _, speaker in itertools.groupby(clips, key=lambda c: (c.corpus, c.speaker)):
        speaker = list(speaker)
        if shard and len(shard) + len(speaker) > limit:
            yield shard
            shard = []
        while len(speaker) > limit:  # cut evenly: a sliver at the end would leave an utterance too short
            pieces = -(-len(speaker) // limit)
            size = -(-len(speaker) // pieces)
            yield speaker[:size]
            speaker = speaker[size:]
        shard += speaker
    if shard:
        yield shard


@contextlib.contextmanager
def _only_one_run(out: Path) -> Iterator[bool]:
    """Locks the folder; gives False where the file system has no locks, so that another run may be at it unseen."""
    descriptor = os.open(out, os.O_RDONLY)  # the folder itself is locked: nothing to clean up, whatever happens
    try:
        locked = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrepareError(f"another prepare is writing to {out}; wait for it to end") from None
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _finished(out: Path, plan: Plan, *, overwrite: bool) -> Prepared | None:
    """What is there already, if it is this plan's and whole. Raises PrepareError if it is another plan's."""
    try:
        old = json.loads((out / PLAN_NAME).read_text())
    except (OSError, ValueError):
        old = None
        if (out / MANIFEST_NAME).exists() and not overwrite:
            raise PrepareError(
                f"{out} holds a manifest, but no {PLAN_NAME}: give another --out, or --overwrite"
            ) from None
    if old is not None and old.get("digest") != plan.digest and not overwrite:
        raise OtherPlan(f"{out} was prepared from something else: {_difference(old, plan.summary)}")
    with contextlib.suppress(ManifestError):
        manifest = Manifest.load(out)
        if manifest.facts.get("plan") == plan.digest:
            return Prepared(out, manifest, Tally(*manifest.facts["tally"]), _read_quarantine(out), fresh=False)
    # From here on the folder is not whole, and must not look as if it were.
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    return None


def _difference(old: dict, new: dict) -> str:
    changes = []
    for key, value in new["options"].items():
        before = old.get("options", {}).get(key)
        if before != value:
            changes.append(f"{key} was {before}, is {value}")
    for key in ("clips", "rejected"):
        if old.get(key) != new[key]:
            changes.append(f"{key} were {old.get(key)}, are {new[key]}")
    before, after = old.get("languages", {}), new["languages"]
    for words, names in (
        ("new languages", sorted(set(after) - set(before))),
        ("languages gone", sorted(set(before) - set(after))),
        ("clips changed in", sorted(n for n in set(before) & set(after) if before[n] != after[n])),
    ):
        if names:
            changes.append(f"{words}: {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}")
    return "; ".join(changes) or "another version of this code, or other reasons for clips left out"


def _run(plan: Plan, out: Path, workers: int, *, progress: bool) -> None:
    """Writes every shard that is not there yet."""
    left, read = [], 0
    for task in plan.tasks:
        shard = read_shard(task.name, out)
        if shard is None:
            left.append(task)
        else:
            read += shard.tally.read
    done = len(plan.tasks) - len(left)
    often = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log file wants a line now and then
    with tqdm(total=len(plan.tasks), initial=done, unit="shard", disable=not progress, mininterval=often) as bar:

        def advance(tally: Tally) -> None:
            nonlocal read
            read += tally.read
            bar.set_postfix_str(f"{read / SAMPLE_RATE / 3600:.2f} h of audio", refresh=False)
            bar.update()

        if workers == 1:
            for task in left:
                advance(write_shard(task, out))
        else:
            _run_in_pool(left, out, workers, advance)


def _run_in_pool(tasks: list[ShardTask], out: Path, workers: int, advance) -> None:
    # Long tasks first keeps all workers busy to the end; the order has no say in what is written.
    waiting = sorted(tasks, key=lambda task: sum(clip.size for clip in task.clips))  # popped from its end
    # Spawned, not forked: the parent may hold threads and locks of the libraries that it imported.
    context = multiprocessing.get_context("spawn")
    count = max(1, min(workers, len(tasks)))
    with concurrent.futures.ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker) as pool:
        running: dict[concurrent.futures.Future, str] = {}
        try:
            while waiting or running:
                while waiting and len(running) < workers * IN_FLIGHT:
                    task = waiting.pop()
                    with interrupts_blocked():  # the first task starts the processes
                        running[pool.submit(write_shard, task, out)] = task.name
                ready, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in ready:
                    advance(future.result())
                    del running[future]
        except BrokenProcessPool as error:
            raise PrepareError(
                "a worker process died (killed for memory, or a crash in a decoder); shards in work: "
                f"{', '.join(sorted(running.values())[:4])}. Run the same command again to go on: with fewer "
                "--workers if memory was short, with --workers 1 to see the crash"
            ) from error
        finally:  # the pool cancels them itself: cancelled from here, they would trip it while it notices dead workers
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    die_of_interrupts()  # a shard is whole or absent, so a worker may stop anywhere
    follow_parent()


def _merge(plan: Plan, listing: Listing, out: Path) -> Prepared:
    """Writes quarantine.tsv and, last of all, manifest.arrow; deletes shards of older plans."""
    shards: list[Shard] = []
    for task in plan.tasks:
        shard = read_shard(task.name, out)
        if shard is None:
            raise PrepareError(f"shard {task.name} in {out} is not whole after it was written: is the disk sound?")
        shards.append(shard)
    rejected = sorted(
        [*listing.rejected, *(r for shard in shards for r in shard.rejected)], key=lambda r: (r.row, r.path)
    )
    tally = sum((shard.tally for shard in shards), Tally())
    tally = tally._replace(clips=tally.clips + len(listing.rejected), rejected=len(rejected))
    _write_quarantine(out, rejected)
    full = [shard for shard in shards if shard.tally.utterances]
    if not any(Split.TRAIN in shard.table.column("split").to_pylist() for shard in full):
        reasons = Counter(r.reason for r in rejected).most_common(3)
        raise PrepareError(
            f"no training clip is usable ({len(rejected)} of {tally.clips} clips left out: "
            f"{'; '.join(f'{n} x {reason}' for reason, n in reasons)}); see {out / QUARANTINE_NAME}"
        )
    rows = pa.concat_tables([shard.table.replace_schema_metadata() for shard in full])
    counts = [shard.tally.utterances for shard in full]
    write_manifest(
        out,
        **{name: rows.column(name).combine_chunks() for name in rows.column_names},
        shard=np.repeat(np.arange(len(counts)), counts),
        record=np.concatenate([np.arange(count) for count in counts]),
        shard_names=[f"{SHARD_FOLDER}/{shard.name}.arrayrecord" for shard in full],
        shard_records=counts,
        shard_bytes=[shard.bytes for shard in full],
        facts={"plan": plan.digest, "options": plan.summary["options"], "tally": tally},
    )
    current = {shard.name for shard in shards}
    for path in (out / SHARD_FOLDER).iterdir():
        temporary = path.name.startswith(TEMPORARY_PREFIX)  # another run's, where there are no locks
        if path.suffix in (".arrow", ".arrayrecord") and path.stem not in current and not temporary:
            path.unlink()
    return Prepared(out, Manifest.load(out), tally, tuple(rejected), fresh=True)


def _write_quarantine(out: Path, rejected: list[Rejected]) -> None:
    lines = ["path\trow\treason", *("\t".join(_field(value) for value in (r.path, r.row, r.reason)) for r in rejected)]
    with whole_file(out / QUARANTINE_NAME) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _read_quarantine(out: Path) -> tuple[Rejected, ...]:
    try:
        lines = (out / QUARANTINE_NAME).read_text(encoding="utf-8").splitlines()[1:]
    except OSError:
        return ()
    fields = (line.split("\t", maxsplit=2) for line in lines)
    return tuple(Rejected(path, int(row), reason) for path, row, reason in fields)


def _field(value: object) -> str:
    return str(value).encode(errors="backslashreplace").decode().translate(_ONE_FIELD)


__all__ = ["CorpusError", "OtherPlan", "Plan", "PrepareError", "Prepared", "make_plan", "prepare"]
