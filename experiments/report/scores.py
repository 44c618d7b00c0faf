"""The sections on how good it is: masked accuracy, low-resource languages, the language probe."""

import math
from collections.abc import Callable, Sequence

from experiments.report import charts
from experiments.report.page import Chart, Figure, Look, Note, Section, Table, swatch
from experiments.report.results import (
    BETTER,
    CONTROL,
    OTHER,
    UNCLEAR,
    Results,
    above_chance,
    count,
    interval,
    items,
    largest,
    listed,
    mapped,
    number,
    on_clips,
    percent,
    pick,
    pill,
    ratio,
    signed,
    text,
    verdict,
)

FEW_CLIPS = 5  # accuracy on fewer held-out clips than this is drawn hollow
DIFFERENCES = (">clips", ">difference", ">interval", "verdict")


def accuracy_section(run: Results) -> Section:
    """Masked accuracy of every stage beside the trivial predictors, and by language for the stages that compare."""
    entries = [entry for entry in run.accuracy if entry not in run.not_judged]
    rows = []
    for entry in entries:
        stage, total, macro = text(entry.get("stage")), mapped(entry, "total"), mapped(entry, "macro")
        cells = [swatch(run.look(stage)) + run.short(stage), text(entry.get("unit_set")), count(entry.get("units"))]
        cells += [count(total.get("clips")), *(percent(total.get(key)) for key in ("accuracy", "majority", "copy"))]
        cells += [ratio(total), count(macro.get("languages")), percent(macro.get("accuracy")), ratio(macro)]
        rows.append(cells)
    columns = ["stage", "units from", ">units", ">clips", ">accuracy", ">majority", ">copy", ">× better trivial"]
    columns += [">languages", ">mean over languages", ">× better trivial"]
    blocks: list = [Note(run.no_held_out_data(), True)] if run.not_judged else []
    if rows:
        blocks.append(Table(columns, rows))
    if len({text(entry.get("unit_set")) for entry in entries}) > 1:
        blocks.append(
            Note("Rows with different units answer different questions: compare only rows with the same units.", True)
        )
    compared = run.compared
    languages = [language for language in run.languages if any(mapped(e, "languages", language) for e in compared)]
    if languages:
        low = set(run.low_resource)
        paths = [("total",), ("macro",), *(("languages", language) for language in languages)]
        clips = [largest([pick(entry, *path, "clips") for entry in compared]) for path in paths]
        clips[1] = clips[0]  # the mean over languages rests on the same clips
        notes = [f"{value:,.0f}" if value > 0 else "–" for value in clips]
        strong = [place < 2 or value >= FEW_CLIPS for place, value in enumerate(clips)]
        look_majority, look_copy = Look("faint", "|"), Look("faint", "x")
        series = [
            charts.Series(look, [number(pick(compared[-1], *path, key)) for path in paths], size=size)
            for look, key, size in ((look_majority, "majority", 11), (look_copy, "copy", 6))
        ]
        for entry in compared:
            values = [number(pick(entry, *path, "accuracy")) for path in paths]
            series.append(charts.Series(run.look(text(entry.get("stage"))), values, strong=strong))
        svg = charts.row_chart(
            ["All held-out frames", "Mean over languages", *map(run.name, languages)], series, name="languages",
            title="masked accuracy on held-out clips", show=lambda value: f"{100 * value:g}%", width=640, zero=True,
            notes=notes, notes_title="clips", strong_rows=2, empty="no held-out data",
            low_rows=[False, False, *(language in low for language in languages)],
            alt="Masked accuracy of each language for the stages that share units, with two trivial predictors.",
        )  # fmt: skip
        legend = [(swatch(run.look(text(e.get("stage")))), run.title(text(e.get("stage")))) for e in compared]
        legend.append((swatch(look_majority), "majority: always the most frequent unit"))
        legend.append((swatch(look_copy), "copy: the unit of the nearest visible frame"))
        few = f"marks are hollow where a language has fewer than {FEW_CLIPS} held-out clips. "
        blocks.append(
            Figure(
                [Chart("", svg, wide=True)],
                legend,
                shows="One row a language, most hours first. The stages share one set of units, so their marks compare."
                + f" Low-resource languages ({run.low_resource_means}) are printed in grey." * bool(low),
                good="filled marks clearly right of both grey marks in every row: then context is used, and not only "
                "the most frequent units or their duration.",
                caution=few + "Single rows rest on few clips from few speakers; judge by the comparisons with "
                "intervals below, not by one row.",
            )
        )
        table = []
        for path, label in zip(paths, ["All held-out frames", "Mean over languages", *languages], strict=True):
            cells = [run.name(label) if path[0] == "languages" else label, notes[len(table)]]
            cells += [percent(pick(entry, *path, "accuracy")) for entry in compared]
            cells += [percent(pick(compared[-1], *path, key)) for key in ("majority", "copy")]
            empty = path[0] == "languages" and not clips[len(table)] > 0
            table.append([cells[0], "no held-out data", *cells[2:]] if empty else cells)
        heads = [f">{run.title(text(entry.get('stage')))}" for entry in compared]
        heads = ["language", ">clips", *heads, ">majority", ">copy"]
        blocks.append(Table(heads, table, "Table: masked accuracy by language", folded=True))
    lead = (
        "Part of the frames is hidden from the encoder, and it names their units. Accuracy is the share it gets right "
        "on clips it never trained on. The two trivial predictors do not listen; copy is even given the true "
        "units of the visible frames."
    )
    return Section("accuracy", "Masked accuracy", lead, blocks)


