"""The files below a folder: through links, in the same order every time, and an error where a folder cannot be listed.

`os.walk` and `Path.glob` pass over a folder that they may not list without a word, and `**` over links to folders: a
language on another disk would be missing, and nobody told.
"""

import errno
import fnmatch
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# Of errors, those that a file has no part in: its disk or network is away, or this process has too much open.
NOT_THE_FILES = frozenset(
    {errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH}
    | {errno.ENODEV, errno.ENXIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)


class CannotList(OSError):
    """A folder that cannot be listed: which one, and why. `errno` is the file system's."""

    def __str__(self) -> str:
        return f"{self.filename} {self.strerror}"


class Inside(NamedTuple):
    """A `folder`, and the names of the visible `folders` and `files` that lie in it, sorted."""

    folder: Path
    folders: list[str]
    files: list[str]


def walk(folder: str | Path) -> Iterator[Inside]:
    """`folder` and all visible folders below it, each before those in it; nothing where there is no such folder.

    Links are followed, but never into a folder that was visited before. Raises CannotList.
    """
    if not Path(folder).is_dir():
        return
    visited = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Inside(Path(parent), folders, sorted(name for name in files if not name.startswith(".")))


def files_below(folder: str | Path) -> Iterator[Path]:
    """All visible files below `folder`, as `walk` finds them. Raises CannotList."""
    for inside in walk(folder):
        yield from (inside.folder / name for name in inside.files)


def matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path are those of a glob pattern, in which "**" is any number of folders."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return matches(path, pattern[1:]) or bool(path and matches(path[1:], pattern))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and matches(path[1:], pattern[1:])


def _refuse(error: OSError) -> None:
    reason = f"cannot be listed ({error.strerror}): mend that, or what lies in it would be left out without a word"
    raise CannotList(error.errno, reason, error.filename) from error
