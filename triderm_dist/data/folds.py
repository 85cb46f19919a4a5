"""Grouped, stratified splits: cross-validation folds, and the parts of a nested fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from triderm_dist.schema import DataError


def assign_folds(labels: np.ndarray, groups: Sequence[str] | np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Assign a fold (N,) int64 to each row, given its label (N,) and group (N,); rows without a label get -1.

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
    names, group_of_row = np.unique(np.asarray(groups, dtype=str)[rows], return_inverse=True)
    if folds > len(names):
        raise DataError(f"{folds} folds need at least {folds} groups of labeled lesions, there are {len(names)}")
    classes, class_of_row = np.unique(labels[rows], return_inverse=True)
    totals = np.bincount(class_of_row)
    size = np.bincount(group_of_row)

    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(names))
    tie_break = generator.permutation(folds)  # decides between equally good folds
    counts = np.zeros((folds, len(classes)), dtype=np.int64)
    fold_of_group = np.full(len(names), -1, dtype=np.int64)

    large = shuffled[size[shuffled] > 1]
    content = _content(large, group_of_row, class_of_row, len(classes))
    for position in np.argsort(-size[large], kind="stable"):
        fold = _cheapest(counts, content[position], totals, tie_break)
        counts[fold] += content[position]
        fold_of_group[large[position]] = fold

    class_of_group = np.zeros(len(names), dtype=np.int64)
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


def _content(groups: np.ndarray, group_of_row: np.ndarray, class_of_row: np.ndarray, classes: int) -> np.ndarray:
    """Count the rows of each label in each of the groups, (G, C)."""
    position = np.full(int(group_of_row.max(initial=-1)) + 1, -1)
    position[groups] = np.arange(len(groups))
    content = np.zeros((len(groups), classes), dtype=np.int64)
    inside = position[group_of_row] >= 0
    np.add.at(content, (position[group_of_row[inside]], class_of_row[inside]), 1)
    return content


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


def _spread(fold_of_group: np.ndarray, large: np.ndarray, content: np.ndarray, counts: np.ndarray) -> None:
    """Move groups, in place, as long as that reduces the number of labels that are in one fold only."""
    moved = True
    while moved:
        moved = False
        confined = _confined(counts)
        for position in np.flatnonzero(content[:, confined].any(axis=1)):
            old = fold_of_group[large[position]]
            for new in range(len(counts)):
                trial = counts.copy()
                trial[old] -= content[position]
                trial[new] += content[position]
                if trial[old].sum() and _confined(trial).sum() < _confined(counts).sum():
                    counts[:] = trial
                    fold_of_group[large[position]] = new
                    moved = True
                    break
            if moved:
                break
