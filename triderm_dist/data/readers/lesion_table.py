"""Checked lesions stored by columns, a tenth of the memory of `Lesion` objects, which are created on access."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import pyarrow as pa

from triderm_dist.data.readers.text_index import Texts
from triderm_dist.data.shards.format import Text
from triderm_dist.schema import UNLABELED, VIEWS, Lesion

CHUNK = 1 << 14
"""Lesions that are created at a time."""
_PART = 1 << 16
"""Numbers that are processed at a time."""
_DIVISORS = (1, 10, 100, 1_000, 10_000, 1_000_000)


class Numbers:
    """A column (N,) of float64 values, NaN where missing, stored without loss in as few bytes as they need.

    Decimal fractions of few digits, as tables hold them, are stored as integers and a common power of ten.

    values: (N,), or one value per row of a table.  rows: (N,) the row of each value, -1 for a missing value.
    """

    def __init__(self, values: np.ndarray, rows: np.ndarray | None = None) -> None:
        count = len(values) if rows is None else len(rows)

        def parts() -> Iterator[tuple[slice, np.ndarray]]:
            for start in range(0, count, _PART):
                part = slice(start, start + _PART)
                own = values[part] if rows is None else np.where(rows[part] >= 0, values[rows[part]], np.nan)
                yield part, own.astype(np.float64, copy=False)

        self._divisor, kind = _smallest(parts)
        self._codes = np.empty(count, kind)
        for part, own in parts():
            if self._divisor:
                missing = np.isnan(own)
                own = np.where(missing, np.iinfo(kind).max, np.rint(own * self._divisor))
            self._codes[part] = own

    def __len__(self) -> int:
        return len(self._codes)

    def values(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return the values of these rows, by default all."""
        codes = self._codes[rows]
        if not self._divisor:
            return codes.astype(np.float64)
        return np.where(codes == np.iinfo(codes.dtype).max, np.nan, codes / self._divisor)

    def take(self, rows: np.ndarray) -> Numbers:
        """Return the column of these rows."""
        column = object.__new__(Numbers)
        column._codes, column._divisor = self._codes[rows], self._divisor
        return column


def _smallest(parts: Callable[[], Iterator[tuple[slice, np.ndarray]]]) -> tuple[int, np.dtype]:
    """Return (divisor, dtype): the values are integers of the dtype over the divisor; divisor 0 stores floats.

    The largest integer of the dtype stands for NaN.
    """
    high, nonnegative, single = 0.0, True, True
    for _, own in parts():
        known = own[~np.isnan(own)]
        high = max(high, known.max(initial=0.0))
        nonnegative = nonnegative and not np.signbit(known).any() and bool(np.isfinite(known).all())
        with np.errstate(over="ignore"):  # to infinity, which is not equal
            single = single and np.array_equal(known.astype(np.float32), known)
    for divisor in _DIVISORS if nonnegative else ():
        if high * divisor >= np.iinfo(np.uint32).max - 1:
            break
        # The division rounds as parsing does.
        if all(np.array_equal(np.rint(own * divisor) / divisor, own, equal_nan=True) for _, own in parts()):
            return divisor, np.min_scalar_type(int(high * divisor) + 2)
    return 0, np.dtype(np.float32 if single else np.float64)


