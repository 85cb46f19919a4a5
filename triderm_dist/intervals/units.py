"""Count decisions by distinct lesion or group, which bootstrap and influence functions go over instead of N lesions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from triderm_dist.schema import UNLABELED, DataError


@dataclass(frozen=True)
class Counts:
    """Lesions per unit and diagnosis, all (U, C).

    total: predicted + positives.  shared_true_positives: of all tables.
    """

    true_positives: np.ndarray
    total: np.ndarray
    positives: np.ndarray
    shared_true_positives: np.ndarray


def count_units(
    tables: list[np.ndarray], labels: np.ndarray, groups: np.ndarray | None
) -> tuple[list[Counts], np.ndarray]:
    """Return the counts of each decision table by distinct unit, and the frequency (U,) of the units.

    A unit is a lesion or a group. Units with equal counts are exchangeable, so a resample is a multinomial draw over
    the distinct ones: exact, without a pass over the N lesions. Raises DataError if shapes do not match.
    """
    labels = np.asarray(labels)
    for table in tables:
        if np.ndim(table) != 2 or labels.shape != np.shape(table)[:1]:
            raise DataError(
                f"decisions {np.shape(table)} and labels {labels.shape} do not match: expected (N, C) and (N,)"
            )
    known = labels != UNLABELED
    if not known.any():
        raise DataError("no lesion is labeled: there is nothing to score")
    decisions = np.concatenate([np.asarray(table, bool) for table in tables], axis=1)[known]
    classes = len(tables[0][0])
    labels = labels[known]
    first, pattern_of, frequency = _distinct(labels, decisions)
    truth = labels[first, None] == np.arange(classes)
    decided = [decisions[first, start : start + classes] for start in range(0, decisions.shape[1], classes)]
    both = truth & np.logical_and.reduce(decided)
    columns = [np.stack([truth & each, each.astype(int) + truth, truth, both]) for each in decided]
    counts = np.concatenate(columns).astype(np.int64)  # (4 tables, U, C)
    if groups is not None:
        patterns, starts, repeats = _distinct_groups(group_numbers(np.asarray(groups)[known]), pattern_of)
        rows = counts.transpose(1, 0, 2).reshape(len(first), -1)[patterns]
        summed = np.add.reduceat(rows, starts, axis=0)
        smallest = summed.astype(np.min_scalar_type(summed.max()))  # rows of fewer bytes sort faster
        distinct, number = np.unique(smallest, axis=0, return_inverse=True)
        frequency = np.bincount(number.ravel(), repeats).astype(np.int64)
        counts = distinct.reshape(len(distinct), -1, classes).transpose(1, 0, 2)
    return [Counts(*counts[start : start + 4].astype(float)) for start in range(0, len(counts), 4)], frequency


def _distinct(labels: np.ndarray, decisions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of the distinct rows of labels and decisions: the first of each, the number of each row, and counts."""
    packed = np.packbits(decisions, axis=1)
    keys = np.zeros((len(labels), -(-(4 + packed.shape[1]) // 8) * 8), np.uint8)
    keys[:, :4] = labels.astype(np.uint32)[:, None].view(np.uint8)
    keys[:, 4 : 4 + packed.shape[1]] = packed
    words = keys.view(np.uint64)  # one integer up to 32 decisions: sorted fast
    if words.shape[1] == 1:
        _, first, inverse, counts = np.unique(words[:, 0], return_index=True, return_inverse=True, return_counts=True)
    else:
        _, first, inverse, counts = np.unique(words, axis=0, return_index=True, return_inverse=True, return_counts=True)
    return first, inverse.ravel(), counts


def _distinct_groups(groups: np.ndarray, patterns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distinct groups: the patterns of their lesions one after the other, where each group starts in them,
    and how often each occurs.

    groups, patterns: (N,) of each lesion, numbers from 0. Groups are equal that have the same patterns as often.
    """
    order = np.lexsort((patterns, groups))
    patterns = patterns[order]
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    size = np.diff(starts, append=len(patterns))
    # Lesion by lesion, groups whose patterns are equal so far have the same number.
    number, longer = np.zeros(len(starts), np.int64), np.arange(len(starts))
    for place in range(int(size.max())):
        longer = longer[size[longer] > place]
        pairs = number[longer] * (int(patterns.max()) + 1) + patterns[starts[longer] + place]
        number[longer] = np.unique(pairs, return_inverse=True)[1].ravel()
    _, first, repeats = np.unique(number * (int(size.max()) + 1) + size, return_index=True, return_counts=True)
    begins = np.cumsum(size[first]) - size[first]
    within = np.arange(size[first].sum()) - np.repeat(begins, size[first])
    return patterns[np.repeat(starts[first], size[first]) + within], begins, repeats


def group_numbers(groups: np.ndarray) -> np.ndarray:
    """Return (N,) int64 numbers of the groups, in the order of their names or numbers."""
    if groups.dtype.kind in "iu" and groups.min(initial=0) >= 0 and groups.max(initial=0) < 16 * len(groups):
        used = np.zeros(int(groups.max(initial=0)) + 1, bool)  # counted, which takes less time than sorting
        used[groups] = True
        return (np.cumsum(used) - 1)[groups]
    if groups.dtype != object:
        return np.unique(groups, return_inverse=True)[1].ravel()
    import pyarrow as pa
    import pyarrow.compute as pc

    encoded = pa.array(groups).dictionary_encode()
    numbers = np.empty(len(encoded.dictionary), np.int64)
    numbers[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(numbers))
    return numbers[encoded.indices.to_numpy()]
