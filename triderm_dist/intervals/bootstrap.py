"""Draw lesions or groups with replacement, and take percentiles: intervals of any metric."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from triderm_dist import metrics
from triderm_dist.intervals.interval import Interval
from triderm_dist.intervals.units import group_numbers
from triderm_dist.runtime.messages import one_line
from triderm_dist.schema import ConfigError

RESAMPLES = 1000
CONFIDENCE = 0.95
LARGEST_RESAMPLE = 10_000
"""Lesions or groups of a bootstrap resample, at most, where a metric is computed anew on each."""
_RESAMPLES_AT_ONCE = 64
_MANY_UNITS, _SEVERAL = 20_000, 16
"""Of more units than the first number, those that occur as often as the second or less are drawn one by one."""


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
    return {
        name: Interval(_value(name, metric, *table), *percentiles(draws[name])) for name, metric in functions.items()
    }


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
            draws[name][number] = _value(name, metric, *resample)
    if units < len(sizes):
        for name, values in draws.items():
            center = functions[name].function(probabilities, labels, decisions)
            draws[name] = center + (values - np.nanmean(values)) * np.sqrt(units / len(sizes))
    return draws


def _value(name: str, metric: metrics.Metric, *table: np.ndarray) -> float:
    """Compute a metric. Raises ConfigError where a plugin's raises, or returns no number."""
    try:
        return float(metric.function(*table))
    except Exception as error:  # a function of a plugin may raise any type
        raise ConfigError(
            f"the metric {name} of a plugin failed ({one_line(error, 200, with_type=True)}); a resample may lack a "
            "diagnosis: return float('nan') where it is not defined"
        ) from error


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


def resampled(
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
