"""From folders of clips to shards and a manifest: once, offline, in parallel, and as often as it takes.

    listing ── plan ──▶ shard tasks ── worker processes ──▶ shards/*.arrayrecord + *.arrow ──▶ manifest.arrow

The plan is a pure function of the listing and the options, every shard is a pure function of its task, and a shard's
name holds a hash of its task. So a run that was killed goes on where it stopped, the result is the same to the byte for
any number of workers, and a corpus that grew by one language re-encodes only that language. `manifest.arrow` is last.

Duplicates are known once every clip was decoded: then the shards that hold some are written again without them, under
names of their own. The first shards stay until the manifest is there, so a kill in between costs nothing twice.
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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from data_pipelines.atomic import TEMPORARY_PREFIX, delete_leftovers, whole_file
from data_pipelines.batch import SAMPLE_RATE
from data_pipelines.compositions import Listed, list_corpora
from data_pipelines.corpora import CorpusError, Listing, Rejected
from data_pipelines.manifest import MANIFEST_NAME, SHARD_FOLDER, Manifest, ManifestError, Split, write_manifest
from data_pipelines.plan_shards import OtherPlan, Plan, PrepareError, difference, drop_duplicates, make_plan
from data_pipelines.shards import NO_FILTERS, Filters, Shard, ShardTask, Tally, read_shard, write_shard
from data_pipelines.worker_processes import die_of_interrupts, follow_parent, interrupts_blocked

PLAN_NAME = "plan.json"
QUARANTINE_NAME = "quarantine.tsv"
_ONE_FIELD = dict.fromkeys(map(ord, "\t\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), " ")
IN_FLIGHT = 3  # tasks handed out per worker, so that a long plan is not pickled all at once


class Prepared(NamedTuple):
    """What `prepare` made: the `root` folder, the `manifest`, the `tally` of all shards, what was `rejected`.

    `fresh` is False where everything was there already.
    """

    root: Path
    manifest: Manifest
    tally: Tally
    rejected: tuple[Rejected, ...]
    fresh: bool


class Part(NamedTuple):
    """Share number `part` (from 1) of `of` equal ones of a plan's shards: one job of a cluster."""

    part: int
    of: int


class PartDone(NamedTuple):
    """What a `Part` has done: shards of its share that are whole now, and those of other shares still to be made."""

    shards: int
    elsewhere: int


