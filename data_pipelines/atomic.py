"""Files that are either whole or absent, whatever happens while they are written."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_PREFIX = ".partial-"  # what a killed run leaves behind starts with this, and may be deleted


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path in the same folder to write to, and renames it to `path` when the block ends well.

    The bytes reach the disk before the name does (fsync), so that a crash never leaves a short file under the final
    name. When the block raises, the temporary file is deleted and `path` is left as it was.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:  # a failed write, unlike a failed open, does not say which file it was
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def delete_leftovers(folder: str | Path) -> int:
    """Deletes what killed writers left in the folder; returns how many files that were."""
    leftovers = list(Path(folder).glob(f"{TEMPORARY_PREFIX}*"))
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return len(leftovers)
