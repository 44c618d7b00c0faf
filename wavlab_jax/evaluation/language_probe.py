"""Can languages be told apart from frozen features, in recordings from a corpus that the classifier never heard?

Within a corpus one language is nearly one speaker in one room, so a classifier tested on a random split of the same
corpora recognises rooms and voices: cepstra alone then score far above chance at "language identification" and stay at
chance across corpora. This probe therefore scores **across sources** only.

Protocol, for features [clips, width], one vector a clip (`pooled` makes mean and standard deviation over time of one
layer):

1. Only languages recorded in two or more sources take part.
2. Each source s is held out once. The fold trains on clips of the training split from all *other* sources, and tests on
   the clips of s outside the training split (development and test: the encoder itself never trained on them).
3. A fold's classes are the languages present on both sides; clips of other languages are left out of both. Guessing
   gets 1 / classes right. A fold with fewer than two classes asks nothing and is left out (named in `skipped`).
4. Classifier, the same for every feature set and fixed beforehand (nothing is tuned on what is scored): every dimension
   to zero mean and unit variance, principal components (at most 64) of unit variance each, multinomial logistic
   regression with an L2 penalty and languages weighted equally; all of it fitted on the fold's training clips. The
   components make it fast and keep it from having more directions than clips, whatever the width of the features.
5. The predictions of all folds are pooled. Accuracy is macro: a language's share of right clips, averaged over
   languages. `chance` is the same average of the clips' 1 / classes: what guessing expects. An accuracy means nothing
   without it.

Intervals (`intervals.py`): clips of a language are not independent, so that verdicts rest on the interval that redraws
whole (language, source) cells wherever there are at least five of them; below, only clips can be redrawn, and the
result says so. Comparisons of two feature sets are paired: the same clips, the interval of the difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from wavlab_jax.evaluation import intervals
from wavlab_jax.evaluation.intervals import Interval

MIN_CELLS = 5  # (language, source) cells under which redrawing them says nothing
CAVEAT = (
    "Within a source a language is nearly one speaker on one channel: clips of a language are not independent. "
    "The interval over clips speaks of these recordings only; the interval over (language, source) cells, "
    f"by which verdicts are given if there are at least {MIN_CELLS} cells, of other speakers and corpora. Both are "
    "optimistic: without any language to find, the one over cells excludes chance in 10 to 20 of 100 cases, not in 5."
)


class ProbeError(ValueError):
    """Features, labels or a split with which languages cannot be scored across sources."""


@dataclass(frozen=True)
class ProbeConfig:
    """The classifier. Fix it once for all feature sets that are to be compared.

    Attributes:
        components: principal components kept, at most.
        inverse_penalty: scikit-learn's C of the logistic regression. 0.01 is strong on purpose: whatever fits the
            training sources tightly fits their channels.
        max_iterations: of L-BFGS; 10 to 30 are usual for components of unit variance.
    """

    components: int = 64
    inverse_penalty: float = 0.01
    max_iterations: int = 200


class Fold(NamedTuple):
    """One held-out source: its classes, how many clips trained and tested it, the share of right ones."""

    source: str
    languages: tuple[str, ...]
    train_clips: int
    test_clips: int
    accuracy: float


class Cell(NamedTuple):
    """One language in one held-out source (`source` is None: in all of them): clips tested, share right, chance."""

    language: str
    source: str | None
    clips: int
    accuracy: float
    chance: float


class Comparison(NamedTuple):
    """A difference of macro accuracies, `of` minus `to`, its intervals, and what follows.

    Attributes:
        clips: number of clips it rests on.
        difference: macro accuracy minus the other's (or minus chance).
        interval: the 95 % interval that the verdict rests on: over cells, or over clips if there are under `MIN_CELLS`.
        over_clips: 95 % interval that redraws clips within languages.
        verdict: "better" or "worse" if `interval` excludes zero, else "not distinguishable".
    """

    clips: int
    difference: float
    interval: Interval
    over_clips: Interval
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """A dict of plain numbers and strings."""
        return {
            "clips": self.clips,
            "difference": self.difference,
            "interval": self.interval._asdict(),
            "over_clips": self.over_clips._asdict(),
            "verdict": self.verdict,
        }


class ProbeResult(NamedTuple):
    """What `evaluate` found.

    Attributes:
        accuracy: macro over languages, of all folds' predictions.
        chance: what guessing among each fold's classes expects, averaged alike.
        interval: 95 % interval of `accuracy` over cells, or over clips if there are under `MIN_CELLS` cells.
        over_clips: 95 % interval of `accuracy` that redraws clips within languages.
        against_chance: `accuracy` minus `chance`, with its intervals and the verdict.
        clips: number of clips tested.
        languages: one line a language, all its held-out sources together.
        cells: one line for each language in each held-out source.
        folds: one line a held-out source.
        skipped: sources that were not held out: fewer than two languages to choose from.
        rows: int64 [clips], which of the given clips were tested, ascending.
        language: str [clips], the language of each.
        source: str [clips], the source of each.
        predicted: str [clips], the language chosen for each.
        guess: float64 [clips], 1 / classes of its fold.
    """

    accuracy: float
    chance: float
    interval: Interval
    over_clips: Interval
    against_chance: Comparison
    clips: int
    languages: tuple[Cell, ...]
    cells: tuple[Cell, ...]
    folds: tuple[Fold, ...]
    skipped: tuple[str, ...]
    rows: np.ndarray
    language: np.ndarray
    source: np.ndarray
    predicted: np.ndarray
    guess: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """A dict of plain numbers, strings and lists: everything but the clip-by-clip arrays, and the caveat."""
        return {
            "accuracy": self.accuracy,
            "chance": self.chance,
            "interval": self.interval._asdict(),
            "over_clips": self.over_clips._asdict(),
            "against_chance": self.against_chance.to_json(),
            "clips": self.clips,
            "languages": [{k: v for k, v in line._asdict().items() if k != "source"} for line in self.languages],
            "cells": [line._asdict() for line in self.cells],
            "folds": [{**line._asdict(), "languages": list(line.languages)} for line in self.folds],
            "skipped": list(self.skipped),
            "caveat": CAVEAT,
        }


@jax.jit
def pooled(hidden: jax.Array, valid: jax.Array) -> jax.Array:
    """hidden [batch, frames, width], valid [batch, frames] to float32 [batch, 2 * width].

    Mean, then standard deviation, over the real frames; a row without any is all zeros.
    """
    real = valid[..., None].astype(jnp.float32)
    count = jnp.maximum(jnp.sum(real, axis=1), 1.0)  # [batch, 1]
    frames = jnp.where(valid[..., None], hidden.astype(jnp.float32), 0.0)  # padding may hold NaN
    mean = jnp.sum(frames, axis=1) / count
    variance = jnp.sum(jnp.square(frames - mean[:, None]) * real, axis=1) / count
    return jnp.concatenate([mean, jnp.sqrt(variance)], axis=-1)


def evaluate(
    features: np.ndarray,
    *,
    languages: Sequence[str],
    sources: Sequence[str],
    train: np.ndarray,
    config: ProbeConfig | None = None,
) -> ProbeResult:
    """Scores features [clips, width] by the module's protocol.

    Args:
        features: one vector a clip; those of clips that are not `taking_part` are not looked at.
        languages: [clips], the language of each clip.
        sources: [clips], the corpus it comes from.
        train: bool [clips], True in the training split, False in development and test.
        config: the classifier; `ProbeConfig()` if None.

    Raises ProbeError if lengths differ, a feature of a clip that takes part is not finite (the clip is named), fewer
    than two languages have two sources, or no source has held-out clips of two languages that other sources train.
    """
    config = config or ProbeConfig()
    features, languages, sources = np.asarray(features), np.asarray(languages, str), np.asarray(sources, str)
    train = np.asarray(train)
    _check(features, languages, sources, train)
    plan = _plan(languages, sources, train)
    _check_finite(features, languages, sources, plan.taking_part)

    predicted, guess = np.full(len(features), "", languages.dtype), np.zeros(len(features))
    folds = []
    for source, classes, training, testing in plan.folds:
        # One thread: the matrices are small, and on a busy machine threads that wait for each other take ten times as
        # long.
        with threadpool_limits(limits=1):
            predicted[testing] = _predict(features[training], languages[training], features[testing], config)
        guess[testing] = 1 / len(classes)
        right = float(np.mean(predicted[testing] == languages[testing]))
        folds.append(Fold(source, classes, training.size, testing.size, right))
    rows = np.flatnonzero(guess)
    return _result(rows, languages[rows], sources[rows], predicted[rows], guess[rows], folds, plan.skipped)


def taking_part(*, languages: Sequence[str], sources: Sequence[str], train: np.ndarray) -> np.ndarray:
    """bool [clips]: the clips that train or test some fold. `evaluate` looks at the features of no other clip.

    Raises ProbeError where `evaluate` would for want of clips.
    """
    return _plan(np.asarray(languages, str), np.asarray(sources, str), np.asarray(train)).taking_part


class _FoldRows(NamedTuple):
    """A fold before anything is fitted: its classes, and the indices of the clips that train it and test it."""

    source: str
    classes: tuple[str, ...]
    training: np.ndarray
    testing: np.ndarray


class _Plan(NamedTuple):
    folds: list[_FoldRows]
    skipped: list[str]
    taking_part: np.ndarray


def _plan(languages: np.ndarray, sources: np.ndarray, train: np.ndarray) -> _Plan:
    """Steps 1 to 3 of the protocol: they depend on labels alone."""
    pairs = set(zip(languages.tolist(), sources.tolist(), strict=True))
    shared = sorted(language for language in set(languages.tolist()) if sum(pair[0] == language for pair in pairs) >= 2)
    if len(shared) < 2:
        raise ProbeError(
            f"no held-out data: {len(shared)} of {len(set(languages.tolist()))} languages occur in two or more of the "
            f"sources ({', '.join(sorted({source for _, source in pairs}))}); at least two languages must"
        )
    in_shared = np.isin(languages, shared)
    found, folds, skipped = np.zeros(len(languages), bool), [], []
    for source in sorted({source for language, source in pairs if language in shared}):
        training, testing = in_shared & train & (sources != source), in_shared & ~train & (sources == source)
        classes = np.intersect1d(languages[training], languages[testing])
        if len(classes) < 2:
            skipped.append(source)
            continue
        training, testing = training & np.isin(languages, classes), testing & np.isin(languages, classes)
        folds.append(_FoldRows(source, tuple(classes.tolist()), np.flatnonzero(training), np.flatnonzero(testing)))
        found |= training | testing
    if not folds:
        raise ProbeError(
            f"no held-out data: none of the sources ({', '.join(skipped)}) has clips outside the training split in two "
            "languages that other sources have training clips of"
        )
    return _Plan(folds, skipped, found)


def compare(of: ProbeResult, to: ProbeResult) -> Comparison:
    """Paired comparison of two feature sets on the same clips: "better" means that `of` beats `to`.

    Raises ProbeError if the two were not tested on the same clips.
    """
    same = of.rows.shape == to.rows.shape and all(
        np.array_equal(getattr(of, name), getattr(to, name)) for name in ("rows", "language", "source", "guess")
    )
    if not same:
        raise ProbeError(
            f"the two results are of different clips ({of.clips} and {to.clips}): evaluate both feature sets on the "
            "same clips, in the same order, with the same split"
        )
    right_of, right_to = of.predicted == of.language, to.predicted == to.language
    return _judged(right_of.astype(np.float64) - right_to, of.language, of.source)


def _check(features: np.ndarray, languages: np.ndarray, sources: np.ndarray, train: np.ndarray) -> None:
    if features.ndim != 2 or not features.shape[1]:
        raise ProbeError(f"features have shape {list(features.shape)}, expected [clips, width]")
    clips = (len(features),)
    if not languages.shape == sources.shape == train.shape == clips:
        raise ProbeError(
            f"features are of {len(features)} clips, but languages {list(languages.shape)}, sources "
            f"{list(sources.shape)} and train {list(train.shape)}: all must be [clips]"
        )
    if train.dtype != np.bool_:
        raise ProbeError(f"train is {train.dtype}, expected bool: True where the clip is in the training split")


def _check_finite(features: np.ndarray, languages: np.ndarray, sources: np.ndarray, rows: np.ndarray) -> None:
    """Of the clips that take part, bool [clips]; what the others hold does not matter."""
    bad = np.flatnonzero(rows & ~np.isfinite(features).all(axis=1))
    if bad.size:
        clip = int(bad[0])
        raise ProbeError(f"features of clip {clip} ({languages[clip]}, {sources[clip]}) are not finite")


def _predict(training: np.ndarray, languages: np.ndarray, testing: np.ndarray, config: ProbeConfig) -> np.ndarray:
    """Fits the classifier on training [clips, width] with languages [clips]; the language of each of testing."""
    scaler = StandardScaler().fit(training.astype(np.float64))
    training, testing = scaler.transform(training), scaler.transform(testing)
    # random_state: the solver for wide features is a randomised one.
    components = PCA(min(config.components, *training.shape), random_state=0).fit(training)
    # Directions in which the training clips do not vary would be noise divided by nothing.
    kept = components.explained_variance_ > 1e-6 * components.explained_variance_[0]
    scale = np.sqrt(components.explained_variance_[kept])
    classifier = LogisticRegression(
        C=config.inverse_penalty, class_weight="balanced", max_iter=config.max_iterations, tol=1e-4
    )
    classifier.fit(components.transform(training)[:, kept] / scale, languages)
    return classifier.predict(components.transform(testing)[:, kept] / scale)


def _judged(values: np.ndarray, languages: np.ndarray, sources: np.ndarray) -> Comparison:
    """Intervals and verdict of the macro mean of values [clips], one difference a clip."""
    clips, honest = _both_intervals(values, languages, sources)
    if honest.low > 0:
        verdict = "better"
    elif honest.high < 0:
        verdict = "worse"
    else:
        verdict = "not distinguishable"
    return Comparison(values.size, intervals.macro_mean(values, languages=languages), honest, clips, verdict)


class _Intervals(NamedTuple):
    over_clips: Interval
    honest: Interval


def _both_intervals(values: np.ndarray, languages: np.ndarray, sources: np.ndarray) -> _Intervals:
    """The interval over clips, and the one to judge by."""
    clips = intervals.over_clips(values, languages=languages)
    cells = intervals.over_cells(values, languages=languages, sources=sources)
    return _Intervals(clips, cells if cells.count >= MIN_CELLS else clips)


def _result(
    rows: np.ndarray,
    languages: np.ndarray,
    sources: np.ndarray,
    predicted: np.ndarray,
    guess: np.ndarray,
    folds: list[Fold],
    skipped: list[str],
) -> ProbeResult:
    right = (predicted == languages).astype(np.float64)

    def cell(language, source):
        members = (languages == language) & (True if source is None else sources == source)
        return Cell(language, source, int(members.sum()), float(right[members].mean()), float(guess[members].mean()))

    clips, honest = _both_intervals(right, languages, sources)
    pairs = sorted(set(zip(languages.tolist(), sources.tolist(), strict=True)))
    return ProbeResult(
        accuracy=intervals.macro_mean(right, languages=languages),
        chance=intervals.macro_mean(guess, languages=languages),
        interval=honest,
        over_clips=clips,
        against_chance=_judged(right - guess, languages, sources),
        clips=int(rows.size),
        languages=tuple(cell(language, None) for language in sorted(set(languages.tolist()))),
        cells=tuple(cell(language, source) for language, source in pairs),
        folds=tuple(folds),
        skipped=tuple(skipped),
        rows=rows,
        language=languages,
        source=sources,
        predicted=predicted,
        guess=guess,
    )
