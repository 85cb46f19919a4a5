"""Net benefit: decision curves."""

from __future__ import annotations

from typing import Any

import numpy as np

from triderm_dist import intervals, metrics
from triderm_dist.ensemble.score_table import FINAL_MODEL
from triderm_dist.report.content import Content
from triderm_dist.report.discrimination import NetBenefit, net_benefit_curve
from triderm_dist.report.elements import Column, Figure, Flag, Row, Section, Table
from triderm_dist.report.style import BLUE, DASHED, GRAY, ORANGE, WIDE, panel_title, panels, panels_height

CURVE = np.linspace(0.01, 0.8, 80)
"""Threshold probabilities of the curves."""


def net_benefit(content: Content) -> Section | None:
    """Return net benefit and decision curves of the targets that mean a malignant lesion; None where there are none."""
    found = content.discrimination.net_benefits
    if not found:
        return None
    columns = [
        Column("gain", "minus the better of all and none", "+.4f"),
        Column("verdict", "verdict"),
        Column("net_benefit", "net benefit"),
        Column("of_all", "of treating all"),
    ]
    every = [(target, benefit) for target, benefits in found for benefit in benefits]
    distinct = intervals.beyond_noise([benefit.gain for _, benefit in every])
    rows = [
        Row(
            f"{benefit.risk:.0%}",
            (benefit.gain, _verdict(benefit, beyond), benefit.of_ensemble, benefit.of_all),
            group=target.title,
        )
        for (target, benefit), beyond in zip(every, distinct, strict=True)
    ]
    return Section(
        "Net benefit",
        "net_benefit.html",
        tables=[Table("net_benefit", "Net benefit by threshold probability", columns, rows, "threshold probability")],
        figures=[_curves(content)],
        values={"comparisons": len(rows)},
    )


def _verdict(benefit: NetBenefit, beyond: bool) -> Flag:
    if not beyond:
        return Flag("within the noise", strong=False)
    return Flag("better", strong=False) if benefit.gain.value > 0 else Flag("worse")


def _curves(content: Content) -> Figure:
    targets = [target for target, _ in content.discrimination.net_benefits]

    def draw(figure: Any) -> None:
        grid = panels(figure, len(targets), unit_square=False)
        for axes, target in zip(grid, targets, strict=True):
            prevalence = target.prevalence
            of_all = [metrics.net_benefit_of_all(prevalence, risk) for risk in CURVE]
            axes.axhline(0, color=GRAY, linewidth=0.8)
            axes.plot(CURVE, of_all, color=ORANGE, linewidth=1.2, linestyle=DASHED, label="treat all")
            axes.plot(CURVE, net_benefit_curve(target.ranking, CURVE), color=BLUE, linewidth=1.4, label=FINAL_MODEL)
            axes.set(xlim=(0, CURVE[-1]), ylim=(-0.15 * prevalence, 1.05 * prevalence))
            axes.set_xticks([0, 0.4, 0.8], ["0%", "40%", "80%"])
            axes.locator_params(axis="y", nbins=4)
            panel_title(axes, target.name)
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=9)
        figure.supxlabel("threshold probability", fontsize=10)
        figure.supylabel("net benefit", fontsize=10)

    size = WIDE, panels_height(len(targets))
    names = ", ".join(target.name for target in targets)
    alt = f"Decision curves of {names}: net benefit of the {FINAL_MODEL} and of treating all; treating none has none."
    caption = (
        "Decision curves. Treating none has a net benefit of 0; the largest possible is the share of the positives."
    )
    return Figure("decision_curves", draw, alt, caption, size)
