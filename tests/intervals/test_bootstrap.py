"""Resamples, and metrics with intervals by them."""

import numpy as np
import pytest

from tests.intervals.test_f1 import simulated
from triderm_dist import intervals, metrics
from triderm_dist.intervals.bootstrap import _SEVERAL, resampled
from triderm_dist.schema import ConfigError


def test_resamples_of_few_units_are_those_of_one_multinomial_draw() -> None:
    generator = np.random.default_rng(0)
    units, frequency = generator.integers(0, 4, (500, 6)).astype(float), generator.integers(1, 9, 500)
    sums = resampled(units, frequency, 2000, 150, np.random.default_rng(3))
    counts = np.random.default_rng(3).multinomial(2000, frequency / frequency.sum(), size=150)
    np.testing.assert_array_equal(sums, counts @ units)


def test_resamples_of_many_units_have_their_mean_and_covariance() -> None:
    generator = np.random.default_rng(0)
    frequency = np.append(generator.geometric(0.5, 21_000), [20_000, 300, 40])
    drawn, columns = int(frequency.sum()), generator.integers(0, 4, (len(frequency), 3)).astype(float)
    columns[:, 1] *= frequency == 1
    columns[:, 2] *= frequency > _SEVERAL
    sums = resampled(np.column_stack([np.ones(len(frequency)), columns]), frequency, drawn, 600, generator)
    assert (sums[:, 0] == drawn).all()
    share = frequency / drawn
    mean, covariance = drawn * share @ columns, drawn * np.cov(columns.T, aweights=share, ddof=0)
    deviation = np.sqrt(np.diag(covariance))
    assert (np.abs(sums[:, 1:].mean(axis=0) - mean) < 3 * deviation / np.sqrt(600)).all()
    scaled = (np.cov(sums[:, 1:].T) - covariance) / np.outer(deviation, deviation)
    assert np.abs(scaled).max() < 0.15


def test_metrics_have_intervals_over_lesions_or_groups() -> None:
    decisions, labels = simulated([200, 40, 9])
    probabilities = decisions * 0.5 + 0.1
    functions = {
        "macro_f1": metrics.Metric("", lambda p, y, d: metrics.macro_f1(d, y)),
        "positives": metrics.Metric("", lambda p, y, d: float((y == 2).sum())),
    }
    values = intervals.of_metrics(functions, probabilities, labels, decisions, None, 400)
    assert values["macro_f1"].value == metrics.macro_f1(decisions, labels)
    expected = intervals.macro_f1(decisions, labels)
    assert values["macro_f1"].low == pytest.approx(expected.low, abs=0.04)
    assert values["positives"].low < 9 < values["positives"].high  # not stratified
    grouped = intervals.of_metrics(functions, probabilities, labels, decisions, np.where(labels == 2, -1, labels), 200)
    assert set(np.unique([grouped["positives"].low, grouped["positives"].high])) <= set(np.arange(0.0, 30, 4.5))


def test_metric_that_fails_on_a_resample_is_named() -> None:
    """A diagnosis with one lesion is in about two of three resamples."""
    decisions, labels = simulated([20, 1])
    share = metrics.Metric("", lambda p, y, d: 1 / int((y == 1).sum()))
    with pytest.raises(
        ConfigError, match=r"the metric share of a plugin failed \(ZeroDivisionError: .* lack a diagnosis"
    ):
        intervals.of_metrics({"share": share}, decisions * 1.0, labels, decisions, None, 50)


def test_percentiles_need_19_of_20_draws() -> None:
    draws = np.arange(1000.0)
    assert intervals.percentiles(draws) == tuple(np.quantile(draws, [0.025, 0.975]))
    draws[:50] = np.nan
    assert intervals.percentiles(draws) == tuple(np.quantile(draws[50:], [0.025, 0.975]))
    draws[50] = np.inf
    assert np.isnan(intervals.percentiles(draws)).all() and np.isnan(intervals.percentiles(draws[:0])).all()


def test_draws_of_many_lesions_have_the_spread_of_all_of_them() -> None:
    """Of these, 10,000 are drawn."""
    labels = np.repeat([0, 1], [30_000, 10_000])
    share = {"share": metrics.Metric("", lambda p, y, d: float(y.mean()))}
    draws = intervals.metric_draws(share, np.empty((40_000, 0)), labels, np.empty((40_000, 0)), None, 300)["share"]
    assert draws.mean() == pytest.approx(0.25, abs=1e-9)
    assert draws.std() == pytest.approx(np.sqrt(0.25 * 0.75 / 40_000), rel=0.15)
