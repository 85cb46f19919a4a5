"""The look of all figures: colors, sizes and matplotlib settings, in one place.

Colors are those of Okabe and Ito (2008), which people with any color blindness can tell apart. In the page, an SVG's
colors become CSS variables, so that figures follow dark mode: `THEMED` lists them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

INK, GRAY, FAINT, PAPER = "#22313f", "#5f6b78", "#dfe4ea", "#ffffff"
BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, INK, GRAY)
"""Colors of lines that stand for values of equal rank, such as folds, in this order."""
ON_LIGHT, ON_DARK = INK, "#fefefe"
"""Text on a cell of `SEQUENTIAL`: up to `DARK_CELL`, and above."""
DARK_CELL = 0.75
SEQUENTIAL, DIVERGING = "triderm-blue", "coolwarm"
"""Color maps: from little to much (`BLUE` with rising opacity, so that it follows dark mode), and from low to high."""

THEMED = {
    INK: "ink", GRAY: "gray", FAINT: "line", PAPER: "paper", BLUE: "blue", ORANGE: "orange", GREEN: "green",
    PURPLE: "purple", AMBER: "amber", SKY: "sky", ON_DARK: "on-blue",
}  # fmt: skip
"""CSS variables of templates/style.css, by color."""

WIDE, MEDIUM, NARROW = 9.0, 7.2, 4.6
"""Widths of figures in inches: of the whole page, of a chart with long names, and of a single square plot."""
DASHED = (0, (3, 3))
"""Line style of what a curve is compared with."""
PLOTS_IN_ROW = 4
"""Small plots side by side, on the width of the page."""
TITLE_LETTERS, LONGEST_NAME = 20, 26
"""Letters over a small plot in the usual size, and the most letters of a diagnosis there."""

STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRAY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "text.parse_math": False,  # names of tasks may hold dollar signs
    "svg.hashsalt": "triderm-dist",  # equal ids in equal figures
}


def register_colors() -> None:
    """Make `SEQUENTIAL` known to matplotlib."""
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    if SEQUENTIAL not in matplotlib.colormaps:
        ends = [to_rgba(BLUE, 0.02), to_rgba(BLUE, 1.0)]
        matplotlib.colormaps.register(LinearSegmentedColormap.from_list(SEQUENTIAL, ends), name=SEQUENTIAL)


def panels(figure: Any, count: int, unit_square: bool = True) -> list[Any]:
    """Return the axes of small plots in rows of `PLOTS_IN_ROW`; with `unit_square`, both axes go from 0 to 1."""
    rows, columns = -(-count // PLOTS_IN_ROW), min(count, PLOTS_IN_ROW)
    grid = np.ravel(figure.subplots(rows, columns, sharex=unit_square, sharey=unit_square, squeeze=False))
    for axes in grid[count:]:
        axes.set_visible(False)
    if unit_square:
        grid[0].set(xlim=(0, 1), ylim=(0, 1.02), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    return list(grid[:count])


def panel_title(axes: Any, name: str, value: str = "") -> None:
    """Set the title of one of the `panels`, in smaller letters and shortened where it would run into its neighbor."""
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 1]}…"
    title = f"{name}  {value}".rstrip()
    axes.set_title(title, fontsize=STYLE["axes.titlesize"] * min(1.0, TITLE_LETTERS / len(title)))


def panels_height(count: int) -> float:
    """Return the height in inches of a figure of so many `panels`."""
    return 0.3 + 2.1 * -(-count // PLOTS_IN_ROW)
