"""Read the lesions to predict: a table with its photos (`table`), a folder of photos, or single photos.

Nothing but a photo is needed: columns and cells that are absent are missing values, and labels are ignored. Photos
without a table are lesions by their names (`photo_names`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from triderm_dist.data.ids import why_no_id
from triderm_dist.data.photo_formats import OTHER_SUFFIXES, PHOTO_SUFFIXES, READ_FORMATS
from triderm_dist.data.readers import milk10k
from triderm_dist.data.readers.csv_file import NotUtf8
from triderm_dist.data.readers.find_photos import walk_files
from triderm_dist.data.readers.source import read_source
from triderm_dist.data.readers.table import SUFFIXES, find_tables, read_header, read_table
from triderm_dist.data.readers.workbook import SeveralSheets
from triderm_dist.data.shards.format import INDEX
from triderm_dist.inference.photo_names import lesion_of
from triderm_dist.inference.table import ReadInput, TrainedOn, note_on_views, photo_columns, photo_set, read_lesions
from triderm_dist.runtime.messages import did_you_mean, printable
from triderm_dist.runtime.terminal import counted
from triderm_dist.schema import ConfigError, DataError, Task

MAX_NAME = 1000
"""Characters of a lesion's name by the path of its photo."""
_OWN_READERS = ("milk10k", "lesions_csv")
"""Readers of tasks whose tables `table` reads."""


def read_input(
    paths: Sequence[Path],
    trained: TrainedOn,
    *,
    photos: Path | None = None,
    view: str | None = None,
    invalid: Literal["refuse", "drop"] = "refuse",
) -> ReadInput:
    """Read a folder, a table, or one or several photos.

    photos: folder of the photos of a table, by default the table's.  view: of photos whose names do not state it.
    invalid="drop" leaves lesions with an invalid row out. Raises InvalidLesions, or DataError for an input that cannot
    be read at all.
    """
    if missing := next((path for path in paths if not path.exists()), None):
        raise DataError(f"{missing}: no such file or folder")
    if view is not None and view not in trained.task.view_names:
        raise DataError(f"view={view}: {did_you_mean(view, trained.task.view_names)}")
    if len(paths) != 1:
        _check_no_effect("photos", photos, "photos")
        if other := next((path for path in paths if path.suffix.lower() not in PHOTO_SUFFIXES), None):
            raise DataError(f"{other}: of several inputs each must be a photo ({READ_FORMATS})")
        return _read_photos([(path, Path()) for path in paths], trained, view)
    (path,) = paths
    if path.is_dir():
        return _read_folder(path, trained, photos, view, invalid)
    if path.suffix.lower() in SUFFIXES:
        _check_no_effect("view", view, f"the table {path.name}")
        return read_lesions(read_table(path, trained.task.table), [photos or path.parent], trained, invalid)
    if path.suffix.lower() in PHOTO_SUFFIXES:
        _check_no_effect("photos", photos, "a photo")
        return _read_photos([(path, Path())], trained, view)
    kinds = ", ".join((*SUFFIXES, *PHOTO_SUFFIXES))
    raise DataError(f"{path}: neither a folder, a table nor a photo, which end in {kinds}")


def _check_no_effect(name: str, value: object, what: str) -> None:
    """Raise ConfigError where a setting is given that has no effect on such an input."""
    if value is not None:
        raise ConfigError(f"{name}={value}: has no effect on {what}; remove it")


