"""Intervals of F1, macro F1 and their differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from triderm_dist import metrics
from triderm_dist.intervals.bootstrap import RESAMPLES, percentiles, resampled
from triderm_dist.intervals.interval import UNKNOWN, Interval
from triderm_dist.intervals.share import Proportion
from triderm_dist.intervals.units import Counts, count_units

_PRIOR_LESIONS = 0.5
"""Lesions per diagnosis, with the mean outcome over diagnoses, that `macro_f1_difference_draws` adds to a resample."""


def f1_per_class(decisions: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> list[Interval]:
    """Return F1 of each diagnosis with its interval; NaN for a diagnosis without a lesion.

    F1 = 2 J / (1 + J) rises with J = TP / (TP + FP + FN), and TP is binomial given TP + FP + FN. So the interval is
    that of a proportion: quantiles of Beta(TP + 2/3, FP + FN + 2/3), with the end 0 if TP = 0 and the end 1 if
    FP + FN = 0. Jeffreys' prior has 1/2 (Brown, Cai and DasGupta 2001) and covers more than 97% for rarely found
    diagnoses; 2/3 covers nearer to 95% there.
    """
    (units,), frequency = count_units([decisions], labels, groups)
    estimate = _F1.of(units, frequency, groups is not None)
    return [
        Interval(*(float(end) for end in ends)) if np.isfinite(ends[0]) else UNKNOWN
        for ends in zip(estimate.f1, estimate.low, estimate.high, strict=True)
    ]


def macro_f1(
    decisions: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None, kept: np.ndarray | None = None
) -> Interval:
    """Return macro F1 over the diagnoses that occur with its interval. kept: (C,) bool, the diagnoses to average over.

    Intervals of the diagnoses, as in `f1_per_class`, are combined by the method of variance estimates recovery (Zou
    and Donner 2008): each end is as far from the mean as the root of d' R d, where d are the distances of the ends of
    the diagnoses and R the correlations of their F1 to first order. The upper end also adds the bias of F1: it is
    concave in J, so few lesions give too small an F1 on average.
    """
    (units,), frequency = count_units([decisions], labels, groups)
    estimate = _F1.of(units, frequency, groups is not None)
    used = np.isfinite(estimate.f1) & (True if kept is None else np.asarray(kept, bool))
    if not used.any():
        return UNKNOWN
    f1, low, high = estimate.f1[used], estimate.low[used], estimate.high[used]
    influence = estimate.influence(units)[:, used]
    covariance = (influence * frequency[:, None]).T @ influence
    deviation = np.sqrt(np.diag(covariance))
    product = np.outer(deviation, deviation)
    correlation = np.divide(covariance, product, out=np.zeros_like(covariance), where=product > 0)
    np.fill_diagonal(correlation, 1.0)
    unbiased = np.minimum(f1 + estimate.bias[used], high)
    below, above = f1 - low, high - unbiased
    return Interval(
        float(f1.mean()),
        float(max(f1.mean() - np.sqrt(max(below @ correlation @ below, 0.0)) / len(f1), 0.0)),
        float(min(unbiased.mean() + np.sqrt(max(above @ correlation @ above, 0.0)) / len(f1), 1.0)),
    )


def macro_f1_difference(
    first: np.ndarray,
    second: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return macro F1 of `first` minus macro F1 of `second` on the same lesions, with its interval: the percentiles of
    `macro_f1_difference_draws`.
    """
    value = metrics.macro_f1(first, labels) - metrics.macro_f1(second, labels)
    return Interval(
        float(value), *percentiles(macro_f1_difference_draws(first, second, labels, groups, resamples, seed))
    )


