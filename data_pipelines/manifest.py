"""The table of utterances: one memory-mapped Arrow file that says what a prepared corpus holds and where.

`manifest.arrow` lies in the prepared folder and is written last, so its presence means that the corpus is whole. Its
numeric columns are plain numpy arrays over the mapped file: loading costs no memory and no time, at a thousand
utterances or at a hundred million, and the processes of one machine share the pages.
"""

import enum
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines import storage
from data_pipelines.atomic import whole_file
from data_pipelines.batch import SAMPLE_RATE
from data_pipelines.columns import offsets_of
from data_pipelines.unique import first_repeated

MANIFEST_NAME = "manifest.arrow"
SHARD_FOLDER = "shards"
FORMAT = "speech-manifest"
FORMAT_VERSION = 1
NAMED_CLIPS = 6  # clips that `describe` lists by name


class Split(enum.IntEnum):
    """What an utterance may be used for."""

    TRAIN = 0
    DEV = 1
    TEST = 2


class ManifestError(ValueError):
    """The manifest, or a shard that it names, is missing, damaged, or of another format."""


_NUMERIC = {
    "samples": pa.int64(),
    "language": pa.int32(),
    "corpus": pa.int32(),
    "speaker": pa.int32(),
    "split": pa.int8(),
    "shard": pa.int32(),
    "record": pa.int32(),
    "clips": pa.int32(),
}
_SCHEMA = pa.schema(
    [
        *(pa.field(name, kind, nullable=False) for name, kind in _NUMERIC.items()),
        pa.field("id", pa.large_string(), nullable=False),
        pa.field("clip_names", pa.large_list(pa.large_string()), nullable=False),
        pa.field("text", pa.large_string()),
        pa.field("licence", pa.large_string()),
    ]
)


