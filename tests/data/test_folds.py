"""Folds are stratified, keep groups together, are independent of row order, and leave training rows of each label."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triderm_dist.data import folds as module
from triderm_dist.data.folds import assign_folds, decimal_order, split_parts
from triderm_dist.schema import DataError


def table(labels: np.ndarray, fold: np.ndarray, folds: int) -> np.ndarray:
    """Return (F, C): the number of lesions of each label in each fold."""
    return np.array([np.bincount(labels[fold == f], minlength=labels.max() + 1) for f in range(folds)])


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=11).filter(lambda c: sum(c) >= 5),
    folds=st.integers(2, 5),
    seed=st.integers(0, 9),
)
def test_ungrouped_rows_are_stratified_exactly(counts: list[int], folds: int, seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    fold = assign_folds(labels, [f"L{i}" for i in range(len(labels))], folds, seed)
    counts_by_fold = table(labels, fold, folds)
    assert (counts_by_fold.max(axis=0) - counts_by_fold.min(axis=0) <= 1).all()
    assert np.ptp(counts_by_fold.sum(axis=1)) <= 1


@settings(max_examples=80, deadline=None)
@given(data=st.data(), folds=st.integers(2, 5), seed=st.integers(0, 9))
def test_groups_are_kept_together_in_any_row_order(data: st.DataObject, folds: int, seed: int) -> None:
    rows = data.draw(st.integers(20, 150))
    generator = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    labels = generator.choice(6, rows, p=[0.5, 0.2, 0.15, 0.1, 0.03, 0.02])
    groups = np.array([f"P{i}" for i in generator.integers(0, rows // 2, rows)])
    try:
        fold = assign_folds(labels, groups, folds, seed)
    except DataError as error:
        assert "use more folds" in str(error) and folds == 2
        return
    assert set(fold.tolist()) == set(range(folds))
    for group in np.unique(groups):
        assert len(np.unique(fold[groups == group])) == 1
    for label in np.unique(labels):
        if len(np.unique(groups[labels == label])) > 1:
            assert len(np.unique(fold[labels == label])) > 1

    order = generator.permutation(rows)
    np.testing.assert_array_equal(assign_folds(labels[order], groups[order], folds, seed), fold[order])


def test_grouped_folds_have_similar_sizes() -> None:
    generator = np.random.default_rng(1)
    groups = generator.integers(0, 400, 1000).astype(str)
    labels = generator.choice(4, 1000, p=[0.6, 0.25, 0.1, 0.05])
    counts_by_fold = table(labels, assign_folds(labels, groups, 5, 0), 5)
    np.testing.assert_allclose(counts_by_fold, np.tile(counts_by_fold.mean(axis=0), (5, 1)), atol=2)


def test_rare_labels_have_more_weight() -> None:
    """Three patients fill three folds with common lesions; five patients with a rare one still get different folds."""
    content = [[0] * 20] * 3 + [[0, 1]] * 5 + [[0]] * 100
    labels = np.concatenate(content)
    groups = [f"P{i}" for i, rows in enumerate(content) for _ in rows]
    counts_by_fold = table(labels, assign_folds(labels, groups, 5, 0), 5)
    assert counts_by_fold[:, 1].tolist() == [1] * 5 and np.ptp(counts_by_fold[:, 0]) <= 1


@pytest.mark.parametrize("seed", range(6))
def test_patient_is_moved_where_greedy_placement_fails(seed: int) -> None:
    """Choosing the cheapest fold for each patient in turn would leave a label in one fold."""
    content = {"a": [0, 2, 2], "b": [2, 2, 1, 1], "c": [1, 0], "d": [1], "e": [2]}
    labels = np.concatenate(list(content.values()))
    groups = [name for name, rows in content.items() for _ in rows]
    assert (table(labels, assign_folds(labels, groups, 2, seed), 2) > 0).all()


def test_rare_label_of_large_groups_is_split() -> None:
    """Two patients with the rare label and many common lesions get different folds."""
    labels = np.array([1] + [0] * 50 + [1] + [0] * 50 + [0] * 10)
    groups = ["a"] * 51 + ["b"] * 51 + [f"s{i}" for i in range(10)]
    fold = assign_folds(labels, groups, 2, 0)
    assert fold[0] != fold[51]


def test_labels_that_cannot_be_spread_are_an_error() -> None:
    """Three patients, each with two of three labels: two folds leave a label without training rows, three do not."""
    labels, groups = np.array([0, 1, 1, 2, 2, 0]), ["a", "a", "b", "b", "c", "c"]
    with pytest.raises(DataError, match="use more folds"):
        assign_folds(labels, groups, 2, 0)
    assert sorted(set(assign_folds(labels, groups, 3, 0).tolist())) == [0, 1, 2]


def test_seed_unlabeled_rows_and_too_many_folds() -> None:
    labels = np.array([0] * 20 + [-1] * 5 + [1] * 7)
    groups = [f"L{i}" for i in range(len(labels))]
    fold = assign_folds(labels, groups, 3, 0)
    assert (fold[20:25] == -1).all() and (fold[labels >= 0] >= 0).all() and fold.dtype == np.int64
    assert (assign_folds(labels, groups, 3, 1) != fold).any()
    np.testing.assert_array_equal(
        assign_folds(labels[labels >= 0], np.array(groups)[labels >= 0], 3, 0), fold[labels >= 0]
    )
    with pytest.raises(DataError, match="5 folds need at least 5 groups of labeled lesions, there are 4"):
        assign_folds(np.zeros(8, int), ["a", "b", "c", "d"] * 2, 5, 0)


def test_split_parts_keeps_groups_together_and_spreads_each_label() -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), [90, 40, 9, 2])
    groups = np.array([f"g{i}" for i in range(len(labels))], object)
    groups[generator.choice(90, 20, replace=False)] = "patient"
    parts = split_parts(labels, groups, 5, seed=0)
    assert len(np.unique(parts[groups == "patient"])) == 1
    for label, least, most in ((1, 8, 8), (2, 1, 2), (3, 0, 1)):
        counts = np.bincount(parts[labels == label], minlength=5)
        assert least <= counts.min() and counts.max() <= most
    assert not (parts[labels == 3] == 0).any()  # too rare for early stopping: all its rows are needed for training


def test_split_parts_of_integers_are_those_of_names_in_the_same_order() -> None:
    generator = np.random.default_rng(0)
    labels, names = generator.integers(0, 4, 200), generator.integers(0, 80, 200).astype(str)
    numbers = np.unique(names, return_inverse=True)[1]
    np.testing.assert_array_equal(split_parts(labels, numbers, 5, 0), split_parts(labels, names.astype(object), 5, 0))


def slowly_assigned(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return the folds as they were first assigned, with an array of all labels for each group. Finished runs have
    these folds, so they must stay the same, in the rounding errors of the costs too.

    Raises DataError for labels that cannot be spread.
    """
    rows = np.flatnonzero(labels >= 0)
    names, group_of_row = np.unique(groups[rows], return_inverse=True)
    classes, class_of_row = np.unique(labels[rows], return_inverse=True)
    content = np.zeros((len(names), len(classes)), np.int64)
    np.add.at(content, (group_of_row, class_of_row), 1)
    totals, size = content.sum(axis=0), content.sum(axis=1)
    generator = np.random.default_rng(seed)
    shuffled, tie_break = generator.permutation(len(names)), generator.permutation(folds)
    counts, fold_of = np.zeros((folds, len(classes)), np.int64), np.empty(len(names), np.int64)
    large = shuffled[size[shuffled] > 1]
    for group in large[np.argsort(-size[large], kind="stable")]:
        cost = ((2 * counts + content[group]) * content[group] / totals).sum(axis=1)
        fold = fold_of[group] = np.lexsort((tie_break, counts.sum(axis=1), cost))[0]
        counts[fold] += content[group]
    singles = shuffled[size[shuffled] == 1]
    for label in np.argsort(totals, kind="stable"):
        members = singles[content[singles, label] > 0]
        for _ in members:
            fold = np.lexsort((tie_break, counts.sum(axis=1), counts[:, label]))[0]
            counts[fold, label] += 1
        before = counts[:, label] - content[large][:, label] @ (fold_of[large][:, None] == np.arange(folds))
        fold_of[members] = np.repeat(np.arange(folds), before)
    while True:
        confined = (counts > 0).sum(axis=0) == 1
        for group, new in product(large, range(folds)):
            trial = counts.copy()
            trial[fold_of[group]] -= content[group]
            trial[new] += content[group]
            fewer = ((trial > 0).sum(axis=0) == 1).sum() < confined.sum()
            if (content[group] * confined).any() and trial[fold_of[group]].sum() and fewer:
                counts, fold_of[group] = trial, new
                break
        else:
            break
    if any(confined[label] and (content[:, label] > 0).sum() > 1 for label in range(len(classes))):
        raise DataError("use more folds")
    result = np.full(len(labels), -1)
    result[rows] = fold_of[group_of_row]
    return result


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    folds=st.integers(2, 6),
    classes=st.integers(1, 12),
    size=st.integers(1, 9),
    at_once=st.sampled_from([1, 7, module.PLACED_AT_ONCE]),
)
def test_folds_are_those_that_were_assigned_slowly(
    data: st.DataObject, folds: int, classes: int, size: int, at_once: int
) -> None:
    generator = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    groups = np.repeat(generator.permutation(60), generator.integers(1, size + 1, 60))
    equally_frequent = data.draw(st.booleans())  # costs with rounding errors only
    shares = np.ones(classes) if equally_frequent else generator.dirichlet(np.ones(classes))
    labels = generator.choice(classes, len(groups), p=shares / shares.sum())
    if equally_frequent:
        labels = generator.permutation(np.arange(len(groups)) % classes)
    labels[generator.random(len(groups)) < data.draw(st.sampled_from([0, 0.1]))] = -1
    seed = data.draw(st.integers(0, 9))

    def outcome(assign: Callable[..., np.ndarray]) -> list[int] | None:
        try:
            return assign(labels, groups, folds, seed).tolist()
        except DataError:
            return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PLACED_AT_ONCE", at_once)
        assert outcome(assign_folds) == outcome(slowly_assigned)


def test_groups_as_numbers_in_their_order_give_the_folds_of_the_strings() -> None:
    generator = np.random.default_rng(2)
    labels, groups = generator.integers(-1, 4, 300), np.array([f"P{i}" for i in generator.integers(0, 150, 300)])
    numbers = np.unique(groups, return_inverse=True)[1].astype(np.int32)
    np.testing.assert_array_equal(assign_folds(labels, numbers, 5, 1), assign_folds(labels, groups, 5, 1))


@pytest.mark.parametrize("number", [0, 1, 9, 10, 11, 99, 100, 1234])
def test_decimal_order_is_that_of_the_strings(number: int) -> None:
    expected = np.argsort(np.argsort([str(each) for each in range(number)], kind="stable"), kind="stable")
    np.testing.assert_array_equal(decimal_order(number), expected)
