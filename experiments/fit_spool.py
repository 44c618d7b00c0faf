"""Features that centroids are fitted on, on disk: of a declared size, written in pieces, read as one array of rows."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipelines.unit_pieces import PIECE_FRAMES, PieceFolder, piece_bounds

PIECE_BYTES = 1 << 27  # of features in one file, about; what a process holds while it extracts them


class SpoolError(ValueError):
    """Features that cannot be kept as they are; the message says what to change."""


class SpoolPiece(NamedTuple):
    """Utterances `first` to `last` of the sample, their `frames`, and which of these are kept, ascending."""

    first: int
    last: int
    frames: int
    chosen: np.ndarray


class FitSpool:
    """[rows, width] of the frames of a sample that fit into a number of bytes; a `kmeans.Frames`.

    Where not all frames fit, the sample's frames in order are cut into as many equal stretches as rows fit, and one
    frame is drawn from each: every utterance gives its share, and the rows are known before a feature is computed.

    Args:
        folder: of the pieces; see `PieceFolder`. frames: int [utterances] of the sample, in order. width, dtype: of
        features. most_bytes: of all rows together. seed: of the draw. source: of what the features are.

    Attributes:
        shape, dtype: of the rows, as numpy has them.
    """

    def __init__(
        self, folder: Path, *, frames: np.ndarray, width: int, dtype: str, most_bytes: int, seed: int, source: str
    ):
        self.dtype = np.dtype(dtype)
        self._ends = np.concatenate([[0], np.cumsum(frames, dtype=np.int64)])
        total = int(self._ends[-1])
        self.shape = (min(total, most_bytes // (width * self.dtype.itemsize)), width)
        self._chosen = _one_of_each(total, self.shape[0], seed=seed)
        dense = max(self.shape[0], 1) / max(total, 1)
        fitting = int(PIECE_BYTES / (width * self.dtype.itemsize * dense))
        self._bounds = piece_bounds(frames, piece_frames=max(min(PIECE_FRAMES, fitting), 1))
        self._rows = np.searchsorted(self._chosen, self._ends[self._bounds])
        self.folder = PieceFolder(
            folder,
            plan={"source": source, "width": width, "dtype": str(self.dtype), "rows": self.shape[0], "frames": total},
            sizes=np.diff(self._rows) * width * self.dtype.itemsize,
            suffix=str(self.dtype),
        )
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.shape[0]

    def missing(self, *, host: int = 0, hosts: int = 1) -> list[int]:
        """Pieces of this host's share that are to be written."""
        return self.folder.missing(host=host, hosts=hosts)

    def piece(self, number: int) -> SpoolPiece:
        """What is to be extracted for a piece."""
        first, last = self._bounds[number : number + 2].tolist()
        begin, end = self._ends[[first, last]].tolist()
        chosen = self._chosen[self._rows[number] : self._rows[number + 1]] - begin
        return SpoolPiece(first, last, end - begin, chosen)

    def write(self, number: int, features: np.ndarray) -> None:
        """Keeps the chosen features [rows, width] of a piece. Raises SpoolError where they are not finite, or not in
        the dtype; CannotWrite."""
        if not np.isfinite(features).all():
            raise SpoolError(f"features for {self.folder.folder} are not finite: is the teacher sound?")
        with np.errstate(over="ignore"):
            kept = features.astype(self.dtype)
        if not np.isfinite(kept).all():
            raise SpoolError(
                f"features up to {np.abs(features).max():.3g} do not fit into {self.dtype}: set units.fit-dtype float32"
            )
        self.folder.write(number, kept)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """[rows, width] of a slice without a step, or of ascending indices."""
        if isinstance(rows, slice):
            first, last, step = rows.indices(len(self))
            if step != 1:
                raise IndexError("rows are read by slices without a step, or by ascending indices")
            if last <= first:
                return np.empty((0, self.shape[1]), self.dtype)
            pieces = range(self._piece_of(first), self._piece_of(last - 1) + 1)
            begin = self._rows
            parts = [self._map(p)[max(first - begin[p], 0) : max(last - begin[p], 0)] for p in pieces]
        else:
            if not len(rows):
                return np.empty((0, self.shape[1]), self.dtype)
            cuts = np.searchsorted(rows, self._rows)
            pieces = range(self._piece_of(int(rows[0])), self._piece_of(int(rows[-1])) + 1)
            parts = [self._map(p)[rows[cuts[p] : cuts[p + 1]] - self._rows[p]] for p in pieces]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def delete(self) -> None:
        """Deletes all pieces."""
        self._maps.clear()
        self.folder.delete()

    def _piece_of(self, row: int) -> int:
        return int(np.searchsorted(self._rows, row, side="right")) - 1

    def _map(self, piece: int) -> np.ndarray:
        if piece not in self._maps:
            count = int(self._rows[piece + 1] - self._rows[piece])
            shape = (count, self.shape[1])
            self._maps[piece] = (
                np.memmap(self.folder.path(piece), self.dtype, "r", shape=shape) if count else np.empty(shape)
            )
        return self._maps[piece]


def _one_of_each(total: int, wanted: int, *, seed: int) -> np.ndarray:
    """int64 [wanted], ascending: one number from each of `wanted` equal stretches of 0 .. total-1."""
    edges = np.arange(wanted + 1, dtype=np.int64) * total // max(wanted, 1)
    return edges[:-1] + (np.random.default_rng([seed, 1]).random(wanted) * np.diff(edges)).astype(np.int64)
