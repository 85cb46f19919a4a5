"""Read one table and its photos into checked lesions, as a task says: any columns, words and folders.

A row is a lesion, with a column for each view, or a photo, with a column that says its view. Photos lie anywhere below
the folder; a cell holds a photo's id, file name or path. Columns are parsed by their different values, so
that a million rows take seconds.
"""

from __future__ import annotations

import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from triderm_dist.data.problems import InvalidLesions, Problem
from triderm_dist.data.readers.dataset import Dataset, Spellings, spelled_alike, why_no_lesion_id
from triderm_dist.data.readers.find_photos import MissingPhoto, PhotoFinder, photo_name
from triderm_dist.data.readers.table import (
    NotUtf8,
    SeveralSheets,
    Table,
    find_tables,
    is_missing,
    numbers_in,
    parse_field,
    parse_number,
    parse_score,
    read_header,
    read_table,
    without_garbage_collection,
)
from triderm_dist.schema import (
    UNLABELED,
    VIEWS,
    DataError,
    Lesion,
    Task,
    did_you_mean,
    nearest,
    quoted,
    unsafe_character,
    why_no_id,
)

CHUNK = 1 << 14
"""Lesions whose values are Python objects at a time; they take ten times the memory of arrays."""


def read_lesions(
    source: str | os.PathLike[str],
    task: Task,
    missing_view: Literal["refuse", "mark"] = "refuse",
    invalid: Literal["refuse", "drop"] = "refuse",
) -> Dataset:
    """Read the lesions of a folder, or those of a table where the folder holds several with the task's columns.

    missing_view="mark" keeps lesions with one of two photos. invalid="drop" drops lesions with an invalid row.
    Raises InvalidLesions with all problems, its text naming file and row of the first one; DataError for a folder or
    table that cannot be read at all.
    """
    path = find_table(Path(source), task)
    columns = task.columns
    table = read_table(path, task.table).named(task_columns(task))
    table.require(image_columns(task), "; name it by columns.image in task.yaml")
    for key in ("lesion_id", "view"):
        if name := getattr(columns, key):
            table.require([name], f"; name it by columns.{key} in task.yaml")
    if not len(table):
        raise DataError(f"{path}: the table has no rows")
    with without_garbage_collection():
        folder = path.parent if path == Path(source) else Path(source)
        photos = PhotoFinder([folder])
        reading = _Reading(table, task, photos, mark_missing=missing_view == "mark" and len(task.views) > 1)
        lesions, notes, problems = reading.lesions()
    if problems and invalid == "refuse":
        raise InvalidLesions(problems, len(lesions) + len({problem.lesion_id for problem in problems}))
    return Dataset(task, lesions, reading.concepts, reading.labeled, notes, tuple(problems), str(folder))


def read_labels(path: Path, task: Task) -> dict[str, int]:
    """Read the label of each lesion from a table with the task's columns of ids and diagnoses; no photo is looked for.

    Raises DataError naming the row of an invalid label, or of one that differs from another of the lesion.
    """
    table = read_table(path, task.table).named(task_columns(task))
    table.require([task.columns.lesion_id or image_columns(task)[0], *filter(None, [task.columns.diagnosis])])
    reading = _Reading(table, task, PhotoFinder([]))
    reading.ids = reading._ids()
    labels: dict[str, int] = {}
    for row, (lesion_id, label) in enumerate(zip(reading.ids, reading._labels().tolist(), strict=True)):
        known = labels.get(lesion_id, UNLABELED)
        labels[lesion_id] = label if known == UNLABELED else known
        if UNLABELED != label != labels[lesion_id]:
            reading._problem(row, "label", f"lesion {lesion_id} has another diagnosis than in an earlier row")
    if reading.problems:
        raise DataError(str(reading.problems[0]))
    return labels


def inputs(source: Path, task: Task) -> list[Path]:
    """Return the table and the folder of photos."""
    table = find_table(source, task)
    return [table, table.parent if table == source else source]


