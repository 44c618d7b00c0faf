"""In which order clips are dealt out to shards, found column by column: 25 million clips are never objects at once."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines.corpora.clips import NAMES, PIECE, Clips
from data_pipelines.manifest import Split

KINSHIP = ("corpus", "speaker", "root")  # by these, then by TIES, the clips of one split and language are sorted
TIES = ("path", "start", "id")
SORTED_AT_ONCE = 1 << 19  # clips whose paths are in memory at a time, unless one speaker has more


class Kin(NamedTuple):
    """The clips of one split and language: `rows` [clips] of the listing, sorted by (corpus, speaker, root, path,
    start, id), and where in them each speaker of a corpus begins, `speakers` [speakers] int64."""

    split: Split
    language: str
    rows: np.ndarray
    speakers: np.ndarray


def kin_in_order(clips: Clips) -> Iterator[Kin]:
    """All clips, sorted by (split, language) and within as `Kin` says. Names sort as Python sorts them."""
    ranks = {name: _ranks(clips, name) for name in ("language", *KINSHIP)}
    languages = len(ranks["language"])
    group = np.empty(len(clips), np.int16 if 3 * languages < 1 << 15 else np.int64)  # int16 is sorted by counting
    for first in range(0, len(clips), PIECE):
        piece = slice(first, first + PIECE)
        group[piece] = clips.columns["split"][piece].astype(np.int64) * languages + _ranked(
            clips, "language", ranks, piece
        )
    by_group = np.argsort(group, kind="stable").astype(np.min_scalar_type(-max(1, len(clips))))
    ends = np.cumsum(np.bincount(group, minlength=3 * languages))
    del group
    names = sorted(clips.columns["language"].dictionary.to_pylist())
    for number, (first, end) in enumerate(zip(ends - np.diff(ends, prepend=0), ends, strict=True)):
        if first == end:
            continue
        rows = by_group[first:end].astype(np.int64)
        key = np.zeros(len(rows), np.int64)
        for name in KINSHIP:
            for at in range(0, len(rows), PIECE):
                piece = slice(at, at + PIECE)
                key[piece] = key[piece] * len(ranks[name]) + _ranked(clips, name, ranks, rows[piece])
        order = np.argsort(key, kind="stable")
        rows, key = rows[order], key[order]
        del order
        begins = np.flatnonzero(np.diff(key // len(ranks["root"]), prepend=-1))
        run = np.cumsum(np.diff(key, prepend=key[0]) != 0)
        del key
        for name in TIES:
            rows, run = _sorted_within(clips, name, rows, run)
        yield Kin(Split(number // languages), names[number % languages], rows.astype(by_group.dtype), begins)


def _ranks(clips: Clips, name: str) -> np.ndarray:
    """int64 [names]: the place of each name of a column among them when they are sorted."""
    names = clips.columns[name].dictionary.to_pylist()
    ranks = np.empty(len(names), np.int64)
    ranks[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
    return ranks


def _ranked(clips: Clips, name: str, ranks: dict[str, np.ndarray], rows) -> np.ndarray:
    return ranks[name][clips.columns[name].indices.to_numpy()[rows]]


def _sorted_within(clips: Clips, name: str, rows: np.ndarray, run: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`rows` sorted by a column within each run of equal numbers in `run`, and the runs that are still alike then.

    Runs that are in order already, as most listings are, cost no more than a look.
    """
    begins = np.flatnonzero(np.diff(run, prepend=-1))
    ends = np.append(begins[1:], len(rows))
    if len(begins) == len(rows):
        return rows, run
    new = np.ones(len(rows), bool)  # whether a row differs from the one before it
    first = 0
    while first < len(begins):
        last = max(first + 1, int(np.searchsorted(ends, begins[first] + SORTED_AT_ONCE, side="right")))
        piece = slice(int(begins[first]), int(ends[last - 1]))
        first = last
        if piece.stop - piece.start < 2:
            continue
        values, runs = _values(clips, name, rows[piece]), run[piece]
        same_run = runs[1:] == runs[:-1]
        if (same_run & _less(values[1:], values[:-1])).any():
            table = pa.table({"run": runs, "value": values})
            order = pc.sort_indices(table, sort_keys=[("run", "ascending"), ("value", "ascending")]).to_numpy()
            # Equal values stay in the order of the listing: Arrow's sort is stable.
            rows[piece] = rows[piece][order]
            values = values.take(pa.array(order))
        new[piece.start + 1 : piece.stop] = ~same_run | ~_equal(values[1:], values[:-1])
    return rows, np.cumsum(new)


def _values(clips: Clips, name: str, rows: np.ndarray) -> pa.Array:
    assert name not in NAMES
    return pa.array(clips.values(name, rows))


def _less(left: pa.Array, right: pa.Array) -> np.ndarray:
    return pc.less(left, right).to_numpy(zero_copy_only=False)


def _equal(left: pa.Array, right: pa.Array) -> np.ndarray:
    return pc.equal(left, right).to_numpy(zero_copy_only=False)
