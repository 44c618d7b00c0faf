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
        language_exponent: alpha; a language's share is proportional to its seconds ** alpha. 1 is as found, 0 is equal.
        corpus_exponent: beta; inside a language, a corpus' share is proportional to its seconds ** beta. mHuBERT-147
            trains with 0.7 and 0.9 (utter-project's `hubert_dataset.py`, which counts utterances, not seconds).
        first: which level comes first. "corpus" is XLS-R's order (2111.09296): a corpus' share is proportional to its
            seconds ** beta, and inside a corpus a language's to its seconds there ** alpha.
        corpora: names of the corpora that may be drawn from; none named: all of them.
    """

    language_exponent: float = 1.0
    corpus_exponent: float = 1.0
    first: Literal["language", "corpus"] = "language"
    corpora: tuple[str, ...] = ()

    def __post_init__(self):
        for name in ("language_exponent", "corpus_exponent"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise SamplingError(f"{name} is {value}; it must be finite and not negative (1: as found, 0: equal)")


def leaf_shares(
    seconds: Mapping[tuple[Hashable, Hashable], float], *, cfg: DrawConfig
) -> dict[tuple[Hashable, Hashable], float]:
    """{(language, corpus): share of the drawn seconds}; shares sum to 1.

    p(language) ~ seconds ** alpha, p(corpus | language) ~ seconds ** beta; or with `cfg.first` "corpus", p(corpus) ~
    seconds ** beta, p(language | corpus) ~ seconds ** alpha. Pairs without any seconds are left out.
    Raises SamplingError: negative or not finite seconds, or none at all.
    """
    for pair, amount in seconds.items():
        if not (math.isfinite(amount) and amount >= 0):
            raise SamplingError(f"{pair} has {amount} seconds")
    present = {pair: amount for pair, amount in seconds.items() if amount > 0}
    if not present:
        raise SamplingError("no audio to draw from: every language has zero seconds")
    exponents = (cfg.language_exponent, cfg.corpus_exponent)
    outer = 0 if cfg.first == "language" else 1  # which half of a pair is the first level
    above: dict[Hashable, float] = {}
    for pair, amount in present.items():
        above[pair[outer]] = above.get(pair[outer], 0.0) + amount
    shares = {}
    for name, share in _powers(above, exponents[outer]).items():
        inside = {pair: amount for pair, amount in present.items() if pair[outer] == name}
        shares |= {pair: share * part for pair, part in _powers(inside, exponents[1 - outer]).items()}
    return shares


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
