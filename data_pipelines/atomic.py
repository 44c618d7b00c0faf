"""Files and folders that are either whole or absent, whatever happens while they are written.

Each is written to a temporary beside it, which gets the final name when it is whole. The temporary's own name says
which process of which machine is at it, so that what a killed process left can be told from what another still writes;
the next one that writes to the folder deletes it.
"""

import contextlib
import errno
import functools
import os
import platform
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_PREFIX = ".partial-"
_TEMPORARY = re.compile(re.escape(TEMPORARY_PREFIX) + r"(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}-.+")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_KNOWN = (*_FULL, errno.EFBIG, errno.EROFS, errno.EACCES)  # looked for in messages of libraries that give no number


class CannotWrite(OSError):
    """A file that could not be written: which one, why, and what to do. `errno` is the file system's."""

    def __str__(self) -> str:
        return f"{self.filename} {self.strerror}"


def cannot_write(error: Exception, path: str | Path) -> CannotWrite:
    """The error as one of `path`: a failed write, unlike a failed open, does not say which file it was.

    Libraries written in C++ report a full disk as some RuntimeError; the reason is then looked for in its words.
    """
    if isinstance(error, CannotWrite):
        return error
    if isinstance(error, OSError) and error.errno:
        number, reason = error.errno, error.strerror
    else:
        words = " ".join(str(error).split())
        number = next((n for n in _KNOWN if os.strerror(n) in words), errno.EIO)
        reason = words if number == errno.EIO else os.strerror(number)
    mend = "free some space" if number in _FULL else "mend that"
    return CannotWrite(number, f"cannot be written ({reason}): {mend}, then run the same command again", str(path))


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path in the same folder to write to, and renames it to `path` when the block ends well.

    The bytes reach the disk before the name does, and the name before the block is left (fsync), so that a crash never
    leaves a short file under the final name, nor takes back what was written. When the block raises, the temporary file
    is deleted and `path` is left as it was. Raises CannotWrite naming `path`.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with _named(temporary, path):
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """The same for a folder: gives an empty one beside `path`, which gets its name when the block ends well.

    Raises FileExistsError if something lies at `path` by then, CannotWrite naming `path` if a file in it cannot be
    written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with _named(temporary, path):
            temporary.mkdir()
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    _sync(Path(folder) / name)
                _sync_folder(Path(folder))
            try:
                os.rename(temporary, path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                raise FileExistsError(errno.EEXIST, "exists by now, and is left as it is", str(path)) from error
            _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def delete_leftovers(folder: str | Path, *, everyones: bool = False) -> int:
    """Deletes temporaries in `folder` whose writers are dead; returns how many that were.

    Of other machines' writers nobody here can say whether they live, so theirs stay, unless `everyones`: for a folder
    that the caller alone may write to.
    """
    deleted = 0
    for name in os.listdir(folder):
        writer = _TEMPORARY.fullmatch(name)
        dead = writer and writer["machine"] == _machine() and not _alive(int(writer["pid"]))
        if not (dead or (everyones and name.startswith(TEMPORARY_PREFIX))):
            continue
        path = Path(folder) / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        deleted += 1
    return deleted


def _temporary(path: Path) -> Path:
    """A name beside `path` that nobody else takes, once what dead writers left in its folder is gone."""
    with contextlib.suppress(OSError):  # no such folder, or not ours to clean: writing will say so, or will not mind
        delete_leftovers(path.parent)
    return path.with_name(f"{TEMPORARY_PREFIX}{_machine()}-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


@functools.cache
def _machine() -> str:
    """The same 8 hex digits for processes that see each other's numbers: the host, and the container in it."""
    try:
        container = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        container = ""
    return f"{zlib.crc32(f'{platform.node()} {container}'.encode()):08x}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's; a number that no process has, so no name of ours
        return True
    return True


@contextlib.contextmanager
def _named(temporary: Path, path: Path) -> Iterator[None]:
    """Errors of writing become those of `path`; what the block has to say of other files stays."""
    try:
        yield
    except OSError as error:
        where = error.filename
        own = where is None or (not isinstance(where, int) and Path(os.fsdecode(where)).is_relative_to(temporary))
        if own and not isinstance(error, CannotWrite):
            raise cannot_write(error, path) from error
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can; then the name follows when it likes
        _sync(path)
