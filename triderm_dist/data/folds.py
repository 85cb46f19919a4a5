"""Lesions -> cross-validation folds: grouped, stratified, the same for any order of the rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from triderm_dist.schema import DataError


def assign_folds(labels: np.ndarray, groups: Sequence[str] | np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Fold (N,) int64 of each row from its label (N,) and its group (N,); rows without a label get -1.

    Rows of one group share a fold. Where every group is one row, the counts of each label differ by at most 1 over the
    folds, and so do the sizes of the folds. Larger groups are placed first, largest first, each where it least
    increases the sum over labels and folds of count^2 / total, which weighs a rare label's counts more; the single
    rows then level what is left. A label with two groups or more never sits in one fold only, so that none vanishes
    from a training part. Depends on the ids and the seed, not on the order of the rows.

    Raises DataError for fewer groups than folds, or where groups tie labels together so that no such folds are found.
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
    turn = generator.permutation(folds)  # breaks ties between folds
    counts = np.zeros((folds, len(classes)), dtype=np.int64)
    fold_of_group = np.full(len(names), -1, dtype=np.int64)

    large = shuffled[size[shuffled] > 1]
    content = _content(large, group_of_row, class_of_row, len(classes))
    for position in np.argsort(-size[large], kind="stable"):
        fold = _cheapest(counts, content[position], totals, turn)
        counts[fold] += content[position]
        fold_of_group[large[position]] = fold

    class_of_group = np.zeros(len(names), dtype=np.int64)
    class_of_group[group_of_row] = class_of_row  # of use for groups of one row
    singles = shuffled[size[shuffled] == 1]
    for label in np.argsort(totals, kind="stable"):
        members = singles[class_of_group[singles] == label]
        added = _level(counts[:, label], counts.sum(axis=1), len(members), turn)
        fold_of_group[members] = np.repeat(np.arange(folds), added)
        counts[:, label] += added

    _spread(fold_of_group, large, content, counts)
    for label in np.flatnonzero(_confined(counts)):
        if len(np.unique(group_of_row[class_of_row == label])) > 1:
            raise DataError(
                f"no {folds} folds are found that leave label {classes[label]} in every training part, "
                "since its groups are tied to other rare labels; use more folds"
            )
    result[rows] = fold_of_group[group_of_row]
    return result


def split_parts(labels: np.ndarray, groups: np.ndarray, parts: int, seed: int) -> np.ndarray:
    """Split the rows of a fit into parts (N,) int64 in [0, parts), for early stopping and nested estimates.

    Groups are never split. A group counts as one of its rarest label, and each label's groups are dealt to the parts
    in turn, part 0 last: a label with fewer groups than parts is missing from part 0 first. Unlike `assign_folds`
    this never raises, since the rows of a nested fit may hold a single group of a label, and it does not balance the
    sizes of the parts.
    """
    generator = np.random.default_rng(seed)
    frequency = np.bincount(labels)
    _, group_of_row = np.unique(groups.astype(str), return_inverse=True)
    label_of_group = np.full(group_of_row.max() + 1, -1, np.int64)
    for row in np.lexsort((-frequency[labels],)):  # the most frequent label first: the rarest overwrites it
        label_of_group[group_of_row[row]] = labels[row]
    part_of_group = np.empty(len(label_of_group), np.int64)
    for label in np.unique(label_of_group):
        members = generator.permutation(np.flatnonzero(label_of_group == label))
        part_of_group[members] = parts - 1 - np.arange(len(members)) % parts
    return part_of_group[group_of_row]


def _content(groups: np.ndarray, group_of_row: np.ndarray, class_of_row: np.ndarray, classes: int) -> np.ndarray:
    """(G, C) rows of each label in each of the groups."""
    place = np.full(int(group_of_row.max(initial=-1)) + 1, -1)
    place[groups] = np.arange(len(groups))
    content = np.zeros((len(groups), classes), dtype=np.int64)
    inside = place[group_of_row] >= 0
    np.add.at(content, (place[group_of_row[inside]], class_of_row[inside]), 1)
    return content


def _cheapest(counts: np.ndarray, content: np.ndarray, totals: np.ndarray, turn: np.ndarray) -> int:
    """The fold for a group: where the stratification cost grows least; of equal ones the smallest."""
    cost = ((2 * counts + content) * content / totals).sum(axis=1)
    return int(np.lexsort((turn, counts.sum(axis=1), cost))[0])


def _level(counts: np.ndarray, sizes: np.ndarray, rows: int, turn: np.ndarray) -> np.ndarray:
    """How many of `rows` each fold gets to level the counts as far as they go, odd ones to the smallest folds."""
    rising = np.sort(counts)
    water = next(
        (rising[:k].sum() + rows) // k
        for k in range(len(counts), 0, -1)
        if (rising[:k].sum() + rows) // k >= rising[k - 1]
    )
    added = np.maximum(water - counts, 0)
    level = np.flatnonzero(counts + added == water)
    order = np.lexsort((turn[level], (sizes + added)[level]))
    added[level[order[: rows - added.sum()]]] += 1
    return added


def _confined(counts: np.ndarray) -> np.ndarray:
    """(C,) labels all of whose rows sit in one fold."""
    return (counts > 0).sum(axis=0) == 1


def _spread(fold_of_group: np.ndarray, large: np.ndarray, content: np.ndarray, counts: np.ndarray) -> None:
    """Move large groups, in place, while that frees a label that greedy placing has confined to one fold."""
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
