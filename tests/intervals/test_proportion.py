"""Rates and predictive values."""

import numpy as np
import pytest
from scipy import stats

from tests.intervals.test_f1 import simulated
from triderm_dist import intervals, metrics
from triderm_dist.schema import UNLABELED


def test_rates_have_beta_intervals() -> None:
    decisions, labels = simulated([60, 30, 5])
    counts = metrics.class_counts(decisions, labels)
    unlabeled = np.ones((3, 3), bool), 3 * [UNLABELED]
    assert intervals.rates_per_class(decisions, labels) == intervals.rates_per_class(
        np.concatenate([decisions, unlabeled[0]]), np.append(labels, unlabeled[1])
    )
    for label, rates in enumerate(intervals.rates_per_class(decisions, labels)):
        found, predicted, positives = (
            each[label] for each in (counts.true_positives, counts.predicted, counts.positives)
        )
        passed = 95 - predicted - positives + found
        for interval, part, whole in (
            (rates.sensitivity, found, positives),
            (rates.specificity, passed, 95 - positives),
            (rates.positive_predictive_value, found, predicted),
            (rates.negative_predictive_value, passed, 95 - predicted),
        ):
            ends = stats.beta(part + 2 / 3, whole - part + 2 / 3).ppf([0.025, 0.975])
            assert interval.value == pytest.approx(part / whole)
            np.testing.assert_allclose([interval.low, interval.high], ends)
    one = intervals.rates(decisions[:, 0], labels == 0)
    for name in ("sensitivity", "specificity", "positive_predictive_value", "negative_predictive_value"):
        assert getattr(one, name) == getattr(intervals.rates_per_class(decisions, labels)[0], name)


def test_rates_of_no_lesion_are_unknown_also_by_group() -> None:
    nothing = np.empty(0, bool)
    for groups in (None, np.empty(0, object), np.empty(0, np.int64)):
        rates = intervals.rates(nothing, nothing, groups)
        assert np.isnan([rates.sensitivity.value, rates.specificity.low, rates.negative_predictive_value.high]).all()


@pytest.mark.parametrize("found", [0, 60])
def test_groups_that_agree_throughout_count_as_one_lesion_each(found: int) -> None:
    positive, decided = np.ones(60, bool), np.arange(60) < found
    of_groups = intervals.rates(decided, positive, np.arange(60) // 5).sensitivity
    assert of_groups == intervals.rates(decided[::5], positive[::5]).sensitivity
    assert of_groups.high - of_groups.low > 0.1


def test_predictive_values_at_the_own_prevalence_have_nearly_the_interval_of_the_share() -> None:
    generator = np.random.default_rng(0)
    positive = np.repeat([True, False], [400, 1600])
    decided = generator.random(2000) < np.where(positive, 0.85, 0.1)
    rates = intervals.rates(decided, positive)
    at_own, at_rare = zip(*intervals.predictive_values(decided, positive, [0.2, 0.01]), strict=True)
    for value, own in zip(at_own, (rates.positive_predictive_value, rates.negative_predictive_value), strict=True):
        assert value.value == pytest.approx(own.value, abs=1e-12)
        assert (value.low, value.high) == (pytest.approx(own.low, abs=0.01), pytest.approx(own.high, abs=0.01))
    assert at_rare[0].high < 0.15 and at_rare[1].low > 0.99
    called_none = intervals.predictive_values(np.zeros(2000, bool), positive, [0.2])
    assert np.isnan(called_none[0][0].value) and called_none[1][0].value == pytest.approx(0.8)
