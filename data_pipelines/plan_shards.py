"""Which clips go into which shard: a pure function of what was listed and of the options."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.batch import SAMPLE_RATE
from data_pipelines.corpora import Clip, Listing
from data_pipelines.manifest import Split
from data_pipelines.shards import (
    NO_FILTERS,
    Duplicate,
    Filters,
    Joining,
    Shard,
    ShardTask,
    make_task,
    without_duplicates,
)


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


def make_plan(
    folders: Mapping[str, str],
    listing: Listing,
    *,
    clips_per_shard: int,
    join_seconds: float,
    min_seconds: float,
    filters: Filters = NO_FILTERS,
    drop_duplicates: bool = False,
) -> Plan:
    """Deals the clips out to shards, sorted by (split, language, corpus, speaker, root, path).

    `folders` has the folder of every `Clip.root`. A shard holds one split of one language; a speaker is divided only
    when alone above `clips_per_shard`.

    Raises PrepareError: no usable clip, or none to train on.
    """
    named = ", ".join(map(str, folders.values()))
    if not listing.clips:
        first = listing.rejected[0]
        raise PrepareError(
            f"none of the {len(listing.rejected)} clips of {named} is usable; "
            f"the first: {first.path} (row {first.row}): {first.reason}"
        )
    if all(clip.split is not Split.TRAIN for clip in listing.clips):
        raise PrepareError(f"{named} has no clip of the split 'train', only {', '.join(_splits(listing.clips))}")
    groups: dict[tuple[Split, str], list[Clip]] = {}  # sorted one by one: the keys of all clips would take gigabytes
    for clip in listing.clips:
        groups.setdefault((clip.split, clip.language), []).append(clip)
    joining = Joining(round(join_seconds * SAMPLE_RATE), round(min_seconds * SAMPLE_RATE))
    tasks = []
    languages: dict[str, list] = {}
    for split, language in sorted(groups):
        kin = groups.pop((split, language))
        kin.sort(key=lambda c: (c.corpus, c.speaker, c.root, c.path, c.start, c.id))
        tally = languages.setdefault(language, [0, hashlib.sha256()])
        for number, dealt in enumerate(_deal(kin, clips_per_shard)):
            tasks.append(make_task(number, folders, dealt, joining, filters))
            tally[0] += len(dealt)
            for clip in dealt:  # one after another: a language of millions would be gigabytes of text at once
                tally[1].update(json.dumps(clip).encode())
    rejected = sorted(listing.rejected, key=lambda r: r.row)
    options = {
        "clips_per_shard": clips_per_shard,
        "join_seconds": join_seconds,
        "min_seconds": min_seconds,
        "filters": filters._asdict(),
        "drop_duplicates": drop_duplicates,
    }
    order = list(folders) if drop_duplicates else []
    content = json.dumps([[task.name for task in tasks], rejected, drop_duplicates, order], ensure_ascii=False)
    summary = {
        "options": options,
        "corpora": order,
        "clips": len(listing.clips),
        "rejected": len(rejected),
        "languages": {name: [count, digest.hexdigest()[:16]] for name, (count, digest) in sorted(languages.items())},
    }
    return Plan(tuple(tasks), hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest(), summary)


def drop_duplicates(
    tasks: Sequence[ShardTask], shards: Sequence[Shard], *, order: Sequence[str]
) -> tuple[ShardTask, ...]:
    """The tasks less the clips whose samples are those of another one, as the `shards` of the tasks have hashed them.

    Held-out clips are kept before training clips, so that test sets stay whole; then the corpora that come first in
    `order` (names of `Clip.root`), then the earlier row. 25 million clips take 1 GB for a moment.
    """
    ranks = {root: rank for rank, root in enumerate(order)}
    digests, keys = [], []
    for number, (task, shard) in enumerate(zip(tasks, shards, strict=True)):
        digests.append(np.frombuffer(bytes.fromhex("".join(h or "0" * 32 for h in shard.hashes)), np.uint64))
        keys += [(c.split is Split.TRAIN, ranks[c.root], c.row, number, place) for place, c in enumerate(task.clips)]
    low, high = np.concatenate(digests).reshape(-1, 2).T
    keys = np.array(keys, np.int64)
    sorted_by = np.lexsort((*keys.T[::-1], high, low))
    low, high, keys = low[sorted_by], high[sorted_by], keys[sorted_by]
    same = np.zeros(len(low), bool)
    same[1:] = (low[1:] == low[:-1]) & (high[1:] == high[:-1]) & ((low[1:] != 0) | (high[1:] != 0))
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(same))))
    found: dict[int, list[Duplicate]] = {}
    for copy in np.flatnonzero(same):
        kept = keys[first[copy]]
        name = tasks[kept[3]].clips[kept[4]].where
        found.setdefault(int(keys[copy, 3]), []).append(Duplicate(int(keys[copy, 4]), name))
    return tuple(without_duplicates(task, sorted(found.get(number, ()))) for number, task in enumerate(tasks))


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


def difference(old: dict, new: dict) -> str:
    """What tells two plans' summaries apart, in words."""
    changes = []
    for key in {**old.get("options", {}), **new["options"]}:
        before, value = old.get("options", {}).get(key), new["options"].get(key)
        if before != value:
            changes.append(f"{key} was {before}, is {value}")
    for key in ("corpora", "clips", "rejected"):
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
