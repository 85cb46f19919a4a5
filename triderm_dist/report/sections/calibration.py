"""Calibration: reliability diagrams, calibration errors and Brier scores with and without temperature."""

from __future__ import annotations

from typing import Any

import numpy as np

from triderm_dist import intervals
from triderm_dist.ensemble.score_table import FINAL_MODEL
from triderm_dist.intervals import Interval
from triderm_dist.metrics import CALIBRATION_BINS, Reliability
from triderm_dist.report.calibration import FIT_LESIONS, MOST_PROBABLE, EnsembleCalibration
from triderm_dist.report.content import Content
from triderm_dist.report.elements import Column, Figure, Flag, Row, Section, Table
from triderm_dist.report.style import BLUE, DASHED, GRAY, ORANGE, PLOTS_IN_ROW, WIDE, panel_title

MIN_BIN_LESIONS = 5
"""A bin with fewer lesions has no dot in the diagram."""


def calibration(content: Content) -> Section:
    """Return the calibration of the ensemble by target, and of each network."""
    of_targets = _of_targets(content.calibration)
    return Section(
        "Calibration",
        "calibration.html",
        tables=[of_targets, _of_networks(content.calibration)],
        figures=[_reliability(content)],
        values={"bins": CALIBRATION_BINS, "first": of_targets.rows[0].name, "comparisons": len(of_targets.rows),
                "fit_lesions": FIT_LESIONS if len(content.labels) > FIT_LESIONS else 0},
    )  # fmt: skip


def _of_targets(found: EnsembleCalibration) -> Table:
    """Return the errors and Brier scores of the ensemble by target."""
    columns = [
        Column("error", "calibration error"),
        Column("without", "without"),
        Column("by_chance", "by chance"),
        Column("brier", "Brier score"),
        Column("brier_change", "minus without", "+.4f"),
        Column("verdict", "verdict"),
        Column("positives", "true of lesions"),
    ]
    distinct = intervals.beyond_noise([target.brier_change for target in found.targets])
    rows = [
        Row(
            target.name,
            (
                target.after.reliability.error,
                target.before.reliability.error,
                target.after.reliability.error_by_chance,
                target.after.brier,
                target.brier_change,
                _verdict(target.brier_change, beyond),
                target.positives,
            ),
        )
        for target, beyond in zip(found.targets, distinct, strict=True)
    ]
    return Table("calibration", f"Calibration of the {FINAL_MODEL}", columns, rows, "probability of")


def _of_networks(found: EnsembleCalibration) -> Table:
    """Return the errors, Brier scores and log-likelihoods of each network."""
    columns = [
        Column("error", "calibration error"),
        Column("error_without", "without"),
        Column("brier", "Brier score"),
        Column("brier_without", "without"),
        Column("brier_change", "difference", "+.4f"),
        Column("nll", "NLL"),
        Column("nll_without", "without"),
        Column("temperature", "temperature"),
    ]
    rows = [
        Row(
            each.name,
            (
                each.error[1],
                each.error[0],
                each.brier[1],
                each.brier[0],
                each.brier_change,
                each.nll[1],
                each.nll[0],
                each.temperature,
            ),
        )
        for each in found.by_network
    ]
    return Table("calibration_networks", "Calibration of each network", columns, rows, "network")


def _verdict(change: Interval, beyond: bool) -> Flag:
    if not beyond:
        return Flag("within the noise", strong=False)
    return Flag("better", strong=False) if change.value < 0 else Flag("worse")


def _reliability(content: Content) -> Figure:
    targets = content.calibration.targets
    rows, columns = -(-len(targets) // PLOTS_IN_ROW), min(len(targets), PLOTS_IN_ROW)

    def draw(figure: Any) -> None:
        grid = figure.add_gridspec(2 * rows, columns, height_ratios=[3, 1] * rows)
        for at, target in enumerate(targets):
            row, column = 2 * (at // columns), at % columns
            axes, below = figure.add_subplot(grid[row, column]), figure.add_subplot(grid[row + 1, column])
            axes.plot([0, 1], [0, 1], color=GRAY, linewidth=0.8, linestyle=DASHED)
            _dots(axes, target.before.reliability, "without temperature", color=ORANGE, mfc="none")
            _dots(axes, target.after.reliability, "with temperature", bars=True, color=BLUE)
            lesions = target.after.reliability.lesions
            below.stairs(lesions, np.linspace(0, 1, len(lesions) + 1), baseline=0.5, fill=True, color=BLUE)
            below.set_yscale("log")
            ticks = [10**power for power in range(0, len(str(len(content.labels))), 2)]
            below.set(xlim=(0, 1), ylim=(0.5, 2 * len(content.labels)), xticks=[0, 0.5, 1], yticks=ticks)
            below.set_yticklabels([f"{tick:,}" for tick in ticks] if not column else [])
            below.minorticks_off()
            below.grid(False)
            below.tick_params(labelbottom=at + columns >= len(targets), length=0)
            axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
            axes.tick_params(labelbottom=False, labelleft=not column, length=0)
            title = "correct" if target.name == MOST_PROBABLE else target.name
            panel_title(axes, title, f"{target.after.reliability.error:.3f}")
            if not column:
                axes.set_ylabel("share")
                below.set_ylabel("lesions")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=9)
        figure.supxlabel("probability", fontsize=10)

    errors = ", ".join(f"{target.name} {target.after.reliability.error:.3f}" for target in targets)
    return Figure(
        "reliability",
        draw,
        f"Reliability diagrams with the number of lesions in each bin; calibration error {errors}.",
        "Share of lesions that have the diagnosis, by its probability; “correct”: the most probable one is right. On "
        "the dashed line, probabilities are calibrated. Number after the name: calibration error with temperature. "
        f"Bars: 95% intervals. Below: lesions in each bin. Bins with fewer than {MIN_BIN_LESIONS} lesions have no dot.",
        (WIDE, 0.3 + 2.6 * rows),
    )


def _dots(axes: Any, bins: Reliability, label: str, bars: bool = False, **style: Any) -> None:
    drawn = bins.lesions >= MIN_BIN_LESIONS
    x, y, lesions = bins.probability[drawn], bins.positive[drawn], bins.lesions[drawn]
    if bars:
        ends = np.array([(each.low, each.high, np.nan) for each in intervals.shares(y * lesions, lesions)])
        axes.plot(np.repeat(x, 3), ends.ravel(), linewidth=1, color=style["color"])  # one path: a smaller SVG
    axes.plot(x, y, "o", markersize=4, linestyle="none", label=label, clip_on=False, **style)
