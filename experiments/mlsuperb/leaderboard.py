"""ML-SUPERB's table: a model's seven figures on each set, beside the published rows, with SUPERB points where all seven
are there."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from data_pipelines.mlsuperb.layout import DURATIONS, Duration
from experiments.mlsuperb.scoring import FEW_SHOT, NORMAL
from wavlab_jax.evaluation.superb_score import LOG_MEL, PUBLISHED, Scores, published_points

COLUMNS = Scores(
    "mono ASR, PER/CER",
    "multi ASR normal, CER",
    "multi ASR few-shot, CER",
    "LID, accuracy",
    "joint LID, accuracy",
    "joint ASR normal, CER",
    "joint ASR few-shot, CER",
)
SETS: dict[Duration, str] = {"10min": "10 minutes a language", "1h": "1 hour a language"}
MISSING = "–"


class Entry(NamedTuple):
    """A model that was judged here: what its figures deviate from the protocol in ("" for nothing), and its scores.

    Of a score that was not measured the value is NaN.
    """

    model: str
    deviations: str
    scores: dict[Duration, Scores]


def scores_of(results: dict[str, dict]) -> Scores:
    """The seven figures of one set from the figures of its tracks by task name, and "monolingual" the mean of all 13.

    Accuracies are those on the normal languages, as the published tables have them; NaN for what is not there.
    """

    def figure(task: str, group: str, name: str) -> float:
        return results.get(task, {}).get("groups", {}).get(group, {}).get(name, math.nan)

    return Scores(
        monolingual=results.get("monolingual", {}).get("error_rate", math.nan),
        multilingual_normal=figure("multilingual", NORMAL, "error_rate"),
        multilingual_few_shot=figure("multilingual", FEW_SHOT, "error_rate"),
        identification=figure("identification", NORMAL, "accuracy"),
        joint_identification=figure("joint", NORMAL, "accuracy"),
        joint_normal=figure("joint", NORMAL, "error_rate"),
        joint_few_shot=figure("joint", FEW_SHOT, "error_rate"),
    )


def points_of(scores: Scores, *, pool: str, duration: Duration) -> float:
    """SUPERB points against a published pool; NaN unless all seven figures are there."""
    if any(math.isnan(score) for score in scores):
        return math.nan
    return published_points(scores, pool=pool, duration=duration)


def leaderboard(
    entries: Sequence[Entry], *, pool: str = "2024", comparable: bool = True, title: str = "ML-SUPERB"
) -> str:
    """Markdown: a table for each set, best points first, ours in bold.

    `comparable`: whether the entries were judged on the benchmark itself. If not (a miniature, a share of the
    iterations), the published rows are left out, because nothing here could stand beside them, and so are the points.
    """
    parts = []
    for duration in DURATIONS:
        ours = [entry for entry in entries if duration in entry.scores]
        if not ours:
            continue
        rows = [
            (points_of(e.scores[duration], pool=pool, duration=duration), f"**{e.model}**", e.scores[duration])
            for e in ours
        ]
        if comparable:
            published = PUBLISHED[pool][duration]
            rows += [(row.points, row.model, row.scores) for row in published]
            rows.append((0.0, "log-mel", LOG_MEL[duration]))
            rows.sort(key=lambda row: -math.inf if math.isnan(row[0]) else -row[0])
        head = ["model", *COLUMNS, *(["SUPERB points"] if comparable else [])]
        lines = [f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|"]
        for points, model, scores in rows:
            cells = [model, *map(_cell, scores), *([_cell(points)] if comparable else [])]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append(f"## {SETS[duration]}\n\n" + "\n".join(lines))
    alike: dict[str, list[str]] = {}
    for entry in entries:
        alike.setdefault(entry.deviations, []).append(f"**{entry.model}**")
    notes = [f"{', '.join(models)}: {said}." for said, models in alike.items() if said]
    if comparable:
        notes.append(
            f"Points are against the best of the published pool of {pool}, column by column, and log-mel; they are not "
            "comparable with points from another pool. Rows in bold were measured here and do not enter the pool."
        )
    else:
        notes.append("Not the benchmark itself: these figures stand beside each other, and beside no published ones.")
    return f"# {title}\n\n" + "\n\n".join([*parts, *notes]) + "\n"


def _cell(value: float) -> str:
    return MISSING if math.isnan(value) else f"{value:.1f}"
