"""Work on a corpus in pieces that survive a kill: units on their way into a store, features on their way into a fit.

A piece is a contiguous run of utterances that make about `PIECE_FRAMES` frames. Its file is whole or absent
(`atomic.whole_file`), so that whoever comes next, this process or another after a kill, does only what is missing; and
its bounds follow from the corpus alone, so that any number of hosts may share the pieces and another number may go on.

    units/NAME.pieces/plan.json          of what: settings, fingerprint, bounds. Another plan starts anew
    units/NAME.pieces/000017.uint16      labels of piece 17, one after another
    units/NAME/                          the store (`units.py`), when `join` has put them together
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_pipelines import storage
from data_pipelines.atomic import whole_file
from data_pipelines.batch import num_frames
from data_pipelines.manifest import Manifest
from data_pipelines.units import MAX_UNITS, UnitsError, UnitWriter

PLAN_NAME = "plan.json"
PIECE_FRAMES = 1 << 19  # 2.9 h of audio, 1 MB of labels; 14,000 pieces of 40,000 h


def piece_bounds(frames: np.ndarray, *, piece_frames: int = PIECE_FRAMES) -> np.ndarray:
    """int64 [pieces + 1] ascending bounds into `frames` [utterances]: piece p is utterances bounds[p] to bounds[p + 1].

    A piece has at most `piece_frames` frames, unless a single utterance has more. No utterances make no pieces.
    """
    ends = np.cumsum(np.asarray(frames, np.int64))
    bounds = [0]
    while bounds[-1] < len(ends):
        before = ends[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(max(int(np.searchsorted(ends, before + piece_frames, side="right")), bounds[-1] + 1))
    return np.array(bounds, np.int64)


def share_of(pieces: int, *, host: int, hosts: int) -> range:
    """The contiguous pieces that one of several hosts makes; every piece is one host's."""
    return range(pieces * host // hosts, pieces * (host + 1) // hosts)


class PieceFolder:
    """A folder of pieces of one plan; opening it makes it, or starts it anew where it holds those of another plan.

    Args:
        folder: of the pieces. plan: what they are; anything that JSON can hold. sizes: bytes of each piece's file.
        suffix: of the files.
    """

    def __init__(self, folder: str | Path, *, plan: dict, sizes: Iterable[int], suffix: str):
        self.folder, self.suffix = Path(folder), suffix
        self.sizes = [int(size) for size in sizes]
        content = json.dumps({**plan, "sizes": self.sizes}, ensure_ascii=False, sort_keys=True) + "\n"
        path = self.folder / PLAN_NAME
        try:
            same = path.read_text(encoding="utf-8") == content
        except FileNotFoundError:
            same = False
        if not same:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                temporary.write_text(content, encoding="utf-8")

    def __len__(self) -> int:
        return len(self.sizes)

    def path(self, piece: int) -> Path:
        """Of a piece's file, whether it is there or not."""
        return self.folder / f"{piece:06}.{self.suffix}"

    def missing(self, *, host: int = 0, hosts: int = 1) -> list[int]:
        """Pieces of this host's share that are not there, or not whole."""
        return [piece for piece in share_of(len(self), host=host, hosts=hosts) if not self._whole(piece)]

    def write(self, piece: int, values: np.ndarray) -> None:
        """Writes a piece, whole or not at all. Raises UnitsError if it has not the planned size, CannotWrite."""
        values = np.ascontiguousarray(values)
        if values.nbytes != self.sizes[piece]:
            raise UnitsError(f"{self.path(piece)}: {values.nbytes} bytes, {self.sizes[piece]} were planned")
        with whole_file(self.path(piece)) as temporary:
            values.tofile(temporary)

    def delete(self) -> None:
        """Deletes the folder and all pieces; they are not needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _whole(self, piece: int) -> bool:
        try:
            return self.path(piece).stat().st_size == self.sizes[piece]
        except FileNotFoundError:
            return False


class UnitPieces:
    """The labels of a corpus on their way: each host writes its pieces, in any order; then one host joins them.

    Args: as of `units.UnitWriter`; `piece_frames` is the size of a piece.

    Attributes:
        folder: the pieces, beside the store. frames: int64 [utterances]. bounds: see `piece_bounds`.

    Raises UnitsError: K out of range, the store exists already.
    """

    def __init__(
        self, directory: str | Path, manifest: Manifest, *, units: int, source: str, piece_frames: int = PIECE_FRAMES
    ):
        self.directory = storage.local(directory, what="the units to write")
        self.manifest, self.units, self.source = manifest, int(units), source
        if not 1 <= self.units <= MAX_UNITS:
            raise UnitsError(f"{self.directory}: {units} units; a store holds 1 to {MAX_UNITS}")
        if self.directory.exists():
            raise UnitsError(f"{self.directory} exists already: delete it, or write the units to another folder")
        self.frames = np.asarray(num_frames(np.asarray(manifest.samples)), np.int64)
        self.bounds = piece_bounds(self.frames, piece_frames=piece_frames)
        ends = np.concatenate([[0], np.cumsum(self.frames)])
        plan = {"units": self.units, "source": source, "corpus_fingerprint": manifest.fingerprint}
        self.folder = PieceFolder(
            self.directory.with_name(f"{self.directory.name}.pieces"),
            plan=plan,
            sizes=2 * np.diff(ends[self.bounds]),
            suffix="uint16",
        )

    def __len__(self) -> int:
        return len(self.folder)

    def rows(self, piece: int) -> np.ndarray:
        """int64: the utterances of a piece."""
        return np.arange(self.bounds[piece], self.bounds[piece + 1])

    def missing(self, *, host: int = 0, hosts: int = 1) -> list[int]:
        """Pieces of this host's share that are not written yet."""
        return self.folder.missing(host=host, hosts=hosts)

    def write(self, piece: int, labels: np.ndarray) -> None:
        """Writes `labels`, integers [frames of the piece's utterances, one after another] in 0 .. K-1.

        Raises UnitsError (wrong number, dtype or range), CannotWrite.
        """
        labels = np.asarray(labels)
        frames = int(self.frames[self.rows(piece)].sum())
        if labels.shape != (frames,) or labels.dtype.kind not in "iu":
            raise UnitsError(
                f"{self.folder.path(piece)}: labels {labels.dtype}{list(labels.shape)}, integers [{frames}] expected"
            )
        if labels.size and not (0 <= labels.min() and labels.max() < self.units):
            raise UnitsError(
                f"{self.folder.path(piece)}: labels {labels.min()}..{labels.max()}; "
                f"with {self.units} units they must lie in 0..{self.units - 1}"
            )
        self.folder.write(piece, labels.astype("<u2", copy=False))

    def join(self) -> None:
        """Puts the pieces together as the store, whole or not at all, and deletes them.

        Raises UnitsError naming the pieces that are missing.
        """
        missing = self.missing()
        if missing:
            raise UnitsError(
                f"{self.folder.folder} lacks {len(missing)} of {len(self)} pieces ({', '.join(map(str, missing[:6]))}"
                f"{' ...' if len(missing) > 6 else ''}): run the same command again to make them"
            )
        with UnitWriter(self.directory, self.manifest, units=self.units, source=self.source) as writer:
            for piece in range(len(self)):
                writer.add_all(self.rows(piece), np.fromfile(self.folder.path(piece), "<u2"))
        self.folder.delete()
