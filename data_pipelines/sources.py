"""Audio by number: any crop of any utterance of a prepared corpus."""

import resource
import threading
from pathlib import Path

import msgpack
import numpy as np

from data_pipelines import storage
from data_pipelines.audio import AudioError, decode_crop
from data_pipelines.manifest import Manifest

_UNREADABLE = (RuntimeError, ValueError, IndexError, OSError)  # what ArrayRecord raises
SPARE_FILES = 256  # descriptors left for everything else in the process when shards are many


class SourceError(RuntimeError):
    """A record or a recording cannot be read; the message names the shard and the utterance, or the file."""


class ShardSource:
    """Reads utterances of a prepared corpus at random; safe to share between threads, cheap to pickle.

    Shards are opened when first touched, and stay open: one descriptor each. The record counts come from the manifest,
    so that making a source of thousands of shards opens none of them.
    """

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self._first = np.concatenate([[0], np.cumsum(manifest.shard_records)])
        self._lock = threading.Lock()
        self._records = None

    def __len__(self) -> int:
        return len(self.manifest)

    def __repr__(self) -> str:
        return f"ShardSource({self.manifest!r})"

    def __getstate__(self):
        return {"manifest": self.manifest}

    def __setstate__(self, state):
        self.__init__(state["manifest"])

    def fetch(self) -> None:
        """Makes shards local that cannot be read where they lie (see `storage`); the first read would do it otherwise.

        For whoever reads in threads and processes: each process would fetch all, and a clock would run meanwhile.
        Raises StorageError.
        """
        self._paths()

    def read(self, i: int, *, start: int = 0, samples: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """float32 [samples] of utterance i from sample `start` on, at 16 kHz; to its end where `samples` is None.

        Only the crop is decoded, into `out` [samples] where it is given. Raises SourceError naming the shard and the
        utterance: no such row, a shard that is missing or damaged, a record of another utterance, a crop that does not
        lie inside the utterance.
        """
        i = int(i)
        if not 0 <= i < len(self.manifest):
            raise SourceError(f"utterance {i} asked of {self.manifest.root}, which has {len(self.manifest)}")
        total = int(self.manifest.samples[i])
        samples = total - start if samples is None else samples
        if start < 0 or samples < 0 or start + samples > total:
            raise SourceError(f"samples {start} to {start + samples} asked of {self._place(i)}, which has {total}")
        record = self.record(i)
        if record["samples"] != total:
            raise SourceError(f"{self._place(i)} has {record['samples']} samples, but {total} in the manifest")
        try:
            return decode_crop(record["audio"], start=start, samples=samples, out=out)
        except AudioError as error:
            raise SourceError(f"{self._place(i)} does not decode: {error}") from error

    def record(self, i: int) -> dict:
        """What is stored of utterance i: {"id", "samples", "audio": FLAC bytes}, the id checked. Raises SourceError."""
        records = self._records or self._open()
        key = int(self._first[self.manifest.shard[i]] + self.manifest.record[i])
        try:
            packed = records[key]
        except _UNREADABLE:
            # A network disk may stumble. A reader that failed stays failed, so this takes new ones; and only once.
            try:
                packed = self._open(instead_of=records)[key]
            except _UNREADABLE as error:
                raise SourceError(
                    f"{self._place(i)} cannot be read ({error}), tried twice; is the file whole?"
                ) from error
        try:
            record = msgpack.unpackb(packed)
            found, _, _ = record["id"], record["samples"], record["audio"]
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise SourceError(f"{self._place(i)}: the record is damaged ({error})") from error
        if found != self.manifest.id(i):
            raise SourceError(f"{self._place(i)}: the record is of {found!r}; the shard is not the manifest's")
        return record

    def _paths(self) -> list[str]:
        return storage.readable_shards(
            self.manifest.root, self.manifest.shard_names, self.manifest.shard_bytes.tolist()
        )

    def _place(self, i: int) -> str:
        shard = self.manifest.shard_names[self.manifest.shard[i]]
        return (
            f"{storage.place(self.manifest.root, shard)} record {self.manifest.record[i]}, {self.manifest.describe(i)}"
        )

    def _open(self, *, instead_of=None):
        with self._lock:
            if self._records is not instead_of:  # another thread was first
                return self._records
            # Imported here: a process that only plans over a manifest needs no reader.
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            names, counts = self.manifest.shard_names, self.manifest.shard_records.tolist()
            if not names:
                raise SourceError(f"{self.manifest.root} has no shards")
            _allow_open_files(len(names) + SPARE_FILES, self.manifest.root)
            # "path[0:n]" spares opening every file to count its records.
            self._records = ArrayRecordDataSource(
                [f"{path}[0:{count}]" for path, count in zip(self._paths(), counts, strict=True)]
            )
            return self._records


def check_records(manifest: Manifest) -> None:
    """Opens every shard and compares its number of records and every record's id and length with the manifest.

    Reads the whole corpus once, without decoding it. Raises SourceError naming the first shard or utterance that is
    not as the manifest says.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    source = ShardSource(manifest)
    for path, expected in zip(source._paths(), manifest.shard_records.tolist(), strict=True):
        try:
            reader = ArrayRecordReader(path)
            count = reader.num_records()
            reader.close()
        except RuntimeError as error:
            raise SourceError(f"{path} cannot be opened: {error}") from error
        if count != expected:
            raise SourceError(f"{path} holds {count} records, the manifest says {expected}")
    for i in range(len(manifest)):
        if source.record(i)["samples"] != manifest.samples[i]:
            raise SourceError(f"{source._place(i)}: the record's length is not the manifest's")


def _allow_open_files(wanted: int, root: Path) -> None:
    """Lifts this process's soft limit on open files where it is too low. Raises SourceError if the hard one is too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SourceError(
            f"{root} has {wanted - SPARE_FILES} shards, but this process may open {hard} files: raise `ulimit -Hn`, or "
            "prepare with more --clips-per-shard"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
