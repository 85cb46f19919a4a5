"""Thresholds for a target sensitivity, chosen on other folds than those they are judged on."""

from __future__ import annotations

from triderm_dist.report.content import Content
from triderm_dist.report.discrimination import MIN_POSITIVES, OperatingPoint
from triderm_dist.report.elements import Column, Flag, Row, Section, Share, Table


def operating_points(content: Content) -> Section | None:
    """Return the operating points of the targets that mean a malignant lesion; None where there are none."""
    points = content.discrimination.operating_points
    if not points:
        return None
    columns = [
        Column("sensitivity", "sensitivity"),
        Column("specificity", "specificity"),
        Column("ppv", "PPV"),
        Column("npv", "NPV"),
        Column("aim", "against the target"),
    ]
    of_thresholds = [
        Column("threshold", "for new lesions", ".3g"),
        Column("lowest", "lowest of the folds", ".3g"),
        Column("highest", "highest", ".3g"),
        Column("called", "called positive"),
        Column("missed", "positives missed"),
    ]
    rows, thresholds = [], []
    for point in points:
        name, rates = f"sensitivity {point.aim:.0%}", point.rates
        values = (
            rates.sensitivity,
            rates.specificity,
            rates.positive_predictive_value,
            rates.negative_predictive_value,
            _against_the_aim(point),
        )
        rows.append(Row(name, values, group=point.target.title))
        counts = (
            point.threshold,
            float(point.thresholds.min()),
            float(point.thresholds.max()),
            Share(point.called, len(point.decided)),
            Share(point.missed, int(point.target.positive.sum())),
        )
        thresholds.append(Row(name, counts, group=point.target.title))
    return Section(
        "Operating points",
        "operating_points.html",
        tables=[
            Table("operating_points", "Decisions at thresholds for a target sensitivity", columns, rows, "aim",
                  emphasis=True),
            Table("operating_thresholds", "Thresholds and numbers of lesions", of_thresholds, thresholds, "aim"),
        ],
        values={"first": rows[0], "least": MIN_POSITIVES},
    )  # fmt: skip


def _against_the_aim(point: OperatingPoint) -> Flag:
    if point.rates.sensitivity.high < point.aim:
        return Flag("below")
    return Flag("above" if point.rates.sensitivity.low > point.aim else "within the noise", strong=False)
