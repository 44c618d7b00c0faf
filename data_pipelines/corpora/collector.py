"""What the readers of named corpora share beside `listing`: finding files, reading tables, clips by their paths."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipelines.audio import AUDIO_SUFFIXES
from data_pipelines.corpora import CorpusError, Listing
from data_pipelines.corpora.listing import Lister
from data_pipelines.folders import files_below
from data_pipelines.languages import UnknownLanguage, normalise
from data_pipelines.manifest import Split


class Span(NamedTuple):
    """A stretch of a recording, in seconds; an `end` of None is its end."""

    start: float = 0.0
    end: float | None = None


class Collector:
    """A `Lister` for corpora whose layout says all: clips by their paths, of one `corpus` with one `licence`.

    What cannot be used is rejected with a reason, never raised. Rows are numbered in the order in which they come. A
    clip's id is its path, with "#" and a number for the second and further stretches of one file.
    """

    def __init__(self, folder: str | Path, *, corpus: str, licence: str = ""):
        self._lister = Lister(folder, corpus=corpus, licence=licence)
        self.folder = self._lister.folder
        self._pieces: dict[str, int] = {}  # path -> stretches so far

    def take(
        self,
        path: Path,
        *,
        language: str,
        split: Split,
        speaker: str = "",
        text: str = "",
        samples: int | None = None,
        span: Span | None = None,
        corpus: str = "",
    ) -> None:
        """Adds the clip at `path` (in `folder`), or rejects it: no such file, not a UTF-8 name, listed before.

        `language` is an ISO 639-3 code (see `language_of`). `samples` as in `Clip`. With a `span`, one file
        may give several clips. `corpus` where it is not that of the whole collection.
        """
        name = self._name(path)
        piece = 0
        if span is not None:
            piece = self._pieces.get(name, 0)
            self._pieces[name] = piece + 1
        start, end = span or Span()
        self._lister.add(
            name,
            id=f"{name}#{piece}" if piece else name,
            row=len(self._lister) + 1,
            language=language,
            corpus=corpus,
            speaker=speaker,
            split=split,
            text=one_line(text),
            samples=samples,
            start=start,
            end=end,
        )

    def reject(self, path: Path, reason: str) -> None:
        """Notes what was left out, and why."""
        self._lister.reject(self._name(path), len(self._lister) + 1, reason)

    def language_of(self, given: str, *, where: Path) -> str:
        """ISO 639-3. Raises CorpusError naming the folder or file that says so."""
        try:
            return normalise(given)
        except UnknownLanguage as error:
            raise CorpusError(
                f"{where}: {error}; rename the folder, or give `language` where the reader takes one"
            ) from error

    def listing(self, layout: str) -> Listing:
        """All of it. Raises CorpusError if there is nothing at all: `layout` is what was expected."""
        if not len(self._lister):
            raise wrong_layout(self.folder, layout)
        return self._lister.listing(source=self.folder)

    def _name(self, path: Path) -> str:
        return Path(os.path.relpath(path, self.folder)).as_posix()


def wrong_layout(folder: Path, layout: str) -> CorpusError:
    """The error for a folder that is not what a reader reads: what was expected, and what is there."""
    found = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    shown = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
    return CorpusError(f"{folder} is not laid out as {layout}; it holds {shown or 'nothing'}")


def folders_in(folder: Path) -> list[Path]:
    """The visible folders in `folder`, sorted by name; none where it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def audio_below(folder: Path, *, suffixes: Iterable[str] = AUDIO_SUFFIXES) -> Iterator[Path]:
    """Visible files below `folder` whose suffix, in lower case, is one of `suffixes`; the same order every time."""
    wanted = frozenset(suffixes)
    for path in files_below(folder):
        if path.suffix.lower() in wanted:
            yield path


def lines_of(path: Path, *, otherwise: str | None = None) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of a text file in UTF-8, empty lines left out.

    A line ends at "\\n" only: transcripts hold other separators of Unicode. With `otherwise`, a file that is not UTF-8
    is read in that encoding; without, it raises CorpusError, as does a file that cannot be read.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as lines:
            if otherwise is not None:
                lines = list(lines)
            yield from _full(lines)
    except UnicodeDecodeError as error:
        if otherwise is None:
            raise CorpusError(f"{path} is not UTF-8: {error}") from error
        with open(path, encoding=otherwise, errors="replace", newline="\n") as lines:
            yield from _full(lines)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror})") from error


def _full(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r\n")
        if line.strip():
            yield number, line


def table_of(path: Path, *, needed: Iterable[str]) -> Iterator[tuple[int, dict[str, str] | None]]:
    """(line, row by column name) of a tab-separated table with a header; None for a row of another number of fields.

    Quotes mean nothing. Columns come and go between releases: only the `needed` ones are asked for.

    Raises CorpusError: not UTF-8, no header, a needed column is missing.
    """
    lines = lines_of(path)
    header = next(lines, (0, ""))[1].split("\t")
    for column in needed:
        if column not in header:
            raise CorpusError(f"{path} has no column {column!r}; its header is: {', '.join(header) or 'empty'}")
    for number, line in lines:
        fields = line.split("\t")
        if len(fields) == len(header) - 1:  # a last column that is empty, whose tab an editor took away
            fields.append("")
        yield number, dict(zip(header, fields, strict=True)) if len(fields) == len(header) else None


def one_line(text: str) -> str:
    """`text` with each run of white space as one space."""
    return " ".join(text.split())
