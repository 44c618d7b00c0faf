"""What a prepared corpus holds, language by language, what a balance would draw of it, and which rows look wrong.

All but the last comes from the manifest alone, in seconds for a million utterances. Silence, clipping and duplicates
are in the audio, and audio takes decoding: of a bounded sample, or of everything. What was looked at is said.
"""

import base64
import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from data_pipelines.audio import encode_flac
from data_pipelines.balance import DrawConfig, leaf_shares
from data_pipelines.batch import HOP, SAMPLE_RATE
from data_pipelines.manifest import Manifest, Split
from data_pipelines.sources import ShardSource

LENGTH_EDGES = (0, 1, 2, 3, 4, 6, 8, 10, 12, 15, 20, 30, 60)  # seconds; the last bin has no end
QUIET_DB = -60.0  # dB re full scale: a frame of 20 ms under it is silent
SILENT_SHARE = 0.8  # of the frames: an utterance with more of them is suspicious
FULL_SCALE = 32767 / 32768  # 16-bit audio at its limit
CLIPPED_RUN = 3  # samples in a row at full scale: a flat top, where one or two may be a peak
CLIPPED_SHARE = 1e-3  # of the samples: an utterance with more of them is suspicious
CLIP_SECONDS = 3.0  # of a clip to listen to
AUDIO_MEGABYTES = 12.0  # of audio in the page
LISTED = 200  # suspicious rows of one kind that are listed; all are counted
HEARD_SUSPECTS = 40  # suspicious rows with audio in the page


class Rates(NamedTuple):
    """Seconds of a language's source audio by sample rate in Hz; empty where `prepare` noted none."""

    seconds: dict[int, float]


class LanguageSummary(NamedTuple):
    """One language: seconds of all splits and of `train`, source `clips` in `utterances`, lengths in seconds.

    `histogram` counts utterances between `LENGTH_EDGES`; `corpora` has seconds by corpus.
    """

    language: str
    seconds: float
    train: float
    clips: int
    utterances: int
    shortest: float
    median: float
    longest: float
    corpora: dict[str, float]
    histogram: tuple[int, ...]
    rates: Rates


class Suspect(NamedTuple):
    """A row that looks wrong: `kind` is "silent", "clipped" or "duplicate"; `says` holds the numbers."""

    row: int
    kind: str
    says: str


class Heard(NamedTuple):
    """A stretch to listen to: FLAC in base64, of utterance `row`; `name` says which that is."""

    row: int
    language: str
    name: str
    flac: str


class Inspection(NamedTuple):
    """All that is shown of a corpus; `languages` by falling seconds.

    Attributes:
        train_seconds: {(language, corpus): seconds} of the training split, what a balance is computed from.
        decoded: utterances that were decoded, of `utterances`. suspects: every one that was found.
        heard: stretches by language. heard_suspects: stretches of suspicious rows.
    """

    root: Path
    fingerprint: str
    utterances: int
    languages: tuple[LanguageSummary, ...]
    train_seconds: dict[tuple[str, str], float]
    decoded: int
    suspects: tuple[Suspect, ...]
    descriptions: dict[int, str]
    heard: tuple[Heard, ...]
    heard_suspects: tuple[Heard, ...]


class Drawn(NamedTuple):
    """A language's share of the drawn seconds, and how often its training audio is heard (NaN without a run)."""

    share: float
    epochs: float


