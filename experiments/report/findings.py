"""The summary in sentences: what the numbers say, and no more than that."""

import math
from collections.abc import Callable

from experiments.report.page import Finding
from experiments.report.results import (
    BALANCED,
    BETTER,
    CONTROL,
    UNCLEAR,
    Results,
    above_chance,
    count,
    hours,
    interval,
    items,
    joined,
    listed,
    mapped,
    number,
    on_clips,
    percent,
    pick,
    ratio,
    signed,
    text,
    times,
    tone,
    verdict,
)


def findings(run: Results) -> list[Finding]:
    """The summary: what the numbers say, most important first, in sentences that do not say more."""
    found = [accuracy_finding(run), ratios_finding(run)]
    found += comparison_findings(run, "low_resource", "On low-resource languages")
    found += comparison_findings(run, "all_languages", "On all languages together")
    found += [probe_finding(run), *probe_differences(run)]
    found += [balance_finding(run), corpus_finding(run), export_finding(run)]
    return [finding for finding in found if finding]


def accuracy_finding(run: Results) -> Finding | None:
    """Masked accuracy of the balanced stage (else the last compared) against the better trivial predictor."""
    rows = {text(row.get("stage")): row for row in run.compared}
    stage = BALANCED if BALANCED in rows else next(reversed(rows), None)
    total = mapped(rows.get(stage), "total")
    if not math.isfinite(times(total)):
        return Finding("not judged", run.no_held_out_data(), "unclear") if run.not_judged else None
    rule = max(("majority", "copy"), key=lambda rule: max(0.0, number(total.get(rule))))
    better = f"the better trivial predictor ({rule}, {percent(total.get(rule))})"
    over = f" on {on_held_out(total)}" if on_held_out(total) else ""
    start = f"Masked accuracy after {run.called(stage)} is {percent(total.get('accuracy'))}{over}"
    if times(total) <= 1:
        words = f"{start}, which does not reach {better}: nothing shows that context is used."
        return Finding(ratio(total), words, "worse")
    macro = mapped(rows.get(stage), "macro")
    many = f"{count(macro.get('languages'))} languages" if number(macro.get("languages")) > 0 else "languages"
    mean = f"; {times(macro):.2f} times on the mean over {many}" if math.isfinite(times(macro)) else ""
    return Finding(ratio(total), f"{start}: {times(total):.2f} times {better}{mean}.")


def ratios_finding(run: Results) -> Finding | None:
    """Of every judged stage, accuracy over that of the better trivial predictor."""
    rows = [row for row in run.accuracy if math.isfinite(times(mapped(row, "total")))]
    if len(rows) < 2:  # a single one stands in the sentence before
        return None
    totals = [mapped(row, "total") for row in rows]
    sizes = [on_held_out(total) for total in totals]
    same = sizes[0] if len(set(sizes)) == 1 else ""
    parts = []
    for row, total, size in zip(rows, totals, sizes, strict=True):
        own = f" ({size})" if size and not same else ""
        parts.append(f"{ratio(total)} after {run.called(text(row.get('stage')))}{own}")
    words = "Masked accuracy over that of the better trivial predictor, stage by stage"
    words += f" on {same}: " if same else ": "
    words += f"{joined(parts)}. Stages that predict other units answer other questions."
    low, high = min(map(times, totals)), max(map(times, totals))
    return Finding(f"{low:.2f}–{high:.2f}×", words, "worse" if high <= 1 else "fact")


def on_held_out(total: dict) -> str:
    """ "2,509 held-out clips"; empty where the number is not known."""
    return on_clips(total).replace(" clips", " held-out clips")


def phrase(row: dict, name: Callable[[str], str]) -> str:
    """ "2.1 points above stage 1 [1.0, 3.2]", or "not distinguishable from stage 1 (+0.3 points [-0.8, 1.4])"."""
    said, against = verdict(row), name(text(row.get("against")))
    if said == UNCLEAR:
        shown = f"{signed(row.get('difference'))} points {interval(row)}".replace(" no", ", no")
        return f"not distinguishable from {against} ({shown})"
    side = "above" if said == BETTER else "below"
    return f"{signed(row.get('difference'))[1:]} points {side} {against} {interval(row)}"


