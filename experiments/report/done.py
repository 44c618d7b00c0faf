"""The sections on what was done: data, training, units, export, time."""

import math

from experiments.report import charts
from experiments.report.health import health_blocks
from experiments.report.page import Chart, Figure, Look, Note, Section, Table, swatch
from experiments.report.results import (
    Results,
    count,
    duration,
    hours,
    items,
    joined,
    listed,
    mapped,
    number,
    percent,
    pick,
    sentence,
    text,
)

STEP_COLOURS = {
    "prepare": "green", "train": "vermillion", "units": "amber", "evaluate": "blue", "probe": "muted",
    "export": "purple",
}  # fmt: skip


def data_section(run: Results) -> Section:
    """Hours of each language, and its natural share beside the share that each stage hears: charts and a table."""
    blocks = []
    corpus = mapped(run.data, "corpus")
    shares = [entry for entry in listed(run.data, "shares") if mapped(entry, "languages")]
    languages = run.languages
    names = [run.name(language) for language in languages]
    pictures = []
    spoken = [run.hours(language) for language in languages]
    if any(value > 0 for value in spoken):
        svg = charts.row_chart(
            names, [charts.Series(Look("ink", "o"), spoken)], name="hours", title="hours, log scale", log=True,
            stems=True, show=lambda value: f"{value:g} h", width=430, empty="none",
            alt="Hours of speech of each language on a logarithmic axis, sorted by hours.",
        )  # fmt: skip
        pictures.append(Chart("Hours of speech", svg))
    natural = [run.natural_share(language) for language in languages]
    legend = []
    if shares and languages:
        series = []
        legend = [(swatch(Look("ink", "|")), "natural share")]
        for entry in shares:
            look = run.look(text(entry.get("stage")))
            drawn = [number(pick(entry, "languages", language, "drawn")) for language in languages]
            series.append(charts.Series(look, drawn))
            legend.append((swatch(look), f"heard in {text(entry.get('label')) or text(entry.get('stage'))}"))
        series.append(charts.Series(Look("ink", "|"), natural, size=12))  # last: a thin line over the other marks
        svg = charts.row_chart(
            names, series, name="shares", title="share of the training audio heard, log scale", log=True, spans=True,
            show=lambda value: f"{100 * value:g}%", width=560, reference=1 / len(languages), empty="not drawn",
            alt="Share of each language in the corpus and in what each stage hears, on a logarithmic axis.",
        )  # fmt: skip
        pictures.append(Chart("Natural share and share heard", svg, wide=True))
    if pictures:
        blocks.append(
            Figure(
                pictures,
                legend,
                shows="Each row is a language; the largest stands first. The dashed line is an equal share for all. "
                "Marks right of the natural share are heard more often than the corpus would have it.",
                good="without balancing the marks sit on the natural share; with it they draw together around the "
                "dashed line, and the order of the languages stays.",
                caution="a small language that is heard often repeats itself: look at its epochs in the table.",
            )
        )
    if languages and (corpus or shares):
        columns = ["language", "code", ">corpora", ">hours", ">training clips", ">held-out clips", ">natural share"]
        for entry in shares:
            label = text(entry.get("label")) or text(entry.get("stage"))
            columns += [f">share, {label}", f">epochs, {label}"]
        rows = []
        for language in languages:
            row = run.corpus.get(language, {})
            cells = [run.name(language), language, count(row.get("corpora")), hours(run.hours(language))]
            cells += [count(row.get("train_clips")), count(row.get("held_out_clips"))]
            cells.append(percent(run.natural_share(language), digits=2))
            for entry in shares:
                drawn = mapped(entry, "languages", language)
                epochs = number(drawn.get("epochs"))
                cells += [percent(drawn.get("drawn"), digits=2), f"{epochs:,.1f}" if math.isfinite(epochs) else "–"]
            rows.append(cells)
        blocks.append(Table(columns, rows, f"Table: {len(rows)} languages", folded=True))
    size = [f"{hours(corpus.get('hours'))} hours" * math.isfinite(number(corpus.get("hours")))]
    size.append(f"{count(corpus.get('clips'))} clips" * math.isfinite(number(corpus.get("clips"))))
    size.append(f"{len(languages)} languages" * bool(languages))
    return Section("data", "Data", ", ".join(filter(None, size)) + ".", blocks)


