"""The classes and functions that a checkpoint's pickle may name, and what each of them is here.

Three kinds, and no other: those in `BUILDERS` are functions of ours (tensors that are not read yet, plain containers,
NumPy numbers), those of `is_inert` become a `Stub` that remembers what it was made from, those in `NOT_CALLED` are
values. Nothing is looked up by name in a module.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from wavlab_jax.convert.checkpoint import StoredTensor
from wavlab_jax.convert.names import ConvertError

# PyTorch's storage classes -> dtype; bfloat16, which NumPy lacks, is read as the upper half of a float32.
STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
DTYPES = frozenset(STORAGES.values()) | {"uint16", "uint32", "uint64"}
# Types that configurations mention, and modules whose objects are configurations (or hold them).
_TYPES = "bool bytearray bytes complex dict float frozenset int list long object set str tuple type unicode".split()
_INERT = frozenset({("argparse", "Namespace"), ("operator", "getitem"), *(("builtins", name) for name in _TYPES)})
_INERT_PACKAGES = ("omegaconf", "fairseq", "typing", "pathlib")
# What Python 2, newer NumPy and older PyTorch call the same things.
_RENAMED = {
    "__builtin__": "builtins",
    "_operator": "operator",
    "numpy._core.multiarray": "numpy.core.multiarray",
    "numpy._core.numeric": "numpy.core.numeric",
    "torch.cuda": "torch",
    "torch.storage": "torch",
}


class UnsafeFile(ConvertError):
    """A file that asks for code to be run, or that is not what its structure says; the message names file and class."""


class Storage(NamedTuple):
    """A block of elements that a pickle refers to: its key in the file, PyTorch's dtype, number of elements."""

    key: str
    dtype: str
    count: int


class Source(NamedTuple):
    """The file behind a pickle.

    Attributes:
        name: for messages.
        limit: bytes that a single tensor may have; what the file holds.
        elements: (storage, first, count) -> those elements as they lie, in `numpy_dtype` of native byte order.
    """

    name: str
    limit: int
    elements: Callable[[Storage, int, int], np.ndarray]


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Stub:
    """An object of a class that is not here: what the pickle would have made it from."""

    of: Name
    args: tuple = ()
    state: dict = field(default_factory=dict)
    items: dict = field(default_factory=dict)
    members: list = field(default_factory=list)


@dataclass(eq=False)
class NumpyDtype:
    """numpy.dtype under construction."""

    text: str


@dataclass(eq=False)
class NumpyArray:
    """numpy.ndarray under construction."""

    value: np.ndarray | None = None


def numpy_dtype(name: str, *, big_endian: bool = False) -> np.dtype:
    """How elements of PyTorch's dtype `name` lie in a file."""
    stored = {"bfloat16": "uint16", "bool": "uint8"}.get(name, name)
    return np.dtype(stored).newbyteorder(">" if big_endian else "<")


def known_name(module: Any, name: Any, *, file: str) -> Name:
    """The name that a pickle spells. Raises UnsafeFile if no checkpoint of a speech encoder needs it."""
    module, name = typed(module, str), typed(name, str)
    found = Name(_RENAMED.get(module, module), name)
    pair = (found.module, name)
    inert = pair in _INERT or found.module.split(".")[0] in _INERT_PACKAGES
    if not (inert or pair in BUILDERS or pair in NOT_CALLED):
        raise UnsafeFile(
            f"{file} names {module}.{name}, which no speech encoder needs and which could run code where the file is "
            "trusted. Nothing was run. If you trust the file, load it where it was made, and save its state dict alone"
        )
    return found


def typed(value: Any, kind: type) -> Any:
    """`value`, which must be exactly of this type; raises ConvertError otherwise."""
    if type(value) is not kind:
        raise ConvertError(f"a {type(value).__name__} stands where a {kind.__name__} is due")
    return value


def as_key(value: Any) -> Any:
    """A dict's key or a set's member: scalars and flat tuples, for hashing deep ones could exhaust the C stack."""
    scalars = value if type(value) is tuple else (value,)
    if any(type(scalar) not in (str, bytes, int, float, bool, type(None)) for scalar in scalars):
        raise ConvertError(f"a {type(value).__name__} is used as a key")
    return value


# Messages below never print a container of the file: what is shared inside could make its text endless.


def _tensor(source: Source, storage: Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> StoredTensor:
    """PyTorch's `_rebuild_tensor` and `_rebuild_tensor_v2`: a view of a storage, here not read yet."""
    typed(storage, Storage)
    numbers = (offset, *typed(size, tuple), *typed(stride, tuple))
    if any(type(number) is not int or number < 0 for number in numbers) or len(size) != len(stride) or len(size) > 32:
        raise UnsafeFile(f"{source.name}: a tensor in storage {storage.key} without a proper size, offset and stride")
    count = math.prod(size)
    if count * numpy_dtype(storage.dtype).itemsize > max(source.limit, 1 << 20):
        raise UnsafeFile(f"{source.name}: a tensor of {list(size)} is larger than the file")
    span = 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if count else 0
    if offset + span > storage.count:
        raise UnsafeFile(f"{source.name}: a tensor of {list(size)} reaches beyond its storage {storage.key}")

    def read() -> np.ndarray:
        flat = source.elements(storage, offset, span)
        if storage.dtype == "bfloat16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        elif storage.dtype == "bool":
            flat = flat != 0
        if not count:
            return np.zeros(size, flat.dtype)
        strides = tuple(step * flat.itemsize for step in stride)
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, size, strides)).reshape(size)

    return StoredTensor(f"storage {storage.key}", size, read, source.name)


