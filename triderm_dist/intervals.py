"""95% intervals of macro F1, of paired differences, of one diagnosis, of a slice, and of any other metric.

Every interval is over lesions; where lesions share a group (a patient), it is over groups. The methods were chosen by
their measured coverage: `python -m benchmarks.coverage`. What they have in common: a diagnosis of which none or all of
a few lesions were found still has an interval.

Shapes: N lesions, C diagnoses, U units (distinct rows of the counts of a lesion or group), R resamples. Labels are
(N,) int64, rows with `UNLABELED` are left out; decisions (N, C) bool; groups (N,) of any type, None if each lesion
is its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from triderm_dist import metrics
from triderm_dist.schema import UNLABELED, DataError

RESAMPLES = 1000
CONFIDENCE = 0.95
MOST_DECIMALS = 6
"""Of a difference, see `Interval.decimals`."""
LARGEST_RESAMPLE = 10_000
"""Lesions or groups of a bootstrap resample, at most, where a metric is computed anew on each."""
_RESAMPLES_AT_ONCE = 64
_MANY_UNITS, _SEVERAL = 20_000, 16
"""Of more units than the first number, those that occur as often as the second or less are drawn one by one."""
_NORMAL = 1.959963984540054
_PRIOR = 2 / 3
"""Added to both counts of a proportion."""
_PRIOR_LESIONS = 0.5
"""Lesions per diagnosis, with the mean outcome over diagnoses, that `difference_draws` adds to a resample."""
_ROC_PRIOR, _AP_PRIOR = 12, 3
"""Weights of the simpler variance in `area_under_roc` and `average_precision`, in lesions of the rarer kind."""


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def excludes_zero(self) -> bool:
        """Whether both ends are on one side of 0: a difference beyond the noise."""
        return self.low > 0 or self.high < 0

    def decimals(self, least: int = 3) -> int:
        """Return with how many decimals a difference is written: `least`, or more, up to `MOST_DECIMALS`, where its
        interval is narrower, or where the end next to 0, which it excludes, would look like 0.
        """
        lengths = [
            (self.high - self.low) / 2,
            *([2 * min(abs(self.low), abs(self.high))] if self.excludes_zero else []),
        ]
        needed = (math.ceil(-math.log10(length)) for length in lengths if length > 0)
        return min(max(least, *needed, 0), MOST_DECIMALS)

    def signed(self) -> tuple[str, str, str]:
        """Return the texts of a difference and of the ends of its interval."""
        spec = f"+.{self.decimals()}f"
        return format(self.value, spec), format(self.low, spec), format(self.high, spec)

    def json(self) -> dict[str, float]:
        return asdict(self)


UNKNOWN = Interval(float("nan"), float("nan"), float("nan"))


def f1_per_class(decisions: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> list[Interval]:
    """Return F1 of each diagnosis with its interval; NaN for a diagnosis without a lesion.

    F1 = 2 J / (1 + J) rises with J = TP / (TP + FP + FN), and TP is binomial given TP + FP + FN. So the interval is
    that of a proportion: quantiles of Beta(TP + 2/3, FP + FN + 2/3), with the end 0 if TP = 0 and the end 1 if
    FP + FN = 0. Jeffreys' prior has 1/2 (Brown, Cai and DasGupta 2001) and covers more than 97% for rarely found
    diagnoses; 2/3 covers nearer to 95% there.
    """
    (units,), frequency = _units([decisions], labels, groups)
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
    (units,), frequency = _units([decisions], labels, groups)
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


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return macro F1 of `first` minus macro F1 of `second` on the same lesions, with its interval: the percentiles of
    `difference_draws`.
    """
    value = metrics.macro_f1(first, labels) - metrics.macro_f1(second, labels)
    return Interval(float(value), *percentiles(difference_draws(first, second, labels, groups, resamples, seed)))