def inspect(
    manifest: Manifest,
    *,
    sample: int | None = 1000,
    clips: int = 2,
    audio_megabytes: float = AUDIO_MEGABYTES,
    seed: int = 0,
    progress: bool = True,
) -> Inspection:
    """Looks at a corpus; decodes `sample` utterances in search of suspicious ones (None: all of them).

    `clips` stretches of every language are taken to listen to, and fewer where `audio_megabytes` do not hold them all.
    Raises SourceError for a record that cannot be read.
    """
    source = ShardSource(manifest)
    rows = np.arange(len(manifest)) if sample is None else choose_rows(manifest, sample, seed=seed)
    suspects = find_suspects(source, rows, progress=progress)
    budget = int(audio_megabytes * 1e6)
    shown = [suspect.row for suspect in suspects[:HEARD_SUSPECTS]] if clips else []
    heard_suspects = _listen(source, shown, budget // 4)
    spent = sum(len(heard.flac) for heard in heard_suspects)
    heard = _listen(source, _one_by_one(manifest, clips, seed), budget - spent)
    return Inspection(
        root=manifest.root,
        fingerprint=manifest.fingerprint,
        utterances=len(manifest),
        languages=summarise(manifest),
        train_seconds=manifest.seconds(Split.TRAIN, by=("language", "corpus")),
        decoded=len(rows),
        suspects=suspects,
        descriptions={suspect.row: manifest.describe(suspect.row) for suspect in _listed(suspects)},
        heard=heard,
        heard_suspects=heard_suspects,
    )


def summarise(manifest: Manifest) -> tuple[LanguageSummary, ...]:
    """Every language that has an utterance, by falling seconds. Reads the manifest and the tables of the shards."""
    rates = source_rates(manifest)
    order = np.lexsort((manifest.samples, manifest.language))
    lengths = manifest.samples[order] / SAMPLE_RATE
    codes, firsts = np.unique(manifest.language[order], return_index=True)
    ends = [*firsts[1:].tolist(), len(order)]
    train = manifest.seconds(Split.TRAIN)
    corpora: dict[str, dict[str, float]] = {}
    for (language, corpus), seconds in manifest.seconds(by=("language", "corpus")).items():
        corpora.setdefault(language, {})[corpus] = seconds
    clips = np.bincount(manifest.language, weights=manifest.clips, minlength=len(manifest.languages))
    found = []
    for code, first, end in zip(codes.tolist(), firsts.tolist(), ends, strict=True):
        own, language = lengths[first:end], manifest.languages[code]
        found.append(
            LanguageSummary(
                language=language,
                seconds=float(own.sum()),
                train=train.get(language, 0.0),
                clips=int(clips[code]),
                utterances=len(own),
                shortest=float(own[0]),
                median=float(np.median(own)),
                longest=float(own[-1]),
                corpora=corpora[language],
                histogram=tuple(np.histogram(own, bins=[*LENGTH_EDGES, np.inf])[0].tolist()),
                rates=Rates(rates.get(language, {})),
            )
        )
    return tuple(sorted(found, key=lambda one: (-one.seconds, one.language)))


def source_rates(manifest: Manifest) -> dict[str, dict[int, float]]:
    """{language: {Hz: seconds}} as `prepare` noted it beside every shard; without the shards whose tables are gone."""
    first = np.unique(manifest.shard, return_index=True)
    rates: dict[str, dict[int, float]] = {}
    for shard, row in zip(*(part.tolist() for part in first), strict=True):
        try:
            with pa.memory_map(str((manifest.root / manifest.shard_names[shard]).with_suffix(".arrow"))) as table:
                noted = json.loads(pa.ipc.open_file(table).schema.metadata[b"shard"])["source_rates"]
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            continue
        own = rates.setdefault(manifest.languages[manifest.language[row]], {})
        for rate, samples in noted.items():
            own[int(rate)] = own.get(int(rate), 0.0) + samples / SAMPLE_RATE
    return {language: dict(sorted(own.items())) for language, own in rates.items()}


def drawn(
    train_seconds: Mapping[tuple[str, str], float],
    *,
    cfg: DrawConfig,
    steps: int | None = None,
    seconds_per_step: float = 0.0,
) -> dict[str, Drawn]:
    """What a run draws of each language that has training audio. Raises SamplingError where there is none."""
    own: dict[str, float] = {}
    for (language, _), seconds in train_seconds.items():
        own[language] = own.get(language, 0.0) + seconds
    shares: dict[str, float] = {}
    for (language, _), share in leaf_shares(train_seconds, cfg=cfg).items():
        shares[language] = shares.get(language, 0.0) + share
    total = float("nan") if steps is None else steps * seconds_per_step
    return {language: Drawn(share, share * total / own[language]) for language, share in shares.items()}


def choose_rows(manifest: Manifest, count: int, *, seed: int) -> np.ndarray:
    """[rows] int64, ascending: `count` utterances to decode, half of them such as have another of the same length.

    Audio that is there twice has the same length to the sample, so the second half looks where duplicates can be.
    """
    rng = np.random.default_rng(seed)
    if count >= len(manifest):
        return np.arange(len(manifest))
    order = np.argsort(manifest.samples, kind="stable")
    lengths = manifest.samples[order]
    same = np.flatnonzero(np.diff(lengths) == 0)
    # Long utterances first: that two of them have one length by chance is the least likely.
    pairs = same[::-1][: count // 4]
    twins = order[np.concatenate([pairs, pairs + 1])] if len(pairs) else np.zeros(0, np.int64)
    left = np.setdiff1d(np.arange(len(manifest)), twins)
    more = rng.choice(left, count - len(np.unique(twins)), replace=False)
    return np.unique(np.concatenate([twins, more]))


def find_suspects(source: ShardSource, rows: np.ndarray, *, progress: bool = True) -> tuple[Suspect, ...]:
    """The suspicious ones of the utterances `rows`: silent, clipped, or with the samples of one before it."""
    suspects, seen = [], {}
    for row in tqdm(rows.tolist(), unit="utterance", disable=not progress or len(rows) < 200, mininterval=0.5):
        waveform = source.read(row)
        if (quiet := silent_share(waveform)) > SILENT_SHARE:
            suspects.append(Suspect(row, "silent", f"{quiet:.0%} of it under {QUIET_DB:g} dB"))
        if (clipped := clipped_share(waveform)) > CLIPPED_SHARE:
            suspects.append(Suspect(row, "clipped", f"{clipped:.2%} of the samples in flat tops"))
        key = hashlib.sha256(waveform.tobytes()).digest()
        first = seen.setdefault(key, row)
        if first != row:
            suspects.append(Suspect(row, "duplicate", f"the same samples as {source.manifest.describe(first)}"))
    return tuple(suspects)


def silent_share(waveform: np.ndarray) -> float:
    """Share of the whole 20 ms frames of `waveform` [samples] whose mean square is under `QUIET_DB`; 1 without any."""
    frames = waveform[: len(waveform) // HOP * HOP].reshape(-1, HOP)
    if not len(frames):
        return 1.0
    return float((np.einsum("ij,ij->i", frames, frames) < HOP * 10 ** (QUIET_DB / 10)).mean())


def clipped_share(waveform: np.ndarray) -> float:
    """Share of the samples of `waveform` [samples] that lie in `CLIPPED_RUN` or more in a row at full scale."""
    full = np.abs(waveform) >= np.float32(FULL_SCALE)
    if not full.any():
        return 0.0
    edges = np.flatnonzero(np.diff(np.concatenate([[False], full, [False]]).astype(np.int8)))
    runs = edges[1::2] - edges[::2]
    return float(runs[runs >= CLIPPED_RUN].sum() / len(waveform))


def _listed(suspects: tuple[Suspect, ...]) -> list[Suspect]:
    kept: dict[str, list[Suspect]] = {}
    for suspect in suspects:
        kept.setdefault(suspect.kind, []).append(suspect)
    return [suspect for kind in kept.values() for suspect in kind[:LISTED]]


def _one_by_one(manifest: Manifest, clips: int, seed: int) -> list[int]:
    """`clips` rows of every language, first one of each, then a second: a budget that ends early cuts evenly."""
    order = np.argsort(manifest.language, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(manifest.language[order])) + 1) if len(order) else []
    rng = random.Random(seed)
    chosen = [rng.sample(range(len(part)), min(clips, len(part))) for part in parts]
    return [
        int(part[own[turn]])
        for turn in range(clips)
        for part, own in zip(parts, chosen, strict=True)
        if turn < len(own)
    ]


def _listen(source: ShardSource, rows: list[int], budget: int) -> tuple[Heard, ...]:
    """A stretch from the middle of each of `rows`, as many as fit into `budget` bytes of base64."""
    manifest, found = source.manifest, []
    for row in rows:
        samples = min(int(manifest.samples[row]), int(CLIP_SECONDS * SAMPLE_RATE))
        waveform = source.read(row, start=(int(manifest.samples[row]) - samples) // 2, samples=samples)
        flac = base64.b64encode(encode_flac(waveform)).decode()
        budget -= len(flac)
        if budget < 0:
            break
        found.append(Heard(row, manifest.languages[manifest.language[row]], manifest.describe(row), flac))
    return tuple(found)
