"""safetensors files, read and written a tensor at a time.

The safetensors package checks a file's header and says what is in it. The values are read from the file itself: the
package maps it into memory, where every page that was touched counts beside the copy, and writes from a dict that holds
all tensors at once. The format: 8 bytes for the header's length (little endian), the header in JSON (name -> dtype,
shape, first and last byte after the header), the values one after another.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from wavlab_jax.convert.checkpoint import StoredTensor
from wavlab_jax.convert.names import ConvertError

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8":
           "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?"}  # fmt: skip


def read_safetensors_file(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the file, by its key; values are read later. Raises ConvertError naming the file."""
    try:
        with safe_open(path, framework="numpy"):
            pass  # whether the header is sound, and the file as long as it says
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ConvertError(f"{path} cannot be read: {error}; if it was downloaded, get it anew") from error
    header.pop("__metadata__", None)
    return {key: _stored(path, key, entry, start=8 + length) for key, entry in header.items()}


def _stored(path: Path, key: str, entry: dict, *, start: int) -> StoredTensor:
    shape, kind = tuple(entry["shape"]), entry["dtype"]
    count = int(np.prod(shape, dtype=np.int64))

    def read() -> np.ndarray:
        if kind not in _DTYPES:
            raise ConvertError(f"{path}: {key} is stored as {kind}, which cannot be read: convert it from a full copy")
        array = np.fromfile(path, _DTYPES[kind], count, offset=start + entry["data_offsets"][0])
        if array.size != count:
            raise ConvertError(f"{path} became shorter while it was read: {key} is cut off")
        if kind == "BF16":  # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array.reshape(shape)

    return StoredTensor(key, shape, read, str(path))


def write_safetensors_file(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Writes the tensors as float32 in the order given; one is in memory at a time. Call it inside `whole_folder`.

    Raises ConvertError naming a tensor with values that no model has (`StoredTensor.values`).
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0  # transformers refuses files without
    for key, tensor in tensors.items():
        begin, end = end, end + 4 * int(np.prod(tensor.shape, dtype=np.int64))
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the values are aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.values().astype("<f4", copy=False).data)
