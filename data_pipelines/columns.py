"""Columns of tens of millions of values: appended piece by piece to files without names, then mapped.

What is mapped from a file costs no memory that the system could not take back. The files have no names (`O_TMPFILE`),
so nothing is left of them, however the process ends.
"""

import mmap
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipelines.atomic import cannot_write

IN_MEMORY = 1 << 22  # bytes of a column that are kept in memory; more go to a file


class _Bytes:
    """Bytes that grow: in memory, and beyond `IN_MEMORY` in a file in `folder` (None: in memory whatever comes)."""

    def __init__(self, folder: Path | None):
        self._folder, self._held, self._file = folder, bytearray(), None

    def write(self, data) -> None:
        self._held += data
        if self._folder is not None and len(self._held) > IN_MEMORY:
            try:
                if self._file is None:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)
                self._flush()
            except OSError as error:
                raise cannot_write(error, self._folder) from error

    def _flush(self) -> None:
        left = memoryview(self._held)
        while left:  # a disk that is nearly full takes a part
            left = left[self._file.write(left) :]
        left.release()
        self._held = bytearray()

    def take(self) -> pa.Buffer:
        """All of it; mapped, where it is in a file. Nothing can be added any more."""
        if self._file is None:
            held, self._held = bytes(self._held), None
            return pa.py_buffer(held)
        try:
            self._flush()
            mapped = mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ)
        except OSError as error:
            raise cannot_write(error, self._folder) from error
        self._file.close()
        return pa.py_buffer(mapped)


class Numbers:
    """A column of numbers of one `dtype`; `folder` is where its file may lie, None keeps it in memory."""

    def __init__(self, dtype, *, folder: Path | None = None):
        self._dtype, self._bytes = np.dtype(dtype), _Bytes(folder)

    def append(self, values: Iterable) -> None:
        """Adds a piece. Raises CannotWrite naming the folder (a full disk)."""
        self._bytes.write(np.ascontiguousarray(values, self._dtype).data.cast("B") if len(values) else b"")

    def take(self) -> np.ndarray:
        """All values [values]; call it once. Raises CannotWrite."""
        return np.frombuffer(self._bytes.take(), self._dtype)


class Strings:
    """A column of strings, which may be null; `folder` as for `Numbers`."""

    def __init__(self, *, folder: Path | None = None):
        self._ends, self._text = Numbers(np.int64, folder=folder), _Bytes(folder)
        self._nulls, self._null_count, self._size = Numbers(np.bool_, folder=folder), 0, 0
        self._ends.append([0])

    def append(self, values: pa.LargeStringArray) -> None:
        """Adds a piece. Raises CannotWrite naming the folder."""
        ends = offsets_of(values)
        text = values.buffers()[2]
        self._text.write(text[int(ends[0]) : int(ends[-1])] if text is not None else b"")
        self._ends.append(ends[1:] - ends[0] + self._size)
        self._size += int(ends[-1] - ends[0])
        self._null_count += values.null_count
        self._nulls.append(values.is_null().to_numpy(zero_copy_only=False))

    def take(self) -> pa.LargeStringArray:
        """All values; call it once. Raises CannotWrite."""
        ends, nulls = self._ends.take(), self._nulls.take()
        valid = pa.py_buffer(np.packbits(~nulls, bitorder="little")) if self._null_count else None
        return pa.LargeStringArray.from_buffers(
            len(nulls), pa.py_buffer(ends), self._text.take(), valid, self._null_count
        )


class Names:
    """A column of names that many rows share: each is kept once, in memory; the column has their numbers."""

    def __init__(self, *, folder: Path | None = None):
        self._numbers: dict[str, int] = {}
        self._codes = Numbers(np.int32, folder=folder)

    def append(self, values: Iterable[str]) -> None:
        """Adds a piece. Raises CannotWrite naming the folder."""
        numbers = self._numbers
        self._codes.append([numbers.setdefault(value, len(numbers)) for value in values])

    def append_codes(self, codes: np.ndarray, names: Iterable[str]) -> None:
        """Adds a piece whose values are `names[codes]`."""
        numbers = self._numbers
        numbered = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int32)
        self._codes.append(numbered[codes])

    def take(self) -> pa.DictionaryArray:
        """All values; call it once. Raises CannotWrite."""
        return pa.DictionaryArray.from_arrays(
            pa.array(self._codes.take()), pa.array(list(self._numbers), pa.large_string())
        )


def offsets_of(values: pa.LargeStringArray) -> np.ndarray:
    """int64 [values + 1]: where each of them begins in its text buffer, and where the last one ends."""
    if not len(values):
        return np.zeros(1, np.int64)
    return np.frombuffer(values.buffers()[1], np.int64)[values.offset : values.offset + len(values) + 1]
