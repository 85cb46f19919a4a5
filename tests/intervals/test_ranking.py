"""Area under the ROC curve and average precision."""

import numpy as np
import pytest

from tests.intervals.test_f1 import simulated
from triderm_dist import intervals, metrics
from triderm_dist.intervals.ranking import _average_precision_influence


def ranked(positives: int, negatives: int, gap: float = 1.0, seed: int = 0) -> metrics.Ranking:
    generator = np.random.default_rng(seed)
    positive = np.repeat([True, False], [positives, negatives])
    return metrics.Ranking.of(np.round(generator.normal(size=len(positive)) + gap * positive, 1), positive)


@pytest.mark.parametrize("measure", ["area_under_roc", "average_precision"])
def test_a_ranking_has_the_interval_of_a_bootstrap_and_of_a_jackknife(measure: str) -> None:
    ranking = ranked(400, 1600)
    scores, positive = ranking.thresholds[ranking.rank], ranking.positive
    interval = getattr(intervals, measure)(ranking)
    assert interval.value == getattr(ranking, measure)
    generator, draws = np.random.default_rng(1), []
    for _ in range(500):
        rows = generator.integers(0, len(scores), len(scores))
        draws.append(getattr(metrics.Ranking.of(scores[rows], positive[rows]), measure))
    np.testing.assert_allclose([interval.low, interval.high], np.quantile(draws, [0.025, 0.975]), atol=0.006)


def test_influence_on_average_precision_is_that_of_leaving_a_lesion_out() -> None:
    ranking = ranked(300, 700)
    influence = _average_precision_influence(ranking)
    assert influence.mean() == pytest.approx(0, abs=1e-12)
    scores, kept = ranking.thresholds[ranking.rank], np.ones(1000, bool)
    for row in range(0, 1000, 97):
        kept[row] = False
        without = metrics.Ranking.of(scores[kept], ranking.positive[kept]).average_precision
        kept[row] = True
        assert influence[row] == pytest.approx(999 * (ranking.average_precision - without), abs=0.02)


@pytest.mark.parametrize("gap", [-20.0, 1.0, 20.0])
def test_a_ranking_of_few_lesions_has_an_interval(gap: float) -> None:
    for interval in (intervals.area_under_roc(ranked(5, 200, gap)), intervals.average_precision(ranked(5, 200, gap))):
        assert 0 <= interval.low <= interval.value <= interval.high <= 1
        assert interval.low < interval.high - 0.05
    perfect = intervals.average_precision(ranked(5, 200, 20.0))
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    for none in (intervals.area_under_roc(ranked(0, 9)), intervals.average_precision(ranked(0, 9))):
        assert np.isnan([none.value, none.low, none.high]).all()


def test_copies_of_lesions_in_a_group_change_no_interval_of_rates_and_rankings() -> None:
    decisions, labels = simulated([300, 90, 60])
    ranking = ranked(300, 150)
    scores, groups = ranking.thresholds[ranking.rank], np.arange(450)
    thrice = [np.repeat(each, 3, axis=0) for each in (decisions, labels, scores, ranking.positive, groups)]
    found = []
    for table, label, score, positive, group in ((decisions, labels, scores, ranking.positive, groups), thrice):
        sorted_scores = metrics.Ranking.of(score, positive)
        rates = intervals.rates_per_class(table, label, group)
        found.append(
            [
                *vars(rates[0]).values(),
                *vars(rates[2]).values(),
                intervals.area_under_roc(sorted_scores, group),
                intervals.average_precision(sorted_scores, group),
                intervals.mean(score, group),
            ]
        )
    for one, three in zip(*found, strict=True):
        np.testing.assert_allclose([three.value, three.low, three.high], [one.value, one.low, one.high], atol=0.01)
