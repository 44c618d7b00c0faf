"""Which clips go into which shard: a pure function of what was listed and of the options."""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_pipelines.batch import SAMPLE_RATE
from data_pipelines.corpora import Listing
from data_pipelines.corpora.clips import NAMES, NUMBERS, PIECE, STRINGS, Clips
from data_pipelines.corpora.listing import BAR_AFTER
from data_pipelines.manifest import Split
from data_pipelines.plan_order import Kin, kin_in_order
from data_pipelines.shards import (
    HASH_BYTES,
    NO_FILTERS,
    RECIPE,
    Duplicate,
    Filters,
    Joining,
    ShardTask,
    name_without,
)
from data_pipelines.unique import given_twice, rows_among

# What a clip is, all but when its file was changed: a corpus that was copied is the same one.
_CONTENT = tuple(name for name in (*NAMES, *STRINGS, *NUMBERS) if name != "modified")


class PrepareError(RuntimeError):
    """`prepare` cannot go on: another plan or another run holds the folder, nothing is usable, a worker died."""


class OtherPlan(PrepareError):
    """The folder was prepared from other clips, or with other options; `reason` says so without what to do."""

    def __init__(self, reason: str):
        super().__init__(f"{reason}. Give another --out, or --overwrite (shards that stay the same are kept)")
        self.reason = reason


class Planned(NamedTuple):
    """One shard to be made.

    Attributes:
        name: that of its `ShardTask`. times: a hash of when its clips' files were changed last.
        rows: [clips] integers, of the listing. size: of its clips, in bytes.
        duplicates: clips that are left out because they are elsewhere already.
    """

    name: str
    times: str
    rows: np.ndarray
    size: int
    duplicates: tuple[Duplicate, ...] = ()


class Plan(NamedTuple):
    """What will be made: the `shards` out of `clips`, in these `folders`, by these rules.

    `digest` is one of all of them, `times` one of when their files were changed, and `summary` tells two plans apart in
    words. A `ShardTask`, which holds its clips, is made when its turn comes: 25 million at once would be 20 GB.
    """

    shards: tuple[Planned, ...]
    clips: Clips
    folders: Mapping[str, str]
    joining: Joining
    filters: Filters
    digest: str
    times: str
    summary: dict

    def task(self, shard: Planned) -> ShardTask:
        """What a worker needs to make the shard."""
        clips = self.clips.part(shard.rows)
        folders = {root: self.folders[root] for root in clips.columns["root"].dictionary.to_pylist()}
        return ShardTask(shard.name, folders, clips, self.joining, self.filters, shard.duplicates, shard.times)


