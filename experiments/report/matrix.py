"""A table of shares as squares: darker where more of a row lies. As `charts`, whose helpers it uses."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.report.charts import STYLE, colour, new_axes, plain, text_width, to_svg

LEAST = 0.12  # opacity of the smallest share that is not zero


def matrix(
    shares: np.ndarray, *, rows: Sequence[str], columns: Sequence[str], diagonal: Sequence[int | None], name: str,
    alt: str, title: str, cell: float = 17.0,
) -> Markup:  # fmt: skip
    """`shares` [rows, columns], each from 0 to 1; empty where a share is 0 or not known.

    `diagonal`: of each row, the column that is right (drawn in green, all others in vermillion), None where none is. A
    square's area grows with its share as well, so that it does not rest on colour alone. `title` stands above the
    columns. `cell`: pixels from one row to the next.
    """
    rows, columns = [plain(label) for label in rows], [plain(label) for label in columns]
    left, top, right, bottom = text_width(rows) + 10, text_width(columns) + 30, 12.0, 8.0
    width, height = len(columns) * cell, len(rows) * cell
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=((left + width + right) / 72, (top + height + bottom) / 72))
        axes = new_axes(figure, left=left, top=top, width=width, height=height)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(columns)), columns, rotation=90)
        axes.set_yticks(range(len(rows)), rows, color=colour("ink"))
        axes.tick_params(axis="x", top=False, bottom=False, labeltop=True, labelbottom=False)
        axes.text(
            0, 1 + (top - 12) / height, title, transform=axes.transAxes, ha="left", va="top", color=colour("muted"),
            fontsize=11,
        )  # fmt: skip
        for place in range(len(rows)):  # a track for the eye from the label to the square
            axes.axhline(place, color=colour("line"), linewidth=0.6, zorder=1)
        for place in range(len(columns)):
            axes.axvline(place, color=colour("line"), linewidth=0.6, zorder=1)
        for row, column in np.argwhere(np.nan_to_num(shares) > 0).tolist():
            share = min(float(shares[row, column]), 1.0)
            side = 0.3 + 0.62 * share**0.5
            paint = colour("green" if diagonal[row] == column else "vermillion")
            square = Rectangle(
                (column - side / 2, row - side / 2), side, side, facecolor=paint, edgecolor="none",
                alpha=LEAST + (1 - LEAST) * share**0.5, zorder=3,
            )  # fmt: skip
            axes.add_patch(square)
        return to_svg(figure, name=name, alt=alt)
