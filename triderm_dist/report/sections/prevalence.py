"""Predictive values where malignant lesions are more or less common than in this data set."""

from __future__ import annotations

from typing import Any

import numpy as np

from triderm_dist.report.content import Content
from triderm_dist.report.discrimination import PREVALENCES, SENSITIVITIES, OperatingPoint
from triderm_dist.report.elements import Column, Figure, Row, Section, Table
from triderm_dist.report.style import GRAY, PALETTE, WIDE, panel_title, panels, panels_height

HERE = "in this data set"
CURVE = np.geomspace(0.005, 0.6, 40)
"""Prevalences of the curves."""


def prevalence(content: Content) -> Section | None:
    """Return the predictive values of the operating points at other prevalences; None where there are no points."""
    points = content.discrimination.operating_points
    if not points:
        return None
    columns = [Column("ppv", "PPV"), Column("npv", "NPV"), Column("prevalence", "prevalence", ".3g")]
    rows = []
    for point in points:
        own = point.target.prevalence
        names, shares = [HERE, *(f"{share:.0%}" for share in PREVALENCES)], [own, *PREVALENCES]
        values = zip(names, *point.predictive_values(shares), shares, strict=True)
        rows += [Row(name, (ppv, npv, share), group=_name(point)) for name, ppv, npv, share in values]
    return Section(
        "Other prevalences",
        "prevalence.html",
        tables=[
            Table("prevalence", "Predictive values by prevalence, with 95% intervals", columns, rows, "prevalence")
        ],
        figures=[_curves(points)],
        values={
            "group": _name(points[0]),
            "name": points[0].target.title,
            "here": HERE,
            "rare": f"{PREVALENCES[1]:.0%}",
        },
    )


def _name(point: OperatingPoint) -> str:
    return f"{point.target.title}, threshold for a sensitivity of {point.aim:.0%}"


def _curves(points: list[OperatingPoint]) -> Figure:
    by_target: dict[str, list[OperatingPoint]] = {}
    for point in points:
        by_target.setdefault(point.target.title, []).append(point)

    def draw(figure: Any) -> None:
        grid = panels(figure, len(by_target), unit_square=False)
        for axes, group in zip(grid, by_target.values(), strict=True):
            axes.axvline(group[0].target.prevalence, color=GRAY, linewidth=0.8)
            for point, color in zip(group, PALETTE, strict=False):
                positive, negative = point.predictive_values(CURVE.tolist())
                axes.fill_between(CURVE, [each.low for each in positive], [each.high for each in positive],
                                  color=color, alpha=0.15, linewidth=0)  # fmt: skip
                axes.plot(CURVE, [each.value for each in positive], color=color, label=f"PPV, {point.aim:.0%}")
                axes.plot(CURVE, [each.value for each in negative], color=color, linestyle=":",
                          label=f"NPV, {point.aim:.0%}")  # fmt: skip
            axes.set_xscale("log")
            axes.set_xticks([0.01, 0.1, 0.5], ["1%", "10%", "50%"])
            axes.minorticks_off()
            axes.set_ylim(0, 1.02)
            axes.set_yticks([0, 0.5, 1])
            panel_title(axes, group[0].target.name)
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, fontsize=9)
        figure.supxlabel("prevalence", fontsize=10)
        figure.supylabel("predictive value", fontsize=10)

    names = ", ".join(group[0].target.name for group in by_target.values())
    aims = " and ".join(f"{aim:.0%}" for aim in SENSITIVITIES)
    alt = f"Positive and negative predictive value by prevalence, at thresholds for a sensitivity of {aims}: {names}."
    caption = "Vertical line: the prevalence in this data set. Shaded: 95% intervals of the positive predictive value."
    return Figure("predictive_values", draw, alt, caption, (WIDE, panels_height(len(by_target))))
