"""Masked accuracy on held-out clips, clip by clip, beside two predictors that know nothing of speech.

Where a model predicts several sets of units, the first one is judged. A contrastive model is judged by whether it picks
the positive; the trivial predictors have nothing to say of that.

Every model of one mask seed is asked the same frames of the same clips. The trivial predictors see what the model's
mask leaves visible - and more: they are given the visible frames' true units, which the model has to hear.

- majority: the unit that is most frequent in the training split, everywhere.
- copy: the true unit of the nearest visible frame (the earlier one of two equally near).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from data_pipelines.batch import NO_UTTERANCE, Batch
from wavlab_jax.objectives import Judged


class ClipScores(NamedTuple):
    """One row a clip that had at least one hidden frame; all arrays [clips].

    Attributes:
        utterance: int32 row of the manifest. language: int32 index into its languages.
        frames: hidden frames asked. correct, majority, copy: how many of them the model and the predictors got right.
        loss: nats, summed over those frames.
    """

    utterance: np.ndarray
    language: np.ndarray
    frames: np.ndarray
    correct: np.ndarray
    majority: np.ndarray
    copy: np.ndarray
    loss: np.ndarray


def score_clips(
    judge: Callable[[Batch], Judged],
    batches: Iterable[Batch],
    *,
    majority: int | None,
) -> ClipScores:
    """Runs `judge` (places a host batch and predicts) over held-out batches; windows of one clip are added up.

    `majority`: the most frequent unit; None where there are no units, and NaN then for both trivial predictors.
    """
    rows: dict[int, np.ndarray] = {}
    language: dict[int, int] = {}
    for batch in batches:
        judged = jax.device_get(judge(batch))
        for row, utterance in enumerate(batch.utterance.tolist()):
            if utterance == NO_UTTERANCE:
                continue
            units = judged.units[row]
            valid = batch.valid[row] & (units >= 0)
            hidden = np.flatnonzero(valid & judged.mask[row])
            visible = np.flatnonzero(valid & ~judged.mask[row])
            if not hidden.size:
                continue
            target = units[hidden]
            values = np.array(
                [
                    hidden.size,
                    np.sum(judged.predicted[row, hidden] == target),
                    math.nan if majority is None else np.sum(target == majority),
                    math.nan
                    if majority is None
                    else np.sum(nearest_visible(units, hidden, visible, default=majority) == target),
                    np.sum(judged.loss[row, hidden], dtype=np.float64),
                ],
                np.float64,
            )
            rows[utterance] = rows.get(utterance, 0.0) + values
            language[utterance] = int(batch.language[row])
    order = sorted(rows)
    table = np.stack([rows[i] for i in order]) if order else np.zeros((0, 5))
    codes = np.array([language[i] for i in order], np.int32)
    return ClipScores(np.array(order, np.int32), codes, *table.T)


def nearest_visible(units: np.ndarray, hidden: np.ndarray, visible: np.ndarray, *, default: int) -> np.ndarray:
    """The unit of the visible frame nearest to each hidden one, [hidden]; `default` where nothing is visible."""
    if not visible.size:
        return np.full(hidden.size, default, units.dtype)
    right = np.searchsorted(visible, hidden)
    after = visible[np.minimum(right, visible.size - 1)]
    before = visible[np.maximum(right - 1, 0)]
    return units[np.where(np.abs(after - hidden) < np.abs(hidden - before), after, before)]


def summary(scores: ClipScores, clips: np.ndarray | None = None) -> dict:
    """Clips, hidden frames and the three accuracies, of all clips or a mask [clips].

    None without frames, and where a trivial predictor has nothing to say.
    """
    chosen = np.ones(len(scores.frames), bool) if clips is None else clips
    frames = float(scores.frames[chosen].sum())

    def share(counts):
        total = float(counts[chosen].sum())
        return total / frames if frames and not math.isnan(total) else None

    return {
        "clips": int(chosen.sum()),
        "frames": int(frames),
        "accuracy": share(scores.correct),
        "majority": share(scores.majority),
        "copy": share(scores.copy),
        "loss": share(scores.loss),
    }


def by_language(scores: ClipScores, languages: Sequence[str]) -> dict[str, dict]:
    """`summary` of each language, also of those without any held-out clip."""
    return {name: summary(scores, scores.language == code) for code, name in enumerate(languages)}


def macro(languages: dict[str, dict]) -> dict:
    """Mean over the languages that have held-out clips, each counting the same."""
    present = [row for row in languages.values() if row["frames"]]
    return {
        "languages": len(present),
        **{
            key: float(np.mean([row[key] for row in present])) if present and present[0][key] is not None else None
            for key in ("accuracy", "majority", "copy", "loss")
        },
    }


def times_trivial(row: dict) -> float | None:
    """Accuracy over that of the better trivial predictor, of a `summary` or `macro`; None where there is none.

    Above 1 something was learned that neither the most frequent unit nor the durations of units explain.
    """
    trivial = max(row["majority"] or 0.0, row["copy"] or 0.0)
    return row["accuracy"] / trivial if trivial else None


def macro_interval(scores: ClipScores) -> "Difference | None":
    """Macro accuracy itself, with the interval that `compare` has: what it is above a model that gets nothing right."""
    return compare(scores, scores._replace(correct=np.zeros_like(scores.correct)))


def against_trivial(scores: ClipScores) -> "Difference | None":
    """Macro accuracy minus that of the better trivial predictor, the one with the higher macro accuracy of the two.

    None without clips, and where there are no trivial predictors.
    """
    trivial = [macro_interval(scores._replace(correct=counts)) for counts in (scores.majority, scores.copy)]
    if None in trivial or any(math.isnan(found.difference) for found in trivial):
        return None
    better = scores.copy if trivial[1].difference >= trivial[0].difference else scores.majority
    return compare(scores, scores._replace(correct=better))


class Difference(NamedTuple):
    """Macro accuracy of one model minus another's on the same clips, with a 95 % bootstrap interval and a verdict."""

    clips: int
    difference: float
    low: float
    high: float
    verdict: str


def compare(
    scores: ClipScores,
    against: ClipScores,
    *,
    languages: Sequence[int] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Difference | None:
    """Paired difference of macro accuracy (mean over languages); None without clips.

    Clips are resampled within their language, the same ones for both models; percentile interval. A verdict other than
    "not distinguishable" needs an interval that leaves out 0. It says how sure the difference is for such clips, not
    for other speakers: a language's clips are mostly one speaker's.
    """
    if not np.array_equal(scores.utterance, against.utterance):
        raise ValueError("the two models were not judged on the same clips")
    codes = [c for c in np.unique(scores.language).tolist() if languages is None or c in set(languages)]
    if not codes:
        return None
    rng = np.random.default_rng(seed)
    point, draws = [], []
    for code in codes:
        clips = np.flatnonzero(scores.language == code)
        frames, gain = scores.frames[clips], (scores.correct - against.correct)[clips]
        point.append(gain.sum() / frames.sum())
        again = rng.integers(len(clips), size=(resamples, len(clips)))
        draws.append(gain[again].sum(axis=1) / frames[again].sum(axis=1))
    low, high = np.percentile(np.mean(draws, axis=0), [2.5, 97.5])
    verdict = "better" if low > 0 else "worse" if high < 0 else "not distinguishable"
    clips = int(np.isin(scores.language, codes).sum())
    return Difference(clips, float(np.mean(point)), float(low), float(high), verdict)