def training_section(run: Results) -> Section:
    """Loss and masked accuracy over audio-hours (steps where hours are missing): a chart a chain of stages, a table."""
    entries, unit = run.curves, run.curve_unit

    def start(stage: str) -> float:
        before = run.continues.get(stage)
        return start(before) + number(entries[before][-1].get(unit)) if before in entries else 0.0

    panels: dict[str, list[str]] = {}
    for stage in entries:
        root = stage
        while run.continues.get(root) in entries:
            root = run.continues[root]
        panels.setdefault(root, []).append(stage)
    pictures, rows = [], []
    for place, stages in enumerate(panels.values()):
        lines = []
        for stage in stages:
            points = entries[stage]
            columns = {key: [number(point.get(key)) for point in points] for key in (unit, "loss", "accuracy")}
            x = [start(stage) + value for value in columns[unit]]
            lines.append(charts.Curve(run.look(stage), x, (columns["loss"], columns["accuracy"])))
            last = points[-1]
            cells = [run.mark(stage), count(last.get("step")), hours(last.get("hours"))]
            cells += [f"{number(point.get('loss')):.3f}".replace("nan", "–") for point in (points[0], last)]
            cells += [percent(point.get("accuracy")) for point in (points[0], last)]
            rows.append(cells)
        svg = charts.curves(
            lines, name=f"curves{place}", x_title="audio-hours" if unit == "hours" else "step",
            width=280 if len(stages) == 1 else 400 if len(stages) <= 3 else 640,
            panels=(charts.Panel("training loss"), charts.Panel("masked accuracy", charts.as_percent)),
            branches=sorted({start(stage) for stage in stages} - {0.0}),
            alt=f"Training loss and masked accuracy of {', '.join(map(run.title, stages))}.",
        )  # fmt: skip
        rest = f", then {joined([run.called(stage) for stage in stages[1:]])}" if len(stages) > 1 else ""
        pictures.append(Chart(sentence(run.called(stages[0]) + rest), svg, wide=len(stages) > 3))
    blocks = []
    if pictures:
        blocks = [
            Figure(
                pictures, [(swatch(run.look(stage)), run.title(stage)) for stage in entries],
                shows="Loss and masked accuracy on the rows the stage trains on, smoothed where more points were "
                "logged than can be drawn." + continued_stages(run, list(entries)),
                good="a loss that falls and flattens, an accuracy that rises, and no jump except at a dashed line, "
                "where the units or the mix of languages change.",
                caution="heights of stages with different units as targets do not compare. Of stages with the same "
                "units the balanced one hears more of the hard, rare languages: a higher training loss there is no "
                "verdict.",
            ),
            Table(
                ["stage", ">steps", ">audio-hours", ">first loss", ">last loss", ">first accuracy", ">last accuracy"],
                rows,
            ),
        ]  # fmt: skip
    return Section("training", "Training", "What the optimizer saw.", [*blocks, *health_blocks(run)])


def continued_stages(run: Results, stages: list[str]) -> str:
    """Sentences that say which of the drawn stages goes on from which, and whether with its units; else nothing."""
    units = {text(entry.get("stage")): text(entry.get("unit_set")) for entry in listed(run.data, "curves")}
    groups: dict[tuple[str, str], list[str]] = {}
    for stage in stages:
        before = run.continues.get(stage)
        if before not in stages:
            continue
        known = units.get(stage) and units.get(before)
        same = "with the same units" if units.get(stage) == units.get(before) else "with other units and a fresh head"
        groups.setdefault((before, f" {same}" if known else ""), []).append(run.called(stage))
    if not groups:
        return ""
    parts = [
        f"{joined(names)} {'continues' if len(names) == 1 else 'continue'} {run.called(before)}{how}"
        for (before, how), names in groups.items()
    ]
    rule = " A stage that continues another one's encoder starts at the dashed line where that one ended: "
    return rule + "; ".join(parts) + "."


