"""Find the task of a folder, and read the folder with the reader that its task names."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from triderm_dist.data.readers import lesions_csv, milk10k
from triderm_dist.data.readers.dataset import Dataset
from triderm_dist.data.readers.table import SUFFIXES
from triderm_dist.runtime.messages import did_you_mean
from triderm_dist.schema import ConfigError, DataError, Task
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
    return READERS[task.reader]


def read_source(
    source: str | os.PathLike[str],
    task: Task,
    missing_view: Literal["refuse", "mark"] = "refuse",
    invalid: Literal["refuse", "drop"] = "refuse",
) -> Dataset:
    """Read the lesions of a folder, or of one table in a folder with several, with the task's reader.

    missing_view="mark" keeps lesions with one of two photos. invalid="drop" drops lesions with an invalid row.
    Raises InvalidLesions with all problems; DataError for a folder or table that cannot be read at all.
    """
    return reader_of(task).read(Path(source), task, missing_view, invalid)


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
