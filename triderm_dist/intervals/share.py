"""Intervals of shares: rates of yes/no decisions and predictive values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from triderm_dist import metrics
from triderm_dist.intervals.interval import Interval
from triderm_dist.intervals.units import group_numbers
from triderm_dist.schema import UNLABELED

_PRIOR = 2 / 3
"""Added to both counts of a proportion."""


@dataclass(frozen=True)
class Rates:
    """Rates of a yes/no decision with their intervals: sensitivity, specificity, predictive values."""

    sensitivity: Interval
    specificity: Interval
    positive_predictive_value: Interval
    negative_predictive_value: Interval


def rates_per_class(decisions: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> list[Rates]:
    """Return the `rates` of each diagnosis against all others."""
    known = labels != UNLABELED
    columns, labels = np.asarray(decisions, bool)[known].T, labels[known]
    groups = None if groups is None else groups[known]
    return [rates(column, labels == label, groups) for label, column in enumerate(columns)]


def rates(decided: np.ndarray, positive: np.ndarray, groups: np.ndarray | None = None) -> Rates:
    """Return the rates of yes/no decisions (N,) bool about lesions that are `positive` (N,) bool; NaN without a lesion.

    Quantiles of Beta(part + 2/3, rest + 2/3), as in `f1_per_class`, with the end 0 or 1 where no or every lesion does.
    """
    outcome = 2 * decided.astype(np.int64) + positive
    units, frequency = np.eye(4), np.bincount(outcome, minlength=4).astype(float)
    if groups is not None:
        codes = group_numbers(groups)
        units = np.bincount(4 * codes + outcome, minlength=4 * (codes.max(initial=-1) + 1)).reshape(-1, 4).astype(float)
        frequency = np.ones(len(units))
    true_negative, missed, false_alarm, found = units.T[:, :, None]
    pairs = (
        (found, found + missed),
        (true_negative, true_negative + false_alarm),
        (found, found + false_alarm),
        (true_negative, true_negative + missed),
    )
    return Rates(*(Proportion.of(part, total, frequency, groups is not None).intervals()[0] for part, total in pairs))


def shares(part: np.ndarray, total: np.ndarray) -> list[Interval]:
    """Return part / total of independent lesions (B,) each, with intervals as in `f1_per_class`."""
    return Proportion.from_counts(part, total).intervals()


def predictive_values(
    decided: np.ndarray, positive: np.ndarray, prevalences: Sequence[float], groups: np.ndarray | None = None
) -> tuple[list[Interval], list[Interval]]:
    """Return positive and negative predictive value of yes/no decisions (N,) bool at other prevalences.

    The logit of a predictive value is a sum of the logs of two rates and of the odds (Mercaldo, Lau and Zhou 2007). The
    intervals of the rates are combined by the method of variance estimates recovery, around rates to whose counts 2/3
    are added.
    """
    of_run = rates(decided, positive, groups)
    sensitivity, specificity = of_run.sensitivity, of_run.specificity
    values = metrics.predictive_values(sensitivity.value, specificity.value, np.asarray(prevalences))
    odds = np.log(np.asarray(prevalences)) - np.log1p(-np.asarray(prevalences))
    called, passed = decided[positive], ~decided[~positive]
    return (
        _predictive_value(values[0], odds, (sensitivity, called), (_complement(specificity), ~passed)),
        _predictive_value(values[1], -odds, (specificity, passed), (_complement(sensitivity), ~called)),
    )


def _predictive_value(
    values: np.ndarray, odds: np.ndarray, right: tuple[Interval, np.ndarray], wrong: tuple[Interval, np.ndarray]
) -> list[Interval]:
    """Return the intervals of the shares (P,) of right calls. right, wrong: a rate, and the calls it is the mean of."""
    with np.errstate(divide="ignore"):
        (low, middle, high), (wrong_low, wrong_middle, wrong_high) = (
            np.log([rate.low, (calls.sum() + _PRIOR) / (len(calls) + 2 * _PRIOR), rate.high])
            for rate, calls in (right, wrong)
        )
    center = middle - wrong_middle + odds
    lower = 1 / (1 + np.exp(np.hypot(middle - low, wrong_high - wrong_middle) - center))
    upper = 1 / (1 + np.exp(-np.hypot(high - middle, wrong_middle - wrong_low) - center))
    ends = zip(values, np.fmin(lower, values), np.fmax(upper, values), strict=True)
    return [Interval(*(float(end) for end in each)) for each in ends]


def _complement(interval: Interval) -> Interval:
    return Interval(1 - interval.value, 1 - interval.high, 1 - interval.low)


@dataclass(frozen=True)
class Proportion:
    """Shares part / total with the ends of their intervals, all (C,); NaN where total is 0.

    part, total: effective counts, of independent lesions with as much information.
    """

    part: np.ndarray
    total: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @staticmethod
    def of(parts: np.ndarray, totals: np.ndarray, frequency: np.ndarray, grouped: bool) -> Proportion:
        """Take the shares of units (U, C) with their frequency (U,)."""
        part, total = frequency @ parts, frequency @ totals
        if grouped:  # to the effective sample size
            effect = _design_effect(parts, totals, frequency)
            part, total = part / effect, total / effect
        return Proportion.from_counts(part, total)

    @staticmethod
    def from_counts(part: np.ndarray, total: np.ndarray) -> Proportion:
        from scipy.special import betaincinv

        rest = total - part
        low = np.where(part > 0, betaincinv(part + _PRIOR, rest + _PRIOR, 0.025), 0.0)
        high = np.where(rest > 0, betaincinv(part + _PRIOR, rest + _PRIOR, 0.975), 1.0)
        value = metrics.ratio(part, total)  # NaN where total is 0
        return Proportion(part, total, np.minimum(low, value), np.maximum(high, value))

    @staticmethod
    def single(part: float, total: float, value: float) -> Interval:
        """Return the interval of a single share. value: part / total before rounding."""
        share = Proportion.from_counts(np.array([part]), np.array([total]))
        return Interval(value, min(float(share.low[0]), value), max(float(share.high[0]), value))

    @property
    def value(self) -> np.ndarray:
        return metrics.ratio(self.part, self.total)

    def intervals(self) -> list[Interval]:
        ends = zip(self.value, self.low, self.high, strict=True)
        return [Interval(float(value), float(low), float(high)) for value, low, high in ends]


def _design_effect(part: np.ndarray, total: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """Return (C,) variance of part / total over groups (U, C), divided by the variance over independent lesions; >= 1.

    Where the share is 0 or 1 it is unknown, and the largest possible is taken: that of groups which agree throughout.
    """
    parts, totals = frequency @ part, frequency @ total
    share = metrics.ratio(parts, totals)
    units = frequency.sum()
    residuals = frequency @ (part - share * total) ** 2 * units / max(units - 1, 1)
    effect = metrics.ratio(residuals, totals * share * (1 - share))
    agreeing = metrics.ratio(frequency @ total**2, totals)
    certain = (parts == 0) | (parts == totals)
    return np.maximum(np.nan_to_num(np.where(certain, agreeing, effect), nan=1.0), 1.0)