def macro_f1_difference_draws(
    first: np.ndarray,
    second: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """Return (R,) draws of macro F1 of `first` minus macro F1 of `second` by an unstratified bootstrap.

    A diagnosis with few lesions often has no lesion in a resample, or none that only one of the two finds: half a
    lesion is added to each diagnosis, found by both, one or none in the mean proportions over the diagnoses (its counts
    are gamma distributed). Decisions that are equal differ by exactly 0.
    """
    (one, two), frequency = count_units([first, second], labels, groups)
    generator = np.random.default_rng(seed)
    columns = np.concatenate([one.true_positives, one.total, two.true_positives, two.total], axis=1)
    sums = resampled(columns, frequency, int(frequency.sum()), resamples, generator)
    one_found, one_total, two_found, two_total = np.split(sums, 4, axis=1)
    positives = frequency @ one.positives
    occurs = positives > 0
    both = frequency @ one.shared_true_positives
    outcomes = np.stack([both, frequency @ one.true_positives - both, frequency @ two.true_positives - both])[:, occurs]
    shares = (outcomes / positives[occurs]).mean(axis=1)
    shape = _PRIOR_LESIONS * np.append(shares, max(1 - shares.sum(), 0.0))
    added = generator.standard_gamma(np.broadcast_to(shape[:, None, None], (4, resamples, len(occurs))))

    def f1(found: np.ndarray, total: np.ndarray, more_found: np.ndarray, more_missed: np.ndarray) -> np.ndarray:
        return metrics.ratio(2 * (found + more_found), total + 2 * more_found + more_missed)[:, occurs]

    draws = f1(one_found, one_total, added[0] + added[1], added[2] + added[3])
    draws -= f1(two_found, two_total, added[0] + added[2], added[1] + added[3])
    return np.asarray(np.nanmean(draws, axis=1))


def spread(
    decisions: np.ndarray,
    labels: np.ndarray,
    lesions: int,
    groups: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the median and the range that 95% of test sets of about `lesions` such lesions would show as macro F1.

    Test sets are drawn from these lesions with replacement, group by group; macro F1 is over the diagnoses that occur.
    """
    (counts,), frequency = count_units([decisions], labels, groups)
    drawn = max(1, round(lesions * frequency.sum() / (frequency @ counts.positives.sum(axis=1))))
    scores = _macro_f1_draws([counts], frequency, drawn, resamples, seed)[:, 0]
    return Interval(float(np.median(scores)), *percentiles(scores))


def macro_f1_draws(
    tables: Sequence[np.ndarray],
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """Return (R, T) macro F1 of T decision tables on the same unstratified bootstrap resamples."""
    units, frequency = count_units(list(tables), labels, groups)
    return _macro_f1_draws(units, frequency, int(frequency.sum()), resamples, seed)


def _macro_f1_draws(
    tables: Sequence[Counts], frequency: np.ndarray, drawn: int, resamples: int, seed: int
) -> np.ndarray:
    """Return (R, T) macro F1 of T tables over the diagnoses that occur in each resample of so many units."""
    columns = np.concatenate(
        [tables[0].positives, *(part for each in tables for part in (each.true_positives, each.total))], 1
    )
    sums = resampled(columns, frequency, drawn, resamples, np.random.default_rng(seed))
    positives, *parts = np.split(sums, 1 + 2 * len(tables), axis=1)
    f1 = np.stack([metrics.ratio(2 * found, total) for found, total in zip(parts[::2], parts[1::2], strict=True)], 1)
    f1[np.broadcast_to((positives == 0)[:, None], f1.shape)] = np.nan
    return np.asarray(np.nanmean(f1, axis=2))


@dataclass(frozen=True)
class _F1:
    """F1 of each diagnosis, all (C,): value, its interval's ends, bias to second order, and predicted + positives."""

    f1: np.ndarray
    low: np.ndarray
    high: np.ndarray
    bias: np.ndarray
    total: np.ndarray

    @staticmethod
    def of(units: Counts, frequency: np.ndarray, grouped: bool) -> _F1:
        occurs = frequency @ units.positives > 0
        share = Proportion.of(
            units.true_positives, units.total - units.true_positives, frequency, grouped
        )  # TP / (TP + FP + FN)
        found, union = np.where(occurs, share.part, 0.0), np.where(occurs, share.total, 1.0)
        smooth = (found + 0.5) / (union + 1)
        bias = 2 * smooth * (1 - smooth) / (1 + smooth) ** 3 / union  # minus half of F1'' times the variance of J
        values = [2 * j / (1 + j) for j in (share.value, share.low, share.high)]
        f1, low, high = (np.where(occurs, value, np.nan) for value in values)
        return _F1(f1, low, high, bias, np.where(occurs, frequency @ units.total, 1.0))

    def influence(self, units: Counts) -> np.ndarray:
        """Return (U, C), the change of F1 by a unit, to first order."""
        return np.asarray((2 * units.true_positives - self.f1 * units.total) / self.total)
