"""The report's charts: every function draws one figure with matplotlib and returns it as an SVG element for the page.

One SVG unit is one CSS pixel. Text stays text in the page's own font. Every colour is written as the page's CSS
variable, so a chart follows the page into dark mode. The same input gives the same bytes. All quantities arrive as
floats, NaN where there is none. matplotlib is imported here and in the
modules that draw with this one's helpers, and nowhere else: import them late.
"""

import io
import math
import re
import textwrap
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.page import COLOURS, Look

GAP = "\u00a0\u00a0"  # plain blanks at the start of an SVG text are dropped
ROW = 21.0  # pixels from one row of a row chart to the next
LONGEST_LABEL = 36  # characters; longer ones are cut with an ellipsis
WIDEST_CURVE = 300  # points of a curve that are drawn; longer ones are averaged in equal groups
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,  # a name with a dollar sign is a name
    "font.family": ["DejaVu Sans"],  # ships with matplotlib and is wide: what fits in it fits in the page's font
    "font.size": 11.5,
    "axes.linewidth": 0.8,
}
SMALL = {"color": COLOURS["muted"][0], "fontsize": 11}  # titles of axes and notes


class Series(NamedTuple):
    """One mark a row: `values` [rows], intervals `low`, `high` [rows] if given, `strong` [rows]: False = hollow."""

    look: Look
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    strong: Sequence[bool] | None = None
    size: float = 8.0


class Curve(NamedTuple):
    """One stage's curves: `x` [points], and the values [points] of each panel."""

    look: Look
    x: Sequence[float]
    panels: Sequence[Sequence[float]]


class Panel(NamedTuple):
    """One of several charts above each other: `show` is the text of a value on its axis (None: the number)."""

    title: str
    show: Callable[[float], str] | None = None
    zero: bool = False


def as_percent(value: float) -> str:
    """A share on an axis: 0.31 to "31%"."""
    return f"{100 * value:.3g}%"


def colour(name: str) -> str:
    """The light-mode hex code of a colour of `COLOURS`, as matplotlib is to draw it."""
    return COLOURS[name][0]


def to_svg(figure: Figure, *, name: str, alt: str) -> Markup:
    """The figure as one SVG element that can stand in a page beside others: no namespaces, ids that start with `name`.

    matplotlib writes numbers with six decimals, an id on every group and a font list on every text; dropping them
    makes the page less than half as large.
    """
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")  # the browser has fonts that matplotlib lacks
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    variables = {light: f"var(--{key})" for key, (light, _) in COLOURS.items()}
    used = set(re.findall(r'(?:href="#|url\(#)([\w.-]+)', buffer.getvalue()))
    parents = {child: parent for parent in root.iter() for child in parent}
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        if element.tag == "style":
            parents[element].remove(element)
            continue
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            key = key.rpartition("}")[2]
            if key == "style":
                value = re.sub(r"font-family:[^;]*;?\s*", "", value)
                value = re.sub(r"#[0-9a-f]{6}", lambda found: variables.get(found[0], found[0]), value)
            elif key == "id":
                if value not in used:
                    continue
                value = f"{name}-{value}"
            elif key == "href":
                value = f"#{name}-{value[1:]}"
            elif key == "clip-path":
                value = value.replace("url(#", f"url(#{name}-")
            elif key == "transform" and value.startswith("rotate(-0 "):
                continue
            elif key in ("d", "x", "y", "width", "height", "transform"):
                value = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value)
                value = " ".join(value.split())
            element.set(key, value)
        element.tail = None
        element.text = element.text if element.tag == "text" else None
    width = float(root.get("width").removesuffix("pt"))
    root.attrib.pop("height")
    root.attrib.pop("version")
    root.attrib.update(width=f"{width:g}", role="img")
    root.set("aria-label", alt)
    root.set("class", "chart")
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def new_axes(figure: Figure, *, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place given in pixels from the figure's upper left corner, without a frame."""
    full_width, full_height = figure.get_size_inches() * 72
    box = (left / full_width, 1 - (top + height) / full_height, width / full_width, height / full_height)
    axes = figure.add_axes(box)
    axes.set_frame_on(False)
    axes.tick_params(length=0, colors=colour("muted"), pad=5, labelsize=11)
    return axes


def plain(label: str) -> str:
    """A row's name, short enough for a chart."""
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1].rstrip() + "…"


