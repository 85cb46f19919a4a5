"""Describe a folder of photos with a table as a task, and check what a task reads.

triderm task init FOLDER
triderm task init FOLDER output=my_task.yaml
triderm task init FOLDER diagnosis=COLUMN lesion_id=COLUMN group=COLUMN view=COLUMN
triderm task check FOLDER
triderm task check FOLDER task=my_task.yaml

`init` looks at the tables and photos and writes FOLDER/task.yaml; columns need to be named only where it does not
recognize them. `check` reads the folder as triderm pack would and shows every field, the diagnoses, views and groups,
and the first problems.
"""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from triderm_dist.cli import run_words
from triderm_dist.files import expanded, write_text
from triderm_dist.runtime.terminal import counted
from triderm_dist.schema import ConfigError, DataError, Task
from triderm_dist.tasks import TASK_FILE, load_task, task_names

if TYPE_CHECKING:
    from rich.table import Table

    from triderm_dist.data.readers.dataset import Dataset
    from triderm_dist.data.readers.table import Table as CellTable

ROLES = ("diagnosis", "lesion_id", "group", "view")
"""Roles of columns that the user may name if the columns' names do not show them."""

MAX_PROBLEMS = 10
"""Problems that triderm task check lists."""


def main(arguments: list[str]) -> None:
    match arguments:
        case ["init", folder, *words] if all("=" in word for word in words):
            given = dict(word.split("=", 1) for word in words)
            output = given.pop("output", str(Path(folder) / TASK_FILE))
            if unknown := next((key for key in given if key not in ROLES), None):
                raise ConfigError(f"unknown setting {unknown!r}; triderm task init takes output, {', '.join(ROLES)}")
            init(expanded(folder), expanded(output), given)
        case ["check", folder]:
            check(expanded(folder), None)
        case ["check", folder, task] if task.startswith("task="):
            check(expanded(folder), task.removeprefix("task="))
        case _:
            raise ConfigError(
                "write triderm task init FOLDER and optionally output=FILE or diagnosis=COLUMN, or triderm task check "
                "FOLDER and optionally task=FILE or the name of a task that ships"
            )


def init(folder: Path, output: Path, roles: Mapping[str, str]) -> None:
    """Write the description of a folder; `roles`: see `describe_folder`. Raises ConfigError if `output` exists."""
    from triderm_dist.data.readers.describe import describe_folder
    from triderm_dist.data.readers.find_table import find_table
    from triderm_dist.settings import parse_yaml

    if output.exists():
        raise ConfigError(f"{output}: exists; delete it, or choose another output=FILE")
    text, table = describe_folder(folder, roles)
    task = Task.from_mapping(parse_yaml(text, str(output)), str(output))
    write_text(output, text)
    try:
        source = folder if find_table(folder, task) == table.path else table.path
    except DataError:  # other tables have the columns of photos too
        source = table.path
    is_own = output == (source if source == folder else source.parent) / TASK_FILE
    marks, own = text.count("CHECK") - 1, [] if is_own else [f"task={output}"]
    print(f"{output}: {len(task.diagnoses)} diagnoses, {len(task.fields)} fields, views {', '.join(task.view_names)}")
    command = ["triderm", "task", "check", str(source)]
    print(f"confirm the {counted(marks, 'line')} marked CHECK; then: {shlex.join([*command, *own])}")
    for name in shipped_tasks_of(table, task):
        print(f"the columns are those of {name}, a task that ships: {shlex.join([*command, f'task={name}'])}")


def shipped_tasks_of(table: CellTable, task: Task) -> list[str]:
    """Return the tasks that ship, are read as this one is, and name only columns of the table."""
    from triderm_dist.data.readers.find_table import task_columns

    header = {name.lower() for name in table.header}
    tasks = [load_task(name) for name in task_names()]
    return [
        each.name
        for each in tasks
        if each.reader == task.reader and {column.lower() for column in task_columns(each)} <= header
    ]


def check(folder: Path, setting: str | None) -> None:
    """Show what a task reads from a folder; None: the task by which `triderm pack` reads it.

    Raises InvalidLesions if a lesion is invalid.
    """
    from rich.console import Console

    from triderm_dist.data.problems import InvalidLesions
    from triderm_dist.data.readers.source import find_task, read_source

    task = find_task(folder, setting)
    dataset = read_source(folder, task, "mark", "drop")
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    if task.fields:
        console.print(_fields_table(dataset), markup=False)
        print()
    console.print(_diagnoses_table(dataset), markup=False)
    print()
    photos = {view: sum(lesion.images[view] is not None for lesion in dataset.lesions) for view in task.view_names}
    groups = Counter(lesion.group for lesion in dataset.lesions)
    lesions = f"{len(dataset.lesions)} lesions{' without a problem' if dataset.problems else ''}"
    print(f"{lesions} in {len(groups)} groups, the largest of {max(groups.values(), default=0)}")
    print("photos: " + ", ".join(f"{count} {view}" for view, count in photos.items()))
    print(f"concepts: {', '.join(dataset.concepts) or 'none'}")
    for note in dataset.notes:
        print(f"note: {note}")
    if len(task.views) > 1 and min(photos.values()) < len(dataset.lesions):
        print("note: lesions with one photo are packed by missing_view=mark only, in a pipeline data.missing_view=mark")
    for problem in dataset.problems[:MAX_PROBLEMS]:
        print(f"problem: {problem}")
    if (more := len(dataset.problems) - MAX_PROBLEMS) > 0:
        print(f"{counted(more, 'more problem')}; triderm pack lists all in OUTPUT.problems.csv")
    if dataset.problems:
        raise InvalidLesions(dataset.problems, len(dataset.lesions))


def _fields_table(dataset: Dataset) -> Table:
    """Return a table of the task's fields, with counts of missing and invalid cells and the values found."""
    import numpy as np
    from rich.table import Table

    task = dataset.task
    values = np.array([lesion.metadata for lesion in dataset.lesions]).reshape(len(dataset.lesions), len(task.fields))
    fields = Table("field", "column", "kind", "missing", "outside", "values", box=None, pad_edge=False)
    for about, column in zip(task.fields, values.T, strict=True):
        known = column[~np.isnan(column)]
        if about.is_number:
            seen = f"{known.min():g} to {known.max():g} {about.unit}".rstrip() if len(known) else ""
        else:
            counts = Counter(known.astype(int).tolist())
            seen = ", ".join(f"{name} {counts[at]}" for at, name in enumerate(about.categories))
        begins = (f"{about.column} '", f"unknown {about.column} '")
        outside = sum(problem.kind == "cell" and problem.what.startswith(begins) for problem in dataset.problems)
        missing = len(column) - len(known)
        fields.add_row(about.name, about.column, about.kind, str(missing), str(outside), seen)
    return fields


def _diagnoses_table(dataset: Dataset) -> Table:
    """Return a table of the task's diagnoses, with the number of lesions."""
    from rich.table import Table

    from triderm_dist.schema import UNLABELED

    labels = Counter(lesion.label for lesion in dataset.lesions)
    kinds = {True: "malignant", False: "benign", None: ""}
    diagnoses = Table("diagnosis", "lesions", "kind", "title", box=None, pad_edge=False)
    for at, each in enumerate(dataset.task.diagnoses):
        diagnoses.add_row(each.name, str(labels[at]), kinds[each.malignant], each.title)
    if labels[UNLABELED]:
        diagnoses.add_row("unlabeled", str(labels[UNLABELED]), "", "")
    return diagnoses


def start() -> None:
    run_words(main, __doc__)


if __name__ == "__main__":
    start()
