"""Text tables of millions of lines, `key value`, looked up by key: the lines stay in the file."""

import mmap
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipelines.corpora import CorpusError


class KeyedLines:
    """The lines of a text file by their first field; empty where there is no such file.

    Kept in memory: 16 bytes a line (a dict of the lines of 25 million utterances would be 5 GB and more). Fields end at
    `separator`, or at any white space where it is None; a key that comes again means its last line.

    Raises CorpusError: not UTF-8, not readable.
    """

    def __init__(self, path: Path, *, separator: str | None = None):
        self._path, self._separator = path, separator.encode() if separator else None
        hashes, places = array("q"), array("q")
        self._lines = b""
        if path.is_file():
            try:
                with open(path, "rb") as file:
                    if path.stat().st_size:
                        self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                    place = 0
                    for line in file:
                        fields = self._fields(line if place else line.removeprefix(b"\xef\xbb\xbf"))
                        if fields:
                            hashes.append(hash(fields[0]))
                            places.append(place)
                        place += len(line)
            except OSError as error:
                raise CorpusError(f"{path} cannot be read ({error.strerror})") from error
        hashes, self._places = np.array(hashes, np.int64), np.array(places, np.int64)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        self._asked = np.zeros(len(hashes), bool)

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> str | None:
        """What the line of this key says after it, without white space around; None where there is no such line."""
        wanted = key.encode()
        value = hash(wanted)
        first = int(np.searchsorted(self._hashes, value))
        found = None
        while first < len(self._hashes) and self._hashes[first] == value:
            number = self._order[first]
            fields = self._line(self._places[number])
            if fields[0] == wanted:
                found = fields
                self._asked[number] = True
            first += 1
        return None if found is None else self._text(found[1] if len(found) > 1 else b"")

    def items(self) -> Iterator[tuple[str, str]]:
        """(key, what is said after it), line by line."""
        for place in self._places:
            key, *rest = self._line(place)
            yield self._text(key), self._text(rest[0] if rest else b"")

    def unasked(self) -> Iterator[str]:
        """The keys of lines that nobody asked for, in their order."""
        for number in np.flatnonzero(~self._asked):
            yield self._text(self._line(self._places[number])[0])

    def _line(self, place: int) -> list[bytes]:
        place = int(place)
        end = self._lines.find(b"\n", place)
        line = self._lines[place : end if end >= 0 else len(self._lines)]
        return self._fields(line if place else line.removeprefix(b"\xef\xbb\xbf"))

    def _fields(self, line: bytes) -> list[bytes]:
        if not line.strip():
            return []
        return line.split(self._separator, 1) if self._separator else line.split(maxsplit=1)

    def _text(self, field: bytes) -> str:
        try:
            return field.decode().strip()
        except UnicodeDecodeError as error:
            raise CorpusError(f"{self._path} is not UTF-8: {error}") from error
