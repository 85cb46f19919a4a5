"""Find the task of a folder, and read the folder with the reader that its task names."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from triderm_dist.data.readers import lesions_csv, milk10k
from triderm_dist.data.readers.dataset import Dataset, why_no_lesion_id
from triderm_dist.data.readers.lesion_table import LesionTable
from triderm_dist.data.readers.table import SUFFIXES
from triderm_dist.runtime.messages import did_you_mean, quoted
from triderm_dist.schema import UNLABELED, ConfigError, DataError, Lesion, Task
from triderm_dist.tasks import TASK_FILE, load_task, milk10k_task


@dataclass(frozen=True)
class Reader:
    """The functions that read one layout of folders.

    read(source, task, missing_view, invalid): as `read_source`.  inputs(source, task): the tables and folders of photos
    on which the result of `read` depends.  labels(path, task): {lesion id: label} of a table with the ground truth of a
    test set.
    """

    read: Callable[[Path, Task, Literal["refuse", "mark"], Literal["refuse", "drop"]], Dataset]
    inputs: Callable[[Path, Task], list[Path]]
    labels: Callable[[Path, Task], dict[str, int]] = lesions_csv.read_labels


READERS: dict[str, Reader] = {
    "milk10k": Reader(milk10k.read_challenge, milk10k.inputs, milk10k.read_labels),
    "lesions_csv": Reader(lesions_csv.read_lesions, lesions_csv.inputs),
}
"""Readers by the name that `Task.reader` holds; plugins may add others."""


def reader_of(task: Task) -> Reader:
    """Return the reader of a task. Raises ConfigError for an unknown one."""
    if task.reader not in READERS:
        every = f"known are {', '.join(READERS)}; plugins may add others"
        hint = did_you_mean(task.reader, READERS, every)
        raise ConfigError(f"task {task.name!r}: reader {task.reader!r} is unknown; {hint}")
    if not isinstance(reader := READERS[task.reader], Reader):
        raise ConfigError(f"task {task.name!r}: reader {task.reader!r} of READERS is no Reader")
    return reader


def read_source(
    source: str | os.PathLike[str],
    task: Task,
    missing_view: Literal["refuse", "mark"] = "refuse",
    invalid: Literal["refuse", "drop"] = "refuse",
) -> Dataset:
    """Read the lesions of a folder, or of one table in a folder with several, with the task's reader.

    missing_view="mark" keeps lesions with one of two photos. invalid="drop" drops lesions with an invalid row.
    Raises InvalidLesions with all problems; DataError for a folder or table that cannot be read at all, and for lesions
    of a plugin's reader that are not those of the task.
    """
    dataset = reader_of(task).read(Path(source), task, missing_view, invalid)
    if not isinstance(dataset, Dataset) or not isinstance(dataset.lesions, Sequence):
        raise DataError(f"reader {task.reader!r}: must return a Dataset with a list of lesions")
    if not isinstance(dataset.lesions, LesionTable):  # the readers of the package return one, with checked columns
        seen: set[str] = set()
        for lesion in dataset.lesions:
            if wrong := _why_no_lesion(lesion, task, len(dataset.concepts), seen):
                raise DataError(f"reader {task.reader!r}: lesion {quoted(str(lesion.lesion_id))}: {wrong}")
    return dataset


def _why_no_lesion(lesion: Lesion, task: Task, concepts: int, seen: set[str]) -> str | None:
    """Return what is wrong with a lesion of a plugin's reader; None if nothing is.

    seen: the ids of the lesions before it; its own is added.
    """
    text = isinstance(lesion.lesion_id, str) and isinstance(lesion.group, str)
    if not text or not lesion.group:
        return "its id and its group must be texts"
    if wrong := why_no_lesion_id(lesion.lesion_id):
        return f"its id {wrong}"
    if lesion.lesion_id in seen:
        return "another lesion has this id"
    seen.add(lesion.lesion_id)
    if {view for view, photo in lesion.images.items() if photo is not None} - {*task.view_names}:
        return f"has a photo of another view than {', '.join(task.view_names)}"
    if not any(lesion.images.values()):
        return "has no photo"
    if not isinstance(lesion.label, int | np.integer) or not UNLABELED <= lesion.label < len(task.diagnoses):
        return f"its label {lesion.label!r} is neither {UNLABELED} nor the index of a diagnosis (Task.label_of)"
    for name, values, number, each in (
        ("concepts", lesion.concepts, concepts, "concept of the Dataset"),
        ("metadata", lesion.metadata, len(task.fields), "field of the task"),
    ):
        if len(values) != number or not all(isinstance(value, float | int | np.number) for value in values):
            return f"its {name} must hold a number for each {each} ({number}), NaN where missing"
    for field, value in zip(task.fields, lesion.metadata, strict=True):
        low, high = (field.low, field.high) if field.is_number else (0, len(field.categories) - 1)
        if not (math.isnan(value) or low <= value <= high):
            return f"its {field.name} {value:g} is not from {low:g} to {high:g} (MetadataField.parse)"
    return None


def find_task(source: str | os.PathLike[str], setting: str | None = None) -> Task:
    """Load the task of a folder, or of a table in it; see `task_setting`."""
    found = task_setting(source, setting)
    return milk10k_task() if found == "milk10k" else load_task(found)


def task_setting(source: str | os.PathLike[str], setting: str | None = None) -> str:
    """Return the name or file of the task of a folder, or of a table in it.

    That is `setting`, else the task.yaml in the folder, else milk10k if the folder has that layout.
    Raises DataError if none of them applies.
    """
    if setting:
        return setting
    source = Path(source)
    folder = source.parent if source.is_file() else source
    if not folder.is_dir():
        raise DataError(f"{source}: no such folder; give the folder that holds the table and the photos")
    if (folder / TASK_FILE).is_file():
        return str(folder / TASK_FILE)
    if milk10k.has_layout(folder):
        return "milk10k"
    if source.is_file() and source.suffix.lower() not in SUFFIXES:
        raise DataError(f"{source}: not a table ({', '.join(SUFFIXES)}); give one, or the folder that holds the photos")
    raise DataError(
        f"{folder}: no {TASK_FILE} says what the table holds, and the layout is not MILK10k's; triderm task init "
        f"{folder} writes one, or name a task"
    )
