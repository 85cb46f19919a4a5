"""Rates and rankings of each diagnosis, with their curves."""

from __future__ import annotations

from typing import Any

import numpy as np

from triderm_dist.report.content import Content
from triderm_dist.report.discrimination import thinned
from triderm_dist.report.elements import Column, Figure, Row, Section, Share, Table, Value
from triderm_dist.report.style import BLUE, DASHED, GRAY, ORANGE, WIDE, panels, panels_height

POINTS = 200
"""Points of a curve."""


def diagnoses(content: Content) -> Section:
    """Return F1, rates, areas and curves of each diagnosis, and macro F1 under each rule."""
    found = content.discrimination
    counts, has_thresholds = content.counts, content.task.decision != "argmax"
    columns = [
        Column("f1", "F1", bar=True),
        Column("lesions", "lesions"),
        Column("sensitivity", "sensitivity (recall)"),
        Column("specificity", "specificity"),
        Column("ppv", "PPV (precision)"),
        Column("npv", "NPV"),
        Column("predicted", "predicted"),
        *([Column("threshold", "threshold")] if has_thresholds else []),
    ]
    rows, rankings = [], []
    for at, (target, rates) in enumerate(zip(found.diagnoses, found.rates, strict=True)):
        values: list[Value] = [
            content.class_intervals[at],
            int(counts.positives[at]),
            rates.sensitivity,
            rates.specificity,
            rates.positive_predictive_value,
            rates.negative_predictive_value,
            int(counts.predicted[at]),
            *([float(content.ensemble.thresholds[at])] if has_thresholds else []),
        ]
        rows.append(Row(target.name, values, note=target.title))
        share = Share(int(counts.positives[at]), len(content.labels))
        rankings.append(Row(target.name, (target.area_under_roc, target.average_precision, share), note=target.title))
    of_rankings = [
        Column("auc", "AUC"),
        Column("average_precision", "average precision"),
        Column("share", "by chance: share of the lesions"),
    ]
    rules = [Row(name, (interval,)) for name, interval in found.macro_f1.items()]
    return Section(
        "Diagnoses",
        "diagnoses.html",
        tables=[
            Table("macro_f1", "Macro F1 of the same probabilities by what counts as predicted",
                  [Column("nested", "macro F1")], rules, "predicted"),
            Table("diagnoses", "Decisions on each diagnosis against all others", columns, rows, "diagnosis",
                  emphasis=True),
            Table("rankings", "Ranking of the lesions by the probability of each diagnosis", of_rankings, rankings,
                  "diagnosis"),
        ],
        figures=[_roc(content), _precision_recall(content)],
        values={"has_thresholds": has_thresholds},
    )  # fmt: skip


def _roc(content: Content) -> Figure:
    targets = content.discrimination.targets

    def draw(figure: Any) -> None:
        for axes, target in zip(panels(figure, len(targets)), targets, strict=True):
            axes.plot([0, 1], [0, 1], color=GRAY, linewidth=0.8, linestyle=DASHED)
            axes.plot(*thinned(*target.ranking.roc_curve, POINTS), color=BLUE, linewidth=1.4)
            rates = target.rates
            _dot(axes, 1 - rates.specificity.value, rates.sensitivity.value)
            axes.set_title(f"{target.name}  {_text(target.area_under_roc.value)}")
        figure.supxlabel("1 − specificity", fontsize=10)
        figure.supylabel("sensitivity", fontsize=10)

    areas = ", ".join(f"{target.name} {_text(target.area_under_roc.value)}" for target in targets)
    return Figure(
        "roc",
        draw,
        f"Sensitivity against 1 minus specificity; area under each curve: {areas}.",
        "ROC curves. Number after the name: area under the curve. Dot: the decisions. Dashed: random probabilities.",
        (WIDE, panels_height(len(targets))),
    )


def _precision_recall(content: Content) -> Figure:
    targets = content.discrimination.targets

    def draw(figure: Any) -> None:
        for axes, target in zip(panels(figure, len(targets)), targets, strict=True):
            axes.axhline(target.prevalence, color=GRAY, linewidth=0.8, linestyle=DASHED)
            axes.plot(*thinned(*target.ranking.precision_recall_curve, POINTS), color=BLUE, linewidth=1.4)
            rates = target.rates
            _dot(axes, rates.sensitivity.value, rates.positive_predictive_value.value)
            axes.set_title(f"{target.name}  {_text(target.average_precision.value)}")
        figure.supxlabel("recall (sensitivity)", fontsize=10)
        figure.supylabel("precision (PPV)", fontsize=10)

    areas = ", ".join(f"{target.name} {_text(target.average_precision.value)}" for target in targets)
    return Figure(
        "precision_recall",
        draw,
        f"Precision against recall; average precision: {areas}.",
        "Precision-recall curves. Number after the name: average precision. Dot: the decisions. Dashed: random "
        "probabilities.",
        (WIDE, panels_height(len(targets))),
    )


def _dot(axes: Any, x: float, y: float) -> None:
    if np.isfinite([x, y]).all():
        axes.plot(x, y, "o", color=ORANGE, markersize=5, clip_on=False)


def _text(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "–"