def difference_draws(
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
    (one, two), frequency = _units([first, second], labels, groups)
    generator = np.random.default_rng(seed)
    columns = np.concatenate([one.found, one.total, two.found, two.total], axis=1)
    sums = _resampled(columns, frequency, int(frequency.sum()), resamples, generator)
    one_found, one_total, two_found, two_total = np.split(sums, 4, axis=1)
    positives = frequency @ one.positives
    occurs = positives > 0
    both = frequency @ one.both
    outcomes = np.stack([both, frequency @ one.found - both, frequency @ two.found - both])[:, occurs]
    shares = (outcomes / positives[occurs]).mean(axis=1)
    shape = _PRIOR_LESIONS * np.append(shares, max(1 - shares.sum(), 0.0))
    added = generator.standard_gamma(np.broadcast_to(shape[:, None, None], (4, resamples, len(occurs))))

    def f1(found: np.ndarray, total: np.ndarray, more_found: np.ndarray, more_missed: np.ndarray) -> np.ndarray:
        return metrics.ratio(2 * (found + more_found), total + 2 * more_found + more_missed)[:, occurs]

    draws = f1(one_found, one_total, added[0] + added[1], added[2] + added[3])
    draws -= f1(two_found, two_total, added[0] + added[2], added[1] + added[3])
    return np.asarray(np.nanmean(draws, axis=1))


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
        units = np.bincount(4 * codes + outcome, minlength=4 * (codes.max() + 1)).reshape(-1, 4).astype(float)
        frequency = np.ones(len(units))
    true_negative, missed, false_alarm, found = units.T[:, :, None]
    pairs = (
        (found, found + missed),
        (true_negative, true_negative + false_alarm),
        (found, found + false_alarm),
        (true_negative, true_negative + missed),
    )
    return Rates(*(_Share.of(part, whole, frequency, groups is not None).intervals()[0] for part, whole in pairs))


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
    ratio = _variance_of_mean(influence, groups) / _hanley_mcneil(inside, few, many)
    ratio = (few * ratio + _ROC_PRIOR) / (few + _ROC_PRIOR)

    def end(outer: float) -> float:
        """Return the root between the value and 0 or 1; where the value is 0 or 1, it is a root itself."""

        def excess(area: float) -> float:
            return (area - value) ** 2 - _NORMAL**2 * ratio * _hanley_mcneil(area, few, many)

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
        return _Share.alone(positives, positives, value)
    binomial = value * (1 - value) / positives
    variance = _variance_of_mean(_average_precision_influence(ranking), groups)
    variance = (positives * variance + _AP_PRIOR * binomial) / (positives + _AP_PRIOR)
    equivalent = value * (1 - value) / variance
    return _Share.alone(value * equivalent, equivalent, value)


def mean(values: np.ndarray, groups: np.ndarray | None = None) -> Interval:
    """Return the mean of the values (N,) of lesions with its normal interval."""
    value = float(values.mean())
    half = _NORMAL * float(np.sqrt(_variance_of_mean(values - value, groups)))
    return Interval(value, value - half, value + half)


def holm(p: np.ndarray) -> np.ndarray:
    """Adjust p-values (m,) for their number (Holm 1979): the k-th smallest is multiplied by m - k + 1.

    Where nothing differs, the probability that any adjusted p-value is below a level is at most that level, however the
    comparisons depend on one another.
    """
    order = np.argsort(p, kind="stable")
    result = np.empty(len(p))
    result[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return result


def beyond_noise(differences: Sequence[Interval], level: float = 0.05) -> list[bool]:
    """Return which of several differences are distinct from 0, corrected for their number (`holm`).

    Their intervals are taken as normal.
    """
    from scipy.stats import norm

    halves = np.array([(each.high - each.low) / 2 for each in differences])
    distances = np.abs([each.value for each in differences])
    z = np.divide(_NORMAL * distances, halves, out=np.where(distances > 0, np.inf, 0.0), where=halves > 0)
    return [bool(p <= level) for p in holm(2 * norm.sf(z))]


def shares(part: np.ndarray, whole: np.ndarray) -> list[Interval]:
    """Return part / whole of independent lesions (B,) each, with intervals as in `f1_per_class`."""
    return _Share.from_counts(part, whole).intervals()


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


def of_metrics(
    functions: Mapping[str, metrics.Metric],
    probabilities: np.ndarray,
    labels: np.ndarray,
    decisions: np.ndarray,
    groups: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return metrics of labeled lesions with the percentiles of an unstratified bootstrap over lesions or groups."""
    table = probabilities, labels, decisions
    draws = metric_draws(functions, *table, groups, resamples, seed)
    return {name: Interval(metric.function(*table), *percentiles(draws[name])) for name, metric in functions.items()}


def metric_draws(
    functions: Mapping[str, metrics.Metric],
    probabilities: np.ndarray,
    labels: np.ndarray,
    decisions: np.ndarray,
    groups: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Return the (R,) bootstrap draws of metrics of labeled lesions, which are drawn with replacement by group.

    The same resamples are drawn for all tables of equal groups and seed, so that the draws of two tables may be
    subtracted. Of more than `LARGEST_RESAMPLE` units, m = `LARGEST_RESAMPLE` are drawn, and the distances of the draws
    from their mean are multiplied by sqrt(m / U) (m out of n bootstrap, Bickel, Goetze and van Zwet 1997).
    """
    generator = np.random.default_rng(seed)
    codes = np.arange(len(labels)) if groups is None else group_numbers(groups)
    order = np.argsort(codes, kind="stable")
    sizes = np.bincount(codes)
    starts = np.cumsum(sizes) - sizes
    units = min(len(sizes), LARGEST_RESAMPLE)
    draws = {name: np.empty(resamples) for name in functions}
    for number in range(resamples):
        drawn = generator.integers(0, len(sizes), units)
        within = np.arange(sizes[drawn].sum()) - np.repeat(np.cumsum(sizes[drawn]) - sizes[drawn], sizes[drawn])
        rows = order[np.repeat(starts[drawn], sizes[drawn]) + within]
        resample = probabilities[rows], labels[rows], decisions[rows]
        for name, metric in functions.items():
            draws[name][number] = metric.function(*resample)
    if units < len(sizes):
        for name, values in draws.items():
            center = functions[name].function(probabilities, labels, decisions)
            draws[name] = center + (values - np.nanmean(values)) * np.sqrt(units / len(sizes))
    return draws


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
    (counts,), frequency = _units([decisions], labels, groups)
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
    units, frequency = _units(list(tables), labels, groups)
    return _macro_f1_draws(units, frequency, int(frequency.sum()), resamples, seed)


def _macro_f1_draws(
    tables: Sequence[_Counts], frequency: np.ndarray, drawn: int, resamples: int, seed: int
) -> np.ndarray:
    """Return (R, T) macro F1 of T tables over the diagnoses that occur in each resample of so many units."""
    columns = np.concatenate([tables[0].positives, *(part for each in tables for part in (each.found, each.total))], 1)
    sums = _resampled(columns, frequency, drawn, resamples, np.random.default_rng(seed))
    positives, *parts = np.split(sums, 1 + 2 * len(tables), axis=1)
    f1 = np.stack([metrics.ratio(2 * found, total) for found, total in zip(parts[::2], parts[1::2], strict=True)], 1)
    f1[np.broadcast_to((positives == 0)[:, None], f1.shape)] = np.nan
    return np.asarray(np.nanmean(f1, axis=2))


def _resampled(
    units: np.ndarray, frequency: np.ndarray, drawn: int, resamples: int, generator: np.random.Generator
) -> np.ndarray:
    """Return the sums (R, K) of columns of the units (U, K) over resamples of so many units, with replacement.

    Of many distinct units most occur once or a few times. How many of all of these are in a resample is drawn together
    with the frequent ones, then which: one number for each, in less time than a binomial number for every unit.
    """
    rare = frequency <= (_SEVERAL if len(frequency) > _MANY_UNITS else 0)
    frequent, singles = units[~rare], np.repeat(np.arange(rare.sum()), frequency[rare])
    sizes = np.append(frequency[~rare], len(singles)) if len(singles) else frequency
    sums = []
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        number = min(_RESAMPLES_AT_ONCE, resamples - start)
        counts = generator.multinomial(drawn, sizes / frequency.sum(), size=number)
        part = counts[:, : len(frequent)].astype(float) @ frequent
        if len(singles):
            picked = [singles[generator.integers(0, len(singles), many)] for many in counts[:, -1]]
            times = np.stack([np.bincount(each, minlength=rare.sum()) for each in picked])
            part += times.astype(float) @ units[rare]
        sums.append(part)
    return np.concatenate(sums)


def of_mean(values: Sequence[float] | np.ndarray) -> Interval:
    """Return the mean of independent values with Student's interval, NaN ends for fewer than two."""
    from scipy import stats

    mean, half = float(np.mean(values)), float("nan")
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def over_seeds(differences: Sequence[Interval]) -> Interval:
    """Return the mean of a difference measured with several seeds, with an interval over lesions and seeds.

    differences: of each seed, with its interval over the same lesions. Each end is as far from the mean as the root of
    the sum of two squares: the mean distance of the seeds' ends, and Student's interval of the mean over seeds. NaN
    ends for a single seed, which says nothing about others.
    """
    seeds = of_mean([each.value for each in differences])
    below = np.hypot(np.mean([each.value - each.low for each in differences]), seeds.value - seeds.low)
    above = np.hypot(np.mean([each.high - each.value for each in differences]), seeds.high - seeds.value)
    return Interval(seeds.value, float(seeds.value - below), float(seeds.value + above))


def percentiles(draws: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the quantiles of bootstrap draws (R,) between which the share `confidence` of them lies, by default the
    2.5% and 97.5% ones; NaN where more than one in twenty is not finite.
    """
    finite = draws[np.isfinite(draws)]
    if not len(finite) or len(finite) < 0.95 * len(draws):
        return float("nan"), float("nan")
    tail = round((1 - confidence) / 2, 12)
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class _Counts:
    """Lesions per unit and diagnosis, all (U, C): found (true positives), predicted + positives, positives, and found
    by this table and the other of a pair."""

    found: np.ndarray
    total: np.ndarray
    positives: np.ndarray
    both: np.ndarray


@dataclass(frozen=True)
class _Share:
    """Shares part / whole with the ends of their intervals, all (C,); NaN where whole is 0.

    part, whole: of independent lesions that tell as much.
    """

    part: np.ndarray
    whole: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @staticmethod
    def of(parts: np.ndarray, wholes: np.ndarray, frequency: np.ndarray, grouped: bool) -> _Share:
        """Take the shares of units (U, C) with their frequency (U,)."""
        part, whole = frequency @ parts, frequency @ wholes
        if grouped:  # as many independent lesions as tell as much
            effect = _design_effect(parts, wholes, frequency)
            part, whole = part / effect, whole / effect
        return _Share.from_counts(part, whole)

    @staticmethod
    def from_counts(part: np.ndarray, whole: np.ndarray) -> _Share:
        from scipy.special import betaincinv

        rest = whole - part
        low = np.where(part > 0, betaincinv(part + _PRIOR, rest + _PRIOR, 0.025), 0.0)
        high = np.where(rest > 0, betaincinv(part + _PRIOR, rest + _PRIOR, 0.975), 1.0)
        value = metrics.ratio(part, whole)  # NaN where whole is 0
        return _Share(part, whole, np.minimum(low, value), np.maximum(high, value))

    @staticmethod
    def alone(part: float, whole: float, value: float) -> Interval:
        """Return the interval of a single share. value: part / whole before rounding."""
        share = _Share.from_counts(np.array([part]), np.array([whole]))
        return Interval(value, min(float(share.low[0]), value), max(float(share.high[0]), value))

    @property
    def value(self) -> np.ndarray:
        return metrics.ratio(self.part, self.whole)

    def intervals(self) -> list[Interval]:
        ends = zip(self.value, self.low, self.high, strict=True)
        return [Interval(float(value), float(low), float(high)) for value, low, high in ends]


@dataclass(frozen=True)
class _F1:
    """F1 of each diagnosis, all (C,): value, its interval's ends, bias to second order, and predicted + positives."""

    f1: np.ndarray
    low: np.ndarray
    high: np.ndarray
    bias: np.ndarray
    total: np.ndarray

    @staticmethod
    def of(units: _Counts, frequency: np.ndarray, grouped: bool) -> _F1:
        occurs = frequency @ units.positives > 0
        share = _Share.of(units.found, units.total - units.found, frequency, grouped)  # TP / (TP + FP + FN)
        found, union = np.where(occurs, share.part, 0.0), np.where(occurs, share.whole, 1.0)
        smooth = (found + 0.5) / (union + 1)
        bias = 2 * smooth * (1 - smooth) / (1 + smooth) ** 3 / union  # minus half of F1'' times the variance of J
        values = [2 * j / (1 + j) for j in (share.value, share.low, share.high)]
        f1, low, high = (np.where(occurs, value, np.nan) for value in values)
        return _F1(f1, low, high, bias, np.where(occurs, frequency @ units.total, 1.0))

    def influence(self, units: _Counts) -> np.ndarray:
        """Return (U, C), the change of F1 by a unit, to first order."""
        return np.asarray((2 * units.found - self.f1 * units.total) / self.total)


def _design_effect(part: np.ndarray, whole: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """Return (C,) variance of part / whole over groups (U, C), divided by the variance over independent lesions; >= 1.

    Where the share is 0 or 1 it is unknown, and the largest possible is taken: that of groups which agree throughout.
    """
    parts, wholes = frequency @ part, frequency @ whole
    share = metrics.ratio(parts, wholes)
    units = frequency.sum()
    residuals = frequency @ (part - share * whole) ** 2 * units / max(units - 1, 1)
    effect = metrics.ratio(residuals, wholes * share * (1 - share))
    agreeing = metrics.ratio(frequency @ whole**2, wholes)
    certain = (parts == 0) | (parts == wholes)
    return np.maximum(np.nan_to_num(np.where(certain, agreeing, effect), nan=1.0), 1.0)


def _variance_of_mean(residuals: np.ndarray, groups: np.ndarray | None) -> float:
    """Return the variance of the mean of values whose distances from it are (N,); over groups if they are given."""
    sums = residuals if groups is None else np.bincount(group_numbers(groups), residuals)
    return float((sums**2).sum() / len(residuals) ** 2 * len(sums) / max(len(sums) - 1, 1))


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


def _units(tables: list[np.ndarray], labels: np.ndarray, groups: np.ndarray | None) -> tuple[list[_Counts], np.ndarray]:
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
    return [_Counts(*counts[start : start + 4].astype(float)) for start in range(0, len(counts), 4)], frequency


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
    """Return (N,) int64 numbers of the groups, in the order of their names."""
    if groups.dtype != object:
        return np.unique(groups, return_inverse=True)[1].ravel()
    import pyarrow as pa
    import pyarrow.compute as pc

    encoded = pa.array(groups).dictionary_encode()
    numbers = np.empty(len(encoded.dictionary), np.int64)
    numbers[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(numbers))
    return numbers[encoded.indices.to_numpy()]
