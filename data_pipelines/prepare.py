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
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data_pipelines import storage
from data_pipelines.atomic import TEMPORARY_PREFIX, delete_leftovers, whole_file
from data_pipelines.batch import SAMPLE_RATE
from data_pipelines.compositions import list_corpora
from data_pipelines.corpora import CorpusError, Rejected
from data_pipelines.corpora.listing import scratch_in
from data_pipelines.manifest import MANIFEST_NAME, SHARD_FOLDER, Manifest, ManifestError
from data_pipelines.merge_shards import QUARANTINE_NAME, merge_shards, read_quarantine
from data_pipelines.plan_shards import (
    OtherPlan,
    Plan,
    Planned,
    PrepareError,
    bar_if_long,
    difference,
    drop_duplicates,
    make_plan,
)
from data_pipelines.shards import HASH_BYTES, NO_FILTERS, Filters, Shard, ShardTask, Tally, read_shard, write_shard
from data_pipelines.worker_processes import cores, die_of_interrupts, follow_parent, interrupts_blocked

PLAN_NAME = "plan.json"
STALL_SECONDS = 900.0  # without a shard, or a byte of one, after which that is told
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
    scratch: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Prepared | PartDone:
    """Prepares a corpus, or the corpora of a composition file (`folder` ends in .toml; see `compositions`).

    `reader` with its `options` says how the folder is read (see `corpora.readers`; `table` is the folder reader's).
    Training clips shorter than `join_seconds` are joined with their neighbours of the same language, corpus and
    speaker (clips without a speaker count as one speaker's); a speaker with less than `min_seconds` is repeated up to
    it. Held-out clips are never joined. Long clips are kept whole, unless `filters` leaves them out; without
    `duplicates`, so are clips with the same samples as another one. Unusable clips are left out and listed in
    quarantine.tsv. `workers` (default: one a core that it may use) does not change the result.

    With `part` only that share of the shards is written, by as many jobs at once as there are parts, and PartDone
    returned; a call without it makes what is missing and the manifest. Listings too long for memory lie in `scratch`
    (default: `out`) until the call ends.

    Raises CorpusError (folder, table, composition), PrepareError (another plan or run in `out`, no usable clip, no
    training clip, a worker that died), StorageError (an address), OSError naming the file that could not be written.
    Run it again after any of these: finished shards are kept.
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
    out, options = storage.local(out, what="the folder to prepare to"), dict(options or {})
    scratch = storage.local(scratch or out, what="the folder for listings")
    folder = storage.local(folder, what="the corpus")
    if table is not None:
        options["table"] = table
    with scratch_in(scratch):
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
        progress=progress,
    )
    (out / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
    with _only_one_run(out, shared=part is not None) as alone:
        done = _finished(out, plan, overwrite=overwrite)
        if done is not None:
            return done if part is None else PartDone(len(_share(done.manifest.shard_names, part)), 0)
        for place in (out, out / SHARD_FOLDER):
            delete_leftovers(place, everyones=alone)
        with whole_file(out / PLAN_NAME) as temporary:
            about = {"digest": plan.digest, "times": plan.times, **plan.summary}
            temporary.write_text(json.dumps(about, indent=1, ensure_ascii=False))
        count = workers or cores()
        if part is not None:
            return _run_part(plan, out, part, count, progress=progress)
        _run(plan, plan.shards, out, count, first=not duplicates, progress=progress)
        shards = plan.shards
        if not duplicates:
            shards = drop_duplicates(plan, _hashed(plan.shards, out, progress=progress), order=list(plan.folders))
            _run(plan, shards, out, count, progress=progress)
        tally, rejected = merge_shards(shards, plan, listed.listing.rejected, out, progress=progress)
        return Prepared(out, Manifest.load(out), tally, rejected, fresh=True)


def _share(items: Sequence, part: Part) -> Sequence:
    return items[part.part - 1 :: part.of]


def _run_part(plan: Plan, out: Path, part: Part, workers: int, *, progress: bool) -> PartDone:
    """Writes a share of the plan's shards; where all are there, its share of those that lose duplicates."""
    shards = plan.shards
    dropping = plan.summary["options"]["drop_duplicates"]
    _run(plan, _share(shards, part), out, workers, first=dropping, progress=progress)
    missing = sum(shard is None for shard in (_first_shards if dropping else _shards)(shards, out))
    if dropping and not missing:
        shards = drop_duplicates(plan, _hashed(shards, out, progress=progress), order=list(plan.folders))
        _run(plan, _share(shards, part), out, workers, progress=progress)
        missing = sum(shard is None for shard in _shards(shards, out))
    return PartDone(len(_share(shards, part)), missing)


def _shards(shards: Sequence[Planned], out: Path) -> Iterator[Shard | None]:
    """Each of the shards as it is on disk; None where it is not there whole, or of files that were written since."""
    return (_of_these_files(read_shard(shard.name, out), shard) for shard in shards)


def _of_these_files(found: Shard | None, shard: Planned) -> Shard | None:
    return found if found is not None and found.times == shard.times else None


