"""Read the metadata table by columns, and mark the lesions whose rows must be checked one by one."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from triderm_dist.data.ids import why_no_id
from triderm_dist.data.problems import Problem
from triderm_dist.data.readers.cells import is_missing, parse_field, parse_score, parsed_texts
from triderm_dist.data.readers.dataset import why_no_lesion_id
from triderm_dist.data.readers.find_photos import MissingPhoto, PhotoFinder
from triderm_dist.data.readers.lesion_table import LesionTable, Numbers, agreed, no_groups, no_labels
from triderm_dist.data.readers.milk10k.columns import GROUP_COLUMN
from triderm_dist.data.readers.milk10k.row_checks import Row, RowPhoto, group_views
from triderm_dist.data.readers.table import Table
from triderm_dist.data.shards.format import Text
from triderm_dist.schema import UNLABELED, VIEWS, Task


class MetadataColumns:
    """The metadata table of N rows and L lesions, parsed by columns.

    names: (L,) the id of each lesion, in the order of first appearance.  codes: (N,) the lesion of each row.
    lesions: number of lesions with a valid id.  photos: (N,) position of each row's photo, -1 if it is missing.
    unusual: (L,) bool, whether the lesion's rows hold anything that may be invalid; `recheck` decides.
    """

    def __init__(self, table: Table, task: Task, scores: Sequence[str], mark_missing: bool) -> None:
        self.table, self.task, self.scores, self.mark_missing = table, task, scores, mark_missing
        self.codes, names = table.encoded("lesion_id")
        self.names = Text(pa.chunked_array([names]))
        self.unusual = np.array([why_no_lesion_id(name) is not None for name in self.names], bool)
        self.lesions = len(self.names) - int(self.unusual.sum())
        self.photos = np.full(len(table), -1, np.int32)
        self._rows_of: dict[str, int] = {}

    def _mark_unusual(self, rows: np.ndarray) -> None:
        """Mark the lesions of these rows."""
        self.unusual[self.codes[rows]] = True

    def find_photos(self, find_photo: PhotoFinder) -> None:
        """Set `photos`."""
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
            self.photos[start : start + len(ids)] = found
            self._mark_unusual(start + np.array(wrong, int))
            start += len(ids)
        found = self.photos[self.photos >= 0]
        counts = np.bincount(found, minlength=1)
        self._mark_unusual(np.flatnonzero((self.photos >= 0) & (counts[np.maximum(self.photos, 0)] > 1)))
        hashes, counts = np.unique(
            np.frombuffer(missing, np.int64) if missing else np.empty(0, int), return_counts=True
        )
        if (counts > 1).any():  # of rows without a photo
            twice, start = set(hashes[counts > 1].tolist()), 0
            for (cells,) in self.table.parts("isic_id"):
                self._mark_unusual(start + np.flatnonzero([hash(cell) in twice for cell in cells.to_pylist()]))
                start += len(cells)

    def columns(self, labels: np.ndarray, finer: Mapping[str, int], find_photo: PhotoFinder) -> LesionTable:
        """Return all lesions as a table; the rows of `unusual` ones may be invalid."""
        task, lesions = self.task, len(self.names)
        words = {word.lower(): VIEWS.index(view.name) for view in task.views for word in view.words}
        view = self._parsed("image_type", lambda text: words[text.lower()], np.int8, -1)
        rows = np.full((lesions, len(VIEWS)), -1, np.int32)
        own = np.flatnonzero(view >= 0).astype(np.int32)
        place = self.codes[own].astype(np.int64) * len(VIEWS) + view[own]
        rows.reshape(-1)[place] = own
        self._mark_unusual(own[rows.reshape(-1)[place] != own])
        images = {name: np.where(each >= 0, self.photos[each], -1) for name, each in zip(VIEWS, rows.T, strict=True)}
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
            self._mark_unusual(np.flatnonzero(wrong[codes]))
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
        """Return the common value of each lesion's rows (L,) as `agreed`; where rows differ, mark the lesion."""
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
        """Parse a column (N,), each distinct text of a part once.

        Where parsing raises, the value is `none` and the lesion is marked unusual.
        span: numbers in this range are parsed at once, without `parse`, unless they are one of the missing words.
        """
        result, start = np.empty(len(self.table), dtype), 0
        for (cells,) in self.table.parts(column):
            encoded = cells.dictionary_encode()
            values, wrong = parsed_texts(encoded.dictionary, parse, span, self.task.missing_words)
            codes = encoded.indices.to_numpy()
            result[start : start + len(codes)] = np.where(np.isnan(values), none, values)[codes]
            if wrong:
                self._mark_unusual(start + np.flatnonzero(np.isin(codes, list(wrong))))
            start += len(codes)
        return result

    def recheck(
        self, find_photo: PhotoFinder, missing_view: str, on_problem: Callable[[Problem], object]
    ) -> dict[str, dict[str, RowPhoto]]:
        """Check each row of the unusual lesions, and return their photos, as `group_views`."""
        chosen = self.unusual[self.codes]
        find_photo.unused += int((self.photos[chosen] >= 0).sum())  # they are found a second time
        rows = [Row(where, cells) for where, cells in self.table.rows(chosen)]
        self._rows_of = dict(zip((row.where for row in rows), np.flatnonzero(chosen).tolist(), strict=True))
        return group_views(rows, list(self.scores), find_photo, self.task, missing_view, on_problem)

    def code_of(self, photos: Mapping[str, RowPhoto]) -> int:
        """Return the number of the lesion with these photos, which must have been returned by `recheck`."""
        return int(self.codes[self._rows_of[next(iter(photos.values())).row.where]])
