"""Axes of one look: colours, margins, names of lines, and points that say what they are when a page shows them.

Nothing here touches pyplot, whose state and backend belong to the program that trains.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

#: Okabe and Ito's colours, those dark enough for print: told apart by colour-blind readers, and by lightness in grey.
COLOURS = ("#0072B2", "#D55E00", "#007a5a", "#8a4a76", "#7a6a00", "#333333", "#56a0d0", "#b5495b")
GREY = "#777777"
GRID = "#e4e4e4"
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")
#: Names that stand at the ends of lines, and do not go into a legend: so many, and so long.
_MOST_NAMES, _LONGEST_NAME = 6, 16
#: Points of a line that say what they are, at most.
_MOST_POINTS = 200


class Style(NamedTuple):
    """Look of a line; no two of the first 32 are the same."""

    colour: str
    dash: str
    marker: str


def style(index: int) -> Style:
    """The look of the line with this index: the colours in turn, then again with another dash and marker."""
    turn = index // len(COLOURS) % len(_DASHES)
    return Style(COLOURS[index % len(COLOURS)], _DASHES[turn], _MARKERS[turn])


def new_axes(right: float = 0.89) -> Axes:
    """Makes empty axes, of a width that stays readable on a phone.

    Margins are fixed: finding them takes matplotlib three times as long, too long for a run that draws while it trains.

    Args:
        right: Where the axes end, in parts of the figure's width: names of lines stand beside them.
    """
    figure = Figure(figsize=(4.7, 3.2))
    figure.subplots_adjust(left=0.17, right=right, bottom=0.155, top=0.91)
    axes = figure.add_subplot()
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))  # a learning rate has no room for its zeros
    tidy(axes)
    return axes


def tidy(axes: Axes) -> None:
    """Leaves two spines and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def name_at_ends(names: Sequence[str]) -> bool:
    """Whether the names of lines have room beside their ends; else they go into a legend."""
    return len(names) <= _MOST_NAMES and all(len(name) <= _LONGEST_NAME for name in names)


def name_lines(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes names beside the ends of lines, pushed apart where they would meet; the axes stay as they are.

    Args:
        axes: The axes, with the lines drawn and the limits set.
        ends: x, y, name and colour of each.
    """
    gap = 0.075  # of the height of the axes
    low, high = axes.get_ylim()
    ordered = sorted(ends, key=lambda end: end[1])
    places = [(y - low) / (high - low) for _, y, _, _ in ordered]
    for i in range(1, len(places)):  # upwards
        places[i] = max(places[i], places[i - 1] + gap)
    top = 1.0
    for i in reversed(range(len(places))):  # and down again from the upper edge
        places[i] = top = min(places[i], top)
        top -= gap
    for (x, _, name, colour), place in zip(ordered, places, strict=True):
        axes.annotate(
            name, (x, low + place * (high - low)), xytext=(5, 0), textcoords="offset points",
            va="center", color=colour, fontsize=9, parse_math=False, annotation_clip=False,
        )  # fmt: skip


def add_legend(axes: Axes, names: Sequence[str]) -> None:
    """Writes the names of the lines below the axes: for a file that stands alone."""
    handles = [_handle(style(index), name) for index, name in enumerate(names)]
    columns = 2 if max(map(len, names)) <= 24 else 1
    legend = axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(-0.15, -0.2), ncols=columns, fontsize=7,
                         frameon=False, borderaxespad=0, handlelength=3)  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def _handle(look: Style, name: str) -> Line2D:
    return Line2D([], [], color=look.colour, linestyle=look.dash, marker=look.marker, markersize=4, label=name)


def explain_strength(axes: Axes, colour: str) -> None:
    """Says above the axes which lines are held-out and which training, with a swatch of each."""
    swatches = [
        Line2D([], [], color=colour, linewidth=2, marker="o", markersize=3.5, label="held-out"),
        Line2D([], [], color=colour, linewidth=1, alpha=0.5, label="training"),
    ]
    axes.legend(handles=swatches, frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1),
                borderaxespad=0.1)  # fmt: skip


def say(axes: Axes, x: np.ndarray, y: np.ndarray, texts: Sequence[str]) -> None:
    """Lets each point say what it is, where a page shows it under a pointer; in files it cannot be seen.

    Args:
        axes: The axes. `alignment.report.svg` finds the texts in the attribute `texts_of_points` of their figure.
        x, y: The points; of many, some are taken at equal distances. Those that are not finite are left out.
        texts: One for each point.
    """
    there = np.flatnonzero(np.isfinite(y))
    there = there[np.unique(np.linspace(0, len(there) - 1, _MOST_POINTS).astype(int))] if len(there) else there
    mark(axes.plot(x[there], y[there], linestyle="", marker="o", markersize=10, alpha=0, zorder=5)[0],
         [texts[i] for i in there])  # fmt: skip


def mark(artist: object, texts: Sequence[str]) -> None:
    """Keeps the texts of an artist's points, or the one of a bar, with its figure."""
    known = artist.figure.__dict__.setdefault("texts_of_points", {})
    artist.set_gid(f"points-{len(known)}")
    known[artist.get_gid()] = list(texts)
