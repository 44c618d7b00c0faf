"""The sorted table that a draw looks rows up in: utterances by static length, language and corpus, kept for next time.

For 25 million utterances it takes seconds to sort and is then read in a fraction of one: a corpus of a million
utterances or more gets a file of it in its folder `plans`, memory-mapped by all processes of the machine. Its name says
of which corpus and which lengths and draw it is; it is written whole or not at all, checked when it is opened, and made
again if anything is wrong with it.
"""

import contextlib
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.atomic import whole_file
from data_pipelines.balance import DrawConfig, SamplingError, declared_rows, subset_seconds
from data_pipelines.batch import SAMPLE_RATE
from data_pipelines.crops import length_class
from data_pipelines.manifest import Manifest, Split
from data_pipelines.permutations import hash64, permute

PLAN_FOLDER = "plans"
PLAN_VERSION = 1
KEPT_FROM = 1_000_000  # utterances; below that, sorting takes less time than looking for a file
_CHUNK = 1 << 20  # utterances looked at in one piece
_MAGIC = b"speech-plan\n"


@dataclass(frozen=True, eq=False)
class Plan:
    """Utterances that may be drawn, sorted by static length, then language and corpus; a leaf is one of each.

    Attributes:
        order: int32 [utterances], rows of the manifest. classes: int64 [lengths + 1], where each length begins in it.
        ends: int64 [utterances], inside each static length the running sum of slots; an utterance of n times that
            length has n. Of a length of which every utterance has one slot, it is left out (see `multiple`).
        multiple: bool [lengths], whether some utterance of it has several slots.
        leaf_class, leaf_pair, leaf_first, leaf_slots: int64 [leaves]: static length; number of the pair; place of its
            first utterance in `order`; slots.
        pairs: int64 [pairs, 2], (language, corpus). pair_samples, pair_utterances: int64 [pairs].
    """

    order: np.ndarray
    classes: np.ndarray
    ends: np.ndarray
    multiple: np.ndarray
    leaf_class: np.ndarray
    leaf_pair: np.ndarray
    leaf_first: np.ndarray
    leaf_slots: np.ndarray
    pairs: np.ndarray
    pair_samples: np.ndarray
    pair_utterances: np.ndarray

    def ends_of(self, place: int) -> np.ndarray | None:
        """The running sum of slots of static length number `place`; None where every utterance has one slot."""
        if not self.multiple[place]:
            return None
        counts = np.diff(self.classes) * self.multiple
        first = int(counts[:place].sum())
        return self.ends[first : first + int(counts[place])]


def load_plan(manifest: Manifest, *, lengths: Sequence[int], cfg: DrawConfig, split: Split) -> Plan:
    """The plan: from its file if there is one and it is sound, else made; see `make_plan` for what it raises."""
    if len(manifest) < KEPT_FROM:
        return make_plan(manifest, lengths=lengths, cfg=cfg, split=split)
    path = plan_path(manifest, lengths=lengths, cfg=cfg, split=split)
    plan = read_plan(path)
    if plan is None:
        plan = make_plan(manifest, lengths=lengths, cfg=cfg, split=split)
        with contextlib.suppress(OSError):  # a full or read-only disk: it is made again next time
            write_plan(path, plan)
    return plan


def plan_path(manifest: Manifest, *, lengths: Sequence[int], cfg: DrawConfig, split: Split) -> Path:
    """Where the plan of this corpus, these lengths and this draw is kept."""
    said = [PLAN_VERSION, list(lengths), dataclasses.asdict(cfg), int(split)]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return manifest.root / PLAN_FOLDER / f"{manifest.fingerprint[:24]}-{digest[:24]}.plan"


