"""From finished shards to quarantine.tsv and manifest.arrow, one by one: their tables are never in memory together."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines.atomic import TEMPORARY_PREFIX, whole_file
from data_pipelines.columns import Names, Numbers, Strings, offsets_of
from data_pipelines.corpora import Rejected
from data_pipelines.manifest import SHARD_FOLDER, Split, write_manifest
from data_pipelines.plan_shards import Plan, Planned, PrepareError, bar_if_long
from data_pipelines.shards import Tally, read_shard

QUARANTINE_NAME = "quarantine.tsv"
_ONE_FIELD = dict.fromkeys(map(ord, "\t\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), " ")


class Merged(NamedTuple):
    """The `tally` of all shards, and all that was `rejected`."""

    tally: Tally
    rejected: tuple[Rejected, ...]


def merge_shards(
    shards: Sequence[Planned], plan: Plan, listed_rejected: Sequence[Rejected], out: Path, *, progress: bool = False
) -> Merged:
    """Writes quarantine.tsv and, last of all, manifest.arrow; deletes shards of older plans.

    For a moment, the manifest's columns lie in files without names in `out` too, and so take its space twice.

    Raises PrepareError: a shard that is not whole, no training clip that is usable. Raises CannotWrite.
    """
    rejected, tally = list(listed_rejected), Tally()
    columns = _Columns(out)
    names, counts, sizes = [], [], []
    content = hashlib.sha256()
    for planned in bar_if_long(shards, len(shards), "merging", unit="shard", shown=progress):
        shard = read_shard(planned.name, out)
        if shard is None:
            raise PrepareError(f"shard {planned.name} in {out} is not whole after it was written: is the disk sound?")
        tally += shard.tally
        rejected += shard.rejected
        content.update("".join(shard.hashes).encode())
        if shard.tally.utterances:
            columns.append(shard.table)
            names.append(f"{SHARD_FOLDER}/{shard.name}.arrayrecord")
            counts.append(shard.tally.utterances)
            sizes.append(shard.bytes)
    rejected = sorted(rejected, key=lambda r: (r.row, r.path))
    tally = tally._replace(clips=tally.clips + len(listed_rejected), rejected=len(rejected))
    _write_quarantine(out, rejected)
    whole = columns.take()
    if Split.TRAIN not in np.unique(whole["split"]):
        reasons = Counter(r.reason for r in rejected).most_common(3)
        raise PrepareError(
            f"no training clip is usable ({len(rejected)} of {tally.clips} clips left out: "
            f"{'; '.join(f'{n} x {reason}' for reason, n in reasons)}); see {out / QUARANTINE_NAME}"
        )
    begins = np.cumsum([0, *counts[:-1]])
    write_manifest(
        out,
        **whole,
        shard=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        record=np.arange(sum(counts), dtype=np.int32) - np.repeat(begins.astype(np.int32), counts),
        shard_names=names,
        shard_records=counts,
        shard_bytes=sizes,
        content=content.hexdigest(),
        facts={"plan": plan.digest, "options": plan.summary["options"], "tally": tally},
    )
    current = {planned.name for planned in shards}
    for path in (out / SHARD_FOLDER).iterdir():
        temporary = path.name.startswith(TEMPORARY_PREFIX)  # another run's, where there are no locks
        if path.suffix in (".arrow", ".arrayrecord") and path.stem not in current and not temporary:
            path.unlink()
    return Merged(tally, tuple(rejected))


class _Columns:
    """The columns of all shards' tables (`shards.TABLE`), as `write_manifest` takes them."""

    def __init__(self, folder: Path):
        self._numbers = {name: Numbers(dtype, folder=folder) for name, dtype in (("samples", "i8"), ("split", "i1"))}
        self._strings = {name: Strings(folder=folder) for name in ("id", "text", "licence")}
        self._names = {name: Names(folder=folder) for name in ("language", "corpus", "speaker")}
        self._clips, self._ends = Strings(folder=folder), Numbers(np.int64, folder=folder)
        self._ends.append([0])
        self._count = 0

    def append(self, table: pa.Table) -> None:
        for batch in table.to_batches():
            for name, column in self._numbers.items():
                column.append(batch.column(name).to_numpy())
            for name, column in self._strings.items():
                column.append(batch.column(name))
            for name, column in self._names.items():
                encoded = batch.column(name).dictionary_encode()
                column.append_codes(encoded.indices.to_numpy(), encoded.dictionary.to_pylist())
            lists = batch.column("clip_names")
            ends = offsets_of(lists)
            self._clips.append(lists.values[int(ends[0]) : int(ends[-1])])
            self._ends.append(ends[1:] - ends[0] + self._count)
            self._count += int(ends[-1] - ends[0])

    def take(self) -> dict:
        columns = {**self._numbers, **self._strings, **self._names}
        ends = pa.array(self._ends.take())
        clips = pa.LargeListArray.from_arrays(ends, self._clips.take())
        return {name: column.take() for name, column in columns.items()} | {"clip_names": clips}


def read_quarantine(out: Path) -> tuple[Rejected, ...]:
    """What an earlier `merge_shards` has left out."""
    try:
        lines = (out / QUARANTINE_NAME).read_text(encoding="utf-8").splitlines()[1:]
    except OSError:
        return ()
    fields = (line.split("\t", maxsplit=2) for line in lines)
    return tuple(Rejected(path, int(row), reason) for path, row, reason in fields)


def _write_quarantine(out: Path, rejected: list[Rejected]) -> None:
    with whole_file(out / QUARANTINE_NAME) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write("path\trow\treason\n")
        for r in rejected:
            file.write("\t".join(_field(value) for value in (r.path, r.row, r.reason)) + "\n")


def _field(value: object) -> str:
    return str(value).encode(errors="backslashreplace").decode().translate(_ONE_FIELD)
