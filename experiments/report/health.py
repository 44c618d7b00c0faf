"""How the runs went: every language's part in the accuracy, waiting for data, sizes, skipped steps."""

import math
import statistics

from experiments.report import charts
from experiments.report.page import Chart, Figure, Table, swatch
from experiments.report.results import Results, count, largest, number, percent

# Of a point of a curve, in the order of the panels.
PANELS = (
    ("accuracy_of_languages", "masked accuracy, mean over languages"),
    ("accuracy_of_low_resource", "masked accuracy, mean over low-resource languages"),
    ("input_wait", "share of the time that waits for data"),
)


def health_blocks(run: Results) -> list[Figure | Table]:
    """Of the section on training: curves by language group and of waiting, and a table with a row a stage."""
    lines, rows, marks = [], [], []
    for stage, points in run.curves.items():
        columns = [[number(point.get(key)) for point in points] for key, _ in PANELS]
        if not any(math.isfinite(value) for column in columns for value in column):
            continue
        lines.append(charts.Curve(run.look(stage), [number(point.get(run.curve_unit)) for point in points], columns))
        marks.append((swatch(run.look(stage)), run.title(stage)))
        last = points[-1]
        rows.append(
            [
                run.mark(stage),
                percent(middle(points, "input_wait")),
                shown(middle(points, "step_seconds"), ".3g"),
                percent(middle(points, "mfu")),
                shown(number(last.get("update_to_weight")), ".1e"),
                shown(largest(point.get("largest_hidden") for point in points), ",.1f"),
                shown(number(last.get("target_perplexity")), ",.0f"),
                shown(number(last.get("predicted_perplexity")), ",.0f"),
                count(last.get("skipped")),
            ]
        )
    blocks: list[Figure | Table] = []
    kept = [
        place
        for place in range(len(PANELS))
        if any(math.isfinite(value) for line in lines for value in line.panels[place])
    ]
    if kept:
        svg = charts.curves(
            [line._replace(panels=[line.panels[place] for place in kept]) for line in lines],
            x_title="audio-hours of the stage" if run.curve_unit == "hours" else "step", name="health", width=640,
            panels=[charts.Panel(PANELS[place][1], charts.as_percent, zero=True) for place in kept], height=84,
            alt="Masked accuracy averaged over languages and over low-resource ones, and the share of the time spent "
            "waiting for data, of every stage.",
        )  # fmt: skip
        low = f" Low-resource are {run.low_resource_means}." if run.low_resource_means else ""
        blocks.append(
            Figure(
                [Chart("", svg, wide=True)],
                marks,
                shows="Of each line of metrics, the mean of the accuracies of the languages heard in it, each language "
                f"counting alike however much of it was heard.{low}",
                good="both means rise with the accuracy over all frames; waiting stays near zero.",
                caution="a window hears little of a rare language, and its curve is rough; metrics.jsonl has every "
                "language's own numbers.",
            )
        )
    if rows:
        columns = ["stage", ">waiting for data", ">seconds a step", ">utilisation (MFU)", ">update / weight, at last"]
        columns += [">largest hidden value", ">target perplexity", ">predicted perplexity", ">steps skipped"]
        blocks.append(Table(columns, rows, "How the runs went; docs/health.md says what each number means."))
    return blocks


def middle(points: list[dict], key: str) -> float:
    """The median of the finite values of a key; NaN where there is none."""
    values = [value for value in (number(point.get(key)) for point in points) if math.isfinite(value)]
    return statistics.median(values) if values else math.nan


def shown(value: float, form: str) -> str:
    """A number in this form; a dash for none."""
    return format(value, form) if math.isfinite(value) else "–"
