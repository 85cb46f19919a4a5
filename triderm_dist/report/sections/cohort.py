"""The lesions behind the figures: Table 1, and the lesions that were left out."""

from __future__ import annotations

from triderm_dist.report.cohort import characteristics
from triderm_dist.report.content import Content
from triderm_dist.report.elements import Column, Row, Section, Table


def cohort(content: Content) -> Section:
    """Return the characteristics of the lesions by fold and of the test set, and the flow of lesions."""
    cohorts = content.cohorts
    columns = [Column(each.name.replace(" ", "_"), each.name, ",.7g") for each in cohorts]
    found = characteristics(content.task, cohorts)
    headings = {row.title for row in found if row.value}
    rows = [Row(row.value or row.title, row.cells, group=row.title if row.title in headings else "") for row in found]
    tables = [Table("cohort", "Characteristics of the lesions", columns, rows, "characteristic")]
    steps = [
        Row(
            step.what, (step.lesions, None) if step.kind == "count" else (None, step.lesions), lead=step.kind == "count"
        )
        for step in content.flow
    ]
    columns = [Column("lesions", "lesions"), Column("left_out", "left out")]
    tables.append(Table("flow", "Lesions from the tables to the figures", columns, steps, "step"))
    if content.packing and content.packing.converted:
        photos = [Row(what, (number,)) for what, number in content.packing.converted.items()]
        tables.append(
            Table("converted", "Photos that packing converted", [Column("photos", "photos")], photos, "conversion")
        )
    values = {
        "recorded": len(content.flow) > 1,
        "fields": [field.label for field in content.task.fields],
        "test_labels": content.test_cohort is None
        or content.test_cohort.labels is not None
        or content.test_cohort.label_counts is not None,
        "photos_known": content.photos is not None,
    }
    return Section("Lesions", "cohort.html", tables=tables, values=values)
