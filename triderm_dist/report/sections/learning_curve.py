"""Macro F1 by the number of training lesions, and what more of them would give."""

from __future__ import annotations

from typing import Any

import numpy as np

from triderm_dist.report.content import Content
from triderm_dist.report.elements import Column, Figure, Flag, Row, Section, Table
from triderm_dist.report.learning_curve import BEYOND, LearningCurve
from triderm_dist.report.style import GRAY, MEDIUM, PALETTE

EXPECTED = f"{BEYOND} times as many, extrapolated"


def learning_curve(content: Content) -> Section | None:
    """Return the curve of each network that was trained on parts of the lesions; None where none was."""
    curves = content.learning_curves
    if not curves:
        return None
    best = max(curves, key=lambda curve: curve.macro_f1[-1].value)
    return Section(
        "Would more lesions help?",
        "learning_curve.html",
        tables=[_sizes(curves), _gains(curves)],
        figures=[
            Figure("training_lesions", lambda figure: _draw(figure, curves), _alt(curves), _CAPTION, (MEDIUM, 3.8))
        ],
        values={"best": best, "several": len(curves) > 1, "expected": EXPECTED},
    )


_CAPTION = (
    "Dots: macro F1 of the most probable diagnosis, out of fold, with 95% intervals over lesions. Lines: the fitted "
    "power law, dashed where it is extrapolated."
)


def _sizes(curves: list[LearningCurve]) -> Table:
    rows = []
    for curve in curves:
        for lesions, score in zip(curve.lesions, curve.macro_f1, strict=True):
            rows.append(Row(f"{round(lesions):,} lesions", (score, round(lesions)), group=curve.model))
        rows.append(Row(EXPECTED, (curve.expected, round(BEYOND * curve.lesions[-1])), group=curve.model))
    columns = [Column("macro_f1", "macro F1, most probable diagnosis"), Column("lesions", "training lesions of a fold")]
    caption = "Macro F1 out of fold by the number of training lesions"
    return Table("training_lesions_scores", caption, columns, rows, head="trained on")


def _gains(curves: list[LearningCurve]) -> Table:
    columns = [
        Column("gain", f"macro F1 with {BEYOND} times as many, minus all", "+.3f"),
        Column("verdict", "beyond the noise"),
        Column("half", "all lesions minus half of them", "+.3f"),
        Column("exponent", "exponent of the power law"),
    ]
    rows = [
        Row(curve.model, (curve.gain, Flag("yes" if curve.helps else "no", curve.helps), curve.half, curve.exponent))
        for curve in curves
    ]
    return Table("training_lesions_gain", "Gain by more training lesions", columns, rows, head="network")


def _alt(curves: list[LearningCurve]) -> str:
    ends = [
        f"{curve.model} from {curve.macro_f1[0].value:.2f} with {curve.lesions[0]:,.0f} lesions to "
        f"{curve.macro_f1[-1].value:.2f} with {curve.lesions[-1]:,.0f}"
        for curve in curves
    ]
    return f"Macro F1 by the number of training lesions: {'; '.join(ends)}."


def _draw(figure: Any, curves: list[LearningCurve]) -> None:
    axes = figure.subplots()
    for number, curve in enumerate(curves):
        color, lesions = PALETTE[number % len(PALETTE)], np.array(curve.lesions)
        values = np.array([[each.value, each.low, each.high] for each in curve.macro_f1]).T
        ends = np.abs(values[1:] - values[0])
        shift = 1 + 0.012 * (number - (len(curves) - 1) / 2)  # so that intervals do not hide each other
        axes.errorbar(lesions * shift, values[0], yerr=ends, fmt="o", color=color, markersize=5, label=curve.model)
        for part, style in (((lesions[0], lesions[-1]), "-"), ((lesions[-1], BEYOND * lesions[-1]), (0, (4, 3)))):
            x = np.geomspace(*part, 40)
            axes.plot(x, curve.power_law(x), color=color, linewidth=1.2, linestyle=style)
    ticks = [*curves[0].lesions, BEYOND * curves[0].lesions[-1]]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{round(tick):,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.axvline(curves[0].lesions[-1], color=GRAY, linewidth=0.8, linestyle=(0, (2, 3)))
    axes.set_xlabel("training lesions of a fold (logarithmic)")
    axes.set_ylabel("macro F1")
    if len(curves) > 1:
        axes.legend(fontsize=8.5, loc="lower right")
