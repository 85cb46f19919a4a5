"""95% intervals of macro F1, of paired differences, of one diagnosis, of a slice, and of any other metric.

Every interval is over lesions; where lesions share a group (a patient), it is over groups. The methods were chosen by
their measured coverage: `python -m benchmarks.coverage`. What they have in common: a diagnosis of which none or all of
a few lesions were found still has an interval.

Shapes: N lesions, C diagnoses, U units (distinct rows of the counts of a lesion or group), R resamples. Labels are
(N,) int64, rows with `UNLABELED` are left out; decisions (N, C) bool; groups (N,) of any type, None if each lesion
is its own.
"""

from triderm_dist.intervals.bootstrap import RESAMPLES, metric_draws, of_metrics, percentiles
from triderm_dist.intervals.comparisons import beyond_noise, holm
from triderm_dist.intervals.f1 import (
    f1_per_class,
    macro_f1,
    macro_f1_difference,
    macro_f1_difference_draws,
    macro_f1_draws,
    spread,
)
from triderm_dist.intervals.interval import MOST_DECIMALS, UNKNOWN, Interval
from triderm_dist.intervals.means import mean, mean_over_seeds, student_mean
from triderm_dist.intervals.ranking import area_under_roc, average_precision
from triderm_dist.intervals.share import Rates, predictive_values, rates, rates_per_class, shares
from triderm_dist.intervals.units import group_numbers

__all__ = [
    "MOST_DECIMALS",
    "RESAMPLES",
    "UNKNOWN",
    "Interval",
    "Rates",
    "area_under_roc",
    "average_precision",
    "beyond_noise",
    "f1_per_class",
    "group_numbers",
    "holm",
    "macro_f1",
    "macro_f1_difference",
    "macro_f1_difference_draws",
    "macro_f1_draws",
    "mean",
    "mean_over_seeds",
    "metric_draws",
    "of_metrics",
    "percentiles",
    "predictive_values",
    "rates",
    "rates_per_class",
    "shares",
    "spread",
    "student_mean",
]
