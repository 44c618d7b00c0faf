"""A folder of audio with a tab-separated table, or without one as <language>/<corpus>/**.

The table has a header line. Columns `path` (relative to the folder, or absolute and in it) and `language` are needed;
`source` (or `corpus`), `speaker`, `split`, `id`, `text`, `licence` and `n_samples` are used where they are there, any
other column is ignored.
Quotes mean nothing: a field ends at a tab, a row at the end of the line.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipelines.audio import AUDIO_SUFFIXES, UNDECODED_SUFFIXES
from data_pipelines.corpora import CorpusError, Listing
from data_pipelines.corpora.collector import audio_below
from data_pipelines.corpora.listing import Lister, existing_folder, inside
from data_pipelines.languages import UnknownLanguage, normalise

TABLE_NAME = "manifest.tsv"
LAYOUT = "<language>/<corpus>/"  # of a folder without a table
NEEDED = ("path", "language")


def read(folder: str | Path, *, table: str | Path | None = None) -> Listing:
    """Lists the clips of a folder in the order of the table, without decoding any.

    `table` is looked for in the folder, then as given; None takes the folder's manifest.tsv if it has one, else walks
    <language>/<corpus>/**. Without a split, sentences are dealt out 80/10/10 by a hash of (language, text or else id),
    so that a sentence never sits in two splits. Rows that cannot be used (another number of fields than the header, a
    path outside of the folder or of no file, no language or one that ISO 639 does not know, a repeated id, a bad split
    or length) come back as rejected, and so do stray files that lie higher up than a corpus folder, and recordings that
    are not decoded here (.m4a, .webm).

    Raises CorpusError: no folder, no table, no such column, not UTF-8, nothing listed, or languages that ISO 639 does
    not know in more than half of the rows (that is not a slip, but another kind of name, or another column).
    """
    folder = existing_folder(folder)
    path = None
    if table is not None or (folder / TABLE_NAME).is_file():
        path = folder / (table or TABLE_NAME)
        if not path.is_file():
            path = Path(table)
        if not path.is_file():
            raise CorpusError(f"table {table} does not exist, neither in {folder} nor as given")
    total = _check_languages(folder, path)  # before millions of files are looked up
    if not total:
        nothing = f"{folder} has neither {TABLE_NAME} nor audio files under {LAYOUT}"
        raise CorpusError(nothing if path is None else f"{path} lists no clips")
    lister = Lister(folder, total=total)
    for number, row, problem in _rows(folder, path):
        declared = row.get("n_samples", "")
        if not problem and declared and not re.fullmatch("[0-9]{1,15}", declared):
            problem = f"n_samples is {declared!r}, not a number"
        if problem:
            lister.reject(row.get("path", ""), number, problem)
            continue
        lister.add(
            inside(folder, row["path"]),
            row=number,
            language=row["language"],
            id=row.get("id", ""),
            corpus=row.get("source") or row.get("corpus") or "",
            speaker=row.get("speaker", ""),
            split=row.get("split", ""),
            text=row.get("text", ""),
            licence=row.get("licence", ""),
            samples=int(declared) if declared else None,
        )
    return lister.listing(source=path or folder)


class _Row(NamedTuple):
    """A row as the table has it or would have it, its number, and why it is none ("": it is one)."""

    number: int
    row: dict[str, str]
    problem: str = ""


def _rows(folder: Path, table: Path | None) -> Iterator[_Row]:
    return _walk(folder) if table is None else _table(table)


def _table(path: Path) -> Iterator[_Row]:
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as lines:
            header = lines.readline().rstrip("\r\n").split("\t")
            for column in NEEDED:
                if column not in header:
                    raise CorpusError(f"{path} has no column {column!r}; its header is: {', '.join(header) or 'empty'}")
            for number, line in enumerate(lines, start=2):
                line = line.rstrip("\r\n")
                if not line:
                    continue
                fields = line.split("\t")
                row = dict(zip(header, fields, strict=False))
                problem = ""
                if len(fields) != len(header):
                    problem = f"another number of fields: {len(fields)}, the header has {len(header)}"
                yield _Row(number, row, problem)
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8: {error}") from error


def _walk(folder: Path) -> Iterator[_Row]:
    for number, place in enumerate(audio_below(folder, suffixes=AUDIO_SUFFIXES | UNDECODED_SUFFIXES), start=1):
        path = place.relative_to(folder).as_posix()
        parts = path.split("/")
        if place.suffix.lower() in UNDECODED_SUFFIXES:
            yield _Row(
                number, {"path": path}, f"{place.suffix} is not decoded here: convert it (ffmpeg -i FILE out.flac)"
            )
        elif len(parts) > 2:
            yield _Row(number, {"path": path, "language": parts[0], "source": parts[1]})
        else:
            where = "at the top" if len(parts) == 1 else f"in {parts[0]}/ itself"
            reason = f"not under {LAYOUT}: lies {where}; move it to {LAYOUT}, or list it in {TABLE_NAME}"
            yield _Row(number, {"path": path}, reason)


def _check_languages(folder: Path, table: Path | None) -> int:
    """How many rows there are.

    Raises CorpusError if more than half of them have a language that nobody knows, naming the first row, or file, of
    each.
    """
    known: set[str] = set()
    problems: dict[str, str] = {}
    total = rows = wrong = 0
    for number, row, problem in _rows(folder, table):
        total += 1
        if problem:
            continue
        rows += 1
        given = row["language"]
        if given not in known and given not in problems:
            try:
                normalise(given)
                known.add(given)
            except UnknownLanguage as error:
                place = f"{table} row {number}" if table else f"{folder / row['path']} (expected under {LAYOUT})"
                problems[given] = f"{place}: {error}"
        wrong += given in problems
    if 2 * wrong > rows:
        named = "; ".join([*list(problems.values())[:5], *(["..."] if len(problems) > 5 else [])])
        raise CorpusError(f"{wrong} of {rows} clips have no language that is known: {named}")
    return total
