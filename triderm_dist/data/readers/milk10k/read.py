"""Read a challenge folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from triderm_dist.data.ids import why_no_id
from triderm_dist.data.problems import InvalidLesions, Problem
from triderm_dist.data.readers.dataset import Dataset
from triderm_dist.data.readers.find_photos import PhotoFinder
from triderm_dist.data.readers.lesion_builder import LesionBuilder
from triderm_dist.data.readers.lesion_table import no_labels
from triderm_dist.data.readers.milk10k.columns import CONCEPT_PREFIX, GROUP_COLUMN, MONET_COLUMNS, UNUSED_COLUMNS
from triderm_dist.data.readers.milk10k.labels import match_labels, read_finer_labels
from triderm_dist.data.readers.milk10k.layout import find_parts, folder_of
from triderm_dist.data.readers.parsed_columns import ParsedColumns
from triderm_dist.data.readers.table import read_table, without_garbage_collection
from triderm_dist.data.shards.format import Text
from triderm_dist.runtime.messages import quoted
from triderm_dist.schema import UNLABELED, DataError, Task
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
    required = ("lesion_id", "isic_id", "image_type", *(each.column for each in load_task("milk10k").fields))
    known = (*required, GROUP_COLUMN, *(each.column for each in task.fields), *MONET_COLUMNS, *UNUSED_COLUMNS)
    table = read_table(metadata_path, task.table).named(known)
    table.require(required)
    if not any(column.startswith(CONCEPT_PREFIX) for column in table.header):
        raise DataError(f"{metadata_path}: no column starts with {CONCEPT_PREFIX}; the concept scores belong here")
    if not len(table):
        raise DataError(f"{metadata_path}: the table has no rows")

    with without_garbage_collection():
        columns = _ChallengeColumns(table, replace(task, columns=milk10k_task().columns))
        columns.check_photo_ids()
        columns.used |= {*required, *UNUSED_COLUMNS}
        label_problems = list[Problem]()
        if truth_path:
            columns.labels_of_lesions, label_problems = match_labels(
                truth_path, task, columns.names, metadata_path.name
            )
        columns.finer, notes_on_finer = read_finer_labels(metadata_path, task)
        columns.notes += notes_on_finer
        builder = LesionBuilder(columns, PhotoFinder(photo_roots), missing_view == "mark")
        lesions = builder.build()
    if label_problems:
        bad = {problem.lesion_id for problem in label_problems}
        lesions = lesions.take(np.array([at for at, name in enumerate(lesions.ids) if name not in bad], np.int64))
    if (problems := [*columns.problems, *label_problems]) and invalid == "refuse":
        raise InvalidLesions(problems, len(lesions))
    notes, root = builder.notes(lesions), str(folder_of(Path(folder)))
    return Dataset(task, lesions, builder.concepts, truth_path is not None, notes, tuple(problems), root)


@dataclass
class _ChallengeColumns(ParsedColumns):
    """The columns of the metadata table, of which the labels are in other tables.

    labels_of_lesions: (L,), None without a table of labels.  finer: the finer label by photo, of those that have one.
    """

    labels_of_lesions: np.ndarray | None = field(default=None, init=False)
    finer: Mapping[str, int] = field(default_factory=dict, init=False)

    def check_photo_ids(self) -> None:
        """Make each row without a valid id of its photo a problem; also where photos may be missing."""
        for row, isic_id in enumerate(self._photo_ids()):
            if wrong := why_no_id(isic_id):
                self.add_problem(row, "row", f"isic_id {quoted(isic_id)} {wrong}")

    def concept_columns(self) -> list[str]:
        """Return the columns of concept scores, the challenge's first: a network takes concepts by position."""
        found = [column for column in self.table.header if column.startswith(CONCEPT_PREFIX)]
        last = len(MONET_COLUMNS)
        return sorted(found, key=lambda name: MONET_COLUMNS.index(name) if name in MONET_COLUMNS else last)

    def labels(self) -> np.ndarray:
        """Return the label of the lesion of each row (N,), `UNLABELED` for none."""
        self.labeled = self.labels_of_lesions is not None
        return no_labels(len(self.table)) if self.labels_of_lesions is None else self.labels_of_lesions[self.codes]

    def finer_labels(self) -> np.ndarray | None:
        """Return the finer label of each row (N,), `UNLABELED` for none, and where the photos of a lesion differ."""
        if not self.finer:
            return None
        labels = (self.finer.get(isic_id, UNLABELED) for isic_id in self._photo_ids())
        found = np.fromiter(labels, np.int16, len(self.table))
        known, lesions = found != UNLABELED, len(self.names)
        low, high = np.full(lesions, np.iinfo(np.int16).max), np.full(lesions, UNLABELED)
        np.minimum.at(low, self.codes[known], found[known])
        np.maximum.at(high, self.codes[known], found[known])
        found[(low < high)[self.codes]] = UNLABELED
        return found

    def groups(self) -> tuple[np.ndarray, Text] | None:
        """Return the patients as groups, as `ParsedColumns.groups`; the official tables have none."""
        return super().groups() if GROUP_COLUMN in self.table.cells else None

    def _photo_ids(self) -> Iterator[str]:
        return (isic_id for (cells,) in self.table.parts("isic_id") for isic_id in cells.to_pylist())
