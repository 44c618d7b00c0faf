"""All results of a workdir as one HTML page that needs nothing else to be read: tables, layers, languages, texts.

It looks as the report of a recipe does and is drawn by the same code (`experiments.report`).
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.atomic import whole_file
from data_pipelines.mlsuperb.layout import DURATIONS, Duration
from data_pipelines.mlsuperb.tracks import MONOLINGUAL_SETS
from experiments.mlsuperb.drawn import (
    TITLES,
    bracketed,
    confusion_blocks,
    figure_text,
    language_blocks,
    layer_blocks,
    mark,
    text_blocks,
    training_blocks,
)
from experiments.mlsuperb.gathered import (
    AVERAGES,
    FIGURES,
    WORST,
    Standing,
    averages_of,
    monolingual_interval,
    standings,
)
from experiments.mlsuperb.leaderboard import COLUMNS, MISSING, SETS, points_of, scores_of
from experiments.report import charts
from experiments.report.page import Chart, Figure, Finding, Look, Note, Section, Table, render, swatch
from experiments.report.results import LOOKS, count, duration, number
from wavlab_jax.evaluation.superb_score import LOG_MEL, PUBLISHED


def looks_of(models: Iterable[str]) -> dict[str, Look]:
    """A colour and a mark for each; the first 25 are all different."""
    colours, markers = zip(*LOOKS.values(), strict=True)
    size = len(LOOKS)
    return {
        model: Look(colours[place % size], markers[(place + place // size) % size])
        for place, model in enumerate(models)
    }


def write_page(workdir: Path, path: Path, *, pool: str = "2024") -> Path:
    """Writes the page of all results in `workdir` to `path`; the same results give the same bytes.

    Raises ProtocolError if there are none.
    """
    every = standings(workdir)
    looks = looks_of(dict.fromkeys(each.model for each in every))
    own = {length: [each for each in every if each.duration == length] for length in DURATIONS}
    own = {length: found for length, found in own.items() if found}
    sections = [Section("leaderboard", "Leaderboard", LEADS["leaderboard"], leaderboard_blocks(own, pool, looks))]
    sections += [
        Section(f"figures-{length}", f"Figures, {SETS[length]}", LEADS["figures"], figure_blocks(found, length, looks))
        for length, found in own.items()
    ]
    sections += [
        Section("deviations", "What was not done as published", LEADS["deviations"], deviation_blocks(every)),
        Section("layers", "Layer weights", LEADS["layers"], layer_blocks(own, looks)),
        Section("languages", "Languages", LEADS["languages"], language_blocks(own, looks)),
        Section("confusions", "Confusions", LEADS["confusions"], confusion_blocks(own)),
        Section("texts", "Hypotheses beside references", LEADS["texts"], text_blocks(every)),
        Section("training", "Training and data", LEADS["training"], training_blocks(own, looks)),
    ]
    page = render(title="ML-SUPERB", facts=facts(every), findings=findings(own, pool), sections=sections)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


SPOKEN = ("identification", "joint", "challenge dev", "challenge dev_dialect")  # tracks that name languages
LEADS = {
    "leaderboard": "The benchmark's seven figures, in percent: error rates are better low, accuracies high.",
    "figures": "The same, each with its 95 % interval over test utterances, beside what knows nothing of speech.",
    "deviations": "Figures mean what published ones mean only where nothing stands here but what holds of this code.",
    "layers": "How much of each hidden state of the frozen encoder the downstream model listens to.",
    "languages": "Each language's own figure.",
    "confusions": "Which language was said where another one was spoken.",
    "texts": "Some test utterances of each track, evenly over its order by source and language, not chosen by result.",
    "training": "What the downstream models were trained on, how long, and where.",
}


def facts(every: Sequence[Standing]) -> list[str]:
    """For the line under the title."""
    results = [found for each in every for found in each.every]
    commits = ", ".join(sorted({str(found.get("commit")) for found in results if found.get("commit")}))
    seconds = sum(max(0.0, number(found.get("seconds"))) for found in results)
    models = len({each.model for each in every})
    parts = [f"{models} model{'s' * (models > 1)}", f"{len(results)} result{'s' * (len(results) > 1)}"]
    parts.append(f"{duration(seconds)} in all")
    return parts + ([f"commit {commits}"] if commits else [])


def findings(own: dict[Duration, list[Standing]], pool: str) -> list[Finding]:
    """Of each set, the points of those that can be compared with published ones, or that none can; then chance."""
    found = []
    for length, standing in own.items():
        points = {}
        for each in (each for each in standing if each.follows):
            points[each.model] = points_of(scores_of(each.figures()), pool=pool, duration=length)
        points = {model: value for model, value in points.items() if not math.isnan(value)}
        if points:
            best = max(points, key=points.get)
            words = f"SUPERB points of {best} against the published pool of {pool}, {SETS[length]}"
            more = f"; the most of {len(points)} models with all seven figures" if len(points) > 1 else ""
            found.append(Finding(f"{points[best]:.1f}", f"{words}{more}."))
        elif any(each.benchmark for each in standing):
            words = "no model has all seven figures by the published protocol, which SUPERB points are of."
            found.append(Finding("no points", f"{SETS[length][:1].upper()}{SETS[length][1:]}: {words}", "unclear"))
        found += [finding for task in SPOKEN if (finding := chance_finding(standing, task))]
    return found


def chance_finding(standing: Sequence[Standing], task: str) -> Finding | None:
    """The highest accuracy of a task and whether its interval lies above the better of the two chance levels."""
    rows = [(each.model, each.tasks[task]) for each in standing if task in each.tasks]
    if not rows:
        return None
    model, best = max(rows, key=lambda row: row[1]["all"]["accuracy"])
    chance = max(best["chance"]["uniform"], best["chance"]["majority"]["all"])
    low, high = best["all"]["accuracy_interval"]
    side, tone = ("above", "better") if low > chance else ("below", "worse") if high < chance else (None, "unclear")
    said = f"{side} chance" if side else "not distinguishable from chance"
    words = f"Languages right in {TITLES[task]}, {SETS[best['set']]}: {model} [{low:.1f}, {high:.1f}], {said} "
    words += f"({chance:.1f}), on {count(best['all']['utterances'])} utterances"
    alike = sum(row["all"]["accuracy"] == best["all"]["accuracy"] for _, row in rows) - 1
    others = f", and that of {alike} more" if alike else ""
    more = f"; the highest of {len(rows)} models{others}." if len(rows) > 1 else "."
    return Finding(f"{best['all']['accuracy']:.1f}%", words + more, "fact" if tone == "better" else tone)


def leaderboard_blocks(own: dict[Duration, list[Standing]], pool: str, looks: dict[str, Look]) -> list:
    """A table a set: models that follow the protocol among the published rows; the others in one of their own."""
    blocks: list[Any] = []
    columns = ["model", *(f">{column}" for column in COLUMNS)]
    for length, standing in own.items():
        rows = []
        standing = [each for each in standing if each.benchmark]
        for each in (each for each in standing if each.follows):
            scores = scores_of(each.figures())
            rows.append((points_of(scores, pool=pool, duration=length), mark(each.model, looks), scores))
        if rows:
            rows += [(row.points, f"{row.model} (published)", row.scores) for row in PUBLISHED[pool][length]]
            rows.append((0.0, "log-mel (published)", LOG_MEL[length]))
            rows.sort(key=lambda row: -math.inf if math.isnan(row[0]) else -row[0])
            table = [[model, *map(figure_text, scores), figure_text(points)] for points, model, scores in rows]
            caption = f"{SETS[length]}: judged here, with a mark, and published"
            blocks.append(Table([*columns, ">SUPERB points"], table, caption))
        others = [each for each in standing if not each.follows]
        if others:
            table = [[mark(each.model, looks), *map(figure_text, scores_of(each.figures()))] for each in others]
            blocks.append(Table(columns, table, f"{SETS[length]}: not by the published protocol"))
            note = "These stand beside each other, and beside no published ones: see what was not done as published."
            blocks.append(Note(note, True))
            table = [[row.model, *map(figure_text, row.scores), figure_text(row.points)]
                     for row in PUBLISHED[pool][length]]  # fmt: skip
            table.append(["log-mel", *map(figure_text, LOG_MEL[length]), "0.0"])
            if not rows:
                caption = f"Table: the published rows, {SETS[length]}, pool of {pool}, of the benchmark itself"
                blocks.append(Table([*columns, ">SUPERB points"], table, caption, folded=True))
    note = f"SUPERB points are against the best of the published pool of {pool}, column by column, and log-mel: points "
    blocks.append(Note(note + "from another pool do not compare. Rows measured here do not enter the pool."))
    return blocks


def figure_blocks(standing: Sequence[Standing], length: Duration, looks: dict[str, Look]) -> list:
    """Figures with intervals, chance and counts: a row a figure, a column a model; and a chart of the same."""
    rows, drawn = [], []
    alone = [monolingual_interval(each) for each in standing]
    if any(alone):
        cells = [bracketed(found.value, (found.low, found.high)) if found else MISSING for found in alone]
        tested = max(sum(each["all"]["utterances"] for each in found.sets.values()) for found in standing)
        rows.append([COLUMNS.monolingual, count(tested), *cells, "100.0", "100.0"])
        drawn.append((COLUMNS.monolingual, [(found.value, found.low, found.high) if found else None for found in alone],
                      100.0))  # fmt: skip
    for column, (task, group, name) in zip(COLUMNS[1:], FIGURES, strict=True):
        found = [each.tasks.get(task, {}).get("groups", {}).get(group, {}) for each in standing]
        known = next((each.tasks[task] for each, row in zip(standing, found, strict=True) if name in row), None)
        if known is None:
            continue
        ends = [row.get(f"{name}_interval") for row in found]
        cells = [bracketed(number(row.get(name)), end) for row, end in zip(found, ends, strict=True)]
        chance = known["chance"]
        levels = ["100.0", "100.0"]
        if name == "accuracy":
            always = chance["majority"].get(group, math.nan)
            levels = [f"{chance['uniform']:.1f}", f"{figure_text(always)} ({chance['language']})"]
            level = max(chance["uniform"], always)
        else:
            level = 100.0
        tested = max(number(row.get("utterances")) for row in found if name in row)
        rows.append([column, count(tested), *cells, *levels])
        drawn.append((column, [(number(row.get(name)), *(end or (math.nan, math.nan)))
                               for row, end in zip(found, ends, strict=True)], level))  # fmt: skip
    blocks = challenge_blocks(standing, looks)
    if not rows:
        none = "None of the benchmark's seven figures: the first needs all 13 sets, the others their tracks."
        return [Note(none), *blocks]
    series = [charts.Series(Look("faint", "|"), [level for _, _, level in drawn], size=12)]
    for place, each in enumerate(standing):
        triples = [values[place] or (math.nan,) * 3 for _, values, _ in drawn]
        series.append(charts.Series(looks[each.model], *(list(column) for column in zip(*triples, strict=True))))
    svg = charts.row_chart(
        [label for label, _, _ in drawn], series, name=f"figures-{length}", title="percent", zero=True, width=490,
        show=lambda value: f"{value:g}", alt=f"The figures of each model with intervals and chance, {SETS[length]}.",
    )  # fmt: skip
    legend = [(swatch(looks[each.model]), each.model) for each in standing]
    legend.append((swatch(Look("faint", "|")), "chance"))
    figure = Figure(
        [Chart("", svg)], legend,
        shows="Error rates (CER, PER) are better left, accuracies right. Chance is the better of a language drawn "
        "evenly and always the most frequent one of the training set; for an error rate, writing nothing (100).",
        good="intervals that leave chance, and each other.",
        caution="utterances of one speaker are not independent: for other speakers the intervals are too narrow.",
    )  # fmt: skip
    columns = ["figure", ">test utterances", *(f">{each.model}" for each in standing), ">chance: even, or nothing"]
    return [figure, Table([*columns, ">chance: most frequent"], rows), *blocks]


def challenge_blocks(standing: Sequence[Standing], looks: dict[str, Look]) -> list:
    """The four figures of ML-SUPERB 2.0's challenge, of the models that have them."""
    rows = [
        [mark(each.model, looks), each.track, *map(figure_text, each.figures), count(each.utterances)]
        for each in averages_of(standing)
    ]
    columns = ["model", "track", *(f">{name}" for name in AVERAGES), ">utterances"]
    return [Table(columns, rows, "ML-SUPERB 2.0, means over languages"), Note(WORST)] if rows else []


