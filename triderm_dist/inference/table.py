"""Read the lesions to predict: a table with its photos, a folder of photos, or single photos.

Nothing but a photo is needed: columns and cells that are absent are missing values, and labels are ignored.

A table is read as the run's task says (`data.readers.lesions_csv`), and may also have a column per view, named as the
view, with the paths of photos. A field's column has the name of the task's column or of the field. Photos without a
table are lesions by their names: `X.clinical.jpg` and `X.dermoscopic.jpg` are two views of lesion X, and so are
`clinical/X.jpg` and `dermoscopic/X.jpg`, or `X/clinical.jpg` and `X/dermoscopic.jpg`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from triderm_dist.data.ids import why_no_id
from triderm_dist.data.photo_formats import OTHER_SUFFIXES, PHOTO_SUFFIXES, READ_FORMATS
from triderm_dist.data.photo_set import PhotoSet
from triderm_dist.data.problems import InvalidLesions, Problem
from triderm_dist.data.readers import milk10k
from triderm_dist.data.readers.cells import is_missing
from triderm_dist.data.readers.csv_file import NotUtf8
from triderm_dist.data.readers.find_photos import MissingPhoto, PhotoFinder, photo_name, walk_files
from triderm_dist.data.readers.lesion_table import agreed
from triderm_dist.data.readers.parsed_columns import ParsedColumns, rows_of
from triderm_dist.data.readers.source import read_source
from triderm_dist.data.readers.table import (
    SUFFIXES,
    Table,
    find_column,
    find_tables,
    read_header,
    read_table,
    without_garbage_collection,
)
from triderm_dist.data.readers.workbook import SeveralSheets
from triderm_dist.data.shards.format import INDEX, Text
from triderm_dist.runtime.messages import did_you_mean, printable, quoted
from triderm_dist.runtime.terminal import counted
from triderm_dist.schema import ConfigError, DataError, TableFormat, Task

if TYPE_CHECKING:
    import pandas as pd

SEPARATORS = "._- "
"""Characters that may separate the id of a lesion from the view in the name of a photo."""
MAX_NAME = 1000
"""Characters of a lesion's name by the path of its photo."""
_CORRECT = "; correct it, or leave it empty if unknown"
_OWN_READERS = ("milk10k", "lesions_csv")
"""Readers of tasks whose tables this module reads itself."""


class TrainedOn(Protocol):
    """What the networks of a run were trained on (`RunFolder`)."""

    @property
    def task(self) -> Task: ...
    @property
    def concepts(self) -> tuple[str, ...]:
        """In the order in which the networks take them."""

    @property
    def canvas(self) -> tuple[int, int]:
        """See `PhotoSet`, as for `short_side`."""

    @property
    def short_side(self) -> int | None: ...