def _tensor_of_dtype(source: Source, storage: Storage, offset, size, stride, grad, hooks, dtype, *_) -> StoredTensor:
    """`_rebuild_tensor_v3`: a view of an untyped storage."""
    name = typed(dtype, Name).name
    if name not in DTYPES:
        raise ConvertError(f"{source.name}: tensors of {dtype} are not read")
    count, rest = divmod(typed(storage, Storage).count, numpy_dtype(name).itemsize)
    if storage.dtype != "uint8" or rest:
        raise UnsafeFile(f"{source.name}: storage {storage.key} is not {name}")
    return _tensor(source, Storage(storage.key, name, count), offset, size, stride)


def _tensor_with_attributes(source: Source, function: Name, kind: Any, args: tuple, *_: Any) -> StoredTensor:
    """`torch._tensor._rebuild_from_type_v2`: a tensor with Python attributes, which are left out."""
    if typed(function, Name).module != "torch._utils":
        raise UnsafeFile(f"{source.name} rebuilds a tensor by {function}")
    return BUILDERS[function.module, function.name](source, *typed(args, tuple))


def _encoded(source: Source, text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes bytes for Python 2: `_codecs.encode(text, "latin1")`."""
    if typed(encoding, str) not in ("latin1", "latin-1", "iso-8859-1"):
        raise UnsafeFile(f"{source.name} encodes by {encoding!r}")
    return typed(text, str).encode("latin-1")


def numpy_text(source: Source, text: Any) -> str:
    """A NumPy dtype's spelling, of a plain number. Raises UnsafeFile for objects, records, strings and dates."""
    if not re.fullmatch(r"[<>=|]?([biuf]\d{1,2}|bool)|(u?int|float)\d{1,2}", typed(text, str)):
        raise UnsafeFile(f"{source.name}: a NumPy dtype {text!r}; only plain numbers are read, objects never")
    return text


def numpy_filled(source: Source, shape: Any, dtype: Any, raw: Any, *, order: str) -> np.ndarray:
    """A NumPy array from its bytes. Raises UnsafeFile unless they are as many as shape and dtype need."""
    dtype = np.dtype(typed(dtype, NumpyDtype).text)
    raw = raw.encode("latin-1") if isinstance(raw, str) else raw
    if not isinstance(raw, bytes | bytearray):
        raise UnsafeFile(f"{source.name}: a NumPy array of objects; only plain numbers are read")
    lengths_are_numbers = all(type(length) is int and length >= 0 for length in shape)
    if not lengths_are_numbers or len(raw) != math.prod(shape) * dtype.itemsize:
        raise UnsafeFile(f"{source.name}: a NumPy array whose shape does not fit its {len(raw)} bytes")
    return np.frombuffer(bytes(raw), dtype).reshape(shape, order=order).copy()


def _mapping(source: Source, pairs: Any = ()) -> dict:
    return dict(pairs) if isinstance(pairs, dict) else {as_key(key): value for key, value in pairs}


# Called as builder(source, *arguments in the pickle).
BUILDERS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): lambda source, data, *_: typed(data, StoredTensor),
    ("torch._utils", "_rebuild_parameter_with_state"): lambda source, data, *_: typed(data, StoredTensor),
    ("torch._tensor", "_rebuild_from_type_v2"): _tensor_with_attributes,
    ("torch", "Size"): lambda source, lengths=(): tuple(lengths),
    ("torch", "device"): lambda source, kind, index=None: typed(kind, str),
    ("collections", "OrderedDict"): _mapping,
    ("collections", "Counter"): _mapping,
    ("collections", "defaultdict"): lambda source, factory=None, pairs=(): _mapping(source, pairs),
    ("builtins", "set"): lambda source, values=(): set(map(as_key, values)),
    ("builtins", "frozenset"): lambda source, values=(): frozenset(map(as_key, values)),
    ("_codecs", "encode"): _encoded,
    ("numpy", "dtype"): lambda source, text, *_: NumpyDtype(numpy_text(source, text)),
    ("numpy.core.multiarray", "scalar"): lambda source, dtype, raw: numpy_filled(
        source, (), dtype, raw, order="C"
    ).item(),
    ("numpy.core.multiarray", "_reconstruct"): lambda source, *_: NumpyArray(),
    ("numpy.core.numeric", "_frombuffer"): lambda source, raw, dtype, shape, order: NumpyArray(
        numpy_filled(source, shape, dtype, raw, order="F" if order == "F" else "C")
    ),
}
# Names that are values: storage classes, dtypes, classes that a builder is told.
NOT_CALLED = frozenset(
    {
        *(("torch", name) for name in (*STORAGES, *DTYPES, "Tensor")),
        ("torch.nn.parameter", "Parameter"),
        ("numpy", "ndarray"),
    }
)
