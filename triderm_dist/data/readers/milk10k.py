"""Read a MILK10k challenge folder into checked lesions. Validates every row; does not read pixels.

An invalid table is refused at once. Problems of single lesions are collected over the whole folder, so that one run
lists all of them; then the folder is refused, or these lesions are dropped.

Supported layouts, by the names of their tables (any case; in the folder itself, or one folder below it):

    MILK10k_Training_Metadata.csv, MILK10k_Training_GroundTruth.csv, MILK10k_Training_Input/LESION/PHOTO.jpg
    MILK10k_Test_Metadata.csv, MILK10k_Test_Input/LESION/PHOTO.jpg          (labels are not needed)
    supplements/training_input.csv, supplements/training_gt.csv, images/PHOTO.jpg      (zip of the ISIC Archive)
    metadata.csv, images/PHOTO.jpg

Photos are found by name at any depth below `*_Input` or `images`, so a folder may be nested twice. Tables may have any
delimiter and encoding that `table` reads. The supplement holds label information and is never read.

Diagnoses, fields, and the words of views and missing values are those of the task; the names of the other columns are
the challenge's.
"""

from __future__ import annotations

import math
import os
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from triderm_dist.data.problems import InvalidLesions, Problem
from triderm_dist.data.readers.cells import is_missing, parse_field, parse_number, parse_score, parsed_texts
from triderm_dist.data.readers.dataset import Dataset, Spellings, spelled_alike, why_no_lesion_id
from triderm_dist.data.readers.find_photos import MissingPhoto, PhotoFinder
from triderm_dist.data.readers.lesion_table import LesionTable, Numbers, agreed, no_groups, no_labels
from triderm_dist.data.readers.table import Table, find_tables, read_header, read_table, without_garbage_collection
from triderm_dist.data.shards.format import Text
from triderm_dist.schema import UNLABELED, VIEWS, DataError, MetadataField, Task, quoted, why_no_id
from triderm_dist.tasks import load_task, milk10k_task

CONCEPT_PREFIX = "MONET_"
MONET_COLUMNS: tuple[str, ...] = (
    "MONET_ulceration_crust",
    "MONET_hair",
    "MONET_vasculature_vessels",
    "MONET_erythema",
    "MONET_pigmented",
    "MONET_gel_water_drop_fluid_dermoscopy_liquid",
    "MONET_skin_markings_pen_ink_purple_pen",
)
"""Concept scores that the challenge publishes for each photo, hence once per view of a lesion."""
CONCEPTS: tuple[str, ...] = tuple(
    f"{view}/{column.removeprefix(CONCEPT_PREFIX)}" for view in VIEWS for column in MONET_COLUMNS
)
"""Names of the challenge's concepts."""
GROUP_COLUMN = "patient_id"

UNUSED_COLUMNS = {"attribution", "copyright_license", "image_manipulation"}
"""Columns of the official metadata that are left out without a note."""
_TABLE_NAME = re.compile(
    r"^(?:(?P<prefix>.*)_)?(?P<kind>metadata|input|groundtruth|gt)\.(csv|tsv|txt|xlsx|parquet)$", re.IGNORECASE
)


