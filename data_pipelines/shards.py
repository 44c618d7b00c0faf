"""One shard of a prepared corpus: decode some clips, join short neighbours, write the records and a table of them.

This is what `prepare` runs in worker processes; it imports nothing heavy. A shard is a pure function of its task, to
the byte, and is either whole on disk or absent.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgpack
import numpy as np
import pyarrow as pa

from data_pipelines.atomic import cannot_write, whole_file
from data_pipelines.audio import AudioError, encode_flac
from data_pipelines.batch import RECEPTIVE_FIELD, SAMPLE_RATE
from data_pipelines.containers import Containers
from data_pipelines.corpora import Clip, CorpusError, Rejected
from data_pipelines.folders import NOT_THE_FILES
from data_pipelines.manifest import SHARD_FOLDER, Split

WRITER_OPTIONS = "group_size:1,uncompressed"  # one record a read; FLAC does not compress further
RECIPE = 5  # goes into every shard's name: raise it when the same task would give other bytes
LENGTH_TOLERANCE = 2  # samples by which a resampled clip, or Ogg, may differ from the length that the table gives
# Of MP3, decoders disagree by what the encoder put before and after: a frame of 1152 samples or two (Lhotse's manifests
# of Common Voice give up to 2,550 more than decode: its issues 1180 and 1250).
MP3_TOLERANCE = 3 * 1152
BETWEEN_TEXTS = " | "
HASH_BYTES = 16  # of a clip's samples: two of 25 million clips meet by chance once in 10^24 corpora

TABLE = pa.schema(
    [
        pa.field("id", pa.large_string(), nullable=False),
        pa.field("clip_names", pa.large_list(pa.large_string()), nullable=False),
        pa.field("text", pa.large_string()),
        pa.field("licence", pa.large_string()),
        pa.field("samples", pa.int64(), nullable=False),
        pa.field("language", pa.large_string(), nullable=False),
        pa.field("corpus", pa.large_string(), nullable=False),
        pa.field("speaker", pa.large_string(), nullable=False),
        pa.field("split", pa.int8(), nullable=False),
    ]
)

T = TypeVar("T")


class Joining(NamedTuple):
    """How short training clips become utterances; all in samples. See `join_neighbours`."""

    join: int
    minimum: int


class Filters(NamedTuple):
    """Which clips that decode are left out all the same, each with its reason in the quarantine list.

    Attributes:
        min_seconds, max_seconds: how long a clip must and may be. Longer clips are left out, not cut: a transcript
            cannot be cut with them. (Without a maximum, they are kept whole, and training crops them.)
        min_peak_dbfs, min_rms_dbfs: how loud its loudest sample and its root mean square must be, in dB re full scale.
    """

    min_seconds: float = 0.0
    max_seconds: float | None = None
    min_peak_dbfs: float | None = None
    min_rms_dbfs: float | None = None

    def reason(self, waveform: np.ndarray) -> str | None:
        """Why `waveform` [samples], int16 at 16 kHz, is left out; None where it is not."""
        seconds = len(waveform) / SAMPLE_RATE
        if seconds < self.min_seconds:
            return f"shorter than {self.min_seconds:g} s: {seconds:.3f} s"
        if self.max_seconds is not None and seconds > self.max_seconds:
            return f"longer than {self.max_seconds:g} s: {seconds:.3f} s"
        if self.min_peak_dbfs is not None or self.min_rms_dbfs is not None:
            full = waveform.astype(np.float64) / 32768
            for what, value, least in (
                ("peak", np.abs(full).max(), self.min_peak_dbfs),
                ("RMS", np.sqrt(np.mean(full**2)), self.min_rms_dbfs),
            ):
                level = 20 * np.log10(max(float(value), 1e-10))
                if least is not None and level < least:
                    return f"too quiet: {what} under {least:g} dBFS, {level:.1f}"
        return None


NO_FILTERS = Filters()


class Duplicate(NamedTuple):
    """Clip number `place` of a task has the same samples as the clip called `first`, which is kept."""

    place: int
    first: str


class ShardTask(NamedTuple):
    """Clips of one split and language, in order, that become one shard.

    Attributes:
        name: file name without suffix; holds a hash of all else but `folders` and `times`, so no other task takes its
            place: "fra-train-00003-5f3ac1d2e4b0".
        folders: the folder of every `Clip.root`. clips: sorted by corpus, speaker, path. joining: the rule for training
            clips. filters: what is left out. duplicates: clips that are left out because they are elsewhere already.
        times: a hash of when the clips' files were changed last; it is kept with the shard.
    """

    name: str
    folders: Mapping[str, str]
    clips: Sequence[Clip]
    joining: Joining
    filters: Filters = NO_FILTERS
    duplicates: tuple[Duplicate, ...] = ()
    times: str = ""


class Tally(NamedTuple):
    """What went in and what came out, in samples at 16 kHz: `read` + `repeated` = `written` + `left_out`.

    Attributes:
        clips, utterances: how many were listed, and how many were written.
        read: samples of every clip that decoded. written: samples in the shard. repeated: samples written once more
            because a speaker had too little. left_out: samples of clips that decoded but were not used.
        rejected: clips left out. clipped: samples beyond full scale that were written as full scale.
    """

    clips: int = 0
    utterances: int = 0
    read: int = 0
    written: int = 0
    repeated: int = 0
    left_out: int = 0
    rejected: int = 0
    clipped: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(a + b for a, b in zip(self, other, strict=True)))


class Shard(NamedTuple):
    """A finished shard: its `name`, record file's size in `bytes` (0: no record, no file), table, tally and rejects.

    `times` is its task's.

    `hashes` has one of each of the task's clips, in hexadecimal: that of its samples, "" where it was left out for
    another reason than that the same samples are elsewhere.
    """

    name: str
    bytes: int
    table: pa.Table
    tally: Tally
    rejected: tuple[Rejected, ...]
    hashes: tuple[str, ...]
    times: str


class _Sound(NamedTuple):
    clip: Clip
    waveform: np.ndarray  # int16 [samples]
    clipped: int  # samples
    source_rate: int  # Hz, before resampling


def name_without(name: str, duplicates: tuple[Duplicate, ...]) -> str:
    """The name of the shard `name` less these of its clips; it begins with that."""
    return f"{name}-{hashlib.sha256(json.dumps(duplicates, ensure_ascii=False).encode()).hexdigest()[:8]}"


def join_neighbours(items: Iterable[T], joining: Joining, *, samples: Callable[[T], int]) -> Iterator[list[T]]:
    """Groups the consecutive clips of one speaker into utterances; holds at most two of them at a time.

    Clips are added until an utterance has `joining.join` samples; what is left over at the end is added to the last
    utterance. Where all clips together are shorter than `joining.minimum`, they are repeated from the first on until
    they are not. (mHuBERT-147, arXiv:2406.06371, concatenates short clips, too.)
    """
    whole: list[T] = []
    growing: list[T] = []
    total = 0
    for item in items:
        growing.append(item)
        total += samples(item)
        if total >= joining.join:
            if whole:
                yield whole
            whole, growing, total = growing, [], 0
    if whole:
        yield whole + growing
    elif growing:
        distinct = len(growing)
        while total < joining.minimum:
            item = growing[len(growing) % distinct]
            growing.append(item)
            total += samples(item)
        yield growing


def write_shard(task: ShardTask, out: str | Path) -> Tally:
    """Decodes the task's clips; writes out/shards/NAME.arrayrecord, then NAME.arrow, which says that it is whole.

    Bad clips are left out and listed in the table's metadata. Raises CannotWrite naming the file (a full disk, for
    one) after deleting what was half written, and CorpusError where not a clip but its corpus cannot be read.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    records = Path(out) / SHARD_FOLDER / f"{task.name}.arrayrecord"
    rejected: list[Rejected] = []
    read = repeated = clipped = 0
    rates: dict[int, int] = {}  # samples (at 16 kHz) by source rate in Hz: what `inspect` shows
    rows: list[dict] = []
    hashes: list[str] = []
    firsts = dict(task.duplicates)

    def sounds(clips: Iterable[Clip]) -> Iterator[_Sound]:
        nonlocal read, clipped
        for clip in clips:
            try:
                sound = _load_again(containers, clip, task)
            except AudioError as error:
                hashes.append("")
                rejected.append(Rejected(clip.where, clip.row, error.reason, error.samples))
                read += error.samples
                continue
            read += len(sound.waveform)
            first = firsts.get(len(hashes))
            hashes.append(hashlib.blake2b(sound.waveform.tobytes(), digest_size=HASH_BYTES).hexdigest())
            if first is not None:
                reason = f"duplicate: the same samples as {first}"
                rejected.append(Rejected(clip.where, clip.row, reason, len(sound.waveform)))
                continue
            clipped += sound.clipped
            rates[sound.source_rate] = rates.get(sound.source_rate, 0) + len(sound.waveform)
            yield sound

    def utterances() -> Iterator[list[_Sound]]:
        for group in _speakers(task.clips):
            if group[0].split is Split.TRAIN:
                yield from join_neighbours(sounds(group), task.joining, samples=lambda sound: len(sound.waveform))
            else:
                yield from ([sound] for sound in sounds(group))

    try:
        with Containers(task.folders) as containers, whole_file(records) as temporary:
            writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
            for parts in utterances():
                row, packed = _utterance(parts)
                writer.write(packed)
                rows.append(row)
                repeated += sum(len(s.waveform) for s in parts) - sum(
                    {s.clip.id: len(s.waveform) for s in parts}.values()
                )
            writer.close()
            _check_written(temporary, len(rows))
        if not rows:
            records.unlink()
        size = records.stat().st_size if rows else 0
        written = sum(row["samples"] for row in rows)
        left_out = sum(r.samples for r in rejected)
        tally = Tally(len(task.clips), len(rows), read, written, repeated, left_out, len(rejected), clipped)
        head = {"bytes": size, "tally": tally, "rejected": rejected, "hashes": hashes, "times": task.times}
        head["source_rates"] = dict(sorted(rates.items()))
        write_shard_table(task.name, out, pa.Table.from_pylist(rows, schema=TABLE), head)
    except (OSError, RuntimeError, pa.ArrowException) as error:
        raise cannot_write(error, records) from error
    return tally