def _first_shards(shards: Sequence[Planned], out: Path) -> Iterator[Shard | None]:
    """The same, or in place of a shard the same less duplicates, which has the same hashes."""
    less: dict[str, list[str]] = {}
    for name in sorted(os.listdir(out / SHARD_FOLDER)):
        if name.endswith(".arrow"):
            less.setdefault(name.rpartition("-")[0], []).append(name.removesuffix(".arrow"))
    for shard in shards:
        names = (shard.name, *less.get(shard.name, ()))
        found = (_of_these_files(read_shard(name, out), shard) for name in names)
        yield next(filter(None, found), None)


def _hashed(shards: Sequence[Planned], out: Path, *, progress: bool) -> Iterator[bytes]:
    """Of each shard, the hashes of its clips, as `drop_duplicates` takes them."""
    found = bar_if_long(_first_shards(shards, out), len(shards), "looking for duplicates", unit="shard", shown=progress)
    for planned, shard in zip(shards, found, strict=True):
        if shard is None:
            raise PrepareError(f"shard {planned.name} in {out} is not whole after it was written: is the disk sound?")
        yield bytes.fromhex("".join(value or "0" * 2 * HASH_BYTES for value in shard.hashes))


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
    same = old is not None and (old.get("digest"), old.get("times")) == (plan.digest, plan.times)
    if old is not None and not same and not overwrite:
        raise OtherPlan(f"{out} was prepared from something else: {difference(old, plan.summary)}")
    with contextlib.suppress(ManifestError):
        manifest = Manifest.load(out)
        if same and manifest.facts.get("plan") == plan.digest:
            return Prepared(out, manifest, Tally(*manifest.facts["tally"]), read_quarantine(out), fresh=False)
    # From here on the folder is not whole, and must not look as if it were.
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    return None


def _run(
    plan: Plan, shards: Sequence[Planned], out: Path, workers: int, *, progress: bool, first: bool = False
) -> None:
    """Writes every shard that is not there yet; `first`: only its clips' hashes are needed, see `_first_shards`."""
    left, read = [], 0
    found = (_first_shards if first else _shards)(shards, out)
    found = bar_if_long(found, len(shards), "looking at what is there", unit="shard", shown=progress)
    for planned, shard in zip(shards, found, strict=True):
        if shard is None:
            left.append(planned)
        else:
            read += shard.tally.read
    done = len(shards) - len(left)
    often = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log file wants a line now and then
    with tqdm(total=len(shards), initial=done, unit="shard", disable=not progress, mininterval=often) as bar:

        def advance(tally: Tally) -> None:
            nonlocal read
            read += tally.read
            bar.set_postfix_str(f"{read / SAMPLE_RATE / 3600:.2f} h of audio", refresh=False)
            bar.update()

        if workers == 1:
            for planned in left:
                advance(write_shard(plan.task(planned), out))
        else:
            _run_in_pool(left, plan.task, out, workers, advance)


def _run_in_pool(
    shards: list[Planned],
    task_of: Callable[[Planned], ShardTask],
    out: Path,
    workers: int,
    advance: Callable[[Tally], None],
) -> None:
    # Long tasks first keeps all workers busy to the end; the order has no say in what is written.
    waiting = sorted(shards, key=lambda shard: shard.size)  # popped from its end
    # Spawned, not forked: the parent may hold threads and locks of the libraries that it imported.
    context = multiprocessing.get_context("spawn")
    count = max(1, min(workers, len(shards)))
    with concurrent.futures.ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker) as pool:
        running: dict[concurrent.futures.Future, str] = {}
        written: dict[str, int] | None = None  # when nothing had come for long the last time
        try:
            while waiting or running:
                while waiting and len(running) < workers * IN_FLIGHT:
                    task = task_of(waiting.pop())
                    with interrupts_blocked():  # the first task starts the processes
                        running[pool.submit(write_shard, task, out)] = task.name
                ready, _ = concurrent.futures.wait(
                    running, timeout=STALL_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED
                )
                if not ready:
                    before, written = written, _half_written(out)
                    if before == written:
                        tqdm.write(_stalled(list(running.values())), file=sys.stderr)
                    continue
                written = None
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


def _half_written(out: Path) -> dict[str, int]:
    """{name: bytes} of the shards that are being written."""
    found = {}
    with os.scandir(out / SHARD_FOLDER) as entries:
        for entry in entries:
            if entry.name.startswith(TEMPORARY_PREFIX):
                with contextlib.suppress(FileNotFoundError):
                    found[entry.name] = entry.stat().st_size
    return found


def _stalled(names: list[str]) -> str:
    return (
        f"warning: nothing was written for {STALL_SECONDS:g} s; perhaps a read hangs: is the corpus' disk there? "
        f"Shards in work are among {', '.join(sorted(names)[:4])}. It waits; after Ctrl-C the same command goes on"
    )


def _start_worker() -> None:
    die_of_interrupts()  # a shard is whole or absent, so a worker may stop anywhere
    follow_parent()


__all__ = [
    "CorpusError",
    "OtherPlan",
    "Part",
    "PartDone",
    "Plan",
    "PrepareError",
    "Prepared",
    "QUARANTINE_NAME",
    "make_plan",
    "prepare",
]