def make_plan(manifest: Manifest, *, lengths: Sequence[int], cfg: DrawConfig, split: Split) -> Plan:
    """Sorts the utterances. About 30 bytes an utterance, in pieces where more would be needed.

    Raises SamplingError: an empty split. Raises CropError: an utterance shorter than the smallest length.
    """
    rows = declared_rows(manifest, split, cfg.corpora).astype(np.int32)
    if not len(rows):
        of = f" of {', '.join(cfg.corpora)}" if cfg.corpora else ""
        raise SamplingError(f"the manifest has no {Split(split).name} utterances{of} to draw from")
    corpora = len(manifest.corpora)
    grid = len(manifest.languages) * corpora
    rows = _subset(manifest, rows, cfg) if cfg.subset_hours is not None else rows
    key = np.empty(len(rows), np.uint16 if len(lengths) * grid <= 1 << 16 else np.int64)  # 16 bits are sorted by radix
    leaf_slots = np.zeros(len(lengths) * grid, np.int64)
    pair_samples = np.zeros(grid, np.int64)
    multiple = np.zeros(len(lengths), np.bool_)
    for first in range(0, len(rows), _CHUNK):
        piece = rows[first : first + _CHUNK]
        samples = manifest.samples[piece]
        if samples.min() < lengths[0]:
            length_class(manifest.samples[rows], lengths=lengths, describe=lambda i: manifest.describe(rows[i]))
        found = length_class(samples, lengths=lengths)
        pair = manifest.language[piece].astype(np.int64) * corpora + manifest.corpus[piece]
        slots = samples // np.asarray(lengths)[found]
        key[first : first + _CHUNK] = where = found * grid + pair
        leaf_slots += np.bincount(where, weights=slots, minlength=len(leaf_slots)).astype(np.int64)
        pair_samples += np.bincount(pair, weights=samples, minlength=grid).astype(np.int64)
        multiple |= np.bincount(found, weights=slots > 1, minlength=len(lengths)) > 0
    counts = np.bincount(key, minlength=len(leaf_slots))
    order = rows[np.argsort(key, kind="stable")]
    del key
    classes = np.concatenate([[0], np.cumsum(counts.reshape(len(lengths), grid).sum(1))])
    ends = [
        np.cumsum(manifest.samples[order[classes[place] : classes[place + 1]]] // lengths[place])
        for place in np.flatnonzero(multiple)
    ]
    leaves, present = np.flatnonzero(counts), np.flatnonzero(counts.reshape(len(lengths), grid).sum(0))
    return Plan(
        order=order,
        classes=classes,
        ends=np.concatenate(ends) if ends else np.zeros(0, np.int64),
        multiple=multiple,
        leaf_class=leaves // grid,
        leaf_pair=np.searchsorted(present, leaves % grid),
        leaf_first=(np.cumsum(counts) - counts)[leaves],
        leaf_slots=leaf_slots[leaves],
        pairs=np.stack([present // corpora, present % corpora], 1),
        pair_samples=pair_samples[present],
        pair_utterances=counts.reshape(len(lengths), grid).sum(0)[present],
    )


def _subset(manifest: Manifest, rows: np.ndarray, cfg: DrawConfig) -> np.ndarray:
    """Of `rows`, those that `cfg.subset_hours` leaves: of each cut pair a shuffled choice, until it has its seconds."""
    corpora = len(manifest.corpora)
    pair = manifest.language[rows] * np.int32(corpora) + manifest.corpus[rows]
    seconds = np.bincount(pair, weights=manifest.samples[rows]) / SAMPLE_RATE
    named = {(int(n) // corpora, int(n) % corpora): float(seconds[n]) for n in np.flatnonzero(seconds)}
    kept = np.ones(len(rows), np.bool_)
    for (language, corpus), allowed in subset_seconds(named, cfg=cfg).items():
        places = np.flatnonzero(pair == language * corpora + corpus)
        name = f"{manifest.languages[language]}\0{manifest.corpora[corpus]}".encode()
        shuffled = places[permute(np.arange(len(places)), size=len(places), seed=hash64(zlib.crc32(name)))]
        samples = manifest.samples[rows[shuffled]]
        kept[shuffled[np.cumsum(samples) - samples >= allowed * SAMPLE_RATE]] = False
    return rows[kept]


def write_plan(path: Path, plan: Plan) -> None:
    """Writes the plan, whole or not at all; deletes those of other states of the corpus in the same folder."""
    path.parent.mkdir(exist_ok=True)
    for old in path.parent.glob("*.plan"):
        if old.name.split("-")[0] != path.name.split("-")[0]:
            old.unlink(missing_ok=True)
    arrays = {field.name: np.ascontiguousarray(getattr(plan, field.name)) for field in dataclasses.fields(plan)}
    head = json.dumps({name: [array.dtype.str, array.shape] for name, array in arrays.items()}).encode() + b"\n"
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        checksum = zlib.crc32(head)
        for array in arrays.values():
            checksum = zlib.crc32(array.reshape(-1).view(np.uint8), checksum)
        file.write(_MAGIC + f"{checksum:08x} {len(head):08d}\n".encode() + head)
        for array in arrays.values():
            file.write(b"\0" * (-file.tell() % 64))
            array.tofile(file)


def read_plan(path: Path) -> Plan | None:
    """The plan in a file, memory-mapped; None if there is none, or not a whole and sound one."""
    try:
        raw = np.memmap(path, np.uint8, "r")
        at = len(_MAGIC) + 18
        if bytes(raw[: len(_MAGIC)]) != _MAGIC:
            return None
        said, size = bytes(raw[len(_MAGIC) : at]).split()
        head = bytes(raw[at : at + int(size)])
        checksum, arrays, at = zlib.crc32(head), {}, at + int(size)
        for name, (kind, shape) in json.loads(head).items():
            at += -at % 64
            count = int(np.prod(shape)) * np.dtype(kind).itemsize
            piece = raw[at : at + count]
            checksum = zlib.crc32(piece, checksum)
            arrays[name] = piece.view(kind).reshape(shape)
            at += count
        return Plan(**arrays) if checksum == int(said, 16) else None
    except (OSError, ValueError, TypeError):
        return None
