"""The clips of a listing as columns, so that tens of millions of them take files on disk and not memory."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipelines.columns import Names, Numbers, Strings, offsets_of
from data_pipelines.corpora import Clip
from data_pipelines.manifest import Split

NAMES = ("language", "corpus", "speaker", "licence", "root")  # shared by many clips
STRINGS = ("id", "path", "text", "member")
NUMBERS = {
    "split": np.int8,
    "samples": np.int64,  # -1: not known
    "row": np.int64,
    "size": np.int64,
    "start": np.float64,
    "end": np.float64,  # not a number: the recording's end
    "modified": np.int64,
}
PIECE = 1 << 14  # clips that are objects at a time


class Clips(Sequence[Clip]):
    """Clips in the order of their listing. A `Clip` is made where one is asked for; `columns` has them all as arrays.

    Attributes:
        columns: {field of `Clip`: array [clips]}; of `NAMES` a pyarrow.DictionaryArray, of `STRINGS` a
            pyarrow.LargeStringArray, of `NUMBERS` a numpy array.
    """

    def __init__(self, columns: dict):
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["row"])

    def __getitem__(self, place):
        if isinstance(place, slice):
            return list(self.take(np.arange(len(self))[place]))
        place = int(place)
        if not -len(self) <= place < len(self):
            raise IndexError(f"clip {place} of {len(self)}")
        return self.take(np.array([place % len(self)]))[0]

    def __iter__(self) -> Iterator[Clip]:
        for first in range(0, len(self), PIECE):
            yield from self.take(np.arange(first, min(first + PIECE, len(self))))

    def take(self, rows: np.ndarray) -> tuple[Clip, ...]:
        """The clips of these rows, in their order."""
        fields = {name: self.values(name, rows).tolist() for name in NUMBERS}
        fields |= {name: self.values(name, rows).to_pylist() for name in (*NAMES, *STRINGS)}
        fields["split"] = map(Split, fields["split"])
        fields["samples"] = [None if samples < 0 else samples for samples in fields["samples"]]
        fields["end"] = [None if end != end else end for end in fields["end"]]
        return tuple(map(Clip._make, zip(*(fields[name] for name in Clip._fields), strict=True)))

    def part(self, rows: np.ndarray) -> "Clips":
        """These rows as columns of their own, in memory, which a process can be sent: a third of the objects' size."""
        writer = ClipWriter()
        writer.extend(self, rows)
        return writer.clips()

    def values(self, name: str, rows: np.ndarray) -> np.ndarray | pa.LargeStringArray:
        """One field of these rows."""
        column = self.columns[name]
        if name in NUMBERS:
            return column[rows]
        taken = column.take(pa.array(rows))
        return taken.dictionary_decode() if name in NAMES else taken

    def content(self, name: str, rows: np.ndarray) -> bytes:
        """One field of these rows as bytes that are equal where the values are."""
        values = self.values(name, rows)
        if name in NUMBERS:
            return values.tobytes()
        ends, text = offsets_of(values), values.buffers()[2]
        return np.diff(ends).tobytes() + (text[int(ends[0]) : int(ends[-1])].to_pybytes() if text else b"")


class ClipWriter:
    """Takes clips in, one by one or many; `clips` are then their columns, in files in `folder` where they are many.

    Without a folder, all stays in memory. Raises CannotWrite naming the folder (a full disk).
    """

    def __init__(self, folder: Path | None = None):
        self._columns = {name: Names(folder=folder) for name in NAMES}
        self._columns |= {name: Strings(folder=folder) for name in STRINGS}
        self._columns |= {name: Numbers(dtype, folder=folder) for name, dtype in NUMBERS.items()}
        self._pending: list[Clip] = []
        self._written = 0

    def __len__(self) -> int:
        return self._written + len(self._pending)

    def add(self, clip: Clip) -> None:
        """Takes one clip in."""
        self._pending.append(clip)
        if len(self._pending) >= PIECE:
            self._flush()

    def extend(self, clips: Clips, rows: np.ndarray | None = None, **instead: str) -> None:
        """Takes these rows of `clips` in (all, if None), with other names where `instead` has some.

        With a `root`, ids get it and "/" before them; a `licence` is that of clips without one.
        """
        self._flush()
        licence = instead.pop("licence", "")
        root = instead.get("root", "")
        for first in range(0, len(clips) if rows is None else len(rows), PIECE):
            if rows is None:
                piece = np.arange(first, min(first + PIECE, len(clips)))
            else:
                piece = rows[first : first + PIECE]
            self._written += len(piece)
            for name in NUMBERS:
                self._columns[name].append(clips.values(name, piece))
            for name in STRINGS:
                values = clips.values(name, piece)
                if name == "id" and root:
                    values = pa.array([f"{root}/{id}" for id in values.to_pylist()], pa.large_string())
                self._columns[name].append(values)
            for name in NAMES:
                if name in instead:
                    self._columns[name].append_codes(np.zeros(len(piece), np.int32), [instead[name]])
                    continue
                values = clips.columns[name].take(pa.array(piece))
                used, codes = np.unique(values.indices.to_numpy(), return_inverse=True)
                given = values.dictionary.take(pa.array(used)).to_pylist()
                if name == "licence":
                    given = [value or licence for value in given]
                self._columns[name].append_codes(codes, given)

    def _flush(self) -> None:
        if not self._pending:
            return
        fields = dict(zip(Clip._fields, zip(*self._pending, strict=True), strict=True))
        fields["samples"] = [-1 if samples is None else samples for samples in fields["samples"]]
        fields["end"] = [np.nan if end is None else end for end in fields["end"]]
        for name, column in self._columns.items():
            column.append(pa.array(fields[name], pa.large_string()) if name in STRINGS else fields[name])
        self._written += len(self._pending)
        self._pending = []

    def clips(self) -> Clips:
        """All that was taken in; call it once."""
        self._flush()
        return Clips({name: column.take() for name, column in self._columns.items()})
