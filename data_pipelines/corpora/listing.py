"""What the readers of corpora share: paths that stay inside the folder, languages, splits, ids that are given once."""

import contextlib
import contextvars
import hashlib
import os
import posixpath
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_pipelines.corpora import Clip, CorpusError, Listing, Rejected
from data_pipelines.corpora.clips import ClipWriter
from data_pipelines.folders import NOT_THE_FILES, files_below, matches
from data_pipelines.languages import UnknownLanguage, normalise
from data_pipelines.manifest import Split
from data_pipelines.unique import repetitions

SPLITS = {
    **{name: Split.TRAIN for name in ("train", "training")},
    **{name: Split.DEV for name in ("dev", "valid", "validation", "val")},
    **{name: Split.TEST for name in ("test", "eval")},
}
TRAIN_SHARE, DEV_SHARE = 80, 10  # percent, where the source has no split
BAR_AFTER = 5.0  # seconds of listing, after which it is worth a bar
_progress = contextvars.ContextVar("progress", default=False)
_scratch = contextvars.ContextVar("scratch", default=None)


class Unusable(Exception):
    """Why one row is left out."""


class File(NamedTuple):
    """A file of a corpus: its `path` relative to the folder, with "/", its `size` in bytes, and when it was last
    `modified`, in nanoseconds since 1970."""

    path: str
    size: int
    modified: int