def units_section(run: Results) -> Section:
    """How evenly each set of units is used: a chart a set, a table with perplexity and dead units."""
    pictures, rows = [], []
    for place, entry in enumerate(listed(run.data, "units")):
        name, stage = text(entry.get("name")) or "units", text(entry.get("stage"))
        look = run.look(stage)
        size, perplexity = number(entry.get("units")), number(entry.get("perplexity"))
        counts = [value for value in map(number, items(entry, "counts")) if math.isfinite(value)]
        if sum(counts) > 0:
            svg = charts.usage(
                counts,
                name=f"usage{place}",
                look=look,
                width=310,
                alt=f"Use of the units of {name}, most used first, in multiples of even use.",
            )
            pictures.append(Chart(name, svg))
        top = percent(max(counts) / sum(counts)) if sum(counts) > 0 else "–"
        shown = f"{perplexity:,.1f}" if math.isfinite(perplexity) else "–"
        even = percent(perplexity / size, digits=0) if size > 0 else "–"
        target = swatch(look) + run.title(stage) if stage else "–"
        rows.append([name, target, count(size), shown, even, count(entry.get("dead")), top])
    blocks = []
    if pictures:
        blocks.append(
            Figure(
                pictures,
                [],
                shows="How often each unit is used, sorted. The dashed line is even use.",
                good="a gentle slope that never reaches zero. Perplexity is the number of units that would be as "
                "varied if all were used evenly: the nearer to the number of units, the better they are used.",
                caution="a cliff at the left is a unit that swallows silence or noise; a floor at the right is dead "
                "units. Either makes prediction easier without making it better.",
            )
        )
    if rows:
        columns = ["units", "targets of", ">units", ">perplexity", ">of all units", ">dead", ">most used unit"]
        blocks.append(Table(columns, rows))
    return Section("units", "Units", "The discrete targets that each stage learns to predict.", blocks)


def export_section(run: Results) -> Section:
    """The exported folder, its files and size, and the largest difference from the encoder that was measured."""
    export = mapped(run.data, "export")
    difference, size = number(export.get("largest_difference")), number(export.get("bytes"))
    files = [text(name) for name in items(export, "files")]
    checked = text(export.get("checked_with")) or "not checked"
    rows = [
        ["folder", text(export.get("folder"))],
        ["files", ", ".join(files)],
        ["size", f"{size / 1e6:,.1f} MB" if math.isfinite(size) else ""],
        ["compared with", checked],
        ["largest difference", f"{difference:.1e}" if math.isfinite(difference) else "not measured"],
    ]
    blocks = []
    if export:
        good = "Rounding in float32 explains a difference of about 1e-5; the export fails above 1e-4."
        blocks = [Table(["export", ""], [row for row in rows if row[1]]), Note(good)]
    return Section("export", "Export", "The encoder in the layout of Hugging Face transformers.", blocks)


def time_section(run: Results) -> Section:
    """How long each step took, as a chart and a table, and the machine it ran on."""
    steps, machine = listed(run.data, "steps"), mapped(run.data, "machine")
    blocks: list = []
    if steps:
        names = [text(step.get("name")) or "step" for step in steps]
        seconds = [max(0.0, number(step.get("seconds"))) for step in steps]
        words = [name.split()[0] if name.split() else name for name in names]
        kinds = [STEP_COLOURS.get(word, "faint") for word in words]
        svg = charts.timeline(
            names, seconds, name="time", show=duration, kinds=kinds, width=640,
            alt="When each step of the run started and how long it took.",
        )  # fmt: skip
        legend = {word: kind for word, kind in zip(words, kinds, strict=True) if kind != "faint"}
        by_kind = {word: sum(s for s, w in zip(seconds, words, strict=True) if w == word) for word in legend}
        largest = max(by_kind, key=by_kind.get, default="")
        shows = f"Each bar starts where the one above it ended: {duration(run.total_seconds)} in all."
        if largest:
            part = percent(by_kind[largest] / max(run.total_seconds, 1e-9), digits=0)
            shows += f" {part} of it went to steps of “{largest}”."
        marks = [(swatch(Look(kind, "s")), word) for word, kind in legend.items()]
        good = "training takes most of the time, and what surrounds it little."
        blocks.append(Figure([Chart("", svg, wide=True)], marks, shows=shows, good=good))
        total = max(run.total_seconds, 1e-9)
        rows = [
            [name, duration(value), percent(value / total), text(step.get("note"))]
            for name, value, step in zip(names, seconds, steps, strict=True)
        ]
        rows.append(["total", duration(run.total_seconds), "", ""])
        blocks.append(Table(["step", ">time", ">share", "note"], rows))
        if text(pick(run.data, "time_counted")):
            blocks.append(Note(text(run.data["time_counted"])))
    if machine:
        keys = {"processor": "processor", "cores": "cores", "memory_gb": "memory (GB)", "devices": "devices"}
        keys |= {key: key.replace("_", " ") for key in machine if key not in keys}
        rows = [[label, text(machine.get(key))] for key, label in keys.items() if text(machine.get(key))]
        blocks.append(Table(["machine", ""], rows))
    return Section("time", "Machine and time", "What it took.", blocks)
