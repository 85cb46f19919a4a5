"""Grouped, stratified splits: cross-validation folds, and the parts of a nested fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import add

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
    labeled = labels >= 0
    group_of_row, number = _numbered(np.asarray(groups), labeled)
    if folds > number:
        raise DataError(f"{folds} folds need at least {folds} groups of labeled lesions, there are {number}")
    class_of_row, classes = _numbered(labels, labeled)
    totals, size = np.bincount(class_of_row), np.bincount(group_of_row)

    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(number)
    tie_break = generator.permutation(folds)  # decides between equally good folds
    fold_of_group = np.full(number, -1, np.int32)

    large = shuffled[size[shuffled] > 1]
    content = _Content.of(large, group_of_row, class_of_row, classes)
    by_size = np.argsort(-size[large], kind="stable")
    fold_of_group[large], counts = _place(content, by_size, totals, tie_break)

    class_of_group = np.zeros(number, np.int32)
    class_of_group[group_of_row] = class_of_row
    singles = shuffled[size[shuffled] == 1]
    class_of_single = class_of_group[singles]
    for label in np.argsort(totals, kind="stable"):
        members = singles[class_of_single == label]
        added = _level(counts[:, label], counts.sum(axis=1), len(members), tie_break)
        fold_of_group[members] = np.repeat(np.arange(folds), added)
        counts[:, label] += added

    _spread(fold_of_group, large, content, counts)
    for label in np.flatnonzero(_confined(counts)):
        if len(np.unique(group_of_row[class_of_row == label])) > 1:
            raise DataError(
                f"no assignment to {folds} folds leaves label {labels[labeled][class_of_row == label][0]} in every "
                "training part, since its groups also hold other rare labels; use more folds"
            )
    result = np.full(len(labels), -1, np.int64)
    result[labeled] = fold_of_group[group_of_row]
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


def _numbered(values: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the chosen (N,) bool of values (N,), numbered from 0 in their order, and how many different there are."""
    if values.dtype.kind not in "iu":
        names, numbers = np.unique(values.astype(str)[chosen], return_inverse=True)
        return numbers, len(names)
    values = values[chosen]
    used = np.zeros(int(values.max(initial=-1)) + 1, bool)
    used[values] = True
    places = np.cumsum(used, dtype=np.int32)
    places -= 1
    return places[values], int(np.count_nonzero(used))


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
        position = np.full(int(group_of_row.max(initial=-1)) + 1, -1, np.int32)
        position[groups] = np.arange(len(groups), dtype=np.int32)
        keys = position[group_of_row]
        inside = keys >= 0
        keys = keys[inside].astype(np.int32 if len(groups) * classes < 2**31 else np.int64)
        keys *= classes
        keys += class_of_row[inside]
        keys.sort()
        first = np.flatnonzero(np.diff(keys, prepend=np.int32(-1)))
        group, label = np.divmod(keys[first], classes)
        starts = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=len(groups)))])
        return cls(starts, label.astype(np.int16), np.diff(first, append=len(keys)))

    def entries(self, groups: np.ndarray) -> tuple[list[int], Iterator[tuple[int, int]]]:
        """Return how many labels each of these groups (n,) has, and the label and count of each of them in turn."""
        number = self.starts[groups + 1] - self.starts[groups]
        at = np.arange(number.sum()) + np.repeat(self.starts[groups] - np.cumsum(number) + number, number)
        return number.tolist(), zip(self.classes[at].tolist(), self.counts[at].tolist(), strict=True)

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
    folds = np.argsort(tie_break)
    total_of, sizes = totals.tolist(), [0] * len(folds)
    counts = [[0] * len(folds) for _ in total_of]  # by label and fold, as are the costs of one row more of a label
    single = [[1 / total] * len(folds) for total in total_of]

    def costs_of(label: int, rows: int) -> list[float]:
        return [(2 * count + rows) * rows / total_of[label] for count in counts[label]]

    fold_of = np.empty(len(order), np.int64)
    for start in range(0, len(order), PLACED_AT_ONCE):
        groups, chosen = order[start : start + PLACED_AT_ONCE], []
        numbers, entries = content.entries(groups)
        for number in numbers:
            label, rows = next(entries)
            own = [(label, rows)]
            if number == 1:
                costs: Sequence[float] = counts[label]  # in the same order
            else:
                costs = single[label] if rows == 1 else costs_of(label, rows)
                for _ in range(number - 1):
                    label, rows = next(entries)
                    own.append((label, rows))
                    costs = [*map(add, costs, single[label] if rows == 1 else costs_of(label, rows))]
                if number > 2:
                    costs = _as_rounded(costs, own, counts, totals)
            least = min(costs)
            fold = costs.index(least)
            for other in range(fold + 1, len(costs)):
                if costs[other] == least and sizes[other] < sizes[fold]:
                    fold = other
            for label, rows in own:
                count = counts[label][fold] = counts[label][fold] + rows
                single[label][fold] = (2 * count + 1) / total_of[label]
                sizes[fold] += rows
            chosen.append(fold)
        fold_of[groups] = folds[chosen]
    result = np.empty((len(folds), len(totals)), np.int64)
    result[folds] = np.array(counts).T
    return fold_of, result


def _as_rounded(
    costs: Sequence[float], own: Sequence[tuple[int, int]], counts: Sequence[Sequence[int]], totals: np.ndarray
) -> Sequence[float]:
    """Return the costs of a group with more than two labels in each fold, with the rounding errors that they had when
    NumPy added them, where these can decide: folds must stay the same.

    costs: added one after the other.  own: labels of the group with their rows.  counts: rows by label (C) and fold.
    """
    near = min(costs) * (1 + 1e-9)  # far above the error of adding any number of labels
    placed = {tuple([counts[label][fold] for label, _ in own]) for fold, cost in enumerate(costs) if cost <= near}
    if len(placed) == 1:  # equal costs, however they are added
        return costs
    row = np.zeros(len(totals), np.int64)
    for label, rows in own:
        row[label] = rows
    by_fold = np.ascontiguousarray(np.array(counts).T)
    return ((2 * by_fold + row) * row / totals).sum(axis=1).tolist()


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
    """Move groups, in place, as long as that reduces the number of labels that are in one fold only.

    No move empties a fold: that never reduces the number, since the fold's labels then are in as many folds or fewer.
    """
    moved = True
    while moved:
        moved = False
        for group in content.groups_with(_confined(counts)):
            old, row = fold_of_group[large[group]], content.row(group, counts.shape[1])
            for new in range(len(counts)):
                trial = counts.copy()
                trial[old] -= row
                trial[new] += row
                if _confined(trial).sum() < _confined(counts).sum():
                    counts[:] = trial
                    fold_of_group[large[group]] = new
                    moved = True
                    break
            if moved:
                break
