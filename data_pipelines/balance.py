"""How the drawn seconds are shared out over languages and corpora: declared in seconds, in two levels."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_pipelines.manifest import Manifest, Split


class SamplingError(ValueError):
    """Exponents, lengths or a corpus from which nothing can be drawn as asked."""


@dataclass(frozen=True)
class DrawConfig:
    """How the drawn seconds are shared out.

    Attributes:
        language_exponent: alpha; a language's share is proportional to its amount ** alpha. 1 is as found, 0 is equal.
        corpus_exponent: beta; inside a language, a corpus' share is proportional to its amount ** beta.
        first: which level comes first. "corpus" is XLS-R's order (2111.09296): a corpus' share is proportional to its
            amount ** beta, and inside a corpus a language's to its amount there ** alpha.
        corpora: names of the corpora that may be drawn from; none named: all of them.
        counted: what an amount is, and what the shares are shares of: "seconds", or "utterances" as mHuBERT-147's code
            has it, where a language's share is one of the drawn rows, whatever their lengths.
        cap_hours, floor_hours: a language with more, or less, counts as one that has just so many hours; its corpora
            count in proportion. This is done before exponents. It changes how often a language is drawn, not what of
            it.
        subset_hours: only so many hours of a language may be drawn at all: a fixed choice of its utterances,
            shared out over its corpora by `corpus_exponent`. A language with less is drawn whole.
    """

    language_exponent: float = 1.0
    corpus_exponent: float = 1.0
    first: Literal["language", "corpus"] = "language"
    corpora: tuple[str, ...] = ()
    counted: Literal["seconds", "utterances"] = "seconds"
    cap_hours: float | None = None
    floor_hours: float | None = None
    subset_hours: float | None = None

    def __post_init__(self):
        for name in ("language_exponent", "corpus_exponent"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise SamplingError(f"{name} is {value}; it must be finite and not negative (1: as found, 0: equal)")
        for name in ("cap_hours", "floor_hours", "subset_hours"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise SamplingError(f"{name} is {value}; it must be positive hours, or None")
        if self.cap_hours is not None and self.floor_hours is not None and self.cap_hours < self.floor_hours:
            raise SamplingError(f"cap_hours is {self.cap_hours}, below floor_hours, {self.floor_hours}")


# Published rules, as draws. XLS-R's exponents: 2111.09296, recalled; the order of levels is that of its text.
XLS_R = DrawConfig(
    language_exponent=0.5,
    corpus_exponent=0.5,
    first="corpus",
    corpora=("voxpopuli", "mls", "commonvoice", "voxlingua107", "babel"),
)
# utter-project/fairseq, fairseq/data/audio/hubert_dataset.py: get_language_distribution and get_dataset_distribution
# count utterances (their comments say duration); the exponents are those of mhubert147_base.yaml.
MHUBERT_147 = DrawConfig(language_exponent=0.7, corpus_exponent=0.9, counted="utterances")
# WavLabLM's second stage (2309.15317) hears "a balanced subset". Which, is not published; this is our reading of it: 20
# hours of each language at most, and in between the shares of XLS-R's exponents; under 2 hours counts as 2.
BALANCED_SUBSET = DrawConfig(
    language_exponent=0.5, corpus_exponent=0.5, cap_hours=20.0, floor_hours=2.0, subset_hours=20.0
)


def leaf_shares(
    seconds: Mapping[tuple[Hashable, Hashable], float],
    *,
    cfg: DrawConfig,
    utterances: Mapping[tuple[Hashable, Hashable], int] | None = None,
) -> dict[tuple[Hashable, Hashable], float]:
    """{(language, corpus): share of the drawn seconds, or of the drawn rows if `cfg` counts those}; sums to 1.

    p(language) ~ amount ** alpha, p(corpus | language) ~ amount ** beta; or with `cfg.first` "corpus", p(corpus) ~
    amount ** beta, p(language | corpus) ~ amount ** alpha. Amounts are `seconds`, or `utterances` where `cfg` counts
    them; those of a language with more than `cfg.cap_hours` or less than `cfg.floor_hours` are scaled as if it had
    these. Pairs without any seconds are left out.
    Raises SamplingError: negative or not finite seconds, or none at all; utterances are to be counted and not given.
    """
    for pair, amount in seconds.items():
        if not (math.isfinite(amount) and amount >= 0):
            raise SamplingError(f"{pair} has {amount} seconds")
    found = {pair: amount for pair, amount in seconds.items() if amount > 0}
    if not found:
        raise SamplingError("no audio to draw from: every language has zero seconds")
    if cfg.counted == "utterances" and utterances is None:
        raise SamplingError("this draw counts utterances; say how many each language and corpus has")
    present = found if cfg.counted == "seconds" else {pair: float(utterances[pair]) for pair in found}
    languages = _totals(found, 0)
    scale = {name: _clipped(amount, cfg) / amount for name, amount in languages.items()}
    present = {pair: amount * scale[pair[0]] for pair, amount in present.items()}
    exponents = (cfg.language_exponent, cfg.corpus_exponent)
    outer = 0 if cfg.first == "language" else 1  # which half of a pair is the first level
    shares = {}
    for name, share in _powers(_totals(present, outer), exponents[outer]).items():
        inside = {pair: amount for pair, amount in present.items() if pair[outer] == name}
        shares |= {pair: share * part for pair, part in _powers(inside, exponents[1 - outer]).items()}
    return shares


def subset_seconds(
    seconds: Mapping[tuple[Hashable, Hashable], float], *, cfg: DrawConfig
) -> dict[tuple[Hashable, Hashable], float]:
    """{(language, corpus): seconds that may be drawn} under `cfg.subset_hours`; the others are not named.

    A language above it is cut to it: each of its corpora gets a part proportional to seconds ** beta, and what a corpus
    is too small for goes to the others in the same way.
    """
    if cfg.subset_hours is None:
        return {}
    most, cut = cfg.subset_hours * 3600, {}
    for name, total in _totals(seconds, 0).items():
        if total <= most:
            continue
        open_pairs = {pair: amount for pair, amount in seconds.items() if pair[0] == name and amount > 0}
        left = most
        while True:
            parts = {pair: left * part for pair, part in _powers(open_pairs, cfg.corpus_exponent).items()}
            full = [pair for pair, part in parts.items() if part >= open_pairs[pair]]
            if not full:
                break
            left -= math.fsum(open_pairs.pop(pair) for pair in full)
        cut |= parts
    return cut


def _totals(amounts: Mapping[tuple[Hashable, Hashable], float], level: int) -> dict[Hashable, float]:
    totals: dict[Hashable, float] = {}
    for pair, amount in amounts.items():
        totals[pair[level]] = totals.get(pair[level], 0.0) + amount
    return totals


def _clipped(seconds: float, cfg: DrawConfig) -> float:
    if cfg.cap_hours is not None:
        seconds = min(seconds, cfg.cap_hours * 3600)
    if cfg.floor_hours is not None:
        seconds = max(seconds, cfg.floor_hours * 3600)
    return seconds


def declared_rows(
    manifest: Manifest, split: Split, corpora: Sequence[str], *, field: str = "data.draw.corpora"
) -> np.ndarray:
    """Rows of the manifest that belong to `split` and to one of the named `corpora` (all, if none is named), ascending.

    Raises SamplingError naming the corpora that the manifest does not have, and the configuration's `field`.
    """
    rows = manifest.rows(split)
    if not corpora:
        return rows
    missing = [name for name in corpora if name not in manifest.corpora]
    if missing:
        raise SamplingError(
            f"{field} names the corpora {', '.join(missing)}, which were not prepared here; there are "
            f"{', '.join(manifest.corpora)}: prepare those too, or name others with --{field.replace('_', '-')} "
            "(nothing after it: all)"
        )
    codes = [manifest.corpora.index(name) for name in corpora]
    return rows[np.isin(manifest.corpus[rows], codes)]


def _powers(amounts: Mapping[Hashable, float], exponent: float) -> dict[Hashable, float]:
    most = max(amounts.values())
    powers = {key: (amount / most) ** exponent for key, amount in amounts.items()}
    total = math.fsum(powers.values())
    return {key: power / total for key, power in powers.items()}