@dataclass(eq=False)
class LesionTable(Sequence[Lesion]):
    """N lesions in columns, read as `Lesion` objects.

    ids: of the lesions.  paths: of all photos.  images: (N,) position in `paths` of each view's photo, -1 where it is
    missing.  concepts: K columns.  metadata: M columns.  labels, fine: (N,).  groups: names of the groups.
    group: (N,) position in `groups`, -1 for a lesion without a group.
    """

    ids: Text
    paths: Sequence[str]
    images: Mapping[str, np.ndarray]
    concepts: Sequence[Numbers]
    metadata: Sequence[Numbers]
    labels: np.ndarray
    fine: np.ndarray
    groups: Text
    group: np.ndarray

    @classmethod
    def of(cls, lesions: Sequence[Lesion]) -> LesionTable:
        """Return lesions as a table."""
        if isinstance(lesions, LesionTable):
            return lesions
        paths, images = Texts(), dict[str, list[int]]()
        for view in VIEWS:
            images[view] = own = []
            for lesion in lesions:
                path = lesion.images.get(view)
                own.append(-1 if path is None else len(paths))
                if path is not None:
                    paths.append(path)
        groups = pa.array([lesion.group for lesion in lesions], pa.string()).dictionary_encode()
        return cls(
            Text(pa.chunked_array([pa.array([lesion.lesion_id for lesion in lesions], pa.string())])),
            paths,
            {view: np.array(own, np.int32) for view, own in images.items()},
            [Numbers(np.array(column)) for column in zip(*(lesion.concepts for lesion in lesions), strict=True)],
            [Numbers(np.array(column)) for column in zip(*(lesion.metadata for lesion in lesions), strict=True)],
            np.array([lesion.label for lesion in lesions], np.int16),
            np.array([lesion.fine for lesion in lesions], np.int16),
            Text(pa.chunked_array([groups.dictionary])),
            groups.indices.to_numpy(),
        )

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, at: int) -> Lesion: ...
    @overload
    def __getitem__(self, at: slice) -> list[Lesion]: ...
    def __getitem__(self, at: int | slice) -> Lesion | list[Lesion]:
        if isinstance(at, slice):
            return self.lesions(np.arange(len(self))[at])
        return self.lesions(np.array([range(len(self))[at]]))[0]

    def __iter__(self) -> Iterator[Lesion]:
        for start in range(0, len(self), CHUNK):
            yield from self.lesions(np.arange(start, min(start + CHUNK, len(self))))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(_equal, self, other))

    def lesions(self, rows: np.ndarray) -> list[Lesion]:
        """Return the lesions of these rows (n,)."""
        ids = self.ids[rows].tolist()
        own = [
            [self.paths[at] if at >= 0 else None for at in self.images[view][rows].tolist()]
            if view in self.images
            else [None] * len(ids)
            for view in VIEWS
        ]
        columns = [
            np.stack([column.values(rows) for column in part], 1).tolist() if part else [[]] * len(ids)
            for part in (self.concepts, self.metadata)
        ]
        groups = self.group_names(rows)
        labels, fine = self.labels[rows].tolist(), self.fine[rows].tolist()
        return [
            Lesion(name, dict(zip(VIEWS, photos, strict=True)), tuple(score), tuple(values), label, group, finer)
            for name, photos, score, values, label, group, finer in zip(
                ids, zip(*own, strict=True), *columns, labels, groups, fine, strict=True
            )
        ]

    def group_names(self, rows: np.ndarray | slice) -> list[str]:
        """Return the group of each of these rows (n,); the id of a lesion without a group."""
        names, codes = self.ids[rows], self.group[rows]
        names[codes >= 0] = self.groups[codes[codes >= 0]]
        return names.tolist()

    def distinct_groups(self) -> tuple[np.ndarray, pa.Array]:
        """Return the number of each lesion's group (N,) and the names of the groups that have lesions."""
        ungrouped = np.flatnonzero(self.group < 0)
        used = np.zeros(len(self.groups), bool)
        used[self.group[self.group >= 0]] = True
        names = self.groups.column if used.all() else self.groups.column.take(pa.array(np.flatnonzero(used)))
        numbers = (np.cumsum(used, dtype=np.int32) - 1)[self.group] if len(used) else np.empty(0, np.int32)
        if not len(ungrouped):
            return numbers, names
        names = (
            pa.chunked_array([names, self.ids.column.take(pa.array(ungrouped))]).dictionary_encode().combine_chunks()
        )
        codes = names.indices.to_numpy()
        result = np.empty(len(self), np.int32)
        if len(used):
            result[:] = codes[: len(codes) - len(ungrouped)][numbers]
        result[ungrouped] = codes[len(codes) - len(ungrouped) :]
        return result, names.dictionary

    def take(self, rows: np.ndarray) -> LesionTable:
        """Return the table of these rows (n,)."""
        if len(rows) == len(self) and np.array_equal(rows, np.arange(len(self))):
            return self
        return replace(
            self,
            ids=self.ids.take(rows),
            images={view: column[rows] for view, column in self.images.items()},
            concepts=[column.take(rows) for column in self.concepts],
            metadata=[column.take(rows) for column in self.metadata],
            labels=self.labels[rows],
            fine=self.fine[rows],
            group=self.group[rows],
        )

    def clear(self) -> None:
        """Empty the table, and so free its memory also where others refer to it."""
        vars(self).update(vars(LesionTable.of([])))


def agreed(rows: np.ndarray, values: np.ndarray, none: float = math.nan) -> tuple[np.ndarray, np.ndarray]:
    """Merge the values of each lesion's rows: return the values (L,) and the lesions whose rows differ.

    rows: (L, R), R of 1 or 2, -1 for no row.  values: (N,) of the table's rows, `none` where missing.
    """
    if rows.shape[1] == 1:
        return np.where(rows[:, 0] >= 0, values[rows[:, 0]], none).astype(values.dtype), np.empty(0, int)
    pair = [np.where(own >= 0, values[own], none).astype(values.dtype) for own in rows.T]
    absent = [np.isnan(each) if math.isnan(none) else each == none for each in pair]
    differ = np.flatnonzero(~absent[0] & ~absent[1] & (pair[0] != pair[1]))
    return np.where(absent[0], pair[1], pair[0]), differ


def no_labels(rows: int) -> np.ndarray:
    """Return `UNLABELED` for each of the rows."""
    return np.full(rows, UNLABELED, np.int16)


def no_groups(rows: int) -> tuple[Text, np.ndarray]:
    """Return `LesionTable.groups` and `.group` of lesions without groups."""
    return Text(pa.chunked_array([], pa.string())), np.full(rows, -1, np.int8)


def _equal(one: Lesion, other: Lesion) -> bool:
    """Return whether two lesions are equal, where NaN equals NaN."""

    def key(lesion: Lesion) -> tuple[object, ...]:
        numbers = [None if math.isnan(number) else number for number in (*lesion.concepts, *lesion.metadata)]
        return lesion.lesion_id, lesion.images, numbers, lesion.label, lesion.group, lesion.fine

    return key(one) == key(other)
