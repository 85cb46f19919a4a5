"""Read the lesions to predict: a table with its photos, a folder of photos, or single photos.

Nothing but a photo is needed: columns and cells that are absent are missing values, and labels are ignored.

A table is read as the run's task says (`data.readers.lesions_csv`), and may also have a column per view, named as the
view, with the paths of photos. A field's column has the name of the task's column or of the field. Photos without a
table are lesions by their names: `X.clinical.jpg` and `X.dermoscopic.jpg` are two views of lesion X, and so are
`clinical/X.jpg` and `dermoscopic/X.jpg`, or `X/clinical.jpg` and `X/dermoscopic.jpg`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from triderm_dist.data.readers.cells import is_missing, parse_field, parse_score
from triderm_dist.data.readers.csv_file import NotUtf8
from triderm_dist.data.readers.find_photos import MissingPhoto, PhotoFinder, photo_name, walk_files
from triderm_dist.data.readers.source import read_source
from triderm_dist.data.readers.table import (
    SUFFIXES,
    Table,
    find_tables,
    read_header,
    read_table,
    without_garbage_collection,
)
from triderm_dist.data.readers.workbook import SeveralSheets
from triderm_dist.data.shards.format import INDEX
from triderm_dist.runtime.messages import did_you_mean, printable, quoted
from triderm_dist.runtime.terminal import counted
from triderm_dist.schema import ConfigError, DataError, TableFormat, Task

if TYPE_CHECKING:
    import pandas as pd

SEPARATORS = "._- "
"""Characters that may separate the id of a lesion from the view in the name of a photo."""
MAX_NAME = 1000
"""Characters of a lesion's name by the path of its photo."""
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
            header = {name.lower(): name for name in read_header(path, task.table)}
        except (NotUtf8, SeveralSheets):
            raise
        except DataError:
            continue  # not a table
        if _photo_columns(header.get, task):
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
        reading = _Reading(table, trained, tuple(folders))
        lesions = reading.lesions()
    if reading.problems and invalid == "refuse":
        raise InvalidLesions(reading.problems, len(lesions) + len(reading.bad))
    if not len(lesions):
        raise DataError(f"{table.path}: no valid lesion; the first problem: {reading.problems[0]}")
    return ReadInput(lesions, (*_note_on_views(lesions), *reading.notes()), tuple(reading.problems))


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


def _photo_columns(find: Callable[[str], str | None], task: Task) -> dict[str, str] | None:
    """Return the column of each view's photos, {"": column} where a row is a photo, None if no column has photos.

    find: the column of a name in lower case, as the header spells it.
    """
    image, names = task.columns.image, {view: [view] for view in task.view_names}
    if isinstance(image, Mapping):
        names = {view: [image[view], view] for view in task.view_names}
    elif len(task.views) == 1:
        names = {view: [image, view] for view in task.view_names}
    found = {view: next(filter(None, (find(name.lower()) for name in own)), None) for view, own in names.items()}
    if columns := {view: column for view, column in found.items() if column}:
        return columns
    if task.row_per_photo and isinstance(image, str) and (column := find(image.lower())):
        return {"": column}
    return None