@dataclass(frozen=True)
class ReadInput:
    """Lesions to predict.  notes: what is missing or was ignored.  problems: why lesions were left out."""

    lesions: PhotoSet
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()


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
        lesions = _photo_set(
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
        if _photo_columns(header, task):
            found.append(path)
    if len(found) > 1:
        names = " and ".join(str(path.relative_to(folder)) for path in found)
        raise DataError(f"{folder}: {names} name photos; give the one to read, such as input={found[0]}")
    return found[0] if found else None


# --- photos without a table ------------------------------------------------------------------------------------------


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
    result = _photo_set(trained, columns, lesion_ids=[*lesions])
    notes = [*_note_on_views(result)]
    if task.fields or trained.concepts:
        what = [*(each.label for each in task.fields), *(["concept scores"] if trained.concepts else [])]
        notes.append(f"photos alone: {', '.join(what)} are missing for every lesion")
    return ReadInput(result, tuple(notes))


def lesion_of(path: Path, folder: Path, task: Task) -> tuple[str, str | None]:
    """Return (lesion, view) by the name of a photo, or of the folder that it is in; None for an unknown view.

    folder: that of the photo within the input; it is a part of the lesion's name.
    """
    words = _view_words(task)
    stem, parts = path.stem, folder.parts
    name, view = split_view(stem, task)
    if view is None and stem.lower() in words:
        inside = parts or path.absolute().parent.parts[-1:]
        return "/".join(inside), words[stem.lower()]
    if view is None and parts and parts[-1].lower() in words:
        view, parts = words[parts[-1].lower()], parts[:-1]
    return "/".join((*parts, name)), view


def split_view(stem: str, task: Task) -> tuple[str, str | None]:
    """Split the name of a photo, as `X.clinical`, into the lesion and the view."""
    words = _view_words(task)
    for word in sorted(words, key=len, reverse=True):
        at = len(stem) - len(word)
        if at > 1 and stem[at:].lower() == word and stem[at - 1] in SEPARATORS:
            return stem[: at - 1], words[word]
    return stem, None


def _view_words(task: Task) -> dict[str, str]:
    return {word.lower(): view.name for view in task.views for word in (view.name, view.title, *view.words) if word}


def _photo_set(trained: TrainedOn, photos: Mapping[str, Sequence[Any]], **columns: Any) -> PhotoSet:
    return PhotoSet(
        trained.task, trained.concepts, photos, canvas=trained.canvas, short_side=trained.short_side, **columns
    )


def _note_on_views(lesions: PhotoSet) -> Iterator[str]:
    one = int((lesions.view_present.sum(1) == 1).sum())
    if one and len(lesions.task.views) > 1:
        yield f"{one:,} of {len(lesions):,} lesions with one photo; the other view is missing"


# --- tables ----------------------------------------------------------------------------------------------------------


def read_lesions(
    table: Table, folders: Sequence[Path], trained: TrainedOn, invalid: Literal["refuse", "drop"] = "refuse"
) -> ReadInput:
    """Read the lesions of a table. folders: to which paths of photos are relative, and below which others are found.

    Raises InvalidLesions with all problems, or DataError for a table without a column of photos.
    """
    if not len(table):
        raise DataError(f"{table.path}: the table has no rows")
    with without_garbage_collection():
        columns = _Columns(table, trained)
        lesions = _join(columns, _Photos(folders), trained)
    if (problems := columns.problems) and invalid == "refuse":
        raise InvalidLesions(problems, len(lesions) + len({problem.lesion_id for problem in problems}))
    if not len(lesions):
        raise DataError(f"{table.path}: no valid lesion; the first problem: {problems[0]}")
    return ReadInput(lesions, (*_note_on_views(lesions), *columns.notes_on_columns()), tuple(problems))


def text_of(value: Any) -> str:
    """Return a Python value as the text of a table's cell: "" for None, NaN, NaT and pandas.NA."""
    if value is None or (not isinstance(value, str) and str(value).lower() in ("nan", "nat", "<na>")):
        return ""
    return str(value).strip()


def table_of_frame(frame: pd.DataFrame) -> Table:
    """Return a DataFrame as a table of text; rows are numbered from 0. Raises DataError if two columns share a name."""

    def text(value: Any) -> str:
        return str(int(value)) if isinstance(value, float) and value.is_integer() else text_of(value)

    names = [str(name) for name in frame.columns]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"DataFrame: has two columns {twice!r}; rename or remove one")
    columns = [frame.iloc[:, at].tolist() for at in range(len(names))]
    cells = {name: pa.array(map(text, column), pa.string()) for name, column in zip(names, columns, strict=True)}
    return Table(Path("DataFrame"), TableFormat(), cells, range(len(frame)))


def _photo_columns(header: Iterable[str], task: Task) -> dict[str, str]:
    """Return the column of each view's photos, {"": column} where a row is a photo, {} if no column has photos."""
    image, columns = task.columns.image, dict[str, str]()
    for view in task.view_names:
        own = image[view] if isinstance(image, Mapping) else image if len(task.views) == 1 else None
        if column := find_column(header, own, view):
            columns[view] = column
    if not columns and task.row_per_photo and isinstance(image, str) and (column := find_column(header, image)):
        return {"": column}
    return columns


