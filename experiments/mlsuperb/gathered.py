"""All results of a workdir as Markdown: the table, then intervals and chance, the 13 sets, and what the data were.

Models whose results all follow the published protocol stand beside the published rows; all others in a table of their
own, without points.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipelines.atomic import whole_file
from data_pipelines.mlsuperb.layout import DURATIONS, PARTS, Duration
from data_pipelines.mlsuperb.tracks import MONOLINGUAL_SETS, monolingual_score
from experiments.mlsuperb.leaderboard import COLUMNS, MISSING, SETS, Entry, leaderboard, scores_of
from experiments.mlsuperb.protocol import LEARNING_RATE, ProtocolError
from experiments.mlsuperb.results import read_results
from experiments.mlsuperb.scoring import FEW_SHOT, NORMAL, ChallengeScores
from wavlab_jax.evaluation.intervals import LEVEL, RESAMPLES, of_pooled

# Of the seven columns, all but the first: the task, the group, the figure.
FIGURES = (
    ("multilingual", NORMAL, "error_rate"),
    ("multilingual", FEW_SHOT, "error_rate"),
    ("identification", NORMAL, "accuracy"),
    ("joint", NORMAL, "accuracy"),
    ("joint", NORMAL, "error_rate"),
    ("joint", FEW_SHOT, "error_rate"),
)


class Standing(NamedTuple):
    """One model's results on one set: of the monolingual track by set, of the others by track ("challenge dev")."""

    model: str
    duration: Duration
    sets: dict[str, dict]
    tasks: dict[str, dict]

    @property
    def follows(self) -> bool:
        """Whether all that the seven figures are of, if there is any, follows the published protocol.

        Models of which this holds stand among the published rows of this set. The challenge has no figure there.
        """
        return bool(self.benchmark) and all(each["protocol"]["published"] for each in self.benchmark)

    @property
    def benchmark(self) -> list[dict]:
        """Those of the benchmark's own tracks: all but the challenge's."""
        return [each for each in self.every if each["task"] != "challenge"]

    @property
    def every(self) -> list[dict]:
        """All of them."""
        return [*self.sets.values(), *self.tasks.values()]

    def figures(self) -> dict[str, dict]:
        """As `scores_of` takes them: with the monolingual mean, if all 13 sets are there and have an error rate."""
        rates = {name: found["all"]["error_rate"] for name, found in self.sets.items() if "error_rate" in found["all"]}
        if len(rates) < len(MONOLINGUAL_SETS):
            return self.tasks
        return self.tasks | {"monolingual": {"error_rate": monolingual_score(rates)}}

    def notes(self) -> str:
        """In what any of them deviates, each once; what was chosen, and which sets are missing."""
        said = list(dict.fromkeys(each for found in self.every for each in found["protocol"]["deviations"]))
        rates = {found["protocol"]["learning_rate"] for found in self.benchmark} - {LEARNING_RATE}
        if rates:
            said.append(f"learning rate {', '.join(f'{rate:g}' for rate in sorted(rates))}, which is open to choice")
        if 0 < len(self.sets) < len(MONOLINGUAL_SETS):
            said.append(f"monolingual on {', '.join(self.sets)} alone, so that there is no mean")
        return "; ".join(said)


def standings(workdir: Path) -> list[Standing]:
    """Every model and set that there are results of. Raises ProtocolError if there are none."""
    found: dict[tuple[str, Duration], Standing] = {}
    for results in read_results(workdir):
        key = results["model"]["name"], results["set"]
        own = found.setdefault(key, Standing(*key, {}, {}))
        if results["task"] == "monolingual":
            own.sets[results["track"].split()[1]] = results
        else:
            own.tasks[results["track"]] = results
    if not found:
        raise ProtocolError(
            f"{Path(workdir) / 'mlsuperb'} holds no results: `python -m experiments superb MODEL --workdir {workdir}` "
            "makes them"
        )
    return list(found.values())


