"""Grouped, stratified splits: cross-validation folds, and the parts of a nested fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from triderm_dist.schema import DataError

PLACED_AT_ONCE = 1 << 16
"""Groups whose labels are held as Python's numbers at a time."""


def assign_folds(labels: np.ndarray, groups: Sequence[str] | np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Assign a fold (N,) int64 to each row, given its label (N,) and group (N,); rows without a label get -1.

    Groups are strings, or integers that are in the order of the strings.

    Rows of one group share a fold. Where every group is one row, the counts of each label differ by at most 1 between
    folds, and so do the sizes of the folds. Groups of several rows are placed first, largest first, each where it least
    increases the sum over labels and folds of count^2 / total, which gives rare labels more weight; single rows then
    even out the counts. A label with two or more groups is in at least two folds, so that every training part has it.
    The result depends on group ids and seed, not on the order of the rows.

    Raises DataError for fewer groups than folds, or where groups with several labels allow no such folds.
    """
    labels = np.asarray(labels, dtype=np.int64)
    result = np.full(len(labels), -1, dtype=np.int64)
    rows = np.flatnonzero(labels >= 0)
    group_of_row, number = _numbered(np.asarray(groups), rows)
    if folds > number:
        raise DataError(f"{folds} folds need at least {folds} groups of labeled lesions, there are {number}")
    classes, class_of_row = np.unique(labels[rows], return_inverse=True)
    totals, size = np.bincount(class_of_row), np.bincount(group_of_row)

    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(number)
    tie_break = generator.permutation(folds)  # decides between equally good folds
    fold_of_group = np.full(number, -1, dtype=np.int64)

    large = shuffled[size[shuffled] > 1]
    content = _Content.of(large, group_of_row, class_of_row, len(classes))
    by_size = np.argsort(-size[large], kind="stable")
    fold_of_group[large], counts = _place(content, by_size, totals, tie_break)

    class_of_group = np.zeros(number, dtype=np.int64)
    class_of_group[group_of_row] = class_of_row  # used for groups of one row
    singles = shuffled[size[shuffled] == 1]
    for label in np.argsort(totals, kind="stable"):
        members = singles[class_of_group[singles] == label]
        added = _level(counts[:, label], counts.sum(axis=1), len(members), tie_break)
        fold_of_group[members] = np.repeat(np.arange(folds), added)
        counts[:, label] += added

    _spread(fold_of_group, large, content, counts)
    for label in np.flatnonzero(_confined(counts)):
        if len(np.unique(group_of_row[class_of_row == label])) > 1:
            raise DataError(
                f"no assignment to {folds} folds leaves label {classes[label]} in every training part, since its "
                "groups also hold other rare labels; use more folds"
            )
    result[rows] = fold_of_group[group_of_row]
    return result


def decimal_order(number: int) -> np.ndarray:
    """Return the place of each of the numbers from 0, (number,) int32, in the order of their decimal strings."""
    numbers = np.arange(number)
    digits = np.ones(number, np.int64)
    for power in range(1, len(str(max(number - 1, 1)))):
        digits += numbers >= 10**power
    padded = numbers * 10 ** (digits.max(initial=1) - digits)  # as text: with zeros at the end
    result = np.empty(number, np.int32)
    result[np.lexsort((digits, padded))] = np.arange(number, dtype=np.int32)
    return result


def split_parts(labels: np.ndarray, groups: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """Split the rows of a fit into parts (N,) int64 in [0, parts), for early stopping and nested estimates.

    Groups are never split. A group counts as one of its rarest label, and each label's groups are dealt to the parts
    in turn, part 0 last: a label with fewer groups than parts is missing from part 0 first. The result depends on the
    order of the group names, or of the numbers where groups are integers. Unlike `assign_folds` this never raises,
    since the rows of a nested fit may hold a single group of a label, and it does not balance the sizes of the parts.
    """
    generator = np.random.default_rng(seed)
    frequency = np.bincount(labels)
    _, group_of_row = np.unique(groups if groups.dtype.kind in "iu" else groups.astype(str), return_inverse=True)
    order = np.lexsort((-frequency[labels],))[::-1]  # the rarest label first
    label_of_group = labels[order[np.unique(group_of_row[order], return_index=True)[1]]]
    part_of_group = np.empty(len(label_of_group), np.int64)
    for label in np.unique(label_of_group):
        members = generator.permutation(np.flatnonzero(label_of_group == label))
        part_of_group[members] = parts - 1 - np.arange(len(members)) % parts
    return part_of_group[group_of_row]


def _numbered(groups: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the groups of these rows (n,), numbered from 0 in their order, and how many there are."""
    if groups.dtype.kind not in "iu":
        names, numbers = np.unique(groups.astype(str)[rows], return_inverse=True)
        return numbers, len(names)
    numbers = groups[rows]
    used = np.zeros(int(numbers.max(initial=-1)) + 1, bool)
    used[numbers] = True
    return (np.cumsum(used, dtype=np.int32) - 1)[numbers], int(used.sum())


@dataclass(frozen=True)
class _Content:
    """How many rows of each of C labels G groups have: group g has counts[i] rows of label classes[i], for i from
    starts[g] to starts[g + 1] (exclusive).
    """

    starts: np.ndarray
    classes: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, groups: np.ndarray, group_of_row: np.ndarray, class_of_row: np.ndarray, classes: int) -> _Content:
        """Count the rows of each label in each of the groups (G,)."""
        position = np.full(int(group_of_row.max(initial=-1)) + 1, -1)
        position[groups] = np.arange(len(groups))
        keys = position[group_of_row] * classes + class_of_row
        keys, counts = np.unique(keys[keys >= 0], return_counts=True)
        starts = np.searchsorted(keys, np.arange(len(groups) + 1) * classes)
        return cls(starts, (keys % classes).astype(np.int16), counts)

    def row(self, group: int, classes: int) -> np.ndarray:
        """Return the number of rows of each label in a group, (C,)."""
        own = slice(self.starts[group], self.starts[group + 1])
        result = np.zeros(classes, np.int64)
        result[self.classes[own]] = self.counts[own]
        return result

    def groups_with(self, labels: np.ndarray) -> np.ndarray:
        """Return the groups, in order, that have a row of one of these labels (C,) bool."""
        return np.unique(np.searchsorted(self.starts, np.flatnonzero(labels[self.classes]), "right") - 1)