class _Columns(ParsedColumns):
    """The columns of a table of which all but those of photos may be absent, and labels are not read.

    Names of columns are compared in any case, and a field may also have the column of its name.
    """

    def __init__(self, table: Table, trained: TrainedOn) -> None:
        super().__init__(table, trained.task)
        self.concepts = trained.concepts
        self.absent: list[str] = []
        """Fields and concepts without a column."""
        self.photos = _photo_columns(table.cells, trained.task)
        if not self.photos:
            names = ", ".join(self.task.view_names)
            if isinstance(self.task.columns.image, str):
                names += f", or the task's {self.task.columns.image}"
            raise DataError(f"{table.path}: no column names the photos; add one per view ({names}) with their paths")
        self.used |= {*self.photos.values()}

    @property
    def row_is_photo(self) -> bool:
        """Whether a row is a photo."""
        return "" in self.photos

    def read_ids(self) -> None:
        """Set `codes` and `names`: the lesion of a row is its id, or where there are no ids the name of its photo."""
        column = self.table.find(self.task.columns.lesion_id, "lesion_id", "id")
        if column:
            self.used.add(column)
            self.codes, texts = self.table.encoded(column)
        else:
            cells = zip(*(self.table.cells[name].to_pylist() for name in self.photos.values()), strict=True)
            ids = [split_view(photo_name(next(filter(None, own), "")), self.task)[0] for own in cells]
            found = pa.array(ids, pa.string()).dictionary_encode()
            self.codes, texts = found.indices.to_numpy(), found.dictionary
        self.names = Text(pa.chunked_array([texts]))
        wrong = {code: why for code, lesion_id in enumerate(self.names) if (why := why_no_id(lesion_id))}
        for row, code in rows_of(wrong, self.codes):
            what = f"the lesion id {quoted(self.names[code])} {wrong[code]}; correct it"
            if not self.names[code]:
                what = f"{column} is empty; every lesion needs its own" if column else "the lesion has no photo"
            self.add_problem(row, "row", what)

    def views(self) -> np.ndarray:
        """Return the number of the view of each row (N,), -1 where it is unknown."""
        column = self.table.find(self.task.columns.view)
        if column is None:
            name = self.task.columns.view
            raise DataError(f"{self.table.path}: column {name!r}, the view of each photo, is missing from the header")
        words = {word: self.task.view_names.index(view) for word, view in _view_words(self.task).items()}

        def parse(text: str) -> float:
            if text.lower() not in words:
                raise ValueError(f"unknown {column} {quoted(text)}; known are {', '.join(words)}")
            return words[text.lower()]

        return np.nan_to_num(self.parsed(column, parse, "row"), nan=-1).astype(np.int8)

    def metadata(self, number: int) -> np.ndarray:
        about = self.task.fields[number]
        column = self.table.find(about.column, about.name)
        if column is None:
            self.absent.append(about.label)
            return np.full(len(self.table), np.nan)
        return self.parsed_field(replace(about, column=column), _CORRECT)

    def paths(self, column: str, photos: _Photos) -> np.ndarray:
        """Return the path of each row's photo (N,), None for an empty cell and one that is not found, a problem."""
        found = np.full(len(self.table), None, object)
        for row, cell in enumerate(self.table.cells[column].to_pylist()):
            if is_missing(cell, self.task.missing_words):
                continue
            try:
                found[row] = photos(cell, self.lesion_id(row))
            except MissingPhoto as error:
                self.add_problem(row, "missing photo", str(error))
            except ValueError as error:
                self.add_problem(row, "unreadable photo", str(error))
        return found

    def concept_scores(self, rows: np.ndarray) -> np.ndarray:
        """Return the scores (L, K) of the concepts that the networks take. rows: (L, V) or (L, 1) of each lesion."""
        scores, prefix = np.full((len(rows), len(self.concepts)), np.nan), self.task.concepts.prefix or ""
        parsed, absent = dict[str, np.ndarray](), list[str]()
        for at, concept in enumerate(self.concepts):
            view, name = concept.split("/", 1) if self.row_is_photo else (None, concept)
            column = self.table.find(prefix + name, name)
            if column is None:
                absent.append(concept)
                continue
            if column not in parsed:
                parsed[column] = self.parsed_scores(column, _CORRECT)
            own = rows[:, self.task.view_names.index(view) if view else 0]
            scores[:, at] = np.where(own >= 0, parsed[column][own], np.nan)
        if absent:
            self.absent += ["concept scores"] if len(absent) == len(self.concepts) else absent
        return scores

    def notes_on_columns(self) -> Iterator[str]:
        """Yield what is missing for every lesion, and what is not used."""
        if self.absent:
            yield f"{self.table.path.name}: no column for {', '.join(self.absent)}: missing for every lesion"
        known = {each for each in (self.task.columns.diagnosis, self.task.columns.group) if each}
        known |= {*self.task.diagnosis_names, *milk10k.UNUSED_COLUMNS}
        known = {name.lower() for name in known | self.used}
        if unused := [name for name in self.table.header if name.lower() not in known]:
            yield f"{self.table.path.name}: columns that are not used: {', '.join(unused)}"


