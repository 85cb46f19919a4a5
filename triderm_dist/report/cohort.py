"""The lesions behind the figures: their characteristics (Table 1), and how many were left out on the way, and why.

Shapes: N lesions, M metadata fields, K concepts, 2 views.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, NonNegativeInt

from triderm_dist.checksums import DamagedFile, check_mapping
from triderm_dist.intervals import UNKNOWN, Interval
from triderm_dist.report.elements import Share
from triderm_dist.schema import UNLABELED, VIEWS, MetadataField, Task


@dataclass(frozen=True)
class Cohort:
    """The lesions of one column of Table 1, such as those of a fold.

    labels: (N,), `UNLABELED` where unknown; None where none is known.  groups: (N,).  metadata: (N, M), concepts:
    (N, K), NaN where missing.  photos: (N, 2) bool, whether each of `VIEWS` is there; None where that is not known.
    label_counts: of the diagnoses, in the place of labels that are kept elsewhere.
    """

    name: str
    labels: np.ndarray | None
    groups: np.ndarray
    metadata: np.ndarray
    concepts: np.ndarray
    photos: np.ndarray | None = None
    label_counts: Mapping[str, int] | None = None

    def __len__(self) -> int:
        return len(self.groups)

    def take(self, name: str, rows: np.ndarray) -> Cohort:
        """Return some of the lesions, by index or mask, as another column."""
        labels = None if self.labels is None else self.labels[rows]
        photos = None if self.photos is None else self.photos[rows]
        return Cohort(name, labels, self.groups[rows], self.metadata[rows], self.concepts[rows], photos)


Cell = int | Share | Interval | None
"""A number of lesions, some of all, the median of a number with its quartiles, or None where it is not known."""


@dataclass(frozen=True)
class CohortRow:
    """A row of Table 1: its title (such as that of a field), the value that it counts, and a cell for each column."""

    title: str
    value: str
    cells: tuple[Cell, ...]


def characteristics(task: Task, cohorts: Sequence[Cohort]) -> list[CohortRow]:
    """Return Table 1: lesions, groups, diagnoses, every field of the task, missing photos and concepts by cohort.

    Values of a category that no lesion has are left out, and missing values are counted where there are any.
    """
    rows = [CohortRow("lesions", "", tuple(len(each) for each in cohorts))]
    if any(len(np.unique(each.groups)) < len(each) for each in cohorts):
        title = f"groups ({task.columns.group})" if task.columns.group else "groups"
        rows.append(CohortRow(title, "", tuple(len(np.unique(each.groups)) for each in cohorts)))
    for number, diagnosis in enumerate(task.diagnoses):
        cells = tuple(_of_diagnosis(each, number, diagnosis.name) for each in cohorts)
        rows.append(CohortRow("diagnosis", diagnosis.name, cells))
    for number, (field, title) in enumerate(zip(task.fields, field_titles(task).values(), strict=True)):
        rows += _field_rows(field, title, [each.metadata[:, number] for each in cohorts])
    for column, view in enumerate(VIEWS):
        if view in task.view_names and any(each.photos is not None for each in cohorts):
            title = next(each.label for each in task.views if each.name == view)
            cells = tuple(
                None if each.photos is None else Share(int((~each.photos[:, column]).sum()), len(each))
                for each in cohorts
            )
            rows.append(CohortRow("missing", f"{title} photo", cells))
    if any(each.concepts.shape[1] for each in cohorts):
        cells = tuple(Share(int(np.isnan(each.concepts).any(axis=1).sum()), len(each)) for each in cohorts)
        rows.append(CohortRow("missing", "concept scores, any", cells))
    return rows


def field_titles(task: Task) -> dict[str, str]:
    """Return by name the title of each field with its unit; one that several share is followed by the column."""
    titles = [f"{each.label} ({each.unit})" if each.unit else each.label for each in task.fields]
    return {
        each.name: title if titles.count(title) == 1 else f"{title}, {each.column}"
        for each, title in zip(task.fields, titles, strict=True)
    }


def _of_diagnosis(cohort: Cohort, number: int, name: str) -> Cell:
    if cohort.labels is not None:
        return Share(int((cohort.labels == number).sum()), int((cohort.labels != UNLABELED).sum()))
    if cohort.label_counts is not None:
        return Share(int(cohort.label_counts.get(name, 0)), sum(cohort.label_counts.values()))
    return None


def _field_rows(field: MetadataField, title: str, values: Sequence[np.ndarray]) -> Iterator[CohortRow]:
    """Yield the rows of a metadata field. title: of the field.  values: (N,) of each cohort, NaN where missing."""
    if field.is_number:
        yield CohortRow(title, "median (quartiles)", tuple(_quartiles(each) for each in values))
    else:
        for index, category in enumerate(field.categories):
            cells = tuple(Share(int((each == index).sum()), len(each)) for each in values)
            if any(cell.part for cell in cells):
                yield CohortRow(title, category.replace("_", " "), cells)
    cells = tuple(Share(int(np.isnan(each).sum()), len(each)) for each in values)
    if any(cell.part for cell in cells):
        yield CohortRow(title, "missing", cells)


def _quartiles(values: np.ndarray) -> Interval:
    """Return the median of the known values with the quartiles, to four digits."""
    known = values[~np.isnan(values)].astype(np.float64)
    if not len(known):
        return UNKNOWN
    low, median, high = (float(f"{each:.4g}") for each in np.quantile(known, (0.25, 0.5, 0.75)))
    return Interval(median, low, high)


class PackingFacts(BaseModel):
    """What packing recorded of a set (`ShardIndex.flow`).

    dropped: lesions by why they were left out.  converted: photos by what was converted.  missing_photos: lesions
    without a photo, by view.
    """

    dropped: dict[str, NonNegativeInt] = {}
    converted: dict[str, NonNegativeInt] = {}
    missing_photos: dict[str, NonNegativeInt] = {}


def packing_facts(record: Mapping[str, Any]) -> PackingFacts | None:
    """Return what environment.json records of a packed set; None for a run of an earlier version."""
    try:
        check_mapping(flow := record["flow"], PackingFacts)
    except (KeyError, DamagedFile):
        return None
    return PackingFacts(**flow)


@dataclass(frozen=True)
class FlowStep:
    """A step from the tables of a data set to the lesions that are scored.

    kind: "count" for lesions that remain, "minus" for those that are left out, and why.
    """

    kind: str
    what: str
    lesions: int


def exclusions(packed: int | None, labeled: int | None, scored: int, facts: PackingFacts | None) -> list[FlowStep]:
    """Return the flow of lesions from the tables to the figures.

    packed, labeled: lesions of the packed set, and those with a diagnosis; None where they are not recorded.  scored:
    with a diagnosis and a held-out prediction of every network.
    """
    steps = []
    if packed is not None:
        if facts is not None:
            steps.append(FlowStep("count", "in the tables", packed + sum(facts.dropped.values())))
            steps += [FlowStep("minus", kind, lesions) for kind, lesions in facts.dropped.items()]
        steps.append(FlowStep("count", "packed", packed))
        if labeled is not None:
            steps.append(FlowStep("minus", "without a diagnosis", packed - labeled))
            steps.append(FlowStep("minus", "without a held-out prediction of every network", labeled - scored))
        else:
            steps.append(FlowStep("minus", "without a diagnosis or a held-out prediction", packed - scored))
    steps.append(FlowStep("count", "scored", scored))
    return [step for step in steps if step.kind == "count" or step.lesions]