def deviation_blocks(every: Sequence[Standing]) -> list:
    """What deviates, of which models, sets and tracks; then what holds of this code always, and notes on models."""
    said: dict[tuple[str, str, str], list[str]] = {}
    always: dict[str, None] = {}
    for each in every:
        lines: dict[str, list[str]] = {}
        for found in each.every:
            for line in found["protocol"]["deviations"]:
                lines.setdefault(line, []).append(found["track"])
            always |= dict.fromkeys(found["protocol"]["differences"])
        if 0 < len(each.sets) < len(MONOLINGUAL_SETS):
            lines["not all sets, so that there is no mean"] = [found["track"] for found in each.sets.values()]
        for line, tracks in (lines or {"nothing": [found["track"] for found in each.every]}).items():
            said.setdefault((SETS[each.duration], line, on(tracks)), []).append(each.model)
    rows = [[length, line, tracks, ", ".join(models)] for (length, line, tracks), models in said.items()]
    blocks: list[Any] = [Table(["set", "deviates in", "on", "models"], rows)]
    blocks.append(Table(["of this code always"], [[line] for line in always]))
    notes = dict.fromkeys((each.model, note) for each in every for found in each.every
                          for note in found["model"]["notes"])  # fmt: skip
    return [*blocks, Table(["model", "note"], list(notes))] if notes else blocks


def on(tracks: Sequence[str]) -> str:
    """Tracks in few words: "monolingual (all 13 sets), joint"."""
    sets = [track.split()[1] for track in tracks if track.startswith("monolingual ")]
    named = f"all {len(sets)} sets" if len(sets) == len(MONOLINGUAL_SETS) else ", ".join(sets)
    others = [track for track in tracks if not track.startswith("monolingual ")]
    return ", ".join([f"monolingual ({named})"] * bool(sets) + others)
