"""Rates and rankings of each diagnosis, with their curves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from triderm_dist.ensemble.score_table import FINAL_MODEL
from triderm_dist.report.content import Content
from triderm_dist.report.discrimination import Target, thinned
from triderm_dist.report.elements import Column, Figure, Row, Section, Share, Table, Value
from triderm_dist.report.style import BLUE, DASHED, GRAY, ORANGE, WIDE, panel_title, panels, panels_height

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
        note = target.title if target.title.lower() != target.name.lower() else ""
        rows.append(Row(target.name, values, note=note))
        share = Share(int(counts.positives[at]), len(content.labels))
        rankings.append(Row(target.name, (target.area_under_roc, target.average_precision, share), note=note))
    of_rankings = [
        Column("auc", "AUC"),
        Column("average_precision", "average precision"),
        Column("share", "by chance: share of the lesions"),
    ]
    rules = {f"decisions of the {FINAL_MODEL}": content.score, **found.macro_f1}
    return Section(
        "Diagnoses",
        "diagnoses.html",
        tables=[
            Table("macro_f1", "Macro F1 of the same probabilities by what counts as predicted",
                  [Column("nested", "macro F1")], [Row(name, (score,)) for name, score in rules.items()], "predicted"),
            Table("diagnoses", "Decisions on each diagnosis against all others", columns, rows, "diagnosis",
                  emphasis=True),
            Table("rankings", "Ranking of the lesions by the probability of each diagnosis", of_rankings, rankings,
                  "diagnosis"),
        ],
        figures=[_roc(content), _precision_recall(content)],
        values={"has_thresholds": has_thresholds},
    )  # fmt: skip


def _roc(content: Content) -> Figure:
    def draw(axes: Any, target: Target) -> None:
        axes.plot([0, 1], [0, 1], color=GRAY, linewidth=0.8, linestyle=DASHED)
        axes.plot(*thinned(*target.ranking.roc_curve, POINTS), color=BLUE, linewidth=1.4)
        _dot(axes, 1 - target.rates.specificity.value, target.rates.sensitivity.value)

    return _curves(
        content, "roc", draw, lambda target: target.area_under_roc.value, ("1 − specificity", "sensitivity"),
        "Sensitivity against 1 minus specificity; area under each curve",
        "ROC curves. Number after the name: area under the curve. Dot: the decisions. Dashed: random probabilities.",
    )  # fmt: skip


def _precision_recall(content: Content) -> Figure:
    def draw(axes: Any, target: Target) -> None:
        axes.axhline(target.prevalence, color=GRAY, linewidth=0.8, linestyle=DASHED)
        axes.plot(*thinned(*target.ranking.precision_recall_curve, POINTS), color=BLUE, linewidth=1.4)
        _dot(axes, target.rates.sensitivity.value, target.rates.positive_predictive_value.value)

    return _curves(
        content, "precision_recall", draw, lambda target: target.average_precision.value,
        ("recall (sensitivity)", "precision (PPV)"), "Precision against recall; average precision",
        "Precision-recall curves. Number after the name: average precision. Dot: the decisions. Dashed: random "
        "probabilities.",
    )  # fmt: skip


def _curves(
    content: Content,
    name: str,
    draw_one: Callable[[Any, Target], None],
    area: Callable[[Target], float],
    labels: tuple[str, str],
    alt: str,
    caption: str,
) -> Figure:
    """Return a figure with a panel for each target, titled with the area of its curve. labels: of x and y."""
    targets = content.discrimination.targets
    titled = [(target, _text(area(target))) for target in targets]

    def draw(figure: Any) -> None:
        for axes, (target, text) in zip(panels(figure, len(targets)), titled, strict=True):
            draw_one(axes, target)
            panel_title(axes, target.name, text)
        figure.supxlabel(labels[0], fontsize=10)
        figure.supylabel(labels[1], fontsize=10)

    areas = ", ".join(f"{target.name} {text}" for target, text in titled)
    return Figure(name, draw, f"{alt}: {areas}.", caption, (WIDE, panels_height(len(targets))))


def _dot(axes: Any, x: float, y: float) -> None:
    if np.isfinite([x, y]).all():
        axes.plot(x, y, "o", color=ORANGE, markersize=5, clip_on=False)


def _text(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "–"