def file_in(folder: str | Path, given: str) -> File:
    """The file at `given`, relative to `folder`. Raises Unusable: no path, outside of the folder, no file.

    Raises CorpusError where the disk does not answer.
    """
    path = posixpath.normpath(given) if given else ""
    if not path or path == "." or "\0" in path:
        raise Unusable("no path")
    if posixpath.isabs(path) or path.split("/")[0] == "..":
        raise Unusable("the path leads out of the corpus folder")
    try:
        path.encode()
        status = os.stat(os.path.join(folder, path))
    except UnicodeEncodeError as error:
        raise Unusable("the file's name is not UTF-8: rename it") from error
    except OSError as error:
        if error.errno in NOT_THE_FILES:
            raise CorpusError(
                f"{Path(folder, path)} cannot be looked at ({error.strerror}): is its disk there?"
            ) from error
        raise Unusable(f"no such file ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise Unusable("not a file")
    return File(path, status.st_size, status.st_mtime_ns)


def inside(folder: str | Path, path: str) -> str:
    """An absolute or relative `path` as one relative to `folder`, as far as it lies in it; else as it was given."""
    if not posixpath.isabs(path):
        return path
    relative = os.path.relpath(path, os.path.abspath(folder))
    return path if relative.split("/")[0] == ".." else relative


def dealt_split(language: str, sentence: str) -> Split:
    """80/10/10 by a hash of what must not sit in two splits: a sentence, or the recording that clips were cut from."""
    percent = int(hashlib.sha256(f"{language}\t{sentence}".encode()).hexdigest(), 16) % 100
    if percent < TRAIN_SHARE:
        return Split.TRAIN
    return Split.DEV if percent < TRAIN_SHARE + DEV_SHARE else Split.TEST


def split_of(name: str, *, language: str, sentence: str) -> Split:
    """The split of that `name`; where it is "", dealt out 80/10/10 by a hash of (language, sentence).

    Raises Unusable for a name that is none of `SPLITS`.
    """
    if name:
        if name.lower() not in SPLITS:
            raise Unusable(f"split is {name!r}; known: {', '.join(SPLITS)}")
        return SPLITS[name.lower()]
    return dealt_split(language, sentence)


def split_in(path: str) -> str:
    """The split that a path's own name or, failing that, the folders above it speak of ("train-00001.tar"), or ""."""
    for part in reversed(path.lower().split("/")):
        for word in re.split("[^a-z]+", part):
            if word in SPLITS:
                return word
    return ""


def folder_name(path: str, place: int | None) -> str:
    """Part number `place` (from 0) of a path's folders; "" if it has not so many, or where `place` is None."""
    folders = path.split("/")[:-1]
    return folders[place] if place is not None and place < len(folders) else ""


def lines_of(path: Path) -> Iterator[str]:
    """A text file's lines without their ends, empty ones too. Raises CorpusError: no such file, not UTF-8."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as lines:
            for line in lines:
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8: {error}") from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror})") from error


def existing_folder(folder: str | Path) -> Path:
    """The folder as a path. Raises CorpusError if there is none."""
    if not Path(folder).is_dir():
        raise CorpusError(f"corpus folder {folder} does not exist")
    return Path(folder)


def found(folder: Path, pattern: str, *, what: str) -> list[str]:
    """Paths of the files in `folder` that match the glob pattern, relative to it, sorted.

    "**" goes through links to folders, and past hidden ones. Raises CorpusError: none. Raises CannotList.
    """
    if "**" in pattern.split("/"):
        below = (path.relative_to(folder).as_posix() for path in files_below(folder))
        paths = sorted(path for path in below if matches(path.split("/"), pattern.split("/")))
    else:
        paths = sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern) if path.is_file())
    if not paths:
        raise CorpusError(f"{folder} has no {what} ({pattern})")
    return paths


@contextlib.contextmanager
def shown_progress(shown: bool) -> Iterator[None]:
    """Whether listings that take long show a bar, in this block."""
    before = _progress.set(shown)
    try:
        yield
    finally:
        _progress.reset(before)


@contextlib.contextmanager
def scratch_in(folder: str | Path) -> Iterator[None]:
    """In this block, columns of long listings lie in files without names in `folder`, not in memory."""
    before = _scratch.set(Path(folder))
    try:
        yield
    finally:
        _scratch.reset(before)


def clip_writer() -> ClipWriter:
    """Columns of clips, to be filled; where they lie says `scratch_in`."""
    return ClipWriter(_scratch.get())


def clip_bar(folder: Path, *, total: int | None = None) -> tqdm:
    """A bar that counts clips; it shows itself after `BAR_AFTER` seconds, to a log file twice a minute."""
    often = 0.5 if sys.stderr.isatty() else 30.0
    kept = {"leave": False, "disable": not _progress.get(), "delay": BAR_AFTER, "mininterval": often}
    return tqdm(total=total, desc=f"listing {folder.resolve().name}", unit=" clips", unit_scale=True, **kept)


class Lister:
    """Collects clips in their order; what cannot be used is rejected with its reason.

    `licence` is that of clips for which none is given; `total`, for the bar, how many clips there will be.
    """

    def __init__(self, folder: str | Path, *, corpus: str | None = None, licence: str = "", total: int | None = None):
        self.folder, self._licence = existing_folder(folder), licence
        self._corpus = corpus or self.folder.resolve().name
        self._clips = clip_writer()
        self._rejected: list[Rejected] = []
        self._codes: dict[str, str | UnknownLanguage] = {}
        self._unknown: dict[str, str] = {}  # language -> the first place that has it
        self._wrong = 0
        self._last: tuple[str, File] | None = None
        self._bar = clip_bar(self.folder, total=total)

    def __len__(self) -> int:
        return len(self._clips) + len(self._rejected)

    def reject(self, path: str, row: int, reason: str) -> None:
        """Leaves one clip out."""
        self._bar.update()
        self._rejected.append(Rejected(path, row, reason))

    def add(
        self,
        path: str,
        *,
        row: int,
        language: str,
        id: str = "",
        corpus: str = "",
        speaker: str = "",
        split: str | Split = "",
        text: str = "",
        licence: str = "",
        samples: int | None = None,
        size: int | None = None,
        member: str = "",
        start: float = 0.0,
        end: float | None = None,
    ) -> None:
        """Takes one clip in; fields are those of `Clip`, `language` and `split` as the source spells them
        (or a Split).

        The file must lie in the folder; its size is looked up where `size` is None. Without an id, the path is the id.
        """
        try:
            if self._last is None or self._last[0] != path:  # the members of one container come one after another
                self._last = (path, file_in(self.folder, path))
            path = self._last[1].path
            code = self._language(language, row)
            if not 0 <= start < (float("inf") if end is None else end):
                raise Unusable(f"the stretch from {start} to {end} s is none")
            id = id or path
            clip = Clip(
                id=id,
                path=path,
                language=code,
                corpus=corpus or self._corpus,
                speaker=speaker,
                split=split if isinstance(split, Split) else split_of(split, language=code, sentence=text or id),
                text=text,
                licence=licence or self._licence,
                samples=samples,
                row=row,
                size=self._last[1].size if size is None else size,
                member=member,
                start=start,
                end=end,
                modified=self._last[1].modified,
            )
            _check_text(clip)
        except Unusable as error:
            self.reject(path, row, str(error))
            return
        self._clips.add(clip)
        self._bar.update()

    def listing(self, *, source: str | Path) -> Listing:
        """What was collected, once; a clip whose id an earlier one has is rejected.

        Raises CorpusError naming `source`: nothing, or languages unknown in over half of it.
        """
        self._bar.close()
        if not len(self):
            raise CorpusError(f"{source} lists no clips")
        if 2 * self._wrong > len(self):
            first = [f"{place}: {self._codes[given]}" for given, place in list(self._unknown.items())[:5]]
            more = ["..."] if len(self._unknown) > 5 else []
            raise CorpusError(
                f"{self._wrong} of {len(self)} clips have no language that is known: {'; '.join(first + more)}"
            )
        clips = self._clips.clips()
        again = list(repetitions(clips.columns["id"]))
        if again:
            for clip, first in zip(
                clips.take(np.array([one.row for one in again])),
                clips.columns["row"][[one.first for one in again]].tolist(),
                strict=True,
            ):
                self._rejected.append(Rejected(clip.path, clip.row, f"id {clip.id!r} was already given in row {first}"))
            kept = np.ones(len(clips), bool)
            kept[[one.row for one in again]] = False
            writer = clip_writer()
            writer.extend(clips, np.flatnonzero(kept))
            clips = writer.clips()
        return Listing(clips, self._rejected)

    def _language(self, given: str, row: int) -> str:
        if given not in self._codes:
            try:
                self._codes[given] = normalise(given)
            except UnknownLanguage as error:
                self._codes[given] = error
                self._unknown[given] = f"row {row}"
        code = self._codes[given]
        if isinstance(code, UnknownLanguage):
            self._wrong += 1
            raise Unusable(str(code) if given.strip() else "no language")
        return code


def _check_text(clip: Clip) -> None:
    """Raises Unusable: a field holds half of a surrogate pair, as JSON can have it, which no file in UTF-8 can."""
    for name in ("id", "speaker", "text", "member", "licence", "corpus"):
        value = getattr(clip, name)
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise Unusable(f"{name} {value!r} is not valid Unicode: mend it in the source") from error


def one_of(folder: Path, given: str | Path | None, *, what: str) -> Path:
    """`given` relative to the folder, or else as it stands; the folder itself for None. Raises CorpusError: no such."""
    for path in (folder / (given or "."), Path(given or folder)):
        if path.exists():
            return path
    raise CorpusError(f"{what} {given} does not exist, neither in {folder} nor as given")


def needs_language(source: str | Path, ways: Iterable[str]) -> CorpusError:
    """The error of a corpus that does not say which language it is in; `ways` name the options that tell."""
    return CorpusError(f"{source} does not say which language it is: give {' or '.join(ways)}")
