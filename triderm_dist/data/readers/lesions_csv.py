"""Read one table and its photos into checked lesions. The task names the columns and the words in them.

Photos lie anywhere below the folder; a cell holds a photo's id, file name or path. Each distinct text of a column is
parsed once, so that a million rows take seconds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from triderm_dist.data.problems import InvalidLesions
from triderm_dist.data.readers.dataset import Dataset
from triderm_dist.data.readers.find_photos import PhotoFinder
from triderm_dist.data.readers.find_table import find_table, image_columns, task_columns
from triderm_dist.data.readers.lesion_builder import LesionBuilder
from triderm_dist.data.readers.parsed_columns import ParsedColumns
from triderm_dist.data.readers.table import read_table, without_garbage_collection
from triderm_dist.schema import UNLABELED, DataError, Task


def read_lesions(
    source: str | os.PathLike[str],
    task: Task,
    missing_view: Literal["refuse", "mark"] = "refuse",
    invalid: Literal["refuse", "drop"] = "refuse",
) -> Dataset:
    """Read the lesions of a folder, or of one table in a folder with several tables that have the task's columns.

    missing_view="mark" keeps lesions with one of two photos. invalid="drop" drops lesions with an invalid row.
    Raises InvalidLesions with all problems, its text naming file and row of the first one; DataError for a folder or
    table that cannot be read at all.
    """
    path = find_table(Path(source), task)
    table = read_table(path, task.table).named(task_columns(task))
    table.require(image_columns(task), "; name it by columns.image in task.yaml")
    for key in ("lesion_id", "view"):
        if name := getattr(task.columns, key):
            table.require([name], f"; name it by columns.{key} in task.yaml")
    if not len(table):
        raise DataError(f"{path}: the table has no rows")
    with without_garbage_collection():
        folder = path.parent if path == Path(source) else Path(source)
        mark_missing = missing_view == "mark" and len(task.views) > 1
        columns = ParsedColumns(table, task)
        builder = LesionBuilder(columns, PhotoFinder([folder]), mark_missing)
        lesions = builder.build()
    if (problems := columns.problems) and invalid == "refuse":
        raise InvalidLesions(problems, len(lesions))
    notes = builder.notes(lesions)
    return Dataset(task, lesions, builder.concepts, columns.labeled, notes, tuple(problems), str(folder))


def read_labels(path: Path, task: Task) -> dict[str, int]:
    """Read the label of each lesion from a table with the task's columns of ids and diagnoses. Needs no photos.

    Raises DataError naming the row of an invalid label, or of one that contradicts an earlier row of the lesion.
    """
    table = read_table(path, task.table).named(task_columns(task))
    table.require([task.columns.lesion_id or image_columns(task)[0], *filter(None, [task.columns.diagnosis])])
    parsed = ParsedColumns(table, task)
    labels: dict[str, int] = {}
    names = parsed.names.tolist()
    found = zip((names[code] for code in parsed.codes.tolist()), parsed.labels().tolist(), strict=True)
    for row, (lesion_id, label) in enumerate(found):
        known = labels.get(lesion_id, UNLABELED)
        labels[lesion_id] = label if known == UNLABELED else known
        if UNLABELED != label != labels[lesion_id]:
            parsed.add_problem(row, "label", f"lesion {lesion_id} has another diagnosis than in an earlier row")
    if parsed.problems:
        raise DataError(str(parsed.problems[0]))
    return labels


def inputs(source: Path, task: Task) -> list[Path]:
    """Return the table and the folder of photos."""
    table = find_table(source, task)
    return [table, table.parent if table == source else source]
