"""Whether strings are all different, for tens of millions of them: by 64-bit hashes, and only those alike by letter."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines.permutations import mix64

_PIECE = 1 << 14  # strings hashed in one piece: what is in hand stays in the cache
_WORD = 8  # bytes hashed at a time


class Repeated(NamedTuple):
    """The string at `row` stands at `first` already."""

    row: int
    first: int


def first_repeated(values: pa.LargeStringArray) -> str | None:
    """A string that comes more than once, or None. Nulls are taken for ""."""
    for repeated in repetitions(values):
        return values[repeated.row].as_py() or ""
    return None


def repetitions(values: pa.LargeStringArray) -> Iterator[Repeated]:
    """Every row whose string stands at an earlier row, in order. Nulls are taken for "".

    A table of all strings (Arrow's `count_distinct`) misses every cache: 25 million ids take it over a minute.
    """
    if not len(values):
        return
    hashes = np.concatenate([_hashes(values[first : first + _PIECE]) for first in range(0, len(values), _PIECE)])
    alike = given_twice(hashes)
    seen: dict[str, int] = {}
    for row in rows_among(hashes, alike).tolist():
        first = seen.setdefault(values[row].as_py() or "", row)
        if first != row:
            yield Repeated(row, first)


def given_twice(numbers: np.ndarray) -> np.ndarray:
    """The numbers that come more than once, sorted. Takes as much memory again."""
    ordered = np.sort(numbers)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


def rows_among(numbers: np.ndarray, few: np.ndarray) -> np.ndarray:
    """int64 [rows]: where `numbers` is one of the sorted `few`. (numpy's `isin` would sort all of them again.)"""
    found = [np.zeros(0, np.int64)]
    for first in range(0, len(numbers) if len(few) else 0, _PIECE):
        piece = numbers[first : first + _PIECE]
        place = np.minimum(np.searchsorted(few, piece), len(few) - 1)
        found.append(np.flatnonzero(few[place] == piece) + first)
    return np.concatenate(found)


def _hashes(values: pa.LargeStringArray) -> np.ndarray:
    """uint64 [values], word by word over all of them at once."""
    _, offsets, text = values.buffers()
    ends = np.frombuffer(offsets, np.int64)[values.offset : values.offset + len(values) + 1]
    lengths = np.diff(ends)
    letters = np.frombuffer(text, np.uint8)[ends[0] : ends[-1]] if text else np.zeros(0, np.uint8)
    padded = np.concatenate([letters, np.zeros(_WORD, np.uint8)])
    words = np.ndarray(len(letters) + 1, "<u8", buffer=padded, strides=(1,))  # one begins at every byte
    hashes, starts = lengths.astype(np.uint64), ends[:-1] - ends[0]
    for at in range(0, int(lengths.max()), _WORD):
        rows = np.flatnonzero(lengths > at)
        beyond = np.maximum(at + _WORD - lengths[rows], 0).astype(np.uint64)  # letters of the next string
        word = words[starts[rows] + at] & (np.uint64(0xFFFFFFFFFFFFFFFF) >> (beyond * np.uint64(8)))
        hashes[rows] = mix64(hashes[rows], word)
    return hashes
