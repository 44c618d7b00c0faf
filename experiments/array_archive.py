"""An .npz that is written array by array, and an array of it piece by piece: `np.load` reads it like any other."""

import shutil
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np


class ArrayArchive:
    """A context manager that writes arrays to a file as `np.savez` does: uncompressed, `NAME.npy` in a zip."""

    def __init__(self, path: Path):
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
        self._folder = path.parent

    def __enter__(self) -> "ArrayArchive":
        return self

    def __exit__(self, *error) -> None:
        self._zip.close()

    def add(self, name: str, array: np.ndarray) -> None:
        """One array, whole."""
        with self._open(name) as member:
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)

    def add_pieces(self, name: str, shape: tuple[int, int, int], dtype: np.dtype, pieces: Iterable[np.ndarray]) -> None:
        """One array [layers, frames, width] that comes as pieces [layers, some frames, width].

        The file holds it layer by layer, so the pieces are first laid out in a nameless file beside the archive, which
        goes when it is closed, or with the process. If `pieces` raises, the archive is as it was before. Raises
        ValueError if the pieces do not make up the shape.
        """
        layers, frames, width = shape
        row, done = width * dtype.itemsize, 0
        with tempfile.TemporaryFile(dir=self._folder) as spool:
            for piece in pieces:
                if piece.shape[::2] != (layers, width) or piece.dtype != dtype:
                    raise ValueError(f"a piece of {name} is {piece.dtype}{list(piece.shape)}, not of {list(shape)}")
                for layer in range(layers):
                    spool.seek((layer * frames + done) * row)
                    spool.write(piece[layer].tobytes())
                done += piece.shape[1]
            if done != frames:
                raise ValueError(f"{name} has {done} frames, {frames} were announced")
            spool.seek(0)
            with self._open(name) as member:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                shutil.copyfileobj(spool, member, 1 << 20)

    def _open(self, name: str):
        # zip files date from 1980 unless told otherwise: the same arrays make the same bytes
        return self._zip.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)
