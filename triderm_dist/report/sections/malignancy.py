"""Malignant against benign lesions."""

from __future__ import annotations

from triderm_dist.report.content import Content
from triderm_dist.report.elements import Column, Row, Section, Table, plural


def malignancy(content: Content) -> Section | None:
    """Return metrics and counts of malignant against benign; None unless the labels hold both kinds."""
    if content.malignancy is None:
        return None
    found = content.malignancy
    names = {
        kind: ", ".join(each.name for each in content.task.diagnoses if each.malignant is kind)
        for kind in (True, False)
    }
    (benign, false_alarms), (missed, hits) = found.lesions.tolist()
    counts = [Row("malignant lesions", (hits, missed)), Row("benign lesions", (false_alarms, benign))]
    columns = [Column("malignant", "malignant decision"), Column("not_malignant", "no malignant decision")]
    unknown = (
        f" {found.unknown:,} {plural('lesion', found.unknown)} with another diagnosis left out."
        if found.unknown
        else ""
    )
    note = (
        f"Out of fold, nested. Malignant: {names[True]}; benign: {names[False]}.{unknown} The decisions are those for "
        "macro F1; they weigh a missed malignant lesion no more than a false alarm."
    )
    rows = [Row(title, (value,)) for title, value in found.values.items()]
    return Section(
        "Malignant against benign",
        tables=[
            Table("malignancy", "Malignant against benign, with 95% intervals", [Column("nested", "nested")], rows,
                  "metric"),
            Table("malignancy_counts", "Lesions by decision", columns, counts, "lesions"),
        ],
        values={"note": note},
    )  # fmt: skip