def make_plan(
    folders: Mapping[str, str],
    listing: Listing,
    *,
    clips_per_shard: int,
    join_seconds: float,
    min_seconds: float,
    filters: Filters = NO_FILTERS,
    drop_duplicates: bool = False,
    progress: bool = False,
) -> Plan:
    """Deals the clips out to shards, sorted by (split, language, corpus, speaker, root, path).

    `folders` has the folder of every `Clip.root`. A shard holds one split of one language; a speaker is divided only
    when alone above `clips_per_shard`.

    Raises PrepareError: no usable clip, or none to train on.
    """
    named = ", ".join(map(str, folders.values()))
    clips = listing.clips
    if not len(clips):
        first = listing.rejected[0]
        raise PrepareError(
            f"none of the {len(listing.rejected)} clips of {named} is usable; "
            f"the first: {first.path} (row {first.row}): {first.reason}"
        )
    splits = np.unique(clips.columns["split"])
    if Split.TRAIN not in splits:
        raise PrepareError(
            f"{named} has no clip of the split 'train', only {', '.join(Split(s).name.lower() for s in splits)}"
        )
    joining = Joining(round(join_seconds * SAMPLE_RATE), round(min_seconds * SAMPLE_RATE))
    shards: list[Planned] = []
    languages: dict[str, _Language] = {}
    in_order = kin_in_order(clips)
    groups = len(np.unique(clips.columns["split"])) * len(clips.columns["language"].dictionary)  # at most
    for kin in bar_if_long(in_order, groups, "planning", unit="language", shown=progress):
        language = languages.setdefault(kin.language, _Language())
        for number, rows in enumerate(_deal(kin, clips_per_shard)):
            digest = hashlib.sha256(json.dumps([RECIPE, joining, filters]).encode())
            for content in (clips.content(name, rows) for name in _CONTENT):
                digest.update(len(content).to_bytes(8, "little"))
                digest.update(content)
            times = language.add(clips, rows)
            name = f"{kin.language}-{kin.split.name.lower()}-{number:05d}-{digest.hexdigest()[:12]}"
            shards.append(Planned(name, times, rows, int(clips.columns["size"][rows].sum())))
    rejected = sorted(listing.rejected, key=lambda r: r.row)
    options = {
        "clips_per_shard": clips_per_shard,
        "join_seconds": join_seconds,
        "min_seconds": min_seconds,
        "filters": filters._asdict(),
        "drop_duplicates": drop_duplicates,
    }
    order = list(folders) if drop_duplicates else []
    content = json.dumps([[shard.name for shard in shards], rejected, drop_duplicates, order], ensure_ascii=False)
    summary = {
        "recipe": RECIPE,
        "options": options,
        "corpora": order,
        "clips": len(clips),
        "rejected": len(rejected),
        "languages": {name: language.summary() for name, language in sorted(languages.items())},
    }
    return Plan(
        tuple(shards),
        clips,
        dict(folders),
        joining,
        filters,
        digest=hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest(),
        times=hashlib.sha256("".join(shard.times for shard in shards).encode()).hexdigest(),
        summary=summary,
    )


def bar_if_long(items: Iterable, total: int, what: str, *, unit: str, shown: bool) -> Iterable:
    """The items, with a bar for what takes longer than `BAR_AFTER` seconds; to a log file, a line twice a minute."""
    often = 0.5 if sys.stderr.isatty() else 30.0
    kept = {"leave": False, "disable": not shown, "delay": BAR_AFTER, "mininterval": often}
    return tqdm(items, total=total, desc=what, unit=unit, **kept)


class _Language:
    """What a plan's summary says of a language: how many clips, a hash of them, and one of their files' times."""

    def __init__(self):
        self._count, self._times = 0, hashlib.sha256()
        self._content = {name: hashlib.sha256() for name in _CONTENT}  # one each: however clips are dealt, it is this

    def add(self, clips: Clips, rows: np.ndarray) -> str:
        """Takes some more in; gives the hash of their times."""
        self._count += len(rows)
        for name, digest in self._content.items():
            digest.update(clips.content(name, rows))
        times = clips.content("modified", rows)
        self._times.update(times)
        return hashlib.sha256(times).hexdigest()[:16]

    def summary(self) -> list:
        content = hashlib.sha256("".join(digest.hexdigest() for digest in self._content.values()).encode())
        return [self._count, content.hexdigest()[:16], self._times.hexdigest()[:16]]


