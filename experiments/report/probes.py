"""The section on probes: how good the parameters were while they were trained, with intervals and chance."""

import math
from typing import Any, NamedTuple

from experiments.report import charts, trends
from experiments.report.page import Chart, Figure, Look, Note, Section, Table, swatch
from experiments.report.results import (
    UNCLEAR,
    Results,
    count,
    interval,
    largest,
    listed,
    mapped,
    number,
    percent,
    pick,
    pill,
    signed,
    text,
    verdict,
)
from experiments.report.scores import FEW_CLIPS


class Part(NamedTuple):
    """A part of a probe's line: `key` of its number, of its chance level, and of the comparison with that."""

    name: str
    title: str
    key: str
    against: str
    means: str  # what the dashed line is


PARTS = (
    Part(
        "masked", "masked accuracy, mean over languages", "accuracy", "against_trivial", "the better trivial predictor"
    ),
    Part("language", "language across sources", "accuracy", "against_chance", "guessing"),
    Part("phones", "phone purity of units of the layer", "purity", "against_chance", "the same units, shuffled"),
)
COLUMNS = (
    *("stage", ">clips", ">first", ">last", ">interval", ">without learning", "against that"),
    *(">points since the first", "verdict"),
)


def level_of(part: Part, line: dict) -> float:
    """What the number of a part would be without any learning; NaN where it is not known."""
    row = mapped(line, part.name)
    return largest([row.get("chance"), row.get("majority"), row.get("copy")])


def judged(part: Part, lines: list[dict]) -> list[dict]:
    """The lines in which the part found something."""
    found = [line for line in lines if math.isfinite(number(pick(line, part.name, part.key)))]
    return [line for line in found if math.isfinite(number(line.get("step")))]


def probes_section(run: Results) -> Section | None:
    """Every probe over steps, the last of each beside the first, and languages; None where nothing was probed."""
    entries = {text(entry.get("stage")): listed(entry, "points") for entry in listed(run.data, "probes")}
    entries = {stage: lines for stage, lines in entries.items() if lines}
    if not entries:
        return None
    blocks: list[Any] = []
    panels, tables = [], []
    for part in PARTS:
        found = {stage: judged(part, lines) for stage, lines in entries.items()}
        found = {stage: lines for stage, lines in found.items() if lines}
        if found:
            drawn = [trend(run, stage, part, lines) for stage, lines in found.items()]
            title = f"{part.title} (dashed: {part.means})"
            panels.append((charts.Panel(title, charts.as_percent, zero=True), drawn))
            rows = [table_row(run, stage, part, lines) for stage, lines in found.items()]
            tables.append(Table(COLUMNS, rows, f"{part.title[:1].upper()}{part.title[1:]}: the last probe"))
    if panels:
        svg = trends.trends(
            panels, name="probes", x_title="step of the stage", width=640,
            alt="Each probe's result over the steps of its stage, with intervals and the level of chance.",
        )  # fmt: skip
        legend = [(swatch(run.look(stage)), run.title(stage)) for stage in entries]
        legend.append((swatch(Look("ink", "o"), hollow=True), "hollow: not distinguishable from the dashed line"))
        blocks.append(
            Figure(
                [Chart("", svg, wide=True)],
                legend,
                shows="A mark a probe, with its 95 % interval. Dashed lines are what needs no learning.",
                good="marks that leave the dashed line and rise, with intervals that leave the first one behind.",
                caution="few clips, the same ones each time: neighbouring marks err together. Whether a number "
                "changed is said by the comparison clip by clip in the tables, not by whether intervals overlap.",
            )
        )
        blocks += tables
    for stage, lines in entries.items():
        table = language_table(run, stage, lines)
        if table is not None:
            blocks.append(table)
    notes = {(part.title, text(note)) for part in PARTS for lines in entries.values() for line in lines
             if (note := pick(line, part.name, "note"))}  # fmt: skip
    blocks += [Note(f"{title[:1].upper()}{title[1:]}: {note}.") for title, note in sorted(notes)]
    shares = [number(lines[-1].get("probe_share")) for lines in entries.values()]
    cost = f" They took {percent(max(shares))} of a stage's time at most." if all(map(math.isfinite, shares)) else ""
    lead = f"The parameters, judged now and then while they were trained, on few clips.{cost}"
    return Section("probes", "Probes while training", lead, blocks)


def trend(run: Results, stage: str, part: Part, lines: list[dict]) -> trends.Trend:
    """A stage's series of one part."""
    rows = [mapped(line, part.name) for line in lines]
    columns = [[number(row.get(key)) for row in rows] for key in (part.key, "low", "high")]
    return trends.Trend(
        run.look(stage),
        [number(line.get("step")) for line in lines],
        *columns,
        level=[level_of(part, line) for line in lines],
        strong=[said_of(part, row) != UNCLEAR for row in rows],
    )


def said_of(part: Part, row: dict) -> str:
    """The verdict against the dashed line; by the interval alone where the two were not compared clip by clip."""
    if mapped(row, part.against):
        return verdict(mapped(row, part.against))
    chance = number(row.get("chance"))
    return verdict({key: number(row.get(key)) - chance for key in ("low", "high")})


def table_row(run: Results, stage: str, part: Part, lines: list[dict]) -> list:
    """The last line of a stage beside the first."""
    first, last = (mapped(line, part.name) for line in (lines[0], lines[-1]))
    since = mapped(last, "since_first")
    changed = [f"{signed(since.get('difference'))} {interval(since)}", pill(verdict(since))] if since else ["–", "–"]
    return [
        swatch(run.look(stage)) + run.short(stage),
        count(last.get("clips")),
        percent(first.get(part.key)),
        percent(last.get(part.key)),
        interval(last, points=False),
        percent(level_of(part, lines[-1])),
        pill(said_of(part, last)),
        *changed,
    ]


def language_table(run: Results, stage: str, lines: list[dict]) -> Table | None:
    """Of each language: masked accuracy of the first and the last probe, and language across sources."""
    masked, told = ([mapped(line, name, "languages") for line in judged(part, lines)]
                    for name, part in (("masked", PARTS[0]), ("language", PARTS[1])))  # fmt: skip
    if not masked:
        return None
    rows = []
    for language in run.languages:
        row = mapped(masked[-1], language)
        if not row:
            continue
        few = number(row.get("clips")) < FEW_CLIPS
        rows.append(
            [
                run.name(language),
                count(row.get("clips")) + " (few)" * few,
                *(percent(pick(each, language, "accuracy")) for each in (masked[0], masked[-1])),
                percent(largest([row.get("majority"), row.get("copy")])),
                count(pick(told[-1], language, "clips")) if told else "–",
                *(percent(pick(each, language, "accuracy")) for each in ((told[0], told[-1]) if told else ({}, {}))),
            ]
        )
    columns = ["language", ">clips", ">masked accuracy, first", ">last", ">better trivial predictor"]
    columns += [">clips of the language probe", ">right, first", ">last"]
    caption = f"Table: {run.short(stage)}, probes by language (few: under {FEW_CLIPS} clips, which say little)"
    return Table(columns, rows, caption, folded=True)
