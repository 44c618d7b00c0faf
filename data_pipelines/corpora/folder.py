"""A folder of audio with a tab-separated table, or without one as <language>/<corpus>/**.

The table has a header line. Columns `path` (relative to the folder) and `language` are needed; `source` (or `corpus`),
`speaker`, `split`, `id`, `text`, `licence` and `n_samples` are used where they are there, any other column is ignored.
Quotes mean nothing: a field ends at a tab, a row at the end of the line.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from data_pipelines.audio import AUDIO_SUFFIXES
from data_pipelines.corpora import Clip, CorpusError, Listing, Rejected
from data_pipelines.corpora.listing import Unusable, clip_bar, file_in, split_of
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
    or length) come back as rejected, and so do stray files that lie higher up than a corpus folder.

    Raises CorpusError: no folder, no table, no such column, not UTF-8, nothing listed, or languages that ISO 639 does
    not know in more than half of the rows (that is not a slip, but another kind of name, or another column).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CorpusError(f"corpus folder {folder} does not exist")
    path = None
    if table is None and not (folder / TABLE_NAME).is_file():
        rows, rejected = _walk(folder)
        if not rows and not rejected:
            raise CorpusError(f"{folder} has neither {TABLE_NAME} nor audio files under {LAYOUT}")
    else:
        path = folder / (table or TABLE_NAME)
        if not path.is_file():
            path = Path(table)
        if not path.is_file():
            raise CorpusError(f"table {table} does not exist, neither in {folder} nor as given")
        rows, rejected = _rows(path)
        if not rows and not rejected:
            raise CorpusError(f"{path} lists no clips")
    codes = _languages(rows, folder, path)
    clips, seen = [], {}
    with clip_bar(folder, total=len(rows)) as bar:
        for number, row in rows:
            bar.update()
            try:
                clip = _clip(folder, number, row, codes)
                if clip.id in seen:
                    raise Unusable(f"id {clip.id!r} was already given in row {seen[clip.id]}")
            except Unusable as error:
                rejected.append(Rejected(row["path"], number, str(error)))
                continue
            seen[clip.id] = number
            clips.append(clip)
    return Listing(clips, rejected)


class _Listed(NamedTuple):
    """`rows` with their numbers, as the table has them or would have them, and what is no row, `rejected`."""

    rows: list[tuple[int, dict[str, str]]]
    rejected: list[Rejected]


def _rows(path: Path) -> _Listed:
    listed = _Listed([], [])
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
                if len(fields) != len(header):
                    reason = f"another number of fields: {len(fields)}, the header has {len(header)}"
                    listed.rejected.append(Rejected(row.get("path", ""), number, reason))
                else:
                    listed.rows.append((number, row))
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8: {error}") from error
    return listed


def _walk(folder: Path) -> _Listed:
    paths, visited = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in visited:  # a link that leads back up
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(parent).relative_to(folder)
        paths += [
            (inside / name).as_posix()
            for name in files
            if Path(name).suffix.lower() in AUDIO_SUFFIXES and name[0] != "."
        ]
    walked = _Listed([], [])
    for number, path in enumerate(sorted(paths), start=1):
        parts = path.split("/")
        if len(parts) > 2:
            walked.rows.append((number, {"path": path, "language": parts[0], "source": parts[1]}))
        else:
            where = "at the top" if len(parts) == 1 else f"in {parts[0]}/ itself"
            reason = f"not under {LAYOUT}: lies {where}; move it to {LAYOUT}, or list it in {TABLE_NAME}"
            walked.rejected.append(Rejected(path, number, reason))
    return walked


def _languages(
    rows: list[tuple[int, dict[str, str]]], folder: Path, table: Path | None
) -> dict[str, str | UnknownLanguage]:
    """Language as given -> ISO 639-3, or what is wrong with it.

    Raises CorpusError if that is so for more than half of the rows, naming the first row, or file, of each.
    """
    codes: dict[str, str | UnknownLanguage] = {}
    problems, wrong = {}, 0
    for number, row in rows:
        given = row["language"]
        if given not in codes:
            try:
                codes[given] = normalise(given)
            except UnknownLanguage as error:
                codes[given] = error
                place = f"{table} row {number}" if table else f"{folder / row['path']} (expected under {LAYOUT})"
                problems[given] = f"{place}: {error}"
        wrong += given in problems
    if 2 * wrong > len(rows):
        named = "; ".join([*list(problems.values())[:5], *(["..."] if len(problems) > 5 else [])])
        raise CorpusError(f"{wrong} of {len(rows)} clips have no language that is known: {named}")
    return codes


def _clip(folder: Path, number: int, row: dict[str, str], codes: dict[str, str | UnknownLanguage]) -> Clip:
    path, size = file_in(folder, row["path"])
    language, text = codes[row["language"]], row.get("text", "")
    if isinstance(language, UnknownLanguage):
        raise Unusable(str(language) if row["language"].strip() else "no language")
    name = row.get("id") or path
    declared = row.get("n_samples", "")
    if declared and not re.fullmatch("[0-9]{1,15}", declared):
        raise Unusable(f"n_samples is {declared!r}, not a number")
    return Clip(
        id=name,
        path=path,
        language=language,
        corpus=row.get("source") or row.get("corpus") or folder.resolve().name,
        speaker=row.get("speaker", ""),
        split=split_of(row.get("split", ""), language=language, sentence=text or name),
        text=text,
        licence=row.get("licence", ""),
        samples=int(declared) if declared else None,
        row=number,
        size=size,
    )