def drop_duplicates(plan: Plan, hashes: Iterable[bytes], *, order: Sequence[str]) -> tuple[Planned, ...]:
    """The plan's shards less the clips whose samples are those of another one.

    `hashes` has, of each shard, its clips' hashes one after another, `HASH_BYTES` each, zeros where there is none.
    Held-out clips are kept before training clips, so that test sets stay whole; then the corpora that come first in
    `order` (names of `Clip.root`), then the earlier row.
    """
    clips, shards = plan.clips, plan.shards
    rows = np.concatenate([shard.rows for shard in shards])
    bounds = np.cumsum([0, *(len(shard.rows) for shard in shards)])
    low, high = np.empty((2, len(rows)), np.uint64)
    for shard, first, end, found in zip(shards, bounds, bounds[1:], hashes, strict=False):
        if len(found) != (end - first) * HASH_BYTES:
            raise PrepareError(f"shard {shard.name} has {len(found) // HASH_BYTES} clips, {end - first} are planned")
        low[first:end], high[first:end] = np.frombuffer(found, np.uint64).reshape(-1, 2).T
    some = rows_among(low, given_twice(low))  # few: only these are looked at closely
    low, high = low[some], high[some]
    some, low, high = (column[(low != 0) | (high != 0)] for column in (some, low, high))
    number = np.searchsorted(bounds, some, side="right") - 1
    ranks = {root: rank for rank, root in enumerate(order)}
    root = clips.columns["root"]
    ranked = np.array([ranks[name] for name in root.dictionary.to_pylist()])[root.indices.to_numpy()[rows[some]]]
    training = clips.columns["split"][rows[some]] == Split.TRAIN
    by = np.lexsort((some, clips.columns["row"][rows[some]], ranked, training, high, low))
    some, number, low, high = some[by], number[by], low[by], high[by]
    same = np.zeros(len(some), bool)
    same[1:] = (low[1:] == low[:-1]) & (high[1:] == high[:-1])
    first = np.maximum.accumulate(np.where(same, 0, np.arange(len(same))))
    lost: dict[int, list[Duplicate]] = {}
    copies = np.flatnonzero(same)
    places = (some - bounds[number])[copies].tolist()
    for at in range(0, len(copies), PIECE):
        piece = copies[at : at + PIECE]
        names = [clip.where for clip in clips.take(rows[some[first[piece]]])]
        for shard, place, name in zip(number[piece].tolist(), places[at : at + PIECE], names, strict=True):
            lost.setdefault(shard, []).append(Duplicate(place, name))
    less = list(shards)
    for at, duplicates in lost.items():
        kept = tuple(sorted(duplicates))
        less[at] = shards[at]._replace(name=name_without(shards[at].name, kept), duplicates=kept)
    return tuple(less)


def _deal(kin: Kin, limit: int) -> Iterator[np.ndarray]:
    begin = 0  # of the shard that is being filled
    for first, end in zip(kin.speakers, [*kin.speakers[1:], len(kin.rows)], strict=True):
        if begin < first and end - begin > limit:
            yield kin.rows[begin:first]
            begin = first
        while end - first > limit:  # cut evenly: a sliver at the end would leave an utterance too short
            pieces = -(-(end - first) // limit)
            size = -(-(end - first) // pieces)
            yield kin.rows[first : first + size]
            begin = first = first + size
    if begin < len(kin.rows):
        yield kin.rows[begin:]


def difference(old: dict, new: dict) -> str:
    """What tells two plans' summaries apart, in words."""
    if old.get("recipe") != new["recipe"]:  # hashes are then of something else
        return "it was made by another version of this code, whose shards are not the same"
    changes = []
    for key in {**old.get("options", {}), **new["options"]}:
        before, value = old.get("options", {}).get(key), new["options"].get(key)
        if before != value:
            changes.append(f"{key} was {before}, is {value}")
    for key in ("corpora", "clips", "rejected"):
        if old.get(key) != new[key]:
            changes.append(f"{key} were {old.get(key)}, are {new[key]}")
    before, after = old.get("languages", {}), new["languages"]
    both = sorted(set(before) & set(after))
    for words, names in (
        ("new languages", sorted(set(after) - set(before))),
        ("languages gone", sorted(set(before) - set(after))),
        ("clips changed in", [name for name in both if before[name][:2] != after[name][:2]]),
        (
            "files written since (of the same size) in",
            [name for name in both if before[name][:2] == after[name][:2] and before[name][2:] != after[name][2:]],
        ),
    ):
        if names:
            changes.append(f"{words}: {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}")
    return "; ".join(changes) or "another version of this code, or other reasons for clips left out"