@dataclass
class _Reading:
    """Parses the columns of a table."""

    table: Table
    trained: TrainedOn
    folders: tuple[Path, ...]
    problems: list[Problem] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    """Lesions with a problem."""
    used: set[str] = field(default_factory=set)
    absent: list[str] = field(default_factory=list)
    """Fields and concepts without a column."""

    def lesions(self) -> PhotoSet:
        """Return the lesions without a problem."""
        task, trained = self.task, self.trained
        columns = _photo_columns(self.table.find, task)
        if columns is None:
            names = ", ".join(task.view_names)
            if isinstance(task.columns.image, str):
                names += f", or the task's {task.columns.image}"
            raise DataError(
                f"{self.table.path}: no column names the photos; add one per view ({names}) with their paths"
            )
        by_row = "" in columns
        row_views = self._views() if by_row else None
        cells = {view: self._cells(column) for view, column in columns.items()}
        self.ids = self._ids([*cells.values()])
        fields = np.array([self._field(at) for at in range(len(task.fields))]).reshape(-1, len(self.table)).T
        scores = self._scores(by_row)
        rows = self._group(row_views)  # of each lesion, by view where a row is a photo
        ids, metadata, concepts = list[str](), list[np.ndarray](), list[list[float]]()
        photos: dict[str, list[str | None]] = {view: [] for view in task.view_names}
        for lesion_id, own in rows.items():
            paths: dict[str, str | None] = dict.fromkeys(task.view_names)
            for view, row in own.items():
                for name in [view] if by_row else columns:
                    paths[name] = self._photo(cells["" if by_row else name][row], row)
            if not any(paths.values()) and lesion_id not in self.bad:
                first = next(iter(own.values()))
                self._problem(first, "missing photo", f"lesion {lesion_id} has no photo; add one or remove its rows")
            values = self._agreed([*own.values()], fields)
            if lesion_id in self.bad:
                continue
            ids.append(lesion_id)
            metadata.append(values)
            if by_row:
                concepts.append([float(column[own[view]]) if view in own else math.nan for view, column in scores])
            else:
                concepts.append([float(column[own[""]]) for _, column in scores])
            for name, path in paths.items():
                photos[name].append(path)
        return _photo_set(
            trained, photos, lesion_ids=ids,
            concept_scores=np.array(concepts).reshape(len(ids), len(trained.concepts)),
            metadata=np.array(metadata).reshape(len(ids), len(task.fields)),
        )  # fmt: skip

    @property
    def task(self) -> Task:
        return self.trained.task

    def notes(self) -> Iterator[str]:
        """Yield what is missing for every lesion, and what is not used."""
        if self.absent:
            yield f"{self.table.path.name}: no column for {', '.join(self.absent)}: missing for every lesion"
        known = {each for each in (self.task.columns.diagnosis, self.task.columns.group) if each}
        known |= {*self.task.diagnosis_names, *milk10k.UNUSED_COLUMNS}
        known = {name.lower() for name in known | self.used}
        if unused := [name for name in self.table.header if name.lower() not in known]:
            yield f"{self.table.path.name}: columns that are not used: {', '.join(unused)}"

    # --- rows ---

    def _ids(self, photos: Sequence[list[str]]) -> list[str]:
        """Return the lesion of each row: its id, or where the table has no ids the name of its photo."""
        names = filter(None, (self.task.columns.lesion_id, "lesion_id", "id"))
        if column := next(filter(None, map(self.table.find, names)), None):
            ids = self._cells(column)
        else:
            cells = zip(*photos, strict=True)
            ids = [split_view(photo_name(next(filter(None, own), "")), self.task)[0] for own in cells]
        for row, lesion_id in enumerate(ids):
            if not lesion_id:
                what = f"{column} is empty; every lesion needs its own" if column else "the lesion has no photo"
                self.problems.append(Problem("", "row", self.table.where(row), what))
                self.bad.add("")
            elif wrong := why_no_id(lesion_id):
                what = f"the lesion id {quoted(lesion_id)} {wrong}; correct it"
                self.problems.append(Problem(lesion_id, "row", self.table.where(row), what))
                self.bad.add(lesion_id)
        return ids

    def _views(self) -> list[str | None]:
        """Return the view of each row's photo."""
        name = self.task.columns.view or ""
        column = self.table.find(name)
        if column is None:
            raise DataError(f"{self.table.path}: column {name!r}, the view of each photo, is missing from the header")
        words = _view_words(self.task)
        views: list[str | None] = []
        self._unknown_views: dict[int, str] = {}
        for row, cell in enumerate(self._cells(column)):
            views.append(words.get(cell.lower()))
            if views[-1] is None:
                self._unknown_views[row] = f"unknown {column} {cell!r}; known are {', '.join(words)}"
        return views

    def _group(self, views: Sequence[str | None] | None) -> dict[str, dict[str, int]]:
        """Return the row of each lesion by view, or by "" if a row is a lesion."""
        rows: dict[str, dict[str, int]] = {}
        for row, lesion_id in enumerate(self.ids):
            view = "" if views is None else views[row]
            own = rows.setdefault(lesion_id, {})
            if view is None:
                self._problem(row, "row", self._unknown_views[row])
            elif view in own:
                what = f"has two {view} photos" if view else "occurs twice"
                first = self.table.numbers[own[view]]
                self._problem(row, "duplicate lesion", f"lesion {lesion_id} {what}, the first in row {first}; keep one")
            else:
                own[view] = row
        return {lesion_id: own for lesion_id, own in rows.items() if own}

    def _agreed(self, rows: Sequence[int], values: np.ndarray) -> np.ndarray:
        """Return the values (M,) of a lesion, on which those of its rows (n, M) that are not missing must agree."""
        found = values[rows[0]].copy()
        for row in rows[1:]:
            both = ~np.isnan(found) & ~np.isnan(values[row]) & (found != values[row])
            for at in np.flatnonzero(both):
                what = f"the photos of lesion {self.ids[row]} differ in {self.task.fields[at].column}"
                self._problem(row, "rows differ", f"{what}; all rows need the same")
            found = np.where(np.isnan(found), values[row], found)
        return found

    def _photo(self, cell: str, row: int) -> str | None:
        """Return the path of a photo, None if the cell is empty."""
        if is_missing(cell, self.task.missing_words):
            return None
        for folder in self.folders:
            if Path(cell).suffix.lower() in PHOTO_SUFFIXES and os.path.isfile(path := os.path.join(folder, cell)):
                return path
        try:
            return self._finder(cell, self.ids[row])
        except MissingPhoto as error:
            self._problem(row, "missing photo", str(error))
        except ValueError as error:
            self._problem(row, "unreadable photo", str(error))
        return None

    @cached_property
    def _finder(self) -> PhotoFinder:
        return PhotoFinder(self.folders)

    # --- columns ---

    def _cells(self, column: str) -> list[str]:
        self.used.add(column)
        return self.table.cells[column].to_pylist()

    def _field(self, at: int) -> np.ndarray:
        about = self.task.fields[at]
        column = self.table.find(about.column) or self.table.find(about.name)
        if column is None:
            self.absent.append(about.label)
            return np.full(len(self.table), np.nan)
        about = replace(about, column=column)  # as messages name it
        return self._parsed(column, lambda text: parse_field(about, text, self.task.missing_words))

    def _scores(self, by_row: bool) -> list[tuple[str, np.ndarray]]:
        """Return (view, scores of the rows (R,)) of each concept; the view is "" if a row is a lesion."""
        prefix = self.task.concepts.prefix or ""
        parsed: dict[str, np.ndarray] = {}
        found, absent = [], []
        for concept in self.trained.concepts:
            view, name = concept.split("/", 1) if by_row else ("", concept)
            column = next(filter(None, (self.table.find(each) for each in (prefix + name, name))), None)
            if column is None:
                absent.append(concept)
                found.append((view, np.full(len(self.table), np.nan)))
                continue
            if column not in parsed:
                parsed[column] = self._parsed(column, self._score_of(column))
            found.append((view, parsed[column]))
        if absent:
            self.absent += ["concept scores"] if len(absent) == len(self.trained.concepts) else absent
        return found

    def _score_of(self, column: str) -> Callable[[str], float]:
        words, scores = self.task.missing_words, self.task.concepts.words
        return lambda text: parse_score(column, text, words, scores)

    def _parsed(self, column: str, parse: Callable[[str], float]) -> np.ndarray:
        """Parse a column (R,), each different text once; NaN where that raises ValueError, which is a problem."""
        encoded = self.table.cells[column].dictionary_encode()
        self.used.add(column)
        values, errors = np.full(len(encoded.dictionary), np.nan), dict[int, str]()
        for code, text in enumerate(encoded.dictionary.to_pylist()):
            try:
                values[code] = parse(text)
            except ValueError as error:
                errors[code] = str(error)
        codes = encoded.indices.to_numpy()
        for row in np.flatnonzero(np.isin(codes, list(errors))) if errors else ():
            self._problem(int(row), "cell", f"{errors[int(codes[row])]}; correct it, or leave it empty if unknown")
        return values[codes]

    def _problem(self, row: int, kind: str, what: str) -> None:
        self.bad.add(self.ids[row])
        self.problems.append(Problem(self.ids[row], kind, self.table.where(row), what))
