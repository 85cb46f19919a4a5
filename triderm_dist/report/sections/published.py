"""Published results that the task lists."""

from __future__ import annotations

from triderm_dist.report.content import Content
from triderm_dist.report.elements import Column, Row, Section, Table


def published(content: Content) -> Section | None:
    """Return this run beside the task's reference results; None where it has none."""
    results = content.task.reference_results
    if not results:
        return None
    if content.synthetic:
        text = "No comparison: the data are synthetic, and published results are on real lesions."
        return Section("Published results", values={"text": text})
    held_out = f"{content.held_out['macro_f1']:.3f}" if content.held_out else None
    rows = [Row("this run", (held_out, f"{content.score.value:.3f} nested", ""), lead=True)]
    rows += [Row(each.who, (each.test, each.validation, each.source)) for each in results]
    columns = [Column("test", "test"), Column("validation", "own validation"), Column("source", "source", long=True)]
    if not any(each.source for each in results):
        columns, rows = columns[:2], [Row(row.name, row.values[:2], lead=row.lead) for row in rows]
    note = "As published, each on its own split or test set: other lesions than in this report."
    if content.task.reference_note:
        note += f" {content.task.reference_note}"
    table = Table("published", "Published results", columns, rows, head="who")
    return Section("Published results", tables=[table], values={"note": note})
