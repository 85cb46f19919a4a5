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
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from triderm_dist.data.problems import InvalidLesions, Problem
from triderm_dist.data.readers.dataset import Dataset, Spellings, spelled_alike, why_no_lesion_id
from triderm_dist.data.readers.find_photos import MissingPhoto, PhotoFinder
from triderm_dist.data.readers.table import (
    find_tables,
    is_missing,
    parse_field,
    parse_number,
    parse_score,
    read_header,
    read_table,
)
from triderm_dist.schema import UNLABELED, VIEWS, DataError, Lesion, MetadataField, Task, quoted, why_no_id
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
    r"^(?:(?P<prefix>.*)_)?(?P<kind>metadata|input|groundtruth|gt)\.(csv|tsv|txt|xlsx)$", re.IGNORECASE
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
    scores: tuple[float, ...]


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
    columns, rows = _read_table(metadata_path, task, required, known)
    scores = [column for column in columns if column.startswith(CONCEPT_PREFIX)]
    # A network takes concepts by position: one order, whatever the order in the table.
    scores.sort(key=lambda column: MONET_COLUMNS.index(column) if column in MONET_COLUMNS else len(MONET_COLUMNS))
    if not scores:
        raise DataError(f"{metadata_path}: no column starts with {CONCEPT_PREFIX}; the concept scores belong here")
    if not rows:
        raise DataError(f"{metadata_path}: the table has no rows")

    problems: list[Problem] = []
    find_photo = PhotoFinder(photo_roots)
    views = _group_views(rows, scores, find_photo, task, missing_view, problems.append)
    labels, truth_rows = _read_labels(truth_path, task, problems.append) if truth_path else ({}, {})
    grouped = GROUP_COLUMN in columns
    finer = _read_fine(metadata_path, task)

    lesions, spellings = [], Spellings(views)
    bad = {problem.lesion_id for problem in problems}
    for lesion_id, photos in views.items():
        label = labels.pop(lesion_id, UNLABELED)
        if lesion_id in bad:
            continue
        try:
            _check_views(lesion_id, photos, missing_view)
            lesions.append(_lesion(lesion_id, photos, label, len(scores), task, grouped, finer))
        except _Invalid as error:
            hint = spellings.hint(lesion_id) if error.problem.kind == "missing photo" else ""
            problems.append(replace(error.problem, what=f"{error.problem.what}; {hint}") if hint else error.problem)
    concepts = tuple(f"{view}/{column.removeprefix(CONCEPT_PREFIX)}" for view in VIEWS for column in scores)
    notes = _notes(lesions, task, labeled=truth_path is not None)
    notes += spelled_alike(views, "lesion ids")
    notes += spelled_alike((lesion.group for lesion in lesions), GROUP_COLUMN) if grouped else []
    if unused := [name for name in columns if name not in {*known, *scores} and name.lower() not in UNUSED_COLUMNS]:
        notes.append(f"{metadata_path.name}: columns that are not used: {', '.join(unused)}")
    if truth_path and labels:
        problems += _unmatched(labels, truth_rows, views, metadata_path.name)
    if others := find_photo.unused:
        notes.append(f"{others} photos are not in {metadata_path.name}")
    if problems and invalid == "refuse":
        raise InvalidLesions(problems, len(views) + len(labels))
    return Dataset(task, lesions, concepts, truth_path is not None, notes, tuple(problems), str(_folder(Path(folder))))


def _lesion(
    lesion_id: str,
    photos: dict[str, _Photo],
    label: int,
    scores: int,
    task: Task,
    grouped: bool,
    finer: Mapping[str, int],
) -> Lesion:
    """Check and build a lesion. finer: the finer label by photo, of those that have one."""
    own = {finer[photo.row["isic_id"]] for photo in photos.values() if photo.row["isic_id"] in finer}
    fine = own.pop() if len(own) == 1 else UNLABELED  # as that of no photo where they differ
    if wrong := task.fine_contradiction(label, fine):
        raise _Invalid(lesion_id, "label", next(iter(photos.values())).row.where, f"lesion {lesion_id}: {wrong}")
    rows = [photo.row for photo in photos.values()]
    missing = (math.nan,) * scores
    return Lesion(
        lesion_id=lesion_id,
        images={view: photos[view].path if view in photos else None for view in VIEWS},
        concepts=tuple(score for view in VIEWS for score in (photos[view].scores if view in photos else missing)),
        metadata=tuple(_agreed(lesion_id, field, rows, task.missing_words) for field in task.fields),
        label=label,
        group=_group(lesion_id, rows, task.missing_words) if grouped else lesion_id,
        fine=fine,
    )


def _read_fine(metadata: Path, task: Task) -> dict[str, int]:
    """Return the number of the finer label of each photo that has one, from the supplement next to the metadata."""
    if task.fine is None:
        return {}
    found = {}
    for path in find_tables(metadata.parent):
        if path.stem.lower().endswith("supplement"):
            columns = ("isic_id", task.fine.column)
            for row in _read_table(path, task, columns, columns)[1]:
                if (number := task.fine.label_of(row[task.fine.column])) != UNLABELED:
                    found[row["isic_id"]] = number
    return found


def _notes(lesions: Sequence[Lesion], task: Task, labeled: bool) -> list[str]:
    """Return what was tolerated, with counts."""
    tolerated: Counter[str] = Counter()
    for lesion in lesions:
        tolerated["with one photo, the other view marked missing"] += None in lesion.images.values()
        for field, value in zip(task.fields, lesion.metadata, strict=True):
            tolerated[f"without {field.label}"] += math.isnan(value)
        tolerated["without a diagnosis"] += labeled and lesion.label == UNLABELED
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


