"""Several comparisons."""

import numpy as np
from scipy import stats

from triderm_dist import intervals
from triderm_dist.intervals import Interval


def test_correction_for_many_comparisons_is_that_of_holm() -> None:
    p = np.array([0.01, 0.04, 0.03, 0.005])
    np.testing.assert_allclose(intervals.holm(p), [0.03, 0.06, 0.06, 0.02])  # Holm (1979), by hand
    assert intervals.holm(np.array([0.7])) == [0.7] and intervals.holm(np.array([0.6, 0.7])).max() == 1


def test_differences_are_distinct_from_0_after_correction_for_their_number() -> None:
    """p of 0.012, 0.03 and 0.04 are all below 0.05; of three, Holm wants 0.0167 of the first and 0.025 of the next."""
    distances = stats.norm.isf(np.array([0.012, 0.03, 0.04]) / 2) / 1.959964
    differences = [Interval(-each, -each - 1, -each + 1) for each in distances]
    assert [each.excludes_zero for each in differences] == [True, True, True]
    assert intervals.beyond_noise(differences) == [True, False, False]
    assert intervals.beyond_noise(differences[::-1]) == [False, False, True]
    assert intervals.beyond_noise([Interval(0.0, 0.0, 0.0), Interval(0.1, 0.1, 0.1)]) == [False, True]
    assert intervals.beyond_noise([Interval(0.1, float("nan"), float("nan")), Interval(0.1, 0.1, 0.1)]) == [False, True]
    assert intervals.beyond_noise([]) == []
