"""Scores of subgroups of lesions, and whether their gaps to the other lesions exceed the noise."""

from __future__ import annotations

from triderm_dist.report.cohort import field_titles
from triderm_dist.report.content import Content
from triderm_dist.report.elements import Column, Flag, Row, Section, Table, Value
from triderm_dist.report.slices import (
    BEYOND,
    CONCEPTS,
    GROUP,
    LEVEL,
    MIN_SLICE_LESIONS,
    MIN_SLICE_POSITIVES,
    PHOTOS,
    SCORES,
    TOO_SMALL,
    WITHIN,
    SliceScore,
)


def slices(content: Content) -> Section | None:
    """Return gaps, scores and p-values of each slice; None where no field divides the lesions."""
    if not content.slices:
        return None
    parts: dict[tuple[str, str], dict[str, SliceScore]] = {}
    for part in content.slices:
        parts.setdefault((part.field, part.value), {})[part.score_name] = part
    used = [name for name in SCORES if any(name in scores for scores in parts.values())]
    titles = {field: _title(content, field) for field, _ in parts}

    def rows(cell: str, verdict: bool = False) -> list[Row]:
        result = []
        for (field, value), scores in parts.items():
            values: list[Value] = [getattr(scores[name], cell) if name in scores else None for name in used]
            if verdict:
                values = [_verdict(list(scores.values())), next(iter(scores.values())).lesions, *values]
            result.append(Row(value.replace("_", " "), values, group=titles[field]))
        return result

    scores = [Column(name, SCORES[name]) for name in used]
    adjusted = [Column(name, SCORES[name], ".2g") for name in used]
    gaps = [Column("verdict", "verdict", long=True), Column("lesions", "lesions")]
    gaps += [Column(name, SCORES[name], "+.3f") for name in used]
    beyond = [part for part in content.slices if part.verdict == BEYOND]
    values = {
        "beyond": [f"{titles[part.field]} {part.value}: {_direction(part)}".replace("_", " ") for part in beyond],
        "judged": sum(part.verdict != TOO_SMALL for part in content.slices),
        "level": LEVEL,
        "min_lesions": MIN_SLICE_LESIONS,
        "min_positives": MIN_SLICE_POSITIVES,
        "photos_known": content.photos is not None,
    }
    tables = [
        Table("slice_gaps", "Gaps to all other lesions, with 95% intervals", gaps, rows("gap", True), "subgroup"),
        Table("slice_scores", "Scores of the subgroups, with 95% intervals", scores, rows("score"), "subgroup"),
        Table("slice_p", "p-values of the gaps, adjusted by Holm's method", adjusted, rows("adjusted"), "subgroup"),
    ]
    return Section("Subgroups", "slices.html", tables=tables, values=values)


def _verdict(scores: list[SliceScore]) -> Flag:
    beyond = [part for part in scores if part.verdict == BEYOND]
    if beyond:
        return Flag(", ".join(_direction(part) for part in beyond))
    return Flag(TOO_SMALL if all(part.verdict == TOO_SMALL for part in scores) else WITHIN, strong=False)


def _direction(part: SliceScore) -> str:
    return f"{'lower' if part.gap.value < 0 else 'higher'} {SCORES[part.score_name]}"


def _title(content: Content, field: str) -> str:
    """Return the heading of the slices of a metadata field, of `PHOTOS`, of `CONCEPTS` or of `GROUP`."""
    if field == GROUP:
        return f"lesions of the same {content.task.columns.group or 'group'}"
    if field in (PHOTOS, CONCEPTS):
        return {PHOTOS: "missing photos", CONCEPTS: "concept scores"}[field]
    return field_titles(content.task)[field]