def _read_table(
    path: Path, task: Task, required: Sequence[str], known: Iterable[str] = ()
) -> tuple[list[str], list[_Row]]:
    """Read header and rows; columns that differ from a required, known or MONET one in case get its spelling."""
    table = read_table(path, task.table).named((*required, *known, *MONET_COLUMNS))
    table.require(required)
    return table.header, [_Row(where, cells) for where, cells in table.rows()]


def read_labels(path: Path, task: Task | None = None) -> dict[str, int]:
    """Read the label of each lesion from a one-hot table; a row whose cells are all empty is unlabeled.

    Raises DataError for an invalid row.
    """
    problems: list[Problem] = []
    labels, _ = _read_labels(path, task or milk10k_task(), problems.append)
    if problems:
        raise DataError(str(problems[0]))
    return labels


def _read_labels(
    path: Path, task: Task, on_problem: Callable[[Problem], object]
) -> tuple[dict[str, int], dict[str, str]]:
    """Return ({lesion: label}, {lesion: file and row}); `on_problem` gets the problem of an invalid row."""
    known = task.diagnosis_names
    header, rows = _read_table(path, task, required=("lesion_id", *known))
    if unknown := [name for name in header if name not in known and name != "lesion_id"]:
        raise DataError(f"{path}: unknown diagnosis {unknown[0]!r} in the header; known are {', '.join(known)}")
    labels: dict[str, int] = {}
    first: dict[str, str] = {}
    for row in rows:
        try:
            lesion_id = _lesion_id(row)
            if lesion_id in first:
                what = f"lesion {lesion_id} occurs twice, first in {first[lesion_id]}; remove one"
                raise _Invalid(lesion_id, "duplicate label", row.where, what)
            first[lesion_id] = row.where
            labels[lesion_id] = _label(lesion_id, row, task)
        except _Invalid as error:
            on_problem(error.problem)
    return labels, first


def _unmatched(labels: Iterable[str], rows: Mapping[str, str], lesions: Iterable[str], table: str) -> Iterator[Problem]:
    """Yield the problem of each label whose lesion the table lacks, with the nearest spelling."""
    spellings = Spellings(lesions)
    for lesion_id in labels:
        hint = spellings.hint(lesion_id, "add its rows, or remove its label")
        yield Problem(
            lesion_id, "label without a lesion", rows[lesion_id], f"lesion {lesion_id} is not in {table}; {hint}"
        )


def _label(lesion_id: str, row: _Row, task: Task) -> int:
    cells = [row[name] for name in task.diagnosis_names]
    if all(is_missing(cell, task.missing_words) for cell in cells):
        return UNLABELED
    values = [{"true": 1.0, "false": 0.0}.get(cell.lower(), parse_number(cell)) for cell in cells]
    if values.count(1.0) != 1 or values.count(0.0) != len(cells) - 1:
        what = (
            f"lesion {lesion_id} needs a single 1 and otherwise 0 over the diagnoses, "
            f"not {quoted(','.join(cells))}; leave all empty if it is unlabeled"
        )
        raise _Invalid(lesion_id, "label", row.where, what)
    return values.index(1.0)


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
            photos[view] = _Photo(row, None, ())
            isic_id = row["isic_id"]
            if not isic_id:
                raise _Invalid(lesion_id, "row", row.where, "isic_id is empty; it names the photo")
            if wrong := why_no_id(isic_id):
                raise _Invalid(lesion_id, "row", row.where, f"isic_id {quoted(isic_id)} {wrong}")
            if isic_id in owner:
                what = f"photo {isic_id} occurs twice, first in {owner[isic_id]}; remove one"
                raise _Invalid(lesion_id, "duplicate photo", row.where, what)
            owner[isic_id] = row.where
            path = _find_photo(lesion_id, row, find_photo, missing_view)
            score = tuple(_score(lesion_id, row, column, task.missing_words) for column in scores)
            photos[view] = _Photo(row, path, score)
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


def _agreed(lesion_id: str, field: MetadataField, rows: list[_Row], missing_words: Sequence[str]) -> float:
    """Return the value of a metadata field, on which all rows of a lesion that have it must agree."""
    values = {value for row in rows if not math.isnan(value := _field(lesion_id, row, field, missing_words))}
    if len(values) > 1:
        what = (
            f"the photos of lesion {lesion_id} differ in {field.column} "
            f"({' and '.join(row[field.column] for row in rows)}); both rows need the same"
        )
        raise _Invalid(lesion_id, "rows differ", rows[-1].where, what)
    return values.pop() if values else math.nan


def _group(lesion_id: str, rows: list[_Row], missing_words: Sequence[str]) -> str:
    groups = {row[GROUP_COLUMN] for row in rows if not is_missing(row[GROUP_COLUMN], missing_words)}
    for group in groups:
        if wrong := why_no_id(group):
            raise _Invalid(lesion_id, "row", rows[-1].where, f"{GROUP_COLUMN} {quoted(group)} {wrong}")
    if len(groups) > 1:
        what = f"lesion {lesion_id} belongs to {len(groups)} patients in {GROUP_COLUMN}; all rows need the same"
        raise _Invalid(lesion_id, "rows differ", rows[-1].where, what)
    return groups.pop() if groups else lesion_id


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


def _score(lesion_id: str, row: _Row, column: str, missing_words: Sequence[str]) -> float:
    try:
        return parse_score(column, row[column], missing_words)
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