def difference_rows(differences: Sequence[dict], title: Callable[[str], str]) -> list[list[str]]:
    """Table rows (of, against, clips, difference in points, interval, verdict) of a list of differences."""
    rows = []
    for row in differences:
        sides = [title(text(row.get(side))) for side in ("of", "against")]
        figures = [count(row.get("clips")), signed(row.get("difference")), interval(row)]
        rows.append([*sides, *figures, pill(verdict(row))])
    return rows


def difference_chart(rows: Sequence[tuple[str, dict]], *, name: str, width: float, alt: str) -> Chart:
    """Dots with intervals in percentage points around zero; hollow where the difference is not distinguishable."""
    values, low, high = ([100 * number(d.get(key)) for _, d in rows] for key in ("difference", "low", "high"))
    strong = [verdict(d) != UNCLEAR for _, d in rows]
    notes = [", ".join(filter(None, [verdict(d), on_clips(d)])) for _, d in rows]
    svg = charts.row_chart(
        [label for label, _ in rows], [charts.Series(Look("ink", "o"), values, low, high, strong)], name=name,
        title="difference in points", show=lambda value: f"{value:+g}".replace("-", "−") if value else "0",
        width=width, reference=0.0, zero=True, alt=alt, notes=notes, notes_title="verdict",
    )  # fmt: skip
    return Chart("", svg, wide=True)


def balance_section(run: Results) -> Section:
    """Differences between stages, with intervals, on low-resource languages and on all."""
    groups = [("low-resource", mapped(run.data, "low_resource")), ("all languages", mapped(run.data, "all_languages"))]
    groups = [(label, group) for label, group in groups if group]
    blocks: list = [Note(run.no_held_out_data(), True)] if run.not_judged else []
    rows = [(label, d) for label, group in groups for d in listed(group, "differences")]
    if rows:
        labelled = [
            (f"{label}: {run.short(text(d.get('of')))} − {run.short(text(d.get('against')))}", d) for label, d in rows
        ]
        control = " The control goes on from stage 1 as long as stage 2 does, but without balancing: only the "
        control += "difference to it is the effect of balancing."
        control *= any(d.get("against") == CONTROL for _, d in rows)
        alt = "Differences in masked accuracy with intervals, for low-resource languages and for all."
        blocks.append(
            Figure(
                [difference_chart(labelled, name="balance", width=640, alt=alt)],
                [
                    (swatch(Look("ink", "o")), "interval leaves out zero"),
                    (swatch(Look("ink", "o"), hollow=True), "not distinguishable"),
                ],
                shows="Difference in masked accuracy, each with its interval." + control,
                good="low-resource languages right of zero, and all languages together not left of it.",
                caution="an interval over clips does not know of other speakers, seeds or corpora: it is the smallest "
                "doubt one should have.",
            )
        )
        table = [
            [label, *cells]
            for label, group in groups
            for cells in difference_rows(listed(group, "differences"), run.title)
        ]
        blocks.append(Table(["languages", "stage", "against", *DIFFERENCES], table, "Differences in points"))
    stages = list(dict.fromkeys(text(row.get("stage")) for _, group in groups for row in listed(group, "rows")))
    if stages:
        values = [{text(r.get("stage")): r.get("accuracy") for r in listed(group, "rows")} for _, group in groups]
        table = [[run.mark(s), *(percent(v.get(s)) for v in values)] for s in stages]
        sizes = [f" ({on_clips(group)})" if on_clips(group) else "" for _, group in groups]
        heads = [f">{label}{size}" for (label, _), size in zip(groups, sizes, strict=True)]
        blocks.append(Table(["stage", *heads], table, "Masked accuracy, mean over languages"))
    for label, group in groups:
        names = [run.name(language) for language in items(group, "languages")]
        parts = [text(group.get("definition")), f"{count(group.get('clips'))} held-out clips" * ("clips" in group)]
        parts += [", ".join(names) if len(names) < len(run.languages) else ""]
        if any(parts):
            blocks.append(Note(f"{label.capitalize()}: {'; '.join(filter(None, parts))}."))
    return Section("balance", "Low-resource languages", "Does hearing them more often help?", blocks)