def _place(
    content: _Content, order: np.ndarray, totals: np.ndarray, tie_break: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Place groups in this order (G,), each in the fold where it least increases the stratification cost; of equally
    good folds in the smallest, then in the first by `tie_break` (F,).

    Each placement depends on those before it, so this is a loop; it computes with Python's numbers, since NumPy takes
    ten times as long for so few. totals: rows of each label (C,). Returns the fold of each group (G,), and the rows of
    each label in each fold (F, C).
    """
    fold_of = np.empty(len(order), np.int64)
    counts, sizes, total_of = [[0] * len(totals) for _ in tie_break], [0] * len(tie_break), totals.tolist()
    folds = list(enumerate(counts))
    folds.sort(key=lambda fold: int(tie_break[fold[0]]))
    for start in range(0, len(order), PLACED_AT_ONCE):
        groups, chosen = order[start : start + PLACED_AT_ONCE], []
        first, number = content.starts[groups], content.starts[groups + 1] - content.starts[groups]
        entries = first[:, None] + np.minimum(np.arange(2), number[:, None] - 1)  # the second is the first again
        classes, of_each = content.classes[entries].T.tolist(), content.counts[entries].T.tolist()
        for group, labels, one, other, n, m in zip(groups.tolist(), number.tolist(), *classes, *of_each, strict=True):
            fold, least, size = -1, math.inf, 0
            if labels > 2:
                row = content.row(group, len(totals))
                fold = _cheapest(np.array(counts), row, totals, tie_break)
                counts[fold][:] = (counts[fold] + row).tolist()
                sizes[fold] += int(row.sum())
            else:
                second = m if labels == 2 else 0
                total, other_total = total_of[one], total_of[other]
                for each, placed in folds:
                    cost = (2 * placed[one] + n) * n / total + (2 * placed[other] + second) * second / other_total
                    if cost < least or (cost == least and sizes[each] < size):
                        fold, least, size = each, cost, sizes[each]
                counts[fold][one] += n
                counts[fold][other] += second
                sizes[fold] += n + second
            chosen.append(fold)
        fold_of[groups] = chosen
    return fold_of, np.array(counts, np.int64)


def _cheapest(counts: np.ndarray, content: np.ndarray, totals: np.ndarray, tie_break: np.ndarray) -> int:
    """Return the fold where a group increases the stratification cost least; of equal ones the smallest."""
    cost = ((2 * counts + content) * content / totals).sum(axis=1)
    return int(np.lexsort((tie_break, counts.sum(axis=1), cost))[0])


def _level(counts: np.ndarray, sizes: np.ndarray, rows: int, tie_break: np.ndarray) -> np.ndarray:
    """Distribute `rows` such that the counts become as even as possible; a remainder goes to the smallest folds.

    counts, sizes (F,): rows of the label and of all labels. Returns the rows that each fold gets, (F,).
    """
    rising = np.sort(counts)
    level = next(
        (rising[:k].sum() + rows) // k
        for k in range(len(counts), 0, -1)
        if (rising[:k].sum() + rows) // k >= rising[k - 1]
    )
    added = np.maximum(level - counts, 0)
    lowest = np.flatnonzero(counts + added == level)
    order = np.lexsort((tie_break[lowest], (sizes + added)[lowest]))
    added[lowest[order[: rows - added.sum()]]] += 1
    return added


def _confined(counts: np.ndarray) -> np.ndarray:
    """Return which labels have all rows in one fold, (C,) bool."""
    return (counts > 0).sum(axis=0) == 1


def _spread(fold_of_group: np.ndarray, large: np.ndarray, content: _Content, counts: np.ndarray) -> None:
    """Move groups, in place, as long as that reduces the number of labels that are in one fold only."""
    moved = True
    while moved:
        moved = False
        for group in content.groups_with(_confined(counts)):
            old, row = fold_of_group[large[group]], content.row(group, counts.shape[1])
            for new in range(len(counts)):
                trial = counts.copy()
                trial[old] -= row
                trial[new] += row
                if trial[old].sum() and _confined(trial).sum() < _confined(counts).sum():
                    counts[:] = trial
                    fold_of_group[large[group]] = new
                    moved = True
                    break
            if moved:
                break