def comparison_findings(run: Results, key: str, start: str) -> list[Finding]:
    """One sentence a compared stage: all its differences in this group of languages."""
    group = mapped(run.data, key)
    differences = [row for row in listed(group, "differences") if math.isfinite(number(row.get("difference")))]
    size = []
    if key == "low_resource" and run.low_resource:
        judged = items(group, "judged")
        fewer = f"{len(judged)} of " if 0 < len(judged) < len(run.low_resource) else ""
        size.append(f"{fewer}{len(run.low_resource)} languages")
    size += filter(None, [on_clips(group)])
    start += f" ({', '.join(size)})" if size else ""
    found = []
    for stage in dict.fromkeys(text(row.get("of")) for row in differences):
        rows = [row for row in differences if text(row.get("of")) == stage]
        said = {text(row.get("against")): verdict(row) for row in rows}
        words = f"{start}, {run.called(stage)} is {joined([phrase(row, run.called) for row in rows])}."
        if said.get(CONTROL) == UNCLEAR and BETTER in said.values():
            words += " Longer training alone may explain the gain."
        same = set(said.values())
        if len(same) > 1:
            found.append(Finding("mixed", words, "unclear"))
        elif same == {UNCLEAR}:
            found.append(Finding("unclear", words, "unclear"))
        else:
            cautious = min((number(row.get("difference")) for row in rows), key=abs)
            found.append(Finding(f"{signed(cautious)} pts", words, tone(same.pop())))
    return found


def probe_finding(run: Results) -> Finding | None:
    """The representation with the highest probe accuracy across sources, and whether it is above chance."""
    rows = [row for row in listed(run.data, "probe", "rows") if math.isfinite(number(row.get("accuracy")))]
    if not rows:
        return None
    best = max(rows, key=lambda row: number(row.get("accuracy")))
    name, chance = run.probe_title(run.probe_name(best)), percent(best.get("chance"))
    size = on_clips(best, languages=best.get("languages"))
    start = f"Language across sources{f', on {size}' if size else ''}"
    if not any(map(above_chance, rows)):
        words = f"{start}: none of the {len(rows)} representations is distinguishable from chance"
        words += f"; the highest is {name} at {percent(best.get('accuracy'))}, chance {chance}."
        return Finding("unclear", words, "unclear")
    said = "above" if above_chance(best) else "not distinguishable from"
    words = f"{start}: the highest of {len(rows)} representations is {name}"
    words += f" {interval(best, points=False)}, {said} chance ({chance})."
    return Finding(percent(best.get("accuracy")), words)


def probe_differences(run: Results, most: int = 2) -> list[Finding]:
    """The first differences of the probe in one sentence each."""
    found = []
    for row in listed(run.data, "probe", "differences"):
        if not math.isfinite(number(row.get("difference"))):
            continue
        said = verdict(row)
        size = f" ({on_clips(row)})" if on_clips(row) else ""
        words = f"In that probe{size}, {run.probe_title(text(row.get('of')))} is {phrase(row, run.probe_title)}."
        shown = "unclear" if said == UNCLEAR else f"{signed(row.get('difference'))} pts"
        found.append(Finding(shown, words, tone(said)))
    return found[:most]


def balance_finding(run: Results) -> Finding | None:
    """How many times their natural share the balanced stage (else the last) hears of the low-resource languages."""
    row = next((row for row in run.shares if row.get("stage") == BALANCED), run.shares[-1] if run.shares else None)
    shares = [mapped(row, "languages", language) for language in run.low_resource]
    natural, drawn = (sum(v for v in (number(s.get(key)) for s in shares) if v > 0) for key in ("natural", "drawn"))
    if not natural or not drawn:
        return None
    means = f" ({run.low_resource_means})" if run.low_resource_means else ""
    words = (
        f"The low-resource languages{means} are {percent(natural)} of the training audio and {percent(drawn)} of what"
    )
    return Finding(f"{drawn / natural:.1f}×", f"{words} {run.called(text(row.get('stage')))} hears.")


def corpus_finding(run: Results) -> Finding | None:
    """Hours, languages and clips of the corpus, its skew, and the languages without held-out clips."""
    size = number(pick(run.data, "corpus", "hours"))
    if not (run.corpus and size > 0):
        return None
    known = [value for value in map(run.hours, run.corpus) if value > 0]
    skew = f"; the largest language has {max(known) / min(known):,.0f} times the audio of the smallest" if known else ""
    silent = [run.name(code) for code, row in run.corpus.items() if row.get("held_out_clips") == 0]
    clips = number(pick(run.data, "corpus", "clips"))
    words = f"Speech in {len(run.corpus)} languages"
    words += f", {count(clips)} clips" if clips > 0 else ""
    words += skew + "."
    if silent:
        words += f" {joined(silent)} {'has' if len(silent) == 1 else 'have'} no held-out clips and cannot be judged."
    return Finding(f"{hours(size)} h", words)


def export_finding(run: Results) -> Finding | None:
    """The largest difference between the encoder and its export, or that the two were not compared."""
    export = mapped(run.data, "export")
    difference, checked = number(export.get("largest_difference")), text(export.get("checked_with"))
    if not export:
        return None
    if not math.isfinite(difference):
        words = f"The encoder was exported; its numbers were not compared ({checked or 'no check ran'})."
        return Finding("unchecked", words, "unclear")
    words = f"Largest difference between the encoder and its export, as {checked or 'another library'} runs it."
    return Finding(f"{difference:.1e}", words)
