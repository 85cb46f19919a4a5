"""Find the table of a folder by the columns that a task names."""

from __future__ import annotations

from pathlib import Path

from triderm_dist.data.readers.csv_file import NotUtf8
from triderm_dist.data.readers.table import find_tables, read_header
from triderm_dist.data.readers.workbook import SeveralSheets
from triderm_dist.schema import DataError, Task


def image_columns(task: Task) -> list[str]:
    """Return the columns that name photos."""
    columns = task.columns
    return [columns.image] if isinstance(columns.image, str) else [*map(columns.image_of, task.view_names)]


def task_columns(task: Task) -> list[str]:
    """Return every column that a task names."""
    columns = task.columns
    named = [columns.lesion_id, columns.view, columns.diagnosis, columns.group, task.fine and task.fine.column]
    named += [*image_columns(task), *task.concepts.names, *(each.column for each in task.fields)]
    return [name for name in named if name] + ([] if columns.diagnosis else list(task.diagnosis_names))


def find_table(source: Path, task: Task) -> Path:
    """Return the table to read: `source` itself, or the table in the folder that has the columns of photos.

    Raises DataError if there are none or several.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; give the folder that holds the table and the photos")
    tables = find_tables(source)
    if not tables:
        raise DataError(
            f"{source}: no table (.csv, .tsv, .txt, .xlsx or .parquet) in this folder; photos without one are "
            f"predicted by triderm predict run=RUN input={source}"
        )
    wanted = {name.lower() for name in image_columns(task)}
    found, errors = list[Path](), list[DataError]()
    for path in tables:
        try:
            if wanted <= {name.lower() for name in read_header(path, task.table)}:
                found.append(path)
        except (NotUtf8, SeveralSheets) as error:
            errors.append(error)
        except DataError:
            pass  # not a table
    if len(found) > 1:
        names = " and ".join(str(path.relative_to(source)) for path in found)
        raise DataError(f"{source}: {names} have the columns of photos; give the one to read, such as {found[0]}")
    if not found and errors:
        raise errors[0]
    if not found and len(tables) > 1:
        names = ", ".join(str(path.relative_to(source)) for path in tables)
        raise DataError(
            f"{source}: none of {names} has a column {image_columns(task)[0]!r} (columns.image in task.yaml)"
        )
    return (found or tables)[0]