@dataclass(frozen=True, eq=False, repr=False)
class Manifest:
    """What a prepared corpus holds; every array is [utterances], read only, and row i is utterance i.

    Attributes:
        root: the prepared folder.
        fingerprint: hex sha256 over ids, languages, corpora, splits, lengths and the audio itself, in order. What is
            made from a corpus (unit labels, for one) keeps it, and is refused for any other.
        languages, corpora, speakers: the names that the columns of the same singular name index; sorted. A speaker
            that the source did not name is "".
        samples: int64, at 16 kHz.
        language, corpus, speaker: int32.
        split: int8, a `Split`.
        shard: int32 index into `shard_names`; record: int32 position in that shard.
        clips: int32, how many source clips were joined into the utterance (a repeated one counts each time).
        shard_names: paths relative to root; shard_records and shard_bytes: int64, records and bytes of each.
        facts: what `prepare` notes about how the corpus was made (its options and tallies).
    """

    root: Path
    fingerprint: str
    languages: tuple[str, ...]
    corpora: tuple[str, ...]
    speakers: tuple[str, ...]
    samples: np.ndarray
    language: np.ndarray
    corpus: np.ndarray
    speaker: np.ndarray
    split: np.ndarray
    shard: np.ndarray
    record: np.ndarray
    clips: np.ndarray
    shard_names: tuple[str, ...]
    shard_records: np.ndarray
    shard_bytes: np.ndarray
    facts: dict
    table: pa.Table

    @classmethod
    def load(cls, root: str | Path, *, check_shards: bool = True) -> "Manifest":
        """Maps `root/manifest.arrow`.

        With `check_shards`, every shard must be there with the size in bytes it was written with: one `stat` a shard,
        so a lost or cut file is found now and not at step 40,000. (`sources.check_records` opens them all and counts.)

        Raises ManifestError: no such folder or manifest, a damaged file, another format or version, counts that
        contradict each other, a missing shard, a shard of another size.
        """
        root = storage.local_folder(root, names=(MANIFEST_NAME,))
        path = root / MANIFEST_NAME
        if not path.is_file():
            unfinished = root.is_dir() and (root / SHARD_FOLDER).is_dir()
            hint = "prepare was not finished: run it again" if unfinished else "run: python -m data_pipelines prepare"
            raise ManifestError(f"{path} does not exist ({hint})")
        try:
            with pa.memory_map(str(path)) as mapped:
                table = pa.ipc.open_file(mapped).read_all()
        except (pa.ArrowException, OSError) as error:
            raise ManifestError(
                f"{path} is damaged or not an Arrow file ({error}); prepare the corpus again"
            ) from error
        head = _read_head(path, table)
        columns = {}
        for name, kind in _NUMERIC.items():
            if name not in table.column_names or table.schema.field(name).type != kind:
                raise ManifestError(f"{path} has no {kind} column {name!r}; prepare the corpus again")
            chunks = table.column(name).chunks
            columns[name] = (
                chunks[0].to_numpy(zero_copy_only=True) if len(chunks) == 1 else table.column(name).to_numpy()
            )
        manifest = cls(
            root=root,
            fingerprint=head["fingerprint"],
            languages=tuple(head["languages"]),
            corpora=tuple(head["corpora"]),
            speakers=tuple(head["speakers"]),
            **columns,
            shard_names=tuple(head["shard_names"]),
            shard_records=np.array(head["shard_records"], np.int64),
            shard_bytes=np.array(head["shard_bytes"], np.int64),
            facts=head["facts"],
            table=table,
        )
        _check_counts(path, manifest)
        if check_shards:
            _check_shards(manifest)
        return manifest

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        hours = self.samples.sum() / SAMPLE_RATE / 3600
        return f"Manifest({str(self.root)!r}, {len(self)} utterances, {hours:.2f} h, {len(self.languages)} languages)"

    def __reduce__(self):  # a worker process maps the file again; the shards were checked by its parent
        return _reload, (self.root,)

    def id(self, i: int) -> str:
        """The utterance's id: that of its first clip."""
        return self.table.column("id")[int(i)].as_py()

    def clip_names(self, i: int) -> list[str]:
        """The source clips of utterance i, in the order in which they are heard."""
        return self.table.column("clip_names")[int(i)].as_py()

    def text(self, i: int) -> str | None:
        """What is said, clip by clip (" | " between them), where the source told it."""
        return self.table.column("text")[int(i)].as_py()

    def licence(self, i: int) -> str | None:
        """The licence of the clips, where the source told it."""
        return self.table.column("licence")[int(i)].as_py()

    def find(self, name: str) -> int:
        """The row of the utterance with this id. Raises ManifestError if there is none."""
        row = pc.index(self.table.column("id"), pa.scalar(name, pa.large_string())).as_py()
        if row < 0:
            raise ManifestError(f"{self.root} has no utterance {name!r}")
        return row

    def describe(self, i: int) -> str:
        """One line that a person can act on: "fra/asterisk utterance X (clips X, Y, Z)"."""
        i = int(i)
        where = f"{self.languages[self.language[i]]}/{self.corpora[self.corpus[i]]} utterance {self.id(i)}"
        names = self.clip_names(i)
        if len(names) == 1 and names[0] == self.id(i):
            return where
        more = f" and {len(names) - NAMED_CLIPS} more" if len(names) > NAMED_CLIPS else ""
        return f"{where} (clips {', '.join(names[:NAMED_CLIPS])}{more})"

    def rows(self, split: Split | int | None = None) -> np.ndarray:
        """[rows] int64: the utterances of one split, or of all, in order."""
        if split is None:
            return np.arange(len(self))
        return np.flatnonzero(self.split == int(split))

    def seconds(self, split: Split | int | None = None, by: str | tuple[str, ...] = "language") -> dict:
        """Seconds of audio by "language", "corpus", "speaker", or several of them (a tuple; the keys are then tuples).

        Names that have nothing in this split are left out. Raises ManifestError for another column.
        """
        names = (by,) if isinstance(by, str) else tuple(by)
        tables = {"language": self.languages, "corpus": self.corpora, "speaker": self.speakers}
        if not names or set(names) - set(tables):
            raise ManifestError(f"cannot sum seconds by {by!r}; choose from {', '.join(tables)}")
        rows = self.rows(split)
        shape = tuple(len(tables[name]) for name in names)
        if not len(rows):
            return {}
        key = np.ravel_multi_index(tuple(getattr(self, name)[rows].astype(np.int64) for name in names), shape)
        if math.prod(shape) <= max(len(rows), 1 << 16):  # counted in place; sorting 25 million keys takes seconds
            present = np.flatnonzero(np.bincount(key))
            seconds = np.bincount(key, weights=self.samples[rows])[present]
        else:
            present, inverse = np.unique(key, return_inverse=True)
            seconds = np.bincount(inverse, weights=self.samples[rows])
        seconds = seconds / SAMPLE_RATE
        labels = zip(*np.unravel_index(present, shape), strict=True)
        keys = [tuple(tables[n][k] for n, k in zip(names, label, strict=True)) for label in labels]
        return {k[0] if isinstance(by, str) else k: float(s) for k, s in zip(keys, seconds, strict=True)}