def write_shard_table(name: str, out: str | Path, table: pa.Table, head: dict) -> None:
    """Writes out/shards/NAME.arrow: a `table` with the columns of `TABLE`, and `head`, which `read_shard` reads."""
    table = table.replace_schema_metadata({"shard": json.dumps(head, ensure_ascii=False)})
    path = Path(out) / SHARD_FOLDER / f"{name}.arrow"
    with whole_file(path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)


def read_shard(name: str, out: str | Path) -> Shard | None:
    """The finished shard of this name, or None where it is not there whole (its table damaged, its records cut)."""
    path = Path(out) / SHARD_FOLDER / f"{name}.arrow"
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
        head = json.loads(table.schema.metadata[b"shard"])
        rejected = tuple(Rejected(*entry) for entry in head["rejected"])
        tally, hashes, times = Tally(*head["tally"]), tuple(head["hashes"]), head["times"]
        shard = Shard(name, head["bytes"], table, tally, rejected, hashes, times)
        records = path.with_suffix(".arrayrecord")
        found = records.stat().st_size if shard.bytes else 0
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    return shard if found == shard.bytes and table.schema.equals(TABLE) else None


def _load_again(containers: Containers, clip: Clip, task: ShardTask) -> _Sound:
    """`_load`; a read that fails is tried once more, since a network disk may stumble.

    Raises CorpusError if that fails too, and not for a fault of the clip's file: it must not be left out for ever
    because a disk was away. Raises AudioError as `_load` does.
    """
    try:
        return _load(containers, clip, task.filters)
    except AudioError as error:
        if not isinstance(error.__cause__, OSError):
            raise
    containers.close()
    try:
        return _load(containers, clip, task.filters)
    except AudioError as error:
        if isinstance(error.__cause__, OSError) and _is_away(task.folders[clip.root], error.__cause__):
            raise CorpusError(
                f"{clip.where} {error.reason}, tried twice, and not for a fault of its own: is all of "
                f"{task.folders[clip.root]} there? Then run the same command again"
            ) from error
        raise


