"""PyTorch's files (`torch.save`: .pt, .pth, .bin), read and written without torch and without running what they say.

A checkpoint is a pickle, and a pickle is a program. Here only the few functions that rebuild tensors and plain
containers exist, and they are ours; every other class or function in the file becomes an inert stub that remembers its
name and arguments (fairseq's Namespace, omegaconf's nodes), or is refused (`torch_pickle`, `torch_names`).

The zip format (torch 1.6 and newer) holds `NAME/data.pkl` and one uncompressed entry a storage, `NAME/data/KEY`; the
older one is five pickles (magic number, protocol, system, object, keys of the storages) and then the storages, each an
int64 count and its elements (`torch/serialization.py` _save and _legacy_save).
"""

import io
import itertools
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_pipelines.atomic import whole_file
from wavlab_jax.convert.checkpoint import StoredTensor
from wavlab_jax.convert.names import ConvertError
from wavlab_jax.convert.torch_names import STORAGES, Name, Source, Storage, UnsafeFile, numpy_dtype
from wavlab_jax.convert.torch_pickle import read_pickle

__all__ = ["UnsafeFile", "read_torch_file", "write_torch_file"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: signature, lengths of name and extra field
_ALIGNMENT = 64  # of storages in the file, as torch.save does (mapped tensors want it)
_WRITTEN = {dtype: storage for storage, dtype in STORAGES.items() if storage != "UntypedStorage"}


class _Extent(NamedTuple):
    """Where bytes lie in a file."""

    start: int
    length: int


def read_torch_file(path: Path) -> Any:
    """The object in a file that `torch.save` wrote, in the zip or the older format.

    Dicts, lists, tuples, strings, numbers, booleans and None are themselves; tensors are `StoredTensor`, read when they
    are asked for, each by itself; argparse.Namespace, omegaconf's nodes and fairseq's classes become plain dicts, lists
    and values, NumPy scalars Python's numbers.

    Raises UnsafeFile (a class that no checkpoint needs, a structure that contradicts itself), ConvertError (not such
    a file, truncated, not local).
    """
    if "://" in str(path):
        raise ConvertError(f"{path} is not a local file; copy it here first")
    path = Path(path).absolute()
    try:
        with open(path, "rb") as file:
            head = file.read(512)
            if head.startswith(b"PK\x03\x04"):
                return _read_zip(path, file)
            if head.startswith(b"\x80"):
                return _read_legacy(path, file)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConvertError(f"{path} is not a file") from error
    if head[257:262] == b"ustar":
        raise ConvertError(f"{path} is a tar archive, torch's format before 0.1.10: load and save it with a newer one")
    if head.startswith(b"version https://git-lfs"):
        raise ConvertError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` where it came from")
    raise ConvertError(f"{path} is not a file that torch.save wrote: it starts with {head[:8]!r}")


def _source(path: Path, extents: dict[str, _Extent], *, big_endian: Callable[[], bool]) -> Source:
    def elements(storage: Storage, first: int, count: int) -> np.ndarray:
        dtype = numpy_dtype(storage.dtype, big_endian=big_endian())
        try:
            found = np.fromfile(path, dtype, count, offset=extents[storage.key].start + first * dtype.itemsize)
        except OSError as error:
            raise ConvertError(f"{path} cannot be read: {error}") from error
        if len(found) != count:
            raise ConvertError(f"{path} is truncated in storage {storage.key}; fetch it again")
        return found.astype(dtype.newbyteorder("="), copy=False)

    return Source(str(path), path.stat().st_size, elements)


def _storage(persistent: tuple, *, path: Path) -> Storage:
    """The storage that a persistent id means: ("storage", class, key, device, count[, None])."""
    if len(persistent) not in (5, 6) or persistent[0] != "storage" or persistent[5:] not in ((), (None,)):
        raise UnsafeFile(f"{path}: a reference that torch.save does not write")
    kind, key, count = persistent[1], persistent[2], persistent[4]
    dtype = STORAGES.get(kind.name) if isinstance(kind, Name) and kind.module == "torch" else None
    if dtype is None or not isinstance(key, str) or type(count) is not int or count < 0:
        raise UnsafeFile(f"{path}: a storage without a known class, key and count")
    return Storage(key, dtype, count)


def _read_zip(path: Path, file: BinaryIO) -> Any:
    entries = _zip_entries(path, file)
    roots = [name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise ConvertError(f"{path} is a zip archive, but without one NAME/data.pkl, so torch.save did not write it")
    root = roots[0]
    if f"{root}/constants.pkl" in entries:
        raise ConvertError(f"{path} is a TorchScript archive, which holds a program: save its state dict instead")

    def content(name: str) -> bytes:
        file.seek(entries[name].start)
        return file.read(entries[name].length)

    order = content(f"{root}/byteorder") if f"{root}/byteorder" in entries else b"little"
    prefix = f"{root}/data/"
    extents = {name.removeprefix(prefix): extent for name, extent in entries.items() if name.startswith(prefix)}

    def storage(persistent: tuple) -> Storage:
        found = _storage(persistent, path=path)
        extent = extents.get(found.key)
        if extent is None:
            raise UnsafeFile(f"{path}: storage {found.key[:40]!r} is not in the archive")
        if extent.length != found.count * numpy_dtype(found.dtype).itemsize:
            raise UnsafeFile(f"{path}: storage {found.key} has {extent.length} bytes, not {found.count} {found.dtype}")
        return found

    source = _source(path, extents, big_endian=lambda: order == b"big")
    return read_pickle(io.BytesIO(content(f"{root}/data.pkl")), source, storage)


def _zip_entries(path: Path, file: BinaryIO) -> dict[str, _Extent]:
    """Name -> where its bytes lie, of an archive in which both headers agree and no two entries overlap."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos, end = archive.infolist(), archive.start_dir
    except Exception as error:  # zipfile raises what it stumbles over
        raise ConvertError(f"{path} is truncated or damaged ({error}); fetch it again") from error
    entries, taken = {}, []
    for info in infos:
        name = info.orig_filename
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or name in entries:
            raise UnsafeFile(f"{path}: an entry is called {name[:80]!r}, as torch.save calls none")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise ConvertError(f"{path}: {name} is compressed or encrypted; torch.save stores. Load and save it again")
        file.seek(max(info.header_offset, 0))  # a directory of another length makes it negative
        header = file.read(_LOCAL_HEADER.size)
        if info.header_offset < 0 or len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            raise UnsafeFile(f"{path}: {name} is not where the archive's directory says")
        _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if file.read(name_length) != name.encode() or info.file_size < 0 or start + info.file_size > end:
            raise UnsafeFile(f"{path}: {name} is not what the archive's directory says")
        said = struct.unpack("<LL", header[18:26])
        if not info.flag_bits & 8 and not {*said} <= {info.file_size, 0xFFFFFFFF}:  # 8: sizes follow the data instead
            raise UnsafeFile(f"{path}: {name} has another size than the archive's directory says")
        entries[name] = _Extent(start, info.file_size)
        taken.append((info.header_offset, start + info.file_size, name))
    taken.sort()
    for (_, before, first), (start, _, second) in zip(taken, taken[1:], strict=False):
        if start < before:
            raise UnsafeFile(f"{path}: {first} and {second} overlap")
    return entries


class _Within:
    """A stream that never allocates for more than the file still has, as pickletools asks for any length it is told."""

    def __init__(self, file: BinaryIO, size: int):
        self.file = file
        self.size = size
        self.tell = file.tell
        self.readline = file.readline

    def read(self, length: int) -> bytes:
        return self.file.read(min(length, self.size - self.file.tell()))


def _read_legacy(path: Path, file: BinaryIO) -> Any:
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    stream, extents, storages, little = _Within(file, size), {}, {}, [True]
    source = _source(path, extents, big_endian=lambda: not little[0])
    read = partial(read_pickle, stream, source)
    if read() != _LEGACY_MAGIC or read() != _LEGACY_PROTOCOL:
        raise ConvertError(f"{path} is a pickle, but not one of torch.save's")
    system = read()
    little[0] = not isinstance(system, dict) or system.get("little_endian") is not False

    def storage(persistent: tuple) -> Storage:
        found = _storage(persistent, path=path)
        if storages.setdefault(found.key, found) != found:
            raise UnsafeFile(f"{path}: storage {found.key[:40]!r} is said to be two things")
        return found

    content = read(storage)
    keys = read()
    if not isinstance(keys, list) or set(map(str, keys)) != set(storages) or len(keys) != len(storages):
        raise UnsafeFile(f"{path}: the storages in the file are not those of its tensors")
    for key in keys:
        _, dtype, count = storages[key]
        length = count * numpy_dtype(dtype).itemsize
        header, start = file.read(8), file.tell()
        if len(header) < 8 or start + length > size:
            raise ConvertError(f"{path} is truncated in storage {key}; fetch it again")
        if int.from_bytes(header, "little" if little[0] else "big") != count:
            raise UnsafeFile(f"{path}: storage {key} has not the {count} elements that its tensors say")
        extents[key] = _Extent(start, length)
        file.seek(start + length)
    return content


# ------------------------------------------------------------------------------------------------------------ writing


def write_torch_file(path: Path, content: Any) -> None:
    """Writes nested dicts, lists, tuples, scalars, StoredTensors and NumPy arrays in the zip format of `torch.save`.

    The file loads with `torch.load(weights_only=True)`; no torch is needed here, and one tensor at a time is in
    memory. It appears whole or not at all. Raises ConvertError naming what it cannot hold, CannotWrite.
    """
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        pickled = bytearray(b"\x80\x02")
        _pickle(content, pickled, partial(_write_storage, archive, itertools.count()))
        _write_entry(archive, "data.pkl", bytes(pickled + b"."))
        _write_entry(archive, "byteorder", b"little")
        _write_entry(archive, "version", b"3\n")


def _write_entry(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    info = zipfile.ZipInfo(f"archive/{name}")  # without a date: the same content makes the same file
    info.file_size = len(content)
    large = len(content) * 1.05 > zipfile.ZIP64_LIMIT  # zipfile's own rule; it then adds 20 bytes of its own
    start = archive.fp.tell() + _LOCAL_HEADER.size + len(info.filename) + (20 if large else 0) + 4
    padding = -start % _ALIGNMENT
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w") as file:
        file.write(content)


def _write_storage(archive: zipfile.ZipFile, keys: Iterator[int], tensor: StoredTensor) -> tuple[int, str, np.ndarray]:
    """Writes the elements; returns the key, PyTorch's storage class and the array."""
    array = np.ascontiguousarray(tensor.read()).reshape(tensor.shape)
    storage = _WRITTEN.get(array.dtype.name)
    if storage is None:
        raise ConvertError(f"tensor {tensor.key} is {array.dtype}, which PyTorch's files do not hold")
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    key = next(keys)
    _write_entry(archive, f"data/{key}", memoryview(array.reshape(-1)).cast("B") if array.size else b"")
    return key, storage, array


def _pickle(value: Any, out: bytearray, store: Callable[[StoredTensor], tuple[int, str, np.ndarray]]) -> None:
    """Appends the opcodes (protocol 2) that make `value`."""
    if isinstance(value, np.ndarray):
        value = StoredTensor.of("in memory", value)
    if value is None or isinstance(value, bool):
        out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
    elif isinstance(value, int) and -(1 << 31) <= value < 1 << 31:
        out += b"J" + struct.pack("<i", value)
    elif isinstance(value, int):
        digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        out += b"\x8a" + bytes([len(digits)]) + digits
    elif isinstance(value, float):
        out += b"G" + struct.pack(">d", value)
    elif isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        out += b"X" + struct.pack("<I", len(text)) + text
    elif isinstance(value, dict):
        out += b"}("
        for key, part in value.items():
            _pickle(key, out, store)
            _pickle(part, out, store)
        out += b"u"
    elif isinstance(value, list | tuple):
        out += b"](" if isinstance(value, list) else b"("
        for part in value:
            _pickle(part, out, store)
        out += b"e" if isinstance(value, list) else b"t"
    elif isinstance(value, StoredTensor):
        key, storage, array = store(value)
        steps = tuple(stride // array.itemsize for stride in array.strides)
        out += b"ctorch._utils\n_rebuild_tensor_v2\n(("
        _pickle("storage", out, store)
        out += b"ctorch\n" + storage.encode() + b"\n"
        for part in (str(key), "cpu", array.size):
            _pickle(part, out, store)
        out += b"tQ"
        for part in (0, array.shape, steps, False):
            _pickle(part, out, store)
        out += b"ccollections\nOrderedDict\n)RtR"
    else:
        raise ConvertError(f"a {type(value).__name__} has no place in a file that loads without running code")
