"""Recall and macro F1 on subgroups of the lesions."""

from __future__ import annotations

from triderm_dist.report.content import (
    GROUP,
    LOWER_RECALL,
    MIN_SLICE_LESIONS,
    MIN_SLICE_POSITIVES,
    Content,
)
from triderm_dist.report.elements import Column, Flag, Row, Section, Table


def subgroups(content: Content) -> Section | None:
    """Return a row for each value of each field of the task; None without fields and groups."""
    if not content.slices:
        return None
    rows = [
        Row(
            part.value.replace("_", " "),
            (
                part.recall_difference,
                Flag(part.warning, part.warning == LOWER_RECALL) if part.warning else "",
                part.lesions,
                part.macro_f1,
            ),
            group=_title(content, part.field, with_unit=True),
        )
        for part in content.slices
    ]
    columns = [
        Column("recall_difference", "mean recall minus other lesions", "+.3f"),
        Column("warning", "verdict"),
        Column("lesions", "lesions"),
        Column("macro_f1", "macro F1"),
    ]
    worse = [
        f"{_title(content, part.field)} {part.value}".replace("_", " ")
        for part in content.slices
        if part.warning == LOWER_RECALL
    ]
    note = (
        f"Only diagnoses with at least {MIN_SLICE_POSITIVES} lesions inside and outside a slice are used, so macro F1 "
        "is not comparable between slices; the difference in mean recall is (same diagnoses on both sides). Slices "
        f"with fewer than {MIN_SLICE_LESIONS} lesions are not judged. About one difference in twenty lies outside its "
        "interval by chance."
    )
    table = Table("subgroups", "Subgroups of the lesions, with 95% intervals", columns, rows, "subgroup")
    return Section("Subgroups", "subgroups.html", tables=[table], values={"worse": worse, "note": note})


def _title(content: Content, field: str, with_unit: bool = False) -> str:
    """Return the title of the slices of a metadata field, or of `GROUP`."""
    if field == GROUP:
        return f"lesions of the same {content.task.columns.group or 'group'}"
    info = next(each for each in content.task.fields if each.name == field)
    return f"{info.label} ({info.unit})" if with_unit and info.unit else info.label
