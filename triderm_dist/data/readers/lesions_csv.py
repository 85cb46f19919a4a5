"""Read one table and its photos into checked lesions. The task names the columns and the words in them.

A row is a lesion, with a column of photos per view, or a photo, with a column that holds its view. Photos lie anywhere
below the folder; a cell holds a photo's id, file name or path. Each distinct text of a column is parsed once, so that a
million rows take seconds.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from triderm_dist.data.problems import InvalidLesions, Problem
from triderm_dist.data.readers.cells import is_missing, parse_field, parse_number, parse_score, parsed_texts
from triderm_dist.data.readers.csv_file import NotUtf8
from triderm_dist.data.readers.dataset import Dataset, Spellings, spelled_alike, why_no_lesion_id
from triderm_dist.data.readers.find_photos import MissingPhoto, PhotoFinder, photo_name
from triderm_dist.data.readers.lesion_table import LesionTable, Numbers, agreed, no_groups, no_labels
from triderm_dist.data.readers.table import Table, find_tables, read_header, read_table, without_garbage_collection
from triderm_dist.data.readers.workbook import SeveralSheets
from triderm_dist.data.shards.format import Text
from triderm_dist.schema import (
    UNLABELED,
    DataError,
    Task,
    did_you_mean,
    nearest,
    quoted,
    unsafe_character,
    why_no_id,
)


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
    """Read the label of each lesion from a table with the task's columns of ids and diagnoses. Needs no photos.

    Raises DataError naming the row of an invalid label, or of one that contradicts an earlier row of the lesion.
    """
    table = read_table(path, task.table).named(task_columns(task))
    table.require([task.columns.lesion_id or image_columns(task)[0], *filter(None, [task.columns.diagnosis])])
    reading = _Reading(table, task, PhotoFinder([]))
    reading.read_ids()
    labels: dict[str, int] = {}
    names = reading.names.tolist()
    found = zip((names[code] for code in reading.codes.tolist()), reading.labels().tolist(), strict=True)
    for row, (lesion_id, label) in enumerate(found):
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
    """Return the table to read: `source` itself, or the table in the folder that has the columns of photos.

    Raises DataError if there are none or several.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; give the folder that holds the table and the photos")
    tables = find_tables(source)
    if not tables:
        raise DataError(f"{source}: no table (.csv, .tsv, .txt, .xlsx or .parquet) in this folder")
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
    """Parses the columns of a table of N rows and collects what is wrong with them."""

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
    codes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """(N,) the lesion of each row, numbered in the order in which they appear."""
    names: Text = field(default_factory=lambda: Text(pa.chunked_array([], pa.string())))
    """The id of each lesion."""

    def lesions(self) -> tuple[LesionTable, list[str], list[Problem]]:
        """Return the valid lesions, the notes, and the problems of the other lesions."""
        task = self.task
        self.read_ids()
        rows, images = self._by_lesion()
        labels = self.labels()
        groups = self._groups()
        disagree, metadata = list[tuple[int, int]](), list[Numbers]()
        for number in range(len(task.fields)):
            values, differ = agreed(rows, self._field(number))
            metadata.append(Numbers(values))
            disagree += [(at, number) for at in differ.tolist()]
        scores = [self._scores_of_rows(column, rows) for column in self._concept_columns()]
        concepts = [view[at] for at in range(len(scores[0])) for view in scores] if scores else []
        for at, number in sorted(disagree):
            self._differ(rows[at], task.fields[number].column)
        label, differ = agreed(rows, labels, UNLABELED)
        for at in differ.tolist():
            self._differ(rows[at], task.columns.diagnosis or "diagnosis")
        fine = self._fine(rows, label)
        group, group_names = self._agreed_groups(rows, groups)

        wrong = np.zeros(len(self.names), bool)  # by lesion
        wrong[self.codes[list(self.bad)]] = True
        first = np.where(rows[:, 0] >= 0, rows[:, 0], rows[:, -1])
        code = self.codes[first]
        kept = ~wrong[code]
        absent = np.stack([column < 0 for column in images.values()], 1)
        spellings = Spellings(self.names)
        for at in np.flatnonzero(kept & (absent.all(1) if self.mark_missing else absent.any(1))).tolist():
            lesion_id = self.names[int(code[at])]
            what, hint = self._missing(lesion_id, absent[at]), spellings.hint(lesion_id)
            self._problem(int(first[at]), "missing photo", f"{what}; {hint}" if hint else what)
            kept[at] = False
        table = LesionTable(
            self.names if len(code) == len(self.names) else self.names.kept(code),
            self.photos.paths,
            images,
            concepts,
            metadata,
            label.astype(np.int16),
            fine.astype(np.int16),
            group_names,
            group,
        ).kept(np.flatnonzero(kept))
        return table, self._all_notes(table), self.problems

    @property
    def concepts(self) -> tuple[str, ...]:
        """Names of the concept scores of a lesion."""
        prefix = self.task.concepts.prefix or ""
        return self.task.per_lesion(column[len(prefix) :] for column in self._concept_columns())

    # --- lesions ---

    def read_ids(self) -> None:
        """Set `codes` and `names`; rows with an invalid id become problems."""
        column = self.task.columns.lesion_id
        name = column or image_columns(self.task)[0]
        self.used.add(name)
        self.codes, texts = self.table.encoded(name)
        if not column:
            ids = pa.array(map(photo_name, texts.to_pylist()), pa.string()).dictionary_encode()
            self.codes, texts = ids.indices.to_numpy()[self.codes], ids.dictionary
        self.names = Text(pa.chunked_array([texts]))
        self.notes += spelled_alike(texts, "lesion ids")
        wrong = {code: why for code, lesion_id in enumerate(self.names) if (why := why_no_lesion_id(lesion_id))}
        for row in np.flatnonzero(np.isin(self.codes, list(wrong))).tolist() if wrong else ():
            code = int(self.codes[row])
            what = f"{name} {quoted(self.names[code])} {wrong[code]}"
            what += "" if column else "; name another column by columns.lesion_id in task.yaml, or rename the photo"
            self._problem(row, "row", what)

    def _id(self, row: int) -> str:
        return self.names[int(self.codes[row])]

    def _by_lesion(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the rows of each lesion (L, R), -1 for none, and {view: positions of the photos (L,)}."""
        task = self.task
        images = [self._paths(column) for column in image_columns(task)]
        self.photos.clear()
        own = np.arange(len(self.table), dtype=np.int32)
        if task.row_per_photo:
            view = self._views()
            rows = np.full((len(self.names), len(task.views)), -1, np.int32)
            place = (self.codes.astype(np.int64) * len(task.views) + view)[view >= 0]
            rows.reshape(-1)[place[::-1]] = own[view >= 0][::-1]  # the first row of several is written last
            others = rows.reshape(-1)[place]
            for row, other in zip(
                own[view >= 0][others != own[view >= 0]].tolist(), others[others != own[view >= 0]], strict=True
            ):
                what = f"lesion {self._id(row)} has two {task.view_names[view[row]]} photos, the first in row "
                self._problem(row, "duplicate photo", f"{what}{self.table.numbers[int(other)]}; keep one")
            rows = rows[rows.max(1, initial=-1) >= 0]
            return rows, {
                name: np.where(rows[:, at] >= 0, images[0][rows[:, at]], -1).astype(np.int32)
                for at, name in enumerate(task.view_names)
            }
        if len(self.names) < len(own):
            first = np.empty(len(self.names), np.int32)
            first[self.codes[::-1]] = own[::-1]
            for row in np.flatnonzero(first[self.codes] != own).tolist():
                other = self.table.numbers[int(first[self.codes[row]])]
                what = f"lesion {self._id(row)} occurs twice, first in row {other}; keep one"
                if isinstance(task.columns.image, str) and task.columns.lesion_id:
                    what += ", or make every photo a lesion by columns: {lesion_id: null, group: "
                    what += f"{task.columns.lesion_id}}} in task.yaml"
                self._problem(row, "duplicate lesion", what)
        return own[:, None], dict(zip(task.view_names, images, strict=True))

    def _missing(self, lesion_id: str, absent: np.ndarray) -> str:
        """Return what is wrong with a lesion that lacks photos. absent: (V,) bool by view."""
        if absent.all():
            return f"lesion {lesion_id} has no photo; add one or remove its rows"
        view = self.task.view_names[int(absent.argmax())]
        return f"lesion {lesion_id} has no {view} photo; add it, or allow lesions with one photo by missing_view=mark"

    def _views(self) -> np.ndarray:
        words = {word.lower(): at for at, view in enumerate(self.task.views) for word in (view.name, *view.words)}
        column = self.task.columns.view or ""

        def parse(text: str) -> float:
            if text.lower() not in words:
                raise ValueError(f"unknown {column} {quoted(text)}; known are {', '.join(words)}{_as_words('views')}")
            return words[text.lower()]

        return np.nan_to_num(self._parsed(column, parse, "row"), nan=-1).astype(np.int8)

    def _paths(self, column: str) -> np.ndarray:
        """Return the position of each row's photo (N,), -1 for an empty cell or a file that may be missing."""
        self.used.add(column)
        found = np.full(len(self.table), -1, np.int32)
        wrong: list[tuple[int, str, str]] = []
        words = pa.array(["", *map(str.lower, self.task.missing_words)])
        start = 0
        for (cells,) in self.table.parts(column):
            named = ~pc.is_in(pc.utf8_lower(cells), words).to_numpy(zero_copy_only=False)
            texts = cells.to_pylist()
            own = np.flatnonzero(named)
            places = self.photos.find_all([texts[at] for at in own.tolist()])
            found[start + own] = places
            for at in own[places < 0].tolist():
                cell, row = texts[at], start + at
                try:
                    if character := unsafe_character(cell):
                        raise ValueError(f"{quoted(cell)} holds {character}; correct it")
                    found[row] = self.photos.find(cell, self._id(row))
                except MissingPhoto as error:
                    if not self.mark_missing:
                        wrong.append((row, "missing photo", f"{column}: {error}"))
                except ValueError as error:
                    wrong.append((row, "unreadable photo", f"{column}: {error}"))
            start += len(texts)
        if twice := _repeated(found, len(self.photos.paths)):
            cells = dict(zip(twice, self._cells_of(column, list(twice)), strict=True))
            for row, other in twice.items():
                what = f"photo {cells[row]} occurs twice, first in row {self.table.numbers[other]}; remove one"
                wrong.append((row, "duplicate photo", what))
        for row, kind, what in sorted(wrong):
            self._problem(row, kind, what)
        return found

    def _agreed_groups(self, rows: np.ndarray, groups: tuple[np.ndarray, Text] | None) -> tuple[np.ndarray, Text]:
        """Return the group of each lesion (L,), -1 for none, and the names of groups."""
        if groups is None:
            names, group = no_groups(len(rows))
            return group, names
        group, differ = agreed(rows, groups[0], -1)
        for at in differ.tolist():
            self._differ(rows[at], self.task.columns.group or "")
        return group, groups[1]

    def _differ(self, rows: np.ndarray, column: str) -> None:
        row = int(rows[-1])
        what = f"the photos of lesion {self._id(row)} differ in {column}; all rows need the same"
        self._problem(row, "rows differ", what)

    # --- columns ---

    def _absent(self, column: str) -> str:
        """Return the name of a column that the table lacks, with the most similar unused column, for messages."""
        known = {name.lower() for name in task_columns(self.task)}
        near = nearest(column, (name for name in self.table.header if name.lower() not in known))
        return f"{column!r} (is {near!r} meant?)" if near else repr(column)

    def _cells_of(self, column: str, rows: Sequence[int]) -> list[str]:
        """Return the cells of a few rows, in ascending order."""
        found, start = list[str](), 0
        for (cells,) in self.table.parts(column):
            found += [cells[row - start].as_py() for row in rows if start <= row < start + len(cells)]
            start += len(cells)
        return found

    def _parsed(
        self,
        column: str,
        parse: Callable[[str], float],
        kind: str,
        span: tuple[float, float] | None = None,
        words: Iterable[str] = (),
    ) -> np.ndarray:
        """Parse a column (N,), each distinct text of a part once; NaN and a problem where that raises ValueError.

        span: numbers in this range are parsed at once, without `parse`, unless they are one of `words`.
        """
        self.used.add(column)
        result, start = np.empty(len(self.table)), 0
        missing = [*words, *self.task.missing_words]
        for (cells,) in self.table.parts(column):
            encoded = cells.dictionary_encode()
            values, errors = parsed_texts(encoded.dictionary, parse, span, missing)
            codes = encoded.indices.to_numpy()
            for row in np.flatnonzero(np.isin(codes, list(errors))).tolist() if errors else ():
                self._problem(start + row, kind, errors[int(codes[row])])
            result[start : start + len(codes)] = values[codes]
            start += len(codes)
        return result

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
        """Return the columns of concept scores, in an order that is independent of the table's."""
        concepts = self.task.concepts
        if concepts.prefix:
            prefix = concepts.prefix.lower()
            return sorted((each for each in self.table.cells if each.lower().startswith(prefix)), key=str.lower)
        return list(concepts.names)

    def _scores_of_rows(self, column: str, rows: np.ndarray) -> list[Numbers]:
        """Return the scores of a concept, one column (L,) per row of a lesion."""
        scores = self._scores(column)
        if rows.shape[1] == 1 and not self.task.row_per_photo:
            return [Numbers(scores, rows[:, 0])]
        return [Numbers(scores, own) for own in rows.T]

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

    def labels(self) -> np.ndarray:
        """Return the label of each row (N,), `UNLABELED` for none."""
        task, column = self.task, self.task.columns.diagnosis
        if column is None:
            return self._one_hot()
        self.labeled = column in self.table.cells
        if not self.labeled:
            self.notes.append(f"no column {self._absent(column)}: no lesion has a diagnosis")
            return no_labels(len(self.table))

        def parse(text: str) -> float:
            if is_missing(text, task.missing_words):
                return UNLABELED
            return parse_diagnosis(text, task, column)

        return np.nan_to_num(self._parsed(column, parse, "label"), nan=UNLABELED).astype(np.int16)

    def _fine(self, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the finer label of each lesion (L,), `UNLABELED` for none of the task's.

        A finer label that contradicts the lesion's label (labels, (L,)) is a problem.
        """
        task, fine, none = self.task, self.task.fine, no_labels(len(rows))
        contradictions: list[tuple[int, str]] = []
        if fine is None:
            return none
        if fine.column not in self.table.cells:
            self.notes.append(f"no column {self._absent(fine.column)}: no lesion has a finer label")
            return none
        found = self._parsed(fine.column, fine.label_of, "label").astype(np.int16)
        finer, differ = agreed(rows, found, UNLABELED)
        for at in differ.tolist():
            self._differ(rows[at], fine.column)
        pairs = np.unique(np.stack([labels, finer], 1), axis=0).tolist()
        wrong = {(label, own): why for label, own in pairs if (why := task.fine_contradiction(label, own))}
        for (label, own), why in wrong.items():
            for at in np.flatnonzero((labels == label) & (finer == own)).tolist():
                contradictions.append((at, why))
        for at, why in sorted(contradictions):
            self._problem(int(rows[at].max()), "label", why)
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

        ones, zeros, empty = (np.zeros(len(self.table), np.int16) for _ in range(3))
        labels = no_labels(len(self.table))
        for at, name in enumerate(names):
            values = self._parsed(name, parse, "label")
            labels[values == 1] = at
            ones += values == 1
            zeros += values == 0
            empty += np.isnan(values)
        right = (ones == 1) & (zeros == len(names) - 1)
        for row in np.flatnonzero(~right & (empty < len(names))).tolist():
            what = (
                f"lesion {self._id(row)} needs a single 1 and otherwise 0 over the diagnoses; leave all empty if it is "
            )
            self._problem(row, "label", f"{what}unlabeled")
        return np.where(right, labels, UNLABELED).astype(np.int16)

    def _groups(self) -> tuple[np.ndarray, Text] | None:
        """Return the group of each row (N,), -1 for none, and the names of groups; None without a group column."""
        column = self.task.columns.group
        if column is None:
            return None
        if column not in self.table.cells:
            self.notes.append(f"no column {self._absent(column)}: each lesion is a group of its own")
            return None
        self.used.add(column)
        codes, names = self.table.encoded(column)
        words = pa.array(["", *map(str.lower, self.task.missing_words)])
        missing = pc.is_in(pc.utf8_lower(names), words).to_numpy(zero_copy_only=False)
        texts = Text(pa.chunked_array([names]))
        wrong = {at: why for at, name in enumerate(texts) if not missing[at] and (why := why_no_id(name))}
        for row in np.flatnonzero(np.isin(codes, list(wrong))).tolist() if wrong else ():
            code = int(codes[row])
            self._problem(row, "row", f"{column} {quoted(texts[code])} {wrong[code]}")
        self.notes += spelled_alike(names.filter(pa.array(~missing)), column)
        return np.where(missing[codes], -1, codes).astype(np.int32), texts

    def _problem(self, row: int, kind: str, what: str) -> None:
        self.bad.add(row)
        self.problems.append(Problem(self._id(row), kind, self.table.where(row), what))

    def _all_notes(self, lesions: LesionTable) -> list[str]:
        """Return what was tolerated, with counts."""
        tolerated: Counter[str] = Counter()
        for about, values in zip(self.task.fields, lesions.metadata, strict=True):
            missing = int(np.isnan(values.take(slice(None))).sum())
            tolerated[f"without {about.label}"] += missing if about.column in self.table.cells else 0
        labels = Counter(dict(zip(*map(np.ndarray.tolist, np.unique(lesions.labels, return_counts=True)), strict=True)))
        tolerated["without a diagnosis"] += labels[UNLABELED] if self.labeled else 0
        if len(self.task.views) > 1:
            absent = np.any([column < 0 for column in lesions.images.values()], axis=0).sum()
            tolerated["with one photo, the other view marked missing"] += int(absent)
        notes = [f"{count} of {len(lesions)} lesions {what}" for what, count in tolerated.items() if count]
        if self.labeled and (none := [name for at, name in enumerate(self.task.diagnosis_names) if not labels[at]]):
            notes.append(f"no lesion has the diagnosis {', '.join(none)}")
        if unused := [name for name in self.table.header if name not in self.used]:
            notes.append(f"{self.table.path.name}: columns that are not used: {', '.join(unused)}")
        if others := self.photos.unused:
            notes.append(f"{others} photos are not in {self.table.path.name}")
        return notes + self.notes


def parse_diagnosis(text: str, task: Task, column: str) -> int:
    """Return the label that a text names. Raises ValueError, with the nearest word, for an unknown one."""
    label = task.label_of(text)
    if label is not None:
        return label
    hint = did_you_mean(text.lower(), task.label_words)
    raise ValueError(f"unknown {column} {quoted(text)}; {hint}{_as_words('diagnoses')}")


def _as_words(key: str) -> str:
    return f" Correct it, or add it to the words of one of the {key} in task.yaml"


def _repeated(found: np.ndarray, photos: int) -> dict[int, int]:
    """Return {row: first row that names the same photo} of rows that repeat a photo.

    found: (N,) position of each row's photo, -1 for none.  photos: number of all photos.
    """
    rows = np.flatnonzero(found >= 0)
    if len(rows) == 0:
        return {}
    first = np.full(photos, -1, np.int32)
    first[found[rows][::-1]] = rows[::-1]
    later = rows[first[found[rows]] != rows]
    return dict(zip(later.tolist(), first[found[later]].tolist(), strict=True))
