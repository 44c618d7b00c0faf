"""Charts of values that were measured now and then while something was trained: marks with intervals over steps.

As `charts`, whose helpers it uses.
"""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from experiments.report.charts import SMALL, STYLE, Panel, colour, new_axes, to_svg
from experiments.report.page import Look


class Trend(NamedTuple):
    """A series of one panel, all [points]: at `x` the values, the ends of their intervals, and `level`, that of chance.

    NaN where there is none. `strong`: False = hollow.
    """

    look: Look
    x: Sequence[float]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    level: Sequence[float]
    strong: Sequence[bool]


def trends(
    panels: Sequence[tuple[Panel, Sequence[Trend]]], *, name: str, alt: str, x_title: str, width: float,
    height: float = 118.0, spread: float = 0.006,
) -> Markup:  # fmt: skip
    """`panels` above each other over one x axis, which counts something: steps, layers.

    Series stand apart by `spread` of its length, so that their intervals can be told.
    """
    left, right, top = 46.0, 14.0, 24.0
    every = np.concatenate([np.asarray(trend.x, float) for _, drawn in panels for trend in drawn])
    end = max(float(every.max()), 1.0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width / 72, (len(panels) * (height + top + 10) + 32) / 72))
        for place, (panel, drawn) in enumerate(panels):
            axes = new_axes(
                figure, left=left, top=top + place * (height + top + 10), width=width - left - right, height=height
            )
            axes.grid(axis="y", color=colour("line"), linewidth=0.8)
            axes.text(
                -left / (width - left - right), 1 + 7 / height, panel.title,
                transform=axes.transAxes, va="bottom", **SMALL,
            )  # fmt: skip
            common = len({(tuple(trend.x), tuple(trend.level)) for trend in drawn}) == 1
            for order, trend in enumerate(drawn):
                paint = colour(trend.look.colour)
                x = np.asarray(trend.x, float) + (order - (len(drawn) - 1) / 2) * spread * end
                values, low, high, level = (
                    np.asarray(column, float) for column in (trend.values, trend.low, trend.high, trend.level)
                )
                if not (common and order):  # the same level for all is drawn once
                    axes.plot(
                        trend.x, level, color=colour("muted") if common and len(drawn) > 1 else paint, linewidth=1.2,
                        linestyle=(0, (3, 2)), zorder=1.5,
                    )  # fmt: skip
                axes.plot(x, values, color=paint, linewidth=1.4, zorder=2)
                axes.vlines(x, low, high, color=paint, linewidth=1.6, zorder=2.5, alpha=0.55)
                strong = np.asarray(trend.strong, bool)
                for chosen, face, rim in ((strong, paint, colour("card")), (~strong, colour("card"), paint)):
                    at = chosen & np.isfinite(values)
                    axes.plot(
                        x[at], values[at], trend.look.marker, linestyle="", clip_on=False, markersize=7,
                        markerfacecolor=face, markeredgecolor=rim, markeredgewidth=1.5, zorder=4,
                    )  # fmt: skip
            axes.set_xlim(-0.02 * end, 1.02 * end)
            axes.set_ylim(0, max(axes.get_ylim()[1], 1e-3)) if panel.zero else None
            axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
            axes.xaxis.set_major_locator(
                matplotlib.ticker.MaxNLocator(6 if width > 350 else 4, steps=[1, 2, 5, 10], integer=True)
            )
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
            axes.axhline(axes.get_ylim()[0], color=colour("faint"), linewidth=1)
            if panel.show is not None:
                axes.yaxis.set_major_formatter(lambda value, _, show=panel.show: show(value))
            if place == len(panels) - 1:
                axes.text(1, -24 / height, x_title, transform=axes.transAxes, ha="right", va="top", **SMALL)
            else:
                axes.tick_params(axis="x", labelbottom=False)
        return to_svg(figure, name=name, alt=alt)
