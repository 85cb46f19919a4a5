"""Means over lesions and seeds."""

import numpy as np
import pytest
from scipy import stats

from triderm_dist import intervals
from triderm_dist.intervals import Interval


def test_student_interval_of_seeds() -> None:
    values = [0.45, 0.41, 0.47]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    found = intervals.student_mean(values)
    np.testing.assert_allclose([found.value, found.low, found.high], [np.mean(values), low, high])
    assert np.isnan(intervals.student_mean([0.4]).low)


def test_interval_over_lesions_and_seeds() -> None:
    same = intervals.mean_over_seeds([Interval(0.02, 0.01, 0.04)] * 3)
    np.testing.assert_allclose([same.value, same.low, same.high], [0.02, 0.01, 0.04])
    differing = [Interval(value, value - 0.01, value + 0.02) for value in (0.0, 0.02, 0.04)]
    half = stats.t.ppf(0.975, 2) * 0.02 / np.sqrt(3)
    found = intervals.mean_over_seeds(differing)
    np.testing.assert_allclose([found.low, found.high], [0.02 - np.hypot(0.01, half), 0.02 + np.hypot(0.02, half)])
    assert np.isnan(intervals.mean_over_seeds(differing[:1]).low)


def test_mean_of_lesions_has_the_normal_interval() -> None:
    values = np.random.default_rng(0).random(500)
    interval = intervals.mean(values)
    assert interval.value == values.mean()
    assert interval.high - interval.value == pytest.approx(1.96 * values.std(ddof=1) / np.sqrt(500), rel=1e-4)