def text_width(texts: Sequence[str]) -> float:
    """Pixels that the longest of the texts needs: 6.3 a character, more than common fonts take at 11.5 px."""
    return max((len(text) for text in texts), default=0) * 6.3


def log_ticks(low: float, high: float) -> list[float]:
    """Between three and about seven round values from `low` to `high`, equally spaced to the eye on a log scale."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks


def row_chart(
    labels: Sequence[str],
    series: Sequence[Series],
    *,
    name: str,
    alt: str,
    title: str,
    show: Callable[[float], str],
    width: float,
    log: bool = False,
    zero: bool = False,
    stems: bool = False,
    spans: bool = False,
    reference: float = math.nan,
    limit: float = math.nan,
    notes: Sequence[str] = (),
    notes_title: str = "",
    strong_rows: int = 0,
    low_rows: Sequence[bool] = (),
    empty: str = "no data",
) -> Markup:
    """A chart with one row a label and one mark a series: dots, dots with intervals, or lollipops.

    Args:
        labels: name of each row, from the top.
        show: text of a value on the axis.
        log: logarithmic axis; values that are not positive are left out.
        zero: the axis includes zero.
        stems: a thin line from the axis' left end to the mark, so that a single series reads like bars.
        spans: a thin line from the smallest to the largest mark of a row.
        reference: where a vertical line stands; NaN for none. limit: a value that the axis reaches.
        notes: a short text at the right end of each row, under `notes_title`.
        strong_rows: how many of the first rows are totals, printed bold and set apart.
        low_rows: True where a row's label is printed in the muted colour.
        empty: what stands in a row without any mark.
    """
    rows = len(labels)
    labels = [plain(label) for label in labels]
    left = text_width(labels) + 16
    right = (text_width([*notes, notes_title]) + 14) if notes else 22
    tall = rows > 12
    top, bottom = (48 if tall else 24), 26
    drawn = [np.array(part.values, float) for part in series]
    if log:
        drawn = [np.where(values > 0, values, np.nan) for values in drawn]
    ends = [np.asarray(end, float) for part in series for end in (part.low, part.high) if end is not None]
    every = np.concatenate([*drawn, *ends, [reference, limit], [0.0] if zero else []])
    every = every[np.isfinite(every)]
    low, high = (every.min(), every.max()) if every.size else (1.0, 2.0)

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width / 72, (top + rows * ROW + bottom) / 72))
        axes = new_axes(figure, left=left, top=top, width=width - left - right, height=rows * ROW)
        axes.set_ylim(rows - 0.5, -0.5)
        if log:
            axes.set_xscale("log")
            low, high = low / 1.3, high * 1.3
            axes.set_xticks(log_ticks(low, high))
            axes.minorticks_off()
        else:
            margin = 0.04 * (high - low or abs(high) or 1.0)
            low, high = low - margin * (low != 0), high + margin
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlim(low, high)
        axes.xaxis.set_major_formatter(lambda value, _: show(value))
        axes.tick_params(axis="x", top=False, labeltop=tall)
        axes.grid(axis="x", color=colour("line"), linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_yticks(range(rows), labels)
        axes.tick_params(axis="y", pad=9)  # a mark at the axis' left end does not touch its label
        for row, label in enumerate(axes.get_yticklabels()):
            label.set_color(colour("muted" if low_rows and low_rows[row] else "ink"))
            label.set_fontweight("bold" if row < strong_rows else "normal")
        if strong_rows:
            axes.axhline(strong_rows - 0.5, color=colour("faint"), linewidth=0.8)
        right_of = axes.get_yaxis_transform()
        header = dict(va="bottom", **SMALL)
        lift = (22 if tall else 6) / ROW
        axes.text(0, -0.5 - lift, title, transform=right_of, **header)
        if notes:
            axes.text(1, -0.5 - lift, notes_title, transform=right_of, ha="right", **header).set_x(
                1 + right / (width - left - right)
            )
        if math.isfinite(reference):
            axes.axvline(reference, color=colour("muted"), linewidth=1.2, linestyle=(0, (3, 2)), zorder=1.5)

        table = np.stack(drawn) if drawn else np.full((1, rows), np.nan)
        for row in range(rows):
            seen = table[:, row][np.isfinite(table[:, row])]
            if not seen.size:
                axes.text(low, row, GAP + empty, va="center_baseline", **SMALL)
                continue
            if spans and seen.min() < seen.max():
                axes.plot([seen.min(), seen.max()], [row, row], color=colour("faint"), linewidth=1, zorder=1.8)
            if stems:
                axes.plot([low, seen.max()], [row, row], color=colour("line"), linewidth=3, zorder=1.8)
        for row, note in enumerate(notes):
            axes.text(
                1 + right / (width - left - right), row, note, transform=right_of, ha="right", va="center_baseline",
                **SMALL, fontweight="bold" if row < strong_rows else "normal",
            )  # fmt: skip

        for order, (part, values) in enumerate(zip(series, drawn, strict=True)):
            paint = colour(part.look.colour)
            if part.low is not None:
                for row, (start, end) in enumerate(zip(part.low, part.high, strict=True)):
                    if math.isfinite(start) and math.isfinite(end):
                        axes.plot([start, end], [row, row], color=paint, linewidth=2, zorder=2.5, solid_capstyle="butt")
            strong = np.ones(rows, bool) if part.strong is None else np.asarray(part.strong, bool)
            line_marker = part.look.marker in "|x"
            edge = paint if line_marker else colour("card")
            common = dict(marker=part.look.marker, linestyle="", markersize=part.size, clip_on=False)
            for chosen, face, rim in ((strong, paint, edge), (~strong, colour("card"), paint)):
                at = chosen & np.isfinite(values)
                if at.any():
                    axes.plot(
                        values[at], np.flatnonzero(at), markerfacecolor=face, markeredgecolor=rim, color=paint,
                        markeredgewidth=1.7 if line_marker or rim is paint else 0.9, zorder=3 + 0.01 * order, **common,
                    )  # fmt: skip
        return to_svg(figure, name=name, alt=alt)


def averaged(x: Sequence[float], *others: Sequence[float]) -> list[np.ndarray]:
    """[points] to at most `WIDEST_CURVE` points: means over equal runs of points, of `x` and of the others alike."""
    columns = [np.asarray(column, float) for column in (x, *others)]
    group = -(-len(columns[0]) // WIDEST_CURVE)
    if group <= 1:
        return columns
    starts = np.arange(0, len(columns[0]), group)
    counts = np.diff([*starts, len(columns[0])])
    return [np.add.reduceat(column, starts) / counts for column in columns]


def curves(
    lines: Sequence[Curve], *, name: str, alt: str, x_title: str, panels: Sequence[Panel], width: float,
    height: float = 118.0, branches: Sequence[float] = (),
) -> Markup:  # fmt: skip
    """`panels` above each other over one x axis; vertical lines at `branches`, where stages are continued."""
    left, right, top, last = 46.0, 14.0, 24.0, len(panels) - 1
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width / 72, (len(panels) * (height + top + 10) + 32) / 72))
        for place, (title, show, zero) in enumerate(panels):
            offset = top + place * (height + top + 10)
            axes = new_axes(figure, left=left, top=offset, width=width - left - right, height=height)
            axes.grid(axis="y", color=colour("line"), linewidth=0.8)
            axes.text(
                -left / (width - left - right), 1 + 7 / height, title,
                transform=axes.transAxes, va="bottom", **SMALL,
            )  # fmt: skip
            for line in lines:
                x, values = averaged(line.x, line.panels[place])
                axes.plot(x, values, color=colour(line.look.colour), linewidth=1.8, solid_joinstyle="round")
                known = np.flatnonzero(np.isfinite(values))
                if known.size:  # the same mark as everywhere else, at the curve's end
                    end = known[-1]
                    axes.plot(
                        x[end], values[end], line.look.marker, color=colour(line.look.colour), clip_on=False,
                        markersize=7, markeredgecolor=colour("card"), zorder=4,
                    )  # fmt: skip
            for branch in filter(math.isfinite, branches):
                axes.axvline(branch, color=colour("muted"), linewidth=1, linestyle=(0, (3, 2)))
            axes.set_xlim(left=0)
            if zero:
                axes.set_ylim(0, max(axes.get_ylim()[1], 1e-3))
            axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6 if width > 350 else 4, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
            axes.axhline(axes.get_ylim()[0], color=colour("faint"), linewidth=1)
            if show is not None:
                axes.yaxis.set_major_formatter(lambda value, _, show=show: show(value))
            if place == last:
                axes.text(
                    1, -24 / height, x_title, transform=axes.transAxes, ha="right", va="top",
                    **SMALL,
                )  # fmt: skip
            else:
                axes.tick_params(axis="x", labelbottom=False)
        return to_svg(figure, name=name, alt=alt)


def usage(counts: Sequence[float], *, name: str, alt: str, look: Look, width: float) -> Markup:
    """[units] counts to a curve over rank, most used first, in multiples of even use; the line at 1 is even use."""
    counts = np.sort(np.asarray(counts, float))[::-1]
    rank, relative = averaged(np.arange(1, counts.size + 1), counts / max(counts.mean(), 1e-12))
    left, right, top, height = 34.0, 12.0, 24.0, 110.0
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width / 72, (top + height + 46) / 72))
        axes = new_axes(figure, left=left, top=top, width=width - left - right, height=height)
        axes.grid(axis="y", color=colour("line"), linewidth=0.8)
        axes.fill_between(rank, relative, step="mid", color=colour(look.colour), linewidth=0, alpha=0.22, clip_on=False)
        axes.plot(rank, relative, color=colour(look.colour), linewidth=1.8, drawstyle="steps-mid", clip_on=False)
        axes.axhline(1.0, color=colour("muted"), linewidth=1, linestyle=(0, (3, 2)))
        axes.set_xlim(0.5, counts.size + 0.5)
        axes.set_ylim(0, max(2.0, 1.05 * relative.max()))
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
        axes.set_xticks(sorted({1, math.ceil(counts.size / 2), counts.size}))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axes.text(
            -left / (width - left - right), 1 + 7 / height, "use, in multiples of even use",
            transform=axes.transAxes, va="bottom", **SMALL,
        )  # fmt: skip
        axes.text(
            0.5, -24 / height, "units, most used first", transform=axes.transAxes, ha="center", va="top",
            **SMALL,
        )  # fmt: skip
        return to_svg(figure, name=name, alt=alt)


def timeline(
    names: Sequence[str], seconds: Sequence[float], *, name: str, alt: str, show: Callable[[float], str],
    kinds: Sequence[str], width: float,
) -> Markup:  # fmt: skip
    """One bar a step, each starting where the one above ended: the run from its first second to its last.

    `kinds` names each bar's colour.
    """
    labels = [textwrap.shorten(label, 34, placeholder=" …") for label in names]
    seconds = np.nan_to_num(np.asarray(seconds, float))
    starts = np.concatenate([[0.0], np.cumsum(seconds)[:-1]])
    total = max(seconds.sum(), 1e-9)
    left, right, top = text_width(labels) + 12, text_width([show(value) for value in seconds]) + 14, 6.0
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width / 72, (top + len(names) * ROW + 26) / 72))
        axes = new_axes(figure, left=left, top=top, width=width - left - right, height=len(names) * ROW)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, total)
        axes.grid(axis="x", color=colour("line"), linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_yticks(range(len(names)), labels, color=colour("ink"))
        step = next(
            (s for s in (1, 5, 10, 30, 60, 300, 600, 1800, 3600, 7200, 21600, 86400) if total / s <= 7), total / 5
        )
        axes.set_xticks(np.arange(0, total * 1.0001, step))
        axes.xaxis.set_major_formatter(lambda value, _: show(value))
        for row, (start, length, kind) in enumerate(zip(starts, seconds, kinds, strict=True)):
            shown = max(length, total / 400)  # even the shortest step leaves a visible mark
            axes.barh(row, shown, left=min(start, total - shown), height=0.62, color=colour(kind), linewidth=0)
            axes.text(start + shown, row, GAP + show(length), va="center_baseline", **SMALL)
        return to_svg(figure, name=name, alt=alt)
