"""Intervals of means over lesions and over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from triderm_dist.intervals.interval import NORMAL, Interval
from triderm_dist.intervals.units import group_numbers


def mean(values: np.ndarray, groups: np.ndarray | None = None) -> Interval:
    """Return the mean of the values (N,) of lesions with its normal interval."""
    value = float(values.mean())
    half = NORMAL * float(np.sqrt(variance_of_mean(values - value, groups)))
    return Interval(value, value - half, value + half)


def student_mean(values: Sequence[float] | np.ndarray) -> Interval:
    """Return the mean of independent values with Student's interval, NaN ends for fewer than two."""
    from scipy import stats

    mean, half = float(np.mean(values)), float("nan")
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def mean_over_seeds(differences: Sequence[Interval]) -> Interval:
    """Return the mean of a difference measured with several seeds, with an interval over lesions and seeds.

    differences: of each seed, with its interval over the same lesions. Each end is as far from the mean as the root of
    the sum of two squares: the mean distance of the seeds' ends, and Student's interval of the mean over seeds. NaN
    ends for a single seed, which says nothing about others.
    """
    seeds = student_mean([each.value for each in differences])
    below = np.hypot(np.mean([each.value - each.low for each in differences]), seeds.value - seeds.low)
    above = np.hypot(np.mean([each.high - each.value for each in differences]), seeds.high - seeds.value)
    return Interval(seeds.value, float(seeds.value - below), float(seeds.value + above))


def variance_of_mean(residuals: np.ndarray, groups: np.ndarray | None) -> float:
    """Return the variance of the mean of values whose distances from it are (N,); over groups if they are given."""
    sums = residuals if groups is None else np.bincount(group_numbers(groups), residuals)
    return float((sums**2).sum() / len(residuals) ** 2 * len(sums) / max(len(sums) - 1, 1))