class _Photos:
    """Finds a photo by its path in one of the folders, else anywhere below them, for which they are walked."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders

    def __call__(self, cell: str, lesion_id: str) -> str:
        """Return the path of a photo. Raises as `PhotoFinder`."""
        if Path(cell).suffix.lower() in PHOTO_SUFFIXES:
            for folder in self.folders:
                if os.path.isfile(path := os.path.join(folder, cell)):
                    return path
        return self._finder(cell, lesion_id)

    @cached_property
    def _finder(self) -> PhotoFinder:
        return PhotoFinder(self.folders)


def _join(columns: _Columns, photos: _Photos, trained: TrainedOn) -> PhotoSet:
    """Join the rows of a table to lesions and find their photos; those with a problem are left out."""
    task = columns.task
    columns.read_ids()
    values = [columns.metadata(number) for number in range(len(task.fields))]
    if columns.row_is_photo:
        rows = columns.rows_by_view(columns.views())
    else:
        columns.refuse_repeated_lesions("duplicate lesion", "keep one")
        rows = np.arange(len(columns.table))[:, None]
    scores = columns.concept_scores(rows)
    paths = {view: columns.paths(column, photos) for view, column in columns.photos.items()}
    if columns.row_is_photo:
        own = {view: rows[:, at] for at, view in enumerate(task.view_names)}
        paths = {view: np.where(each >= 0, paths[""][each], np.array(None)) for view, each in own.items()}
    metadata = np.empty((len(rows), len(values)))
    for at, field in enumerate(task.fields):
        metadata[:, at], differ = agreed(rows, values[at])
        for lesion in differ.tolist():
            columns.add_difference(rows[lesion], field.column)
    first = np.where(rows[:, 0] >= 0, rows[:, 0], rows[:, -1])
    kept = columns.valid_lesions()[columns.codes[first]]
    present = np.stack([own.astype(bool) for own in paths.values()]).any(0)
    for row in first[kept & ~present].tolist():
        what = f"lesion {columns.lesion_id(row)} has no photo; add one or remove its rows"
        columns.add_problem(row, "missing photo", what)
    kept &= present
    return _photo_set(
        trained, {view: own[kept].tolist() for view, own in paths.items()},
        lesion_ids=[columns.lesion_id(row) for row in first[kept].tolist()],
        concept_scores=scores[kept], metadata=metadata[kept],
    )  # fmt: skip
