"""Read a challenge folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from triderm_dist.data.problems import InvalidLesions, Problem
from triderm_dist.data.readers.dataset import Dataset, Spellings, spelled_alike
from triderm_dist.data.readers.find_photos import PhotoFinder
from triderm_dist.data.readers.lesion_table import LesionTable, no_labels
from triderm_dist.data.readers.milk10k.columns import CONCEPT_PREFIX, GROUP_COLUMN, MONET_COLUMNS, UNUSED_COLUMNS
from triderm_dist.data.readers.milk10k.labels import LabelTable, read_finer_labels, unmatched_labels
from triderm_dist.data.readers.milk10k.layout import find_parts, folder_of
from triderm_dist.data.readers.milk10k.metadata import MetadataColumns
from triderm_dist.data.readers.milk10k.row_checks import InvalidRow, check_lesion, check_views
from triderm_dist.data.readers.table import Table, read_table, without_garbage_collection
from triderm_dist.schema import UNLABELED, VIEWS, DataError, Task
from triderm_dist.tasks import load_task, milk10k_task


def read_challenge(
    folder: str | os.PathLike[str],
    task: Task | None = None,
    missing_view: Literal["refuse", "mark"] = "refuse",
    invalid: Literal["refuse", "drop"] = "refuse",
) -> Dataset:
    """Read the lesions of a challenge folder, or of one metadata table in a folder with several.

    missing_view="mark" keeps lesions with one photo: the other view's path is None and, where the table has no row for
    it, its scores are NaN. invalid="drop" drops lesions with an invalid row.
    Raises InvalidLesions with all problems, its text naming file and row of the first one; DataError for a folder or
    table that cannot be read at all.
    """
    task = task or milk10k_task()
    metadata_path, truth_path, photo_roots = find_parts(Path(folder))
    # Fields that a plugin or another task adds may be missing.
    required = ("lesion_id", "isic_id", "image_type", *(field.column for field in load_task("milk10k").fields))
    known = (*required, GROUP_COLUMN, *(field.column for field in task.fields))
    table = read_table(metadata_path, task.table).named((*required, *known, *MONET_COLUMNS))
    table.require(required)
    scores = _concept_columns(table)
    if not len(table):
        raise DataError(f"{metadata_path}: the table has no rows")

    with without_garbage_collection():
        metadata = MetadataColumns(table, task, scores, missing_view == "mark")
        truth = LabelTable(truth_path, task) if truth_path else None
        labels, unknown = truth.match(metadata.names) if truth else (no_labels(len(metadata.names)), [])
        label_problems = truth.problems if truth else []
        where_labeled = truth.where if truth and unknown else None
        truth = None  # frees its memory before the photos are found
        find_photo = PhotoFinder(photo_roots)
        metadata.find_photos(find_photo)
        find_photo.clear()
        finer = read_finer_labels(metadata_path, task)
        lesions = metadata.columns(labels, finer, find_photo)
        problems = _row_problems(metadata, find_photo, missing_view, labels, finer, label_problems)
        find_photo.clear()
    if problems:
        bad = {problem.lesion_id for problem in problems}
        lesions = lesions.take(np.array([at for at, name in enumerate(metadata.names) if name not in bad], np.int64))
    notes = _tolerated(lesions, task, labeled=truth_path is not None)
    notes += _notes_on_table(table, metadata, lesions, used={*known, *scores})
    if where_labeled:
        problems += unmatched_labels(unknown, where_labeled, metadata.names, metadata_path.name)
    if find_photo.unused:
        notes.append(f"{find_photo.unused} photos are not in {metadata_path.name}")
    if problems and invalid == "refuse":
        raise InvalidLesions(problems, metadata.lesions + len(unknown))
    concepts = tuple(f"{view}/{column.removeprefix(CONCEPT_PREFIX)}" for view in VIEWS for column in scores)
    root = str(folder_of(Path(folder)))
    return Dataset(task, lesions, concepts, truth_path is not None, notes, tuple(problems), root)


def _concept_columns(table: Table) -> list[str]:
    """Return the columns of concept scores, the challenge's first: a network takes concepts by position.

    Raises DataError if there are none.
    """
    scores = [column for column in table.header if column.startswith(CONCEPT_PREFIX)]
    if not scores:
        raise DataError(f"{table.path}: no column starts with {CONCEPT_PREFIX}; the concept scores belong here")
    return sorted(scores, key=lambda name: MONET_COLUMNS.index(name) if name in MONET_COLUMNS else len(MONET_COLUMNS))


def _row_problems(
    metadata: MetadataColumns,
    find_photo: PhotoFinder,
    missing_view: Literal["refuse", "mark"],
    labels: np.ndarray,
    finer: Mapping[str, int],
    label_problems: Sequence[Problem],
) -> list[Problem]:
    """Check the rows of lesions marked `unusual` one by one, and return all problems, those of labels too."""
    problems: list[Problem] = []
    unusual = metadata.recheck(find_photo, missing_view, problems.append) if metadata.unusual.any() else {}
    problems += label_problems
    spellings = Spellings(metadata.names)
    bad = {problem.lesion_id for problem in problems}
    for lesion_id, photos in unusual.items():
        if lesion_id in bad:
            continue
        try:
            check_views(lesion_id, photos, missing_view)
            label = int(labels[metadata.code_of(photos)])
            check_lesion(lesion_id, photos, label, metadata.task, GROUP_COLUMN in metadata.table.cells, finer)
        except InvalidRow as error:
            hint = spellings.hint(lesion_id) if error.problem.kind == "missing photo" else ""
            problems.append(replace(error.problem, what=f"{error.problem.what}; {hint}") if hint else error.problem)
    return problems


def _tolerated(lesions: LesionTable, task: Task, labeled: bool) -> list[str]:
    """Return what was tolerated, with counts."""
    one_photo = np.any([column < 0 for column in lesions.images.values()], axis=0)
    tolerated: Counter[str] = Counter({"with one photo, the other view marked missing": int(one_photo.sum())})
    for field, column in zip(task.fields, lesions.metadata, strict=True):
        tolerated[f"without {field.label}"] += int(np.isnan(column.values()).sum())
    tolerated["without a diagnosis"] += int((lesions.labels == UNLABELED).sum()) if labeled else 0
    return [f"{count} of {len(lesions)} lesions {what}" for what, count in tolerated.items() if count]


def _notes_on_table(table: Table, metadata: MetadataColumns, lesions: LesionTable, used: set[str]) -> list[str]:
    """Return notes on ids that are spelled alike, and on columns that are not used."""
    notes = spelled_alike(metadata.names.column, "lesion ids")
    notes += spelled_alike(lesions.distinct_groups()[1], GROUP_COLUMN) if GROUP_COLUMN in table.cells else []
    if unused := [name for name in table.header if name not in used and name.lower() not in UNUSED_COLUMNS]:
        notes.append(f"{table.path.name}: columns that are not used: {', '.join(unused)}")
    return notes
