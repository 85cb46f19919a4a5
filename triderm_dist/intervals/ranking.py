"""Intervals of the area under the ROC curve and of average precision."""

from __future__ import annotations

import numpy as np

from triderm_dist import metrics
from triderm_dist.intervals.interval import NORMAL, UNKNOWN, Interval
from triderm_dist.intervals.means import variance_of_mean
from triderm_dist.intervals.share import Proportion

_ROC_PRIOR, _AP_PRIOR = 12, 3
"""Weights of the simpler variance in `area_under_roc` and `average_precision`, in lesions of the rarer kind."""


def area_under_roc(ranking: metrics.Ranking, groups: np.ndarray | None = None) -> Interval:
    """Return the area under the ROC curve with its interval; NaN without both kinds.

    The ends are the areas whose distance from the value is 1.96 standard deviations: Hanley and McNeil's variance at
    these ends (Newcombe 2006, method 5), times the ratio of the variance of DeLong et al. (1988) to it. The ratio is
    shrunk toward 1 with the weight of 12 lesions of the rarer kind, of which DeLong's variance alone needs many.
    """
    from scipy.optimize import brentq

    value, few, many = ranking.area_under_roc, *sorted((ranking.positives, ranking.negatives))
    if np.isnan(value):
        return UNKNOWN
    shares = np.where(ranking.positive, ranking.positives, ranking.negatives)
    influence = (ranking.placements - value) * len(shares) / np.sqrt(shares * np.maximum(shares - 1, 1))
    inside = min(max(value, 0.5 / (few + 1)), 1 - 0.5 / (few + 1))
    ratio = variance_of_mean(influence, groups) / _hanley_mcneil(inside, few, many)
    ratio = (few * ratio + _ROC_PRIOR) / (few + _ROC_PRIOR)

    def end(outer: float) -> float:
        """Return the root between the value and 0 or 1; where the value is 0 or 1, it is a root itself."""

        def excess(area: float) -> float:
            return (area - value) ** 2 - NORMAL**2 * ratio * _hanley_mcneil(area, few, many)

        near = value + (outer - value) * 1e-9
        return outer if near == outer else float(brentq(excess, near, outer))

    return Interval(value, end(0.0), end(1.0))


def average_precision(ranking: metrics.Ranking, groups: np.ndarray | None = None) -> Interval:
    """Return average precision with its interval; NaN without a positive.

    Quantiles of Beta(n v + 2/3, n (1 - v) + 2/3), where v is the value and n the number of independent lesions whose
    share would have its variance: to first order by the influence of each lesion, averaged with v (1 - v) / positives
    (Boyd, Eng and Page 2013) with the weight of three positives. Normal and logit intervals cover less where these are
    few.
    """
    value, positives = ranking.average_precision, ranking.positives
    if np.isnan(value):
        return UNKNOWN
    if value == 1:
        return Proportion.single(positives, positives, value)
    binomial = value * (1 - value) / positives
    variance = variance_of_mean(_average_precision_influence(ranking), groups)
    variance = (positives * variance + _AP_PRIOR * binomial) / (positives + _AP_PRIOR)
    equivalent = value * (1 - value) / variance
    return Proportion.single(value * equivalent, equivalent, value)


def _hanley_mcneil(area: float, few: int, many: int) -> float:
    """Return the variance of an area under the ROC curve (Hanley and McNeil 1982), made symmetric by Newcombe."""
    mean_size = (few + many) / 2 - 1
    return area * (1 - area) * (1 + mean_size * ((1 - area) / (2 - area) + area / (1 + area))) / (few * many)


def _average_precision_influence(ranking: metrics.Ranking) -> np.ndarray:
    """Return (N,) the change of average precision by a lesion, to first order, times the number of lesions.

    A lesion counts by its own precision, by the precision of the positives ranked at or below it, which it raises if
    it is positive, and by the share of the lesions ranked at or above those, which it raises in any case.
    """
    lesions, positives = len(ranking.positive), ranking.positives
    precision = ranking.true_positives / ranking.predicted
    found = np.diff(ranking.true_positives, prepend=0)

    def from_rank_on(values: np.ndarray) -> np.ndarray:
        return np.cumsum(values[::-1])[::-1][ranking.rank]

    share = lesions / positives
    own = np.where(ranking.positive, share * (precision[ranking.rank] - ranking.average_precision), 0.0)
    raised = np.where(ranking.positive, from_rank_on(found / ranking.predicted), 0.0)
    return np.asarray(own + share * (raised - from_rank_on(found * precision / ranking.predicted)))
