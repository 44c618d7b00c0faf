"""Discrete labels of a prepared corpus: one unit for each 20 ms frame, written once and read at random while training.

Or one for each 10 ms, as labels made of MFCC are (HuBERT's first iteration): the encoder's frames then take every
second one, which is that of the same 25 ms.

A store is a folder of three files: `units.uint16`, the labels of all utterances one after another; `offsets.npy`, int64
[utterances + 1], where each utterance begins; `meta.json`, what they are and of which corpus. The corpus' fingerprint
is checked, because labels of another corpus, or of the same one prepared in another way, would fit without a word and
train on noise.
"""

import contextlib
import json
from pathlib import Path

import numpy as np

from data_pipelines import storage
from data_pipelines.atomic import whole_folder
from data_pipelines.batch import HOP, RECEPTIVE_FIELD, SAMPLE_RATE
from data_pipelines.manifest import Manifest

FORMAT = "speech-units"
FORMAT_VERSION = 1
RATE_HZ = SAMPLE_RATE // HOP  # 50 labels a second
RATES_HZ = (RATE_HZ, 2 * RATE_HZ)  # what a store may have
MAX_UNITS = 1 << 16  # labels are uint16
UNITS_NAME, OFFSETS_NAME, META_NAME = "units.uint16", "offsets.npy", "meta.json"
_SCAN = 1 << 24  # labels looked at in one piece


class UnitsError(ValueError):
    """A unit store that is missing, unfinished, damaged, or of another corpus; the message says what to do."""


class UnitWriter:
    """Writes a unit store, whole or not at all.

    Use as a context manager and `add` every utterance of the manifest in order. Everything goes to a temporary folder
    beside the final one, which is renamed when the block ends well (`atomic.whole_folder`); after an error it is
    deleted.

    Args:
        directory: the store to make; must not exist. manifest: the corpus. units: K, labels are 0 .. K-1.
        source: what made the labels, for people ("k-means, 500, layer 9 of step 400000 of ...").
        rate_hz: labels a second, 50 or 100; utterance i has `frames_at(samples, rate_hz=...)` of them.

    Raises UnitsError: the folder exists already, K out of range, labels out of order, of a wrong length, dtype or
    range, a rate that no store has, or not all utterances added. Raises CannotWrite naming the folder if the disk is
    full.
    """

    def __init__(self, directory: str | Path, manifest: Manifest, *, units: int, source: str, rate_hz: int = RATE_HZ):
        self.rate_hz = rate_hz
        self.directory = storage.local(directory, what="the units to write")
        self.manifest, self.units, self.source = manifest, int(units), source
        if not 1 <= self.units <= MAX_UNITS:
            raise UnitsError(f"{self.directory}: {units} units; a store holds 1 to {MAX_UNITS}")
        if rate_hz not in RATES_HZ:
            raise UnitsError(
                f"{self.directory}: {rate_hz} labels a second; a store has {' or '.join(map(str, RATES_HZ))}"
            )
        self._frames = frames_at(np.asarray(manifest.samples), rate_hz=rate_hz)
        self._added = 0
        self._temporary: Path | None = None

    def __enter__(self) -> "UnitWriter":
        if self.directory.exists():
            raise UnitsError(f"{self.directory} exists already: delete it, or write the units to another folder")
        with contextlib.ExitStack() as whole:
            self._temporary = whole.enter_context(whole_folder(self.directory))
            self._labels = open(self._temporary / UNITS_NAME, "wb", buffering=1 << 20)  # noqa: SIM115 - for the block
            self._whole = whole.pop_all()
        return self

    def add(self, i: int, labels: np.ndarray) -> None:
        """Writes `labels` [frames_at(samples, rate_hz)], integers in 0 .. K-1, of utterance i, next in order."""
        self.add_all(np.array([i]), labels)

    def add_all(self, rows: np.ndarray, labels: np.ndarray) -> None:
        """The same for the utterances `rows`, contiguous and next in order, whose labels follow one another."""
        self._require_open()
        first, last = (int(rows[0]), int(rows[-1])) if len(rows) else (self._added, self._added - 1)
        if first != self._added or last - first + 1 != len(rows) or last >= len(self._frames):
            expected = f"{self._added} is next" if self._added < len(self._frames) else "all are there"
            raise UnitsError(f"{self.directory}: units of utterance {first} were added, but {expected}")
        labels = np.asarray(labels)
        frames = int(self._frames[first : last + 1].sum())
        if labels.shape != (frames,) or labels.dtype.kind not in "iu":
            raise UnitsError(
                f"{self.directory}: labels {labels.dtype}{list(labels.shape)} for {self._named(first, last)}, whose "
                f"{self.manifest.samples[first : last + 1].sum()} samples make {frames} frames; one integer a frame is "
                "needed"
            )
        if labels.size and not (0 <= labels.min() and labels.max() < self.units):
            raise UnitsError(
                f"{self.directory}: labels {labels.min()}..{labels.max()} for {self._named(first, last)}; "
                f"with {self.units} units they must lie in 0..{self.units - 1}"
            )
        self._labels.write(labels.astype("<u2", copy=False).tobytes())
        self._added += len(rows)

    def _named(self, first: int, last: int) -> str:
        more = "" if first == last else f" and {last - first} after it"
        return f"{self.manifest.describe(first)}{more}"

    def _require_open(self) -> None:
        if self._temporary is None:
            raise UnitsError(f"{self.directory}: units are added inside the writer's `with` block")

    def __exit__(self, kind, error, trace) -> None:
        temporary, self._temporary = self._temporary, None
        if kind is not None:
            with contextlib.suppress(OSError):  # what it could not flush; the first error is the one to tell
                self._labels.close()
            self._whole.__exit__(kind, error, trace)
            return
        try:
            with self._whole:
                self._finish(temporary)
        except FileExistsError as error:
            raise UnitsError(str(error)) from error

    def _finish(self, temporary: Path) -> None:
        if self._added != len(self._frames):
            raise UnitsError(
                f"{self.directory}: units of only {self._added} of {len(self._frames)} utterances were added; no file "
                "is kept"
            )
        meta = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "units": self.units,
            "rate_hz": self.rate_hz,
            "hop": SAMPLE_RATE // self.rate_hz,
            "source": self.source,
            "corpus_fingerprint": self.manifest.fingerprint,
            "utterances": len(self._frames),
            "frames": int(self._frames.sum()),
        }
        self._labels.close()
        np.save(temporary / OFFSETS_NAME, np.concatenate([[0], np.cumsum(self._frames)]).astype(np.int64))
        (temporary / META_NAME).write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n")