def _is_away(folder: str, error: OSError) -> bool:
    """Whether a read failed for the sake of the disk or of this process: its number says so, or the folder is gone."""
    if error.errno in NOT_THE_FILES:
        return True
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None  # where a disk was mounted
    except OSError:
        return True


def _load(containers: Containers, clip: Clip, filters: Filters) -> _Sound:
    """Raises AudioError: undecodable, shorter than one frame, not as long as the table says, left out by a filter."""
    sound = containers.decode(clip)
    samples = len(sound.waveform)
    if samples < RECEPTIVE_FIELD:
        reason = f"too short: {samples} samples, one frame needs {RECEPTIVE_FIELD}"
        raise AudioError(clip.where, reason, samples)
    if clip.samples is not None:
        exact = sound.source_rate == SAMPLE_RATE and sound.source_format != "OGG"
        tolerance = 0 if exact else LENGTH_TOLERANCE
        tolerance = MP3_TOLERANCE if sound.source_format == "MP3" else tolerance
        if min(abs(clip.samples - samples), abs(clip.samples - sound.source_frames)) > tolerance:
            raise AudioError(clip.where, f"n_samples is {clip.samples} in the table, {samples} in the file", samples)
    int16 = np.clip(np.rint(sound.waveform * np.float32(32768)), -32768, 32767).astype(np.int16)
    reason = filters.reason(int16)
    if reason is not None:
        raise AudioError(clip.where, reason, samples)
    return _Sound(clip, int16, int((np.abs(sound.waveform) > 1.0).sum()), sound.source_rate)


def _speakers(clips: Iterable[Clip]) -> Iterator[list[Clip]]:
    group: list[Clip] = []
    for clip in clips:
        if group and (clip.corpus, clip.speaker) != (group[0].corpus, group[0].speaker):
            yield group
            group = []
        group.append(clip)
    if group:
        yield group


def _utterance(parts: list[_Sound]) -> tuple[dict, bytes]:
    clips = [part.clip for part in parts]
    waveform = np.concatenate([part.waveform for part in parts])
    row = {
        "id": clips[0].id,
        "clip_names": [clip.id for clip in clips],
        "text": BETWEEN_TEXTS.join(clip.text for clip in clips) if all(clip.text for clip in clips) else None,
        "licence": BETWEEN_TEXTS.join(dict.fromkeys(clip.licence for clip in clips if clip.licence)) or None,
        "samples": len(waveform),
        "language": clips[0].language,
        "corpus": clips[0].corpus,
        "speaker": clips[0].speaker,
        "split": int(clips[0].split),
    }
    return row, msgpack.packb({"id": row["id"], "samples": len(waveform), "audio": encode_flac(waveform)})


def _check_written(path: Path, records: int) -> None:
    """The writer may report a full disk late: what was written is opened and counted before it gets its name."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    found = reader.num_records()
    reader.close()
    if found != records:
        raise OSError(errno.EIO, f"only {found} of {records} records reached the disk", str(path))
