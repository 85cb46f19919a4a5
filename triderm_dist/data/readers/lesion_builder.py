"""Join the rows of a table to lesions, and find their photos.

A row is a lesion, with a column of photos per view, or a photo, with a column that holds its view.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from triderm_dist.data.readers.dataset import Spellings, spelled_alike
from triderm_dist.data.readers.find_photos import MissingPhoto, PhotoFinder
from triderm_dist.data.readers.find_table import image_columns
from triderm_dist.data.readers.lesion_table import LesionTable, Numbers, agreed, no_groups, no_labels
from triderm_dist.data.readers.parsed_columns import ParsedColumns
from triderm_dist.data.readers.table import Table
from triderm_dist.data.shards.format import Text
from triderm_dist.runtime.messages import quoted, unsafe_character
from triderm_dist.schema import UNLABELED, Task


@dataclass
class LesionBuilder:
    """Joins the rows of a table, whose ids were read, to lesions and finds their photos.

    mark_missing: whether a lesion needs only one of its photos.
    """

    columns: ParsedColumns
    photos: PhotoFinder
    mark_missing: bool = False
    _unused: int = field(default=0, init=False)
    """Photos in the folders that no row names."""

    @property
    def table(self) -> Table:
        return self.columns.table

    @property
    def task(self) -> Task:
        return self.columns.task

    def build(self) -> LesionTable:
        """Return the valid lesions; what is wrong with the others is in `columns.problems`."""
        task = self.task
        rows, images = self._by_lesion()
        labels = self.columns.labels()
        groups = self.columns.groups()
        disagree, metadata = list[tuple[int, int]](), list[Numbers]()
        for number in range(len(task.fields)):
            values, differ = agreed(rows, self.columns.metadata(number))
            metadata.append(Numbers(values))
            disagree += [(at, number) for at in differ.tolist()]
        scores = [
            [Numbers(values, of_view) for of_view in rows.T]
            for values in map(self.columns.scores, self.columns.concept_columns())
        ]
        concepts = [*chain.from_iterable(zip(*scores, strict=True))]  # those of the first view, then of the second
        for at, number in sorted(disagree):
            self.columns.add_difference(rows[at], task.fields[number].column)
        label, differ = agreed(rows, labels, UNLABELED)
        for at in differ.tolist():
            self.columns.add_difference(rows[at], task.columns.diagnosis or "diagnosis")
        fine = self._fine(rows, label)
        group, group_names = self._agreed_groups(rows, groups)

        first = np.where(rows[:, 0] >= 0, rows[:, 0], rows[:, -1])
        code = self.columns.codes[first]
        kept = self.columns.valid_lesions()[code]
        absent = np.stack([column < 0 for column in images.values()], 1)
        spellings = Spellings(self.columns.names)
        for at in np.flatnonzero(kept & (absent.all(1) if self.mark_missing else absent.any(1))).tolist():
            lesion_id = self.columns.names[int(code[at])]
            what, hint = self._missing(lesion_id, absent[at]), spellings.hint(lesion_id)
            self.columns.add_problem(int(first[at]), "missing photo", f"{what}; {hint}" if hint else what)
            kept[at] = False
        return LesionTable(
            self.columns.names if len(code) == len(self.columns.names) else self.columns.names.take(code),
            self.photos.paths,
            images,
            concepts,
            metadata,
            label.astype(np.int16),
            fine.astype(np.int16),
            group_names,
            group,
        ).take(np.flatnonzero(kept))

    @property
    def concepts(self) -> tuple[str, ...]:
        """Names of the concept scores of a lesion."""
        prefix = self.task.concepts.prefix or ""
        return self.task.per_lesion(column[len(prefix) :] for column in self.columns.concept_columns())

    def _by_lesion(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the rows of each lesion (L, R), -1 for none, and {view: positions of the photos (L,)}."""
        task = self.task
        images = [self._paths(column) for column in image_columns(task)]
        self.photos.clear()
        self._refuse_repeated_photos(np.stack(images, 1))
        if task.row_per_photo:
            rows = self.columns.rows_by_view(self.columns.views())
            return rows, {
                name: np.where(rows[:, at] >= 0, images[0][rows[:, at]], -1).astype(np.int32)
                for at, name in enumerate(task.view_names)
            }
        advice = "keep one"
        if isinstance(task.columns.image, str) and task.columns.lesion_id:
            group = f"columns: {{lesion_id: null, group: {task.columns.lesion_id}}} in task.yaml"
            advice = f"keep one, or make every photo a lesion by {group}"
        self.columns.refuse_repeated_lesions("duplicate lesion", advice)
        return np.arange(len(self.table), dtype=np.int32)[:, None], dict(zip(task.view_names, images, strict=True))

    def _missing(self, lesion_id: str, absent: np.ndarray) -> str:
        """Return what is wrong with a lesion that lacks photos. absent: (V,) bool by view."""
        if absent.all():
            return f"lesion {lesion_id} has no photo; add one or remove its rows"
        view = self.task.view_names[int(absent.argmax())]
        return f"lesion {lesion_id} has no {view} photo; add it, or allow lesions with one photo by missing_view=mark"

    def _paths(self, column: str) -> np.ndarray:
        """Return the position of each row's photo (N,), -1 for an empty cell or a file that may be missing."""
        self.columns.used.add(column)
        found = np.full(len(self.table), -1, np.int32)
        wrong: list[tuple[int, str, str]] = []
        words = pa.array(["", *map(str.lower, self.task.missing_words)])
        start, may_lack = 0, len(self.task.views) > 1
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
                    found[row] = self.photos.find(cell, self.columns.lesion_id(row))
                except MissingPhoto as error:
                    if not self.mark_missing:
                        allow = ", or allow lesions with one photo by missing_view=mark" if may_lack else ""
                        wrong.append((row, "missing photo", f"{column}: {error}{allow}"))
                except ValueError as error:
                    wrong.append((row, "unreadable photo", f"{column}: {error}"))
            start += len(texts)
        for row, kind, what in sorted(wrong):
            self.columns.add_problem(row, kind, what)
        return found

    def _refuse_repeated_photos(self, found: np.ndarray) -> None:
        """Make every row that names a photo of an earlier row, or one photo twice, a problem.

        found: (N, columns of photos) positions of photos, -1 for none.
        """
        photos = np.where(found >= 0, self.photos.first_of_equal()[found], -1).ravel()
        places = np.flatnonzero(photos >= 0)
        first_of_photo = np.full(len(self.photos.paths), -1)
        first_of_photo[photos[places[::-1]]] = places[::-1]  # the first place of several is written last
        self._unused = int((first_of_photo[: self.photos.files] < 0).sum())
        repeated = places[first_of_photo[photos[places]] != places]
        names = image_columns(self.task)
        for at, column in enumerate(names):
            own = repeated[repeated % len(names) == at]
            rows, earlier = own // len(names), first_of_photo[photos[own]] // len(names)
            cells = self.columns.cells_of(column, rows)
            for row, other, cell in zip(rows.tolist(), earlier.tolist(), cells, strict=True):
                where = f"first in row {self.table.numbers[other]}" if row != other else f"in {' and '.join(names)}"
                what = f"photo {cell} occurs twice, {where}; remove one"
                self.columns.add_problem(row, "duplicate photo", what)

    def _agreed_groups(self, rows: np.ndarray, groups: tuple[np.ndarray, Text] | None) -> tuple[np.ndarray, Text]:
        """Return the group of each lesion (L,), -1 for none, and the names of groups."""
        if groups is None:
            names, group = no_groups(len(rows))
            return group, names
        group, differ = agreed(rows, groups[0], -1)
        for at in differ.tolist():
            self.columns.add_difference(rows[at], self.task.columns.group or "")
        return group, groups[1]

    def _fine(self, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return the finer label of each lesion (L,), `UNLABELED` for none of the task's.

        A finer label that contradicts the lesion's label (labels, (L,)) is a problem.
        """
        task, found = self.task, self.columns.finer_labels()
        if task.fine is None or found is None:
            return no_labels(len(rows))
        finer, differ = agreed(rows, found, UNLABELED)
        for at in differ.tolist():
            self.columns.add_difference(rows[at], task.fine.column)
        pairs = np.unique(np.stack([labels, finer], 1), axis=0).tolist()
        wrong = {(label, own): why for label, own in pairs if (why := task.fine_contradiction(label, own))}
        contradictions = [
            (at, why)
            for (label, own), why in wrong.items()
            for at in np.flatnonzero((labels == label) & (finer == own)).tolist()
        ]
        for at, why in sorted(contradictions):
            self.columns.add_problem(int(rows[at].max()), "label", why)
        return finer

    def notes(self, lesions: LesionTable) -> list[str]:
        """Return what was tolerated, with counts, given the lesions that are kept."""
        tolerated: Counter[str] = Counter()
        for each, column in zip(self.task.fields, lesions.metadata, strict=True):
            missing = int(np.isnan(column.values()).sum())
            tolerated[f"without {each.label}"] += missing if each.column in self.table.cells else 0
        labels = Counter(dict(zip(*map(np.ndarray.tolist, np.unique(lesions.labels, return_counts=True)), strict=True)))
        tolerated["without a diagnosis"] += labels[UNLABELED] if self.columns.labeled else 0
        if len(self.task.views) > 1:
            absent = np.any([column < 0 for column in lesions.images.values()], axis=0).sum()
            tolerated["with one photo, the other view marked missing"] += int(absent)
        notes = [f"{count} of {len(lesions)} lesions {what}" for what, count in tolerated.items() if count]
        if self.columns.labeled and (
            none := [name for at, name in enumerate(self.task.diagnosis_names) if not labels[at]]
        ):
            notes.append(f"no lesion has the diagnosis {', '.join(none)}")
        if unused := [name for name in self.table.header if name not in self.columns.used]:
            notes.append(f"{self.table.path.name}: columns that are not used: {', '.join(unused)}")
        if self._unused:
            notes.append(f"{self._unused} photos are not in {self.table.path.name}")
        return [*notes, *spelled_alike(self.columns.names.column, "lesion ids"), *self.columns.notes]