class UnitStore:
    """The labels of a corpus, memory-mapped: processes of one machine share them, and pickling sends only the path.

    Attributes:
        directory: where it lies. units: K. source: what made the labels. offsets: int64 [utterances + 1].
        rate_hz: labels a second.
    """

    def __init__(
        self, directory: Path, *, units: int, source: str, offsets: np.ndarray, labels: np.ndarray, rate_hz: int
    ):
        self.directory, self.units, self.source, self.offsets = directory, units, source, offsets
        self.rate_hz = rate_hz
        self._labels = labels

    @classmethod
    def load(cls, directory: str | Path, manifest: Manifest) -> "UnitStore":
        """Maps the store after checking it against the corpus; every label is looked at once (about 1 s per 1000 h).

        Raises UnitsError: no store or an unfinished one, another format, made for another corpus, another hop or rate,
        other counts, a cut or damaged file, a label outside of 0 .. K-1.
        """
        directory = storage.local_folder(directory, names=(META_NAME, OFFSETS_NAME, UNITS_NAME))
        meta = _read_meta(directory)
        if meta["corpus_fingerprint"] != manifest.fingerprint:
            raise UnitsError(
                f"{directory} holds units of another corpus: they were made for {meta['corpus_fingerprint']}, and "
                f"{getattr(manifest, 'root', 'this corpus')} is {manifest.fingerprint}; delete that folder "
                "to have it made anew, or give another --workdir (or the units another name)"
            )
        if meta["rate_hz"] not in RATES_HZ or meta["hop"] * meta["rate_hz"] != SAMPLE_RATE:
            raise UnitsError(
                f"{directory} has a unit every {meta['hop']} samples ({meta['rate_hz']} Hz), the encoder has a frame "
                f"every {HOP} ({RATE_HZ} Hz); make the units again at that rate"
            )
        frames = frames_at(np.asarray(manifest.samples), rate_hz=meta["rate_hz"])
        counts = (meta["utterances"], meta["frames"])
        if counts != (len(frames), int(frames.sum())):
            raise UnitsError(
                f"{directory} lists {counts[0]} utterances and {counts[1]} frames, the corpus has {len(frames)} and "
                f"{int(frames.sum())}; make the units again"
            )
        store = cls._open(directory, meta)
        if store.offsets[0] != 0 or not np.array_equal(np.diff(store.offsets), frames):
            raise UnitsError(f"{directory / OFFSETS_NAME} is not that of this corpus: damaged; make the units again")
        if store.units < MAX_UNITS:
            for first in range(0, len(store._labels), _SCAN):
                piece = store._labels[first : first + _SCAN]
                if piece.max() >= store.units:
                    wrong = first + int(np.argmax(piece >= store.units))
                    i = int(np.searchsorted(store.offsets, wrong, side="right")) - 1
                    raise UnitsError(
                        f"{directory / UNITS_NAME} has label {store._labels[wrong]} in {manifest.describe(i)}, but "
                        f"{store.units} units (0..{store.units - 1}): damaged; make the units again"
                    )
        return store

    @classmethod
    def _open(cls, directory: Path, meta: dict) -> "UnitStore":
        """Maps the files without comparing them with a corpus."""
        path, size = directory / UNITS_NAME, 2 * meta["frames"]
        try:
            found = path.stat().st_size
            offsets = np.load(directory / OFFSETS_NAME, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UnitsError(f"{directory} is damaged ({error}); make the units again") from error
        if found != size:
            raise UnitsError(f"{path} has {found} bytes, {size} expected: it was cut or replaced; make the units again")
        if offsets.dtype != np.int64 or offsets.shape != (meta["utterances"] + 1,):
            raise UnitsError(
                f"{directory / OFFSETS_NAME} is {offsets.dtype}{list(offsets.shape)}, int64[{meta['utterances'] + 1}] "
                "expected: damaged; make the units again"
            )
        labels = np.memmap(path, "<u2", mode="r") if size else np.zeros(0, np.uint16)  # an empty file cannot be mapped
        offsets, labels = np.asarray(offsets), np.asarray(labels)  # plain arrays: a memmap costs more at every slice
        made = {"units": meta["units"], "source": meta["source"], "rate_hz": meta["rate_hz"]}
        return cls(directory, offsets=offsets, labels=labels, **made)

    def __reduce__(self):
        return _reopen, (self.directory,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __repr__(self) -> str:
        return f"UnitStore({str(self.directory)!r}, {self.units} units, {len(self)} utterances, {self.source!r})"

    def read(self, i: int, *, start_frame: int = 0, frames: int | None = None) -> np.ndarray:
        """uint16 [frames]: labels of utterance i from frame `start_frame` on; to its end where `frames` is None.

        Raises UnitsError if the frames do not lie in the utterance.
        """
        if not 0 <= i < len(self):
            raise UnitsError(f"utterance {i} asked of {self.directory}, which has {len(self)}")
        first, end = int(self.offsets[i]), int(self.offsets[i + 1])
        frames = end - first - start_frame if frames is None else frames
        if start_frame < 0 or frames < 0 or first + start_frame + frames > end:
            raise UnitsError(
                f"frames {start_frame}..{start_frame + frames} asked of utterance {i} of {self.directory}, which has "
                f"{end - first}"
            )
        return np.array(self._labels[first + start_frame : first + start_frame + frames])

    def crop(self, i: int, *, start: int, frames: int) -> np.ndarray:
        """uint16 [frames]: labels of the encoder's frames of a crop of utterance i that begins at sample `start`.

        `start` is a multiple of the encoder's hop. Frame t hears samples `start` + 320 t .. + 400, and so does the
        label at twice its number where there are 100 a second. Raises UnitsError if the frames do not lie in the
        utterance.
        """
        if start % HOP:
            raise UnitsError(f"a crop of utterance {i} begins at sample {start}, which is not a multiple of {HOP}")
        every = self.rate_hz // RATE_HZ
        first, needed = start // HOP * every, max(0, (frames - 1) * every + 1)
        return self.read(i, start_frame=first, frames=needed)[::every]

    def counts(self, rows: np.ndarray | None = None) -> np.ndarray:
        """int64 [units]: how often each unit occurs in the utterances `rows` (all, where None); each row counts once
        for every time it is named."""
        rows = np.arange(len(self)) if rows is None else np.asarray(rows, np.int64)
        total = np.zeros(self.units, np.int64)
        if not len(rows):
            return total
        # Neighbours are counted in one piece: a split of a large corpus is a few long runs.
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for run in np.split(rows, breaks):
            first, end = int(self.offsets[run[0]]), int(self.offsets[run[-1] + 1])
            for piece in range(first, end, _SCAN):
                total += np.bincount(self._labels[piece : min(piece + _SCAN, end)], minlength=self.units)
        return total


def frames_at(samples, *, rate_hz: int):
    """Number of labels of `samples` samples at `rate_hz`: windows of 25 ms that fit, a hop apart; see `num_frames`."""
    hop = SAMPLE_RATE // rate_hz
    return np.maximum((np.asarray(samples) - RECEPTIVE_FIELD) // hop + 1, 0)


def _read_meta(directory: Path) -> dict:
    if not directory.is_dir():
        raise UnitsError(f"{directory} does not exist; make units of this corpus first, or correct the path")
    path = directory / META_NAME
    if not path.is_file():
        raise UnitsError(f"{directory} has no {META_NAME}: not a unit store, or not a whole one; make the units again")
    try:
        meta = json.loads(path.read_text())
        kind, version = meta["format"], meta["version"]
        needed = {"units": int, "rate_hz": int, "hop": int, "utterances": int, "frames": int}
        needed |= {"source": str, "corpus_fingerprint": str}
        wrong = [key for key, wanted in needed.items() if type(meta.get(key)) is not wanted]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnitsError(f"{path} is damaged or foreign ({error!r}); make the units again") from error
    if (kind, version) != (FORMAT, FORMAT_VERSION):
        raise UnitsError(f"{path} is {kind} {version}, this code reads {FORMAT} {FORMAT_VERSION}; make the units again")
    if wrong or not 1 <= meta["units"] <= MAX_UNITS or meta["frames"] < 0 or meta["utterances"] < 0:
        raise UnitsError(f"{path} is damaged (look at {', '.join(wrong) or 'its numbers'}); make the units again")
    return meta


def _reopen(directory: Path) -> UnitStore:
    """What a worker process does: the process that started it has checked the store."""
    return UnitStore._open(directory, _read_meta(directory))