def image_columns(task: Task) -> list[str]:
    """Return the columns that name photos."""
    image = task.columns.image
    return [image] if isinstance(image, str) else list(image.values())


def task_columns(task: Task) -> list[str]:
    """Return every column that a task names."""
    columns = task.columns
    named = [columns.lesion_id, columns.view, columns.diagnosis, columns.group, task.fine and task.fine.column]
    named += [*image_columns(task), *task.concepts.names, *(each.column for each in task.fields)]
    return [name for name in named if name] + ([] if columns.diagnosis else list(task.diagnosis_names))


def find_table(source: Path, task: Task) -> Path:
    """Return the table to read: `source` itself, or the one in the folder that has the columns of the photos.

    Raises DataError where there is none, or several to choose from.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; give the folder that holds the table and the photos")
    tables = find_tables(source)
    if not tables:
        raise DataError(f"{source}: no table (.csv, .tsv, .txt or .xlsx) in this folder")
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


@dataclass
class _Reading:
    """The columns of a table, parsed."""

    table: Table
    task: Task
    photos: PhotoFinder
    mark_missing: bool = False
    """Whether a lesion needs only one of its photos."""
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    labeled: bool = False
    bad: set[int] = field(default_factory=set)
    """Rows with a problem."""
    ids: list[str] = field(default_factory=list)
    """The lesion of each row."""

    def lesions(self) -> tuple[list[Lesion], list[str], list[Problem]]:
        """Return the lesions, the notes, and the problems that exclude others."""
        task = self.task
        self.ids = self._ids()
        rows, images = self._by_lesion()
        labels = self._labels()
        groups = self._groups()
        metadata = np.stack([self._field(number) for number in range(len(task.fields))], 1) if task.fields else None
        scores = [self._scores(column) for column in self._concept_columns()]

        fields = self._agreed(rows, metadata, [each.column for each in task.fields])
        (label,) = self._agreed(rows, labels[:, None], [task.columns.diagnosis or "diagnosis"], UNLABELED).T
        fine = self._fine(rows, label)
        group = self._agreed_groups(rows, groups)
        if task.row_per_photo:
            concepts = [np.where(rows[:, at] >= 0, each[rows[:, at]], np.nan) for at in range(2) for each in scores]
        else:
            concepts = [each[rows[:, 0]] for each in scores]
        scores_of = np.stack(concepts, 1) if concepts else np.empty((len(rows), 0))
        self.notes += spelled_alike(self.ids, "lesion ids")
        spellings = Spellings(self.ids)
        kept, problem_ids = list[Lesion](), {problem.lesion_id for problem in self.problems}
        names, none = task.view_names, dict[str, str | None].fromkeys(VIEWS)
        shared: dict[bytes, tuple[float, ...]] = {}
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            columns = [array[part].tolist() for array in (rows, scores_of, fields, label, fine)]
            for own, score, values, which, finer, name, photos in zip(*columns, group[part], images[part], strict=True):
                first = own[0] if own[0] >= 0 else own[-1]
                lesion_id = self.ids[first]
                if lesion_id in problem_ids or not self.bad.isdisjoint(own):
                    continue
                if what := self._missing(lesion_id, photos):
                    hint = spellings.hint(lesion_id)
                    self._problem(first, "missing photo", f"{what}; {hint}" if hint else what)
                    continue
                kept.append(
                    Lesion(
                        lesion_id,
                        none | dict(zip(names, photos, strict=True)),
                        tuple(score),
                        _shared(shared, values),
                        which,
                        name or lesion_id,
                        finer,
                    )
                )
        return kept, self._all_notes(kept), self.problems

    @property
    def concepts(self) -> tuple[str, ...]:
        """The names of the scores of a lesion."""
        prefix = self.task.concepts.prefix or ""
        return self.task.per_lesion(column[len(prefix) :] for column in self._concept_columns())

    # --- lesions ---

    def _ids(self) -> list[str]:
        column = self.task.columns.lesion_id
        name = column or image_columns(self.task)[0]
        ids = self._cells(name) if column else list(map(photo_name, self._cells(name)))
        for row, lesion_id in enumerate(ids):
            if wrong := why_no_lesion_id(lesion_id):
                what = f"{name} {quoted(lesion_id)} {wrong}"
                what += "" if column else "; name another column by columns.lesion_id in task.yaml, or rename the photo"
                self._problem(row, "row", what, lesion_id)
        return ids

    def _by_lesion(self) -> tuple[np.ndarray, list[tuple[str | None, ...]]]:
        """Return the rows (L, R) of each lesion, -1 where it has none, and its photos by view."""
        task = self.task
        images = [self._paths(column) for column in image_columns(task)]
        self.photos.clear()
        views = len(task.views)
        if task.row_per_photo:
            view = self._views()
            place: dict[str, int] = {}
            rows: list[list[int]] = []
            for row, lesion_id in enumerate(self.ids):
                at = place.setdefault(lesion_id, len(rows))
                if at == len(rows):
                    rows.append([-1] * views)
                if (which := view[row]) < 0:
                    continue
                if (other := rows[at][which]) >= 0:
                    what = f"lesion {lesion_id} has two {task.view_names[which]} photos, the first in row "
                    self._problem(row, "duplicate photo", f"{what}{self.table.numbers[other]}; keep one")
                else:
                    rows[at][which] = row
            rows = [own for own in rows if max(own) >= 0]
            return np.array(rows, np.int64), [
                tuple(images[0][row] if row >= 0 else None for row in own) for own in rows
            ]
        first: dict[str, int] = {}
        for row, lesion_id in enumerate(self.ids):
            if (other := first.setdefault(lesion_id, row)) != row:
                what = f"lesion {lesion_id} occurs twice, first in row {self.table.numbers[other]}; keep one"
                if isinstance(task.columns.image, str) and task.columns.lesion_id:
                    what += ", or make every photo a lesion by columns: {lesion_id: null, group: "
                    what += f"{task.columns.lesion_id}}} in task.yaml"
                self._problem(row, "duplicate lesion", what)
        return np.arange(len(self.table))[:, None], list(zip(*images, strict=True))

    def _missing(self, lesion_id: str, photos: Sequence[str | None]) -> str | None:
        if None not in photos:
            return None
        absent = [view for view, path in zip(self.task.view_names, photos, strict=True) if path is None]
        if len(absent) == len(photos):
            return f"lesion {lesion_id} has no photo; add one or remove its rows"
        if not self.mark_missing:
            return (
                f"lesion {lesion_id} has no {absent[0]} photo; add it, or allow lesions with one photo by "
                "missing_view=mark"
            )
        return None

    def _views(self) -> list[int]:
        words = {word.lower(): at for at, view in enumerate(self.task.views) for word in (view.name, *view.words)}
        column = self.task.columns.view or ""

        def parse(text: str) -> float:
            if text.lower() not in words:
                raise ValueError(f"unknown {column} {quoted(text)}; known are {', '.join(words)}{_as_words('views')}")
            return words[text.lower()]

        return np.nan_to_num(self._parsed(column, parse, "row"), nan=-1).astype(int).tolist()

    def _paths(self, column: str) -> list[str | None]:
        """Return the path of each row's photo, None where its cell is empty or a file that may be missing is."""
        paths: list[str | None] = []
        owner: dict[str, int] = {}
        cells = zip(self._cells(column), self.ids, self._is_missing(column), strict=True)
        for row, (cell, lesion_id, missing) in enumerate(cells):
            if missing:
                paths.append(None)
                continue
            path = None
            try:
                if character := unsafe_character(cell):
                    raise ValueError(f"{quoted(cell)} holds {character}; correct it")
                path = self.photos(cell, lesion_id)
            except MissingPhoto as error:
                if not self.mark_missing:
                    self._problem(row, "missing photo", f"{column}: {error}")
            except ValueError as error:
                self._problem(row, "unreadable photo", f"{column}: {error}")
            if path and (other := owner.setdefault(path, row)) != row:
                what = f"photo {cell} occurs twice, first in row {self.table.numbers[other]}; remove one"
                self._problem(row, "duplicate photo", what)
            paths.append(path)
        return paths

    def _agreed(
        self, rows: np.ndarray, values: np.ndarray | None, names: Sequence[str], none: float = math.nan
    ) -> np.ndarray:
        """Return the values (L, M) on which the rows of each lesion that have one must agree."""
        if values is None:
            return np.empty((len(rows), 0))
        found = values[rows[:, 0]] if rows.shape[1] == 1 else None
        if found is not None:
            return found
        missing = np.full_like(values[:1], none)
        pair = [np.where((rows[:, at] >= 0)[:, None], values[rows[:, at]], missing) for at in range(2)]
        absent = [np.isnan(each) if math.isnan(none) else each == none for each in pair]
        for at, column in zip(*np.nonzero(~absent[0] & ~absent[1] & (pair[0] != pair[1])), strict=True):
            self._differ(rows[at], names[column])
        return np.where(absent[0], pair[1], pair[0])

    def _agreed_groups(self, rows: np.ndarray, groups: list[str] | None) -> list[str]:
        if groups is None:
            return [""] * len(rows)
        found = []
        for own in rows.tolist():
            names = {groups[row] for row in own if row >= 0} - {""}
            if len(names) > 1:
                self._differ(own, self.task.columns.group or "")
            found.append(min(names, default=""))
        return found

    def _differ(self, rows: Sequence[int], column: str) -> None:
        what = f"the photos of lesion {self.ids[rows[-1]]} differ in {column}; all rows need the same"
        self._problem(rows[-1], "rows differ", what)

    # --- columns ---

    def _absent(self, column: str) -> str:
        """Return the name of a column that the table lacks, with the most similar one of those that nothing uses."""
        known = {name.lower() for name in task_columns(self.task)}
        near = nearest(column, (name for name in self.table.header if name.lower() not in known))
        return f"{column!r} (is {near!r} meant?)" if near else repr(column)

    def _cells(self, column: str) -> list[str]:
        self.used.add(column)
        return self.table.cells[column].to_pylist()

    def _is_missing(self, column: str) -> list[bool]:
        words = pa.array(["", *map(str.lower, self.task.missing_words)])
        return pc.is_in(pc.utf8_lower(self.table.cells[column]), words).to_pylist()

    def _parsed(
        self,
        column: str,
        parse: Callable[[str], float],
        kind: str,
        span: tuple[float, float] | None = None,
        words: Iterable[str] = (),
    ) -> np.ndarray:
        """Parse a column (N,), each different text once; NaN where that raises ValueError, which is a problem.

        span: numbers in it are taken as they are, unless they are one of `words`.
        """
        self.used.add(column)
        encoded = self.table.cells[column].dictionary_encode()
        texts, errors = encoded.dictionary, dict[int, str]()
        values = np.full(len(texts), np.nan)
        if span:
            own = pc.is_in(pc.utf8_lower(texts), pa.array([*map(str.lower, words), *self.task.missing_words]))
            values = np.where(own.to_numpy(zero_copy_only=False), np.nan, numbers_in(texts, *span))
        for code in np.flatnonzero(np.isnan(values)).tolist():
            try:
                values[code] = parse(texts[code].as_py())
            except ValueError as error:
                errors[code] = str(error)
        codes = encoded.indices.to_numpy()
        if errors:
            for row in np.flatnonzero(np.isin(codes, list(errors))):
                self._problem(int(row), kind, errors[int(codes[row])])
        return values[codes]

    def _field(self, number: int) -> np.ndarray:
        about, words = self.task.fields[number], self.task.missing_words
        if about.column not in self.table.cells:
            self.notes.append(f"no column {self._absent(about.column)}: {about.label} is missing for every lesion")
            return np.full(len(self.table), np.nan)

        def parse(text: str) -> float:
            try:
                return parse_field(about, text, words)
            except ValueError as error:
                advice = "" if about.is_number else f", list it under synonyms of {about.name}"
                raise ValueError(f"{error}; correct it{advice} or under missing_words in task.yaml") from None

        found = self._parsed(about.column, parse, "cell", (about.low, about.high) if about.is_number else None)
        if not about.is_number:
            seen = set(found[~np.isnan(found)].astype(int).tolist())
            if absent := [name for at, name in enumerate(about.categories) if at not in seen]:
                self.notes.append(f"{about.column}: no row has {', '.join(absent)}")
        return found

    def _concept_columns(self) -> list[str]:
        """Return the columns of scores, in an order that does not depend on the table's."""
        concepts = self.task.concepts
        if concepts.prefix:
            prefix = concepts.prefix.lower()
            return sorted((each for each in self.table.cells if each.lower().startswith(prefix)), key=str.lower)
        return list(concepts.names)

    def _scores(self, column: str) -> np.ndarray:
        if column not in self.table.cells:
            self.notes.append(f"no column {self._absent(column)}: this concept is missing for every lesion")
            return np.full(len(self.table), np.nan)
        scores = self.task.concepts.words

        def parse(text: str) -> float:
            try:
                return parse_score(column, text, self.task.missing_words, scores)
            except ValueError as error:
                raise ValueError(f"{error}; correct it, or list it under concepts.words in task.yaml") from None

        return self._parsed(column, parse, "cell", (0.0, 1.0), scores)

    def _labels(self) -> np.ndarray:
        """Return the (N,) index of each row's diagnosis, `UNLABELED` where it has none."""
        task, column = self.task, self.task.columns.diagnosis
        if column is None:
            return self._one_hot()
        self.labeled = column in self.table.cells
        if not self.labeled:
            self.notes.append(f"no column {self._absent(column)}: no lesion has a diagnosis")
            return np.full(len(self.table), UNLABELED)

        def parse(text: str) -> float:
            if is_missing(text, task.missing_words):
                return UNLABELED
            return parse_diagnosis(text, task, column)

        return np.nan_to_num(self._parsed(column, parse, "label"), nan=UNLABELED).astype(int)

    def _fine(self, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the number of each lesion's finer label (L,), `UNLABELED` where it has none of the task's.

        A finer label of another diagnosis than the lesion's (labels, (L,)) is a problem.
        """
        fine, none = self.task.fine, np.full(len(rows), UNLABELED)
        if fine is None:
            return none
        if fine.column not in self.table.cells:
            self.notes.append(f"no column {self._absent(fine.column)}: no lesion has a finer label")
            return none
        found = self._parsed(fine.column, fine.label_of, "label").astype(int)
        (finer,) = self._agreed(rows, found[:, None], [fine.column], UNLABELED).T
        for at, pair in enumerate(zip(labels.tolist(), finer.tolist(), strict=True)):
            if wrong := self.task.fine_contradiction(*pair):
                self._problem(int(rows[at].max()), "label", wrong)
        return finer

    def _one_hot(self) -> np.ndarray:
        names = self.task.diagnosis_names
        self.labeled = any(name in self.table.cells for name in names)
        if not self.labeled:
            self.notes.append("no column of a diagnosis: no lesion has one")
            return np.full(len(self.table), UNLABELED)
        self.table.require(names, "; every diagnosis needs a column of zeros and ones")
        truth = {"true": 1.0, "false": 0.0}

        def parse(text: str) -> float:
            if is_missing(text, self.task.missing_words):
                return math.nan
            number = truth.get(text.lower(), parse_number(text))
            return number if number is not None else -1.0

        cells = np.stack([self._parsed(name, parse, "label") for name in names], 1)
        empty = np.isnan(cells).all(1)
        right = ((cells == 1).sum(1) == 1) & ((cells == 0).sum(1) == len(names) - 1)
        for row in np.flatnonzero(~empty & ~right):
            what = (
                f"lesion {self.ids[row]} needs a single 1 and otherwise 0 over the diagnoses; leave all empty if it is "
            )
            self._problem(int(row), "label", f"{what}unlabeled")
        return np.where(empty | ~right, UNLABELED, (cells == 1).argmax(1))

    def _groups(self) -> list[str] | None:
        column = self.task.columns.group
        if column is None:
            return None
        if column not in self.table.cells:
            self.notes.append(f"no column {self._absent(column)}: each lesion is a group of its own")
            return None
        encoded = self.table.cells[column].dictionary_encode()
        names = ["" if is_missing(name, self.task.missing_words) else name for name in encoded.dictionary.to_pylist()]
        self.used.add(column)
        codes = encoded.indices.to_pylist()
        if wrong := {code: why for code, name in enumerate(names) if name and (why := why_no_id(name))}:
            for row, code in enumerate(codes):
                if code in wrong:
                    self._problem(row, "row", f"{column} {quoted(names[code])} {wrong[code]}")
        self.notes += spelled_alike(filter(None, names), column)
        return [names[code] for code in codes]

    def _problem(self, row: int, kind: str, what: str, lesion_id: str | None = None) -> None:
        self.bad.add(row)
        self.problems.append(
            Problem(self.ids[row] if lesion_id is None else lesion_id, kind, self.table.where(row), what)
        )

    def _all_notes(self, lesions: Sequence[Lesion]) -> list[str]:
        """Return what was tolerated, with counts."""
        tolerated: Counter[str] = Counter()
        values = np.array([lesion.metadata for lesion in lesions]).reshape(len(lesions), len(self.task.fields))
        for about, missing in zip(self.task.fields, np.isnan(values).sum(0).tolist(), strict=True):
            tolerated[f"without {about.label}"] += missing if about.column in self.table.cells else 0
        labels = Counter(lesion.label for lesion in lesions)
        tolerated["without a diagnosis"] += labels[UNLABELED] if self.labeled else 0
        if len(self.task.views) > 1:
            absent = sum(None in lesion.images.values() for lesion in lesions)
            tolerated["with one photo, the other view marked missing"] += absent
        notes = [f"{count} of {len(lesions)} lesions {what}" for what, count in tolerated.items() if count]
        if self.labeled and (none := [name for at, name in enumerate(self.task.diagnosis_names) if not labels[at]]):
            notes.append(f"no lesion has the diagnosis {', '.join(none)}")
        if unused := [name for name in self.table.header if name not in self.used]:
            notes.append(f"{self.table.path.name}: columns that are not used: {', '.join(unused)}")
        if others := self.photos.unused:
            notes.append(f"{others} photos are not in {self.table.path.name}")
        return notes + self.notes


def parse_diagnosis(text: str, task: Task, column: str) -> int:
    """Return the index of the diagnosis that a text names. Raises ValueError, with the nearest word."""
    label = task.label_of(text)
    if label is not None:
        return label
    hint = did_you_mean(text.lower(), task.label_words)
    raise ValueError(f"unknown {column} {quoted(text)}; {hint}{_as_words('diagnoses')}")


def _as_words(key: str) -> str:
    return f" Correct it, or add it to the words of one of the {key} in task.yaml"


def _shared(known: dict[bytes, tuple[float, ...]], values: list[float]) -> tuple[float, ...]:
    """Return the values as a tuple, the same object for rows with equal values."""
    key = array("d", values).tobytes()
    found = known.get(key)
    if found is None:
        found = tuple(values)
        if len(known) < CHUNK:
            known[key] = found
    return found