def prepare(
    folder: str | Path,
    *,
    out: str | Path,
    table: str | Path | None = None,
    reader: str = "folder",
    options: Mapping[str, object] | None = None,
    workers: int | None = None,
    clips_per_shard: int = 1000,
    join_seconds: float = 4.0,
    min_seconds: float = 2.0,
    filters: Filters = NO_FILTERS,
    duplicates: bool = True,
    part: Part | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Prepared | PartDone:
    """Prepares a corpus, or the corpora of a composition file (`folder` ends in .toml; see `compositions`).

    `reader` with its `options` says how the folder is read (see `corpora.readers`; `table` is the folder reader's).
    Training clips shorter than `join_seconds` are joined with their neighbours of the same language, corpus and
    speaker (clips without a speaker count as one speaker's); a speaker with less than `min_seconds` is repeated up to
    it. Held-out clips are never joined. Long clips are kept whole, unless `filters` leaves them out; without
    `duplicates`, so are clips with the same samples as another one. Unusable clips are left out and listed in
    quarantine.tsv. `workers` (default: one a core) does not change the result.

    With `part` only that share of the shards is written, by as many jobs at once as there are parts, and PartDone
    returned; a call without it makes what is missing and the manifest.

    Raises CorpusError (folder, table, composition), PrepareError (another plan or run in `out`, no usable clip, no
    training clip, a worker that died), OSError naming the file that could not be written. Run it again after any of
    these: finished shards are kept.
    """
    if clips_per_shard < 1 or join_seconds < 0 or min_seconds < 0 or (workers is not None and workers < 1):
        raise PrepareError("clips_per_shard and workers must be at least 1, join_seconds and min_seconds at least 0")
    if join_seconds < min_seconds:
        raise PrepareError(
            f"join_seconds ({join_seconds:g}) is less than min_seconds ({min_seconds:g}): utterances shorter than the "
            "minimum would remain"
        )
    if part is not None and not 1 <= part.part <= part.of:
        raise PrepareError(f"part {part.part} of {part.of}: parts are counted from 1 to their number")
    out, options = Path(out), dict(options or {})
    if table is not None:
        options["table"] = table
    listed = list_corpora(folder, reader=reader, options=options, progress=progress)
    for root in listed.folders.values():
        if out.resolve() == Path(root).resolve():
            raise PrepareError(f"--out is the corpus folder itself ({out}); give another one")
    plan = make_plan(
        listed.folders,
        listed.listing,
        clips_per_shard=clips_per_shard,
        join_seconds=join_seconds,
        min_seconds=min_seconds,
        filters=filters,
        drop_duplicates=not duplicates,
    )
    (out / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
    with _only_one_run(out, shared=part is not None) as alone:
        done = _finished(out, plan, overwrite=overwrite)
        if done is not None:
            return done if part is None else PartDone(len(_share(done.manifest.shard_names, part)), 0)
        for place in (out, out / SHARD_FOLDER):
            delete_leftovers(place, everyones=alone)
        with whole_file(out / PLAN_NAME) as temporary:
            temporary.write_text(json.dumps({"digest": plan.digest, **plan.summary}, indent=1, ensure_ascii=False))
        count = workers or os.cpu_count() or 1
        if part is not None:
            return _run_part(plan, listed, out, part, count, progress=progress)
        _run(plan.tasks, out, count, first=not duplicates, progress=progress)
        tasks = plan.tasks
        if not duplicates:
            tasks = drop_duplicates(tasks, _hashed(tasks, out), order=list(listed.folders))
            _run(tasks, out, count, progress=progress)
        return _merge(tasks, plan, listed.listing, out)


def _share(items: Sequence, part: Part) -> Sequence:
    return items[part.part - 1 :: part.of]


def _run_part(plan: Plan, listed: Listed, out: Path, part: Part, workers: int, *, progress: bool) -> PartDone:
    """Writes a share of the plan's shards; where all are there, its share of those that lose duplicates."""
    tasks = plan.tasks
    dropping = plan.summary["options"]["drop_duplicates"]
    _run(_share(tasks, part), out, workers, first=dropping, progress=progress)
    missing = sum(shard is None for shard in (_first_shards if dropping else _shards)(tasks, out))
    if dropping and not missing:
        tasks = drop_duplicates(tasks, _hashed(tasks, out), order=list(listed.folders))
        _run(_share(tasks, part), out, workers, progress=progress)
        missing = sum(shard is None for shard in _shards(tasks, out))
    return PartDone(len(_share(tasks, part)), missing)


def _shards(tasks: Sequence[ShardTask], out: Path) -> list[Shard | None]:
    return [read_shard(task.name, out) for task in tasks]


def _first_shards(tasks: Sequence[ShardTask], out: Path) -> list[Shard | None]:
    """Each task's shard, or the same less duplicates, which has the same hashes."""
    less: dict[str, list[str]] = {}
    for name in sorted(os.listdir(out / SHARD_FOLDER)):
        if name.endswith(".arrow"):
            less.setdefault(name.rpartition("-")[0], []).append(name.removesuffix(".arrow"))
    return [
        next(filter(None, (read_shard(name, out) for name in (task.name, *less.get(task.name, ())))), None)
        for task in tasks
    ]


def _hashed(tasks: Sequence[ShardTask], out: Path) -> list[Shard]:
    shards = _first_shards(tasks, out)
    for task, shard in zip(tasks, shards, strict=True):
        if shard is None:
            raise PrepareError(f"shard {task.name} in {out} is not whole after it was written: is the disk sound?")
    return shards


@contextlib.contextmanager
def _only_one_run(out: Path, *, shared: bool) -> Iterator[bool]:
    """Locks the folder; parts share the lock, and a whole run excludes them and its like.

    Gives False where another may be at it all the same: a part, or a run unseen on a file system without locks.
    """
    descriptor = os.open(out, os.O_RDONLY)  # the folder itself is locked: nothing to clean up, whatever happens
    try:
        locked = True
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrepareError(f"another prepare is writing to {out}; wait for it to end") from None
        except OSError:
            locked = False
        yield locked and not shared
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
        raise OtherPlan(f"{out} was prepared from something else: {difference(old, plan.summary)}")
    with contextlib.suppress(ManifestError):
        manifest = Manifest.load(out)
        if manifest.facts.get("plan") == plan.digest:
            return Prepared(out, manifest, Tally(*manifest.facts["tally"]), _read_quarantine(out), fresh=False)
    # From here on the folder is not whole, and must not look as if it were.
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    return None


def _run(tasks: Sequence[ShardTask], out: Path, workers: int, *, progress: bool, first: bool = False) -> None:
    """Writes every shard that is not there yet; `first`: only its clips' hashes are needed, see `_first_shards`."""
    left, read = [], 0
    for task, shard in zip(tasks, (_first_shards if first else _shards)(tasks, out), strict=True):
        if shard is None:
            left.append(task)
        else:
            read += shard.tally.read
    done = len(tasks) - len(left)
    often = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log file wants a line now and then
    with tqdm(total=len(tasks), initial=done, unit="shard", disable=not progress, mininterval=often) as bar:

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


def _merge(tasks: Sequence[ShardTask], plan: Plan, listing: Listing, out: Path) -> Prepared:
    """Writes quarantine.tsv and, last of all, manifest.arrow; deletes shards of older plans."""
    shards: list[Shard] = []
    for task in tasks:
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
        content=hashlib.sha256("".join(itertools.chain(*(shard.hashes for shard in shards))).encode()).hexdigest(),
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


__all__ = [
    "CorpusError",
    "OtherPlan",
    "Part",
    "PartDone",
    "Plan",
    "PrepareError",
    "Prepared",
    "make_plan",
    "prepare",
]
