"""Check rows of the metadata table one by one. Messages name the file and the row."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from triderm_dist.data.ids import why_no_id
from triderm_dist.data.problems import Problem
from triderm_dist.data.readers.cells import is_missing, parse_field, parse_score
from triderm_dist.data.readers.dataset import why_no_lesion_id
from triderm_dist.data.readers.find_photos import MissingPhoto, PhotoFinder
from triderm_dist.data.readers.milk10k.columns import GROUP_COLUMN
from triderm_dist.runtime.messages import quoted
from triderm_dist.schema import UNLABELED, VIEWS, MetadataField, Task


@dataclass(frozen=True)
class Row:
    """One row of a table. where: file and row, for messages."""

    where: str
    cells: dict[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells[column]


@dataclass(frozen=True)
class RowPhoto:
    """The photo that a row names. path: None if the file is missing."""

    row: Row
    path: str | None


class InvalidRow(Exception):
    """A row makes its lesion invalid; `problem` says why."""

    def __init__(self, lesion_id: str, kind: str, where: str, what: str) -> None:
        super().__init__(what)
        self.problem = Problem(lesion_id, kind, where, what)


def group_views(
    rows: list[Row],
    scores: list[str],
    find_photo: PhotoFinder,
    task: Task,
    missing_view: str,
    on_problem: Callable[[Problem], object],
) -> dict[str, dict[str, RowPhoto]]:
    """Check each row and return {lesion id: {view: photo}}. Calls `on_problem` for each invalid row."""
    views: dict[str, dict[str, RowPhoto]] = defaultdict(dict)
    owner: dict[str, str] = {}
    words = {word.lower(): view.name for view in task.views for word in view.words}
    for row in rows:
        try:
            lesion_id = checked_lesion_id(row)
            photos = views[lesion_id]
            view = _view(lesion_id, row, photos, words)
            # Registered before its checks, so that the row of the other photo is not blamed for a missing view.
            photos[view] = RowPhoto(row, None)
            isic_id = row["isic_id"]
            if not isic_id:
                raise InvalidRow(lesion_id, "row", row.where, "isic_id is empty; it names the photo")
            if wrong := why_no_id(isic_id):
                raise InvalidRow(lesion_id, "row", row.where, f"isic_id {quoted(isic_id)} {wrong}")
            if isic_id in owner:
                what = f"photo {isic_id} occurs twice, first in {owner[isic_id]}; remove one"
                raise InvalidRow(lesion_id, "duplicate photo", row.where, what)
            owner[isic_id] = row.where
            photos[view] = RowPhoto(row, _find_photo(lesion_id, row, find_photo, missing_view))
            for column in scores:
                _check_score(lesion_id, row, column, task.missing_words)
        except InvalidRow as error:
            on_problem(error.problem)
    return views


def _find_photo(lesion_id: str, row: Row, find_photo: PhotoFinder, missing_view: str) -> str | None:
    """Return the path of a row's photo, None if it is missing and that is allowed."""
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
        raise InvalidRow(lesion_id, "missing photo", row.where, what) from None
    except ValueError as error:
        raise InvalidRow(lesion_id, "unreadable photo", row.where, str(error)) from None


def _view(lesion_id: str, row: Row, photos: dict[str, RowPhoto], words: Mapping[str, str]) -> str:
    kind = row["image_type"]
    view = words.get(kind.lower())
    if view is None:
        what = f"unknown image_type {quoted(kind)}; known are {', '.join(words)}"
        raise InvalidRow(lesion_id, "row", row.where, what)
    if view in photos:
        what = f"lesion {lesion_id} has two {view} photos, the first in {photos[view].row.where}; keep one"
        raise InvalidRow(lesion_id, "duplicate photo", row.where, what)
    return view


def check_views(lesion_id: str, photos: dict[str, RowPhoto], missing_view: str) -> None:
    where = next(iter(photos.values())).row.where
    if len(photos) < len(VIEWS) and missing_view == "refuse":
        absent = next(view for view in VIEWS if view not in photos)
        what = (
            f"lesion {lesion_id} has one photo only, no {absent} one; "
            "add its row, or allow lesions with one photo by missing_view=mark"
        )
        raise InvalidRow(lesion_id, "missing photo", where, what)
    if all(photo.path is None for photo in photos.values()):
        what = f"lesion {lesion_id} has no photo at all; add one or remove its rows"
        raise InvalidRow(lesion_id, "missing photo", where, what)


def check_lesion(
    lesion_id: str, photos: dict[str, RowPhoto], label: int, task: Task, grouped: bool, finer: Mapping[str, int]
) -> None:
    """Raise InvalidRow for contradictions within a lesion. finer: the finer label by photo, of those that have one."""
    own = {finer[photo.row["isic_id"]] for photo in photos.values() if photo.row["isic_id"] in finer}
    fine = own.pop() if len(own) == 1 else UNLABELED  # as that of no photo where they differ
    if wrong := task.fine_contradiction(label, fine):
        raise InvalidRow(lesion_id, "label", next(iter(photos.values())).row.where, f"lesion {lesion_id}: {wrong}")
    rows = [photo.row for photo in photos.values()]
    for field in task.fields:
        _check_agreed(lesion_id, field, rows, task.missing_words)
    if grouped:
        _check_group(lesion_id, rows, task.missing_words)


def _check_agreed(lesion_id: str, field: MetadataField, rows: list[Row], missing_words: Sequence[str]) -> None:
    """Raise InvalidRow where the rows of a lesion that have a metadata field do not agree on it."""
    values = {value for row in rows if not math.isnan(value := _field(lesion_id, row, field, missing_words))}
    if len(values) > 1:
        what = (
            f"the photos of lesion {lesion_id} differ in {field.column} "
            f"({' and '.join(row[field.column] for row in rows)}); both rows need the same"
        )
        raise InvalidRow(lesion_id, "rows differ", rows[-1].where, what)


def _check_group(lesion_id: str, rows: list[Row], missing_words: Sequence[str]) -> None:
    """Raise InvalidRow for a group that cannot be one, and for rows of a lesion with different ones."""
    groups = {row[GROUP_COLUMN] for row in rows if not is_missing(row[GROUP_COLUMN], missing_words)}
    for group in groups:
        if wrong := why_no_id(group):
            raise InvalidRow(lesion_id, "row", rows[-1].where, f"{GROUP_COLUMN} {quoted(group)} {wrong}")
    if len(groups) > 1:
        what = f"lesion {lesion_id} belongs to {len(groups)} patients in {GROUP_COLUMN}; all rows need the same"
        raise InvalidRow(lesion_id, "rows differ", rows[-1].where, what)


def checked_lesion_id(row: Row) -> str:
    lesion_id = row["lesion_id"]
    if wrong := why_no_lesion_id(lesion_id):
        raise InvalidRow(lesion_id, "row", row.where, f"lesion_id {quoted(lesion_id)} {wrong}")
    return lesion_id


def _field(lesion_id: str, row: Row, field: MetadataField, missing_words: Sequence[str]) -> float:
    try:
        return parse_field(field, row.cells.get(field.column, ""), missing_words)
    except ValueError as error:
        raise InvalidRow(lesion_id, "cell", row.where, f"{error}; correct it, or leave it empty if unknown") from None


def _check_score(lesion_id: str, row: Row, column: str, missing_words: Sequence[str]) -> None:
    try:
        parse_score(column, row[column], missing_words)
    except ValueError as error:
        raise InvalidRow(lesion_id, "cell", row.where, f"{error}; leave it empty if unknown") from None
