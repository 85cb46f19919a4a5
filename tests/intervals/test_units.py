"""Distinct units of lesions and groups."""

import numpy as np
import pytest

from triderm_dist import intervals
from triderm_dist.intervals.units import count_units


def test_groups_are_numbered_in_the_order_of_their_names() -> None:
    generator = np.random.default_rng(0)
    for values in (np.array(["b", "ä", "Z", "🙂", "", "\uffff", "a b"], object), np.array([3, -1, 10**12], object)):
        groups = generator.choice(values, 50)
        numbers = intervals.group_numbers(groups)
        np.testing.assert_array_equal(numbers, np.unique(groups, return_inverse=True)[1])
        np.testing.assert_array_equal(
            numbers, intervals.group_numbers(groups.astype(str) if values[0] == "b" else groups.astype(int))
        )


@pytest.mark.parametrize("values", [[], [0], [7, 3, 3, 0], [2, 10**9, 2], [-1, 5, -1]])
def test_groups_as_integers_are_numbered_in_their_order(values: list[int]) -> None:
    groups = np.array(values, np.int64)
    numbers = intervals.group_numbers(groups)
    np.testing.assert_array_equal(numbers, np.unique(groups, return_inverse=True)[1])
    assert numbers.dtype == np.int64
    np.testing.assert_array_equal(intervals.group_numbers(numbers.astype(np.int32)), numbers)


def test_units_are_the_distinct_sums_of_counts_over_groups() -> None:
    generator = np.random.default_rng(0)
    for lesions, number in ((60, 60), (60, 15), (200, 3), (1, 1)):
        labels, groups = generator.integers(0, 3, lesions), generator.integers(0, number, lesions)
        decisions = generator.random((lesions, 3)) < 0.4
        (counts,), frequency = count_units([decisions], labels, groups)
        truth = labels[:, None] == np.arange(3)
        rows = np.concatenate([truth & decisions, truth.astype(int) + decisions, truth], axis=1)
        expected = [rows[groups == group].sum(axis=0) for group in np.unique(groups)]
        distinct, times = np.unique(expected, axis=0, return_counts=True)
        np.testing.assert_array_equal(
            np.concatenate([counts.true_positives, counts.total, counts.positives], axis=1), distinct
        )
        np.testing.assert_array_equal(frequency, times)
