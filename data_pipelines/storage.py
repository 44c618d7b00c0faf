"""The one door to object storage: a prepared corpus, or a store of units, that lies at a gs:// or s3:// address.

What is mapped into memory (the manifest, units) has to be a local file: it is fetched once to a cache folder and
fetched again when the size or the time of the original changes. Shards are read where they lie if ArrayRecord can (it
has a client for gs://, none for s3://), else they are fetched, too. `file://` goes the same way as s3://.

What is written, and a raw corpus, are files of this machine, on its own disk or a mounted one: `local` refuses an
address there, which as a path would be a folder called "gs:".

pyarrow's file systems list and fetch (both clients are inside its wheels): credentials and regions are found as in
Google's and Amazon's own tools. The cache is $SPEECH_CACHE, or ~/.cache/speech-corpora.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.fs
from tqdm import tqdm

from data_pipelines.atomic import whole_file

SCHEMES = ("gs", "s3", "file")
GIVE_UP_SECONDS = 60  # of trying to reach a gs:// address; its client would try for a quarter of an hour
READ_IN_PLACE = ("gs",)  # array_record 0.8.6 opens these itself
ORIGIN_NAME = "origin.json"  # in a cache folder: its address, and size and time of what was fetched
FETCHERS = 8  # files fetched at once
_OF_URIS = "/:@?&=+,;%~!$'()*[]"  # what has a meaning there; spaces and letters beyond ASCII are written otherwise
_ADDRESS = re.compile(rf"({'|'.join(SCHEMES)}):/+(.+)")  # one slash is enough: pathlib makes gs:/b/c of gs://b/c


class StorageError(ValueError):
    """A remote file that is missing, cut or out of reach; the message has its address and what to do."""


class Address(NamedTuple):
    """Where a folder lies: `scheme` "gs", "s3" or "file", and `path`, bucket first (for "file" from the root on)."""

    scheme: str
    path: str

    def __str__(self) -> str:
        return f"{self.scheme}://{'/' if self.scheme == 'file' else ''}{self.path}"


def address_of(path: str | Path) -> Address | None:
    """The address that `path` spells, or None for a local path. Raises StorageError for a scheme of neither kind."""
    spelled = os.fspath(path)
    match = _ADDRESS.fullmatch(spelled)
    if match:
        return Address(match[1], match[2].rstrip("/"))
    if re.match(r"[a-z][a-z0-9+]+:/", spelled):
        raise StorageError(f"{spelled}: addresses of {', '.join(SCHEMES)} are read; mount others as a folder")
    return None


def local(path: str | Path, *, what: str) -> Path:
    """`path`, if it is none of an object storage; `what` lies there. Raises StorageError for an address."""
    address = address_of(path)
    if address is not None:
        raise StorageError(
            f"{address}: {what} must be local, or on a mounted disk or bucket; only what was prepared is read from an "
            "address, after it was copied there with the provider's tool (manifest.arrow last)"
        )
    return Path(path)


def local_folder(path: str | Path, *, names: Sequence[str]) -> Path:
    """A local folder with the files `names` of the folder at `path`: itself where it is local, else one of the cache.

    Raises StorageError naming the address that could not be read.
    """
    address = address_of(path)
    if address is None:
        return Path(path)
    folder = cache_folder(address)
    folder.mkdir(parents=True, exist_ok=True)
    noted = _noted(folder)
    for name, info in zip(names, _infos(address, names), strict=True):
        mark = [info.size, info.mtime_ns]
        if noted.get("files", {}).get(name) != mark or not _has(folder / name, info.size):
            _fetch(address, name, folder / name, info.size)
        noted = {"address": str(address), "files": {**noted.get("files", {}), name: mark}}
    with whole_file(folder / ORIGIN_NAME) as temporary:
        temporary.write_text(json.dumps(noted, indent=1))
    return folder


def cache_folder(address: Address) -> Path:
    """Where copies of the files at `address` are kept."""
    cache = Path(os.environ.get("SPEECH_CACHE") or Path.home() / ".cache" / "speech-corpora")
    return cache / f"{Path(address.path).name}-{hashlib.sha256(str(address).encode()).hexdigest()[:12]}"


def origin_of(folder: Path) -> Address | None:
    """The address that a folder of the cache was fetched from; None for any other folder."""
    found = _noted(folder).get("address")
    return None if found is None else address_of(found)


def place(folder: Path, name: str) -> str:
    """How a person would name the file: by its address if the folder is a copy, else by its path."""
    origin = origin_of(folder)
    return str(folder / name) if origin is None else f"{origin}/{name}"


def check_sizes(folder: Path, names: Sequence[str], sizes: Sequence[int]) -> None:
    """Compares the sizes of remote files with `sizes` in bytes. Raises StorageError naming the first that differs."""
    origin = origin_of(folder)
    for name, info, size in zip(names, _infos(origin, names), sizes, strict=True):
        if info.size != size:
            raise StorageError(
                f"{origin}/{name} has {info.size} bytes, {size} expected: cut or replaced; copy it again"
            )


def readable_shards(folder: Path, names: Sequence[str], sizes: Sequence[int]) -> list[str]:
    """Paths of the shards `names` with `sizes` in bytes that ArrayRecord can open; fetches what has to be local, once
    for all processes that share the cache.

    Raises StorageError: a shard that cannot be fetched, or has another size; no space in the cache.
    """
    origin = origin_of(folder)
    if origin is None:
        return [str(folder / name) for name in names]
    if origin.scheme in READ_IN_PLACE:
        return [f"{origin}/{name}" for name in names]
    wanted = dict(zip(names, sizes, strict=True))
    if _missing(folder, wanted):
        with _alone(folder):
            _fetch_all(origin, folder, _missing(folder, wanted))
    return [str(folder / name) for name in names]


def _missing(folder: Path, sizes: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if not _has(folder / name, size)}


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one process of several that share the cache fetch, while the others wait for it (where there are locks)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _fetch_all(origin: Address, folder: Path, missing: Mapping[str, int]) -> None:
    """Fetches files of these sizes. Raises StorageError: no space for them, one that cannot be fetched."""
    total, free = sum(missing.values()), shutil.disk_usage(folder).free
    if total > free:
        raise StorageError(
            f"{origin} needs {total / 1e9:.1f} GB more in {folder}, where {free / 1e9:.1f} GB are free: free some, or "
            "put the cache elsewhere with SPEECH_CACHE"
        )
    with concurrent.futures.ThreadPoolExecutor(FETCHERS) as pool:
        fetching = [pool.submit(_fetch, origin, name, folder / name, size) for name, size in missing.items()]
        try:
            with tqdm(total=total, unit="B", unit_scale=True, disable=not missing, mininterval=0.5) as bar:
                for done in concurrent.futures.as_completed(fetching):
                    bar.update(done.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _fetch(address: Address, name: str, to: Path, size: int) -> int:
    """Copies one file, whole or not at all; returns `size`. Tried again once."""
    to.parent.mkdir(parents=True, exist_ok=True)
    for last in (False, True):
        try:
            with whole_file(to) as temporary:
                with _file_system(address).open_input_stream(f"{_root(address)}/{name}") as source:
                    with open(temporary, "wb") as sink:
                        shutil.copyfileobj(source, sink, 1 << 22)
                found = temporary.stat().st_size
                if found != size:
                    raise StorageError(f"{address}/{name} gave {found} of {size} bytes: copy it there again")
            return size
        except (OSError, pa.ArrowException) as error:
            if last:
                raise StorageError(f"{address}/{name} cannot be fetched, tried twice ({error})") from error
    raise AssertionError


def _infos(address: Address, names: Sequence[str]) -> list[pa.fs.FileInfo]:
    """Size and time of each file. Raises StorageError for one that is not there, or a storage out of reach."""
    try:
        infos = _file_system(address).get_file_info([f"{_root(address)}/{name}" for name in names])
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"{address} cannot be reached ({error}): are address and credentials right, and the network up?"
        ) from error
    for name, info in zip(names, infos, strict=True):
        if info.type is not pa.fs.FileType.File:
            raise StorageError(f"{address}/{name} does not exist: copy the whole prepared folder there, manifest last")
    return infos


def _file_system(address: Address) -> pa.fs.FileSystem:
    return _opened(address)[0]


def _root(address: Address) -> str:
    return _opened(address)[1]


def _opened(address: Address) -> tuple[pa.fs.FileSystem, str]:
    """Its file system, and the folder's path there. What follows a "?" are pyarrow's options (endpoint_override)."""
    uri = urllib.parse.quote(str(address), safe=_OF_URIS)
    if address.scheme == "gs":
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={GIVE_UP_SECONDS}"
    try:
        return pa.fs.FileSystem.from_uri(uri)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"{address} cannot be opened ({error})") from error


def _noted(folder: Path) -> dict:
    try:
        return json.loads((folder / ORIGIN_NAME).read_text())
    except (OSError, ValueError):
        return {}


def _has(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False