@dataclass(frozen=True)
class _Row:
    """One row of a table. where: file and row, for messages."""

    where: str
    cells: dict[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells[column]


class _Invalid(Exception):
    """A lesion is invalid; see `Problem`."""

    def __init__(self, lesion_id: str, kind: str, where: str, what: str) -> None:
        super().__init__(what)
        self.problem = Problem(lesion_id, kind, where, what)


@dataclass(frozen=True)
class _Photo:
    row: _Row
    path: str | None


def read_challenge(
    folder: str | os.PathLike[str],
    task: Task | None = None,
    missing_view: Literal["refuse", "mark"] = "refuse",
    invalid: Literal["refuse", "drop"] = "refuse",
) -> Dataset:
    """Read the lesions of a challenge folder, or those of a metadata table where the folder holds several.

    missing_view="mark" keeps lesions with one photo: the other view's path is None and, where the table has no row for
    it, its scores are NaN. invalid="drop" drops lesions with an invalid row.
    Raises InvalidLesions with all problems, its text naming file and row of the first one; DataError for a folder or
    table that cannot be read at all.
    """
    task = task or milk10k_task()
    metadata_path, truth_path, photo_roots = find_parts(Path(folder))
    # Fields that a plugin or another task adds may be missing.
    required = ("lesion_id", "isic_id", "image_type", *(field.column for field in load_task("milk10k").fields))
    known = (*required, GROUP_COLUMN, *(field.column for field in task.fields))
    table = read_table(metadata_path, task.table).named((*required, *known, *MONET_COLUMNS))
    table.require(required)
    columns = table.header
    scores = [column for column in columns if column.startswith(CONCEPT_PREFIX)]
    # A network takes concepts by position: one order, whatever the order in the table.
    scores.sort(key=lambda column: MONET_COLUMNS.index(column) if column in MONET_COLUMNS else len(MONET_COLUMNS))
    if not scores:
        raise DataError(f"{metadata_path}: no column starts with {CONCEPT_PREFIX}; the concept scores belong here")
    if not len(table):
        raise DataError(f"{metadata_path}: the table has no rows")

    problems: list[Problem] = []
    with without_garbage_collection():
        reading = _Reading(table, task, scores, missing_view == "mark")
        truth = _Labels(truth_path, task) if truth_path else None
        labels, others = truth.match(reading.names) if truth else (no_labels(len(reading.names)), [])
        find_photo = PhotoFinder(photo_roots)
        if truth and not truth.problems and not others:
            truth = None
        reading.find_photos(find_photo)
        find_photo.clear()
        finer = _read_fine(metadata_path, task)
        lesions = reading.columns(labels, finer, find_photo)

        # The rows of each lesion with anything unusual are read again one by one, to say what is wrong with them.
        unusual = {} if not reading.unusual.any() else reading.again(find_photo, missing_view, problems.append)
        problems += truth.problems if truth else []
        grouped = GROUP_COLUMN in columns
        spellings = Spellings(reading.names)
        bad = {problem.lesion_id for problem in problems}
        for lesion_id, photos in unusual.items():
            if lesion_id in bad:
                continue
            try:
                _check_views(lesion_id, photos, missing_view)
                label = int(labels[reading.code_of(photos)])
                _check_lesion(lesion_id, photos, label, task, grouped, finer)
            except _Invalid as error:
                hint = spellings.hint(lesion_id) if error.problem.kind == "missing photo" else ""
                problems.append(replace(error.problem, what=f"{error.problem.what}; {hint}") if hint else error.problem)
        bad = {problem.lesion_id for problem in problems}
        find_photo.clear()
    concepts = tuple(f"{view}/{column.removeprefix(CONCEPT_PREFIX)}" for view in VIEWS for column in scores)
    if bad:
        lesions = lesions.kept(np.array([at for at, name in enumerate(reading.names) if name not in bad], np.int64))
    notes = _notes(lesions, task, labeled=truth_path is not None)
    notes += spelled_alike(reading.names.column, "lesion ids")
    notes += spelled_alike(lesions.distinct_groups()[1], GROUP_COLUMN) if grouped else []
    if unused := [name for name in columns if name not in {*known, *scores} and name.lower() not in UNUSED_COLUMNS]:
        notes.append(f"{metadata_path.name}: columns that are not used: {', '.join(unused)}")
    if truth and others:
        problems += _unmatched(others, truth.where, reading.names, metadata_path.name)
    if find_photo.unused:
        notes.append(f"{find_photo.unused} photos are not in {metadata_path.name}")
    if problems and invalid == "refuse":
        raise InvalidLesions(problems, reading.lesions + len(others))
    return Dataset(task, lesions, concepts, truth_path is not None, notes, tuple(problems), str(_folder(Path(folder))))


class _Reading:
    """The metadata table in columns, and which lesions have anything unusual in their rows.

    names: the id of each lesion, in the order in which they appear.  codes: (N,) lesion of each row.  lesions: the
    number of those with an id that is allowed.  unusual: (L,) bool.
    """

    def __init__(self, table: Table, task: Task, scores: Sequence[str], mark_missing: bool) -> None:
        self.table, self.task, self.scores, self.mark_missing = table, task, scores, mark_missing
        self.codes, names = table.encoded("lesion_id")
        self.names = Text(pa.chunked_array([names]))
        self.unusual = np.array([why_no_lesion_id(name) is not None for name in self.names], bool)
        self.lesions = len(self.names) - int(self.unusual.sum())
        self.places = np.full(len(table), -1, np.int32)
        self._rows_of: dict[str, int] = {}

    def _is_unusual(self, rows: np.ndarray) -> None:
        """Mark the lesions of these rows."""
        self.unusual[self.codes[rows]] = True

    def find_photos(self, find_photo: PhotoFinder) -> None:
        """Set `places`: the position of the photo of each row (N,), -1 where there is none."""
        start = 0
        missing = array("q")
        for (cells,) in self.table.parts("isic_id"):
            ids = cells.to_pylist()
            found = find_photo.find_all(ids)
            wrong = [at for at, isic_id in enumerate(ids) if why_no_id(isic_id)]
            for at in np.flatnonzero(found < 0).tolist():
                missing.append(hash(ids[at]))
                try:
                    found[at] = find_photo.find(ids[at], self.names[int(self.codes[start + at])])
                except MissingPhoto:
                    if not self.mark_missing:
                        wrong.append(at)
                except ValueError:
                    wrong.append(at)
            self.places[start : start + len(ids)] = found
            self._is_unusual(start + np.array(wrong, int))
            start += len(ids)
        found = self.places[self.places >= 0]
        counts = np.bincount(found, minlength=1)
        self._is_unusual(np.flatnonzero((self.places >= 0) & (counts[np.maximum(self.places, 0)] > 1)))
        hashes, counts = np.unique(
            np.frombuffer(missing, np.int64) if missing else np.empty(0, int), return_counts=True
        )
        if (counts > 1).any():  # of rows without a photo
            twice, start = set(hashes[counts > 1].tolist()), 0
            for (cells,) in self.table.parts("isic_id"):
                self._is_unusual(start + np.flatnonzero([hash(cell) in twice for cell in cells.to_pylist()]))
                start += len(cells)

    def columns(self, labels: np.ndarray, finer: Mapping[str, int], find_photo: PhotoFinder) -> LesionTable:
        """Return all lesions; those that are `unusual` may be wrong."""
        task, lesions = self.task, len(self.names)
        words = {word.lower(): VIEWS.index(view.name) for view in task.views for word in view.words}
        view = self._parsed("image_type", lambda text: words[text.lower()], np.int8, -1)
        rows = np.full((lesions, len(VIEWS)), -1, np.int32)
        own = np.flatnonzero(view >= 0).astype(np.int32)
        place = self.codes[own].astype(np.int64) * len(VIEWS) + view[own]
        rows.reshape(-1)[place] = own
        self._is_unusual(own[rows.reshape(-1)[place] != own])
        images = {name: np.where(each >= 0, self.places[each], -1) for name, each in zip(VIEWS, rows.T, strict=True)}
        absent = np.stack([column < 0 for column in images.values()], 1)
        self.unusual |= absent.all(1) if self.mark_missing else absent.any(1)

        concepts: list[list[Numbers]] = [[] for _ in VIEWS]
        for column in self.scores:
            parse = partial(parse_score, column, words=task.missing_words)
            values = self._parsed(column, parse, span=(0.0, 1.0))
            for part, each in zip(concepts, rows.T, strict=True):
                part.append(Numbers(values, each))
        metadata = []
        for about in task.fields:
            if about.column in self.table.cells:
                parse = partial(parse_field, about, words=task.missing_words)
                values = self._parsed(about.column, parse, span=(about.low, about.high) if about.is_number else None)
                metadata.append(Numbers(self._agreed(rows, values, np.nan)))
            else:
                metadata.append(Numbers(np.full(lesions, np.nan)))
        names, group = no_groups(lesions)
        if GROUP_COLUMN in self.table.cells:
            codes, texts = self.table.encoded(GROUP_COLUMN)
            names = Text(pa.chunked_array([texts]))
            missing = np.array([is_missing(name, task.missing_words) for name in names], bool)
            wrong = np.array([bool(why_no_id(name)) for name in names], bool) & ~missing
            self._is_unusual(np.flatnonzero(wrong[codes]))
            group = self._agreed(rows, np.where(missing[codes], -1, codes).astype(np.int32), -1)
        fine = no_labels(lesions)
        if finer:
            ids = (isic_id for (cells,) in self.table.parts("isic_id") for isic_id in cells.to_pylist())
            of_rows = np.fromiter((finer.get(isic_id, UNLABELED) for isic_id in ids), np.int16, len(self.table))
            fine, differ = agreed(rows, of_rows, UNLABELED)
            fine[differ] = UNLABELED
            for label, number in np.unique(np.stack([labels, fine], 1), axis=0).tolist():
                if task.fine_contradiction(label, number):
                    self.unusual |= (labels == label) & (fine == number)
        return LesionTable(
            self.names, find_photo.paths, images, [*chain(*concepts)], metadata, labels, fine, names, group
        )

    def _agreed(self, rows: np.ndarray, values: np.ndarray, none: float) -> np.ndarray:
        found, differ = agreed(rows, values, none)
        self.unusual[differ] = True
        return found

    def _parsed(
        self,
        column: str,
        parse: Callable[[str], float],
        dtype: Any = np.float64,
        none: float = np.nan,
        span: tuple[float, float] | None = None,
    ) -> np.ndarray:
        """Parse a column (N,), each different text of a part once; `none` where that raises, which is unusual.

        span: numbers in it are taken as they are, unless they are one of the task's words for missing values.
        """
        result, start = np.empty(len(self.table), dtype), 0
        for (cells,) in self.table.parts(column):
            encoded = cells.dictionary_encode()
            values, wrong = parsed_texts(encoded.dictionary, parse, span, self.task.missing_words)
            codes = encoded.indices.to_numpy()
            result[start : start + len(codes)] = np.where(np.isnan(values), none, values)[codes]
            if wrong:
                self._is_unusual(start + np.flatnonzero(np.isin(codes, list(wrong))))
            start += len(codes)
        return result

    def again(
        self, find_photo: PhotoFinder, missing_view: str, on_problem: Callable[[Problem], object]
    ) -> dict[str, dict[str, _Photo]]:
        """Return the photos by view of the unusual lesions, as `_group_views`."""
        chosen = self.unusual[self.codes]
        find_photo.unused += int((self.places[chosen] >= 0).sum())  # they are looked for again
        rows = [_Row(where, cells) for where, cells in self.table.rows(chosen)]
        self._rows_of = dict(zip((row.where for row in rows), np.flatnonzero(chosen).tolist(), strict=True))
        return _group_views(rows, list(self.scores), find_photo, self.task, missing_view, on_problem)

    def code_of(self, photos: Mapping[str, _Photo]) -> int:
        """Return the number of the lesion with these photos, of those that were read `again`."""
        return int(self.codes[self._rows_of[next(iter(photos.values())).row.where]])


class _Labels:
    """The labels of a one-hot table; a row whose cells are all empty is unlabeled.

    codes, names: of the lesions of its rows.  labels: (N,).  valid: (N,) bool.  problems: of the other rows.
    """

    def __init__(self, path: Path, task: Task) -> None:
        diagnoses = task.diagnosis_names
        self.table = read_table(path, task.table).named(("lesion_id", *diagnoses))
        self.table.require(("lesion_id", *diagnoses))
        if unknown := [name for name in self.table.header if name not in diagnoses and name != "lesion_id"]:
            raise DataError(f"{path}: unknown diagnosis {unknown[0]!r} in the header; known are {', '.join(diagnoses)}")
        self.codes, self.names = self.table.encoded("lesion_id")
        self.problems: list[Problem] = []
        self.labels, ones, zeros, empty = (np.zeros(len(self.table), np.int16) for _ in range(4))
        for label, name in enumerate(diagnoses):
            start = 0
            for (cells,) in self.table.parts(name):
                encoded = cells.dictionary_encode()
                texts, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
                values = np.array([_truth(text) for text in texts], np.float64)[codes]
                part = slice(start, start + len(codes))
                self.labels[part][values == 1] = label
                ones[part] += values == 1
                zeros[part] += values == 0
                empty[part] += np.array([is_missing(text, task.missing_words) for text in texts])[codes]
                start += len(codes)
        self.labels[empty == len(diagnoses)] = UNLABELED
        usual = (empty == len(diagnoses)) | ((ones == 1) & (zeros == len(diagnoses) - 1))
        wrong = np.array([why_no_lesion_id(name) is not None for name in self.names.to_pylist()], bool)
        wrong |= np.bincount(self.codes, minlength=len(wrong)) > 1
        usual &= ~wrong[self.codes]
        self.valid = usual.copy()
        first: dict[str, str] = {}
        for row, (where, cells) in zip(np.flatnonzero(~usual).tolist(), self.table.rows(~usual), strict=True):
            try:
                lesion_id = _lesion_id(_Row(where, cells))
                if lesion_id in first:
                    what = f"lesion {lesion_id} occurs twice, first in {first[lesion_id]}; remove one"
                    raise _Invalid(lesion_id, "duplicate label", where, what)
                first[lesion_id] = where
                self.labels[row] = _label(lesion_id, _Row(where, cells), task)
                self.valid[row] = True
            except _Invalid as error:
                self.problems.append(error.problem)

    def match(self, names: Text) -> tuple[np.ndarray, list[str]]:
        """Return the label of each of these lesions (L,), `UNLABELED` without one, and the other lesions with one."""
        found = pc.index_in(self.names, names.column).fill_null(-1).to_numpy(zero_copy_only=False)[self.codes]
        labels = no_labels(len(names))
        known = self.valid & (found >= 0)
        labels[found[known]] = self.labels[known]
        others = self.names.take(pa.array(self.codes[self.valid & (found < 0)])).to_pylist()
        return labels, others

    @property
    def where(self) -> Callable[[str], str]:
        """Return the file and row of a lesion."""
        names = self.names.to_pylist()
        rows = {names[code]: row for row, code in reversed([*enumerate(self.codes.tolist())])}
        return lambda lesion_id: self.table.where(rows[lesion_id])


def _check_lesion(
    lesion_id: str, photos: dict[str, _Photo], label: int, task: Task, grouped: bool, finer: Mapping[str, int]
) -> None:
    """Raise _Invalid for contradictions within a lesion. finer: the finer label by photo, of those that have one."""
    own = {finer[photo.row["isic_id"]] for photo in photos.values() if photo.row["isic_id"] in finer}
    fine = own.pop() if len(own) == 1 else UNLABELED  # as that of no photo where they differ
    if wrong := task.fine_contradiction(label, fine):
        raise _Invalid(lesion_id, "label", next(iter(photos.values())).row.where, f"lesion {lesion_id}: {wrong}")
    rows = [photo.row for photo in photos.values()]
    for field in task.fields:
        _check_agreed(lesion_id, field, rows, task.missing_words)
    if grouped:
        _check_group(lesion_id, rows, task.missing_words)


def _read_fine(metadata: Path, task: Task) -> dict[str, int]:
    """Return the number of the finer label of each photo that has one, from the supplement next to the metadata."""
    if task.fine is None:
        return {}
    found = {}
    for path in find_tables(metadata.parent):
        if path.stem.lower().endswith("supplement"):
            columns = ("isic_id", task.fine.column)
            table = read_table(path, task.table).named(columns)
            table.require(columns)
            for ids, words in table.parts(*columns):
                for isic_id, word in zip(ids.to_pylist(), words.to_pylist(), strict=True):
                    if (number := task.fine.label_of(word)) != UNLABELED:
                        found[isic_id] = number
    return found


def _notes(lesions: LesionTable, task: Task, labeled: bool) -> list[str]:
    """Return what was tolerated, with counts."""
    one_photo = np.any([column < 0 for column in lesions.images.values()], axis=0)
    tolerated: Counter[str] = Counter({"with one photo, the other view marked missing": int(one_photo.sum())})
    for field, column in zip(task.fields, lesions.metadata, strict=True):
        tolerated[f"without {field.label}"] += int(np.isnan(column.take(slice(None))).sum())
    tolerated["without a diagnosis"] += int((lesions.labels == UNLABELED).sum()) if labeled else 0
    return [f"{count} of {len(lesions)} lesions {what}" for what, count in tolerated.items() if count]


# --- tables ----------------------------------------------------------------------------------------------------------


def has_layout(folder: Path) -> bool:
    """Return whether a folder has a metadata table of the challenge, known by its name or its columns."""
    named = [(path, match) for path in find_tables(folder) if (match := _TABLE_NAME.match(path.name))]
    return any(_is_metadata(path) for path, match in named if match["kind"].lower() in ("metadata", "input"))


def _is_metadata(path: Path) -> bool:
    if path.name.lower().startswith("milk10k"):
        return True
    try:
        header = [name.lower() for name in read_header(path)]
    except DataError:
        return False
    return "isic_id" in header and any(name.startswith(CONCEPT_PREFIX.lower()) for name in header)


def inputs(source: Path, task: Task) -> list[Path]:
    """Return the tables and the folders of photos."""
    metadata, truth, photos = find_parts(source)
    return [metadata, *filter(None, [truth]), *photos]


def _folder(source: Path) -> Path:
    return source.parent if source.is_file() else source


def find_parts(source: Path) -> tuple[Path, Path | None, list[Path]]:
    """Find (metadata, ground truth or None, folders of photos) of a folder or of a metadata table.

    Raises DataError where there is none, or several to choose from.
    """
    folder = _folder(source)
    if not folder.is_dir():
        raise DataError(f"{source}: no such folder; give the folder that holds the challenge's tables and photos")
    tables = find_tables(folder)
    metadata: dict[Path, str] = {}
    truths: dict[Path, str] = {}
    for path in tables:
        if match := _TABLE_NAME.match(path.name):
            prefix = (match["prefix"] or "").lower()
            (metadata if match["kind"].lower() in ("metadata", "input") else truths)[path] = prefix

    if source.is_file():
        if source not in metadata:
            raise DataError(f"{source}: not named as a metadata table; give the folder or its *_Metadata.csv")
        chosen = source
    else:
        if not metadata:
            raise DataError(f"{folder}: no *_Metadata.csv, *_input.csv or metadata.csv; give a challenge folder")
        # The Archive's own metadata.csv lacks scores and skin tone; its supplement has them.
        prefixed = {path: prefix for path, prefix in metadata.items() if prefix} or metadata
        if len(prefixed) > 1:
            names = " and ".join(str(path.relative_to(folder)) for path in prefixed)
            first = next(iter(prefixed))
            raise DataError(f"{folder}: holds {names}; give the one to read, such as source={first}")
        chosen = next(iter(prefixed))

    prefix = metadata[chosen]
    partners = [path for path, other in truths.items() if other == prefix or not prefix]
    if len(partners) > 1:
        raise DataError(f"{folder}: several ground truths ({', '.join(path.name for path in partners)}); keep one")
    if not partners and prefix.endswith(("training", "train")):
        raise DataError(
            f"{chosen}: no ground truth in its folder; put {chosen.name.rpartition('_')[0]}_GroundTruth.csv there"
        )
    return chosen, partners[0] if partners else None, _photo_roots(folder, chosen.parent, f"{prefix}_input")


def read_labels(path: Path, task: Task | None = None) -> dict[str, int]:
    """Read the label of each lesion from a one-hot table; a row whose cells are all empty is unlabeled.

    Raises DataError for an invalid row.
    """
    truth = _Labels(path, task or milk10k_task())
    if truth.problems:
        raise DataError(str(truth.problems[0]))
    return dict(zip(truth.names.take(pa.array(truth.codes)).to_pylist(), truth.labels.tolist(), strict=True))


def _unmatched(
    labels: Iterable[str], where: Callable[[str], str], lesions: Sequence[str], table: str
) -> Iterator[Problem]:
    """Yield the problem of each label whose lesion the table lacks, with the nearest spelling."""
    spellings = Spellings(lesions)
    for lesion_id in labels:
        hint = spellings.hint(lesion_id, "add its rows, or remove its label")
        yield Problem(
            lesion_id, "label without a lesion", where(lesion_id), f"lesion {lesion_id} is not in {table}; {hint}"
        )


def _label(lesion_id: str, row: _Row, task: Task) -> int:
    cells = [row[name] for name in task.diagnosis_names]
    if all(is_missing(cell, task.missing_words) for cell in cells):
        return UNLABELED
    values = [_truth(cell) for cell in cells]
    if values.count(1.0) != 1 or values.count(0.0) != len(cells) - 1:
        what = (
            f"lesion {lesion_id} needs a single 1 and otherwise 0 over the diagnoses, "
            f"not {quoted(','.join(cells))}; leave all empty if it is unlabeled"
        )
        raise _Invalid(lesion_id, "label", row.where, what)
    return values.index(1.0)


def _truth(cell: str) -> float | None:
    return {"true": 1.0, "false": 0.0}.get(cell.lower(), parse_number(cell))


# --- rows of one lesion ----------------------------------------------------------------------------------------------


def _group_views(
    rows: list[_Row],
    scores: list[str],
    find_photo: PhotoFinder,
    task: Task,
    missing_view: str,
    on_problem: Callable[[Problem], object],
) -> dict[str, dict[str, _Photo]]:
    """Return {lesion id: {view: photo}}. Checks each row separately and calls `on_problem` with what is wrong."""
    views: dict[str, dict[str, _Photo]] = defaultdict(dict)
    owner: dict[str, str] = {}
    words = {word.lower(): view.name for view in task.views for word in view.words}
    for row in rows:
        try:
            lesion_id = _lesion_id(row)
            photos = views[lesion_id]
            view = _view(lesion_id, row, photos, words)
            # Registered before its checks, so that the row of the other photo is not blamed for a missing view.
            photos[view] = _Photo(row, None)
            isic_id = row["isic_id"]
            if not isic_id:
                raise _Invalid(lesion_id, "row", row.where, "isic_id is empty; it names the photo")
            if wrong := why_no_id(isic_id):
                raise _Invalid(lesion_id, "row", row.where, f"isic_id {quoted(isic_id)} {wrong}")
            if isic_id in owner:
                what = f"photo {isic_id} occurs twice, first in {owner[isic_id]}; remove one"
                raise _Invalid(lesion_id, "duplicate photo", row.where, what)
            owner[isic_id] = row.where
            photos[view] = _Photo(row, _find_photo(lesion_id, row, find_photo, missing_view))
            for column in scores:
                _check_score(lesion_id, row, column, task.missing_words)
        except _Invalid as error:
            on_problem(error.problem)
    return views


def _find_photo(lesion_id: str, row: _Row, find_photo: PhotoFinder, missing_view: str) -> str | None:
    """Return the path of a row's photo, None where it is missing and that is allowed."""
    isic_id = row["isic_id"]
    try:
        return find_photo(isic_id, lesion_id)
    except MissingPhoto:
        if missing_view == "mark":
            return None
        what = (
            f"no photo {isic_id}.jpg of lesion {lesion_id} below {find_photo.where}; "
            "put it there, or allow lesions with one photo by missing_view=mark"
        )
        raise _Invalid(lesion_id, "missing photo", row.where, what) from None
    except ValueError as error:
        raise _Invalid(lesion_id, "unreadable photo", row.where, str(error)) from None


def _view(lesion_id: str, row: _Row, photos: dict[str, _Photo], words: Mapping[str, str]) -> str:
    kind = row["image_type"]
    view = words.get(kind.lower())
    if view is None:
        what = f"unknown image_type {quoted(kind)}; known are {', '.join(words)}"
        raise _Invalid(lesion_id, "row", row.where, what)
    if view in photos:
        what = f"lesion {lesion_id} has two {view} photos, the first in {photos[view].row.where}; keep one"
        raise _Invalid(lesion_id, "duplicate photo", row.where, what)
    return view


def _check_views(lesion_id: str, photos: dict[str, _Photo], missing_view: str) -> None:
    where = next(iter(photos.values())).row.where
    if len(photos) < len(VIEWS) and missing_view == "refuse":
        absent = next(view for view in VIEWS if view not in photos)
        what = (
            f"lesion {lesion_id} has one photo only, no {absent} one; "
            "add its row, or allow lesions with one photo by missing_view=mark"
        )
        raise _Invalid(lesion_id, "missing photo", where, what)
    if all(photo.path is None for photo in photos.values()):
        what = f"lesion {lesion_id} has no photo at all; add one or remove its rows"
        raise _Invalid(lesion_id, "missing photo", where, what)


def _check_agreed(lesion_id: str, field: MetadataField, rows: list[_Row], missing_words: Sequence[str]) -> None:
    """Raise _Invalid where the rows of a lesion that have a metadata field do not agree on it."""
    values = {value for row in rows if not math.isnan(value := _field(lesion_id, row, field, missing_words))}
    if len(values) > 1:
        what = (
            f"the photos of lesion {lesion_id} differ in {field.column} "
            f"({' and '.join(row[field.column] for row in rows)}); both rows need the same"
        )
        raise _Invalid(lesion_id, "rows differ", rows[-1].where, what)


def _check_group(lesion_id: str, rows: list[_Row], missing_words: Sequence[str]) -> None:
    """Raise _Invalid for a group that cannot be one, and for rows of a lesion with different ones."""
    groups = {row[GROUP_COLUMN] for row in rows if not is_missing(row[GROUP_COLUMN], missing_words)}
    for group in groups:
        if wrong := why_no_id(group):
            raise _Invalid(lesion_id, "row", rows[-1].where, f"{GROUP_COLUMN} {quoted(group)} {wrong}")
    if len(groups) > 1:
        what = f"lesion {lesion_id} belongs to {len(groups)} patients in {GROUP_COLUMN}; all rows need the same"
        raise _Invalid(lesion_id, "rows differ", rows[-1].where, what)


# --- cells -----------------------------------------------------------------------------------------------------------


def _lesion_id(row: _Row) -> str:
    lesion_id = row["lesion_id"]
    if wrong := why_no_lesion_id(lesion_id):
        raise _Invalid(lesion_id, "row", row.where, f"lesion_id {quoted(lesion_id)} {wrong}")
    return lesion_id


def _field(lesion_id: str, row: _Row, field: MetadataField, missing_words: Sequence[str]) -> float:
    try:
        return parse_field(field, row.cells.get(field.column, ""), missing_words)
    except ValueError as error:
        raise _Invalid(lesion_id, "cell", row.where, f"{error}; correct it, or leave it empty if unknown") from None


def _check_score(lesion_id: str, row: _Row, column: str, missing_words: Sequence[str]) -> None:
    try:
        parse_score(column, row[column], missing_words)
    except ValueError as error:
        raise _Invalid(lesion_id, "cell", row.where, f"{error}; leave it empty if unknown") from None


# --- photos ----------------------------------------------------------------------------------------------------------


def _photo_roots(folder: Path, tables: Path, own_name: str) -> list[Path]:
    """Return the folders of photos: the one named like the table, else all of a known name, else the folder itself."""
    if tables.name.lower() == "supplements":
        tables = tables.parent
    candidates = sorted({path for parent in (folder, tables) for path in parent.iterdir() if path.is_dir()})
    own = [path for path in candidates if path.name.lower() == own_name]
    known = [path for path in candidates if path.name.lower().endswith(("_input", "images"))]
    return own or known or [tables]
