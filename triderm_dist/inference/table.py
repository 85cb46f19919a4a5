"""Read a table of lesions to predict, and find its photos.

A table is read as the run's task says (`data.readers.lesions_csv`), and may also have a column per view, named as the
view, with the paths of photos. A field's column has the name of the task's column or of the field. Columns and cells
that are absent are missing values, and labels are ignored.
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
from triderm_dist.data.photo_formats import PHOTO_SUFFIXES
from triderm_dist.data.photo_set import PhotoSet
from triderm_dist.data.problems import InvalidLesions, Problem
from triderm_dist.data.readers import milk10k
from triderm_dist.data.readers.cells import is_missing
from triderm_dist.data.readers.find_photos import MissingPhoto, PhotoFinder, photo_name
from triderm_dist.data.readers.lesion_table import agreed
from triderm_dist.data.readers.parsed_columns import ParsedColumns, rows_of
from triderm_dist.data.readers.table import Table, find_column, without_garbage_collection
from triderm_dist.data.shards.format import Text
from triderm_dist.inference.photo_names import split_view, view_words
from triderm_dist.runtime.messages import quoted
from triderm_dist.schema import DataError, TableFormat, Task

if TYPE_CHECKING:
    import pandas as pd

_CORRECT = "; correct it, or leave it empty if unknown"


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


def photo_set(trained: TrainedOn, photos: Mapping[str, Sequence[Any]], **columns: Any) -> PhotoSet:
    """Return lesions prepared as those that the networks were trained on; the arguments are those of `PhotoSet`."""
    return PhotoSet(
        trained.task, trained.concepts, photos, canvas=trained.canvas, short_side=trained.short_side, **columns
    )


def note_on_views(lesions: PhotoSet) -> Iterator[str]:
    """Yield how many lesions have one photo only, if a lesion may have two."""
    one = int((lesions.view_present.sum(1) == 1).sum())
    if one and len(lesions.task.views) > 1:
        yield f"{one:,} of {len(lesions):,} lesions with one photo; the other view is missing"


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
        raise InvalidLesions(problems, len(lesions))
    if not len(lesions):
        raise DataError(f"{table.path}: no valid lesion; the first problem: {problems[0]}")
    return ReadInput(lesions, (*note_on_views(lesions), *columns.notes_on_columns()), tuple(problems))


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


def photo_columns(header: Iterable[str], task: Task) -> dict[str, str]:
    """Return the column of each view's photos, {"": column} where a row is a photo, {} if no column has photos."""
    image, columns = task.columns.image, dict[str, str]()
    for view in task.view_names:
        own = image.get(view) if isinstance(image, Mapping) else image if len(task.views) == 1 else None
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
        self.concepts = trained.concepts
        self.absent: list[str] = []
        """Fields and concepts without a column."""
        self.photos = photo_columns(table.cells, trained.task)
        if not self.photos:
            names = ", ".join(trained.task.view_names)
            if isinstance(trained.task.columns.image, str):
                names += f", or the task's {trained.task.columns.image}"
            raise DataError(f"{table.path}: no column names the photos; add one per view ({names}) with their paths")
        super().__init__(table, trained.task)
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
        words = {word: self.task.view_names.index(view) for word, view in view_words(self.task).items()}
        return self.parsed_views(column, words)

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
    return photo_set(
        trained, {view: own[kept].tolist() for view, own in paths.items()},
        lesion_ids=[columns.lesion_id(row) for row in first[kept].tolist()],
        concept_scores=scores[kept], metadata=metadata[kept],
    )  # fmt: skip