def _read_folder(
    folder: Path, trained: TrainedOn, photos: Path | None, view: str | None, invalid: Literal["refuse", "drop"]
) -> ReadInput:
    task = trained.task
    if (folder / INDEX).is_file():
        raise DataError(f"{folder}: is a packed set; predict it by data.test_shards={folder} without input")
    if task.reader not in _OWN_READERS:
        _check_no_effect("photos", photos, f"a folder of reader {task.reader}")
        _check_no_effect("view", view, f"a folder of reader {task.reader}")
        dataset = read_source(folder, task, "mark", invalid)
        scores = np.full((len(dataset.lesions), len(trained.concepts)), np.nan, np.float32)
        for column, name in enumerate(trained.concepts):
            if name in dataset.concepts:
                scores[:, column] = [each.concepts[dataset.concepts.index(name)] for each in dataset.lesions]
        lesions = photo_set(
            trained, {name: [each.images[name] for each in dataset.lesions] for name in task.view_names},
            lesion_ids=[each.lesion_id for each in dataset.lesions], concept_scores=scores,
            metadata=np.array([each.metadata for each in dataset.lesions]),
        )  # fmt: skip
        return ReadInput(lesions, tuple(dataset.notes), dataset.problems)
    if task.reader == "milk10k" and milk10k.has_layout(folder):
        path, _, roots = milk10k.find_parts(folder)
        _check_no_effect("view", view, f"the table {path.name}")
        return read_lesions(read_table(path, task.table), [photos] if photos else roots, trained, invalid)
    if (table := _find_table(folder, task)) is not None:
        _check_no_effect("view", view, f"the table {table.name}")
        return read_lesions(read_table(table, task.table), [photos or folder], trained, invalid)
    _check_no_effect("photos", photos, "a folder without a table")
    files = [(Path(parent, name), suffix) for parent, name, suffix in walk_files(folder)]
    found = [(path, path.parent.relative_to(folder)) for path, suffix in files if suffix in PHOTO_SUFFIXES]
    others = [path.name for path, suffix in files if suffix in OTHER_SUFFIXES]
    if not found:
        hint = f"; {others[0]} is none, convert it" if others else ""
        raise DataError(f"{folder}: no photo ({READ_FORMATS}) in or below this folder{hint}")
    result = _read_photos(found, trained, view)
    if others:
        note = f"{counted(len(others), 'file')} {'is' if len(others) == 1 else 'are'} not read, since "
        note += f"{'it is' if len(others) == 1 else 'they are'} no photo ({READ_FORMATS}): {others[0]}"
        kept = (*result.notes, note + (", ..." if len(others) > 1 else ""))
        return ReadInput(result.lesions, kept)
    return result


def _find_table(folder: Path, task: Task) -> Path | None:
    """Return the table in a folder that names photos, None if there is none. Raises DataError for several."""
    found = []
    for path in find_tables(folder):
        try:
            header = read_header(path, task.table)
        except (NotUtf8, SeveralSheets):
            raise
        except DataError:
            continue  # not a table
        if photo_columns(header, task):
            found.append(path)
    if len(found) > 1:
        names = " and ".join(str(path.relative_to(folder)) for path in found)
        raise DataError(f"{folder}: {names} name photos; give the one to read, such as input={found[0]}")
    return found[0] if found else None


def _read_photos(photos: Sequence[tuple[Path, Path]], trained: TrainedOn, view: str | None) -> ReadInput:
    """Return the lesions of (photo, its folder within the input), in the order of their first photo."""
    task = trained.task
    lesions: dict[str, dict[str, Path]] = {}
    for path, folder in photos:
        name, own_view = lesion_of(path, folder, task)
        if wrong := why_no_id(name, longest=MAX_NAME):
            raise DataError(f"{printable(str(path))}: the name of the lesion {wrong}; rename it")
        own_view = own_view or view or (task.view_names[0] if len(task.views) == 1 else None)
        if own_view is None:
            example = f"{path.stem}.{task.view_names[0]}{path.suffix}"
            raise DataError(
                f"{path}: its name does not state the view; name it {example}, or write view=NAME for all such photos "
                f"({', '.join(task.view_names)})"
            )
        if other := lesions.setdefault(name, {}).get(own_view):
            raise DataError(f"{path}: lesion {name} has two {own_view} photos, the other is {other}; rename one")
        lesions[name][own_view] = path
    columns = {name: [photos.get(name) for photos in lesions.values()] for name in task.view_names}
    result = photo_set(trained, columns, lesion_ids=[*lesions])
    notes = [*note_on_views(result)]
    if task.fields or trained.concepts:
        what = [*(each.label for each in task.fields), *(["concept scores"] if trained.concepts else [])]
        notes.append(f"photos alone: {', '.join(what)} are missing for every lesion")
    return ReadInput(result, tuple(notes))