def write_manifest(
    root: str | Path,
    *,
    samples: Sequence[int],
    language: Sequence[str],
    corpus: Sequence[str],
    speaker: Sequence[str] | None = None,
    split: Sequence[int] | None = None,
    id: Sequence[str] | None = None,
    clip_names: Sequence[Sequence[str]] | None = None,
    text: Sequence[str | None] | None = None,
    licence: Sequence[str | None] | None = None,
    shard: Sequence[int] | None = None,
    record: Sequence[int] | None = None,
    shard_names: Sequence[str] = (f"{SHARD_FOLDER}/00000.arrayrecord",),
    shard_records: Sequence[int] | None = None,
    shard_bytes: Sequence[int] | None = None,
    content: str = "",
    facts: dict | None = None,
) -> Path:
    """Writes `root/manifest.arrow`, whole or not at all; returns its path. Columns are [utterances].

    Names (language, corpus, speaker) are given as strings, and become indices here. What is left out gets the plainest
    value: everything in TRAIN, ids "0", "1", ..., one clip an utterance, one shard in row order. Columns of millions
    are best given as Arrow arrays (names as a DictionaryArray of strings): nothing then passes through Python. The hash
    of the audio is `content`. (Without shards, load it with `check_shards=False`: enough to plan and test sampling.)

    Raises ManifestError: columns of different lengths, duplicate ids, counts that contradict the columns.
    """
    root = Path(root)
    count = len(samples)
    ids = _strings(pa.array(np.arange(count)).cast(pa.large_string()) if id is None else id)
    if clip_names is None:
        names = pa.LargeListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int64)), ids)
    else:
        names = pa.array(clip_names, pa.large_list(pa.large_string()))
    encoded = {
        "language": _encode(language),
        "corpus": _encode(corpus),
        "speaker": _encode(pa.repeat(pa.scalar("", pa.large_string()), count) if speaker is None else speaker),
    }
    shard = np.zeros(count, np.int32) if shard is None else np.asarray(shard, np.int32)
    columns = {
        "samples": np.asarray(samples, np.int64),
        **{name: codes for name, (_, codes) in encoded.items()},
        "split": np.zeros(count, np.int8) if split is None else np.asarray(split, np.int8),
        "shard": shard,
        "record": np.arange(count, dtype=np.int32) if record is None else np.asarray(record, np.int32),
        "clips": pc.list_value_length(names).cast(pa.int32()),
        "id": ids,
        "clip_names": names,
        "text": pa.nulls(count, pa.large_string()) if text is None else text,
        "licence": pa.nulls(count, pa.large_string()) if licence is None else licence,
    }
    for name, column in columns.items():
        if len(column) != count:
            raise ManifestError(f"{len(column)} values of {name!r} for {count} utterances")
    if (repeated := first_repeated(ids)) is not None:
        raise ManifestError(f"id {repeated!r} is given to more than one utterance")
    if shard_records is None:
        shard_records = np.bincount(shard, minlength=len(shard_names))
    head = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "sample_rate": SAMPLE_RATE,
        **{
            key: encoded[name][0]
            for key, name in (("languages", "language"), ("corpora", "corpus"), ("speakers", "speaker"))
        },
        "shard_names": list(shard_names),
        "shard_records": [int(n) for n in shard_records],
        "shard_bytes": [0] * len(shard_names) if shard_bytes is None else [int(n) for n in shard_bytes],
        "facts": facts or {},
    }
    head["fingerprint"] = _fingerprint(columns, head, content)
    metadata = {"manifest": json.dumps(head, ensure_ascii=False, sort_keys=True)}
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, field.type)
        for field, column in ((field, columns[field.name]) for field in _SCHEMA)
    ]
    # One record batch: the columns then lie in the file as they do in memory, so numpy can look at them where they are.
    batch = pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA.with_metadata(metadata))
    path = root / MANIFEST_NAME
    with whole_file(path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
    return path


def _reload(root: Path) -> Manifest:
    return Manifest.load(root, check_shards=False)


def _encode(names) -> tuple[list[str], np.ndarray]:
    """Sorted distinct names, and int32 [utterances] indices into them."""
    encoded = names if isinstance(names, pa.DictionaryArray) else _strings(names).dictionary_encode()
    distinct = encoded.dictionary.to_pylist()
    order = sorted(range(len(distinct)), key=distinct.__getitem__)
    rank = np.empty(len(distinct), np.int32)
    rank[order] = np.arange(len(distinct), dtype=np.int32)
    return [distinct[k] for k in order], rank[encoded.indices.to_numpy()]


def _strings(values) -> pa.LargeStringArray:
    return values if isinstance(values, pa.LargeStringArray) else pa.array(values, pa.large_string())


def _fingerprint(columns: dict, head: dict, content: str) -> str:
    digest = hashlib.sha256(json.dumps([head["languages"], head["corpora"]]).encode())
    ids = columns["id"]
    text = ids.buffers()[2]
    ends = offsets_of(ids)
    for first in range(0, len(ids), 1 << 20):  # in pieces: all at once would be gigabytes at tens of millions
        digest.update(np.diff(ends[first : first + (1 << 20) + 1]).tobytes())  # so that ["ab", "c"] is not ["a", "bc"]
    digest.update(text[int(ends[0]) : int(ends[-1])] if text else b"")
    for name in ("language", "corpus", "split", "samples"):
        digest.update(np.ascontiguousarray(columns[name]).tobytes())
    digest.update(content.encode())
    return digest.hexdigest()


def _read_head(path: Path, table: pa.Table) -> dict:
    try:
        head = json.loads((table.schema.metadata or {})[b"manifest"])
        kind, version = head["format"], head["version"]
    except (KeyError, TypeError, ValueError):
        kind, version = None, None
    if kind != FORMAT:
        raise ManifestError(
            f"{path} is an Arrow file, but not a manifest that `python -m data_pipelines prepare` wrote"
        )
    if version != FORMAT_VERSION:
        raise ManifestError(f"{path} has format version {version}, this code reads {FORMAT_VERSION}: prepare it again")
    return head


def _check_counts(path: Path, manifest: Manifest) -> None:
    shards = len(manifest.shard_names)
    if not len(manifest.shard_records) == len(manifest.shard_bytes) == shards:
        raise ManifestError(f"{path} lists {shards} shards, but record counts or sizes for another number")
    if len(manifest) and not (0 <= manifest.shard.min() and manifest.shard.max() < shards):
        raise ManifestError(f"{path} has utterances in a shard that it does not list (it lists {shards})")
    counted = np.bincount(manifest.shard, minlength=shards)
    for wrong in np.flatnonzero(counted != manifest.shard_records):
        raise ManifestError(
            f"{path} has {counted[wrong]} utterances in {manifest.shard_names[wrong]}, "
            f"which is listed with {manifest.shard_records[wrong]} records"
        )
    inside = (0 <= manifest.record) & (manifest.record < manifest.shard_records[manifest.shard])
    if not inside.all():
        raise ManifestError(f"{path} has utterances past the end of their shard")
    for name, names in (("language", manifest.languages), ("corpus", manifest.corpora), ("speaker", manifest.speakers)):
        codes = getattr(manifest, name)
        if len(codes) and not (0 <= codes.min() and codes.max() < len(names)):
            raise ManifestError(f"{path} has a {name} index outside of its {len(names)} names")


def _check_shards(manifest: Manifest) -> None:
    if storage.origin_of(manifest.root) is not None:
        storage.check_sizes(manifest.root, manifest.shard_names, manifest.shard_bytes.tolist())
        return
    for name, size in zip(manifest.shard_names, manifest.shard_bytes.tolist(), strict=True):
        shard = manifest.root / name
        try:
            found = shard.stat().st_size
        except FileNotFoundError:
            raise ManifestError(f"{shard} is missing: copy it again, or prepare the corpus again") from None
        if found != size:
            raise ManifestError(
                f"{shard} has {found} bytes, but was written with {size}: it was cut or replaced; "
                "copy it again, or delete manifest.arrow and prepare again"
            )