def probe_section(run: Results) -> Section:
    """Accuracy of the language probe across sources for each representation, its differences, and by language."""
    probe = mapped(run.data, "probe")
    entries, differences = listed(probe, "rows"), listed(probe, "differences")
    blocks: list = []
    if not entries and text(probe.get("note")):
        blocks.append(Note(text(probe.get("note"))))
    if entries:
        keys = [run.probe_name(entry) for entry in entries]
        values, low, high, chance = (
            [number(entry.get(key)) for entry in entries] for key in ("accuracy", "low", "high", "chance")
        )
        strong = [above_chance(entry) for entry in entries]
        series = [charts.Series(Look("faint", "|"), chance, size=13)]
        for look in dict.fromkeys(map(run.look, keys)):  # one series a stage, so that each keeps its look
            mine = [run.look(key) == look for key in keys]
            own = [[v if m else math.nan for v, m in zip(c, mine, strict=True)] for c in (values, low, high)]
            series.append(charts.Series(look, *own, strong))
        svg = charts.row_chart(
            [run.probe_title(key) for key in keys], series, name="probe", width=640, zero=True,
            title="accuracy on sources that were not trained on", show=lambda value: f"{100 * value:g}%",
            notes=[", ".join(filter(None, [percent(entry.get("accuracy")), on_clips(entry)])) for entry in entries],
            notes_title="accuracy, clips",
            alt="Accuracy of the language probe across sources for each representation, with intervals and chance.",
        )  # fmt: skip
        blocks.append(
            Figure(
                [Chart("", svg, wide=True)],
                [
                    (swatch(Look("faint", "|")), "chance"),
                    (swatch(OTHER, hollow=True), "hollow: not distinguishable from chance"),
                ],
                shows="A probe names the language from frozen features. It learns on some sources and is judged on "
                "others.",
                good="trained encoders right of the baseline and of chance, with intervals that do not meet.",
                caution="within a source, one language is nearly one speaker and one channel. A probe judged on the "
                "source it was trained on recognises the speaker and proves nothing, so only this one is shown.",
            )
        )
        rows = []
        for key, entry, own in zip(keys, entries, strong, strict=True):
            cells = [swatch(run.look(key)) + run.probe_title(key), percent(entry.get("accuracy"))]
            cells += [interval(entry, points=False), percent(entry.get("chance"))]
            cells += [count(entry.get(field)) for field in ("clips", "languages", "folds")]
            rows.append([*cells, pill(BETTER, " than chance") if own else pill(UNCLEAR, " from chance")])
        columns = ["representation", ">accuracy", ">interval", ">chance", ">clips", ">languages", ">folds", "verdict"]
        blocks.append(Table(columns, rows))
    if differences:
        rows = difference_rows(differences, run.probe_title)
        blocks.append(Table(["representation", "against", *DIFFERENCES], rows, "Differences in points"))
    by_language = {key: mapped(probe, "languages", key) for key in mapped(probe, "languages")}
    by_language = {key: value for key, value in by_language.items() if value}
    if by_language:
        spoken = [language for language in run.languages if any(language in value for value in by_language.values())]
        rows = []
        for language in spoken:
            clips = [pick(value, language, "clips") for value in by_language.values()]
            shown = [percent(pick(value, language, "accuracy")) for value in by_language.values()]
            rows.append([run.name(language), count(largest(clips)), *shown])
        columns = ["language", ">clips", *(f">{run.probe_title(key)}" for key in by_language)]
        blocks.append(Table(columns, rows, "Table: probe accuracy by language", folded=True))
    if blocks and text(probe.get("protocol")):
        blocks.append(Note(f"Protocol: {text(probe['protocol'])}"))
    return Section("probe", "Language probe", "How much of the language can be read off, across sources.", blocks)
