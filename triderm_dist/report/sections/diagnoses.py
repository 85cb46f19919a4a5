"""One row per diagnosis."""

from __future__ import annotations

from triderm_dist.report.content import Content
from triderm_dist.report.elements import Column, Row, Section, Table


def diagnoses(content: Content) -> Section:
    """Return F1, precision, recall and areas of each diagnosis."""
    counts, has_thresholds = content.counts, content.task.decision != "argmax"
    columns = [
        Column("f1", "F1", bar=True),
        Column("lesions", "lesions"),
        Column("precision", "precision"),
        Column("recall", "recall"),
        Column("auc", "AUC"),
        Column("average_precision", "AP"),
        Column("predicted", "predicted"),
        *([Column("threshold", "threshold")] if has_thresholds else []),
    ]
    rows = []
    for at, diagnosis in enumerate(content.task.diagnoses):
        values = [
            content.class_intervals[at],
            int(counts.positives[at]),
            counts.precision[at],
            counts.recall[at],
            content.areas[0][at],
            content.areas[1][at],
            int(counts.predicted[at]),
            *([float(content.ensemble.thresholds[at])] if has_thresholds else []),
        ]
        rows.append(Row(diagnosis.name, values, note=diagnosis.title))
    note = (
        f"Out of fold, nested.{' Thresholds: from the fit on all lesions.' if has_thresholds else ''} With few "
        "lesions, read the interval, not the value. AUC: area under the ROC curve; AP: average precision, "
        "which is the share of the diagnosis for random probabilities."
    )
    table = Table("diagnoses", "Scores per diagnosis, with 95% intervals", columns, rows, "diagnosis", emphasis=True)
    return Section("Scores per diagnosis", tables=[table], values={"note": note})