def write_leaderboard(workdir: Path, path: Path, *, pool: str = "2024") -> str:
    """Writes the Markdown of all results in `workdir` to `path`, and returns it."""
    every = standings(workdir)
    published, others = (_entries([each for each in every if each.follows is follows]) for follows in (True, False))
    parts = []
    if published:
        parts.append(leaderboard(published, pool=pool))
    if others:
        title = "Not by the published protocol" if published else "ML-SUPERB, not by the published protocol"
        parts.append(leaderboard(others, comparable=False, title=title))
    for duration in DURATIONS:
        own = [each for each in every if each.duration == duration]
        if own:
            parts += [_intervals(own, duration), _by_set(own, duration), _challenge(own, duration)]
            parts.append(_data(own, duration))
    text = "\n".join(filter(None, parts))
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(text, "utf-8")
    return text


def _entries(standing: Sequence[Standing]) -> list[Entry]:
    """A row a model, of the sets of which it has a track of the benchmark's here."""
    entries = []
    for model in dict.fromkeys(each.model for each in standing):
        own = [each for each in standing if each.model == model]
        notes = "; ".join(dict.fromkeys(filter(None, (each.notes() for each in own))))
        scores = {each.duration: scores_of(each.figures()) for each in own if each.benchmark}
        entries.append(Entry(model, notes, scores))
    return entries


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def _intervals(own: Sequence[Standing], duration: Duration) -> str:
    """Each figure with its interval; below, what chance reaches and how many utterances were judged."""
    rows = []
    for each in own:
        cells = [_monolingual_cell(each)]
        for task, group, name in FIGURES:
            row = each.tasks.get(task, {}).get("groups", {}).get(group, {})
            cells.append(_cell(row[name], row.get(f"{name}_interval")) if name in row else MISSING)
        rows.append([each.model, *cells])
    if all(cell == MISSING for row in rows for cell in row[1:]):
        return ""
    even, always, counts = ["nothing written"], ["nothing written"], [_counted(own, lambda each: _judged_alone(each))]
    for task, group, name in FIGURES:
        found = next((each.tasks[task] for each in own if task in each.tasks), None)
        if found is None:
            cells = (MISSING, MISSING)
        elif name == "error_rate":
            cells = ("100.0", "100.0")
        else:
            chance = found["chance"]
            cells = (
                f"{chance['uniform']:.1f}",
                f"{chance['majority'].get(group, math.nan):.1f} ({chance['language']})",
            )
        even.append(cells[0])
        always.append(cells[1])
        counts.append(_counted(own, lambda each, t=task, g=group: each.tasks[t]["groups"][g]["utterances"]))
    even[0] = always[0] = "100.0"
    rows += [
        ["*chance: a language drawn evenly, or nothing written*", *even],
        ["*chance: always the most frequent language*", *always],
        ["*test utterances*", *counts],
    ]
    note = (
        f"In brackets {100 * LEVEL:.0f} % bootstrap intervals over test utterances ({RESAMPLES:,} resamples). Clips of "
        "one speaker are not independent: for other speakers they are too narrow.\n"
    )
    return f"\n## Intervals and chance, {SETS[duration]}\n\n{_table(['model', *COLUMNS], rows)}\n{note}"


def _judged_alone(each: Standing) -> int:
    return sum(found["all"]["utterances"] for found in each.sets.values())


def _counted(own: Sequence[Standing], count) -> str:
    """What all models that have it agree on, or how it differs."""
    found = set()
    for each in own:
        try:
            found.add(count(each))
        except KeyError:
            continue
    found.discard(0)
    return " or ".join(f"{number:,}" for number in sorted(found)) or MISSING


def _cell(value: float, interval: Sequence[float] | None) -> str:
    said = "" if interval is None else f" [{interval[0]:.1f}, {interval[1]:.1f}]"
    return f"{value:.1f}{said}"


class Mean(NamedTuple):
    """The monolingual figure, in percent, and the ends of its interval."""

    value: float
    low: float
    high: float


def _monolingual_cell(each: Standing) -> str:
    found = monolingual_interval(each)
    return MISSING if found is None else _cell(found.value, (found.low, found.high))


def monolingual_interval(each: Standing) -> Mean | None:
    """The mean over languages of the means over sets, with the interval of that: every set redrawn by itself.

    None unless all sets are there.
    """
    if "monolingual" not in each.figures():
        return None
    draws: dict[str, list[np.ndarray]] = defaultdict(list)
    for name, found in each.sets.items():
        totals, weights = _errors(Path(found["path"]).with_name("hypotheses.tsv"))
        # a seed for each set: the same one would move the utterances of sets of one size together
        seed = list(MONOLINGUAL_SETS).index(name)
        draws[MONOLINGUAL_SETS[name].language].append(of_pooled(totals, weights, seed=seed)[1])
    shortest = min(len(values) for sets in draws.values() for values in sets)
    means = np.mean([np.mean([one[:shortest] for one in sets], axis=0) for sets in draws.values()], axis=0)
    tail = (1 - LEVEL) / 2
    low, high = 100 * np.quantile(means, [tail, 1 - tail])
    return Mean(each.figures()["monolingual"]["error_rate"], float(low), float(high))


def _errors(path: Path) -> tuple[list[int], list[int]]:
    """Of each utterance of hypotheses.tsv: errors, and tokens of the reference."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    operations = ("substitutions", "deletions", "insertions")
    return [sum(int(row[name]) for name in operations) for row in rows], [int(row["tokens"]) for row in rows]


def _by_set(own: Sequence[Standing], duration: Duration) -> str:
    """The 13 monolingual sets."""
    names = [name for name in MONOLINGUAL_SETS if any(name in each.sets for each in own)]
    if not names:
        return ""
    rows = []
    for each in own:
        found = [each.sets[name]["all"] if name in each.sets else None for name in names]
        cells = [row and "error_rate" in row and _cell(row["error_rate"], row["error_rate_interval"]) for row in found]
        rows.append([each.model, *(cell or MISSING for cell in cells)])
    rows.append(["*nothing written*", *("100.0" for _ in names)])
    counts = [_counted(own, lambda each, n=name: each.sets[n]["all"]["utterances"]) for name in names]
    rows.append(["*test utterances*", *counts])
    return f"\n## Monolingual sets, {SETS[duration]}\n\n{_table(['model', *names], rows)}"


class Averages(NamedTuple):
    """ML-SUPERB 2.0's four figures (`scoring.ChallengeScores`) of one model on one track; NaN where there are none."""

    model: str
    track: str
    figures: list[float]
    utterances: int


AVERAGES = ("languages right", "CER", "its deviation over languages", "CER of the 15 worst")
WORST = "The sum over the 15 worst languages is divided by 15, as in the challenge's scorer, of however few languages."


def averages_of(standing: Sequence[Standing]) -> list[Averages]:
    """Of every result that has them: the challenge's tracks, and fine-tuned joint ones."""
    return [
        Averages(
            each.model,
            found["track"],
            [found["challenge"].get(name, math.nan) for name in ChallengeScores._fields],
            found["all"]["utterances"],
        )
        for each in standing
        for found in each.every
        if "challenge" in found
    ]


def _challenge(own: Sequence[Standing], duration: Duration) -> str:
    """ML-SUPERB 2.0's averages over languages."""
    rows = [
        [each.model, each.track, *(MISSING if math.isnan(figure) else f"{figure:.1f}" for figure in each.figures),
         f"{each.utterances:,}"] for each in averages_of(own)]  # fmt: skip
    if not rows:
        return ""
    table = _table(["model", "track", *AVERAGES, "test utterances"], rows)
    return f"\n## ML-SUPERB 2.0's means over languages, {SETS[duration]}\n\n{table}\n{WORST}\n"


def _data(own: Sequence[Standing], duration: Duration) -> str:
    """What each track was trained on and judged by, and what was left out or cannot be written."""
    seen: dict[str, dict] = {}
    for each in own:
        for found in each.every:
            seen.setdefault(found["track"], found)
    rows = []
    for name, found in seen.items():
        data = found["data"]
        left = sum(sum(reasons.values()) for reasons in found["left_out"].values())
        unseen = found["unseen_tokens"]
        rows.append(
            [
                name,
                *(f"{data['parts'][part]['utterances']:,}" for part in PARTS),
                f"{left:,}",
                f"{sum(unseen.values()):,} ({len(unseen):,})",
                " / ".join(f"{data['infeasible'][part]['count']:,}" for part in PARTS),
            ]
        )
    head = ["track", *PARTS, "left out", "tokens of test not in train (different ones)", "more tokens than frames"]
    untold = next(iter(seen.values()))["data"]["recordings_without_text"]["count"]
    note = f"Recordings without text: {untold:,}. Each is named in results.json and left_out.tsv.\n"
    return f"\n## Data, {SETS[duration]}\n\n{_table(head, rows)}\n{note}"
